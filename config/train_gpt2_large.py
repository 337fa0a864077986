# Train GPT-2 774M on FineWeb, on 8 GPUs or any number that divides 96. Memory, hours and reasons: docs/scaling.md.
#
#   hf download kjj0/fineweb10B-gpt2 --repo-type=dataset --local-dir=data/fineweb10B-gpt2
#   torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_large.py

out_dir = "out-gpt2-large"
dataset = "fineweb10B-gpt2"
eval_interval = 250
eval_iters = 2040  # x 5 x 1024 = 10.4M tokens, those that train_gpt2.py evaluates

n_layer = 36
n_head = 20
n_embd = 1280
block_size = 1024

# 5 sequences x 96 micro-steps x 1024 tokens = 491,520 tokens per step over all GPUs; fits 24 GB
batch_size = 5
gradient_accumulation_steps = 96

learning_rate = 0.0008
warmup_iters = 1000
max_iters = 31500  # 15.5B tokens, about 20 per parameter: 1.5 epochs
