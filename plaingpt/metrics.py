"""The record of a run: metrics.jsonl, loss.png, Weights & Biases, and what the terminal shows."""

import contextlib
import json
import math
import time
from pathlib import Path

from tqdm import tqdm

from plaingpt.console import note, one_line
from plaingpt.files import claim, new_file, release, rename_aside

SECONDS_BETWEEN_PICTURES = 60  # drawing one takes a third of a second, and the first one a second
WANDB_REMEDY = "pip install wandb; `wandb offline` or WANDB_MODE=offline needs no account"


class Metrics:
    """Records one run. In processes other than main, every method does nothing."""

    def __init__(self, out_dir: Path, active: bool, resumed_from: int | None = None):
        """Start a record, or continue it from that step. No line is ever removed: see `read_metrics`.

        A new run renames an existing record, such as that of a run that stopped before its first save.
        """
        self.active, self.path, self.wandb = active, out_dir / "metrics.jsonl", None
        self.resumed_from = resumed_from  # goes into the next record
        self._cut = ""  # a line break, after a record that was not written completely
        self._drawn_at, self._undrawn = time.monotonic(), False  # _undrawn: whether loss.png lacks a record
        if not active:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.lock = claim(self.path.parent)
        earlier = self.path.read_bytes() if self.path.is_file() else b""
        if earlier and resumed_from is None:
            note(f"renamed {self.path} to {rename_aside(self.path)}")
        with new_file(self.path, "wb") as file:
            if earlier and resumed_from is not None:
                file.write(earlier.removesuffix(b"\n") + b"\n")  # a kill may have cut the last line

    def track(self, settings: dict) -> None:
        """Start Weights & Biases, if `wandb_log` is set."""
        if self.active and settings["wandb_log"]:
            try:
                self.wandb = start_wandb(settings, self.path.parent, resumed=self.resumed_from is not None)
            except Exception as error:  # of many kinds: not installed, no login, no network
                note(f"wandb is off: {one_line(error)} ({WANDB_REMEDY})")

    def write(self, **record) -> None:
        if not self.active:
            return
        record["resumed_from"] = self.resumed_from
        record = {key: value for key, value in record.items() if value is not None and math.isfinite(value)}
        try:
            with open(self.path, "a") as file:
                file.write(self._cut + json.dumps(record) + "\n")
            self.resumed_from, self._cut, self._undrawn = None, "", True
        except OSError as error:  # a full disk does not stop training
            self._cut = "\n"
            note(f"cannot write {self.path}: {one_line(error)}")
        self._call_wandb("log", record)

    def draw(self, at_once: bool = False) -> None:
        """Draw loss.png if there are new records, at most once a minute unless `at_once`."""
        recent = time.monotonic() - self._drawn_at < SECONDS_BETWEEN_PICTURES
        if self.active and self._undrawn and (at_once or not recent):
            try:
                draw_runs([self.path.parent], self.path.with_name("loss.png"))
            except Exception as error:  # a picture is no reason to end a run
                note(f"cannot draw loss.png: {one_line(error)}")
            self._drawn_at, self._undrawn = time.monotonic(), False

    def close(self) -> None:
        self._call_wandb("finish")
        if self.active:
            release(self.lock)

    def _call_wandb(self, method: str, *arguments) -> None:
        if self.wandb:
            try:
                getattr(self.wandb, method)(*arguments)
            except Exception as error:  # of many kinds: the network, a full disk, wandb itself
                note(f"wandb is off: {one_line(error)}")
                self.wandb = None


def start_wandb(settings: dict, out_dir: Path, resumed: bool):
    """A run of Weights & Biases. A resumed run continues the same W&B run."""
    import wandb

    # The mode may come from WANDB_MODE or from a settings file. `init` would wait for a login forever.
    if wandb.setup().settings.mode == "online" and not wandb.login(timeout=30):
        raise RuntimeError("not logged in")
    run_id = out_dir / "wandb_run_id"
    run = wandb.init(
        project=settings["wandb_project"],
        name=settings["wandb_run_name"],
        config=settings,
        dir=out_dir,
        id=run_id.read_text().strip() if resumed and run_id.is_file() else None,
        resume="allow",
        allow_val_change=True,  # of settings changed on resume
    )
    # Without this, wandb drops records whose step is not above the last one logged, as after a resume
    run.define_metric("*", step_metric="step")
    with new_file(run_id) as file:
        file.write(run.id + "\n")
    return run


