"""Settings of train.py, which trains a GPT: from scratch, from a pretrained model, or from where a run stopped.

python train.py config/train_shakespeare_char.py --batch_size=32
torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
"""

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from plaingpt.console import UserError, note
from plaingpt.settings import BelowOne, NonNegative, NonNegativeInt, PathName, Positive, PositiveInt, Range, Size


def muon_learning_rate(n_embd: int, steps: int) -> float:
    """Muon's peak learning rate: falls with width and, slowly, with steps (docs/scaling.md has the sweeps)."""
    return float(f"{1.1 / n_embd * (1000 / steps) ** 0.25:.2g}")


@dataclass(frozen=True)
class RunSettings:
    out_dir: PathName = "out"
    """directory for checkpoints (last/, best/), metrics.jsonl and loss.png"""
    dataset: str = "openwebtext"
    """prepared data set to train on, a directory in data_dir"""
    data_dir: PathName = "data"
    """directory of the prepared data sets"""
    init_from: PathName = "scratch"
    """scratch; resume (out_dir/last); resume:step-001000; auto (resume, else scratch); gpt2 or another model"""
    minutes: Annotated[float, Range("above 0, at most 1,000,000", lambda x: 0 < x <= 1e6)] | None = None
    """end after about this many minutes; chooses the steps and, unless given, model, batch and learning rate"""
    max_iters: PositiveInt = 600000
    """number of training steps"""
    batch_size: Size = 12
    """sequences per micro-step"""
    gradient_accumulation_steps: PositiveInt = 40
    """micro-steps per training step over all processes, so that adding GPUs does not change the recipe"""
    eval_interval: PositiveInt = 2000
    """steps between evaluations; each, except at step 0, is followed by a checkpoint"""
    eval_iters: NonNegativeInt = 200
    """batches per evaluation, the same ones each time (0: the entire validation split)"""
    patience: NonNegativeInt = 0
    """stop after this many evaluations without improvement (0: never; a new run under --minutes has its own rule)"""
    keep_every: NonNegativeInt = 0
    """steps between permanent checkpoints, out_dir/step-001000 and so on (0: none)"""
    eval_only: bool = False
    """evaluate once and exit; nothing is written"""
    dry_run: bool = False
    """time a few steps, print the speed, the estimated time and (on CUDA) the memory, and exit; nothing is written"""
    seed: NonNegativeInt = 1337
    """random seed of initialization, data order and dropout"""


@dataclass(frozen=True)
class ModelSettings:
    n_layer: Size = 12
    """number of layers (blocks)"""
    n_head: Size = 12
    """attention heads per block"""
    n_embd: Size = 768
    """width of the model, in channels"""
    block_size: Size = 1024
    """context length, in tokens"""
    dropout: BelowOne = 0.0
    """dropout probability: 0 for pretraining, 0.1 or more for small data sets"""
    bias: bool = False
    """biases in linear layers and LayerNorms: OpenAI's GPT-2 has them; nanoGPT, by default, does not"""


@dataclass(frozen=True)
class OptimizationSettings:
    optimizer: Literal["muon", "adamw"] = "muon"
    """muon (for the matrices of the blocks, AdamW for the rest) or adamw (for everything)"""
    learning_rate: Positive | None = None
    """peak learning rate (None: from n_embd and max_iters for a new model under muon, else 6e-4)"""
    lr_schedule: Literal["linear", "cosine"] = "linear"
    """shape of the decay from learning_rate to min_lr; nanoGPT uses cosine, with adamw"""
    decay_lr: bool = True
    """decay the learning rate after warmup (False: keep it constant)"""
    warmup_iters: NonNegativeInt | None = None
    """steps of linear warmup (None: max_iters / 20, at most 2000)"""
    lr_decay_iters: PositiveInt | None = None
    """step at which the learning rate reaches min_lr (None: max_iters)"""
    min_lr: NonNegative | None = None
    """final learning rate (None: learning_rate / 10 for cosine, else 0)"""
    weight_decay: NonNegative = 0.1
    """weight decay of matrices and embeddings; --minutes chooses it for a new model"""
    momentum: BelowOne = 0.95
    """Muon's momentum; 0.85 is better for runs of a few hundred steps"""
    beta1: BelowOne = 0.9
    """AdamW's decay rate of the gradient average"""
    beta2: BelowOne = 0.95
    """AdamW's decay rate of the squared-gradient average"""
    grad_clip: NonNegative = 1.0
    """maximum gradient norm (0: no clipping)"""


