"""How a run starts, with which settings and which model, and what it prints at the end."""

import dataclasses
import os
import shlex
import signal
from pathlib import Path

import torch

from model import GPT, GPTConfig
from plaingpt.batches import derive_seed
from plaingpt.checkpoint import load_model
from plaingpt.console import RunFailed, UserError, counted, is_rank_0, note, one_line
from plaingpt.distributed import Distributed
from plaingpt.files import check_writable, existing, holds_run, json_or_empty, new_file
from plaingpt.hub import model_path, read_config
from plaingpt.plan import check_memory
from plaingpt.run_state import RunState, is_below, load_state
from plaingpt.settings import flags_of, named
from plaingpt.tokenizer import Tokenizer, gpt2
from plaingpt.tokens import DataSet
from plaingpt.train_config import TrainConfig

FIRST_LINE = "# Chosen by --minutes"  # of recipe.py
MODEL_SETTINGS = ("block_size", "n_layer", "n_head", "n_embd", "dropout", "bias")
# A resumed run does not take these from its checkpoint: they belong to the machine or to the command.
LOCAL = {"out_dir", "init_from", "eval_only", "dry_run", "device", "timeout", "minutes"}
# These decide what is trained: a resumed run keeps them.
FIXED = {"dataset", "seed", "block_size", "n_layer", "n_head", "n_embd", "bias", "optimizer", "beta1", "beta2"}


def find_checkpoint(config: TrainConfig) -> tuple[RunState, Path | None]:
    """The state of the run that `init_from` resumes, and the directory of its checkpoint; or a new state, and None."""
    how, _, name = config.init_from.partition(":")
    directory = Path(config.out_dir) / (name or "last")
    if how != "resume" and not (config.init_from == "auto" and existing(directory)):
        return RunState(), None
    if directory.parent != Path(config.out_dir):
        problem = f"--init_from={config.init_from} is not a checkpoint of out_dir={config.out_dir}"
        raise UserError(f"{problem}; name one of that directory, as in resume:step-001000")
    state, checkpoint = load_state(directory)
    note(f"resuming {checkpoint} at step {state.step}")
    return state, checkpoint


def resumed_settings(
    config: TrainConfig, given: dict[str, str], state: RunState, directory: Path
) -> tuple[TrainConfig, dict[str, str]]:
    """(settings, flags): the settings of the run in `directory`, overridden by `config`'s LOCAL ones and flags; and the
    entries of `given` that are flags. UserError if the run cannot continue.
    """
    trained, flags = state.settings, flags_of(given)
    for name in sorted(given.keys() & (trained.keys() - LOCAL)):
        if getattr(config, name) != trained[name]:
            check_change(config, name, given[name], trained[name])
    kept = vars(config).keys() - flags.keys() - LOCAL
    saved = {name: value for name, value in trained.items() if name in kept}
    saved["init_from"] = trained.get("init_from", "scratch")  # how the run began: never `resume`
    config = dataclasses.replace(config, **saved)
    if config.eval_only:
        return config, flags
    before = trained["gradient_accumulation_steps"] * trained["batch_size"]
    now = config.gradient_accumulation_steps * config.batch_size
    if now != before:
        raise UserError(
            f"gradient_accumulation_steps x batch_size is {now}, but the checkpoint was trained with {before} "
            "sequences per step: keep the product"
        )
    if config.max_iters < state.step:
        found = f"the checkpoint in {directory} is at step {state.step}"
        raise UserError(f"max_iters={config.max_iters}, but {found}: raise --max_iters")
    return config, flags


def check_change(config: TrainConfig, name: str, source: str, trained: object) -> None:
    """Print which value of a setting is used: a flag overrides the checkpoint, the checkpoint overrides a recipe.

    UserError if a flag would change a setting in FIXED; under `auto` also if a recipe would, because the checkpoint may
    be another run's.
    """
    fixed = name in FIXED and not (config.eval_only and name == "dataset")
    is_flag, value = source.startswith("--"), getattr(config, name)
    if fixed and (is_flag or (config.init_from == "auto" and not config.eval_only)):
        problem = f"{named(source, name)}={value}, but the checkpoint was trained with {trained}"
        remedy = "leave it out" if is_flag else "choose another --out_dir"
        remedy += ", or start a new run: --init_from=scratch"
        if name == "dataset":
            remedy += f", or from these weights: --init_from={shlex.quote(config.out_dir)}/best --out_dir=…"
        raise UserError(f"{problem}; {remedy}")
    if is_flag:
        note(f"changed on resume: {name}={value}, was {trained}")
    else:
        override = "" if fixed else "; a flag overrides it"
        note(f"using the checkpoint's {name}={trained}, not {value} from {source}{override}")