class Stopwatch:
    """Seconds of training, without evaluations and saves, and steps per second."""

    def __init__(self, seconds: float, step: int = 0):
        self._before, self._started = seconds, None
        self._last = (seconds, step)

    @property
    def seconds(self) -> float:
        return self._before + (time.perf_counter() - self._started if self._started else 0.0)

    def go(self) -> None:
        self._started = self._started or time.perf_counter()

    def pause(self) -> None:
        self._before, self._started = self.seconds, None

    def rate(self, step: int) -> float:
        """Steps per second since the last call."""
        (seconds, before), self._last = self._last, (self.seconds, step)
        return (step - before) / max(self._last[0] - seconds, 1e-9)


def log_line(record: dict, max_iters: int, seconds_left: float) -> str:
    """A log record as a line for the terminal."""
    mfu = f", mfu {record['mfu']:.1%}" if record.get("mfu") else ""
    skipped = f" | {record['skipped']:,} skipped" if record.get("skipped") else ""
    return (
        f"step {record['step']}/{max_iters} | loss {record['train_loss']:.4f} | lr {record['lr']:.2e} "
        f"| norm {record['grad_norm']:.2f} | {record['tokens_per_second']:,.0f} tok/s{mfu}{skipped} "
        f"| {tqdm.format_interval(seconds_left)} left"
    )


def read_metrics(path: Path) -> list[dict]:
    """The records of a metrics.jsonl, without damaged lines, such as one cut short by a kill.

    Records of steps that a resume undid are left out.
    """
    records = []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError, RecursionError):
            record = json.loads(line)
            values = record.values() if isinstance(record, dict) and "step" in record else [None]
            if all(type(value) in (int, float) and abs(value) < 1e300 for value in values):
                if "resumed_from" in record:
                    records = [earlier for earlier in records if earlier["step"] <= record["resumed_from"]]
                records.append(record)
    return records


def draw_runs(out_dirs: list[Path], picture: Path) -> bool:
    """Draw the losses of one or more runs, without a display; False if there are none."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    if figure := curves(out_dirs):
        with new_file(picture, "wb") as file:
            FigureCanvasAgg(figure).print_png(file)
    return figure is not None


def curves(out_dirs: list[Path]):
    """A matplotlib Figure of training and validation losses; None if there are none.

    Several runs are compared in bits per byte if all have them, as losses of different tokenizers are not comparable.
    The axis fits what follows the first tenth of each run: the losses of the start would flatten all the rest.
    """
    from matplotlib.figure import Figure

    runs = [read_metrics(out_dir / "metrics.jsonl") for out_dir in out_dirs]
    several = len(runs) > 1
    bits = several and all(any("val_bpb" in record for record in records) for records in runs)
    kinds = {"val_bpb": "validation"} if bits else {"train_loss": "training", "val_loss": "validation"}
    figure, late = Figure(figsize=(9, 6), dpi=150), []
    axes = figure.subplots(gridspec_kw=dict(left=0.1, right=0.98, bottom=0.08, top=0.98))  # faster than a layout
    for i, (out_dir, records) in enumerate(zip(out_dirs, runs)):
        prefix = f"{out_dir}: ".replace("$", r"\$") if several else ""  # matplotlib reads $ as mathematics
        for key, kind in kinds.items():
            if points := [(record["step"], record[key]) for record in records if key in record]:
                label, style = f"{prefix}{kind}", {"lw": 0.8, "alpha": 0.6}
                if kind == "validation":
                    label += f", lowest {min(loss for _, loss in points):.3f}"
                    style = {"lw": 1.2, "marker": "o", "ms": 3}
                axes.plot(*zip(*points), color=f"C{i if several else int(kind == 'validation')}", label=label, **style)
                late += [loss for step, loss in points if step >= records[-1]["step"] / 10]
    if not late:
        return None
    margin = 0.05 * (max(late) - min(late)) or 0.01
    axes.set(xlabel="steps", ylabel="bits per byte" if bits else "loss (nats per token)")
    axes.set_ylim(min(late) - margin, max(late) + margin)
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.grid(alpha=0.3)
    axes.legend(handles=axes.lines)  # otherwise labels that begin with _ are left out
    return figure
