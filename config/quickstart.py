# Train a small GPT to write Python, in one to six minutes on two CPU cores: what `make quickstart` runs.
#
#   python prepare_data.py python
#   python train.py config/quickstart.py
#   printf 'class Server:\n    def' | python sample.py --out_dir=out-quickstart --start=-

out_dir = "out-quickstart"
dataset = "python"
init_from = "auto"  # a second run resumes
eval_interval = 250
eval_iters = 0  # the entire validation split

# Model and batch that --minutes=3 chose on two cores of a Xeon, with fewer steps. The learning rate is derived.
n_layer = 2
n_head = 2
n_embd = 128
block_size = 128
batch_size = 32  # 32 x 128 = 4,096 tokens per step
gradient_accumulation_steps = 1

max_iters = 1000
log_interval = 20
sample_tokens = 64