def check_default(config: TrainConfig, given: dict[str, str], device_type: str) -> None:
    """UserError without CUDA if the default model or batch, which are nanoGPT's for GPUs, would be used unasked.

    GPT-2 124M for 600,000 steps would take two CPU cores twelve years, at 790 tokens/s.
    """
    sizes = {"n_layer", "n_head", "n_embd"} if config.is_new_model else {"batch_size", "gradient_accumulation_steps"}
    asked = given.keys() & sizes or flags_of(given) != given
    if not (asked or config.minutes or config.dry_run or config.eval_only or device_type == "cuda"):
        problem = "this would train GPT-2 124M" if config.is_new_model else "a step would have 480 sequences"
        dataset = "" if "dataset" in given else "--dataset=NAME "
        raise UserError(
            f"without a recipe {problem}, which is too much for a CPU: add {dataset}--minutes=10, which chooses "
            "settings for that time, or name a recipe from config/"
        )


def check_same(config: TrainConfig, data: DataSet, dist: Distributed) -> None:
    """UserError if processes differ in data set, precision, kind of device or a setting, except paths, W&B's settings
    and others that may differ between machines. All ranks."""
    own = {"out_dir", "data_dir", "init_from", "timeout", "wandb_log", "wandb_project", "wandb_run_name"}
    values = {name: value for name, value in vars(config).items() if name not in own}
    values["dataset"] = config.dataset, data.digest
    values["dtype"], values["device"] = str(dist.dtype), dist.device.type  # `auto` may differ between machines
    if different := [name for name, value in values.items() if not dist.all_equal(derive_seed(value))]:
        remedy = "give all the same settings and data, also --dtype and --device if `auto` differs between machines"
        raise UserError(f"processes have different values of {', '.join(different)}: {remedy}")


def check_shared(config: TrainConfig, dist: Distributed, *values: object) -> None:
    """UserError if `values`, which come from files in out_dir, differ between processes. All ranks."""
    if not dist.all_equal(derive_seed(*values)):
        raise UserError(f"{config.out_dir} differs between processes: it must be on a disk that all nodes share")


def check_out_dir(config: TrainConfig, checkpoint: Path | None, state: RunState) -> None:
    """UserError if the run cannot be written to `out_dir`, before time is spent."""
    out_dir = Path(config.out_dir)
    check_writable(out_dir)
    is_run = holds_run(out_dir)  # UserError if it is in use
    if checkpoint:
        if json_or_empty(checkpoint / "training.json").get("step") != state.step:
            raise UserError(f"another run, which has ended, replaced {checkpoint}: run the command again")
    elif is_run:
        sources = [Path(config.data_dir) / config.dataset, *([] if config.is_new_model else [Path(config.init_from)])]
        for path in sources:
            if any(Path(real(path)).is_relative_to(real(out_dir)) for real in (os.path.abspath, os.path.realpath)):
                raise UserError(f"a new run would rename {out_dir}, which contains {path}: choose another --out_dir")


def new_shape(config: TrainConfig, data: DataSet) -> GPTConfig:
    """The shape of a new model."""
    return GPTConfig(vocab_size=data.tokenizer.vocab_size, **{name: getattr(config, name) for name in MODEL_SETTINGS})


def check_tokenizer(config: TrainConfig, data: DataSet, tokenizer: Tokenizer, source: Path | str) -> None:
    """UserError if the data set was not prepared with the tokenizer of the model in `source`."""
    if not tokenizer.same_as(data.tokenizer):
        wanted = "gpt2" if tokenizer.same_as(gpt2()) else shlex.quote(str(model_path(source)))
        raise UserError(
            f"the data set {config.dataset} was not prepared with the tokenizer of {source}; prepare its text again "
            f"with --tokenizer={wanted}"
            + (" and another --name" if source == config.init_from else ", or start a new run: --init_from=scratch")
        )


