# Finetune GPT-2 1558M on Tiny Shakespeare. Downloads the weights once; --init_from=gpt2 is the smallest model.
# A model directory with GPT-2's tokenizer works, too: --init_from=out-mine/best.
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

# 1 x 32 x 1024 = 32,768 tokens per step; the training split has 301,966 tokens, or 9 steps
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20
dropout = 0.1

# nanoGPT's optimizer and learning rate; OpenAI trained with Adam, too. Muon is untested here: the size of its updates
# does not depend on the gradient, and the learning rate does not fall.
optimizer = "adamw"
learning_rate = 3e-5
decay_lr = False
warmup_iters = 0
