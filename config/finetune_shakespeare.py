# GPT-2 goes on to learn Tiny Shakespeare. Needs the internet once, for the weights; a smaller one
# is --init_from=gpt2. Any model directory serves too: --init_from=out-mine/best.
#
#   python prepare_data.py shakespeare
#   python train.py config/finetune_shakespeare.py
#   python sample.py --out_dir=out-shakespeare

out_dir = "out-shakespeare"
dataset = "shakespeare"
init_from = "gpt2-xl"
eval_interval = 5
eval_iters = 40
log_interval = 1

# 1 x 32 x 1024 = 32,768 tokens an update; the training split's 301,966 tokens are 9 updates
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20
dropout = 0.1

# OpenAI's weights were made with Adam, and this is nanoGPT's rate for it. Muon's updates have a fixed size whatever the
# gradient: how they suit these weights at a constant rate is not measured.
optimizer = "adamw"
learning_rate = 3e-5
decay_lr = False
warmup_iters = 0
