"""Saving a run and resuming it.

The directory of a run holds checkpoints: `last`, from which it resumes; `best`, the model with the lowest validation
loss, which evaluation.json records; and, where asked for, `step-001000` and so on. `last` and the numbered ones are
model directories with the optimizer state (optimizer.safetensors) and the state of the run (training.json).
"""

import dataclasses
import json
import math
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from model import GPT
from plaingpt.checkpoint import all_finite, open_tensors, save_model
from plaingpt.console import UserError, errors_of_library, is_rank_0, note, one_line
from plaingpt.distributed import Distributed
from plaingpt.files import check_sums, existing, json_or_empty, new_directory, read_json, rename_aside
from plaingpt.parallel import fill, gather
from plaingpt.tokenizer import Tokenizer

FORMAT_VERSION = 1


@dataclass
class RunState:
    """What a run needs to continue, besides weights and optimizer state: the content of training.json."""

    step: int = 0
    seconds: float = 0.0
    """of training, without evaluations and saves"""
    skipped: int = 0
    """steps whose gradients were not finite"""
    initial_val_loss: float | None = None
    """of the model that training began with, which is not saved"""
    lowest_val_loss: float | None = None
    """of this run's evaluations from step 1 on; `best` may have a lower one, from steps that a resume undid"""
    evaluations_since_lowest: int = 0
    evaluated_at: int | None = None
    """the step of the last evaluation"""
    eval_sequences: int | None = None
    """sequences of an evaluation: if batch_size changes on resume, losses must stay comparable"""
    settings: dict = field(default_factory=dict)
    data: str = ""
    """the digest of the data set"""
    scaler: dict = field(default_factory=dict)

    def set_evaluation(self, data: str, eval_sequences: int, out_dir: Path) -> None:
        """Set which data evaluations use. Forget the earlier ones if their losses are not comparable with later ones,
        or if `best` is missing."""
        same = (self.data, self.eval_sequences) == (data, eval_sequences)
        self.data, self.eval_sequences = data, eval_sequences
        self.initial_val_loss = self.initial_val_loss if same else None
        if not (same and read_best(out_dir, self)):
            self.lowest_val_loss, self.evaluations_since_lowest, self.evaluated_at = None, 0, None


def is_below(loss: float | None, lowest: float | None) -> bool:
    return loss is not None and loss < (math.inf if lowest is None else lowest)


def load_state(directory: Path) -> tuple[RunState, Path]:
    """The state of a checkpoint and the directory in which it was found; UserError if it is missing or damaged."""
    found = existing(directory)
    others = [path.parent.name for path in directory.parent.glob("[!.]*/training.json") if path.parent != found]
    remedy = f"available: {', '.join(sorted(others))}" if others else "name the directory of a run with --out_dir"
    if found is None:
        if (nanogpt := directory.parent / "ckpt.pt").exists():
            remedy = f"to train on from nanoGPT's weights: --init_from={nanogpt} and another --out_dir"
        raise UserError(f"{directory}: no checkpoint there; {remedy}")
    try:
        return _read_state(found), found
    except UserError as error:
        if not others:
            raise
        raise UserError(f"{error}; {remedy} (--init_from=resume:NAME)") from error


def read_best(out_dir: Path, state: RunState) -> tuple[float, int] | None:
    """Loss and step of `best`, which may be from an undone step; None if it is missing, or if its loss is not
    comparable with those of the run."""
    best = existing(out_dir / "best")
    found = json_or_empty(best / "evaluation.json") if best else {}
    comparable = all(found.get(name) == getattr(state, name) for name in ("data", "eval_sequences"))
    loss, step = found.get("val_loss"), found.get("step")
    return (loss, step) if comparable and type(loss) is float and type(step) is int else None


def _read_state(directory: Path) -> RunState:
    if is_rank_0():  # one process is enough: if it exits, torchrun ends the others
        check_sums(directory)
    content = read_json(path := directory / "training.json")
    if content.get("format_version") != FORMAT_VERSION:
        raise UserError(f"{path}: format version {content.get('format_version')}; this plainGPT reads {FORMAT_VERSION}")
    with errors_of_library(f"{path} is damaged"):
        # Earlier versions did not save all of these.
        known = {field.name for field in dataclasses.fields(RunState)} & content.keys()
        return RunState(content["step"], **{name: content[name] for name in known - {"step"}})


