# Train a character-level GPT on Tiny Shakespeare, as in nanoGPT: half a minute on an H100, an estimated 1 to 7 hours on
# a CPU.
#
#   python prepare_data.py shakespeare_char
#   python train.py config/train_shakespeare_char.py
#   python sample.py --out_dir=out-shakespeare-char

out_dir = "out-shakespeare-char"
dataset = "shakespeare_char"
eval_interval = 250
eval_iters = 0
compile = False  # compiling takes longer than it saves in so few steps

n_layer = 6
n_head = 6
n_embd = 384
block_size = 256
batch_size = 64
gradient_accumulation_steps = 1
dropout = 0.2

learning_rate = 2.6e-3  # for Muon, by the rule in docs/scaling.md; nanoGPT has 1e-3, for AdamW
max_iters = 1500  # with Muon; after that it overfits. nanoGPT has 5000
beta2 = 0.99  # with only 16,384 tokens per step, average longer
warmup_iters = 100
