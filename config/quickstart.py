# What `make quickstart` trains: a small GPT that writes Python, on two CPU cores in two minutes.
#
#   python prepare_data.py python
#   python train.py config/quickstart.py
#   printf 'class Server:\n    def' | python sample.py --out_dir=out-quickstart --start=-

out_dir = "out-quickstart"
dataset = "python"
init_from = "auto"  # started again, it does not begin anew
eval_interval = 325
eval_iters = 0  # the whole validation split

n_layer = 4
n_head = 2
n_embd = 128
block_size = 128
batch_size = 16  # 16 x 128 = 2,048 tokens an update
gradient_accumulation_steps = 1

learning_rate = 4e-3
max_iters = 1300
log_interval = 20
sample_tokens = 64
warmup_iters = 20
