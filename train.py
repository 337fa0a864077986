"""Train a GPT on a prepared data set, from scratch, from a pretrained model, or on from where a run stopped.

python train.py config/train_shakespeare_char.py --batch_size=32
torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
"""

import dataclasses
import itertools
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from checkpoint import load_model, load_optimizers, load_training, save_best, save_checkpoint
from config.settings import (
    Fraction,
    NonNegative,
    NonNegativeInt,
    Positive,
    PositiveInt,
    UserError,
    load_settings,
    note,
    run_script,
)
from data.batches import EvalBatches, TrainBatches, mix
from data.token_files import DataSet, open_data_set
from distributed import Distributed, connect
from files import existing
from metrics import Metrics
from model import GPT, IGNORED, GPTConfig
from optimizer import apply_gradients, make_optimizers, scheduled_learning_rate


@dataclass(frozen=True)
class TrainConfig:
    out_dir: str = "out"
    """folder of the run: last/, best/, metrics.jsonl, loss.png"""
    eval_interval: PositiveInt = 2000
    """updates between evaluations; each is followed by a save"""
    eval_iters: NonNegativeInt = 200
    """batches of an evaluation, always the same ones; 0: the whole validation split"""
    eval_only: bool = False
    """evaluate once, then end; nothing is written"""
    log_interval: PositiveInt = 10
    """updates between lines of the log"""
    sample_tokens: NonNegativeInt = 48
    """tokens written by the model at each evaluation, for a look; 0: none"""
    init_from: str = "scratch"
    """scratch; resume: go on from out_dir/last; auto: resume if it is there; or a model: gpt2, a directory, a ckpt.pt"""
    wandb_log: bool = False
    """also record the run in Weights & Biases"""
    wandb_project: str = "plaingpt"
    """its project there"""
    wandb_run_name: str | None = None
    """its name there"""
    dataset: str = "openwebtext"
    """name of a prepared data set, a folder of data_dir"""
    data_dir: str = "data"
    """the folder of the data sets"""
    gradient_accumulation_steps: PositiveInt = 40
    """micro-steps of an update, over all processes: more processes never change the recipe"""
    batch_size: PositiveInt = 12
    """sequences of a micro-step"""
    block_size: PositiveInt = 1024
    """tokens of a sequence, and positions of the model"""
    n_layer: PositiveInt = 12
    """blocks"""
    n_head: PositiveInt = 12
    """attention heads of a block"""
    n_embd: PositiveInt = 768
    """channels"""
    dropout: Fraction = 0.0
    """share of activations dropped: 0 is good for pretraining, 0.1 and more for small data sets"""
    bias: bool = False
    """biases in linear layers and LayerNorms, as GPT-2 has them; without is a little faster and as good"""
    learning_rate: Positive = 6e-4
    """the peak"""
    max_iters: PositiveInt = 600000
    """updates, exactly"""
    weight_decay: NonNegative = 0.1
    """of matrices and embeddings"""
    beta1: Fraction = 0.9
    """AdamW's decay of the mean of the gradients"""
    beta2: Fraction = 0.95
    """AdamW's decay of the mean of their squares"""
    grad_clip: NonNegative = 1.0
    """largest norm of the gradients; 0: any"""
    decay_lr: bool = True
    """lower the learning rate after the warm-up"""
    warmup_iters: NonNegativeInt | None = None
    """updates until the peak (by default a twentieth of max_iters, at most 2000)"""
    lr_decay_iters: PositiveInt | None = None
    """update at which the learning rate arrives at min_lr (by default max_iters)"""
    min_lr: NonNegative | None = None
    """learning rate at the end (by default a tenth of learning_rate)"""
    device: str = "auto"
    """cpu, cuda, cuda:1, mps"""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """precision of matrix products; auto: bfloat16 where the processor has it"""
    compile: bool | None = None
    """torch.compile the forward and backward pass (by default on CUDA)"""
    seed: int = 1337
    """of initialisation, data order and dropout"""

    RETIRED: ClassVar = {
        "backend": "not needed, the device decides (nccl on CUDA, gloo elsewhere)",
        "always_save_checkpoint": "not needed, out_dir/last is always saved and out_dir/best when it improves",
    }

    def __post_init__(self):
        if self.n_embd % self.n_head:
            raise UserError(f"n_embd={self.n_embd} must be a multiple of n_head={self.n_head}")
        derived = dict(
            warmup_iters=min(2000, self.max_iters // 20),
            lr_decay_iters=self.max_iters,
            min_lr=self.learning_rate / 10,
        )
        for name, value in derived.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)

    def learning_rate_at(self, step: int) -> float:
        return scheduled_learning_rate(
            step, self.learning_rate, self.warmup_iters, self.lr_decay_iters, self.min_lr, self.decay_lr
        )


