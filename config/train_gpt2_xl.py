# Train GPT-2 1557M on FineWeb, on 8 GPUs or any number that divides 48. Memory, hours and reasons: docs/scaling.md.
#
#   hf download kjj0/fineweb10B-gpt2 --repo-type=dataset --local-dir=data/fineweb10B-gpt2
#   torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_xl.py

out_dir = "out-gpt2-xl"
dataset = "fineweb10B-gpt2"
eval_interval = 250
eval_iters = 1020  # x 10 x 1024 = 10.4M tokens, those that train_gpt2.py evaluates

n_layer = 48
n_head = 25
n_embd = 1600
block_size = 1024

# 10 sequences x 48 micro-steps x 1024 tokens = 491,520 tokens per step over all GPUs; fits 80 GB
batch_size = 10
gradient_accumulation_steps = 48

learning_rate = 0.0006
warmup_iters = 2000
max_iters = 63400  # 31.2B tokens, 20 per parameter: 3 epochs
