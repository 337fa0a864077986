"""What a run needs to go on: saved from a thread of its own, and found again, whole, on resume.

A run's folder holds checkpoints: `last`, from which it resumes; `best`, the model alone; and
`step-001000` and so on, where asked for. `last` and the numbered ones are model directories with
optimizer.safetensors and training.json beside the model.
"""

import contextlib
import dataclasses
import json
import math
import os
import shlex
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from model import GPT, GPTConfig
from plaingpt.card import write_card
from plaingpt.checkpoint import load_model, model_directory, read_json, read_tensors, write_model
from plaingpt.console import UserError, note, one_line
from plaingpt.distributed import Distributed
from plaingpt.files import SUMS, check_sums, existing, whole_directory
from plaingpt.parallel import fill, gather
from plaingpt.settings import NonNegative, NonNegativeInt, check_value
from plaingpt.tokenizer import Tokenizer, gpt2
from plaingpt.tokens import DataSet

FORMAT_VERSION = 1
# What training.json says of a run
FIELDS = {
    "step": NonNegativeInt, "seconds": NonNegative, "skipped": NonNegativeInt, "best_val_loss": float | None,
    "evaluations_since_best": NonNegativeInt, "settings": dict, "derived": list, "data": str, "scaler": dict,
}  # fmt: skip
NEW_RUN = {"step": 0, "seconds": 0.0, "skipped": 0, "best_val_loss": math.inf, "evaluations_since_best": 0}


class Saver:
    """Saves a run from a thread of its own: training waits for the copying of its state, not for the disk.

    The next save waits for the one before. A save that fails is told, and leaves the earlier checkpoint whole.
    """

    def __init__(
        self,
        out_dir: Path,
        model: GPT,
        optimizers: list,
        tokenizer: Tokenizer,
        dist: Distributed,
        best_val_loss: float = math.inf,
        tell: Callable[[str], None] = note,
    ):
        self.out_dir, self.model, self.optimizers, self.tokenizer = out_dir, model, optimizers, tokenizer
        self.dist = dist
        self.best_val_loss = best_val_loss  # of the model in `best`, if there is one
        self.tell = tell
        self._problem: str | None = None
        # One OpenMP thread: a second team beside the training thread's would outnumber the cores, and libgomp would
        # then put every thread to sleep between parallel regions, which halves the speed of training.
        self._threads = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,))
        self._job: Future | None = None

    def save(self, training: dict, val_loss: float | None = None, keep: bool = False) -> None:
        """Replace `last` by the state as it is now, and `best` too if `val_loss` is the lowest so far; with `keep`
        also leave a checkpoint with the number of the update. All ranks; main writes."""
        self.wait()
        weights = gather(self.model.weights(), self.dist)
        moments = gather(_optimizer_tensors(self.model, self.optimizers), self.dist)
        if not self.dist.is_main:
            return
        self._job = self._threads.submit(self._write, weights, moments, training, val_loss, keep)

    def wait(self) -> str | None:
        """Return when nothing is being written: what went wrong in the save before, or None. All ranks."""
        self.dist.wait(self._job)
        return self._problem

    def _write(self, weights: dict, moments: dict, training: dict, val_loss: float | None, keep: bool) -> None:
        def model_files(new: Path) -> None:
            write_model(new, self.model.config, weights, self.tokenizer)
            try:
                write_card(new, self.out_dir, self.model, training)
            except Exception as error:  # the data set's meta.json has gone, say: no reason to lose a model
                self.tell(f"no model card: {one_line(error)}")

        def state_files(new: Path) -> None:
            model_files(new)
            safetensors.torch.save_file(moments, new / "optimizer.safetensors")
            best = self.best_val_loss if self.best_val_loss < math.inf else None  # JSON has no infinity
            content = {"format_version": FORMAT_VERSION} | training | {"best_val_loss": best}
            (new / "training.json").write_text(json.dumps(content, indent=2) + "\n")
            shutil.copymode(new / "training.json", new / "optimizer.safetensors")  # its own is the owner's alone

        step, self._problem = training["step"], None
        bad = next((name for name, tensor in (weights | moments).items() if not tensor.isfinite().all()), None)
        if bad:
            return self._failed(f"update {step} is not saved: {bad} has values that are not finite numbers")
        if val_loss is not None and val_loss < self.best_val_loss and self._replace("best", model_files, step):
            self.best_val_loss = val_loss
        self._replace("last", state_files, step)
        if keep:
            self._replace(f"step-{step:06d}", state_files, step)

    def _replace(self, name: str, fill: Callable[[Path], None], step: int) -> bool:
        try:
            with whole_directory(self.out_dir / name) as new:
                fill(new)
            return True
        except Exception as error:  # a full disk, no permission, a quota: whatever it is, training has to hear of it
            self._failed(f"update {step} could not be saved in {self.out_dir / name}: {one_line(error)}")
            return False

    def _failed(self, problem: str) -> None:
        self._problem = problem
        self.tell(f"{problem}; the checkpoint before it is whole")