# On resume these may differ from what the checkpoint was trained with; the others decide what is trained.
CHANGEABLE = {
    "out_dir", "data_dir", "eval_interval", "eval_iters", "eval_only", "log_interval", "sample_tokens", "init_from",
    "wandb_log", "wandb_project", "wandb_run_name", "batch_size", "gradient_accumulation_steps", "learning_rate",
    "max_iters", "decay_lr", "warmup_iters", "lr_decay_iters", "min_lr", "weight_decay", "grad_clip", "dropout",
    "device", "dtype", "compile",
}  # fmt: skip
OF_THIS_PLACE = {"out_dir", "data_dir", "init_from", "eval_only", "device", "dtype", "compile"}  # never taken over


def resume_settings(config: TrainConfig, given: dict[str, str]) -> tuple[TrainConfig, dict | None]:
    """The run's settings and, if it goes on from out_dir/last, what that checkpoint says of it."""
    last = Path(config.out_dir) / "last"
    if config.init_from not in ("resume", "auto") or (config.init_from == "auto" and existing(last) is None):
        return config, None
    training = load_training(last)
    trained = training["settings"]
    changes = {name for name in given if name in trained and getattr(config, name) != trained[name]} - OF_THIS_PLACE
    for name in sorted(changes):
        what = f"{given[name]}: {name}={getattr(config, name)}, but {last} was trained with {trained[name]}"
        if name not in CHANGEABLE:
            raise UserError(f"{what}; leave it out, or start anew with --init_from=scratch")
        note(f"changed on resume: {what}")
    fields = {field.name for field in dataclasses.fields(TrainConfig)}
    kept = {k: v for k, v in trained.items() if k in fields - changes - OF_THIS_PLACE}
    # what was derived is derived again from what changed
    for name, source in (("lr_decay_iters", "max_iters"), ("warmup_iters", "max_iters"), ("min_lr", "learning_rate")):
        if source in changes and name in training["derived"] and name not in given:
            kept[name] = None
    config = dataclasses.replace(config, **kept)
    sequences = config.gradient_accumulation_steps * config.batch_size
    if sequences != trained["gradient_accumulation_steps"] * trained["batch_size"]:
        raise UserError(
            f"batch_size x gradient_accumulation_steps = {sequences} sequences an update, but {last} was trained "
            f"with {trained['gradient_accumulation_steps'] * trained['batch_size']}: keep the product"
        )
    return config, training


def initial_model(config: TrainConfig, data: DataSet, training: dict | None) -> GPT:
    """The model to train, on the CPU: resumed, new, or pretrained."""
    torch.manual_seed(config.seed)
    if training is None and config.init_from in ("scratch", "auto"):
        names = ("block_size", "n_layer", "n_head", "n_embd", "dropout", "bias")
        return GPT(GPTConfig(vocab_size=data.tokenizer.vocab_size, **{name: getattr(config, name) for name in names}))
    resumed = training is not None
    source = Path(config.out_dir) / "last" if resumed else config.init_from
    model, tokenizer = load_model(source, None if resumed else config.block_size, config.dropout)
    if not tokenizer.same_as(data.tokenizer):
        raise UserError(f"data set {config.dataset} has another tokenizer than {source}; prepare it with that one")
    return model.train()


def train_step(
    model: nn.Module, optimizers: list, scaler, batches: TrainBatches, step: int, config: TrainConfig, dist: Distributed
) -> tuple[Tensor, Tensor]:
    """One update. Returns the mean loss of this rank's micro-batches and the norm of the gradients, on the device."""
    micro_steps = config.gradient_accumulation_steps // dist.world_size
    total = torch.zeros((), device=dist.device)
    for i in range(micro_steps):
        index = i * dist.world_size + dist.rank  # rank by rank, so that any number of processes sees the same update
        inputs, targets = dist.to_device(*batches.micro_batch(step, index, config.batch_size))
        torch.manual_seed(mix(config.seed, step, index))  # dropout: nothing of the generators needs saving
        model.require_backward_grad_sync = i == micro_steps - 1  # for DDP: one exchange an update
        with dist.autocast():
            _, loss = model(inputs, targets)
        scaler.scale(loss / micro_steps).backward()
        total += loss.detach() / micro_steps
    return total, apply_gradients(model, optimizers, scaler, config.learning_rate_at(step), config.grad_clip)


