# What `make quickstart` trains: a small GPT that writes Python, on two CPU cores in two minutes.
#
#   python prepare_data.py python
#   python train.py config/quickstart.py
#   python sample.py --out_dir=out-quickstart --start="def "

out_dir = "out-quickstart"
dataset = "python"
init_from = "auto"  # started again, it goes on
eval_interval = 250
eval_iters = 0

n_layer = 4
n_head = 4
n_embd = 192
block_size = 256
batch_size = 8
gradient_accumulation_steps = 1

optimizer = "muon"
lr_schedule = "linear"
learning_rate = 4e-3
min_lr = 0.0
max_iters = 1000
warmup_iters = 20
