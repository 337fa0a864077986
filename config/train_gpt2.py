# Train GPT-2 124M on FineWeb, on 8 GPUs or any number that divides 16. Memory, hours and reasons: docs/scaling.md.
#
#   hf download kjj0/fineweb10B-gpt2 --repo-type=dataset --local-dir=data/fineweb10B-gpt2
#   torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py

out_dir = "out-gpt2"
dataset = "fineweb10B-gpt2"
eval_interval = 250
eval_iters = 340  # x 30 x 1024 = 10.4M tokens, as many as in the published runs, which use the first ones

n_layer = 12
n_head = 12
n_embd = 768
block_size = 1024

# 30 sequences x 16 micro-steps x 1024 tokens = 491,520 tokens per step over all GPUs; fits 24 GB
batch_size = 30
gradient_accumulation_steps = 16

learning_rate = 0.0018
warmup_iters = 250
max_iters = 6100  # 3.0B tokens; the aim is a validation loss of 3.28 (docs/scaling.md)
