# Train a small character-level GPT on Tiny Shakespeare, as in nanoGPT: one to five minutes on two CPU cores.
#
#   python prepare_data.py shakespeare_char
#   python train.py config/train_shakespeare_cpu.py
#   python sample.py --out_dir=out-shakespeare-cpu

out_dir = "out-shakespeare-cpu"
dataset = "shakespeare_char"
eval_interval = 250
eval_iters = 0  # the entire validation split: 146 batches, one second

n_layer = 4
n_head = 4
n_embd = 128
block_size = 64
batch_size = 12
gradient_accumulation_steps = 1
dropout = 0.0

learning_rate = 4e-3  # for Muon; nanoGPT's 1e-3 is for AdamW
max_iters = 2000
beta2 = 0.99  # with only 768 tokens per step, average longer
warmup_iters = 100