class Saver:
    """Saves a run in a background thread: training waits until its state is copied, but not for the disk.

    Each save first waits for the previous one. A failed save is reported, and the earlier checkpoint remains.
    """

    def __init__(
        self, out_dir: Path, state: RunState, model: GPT, optimizers: list, tokenizer: Tokenizer, dist: Distributed
    ):
        self.out_dir, self.state, self.model, self.optimizers = out_dir, state, model, optimizers
        self.tokenizer, self.dist = tokenizer, dist
        self.best = read_best(out_dir, state)  # its loss and step, on the main process
        self._problem: str | None = None
        # One OpenMP thread: a second team beside the training thread's would outnumber the cores, and libgomp would
        # then put every thread to sleep between parallel regions, which halves the speed of training.
        self._threads = ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,))
        self._job: Future | None = None

    def save(self, val_loss: float | None = None, keep: bool = False) -> None:
        """Record `val_loss` in the state. Replace `last` with the run as it is now, and `best` too if `val_loss` is the
        lowest so far; with `keep`, also save a numbered checkpoint. All ranks; main writes."""
        self.wait()
        weights = gather(self.model.weights(), self.dist)
        moments = gather(_optimizer_tensors(self.model, self.optimizers), self.dist)
        if is_below(val_loss, self.state.lowest_val_loss):
            self.state.lowest_val_loss, self.state.evaluations_since_lowest = val_loss, 0
        elif val_loss is not None:
            self.state.evaluations_since_lowest += 1
        if self.dist.is_main:
            state = dataclasses.replace(self.state)
            self._job = self._threads.submit(self._write, weights, moments, state, val_loss, keep)

    def wait(self) -> str | None:
        """Wait until nothing is being written. Returns the problem of the last save, or None. All ranks."""
        self.dist.wait(self._job)
        return self._problem

    def _write(self, weights: dict, moments: dict, state: RunState, val_loss: float | None, keep: bool) -> None:
        self._problem = None
        if bad := next((name for name, tensor in (weights | moments).items() if not all_finite(tensor)), None):
            return self._failed(f"step {state.step} was not saved: {bad} contains NaN or infinity")
        if val_loss is not None and not math.isfinite(val_loss) and existing(self.out_dir / "last"):
            problem = f"its validation loss is {val_loss}; try a lower --learning_rate"
            return self._failed(f"step {state.step} was not saved: {problem}")

        evaluation = dict(step=state.step, val_loss=val_loss, data=state.data, eval_sequences=state.eval_sequences)
        is_best = is_below(val_loss, self.best and self.best[0])
        if is_best and self._replace("best", weights, "evaluation.json", evaluation):
            self.best = val_loss, state.step
        training = {"format_version": FORMAT_VERSION} | dataclasses.asdict(state)
        for name in ("last", f"step-{state.step:06d}") if keep else ("last",):
            self._replace(name, weights, "training.json", training, moments)

    def _replace(self, name: str, weights: dict, record: str, content: dict, moments: dict | None = None) -> bool:
        """Save a checkpoint, with `content` in its file `record`. Returns whether that succeeded."""
        path = self.out_dir / name
        try:
            with new_directory(path) as new:
                save_model(new, self.model, self.tokenizer, weights)
                (new / record).write_text(json.dumps(content, indent=2) + "\n")
                if moments is not None:
                    safetensors.torch.save_file(moments, new / "optimizer.safetensors")
                if name == "best" and self.best is None and path.is_dir():
                    note(f"renamed {path} to {rename_aside(path)}: its loss is not comparable with later ones")
            return True
        except Exception as error:  # a full disk, no permission, a quota, …: training continues
            self._failed(f"step {content['step']} could not be saved in {path}: {one_line(error)}")
            return False

    def _failed(self, problem: str) -> None:
        self._problem = problem
        note(problem + ("; the earlier checkpoint is intact" if existing(self.out_dir / "last") else ""))


def load_optimizers(
    directory: Path, saved_scaler: dict, model: nn.Module, optimizers: list, scaler: torch.amp.GradScaler
) -> None:
    """Load the saved state into `optimizers`, and into `scaler` if the saved run and this one use float16.

    Reads one tensor at a time and keeps this process's shard, so no process needs memory for the full state.
    """
    path = directory / "optimizer.safetensors"
    wanted = _optimizer_tensors(model, optimizers)
    with open_tensors(path) as saved:
        if {*saved.keys()} != wanted.keys():
            raise UserError(f"{path} does not match the model and the optimizer")
        for name, tensor in wanted.items():
            fill(tensor, saved.get_tensor(name))
    if saved_scaler and scaler.is_enabled():
        scaler.load_state_dict(saved_scaler)


def _optimizer_tensors(model: nn.Module, optimizers: list) -> dict[str, Tensor]:
    """{parameter/key: tensor} of all optimizers: the tensors themselves, sharded as the parameters are."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    states = [(names[p], values) for optimizer in optimizers for p, values in optimizer.state.items()]
    return {f"{name}/{key}": tensor for name, values in states for key, tensor in values.items()}
