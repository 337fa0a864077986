# Train a small GPT to write Python, in two minutes on two CPU cores: what `make quickstart` runs.
#
#   python prepare_data.py python
#   python train.py config/quickstart.py
#   printf 'class Server:\n    def' | python sample.py --out_dir=out-quickstart --start=-

out_dir = "out-quickstart"
dataset = "python"
init_from = "auto"  # a second run resumes
eval_interval = 325
eval_iters = 0  # the entire validation split

n_layer = 4
n_head = 2
n_embd = 128
block_size = 128
batch_size = 16  # 16 x 128 = 2,048 tokens per step
gradient_accumulation_steps = 1

learning_rate = 8e-3
max_iters = 1300
log_interval = 20
sample_tokens = 64
warmup_iters = 20