def load_training(directory: Path) -> dict:
    """What `Saver.save` was told of the run, and `directory`, where it was found."""
    found = existing(directory)
    if found is None:
        others = ", ".join(sorted(path.parent.name for path in directory.parent.glob("*/training.json")))
        remedy = f"there are {others}" if others else "start a run with --init_from=scratch"
        raise UserError(f"{directory}: no checkpoint there; {remedy}")
    with naming_others(found):
        if os.environ.get("RANK", "0") == "0":  # one process is enough: where it refuses, torchrun ends the others
            check_sums(found)
        path = found / "training.json"
        training = read_json(found, path.name)
        if training.get("format_version") != FORMAT_VERSION:
            raise UserError(f"{found}: format version {training.get('format_version')}, this is for {FORMAT_VERSION}")
        if missing := set(FIELDS) - set(training):
            raise UserError(f"{path} lacks {', '.join(sorted(missing))}")
        for name, hint in FIELDS.items():
            check_value(name, training[name], hint, path)
        best = training["best_val_loss"]
        return training | {"directory": found, "best_val_loss": math.inf if best is None else best}


def load_optimizers(training: dict, model: nn.Module, optimizers: list, scaler: torch.amp.GradScaler) -> None:
    """Put the saved state into `optimizers`, and into `scaler` if both then and now there is a loss scale (float16).

    Tensor by tensor, and of each what this process holds: it never holds the state of all.
    """
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict  # a second that only a resume takes

    path, saved = training["directory"] / "optimizer.safetensors", training["scaler"]
    get_optimizer_state_dict(model, optimizers)  # makes the state of optimizers that have made no step
    wanted, now = _optimizer_tensors(model, optimizers), scaler.state_dict()
    with naming_others(training["directory"]):
        for name, values in read_tensors(training["directory"], path.name):
            tensor = wanted.pop(name, None)
            if tensor is None or (values.shape, values.dtype) != (tensor.shape, tensor.dtype):
                raise UserError(f"{path} does not fit the model and the optimizer")
            if not values.isfinite().all():
                raise UserError(f"{path} has values that are not finite numbers")
            fill(tensor, values)
        if wanted:
            raise UserError(f"{path} does not fit the model and the optimizer")
        if saved and any(type(saved.get(n)) is not type(v) or not 0 <= saved[n] < math.inf for n, v in now.items()):
            raise UserError(f"{training['directory']}/training.json: its scaler is not a GradScaler's state")
    if saved and now:
        scaler.load_state_dict(saved)


