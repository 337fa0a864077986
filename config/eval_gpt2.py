# Evaluate OpenAI's GPT-2 124M on a data set of GPT-2 tokens. Downloads the weights once.
#
#   python train.py config/eval_gpt2.py --dataset=fineweb10B-gpt2

init_from = "gpt2"
eval_only = True
eval_iters = 1275  # x 8 x 1024 = 10.4M tokens, those that the recipes train_gpt2*.py evaluate
dtype = "float32"  # OpenAI's logits reach -100, where bfloat16 rounds to multiples of 0.5
batch_size = 8