def initial_model(
    config: TrainConfig, given: dict[str, str], data: DataSet, checkpoint: Path | None, dist: Distributed
) -> tuple[GPT, TrainConfig]:
    """The model that `config` asks for, on the CPU, and `config` with the shape of that model.

    checkpoint: the directory that a run is resumed from. UserError if there is too little memory, or if a setting in
    `given` or the tokenizer of the data set contradicts a model that exists. All ranks.
    """
    if config.is_new_model and not checkpoint:
        if config.n_embd % config.n_head:
            raise UserError(f"n_embd={config.n_embd} must be a multiple of n_head={config.n_head}")
        check_memory(config, dist, new_shape(config, data))
        torch.manual_seed(config.seed)
        return GPT(new_shape(config, data)), config
    source = checkpoint or config.init_from
    block_size = config.block_size if "block_size" in given else None
    if (path := model_path(source)).suffix != ".pt":
        shape = read_config(path)
        check_memory(config, dist, dataclasses.replace(shape, block_size=block_size or shape.block_size))
    model, tokenizer = load_model(source, block_size, config.dropout, check=not checkpoint)  # checked with the state
    shape = {name: getattr(model.config, name) for name in MODEL_SETTINGS}
    if wrong := [name for name in shape if name in given and getattr(config, name) != shape[name]]:
        asked = ", ".join(f"{named(given[name], name)}={getattr(config, name)}" for name in wrong)
        remedy = " ".join(f"--{name}={shape[name]}" for name in wrong)
        raise UserError(f"{asked}: {source} has another shape; give {remedy}, or leave the shape out")
    check_tokenizer(config, data, tokenizer, source)
    return model.train(), dataclasses.replace(config, **shape)


def write_recipe(config: TrainConfig) -> None:
    """out_dir/recipe.py: the settings that differ from the defaults."""
    path = Path(config.out_dir) / "recipe.py"
    chosen = {"out_dir": config.out_dir, "init_from": "scratch" if config.init_from == "auto" else config.init_from}
    defaults = vars(TrainConfig())
    chosen |= {name: value for name, value in vars(config).items() if name not in LOCAL and value != defaults[name]}
    lines = [f"{FIRST_LINE}={config.minutes:g}; copy this file to config/ to train with these settings again"]
    lines += [f"{name} = {value!r}" for name, value in chosen.items()]
    try:
        if path.exists() and not path.read_bytes().startswith(FIRST_LINE.encode()):
            return note(f"{path} was not written by --minutes, so it is not replaced and the settings are not saved")
        with new_file(path) as file:
            file.write("\n".join(lines) + "\n")
    except OSError as error:  # a full disk does not stop training
        note(f"the settings are not saved: {one_line(error)}")


def finish_run(
    config: TrainConfig, state: RunState, start: int, best: tuple[float, int] | None, stopping: int, problem: str | None
) -> int:
    """Print the last lines of a run, and return its exit status.

    start: its first step. best: loss and step of the best model. stopping: the number of the signal that stopped it.
    problem: of the last save.
    """
    if problem:
        raise RunFailed(f"the last save failed: {problem}")
    out_dir = shlex.quote(config.out_dir)
    resume = f"--init_from=resume --out_dir={out_dir}"
    complete = state.step == config.max_iters == state.evaluated_at  # a signal during the last save changes nothing
    if stopping and not complete:
        remedy = f"saved; to continue: {resume}" if state.step > start else "nothing new to save"
        note(f"stopped by {signal.Signals(stopping).name} after step {state.step}, {remedy}")
        return 128 + stopping
    if not is_rank_0():
        return 0  # only rank 0 knows `best`
    if not best:
        raise RunFailed("no evaluation gave a finite loss, so there is no best model; try a lower --learning_rate")
    if state.step < config.max_iters:
        reason = f"{counted(state.evaluations_since_lowest, 'evaluation')} without improvement"
        note(f"ended early, after step {state.step}: {reason}; to continue: {resume} --patience=0")
    loss, step = best
    since = ""
    if is_below(loss, state.lowest_val_loss):
        since = ", before the run went back to an earlier step"
    elif state.evaluations_since_lowest > 1:  # one may be noise
        since = "; no later one is lower, so the model may be overfitting"
    if is_below(state.initial_val_loss, loss):
        since += f"; before training, val_loss was {state.initial_val_loss:.4f}"
    note(f"lowest val_loss {loss:.4f} at step {step}, saved in {out_dir}/best{since}")
    note(f"next: python sample.py --out_dir={out_dir}")
    return 0
