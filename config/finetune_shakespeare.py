# Finetune GPT-2 1558M on Tiny Shakespeare, in about 32 GB of GPU memory: AdamW takes 16 bytes per parameter.
# Smaller: --init_from=gpt2, gpt2-medium or gpt2-large, or a model directory with GPT-2's tokenizer.
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

# 1 x 32 x 1024 = 32,768 tokens per step; an epoch is 301,966 tokens, 9 steps
batch_size = 1
gradient_accumulation_steps = 32
max_iters = 20
dropout = 0.1

# nanoGPT's optimizer and learning rate; OpenAI trained with Adam, too. Muon has not been tried for this: the size of
# its updates does not depend on the gradient, and the learning rate does not fall.
optimizer = "adamw"
learning_rate = 3e-5
decay_lr = False
warmup_iters = 0