@torch.no_grad()
def evaluate(model: nn.Module, batches: EvalBatches, dist: Distributed) -> float:
    """Mean loss over the evaluation batches, shared out over the ranks. All ranks."""
    model.eval()
    losses, count = [], 0
    for index in range(dist.rank, len(batches), dist.world_size):
        inputs, targets = batches.batch(index)
        counted = int((targets != IGNORED).sum())
        inputs, targets = dist.to_device(inputs, targets)
        with dist.autocast():
            losses.append(model(inputs, targets)[1].float() * counted)
        count += counted
    model.train()
    total, count = dist.sum(torch.stack(losses).cpu().double().sum().item() if losses else 0.0, count)
    return total / count


def write_sample(model: GPT, data: DataSet, tokens: int, dist: Distributed, seed: int) -> str:
    """A few words by the model as it is, going on from the first token of the validation split."""
    prompt = [int(next(iter(data.val.all()))[0])]
    model.eval()
    with dist.autocast():
        drawn = model.generate(
            prompt, tokens, 0.8, 200, end_of_text=data.tokenizer.end_of_text, generator=torch.Generator().manual_seed(seed)
        )
        text = data.tokenizer.decode([*prompt, *drawn])
    model.train()
    return text


def main() -> int:
    config, given = load_settings(TrainConfig)
    derived = [name for name in ("warmup_iters", "lr_decay_iters", "min_lr") if name not in given]
    config, training = resume_settings(config, given)
    dist = connect(config.device, config.dtype)
    try:
        return run(config, training, derived, dist)
    finally:
        dist.close()


def run(config: TrainConfig, training: dict | None, derived: list[str], dist: Distributed) -> int:
    """The whole run, top to bottom. Returns the exit status."""
    if config.gradient_accumulation_steps % dist.world_size:
        raise UserError(
            f"gradient_accumulation_steps={config.gradient_accumulation_steps} must be a multiple of the number of "
            f"processes, {dist.world_size}: it counts the micro-steps of all of them"
        )
    data = open_data_set(Path(config.data_dir) / config.dataset, check=dist.is_main)
    if training and training["data"] != data.digest:
        note(f"the data set {config.dataset} is not the one that {config.out_dir}/last was trained on")
    raw_model = initial_model(config, data, training).to(dist.device)
    block_size = raw_model.config.block_size
    sequences = config.gradient_accumulation_steps * config.batch_size
    train_batches = TrainBatches(data.train, block_size, sequences, config.seed)
    eval_batches = EvalBatches(data.val, block_size, config.batch_size, config.eval_iters)
    model = dist.wrap(raw_model)
    if config.compile or (config.compile is None and dist.device.type == "cuda"):
        model = torch.compile(model)

    if config.eval_only:
        loss = evaluate(model, eval_batches, dist)
        note(f"val_loss {loss:.4f} | perplexity {math.exp(loss):.2f}" + _bits(loss, data, " | {:.4f} bits per byte"))
        return 0

    optimizers = make_optimizers(raw_model, config.learning_rate, config.weight_decay, (config.beta1, config.beta2))
    scaler = torch.amp.GradScaler(dist.device.type, enabled=dist.dtype == torch.float16)
    out_dir = Path(config.out_dir)
    start, seconds, best_val_loss = 0, 0.0, math.inf
    if training:
        start, seconds, best_val_loss = training["step"], training["seconds"], training["best_val_loss"]
        load_optimizers(out_dir / "last", raw_model, optimizers)
        scaler.load_state_dict(training["scaler"])
    elif dist.is_main:
        set_aside(out_dir)
    dist.barrier()
    settings = dataclasses.asdict(config)
    wandb_settings = dict(project=config.wandb_project, name=config.wandb_run_name, config=settings)
    metrics = Metrics(out_dir, dist.is_main, wandb_settings if config.wandb_log else None, start if training else None)
    tokens_per_update = sequences * block_size
    announce(raw_model, data, config, dist, tokens_per_update)
    on_terminal = dist.is_main and sys.stderr.isatty()
    bar = tqdm(total=config.max_iters, initial=start, unit="update", disable=not on_terminal, dynamic_ncols=True)

    def tell(line: str) -> None:
        if dist.is_main:
            bar.write(line, file=sys.stderr)

    clock, logged = time.perf_counter(), start
    for step in itertools.count(start):
        # evaluate and save: before the first update, then at each interval, and after the last update
        if (step % config.eval_interval == 0 and step != start) or step in (0, config.max_iters):
            dist.synchronize()
            paused = time.perf_counter()
            val_loss = evaluate(model, eval_batches, dist)
            metrics.write(step=step, tokens=step * tokens_per_update, val_loss=val_loss, val_bpb=_bpb(val_loss, data))
            tell(f"step {step}: val_loss {val_loss:.4f}" + _bits(val_loss, data, ", {:.4f} bits per byte"))
            if step > start and dist.is_main:
                if val_loss < best_val_loss:
                    best_val_loss = val_loss
                    save_best(out_dir / "best", raw_model, data.tokenizer)
                state = dict(
                    step=step,
                    seconds=round(seconds + paused - clock, 3),
                    best_val_loss=best_val_loss,
                    settings=settings,
                    derived=derived,
                    data=data.digest,
                    scaler=scaler.state_dict(),
                )
                save_checkpoint(out_dir / "last", raw_model, optimizers, data.tokenizer, state)
                metrics.draw()
            if config.sample_tokens and dist.is_main:
                tell("  " + write_sample(raw_model, data, config.sample_tokens, dist, step).replace("\n", "\n  "))
            clock += time.perf_counter() - paused  # evaluation is no part of the training time
        if step >= config.max_iters:
            break

        loss, norm = train_step(model, optimizers, scaler, train_batches, step, config, dist)
        bar.update()

        done = step + 1
        if done % config.log_interval == 0 or done == config.max_iters:
            (loss_sum,) = dist.sum(loss.item())  # a CPU-GPU sync point: only here
            now = time.perf_counter()
            tokens_per_second = (done - logged) * tokens_per_update / (now - clock)
            seconds, clock, logged = seconds + now - clock, now, done
            peak = dist.peak_flops
            record = dict(
                step=done,
                tokens=done * tokens_per_update,
                seconds=seconds,
                train_loss=loss_sum / dist.world_size,
                lr=config.learning_rate_at(step),
                grad_norm=norm.item(),
                tokens_per_second=round(tokens_per_second),
                mfu=tokens_per_second * raw_model.flop_per_token() / peak if peak else None,
            )
            metrics.write(**record)
            left = (config.max_iters - done) * tokens_per_update / tokens_per_second
            line = describe(record, config.max_iters, left)
            bar.set_postfix_str(line.split("|", 1)[1].rsplit("|", 1)[0]) if on_terminal else tell(line)
    bar.close()
    metrics.close()
    tell(f"done: {out_dir}/best, {out_dir}/last, {out_dir}/loss.png; next: python sample.py --out_dir={out_dir}")
    return 0