def _optimizer_tensors(model: nn.Module, optimizers: list) -> dict[str, Tensor]:
    """{parameter/key: tensor} of all optimizers, the tensors themselves: whole, or this process's part of each."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    states = [(names[p], values) for optimizer in optimizers for p, values in optimizer.state.items()]
    return {f"{name}/{key}": tensor for name, values in states for key, tensor in values.items()}


def initial_model(
    config: Any, given: dict[str, str], data: DataSet, training: dict | None, check: Callable[[GPTConfig], object]
) -> tuple[GPT, Any]:
    """The model that `config` asks for, on the CPU: new, resumed or pretrained; and `config` with its true shape.

    check: called with a model's shape, before a new one is made.
    Raises UserError where a setting in `given` or the data set's tokenizer contradicts a model that exists.
    """
    shape = ("block_size", "n_layer", "n_head", "n_embd", "dropout", "bias")
    if not training and config.init_from in ("scratch", "auto"):
        if config.n_embd % config.n_head:
            raise UserError(f"n_embd={config.n_embd} must be a multiple of n_head={config.n_head}")
        settings = {name: getattr(config, name) for name in shape}
        model_config = GPTConfig(vocab_size=data.tokenizer.vocab_size, **settings)
        check(model_config)
        torch.manual_seed(config.seed)
        return GPT(model_config), config
    if training:  # its files were compared with their checksums already
        source = training["directory"]
        with naming_others(source):
            model, tokenizer = load_model(source, dropout=config.dropout, check=False)
    else:
        source, block_size = config.init_from, config.block_size if "block_size" in given else None
        model, tokenizer = load_model(source, block_size, config.dropout)
    check(model.config)
    for name in shape:
        if name in given and getattr(config, name) != getattr(model.config, name):
            raise UserError(
                f"{given[name]}: {name}={getattr(config, name)}, but {source} has {getattr(model.config, name)}"
            )
    if not tokenizer.same_as(data.tokenizer):
        told = f"the data set {config.dataset} was prepared with another tokenizer than {source}"
        if training:
            again = prepare_command(config, config.dataset, source, tokenizer)
            raise UserError(f"{told}; choose another --out_dir for a new run, or prepare it as it was: {again}")
        name = f"{config.dataset}-again"
        again = prepare_command(config, name, source, tokenizer)
        raise UserError(f"{told}; prepare it again: {again}, then train with --dataset={name}")
    return model.train(), dataclasses.replace(config, **{name: getattr(model.config, name) for name in shape})


def prepare_command(config: Any, name: str, source: str | Path, tokenizer: Tokenizer) -> str:
    """The command that prepares the text of `config.dataset` as data set `name` with the tokenizer of a model."""
    meta = Path(config.data_dir) / config.dataset / "meta.json"
    text = json.loads(meta.read_bytes())["source"] if meta.is_file() else "FILES"
    if text == "standard input":
        text = "-"
    wanted = "gpt2" if tokenizer.same_as(gpt2()) else model_directory(source)
    folder = "" if config.data_dir == "data" else f" --data_dir={config.data_dir}"
    return f"python prepare_data.py {text} --name={name} --tokenizer={shlex.quote(str(wanted))}{folder}"


@contextlib.contextmanager
def naming_others(refused: Path) -> Iterator[None]:
    """Where a checkpoint is refused, name the newest whole one of the same run, and the best model."""
    try:
        yield
    except UserError as error:
        whole = [path for path in refused.parent.iterdir() if path != refused and _whole(path)]
        whole.sort(key=lambda path: path.stat().st_mtime, reverse=True)
        states = [f"--init_from=resume:{path.name}" for path in whole if (path / "training.json").is_file()]
        models = [f"--init_from={path} (the model alone)" for path in whole if not (path / "training.json").is_file()]
        remedy = " or ".join(states[:1] + models[:1])
        raise UserError(f"{error}; one that is whole: {remedy}" if remedy else str(error)) from error


def _whole(path: Path) -> bool:
    try:
        check_sums(path)
    except UserError:
        return False
    return (path / SUMS).is_file() and (path / "model.safetensors").is_file() and path.suffix != ".new"
