# GPT-2 774M on OpenWebText, on 8 GPUs. The data set has to be prepared first (README.md, "Reproduce GPT-2").
#
#   torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_large.py

out_dir = "out-gpt2-large"
dataset = "openwebtext"
eval_interval = 1000
eval_iters = 200

n_layer = 36
n_head = 20
n_embd = 1280
block_size = 1024

# 4 sequences x 120 micro-steps x 1024 tokens = 491,520 tokens an update, over all GPUs together
batch_size = 4
gradient_accumulation_steps = 120

# as GPT-3's models of this size (Brown et al. 2020, table 2.1)
learning_rate = 0.00025
weight_decay = 0.1
warmup_iters = 2000
max_iters = 600000  # 300B tokens