def set_aside(out_dir: Path) -> None:
    """An earlier run in the same folder is kept under another name: a new run never destroys it."""
    if existing(out_dir / "last") or existing(out_dir / "best"):
        free = next(path for i in itertools.count(1) if not (path := Path(f"{out_dir}.{i}")).exists())
        out_dir.rename(free)
        note(f"{out_dir} held an earlier run: it is now {free} (--init_from=resume goes on with a run)")


def announce(model: GPT, data: DataSet, config: TrainConfig, dist: Distributed, tokens_per_update: int) -> None:
    precision = str(dist.dtype).removeprefix("torch.")
    note(
        f"{model.num_parameters() / 1e6:.2f}M parameters, {dist.world_size} x {dist.device.type} in {precision}; "
        f"{config.max_iters:,} updates of {tokens_per_update:,} tokens, "
        f"{config.max_iters * tokens_per_update / len(data.train):.1f} epochs of {len(data.train):,}"
    )


def describe(record: dict, max_iters: int, seconds_left: float) -> str:
    mfu = f", mfu {record['mfu']:.1%}" if record["mfu"] else ""
    left = tqdm.format_interval(seconds_left)
    return (
        f"step {record['step']}/{max_iters} | loss {record['train_loss']:.4f} | lr {record['lr']:.2e} "
        f"| norm {record['grad_norm']:.2f} | {record['tokens_per_second']:,} tok/s{mfu} | {left} left"
    )


def _bpb(loss: float, data: DataSet) -> float | None:
    """Bits per byte of text: comparable between tokenizers. None where the text's size is not known."""
    return loss / math.log(2) * len(data.val) / data.val.n_bytes if data.val.n_bytes else None


def _bits(loss: float, data: DataSet, form: str) -> str:
    bpb = _bpb(loss, data)
    return form.format(bpb) if bpb else ""


if __name__ == "__main__":
    run_script(main)