@dataclass(frozen=True)
class LoggingSettings:
    log_interval: PositiveInt = 10
    """steps between log lines"""
    sample_tokens: NonNegativeInt = 48
    """length of the sample printed at each evaluation, in tokens (0: no sample)"""
    wandb_log: bool = False
    """log to Weights & Biases"""
    wandb_project: str = "plaingpt"
    """Weights & Biases project"""
    wandb_run_name: str | None = None
    """name of the Weights & Biases run (None: a random one)"""


@dataclass(frozen=True)
class HardwareSettings:
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 or mps"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """precision of matrix products (auto: bfloat16 if it is fast, float16 on older GPUs; float32 on CUDA means TF32)"""
    compile: bool | None = None
    """compile the forward and backward pass with torch.compile (None: on CUDA)"""
    recompute: bool = False
    """activation checkpointing: saves memory at the cost of about a third more computation"""
    sharding: Literal["ddp", "fsdp", "hybrid"] = "ddp"
    """ddp: each process holds the full model; fsdp: one shard of it; hybrid: fsdp within a node, ddp across nodes"""
    timeout: Annotated[float, Range("from 1 to 1,000,000", lambda x: 1 <= x <= 1e6)] = 600
    """seconds that a process waits for the others before the run fails"""


@dataclass(frozen=True)
class TrainConfig(RunSettings, ModelSettings, OptimizationSettings, LoggingSettings, HardwareSettings):
    RETIRED: ClassVar = {
        "backend": "ignored: the device determines it (nccl on CUDA, gloo elsewhere)",
        "always_save_checkpoint": "ignored: out_dir/last is always saved, and out_dir/best at each improvement",
    }

    @property
    def is_new_model(self) -> bool:
        return self.init_from in ("scratch", "auto")

    # The values of learning_rate, min_lr, warmup_iters and lr_decay_iters, even where these are None
    @property
    def peak_lr(self) -> float:
        rule = self.optimizer == "muon" and self.is_new_model
        return self.learning_rate or (muon_learning_rate(self.n_embd, self.max_iters) if rule else 6e-4)

    @property
    def final_lr(self) -> float:
        if self.min_lr is None:
            return self.peak_lr / 10 if self.lr_schedule == "cosine" else 0.0
        return self.min_lr

    @property
    def warmup_steps(self) -> int:
        return min(2000, self.max_iters // 20) if self.warmup_iters is None else self.warmup_iters

    @property
    def decay_end(self) -> int:
        return self.lr_decay_iters or self.max_iters

    @property
    def tokens_per_step(self) -> int:
        return self.gradient_accumulation_steps * self.batch_size * self.block_size

    def compiles_on(self, device_type: str) -> bool:
        return device_type == "cuda" if self.compile is None else self.compile

    def learning_rate_at(self, step: int) -> float:
        """Warm up linearly to `peak_lr` at `warmup_steps`, then decay to `final_lr` at `decay_end`."""
        if step < self.warmup_steps:
            return self.peak_lr * (step + 1) / (self.warmup_steps + 1)
        if not self.decay_lr:
            return self.peak_lr
        if step >= self.decay_end:
            return self.final_lr
        progress = (step - self.warmup_steps) / (self.decay_end - self.warmup_steps)
        left = {"linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}[self.lr_schedule]
        return self.final_lr + left * (self.peak_lr - self.final_lr)

    def check_schedule(self) -> None:
        """Note what is probably a mistake; UserError if the last steps would change nothing."""
        if self.learning_rate_at(self.max_iters - 1) == 0:
            zero = max(self.decay_end, self.warmup_steps)
            raise UserError(
                f"the learning rate would be 0 from step {zero} of {self.max_iters} on: "
                f"give --lr_decay_iters={self.max_iters}, or a --min_lr above 0"
            )
        if self.decay_lr and self.warmup_steps >= self.max_iters:
            note(
                f"warmup_iters={self.warmup_steps} is not below max_iters={self.max_iters}: the learning rate never "
                f"reaches {self.peak_lr:g}; give a lower --warmup_iters"
            )
        elif self.decay_lr and self.final_lr > self.peak_lr:
            problem = f"min_lr={self.final_lr:g} is above learning_rate={self.peak_lr:g}"
            note(f"{problem}: the learning rate will rise after the warmup; give a lower --min_lr")
