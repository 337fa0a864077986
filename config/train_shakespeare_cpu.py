# A small character model of Tiny Shakespeare on a laptop's CPU: nanoGPT's model and tokens, about a minute.
#
#   python prepare_data.py shakespeare_char
#   python train.py config/train_shakespeare_cpu.py
#   python sample.py --out_dir=out-shakespeare-cpu

out_dir = "out-shakespeare-cpu"
dataset = "shakespeare_char"
eval_interval = 250
eval_iters = 0  # the whole validation split: 145 batches of this size take a second

n_layer = 4
n_head = 4
n_embd = 128
block_size = 64
batch_size = 12
gradient_accumulation_steps = 1
dropout = 0.0

learning_rate = 4e-3  # of Muon; AdamW, as nanoGPT has it, wants 1e-3
max_iters = 2000
beta2 = 0.99  # 768 tokens an update are few: average longer
warmup_iters = 100
