"""What a run leaves to look at: metrics.jsonl and loss.png; other tools are told when asked."""

import collections
import contextlib
import json
import math
import statistics
import sys
import time
from pathlib import Path

from tqdm import tqdm

from plaingpt.console import UserError, note, one_line
from plaingpt.files import claim, release
from plaingpt.tracking import TensorBoard, WandB

SPIKE_WINDOW = 50  # logged losses that the next is compared with


class Metrics:
    """The record of one run, on the main process; elsewhere every call does nothing."""

    def __init__(self, out_dir: Path, active: bool, until_step: int | None = None):
        """Start anew, or with `until_step` go on after the lines of an interrupted run up to that step."""
        self.active, self.path, self.trackers = active, Path(out_dir) / "metrics.jsonl", []
        self.resumed_from = until_step  # until the first record after it says so
        self.losses = collections.deque(maxlen=SPIKE_WINDOW)
        if not active:
            return
        kept = [] if until_step is None else [r for r in read_metrics(self.path) if r["step"] <= until_step]
        self.losses.extend(record["train_loss"] for record in kept if "train_loss" in record)
        new = self.path.with_name("metrics.jsonl.new")
        self.lock = claim(self.path.parent)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            new.write_text("".join(json.dumps(record) + "\n" for record in kept))
            new.replace(self.path)  # whole or not at all: what was measured until now must not get lost
        except OSError as error:
            raise UserError(f"{self.path} cannot be written: {one_line(error)}") from error

    def track(self, settings: dict) -> None:
        """Tell Weights & Biases or TensorBoard too, where `wandb_log` or `tensorboard_log` asks for it."""
        for asked, tracker in (("wandb_log", WandB), ("tensorboard_log", TensorBoard)):
            if self.active and settings[asked]:
                try:
                    self.trackers.append(tracker(settings, self.path.parent, self.resumed_from))
                except Exception as error:  # missing, no login, no network: of many kinds
                    note(f"{tracker.name} is off: {one_line(error)} ({tracker.remedy})")

    def write(self, **record) -> None:
        if not self.active:
            return
        record["resumed_from"], self.resumed_from = self.resumed_from, None
        record = {key: value for key, value in record.items() if value is not None and math.isfinite(value)}
        try:
            with open(self.path, "a") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:  # a full disk does not stop training
            note(f"{self.path}: {one_line(error)}")
        self._tell_trackers("log", record)

    def sample(self, step: int, text: str) -> None:
        """A text by the model as it is, for the trackers: elsewhere it was told already."""
        self._tell_trackers("sample", step, text)

    def spike(self, loss: float) -> str | None:
        """What to tell of a logged loss that stands far above those before it; None of an ordinary one.

        Far: ten median absolute deviations above the running median, nearly seven standard deviations
        of a normal distribution, so that noise is not taken for it; and at least a tenth of a nat.
        """
        if not math.isfinite(loss):
            return None  # its update was skipped, and is counted as such
        before = list(self.losses)
        self.losses.append(loss)
        if len(before) < 10:
            return None
        median = statistics.median(before)
        usual = max(10 * statistics.median(abs(other - median) for other in before), 0.1)
        return f"loss spike: {loss:.4f}, the running median is {median:.4f}" if loss - median > usual else None

    def draw(self) -> None:
        if not self.active:
            return
        try:
            draw([self.path.parent], self.path.with_name("loss.png"))
        except OSError as error:
            note(f"loss.png: {one_line(error)}")

    def close(self) -> None:
        self._tell_trackers("close")
        if self.active:
            release(self.lock)

    def _tell_trackers(self, method: str, *arguments) -> None:
        for tracker in list(self.trackers):
            try:
                getattr(tracker, method)(*arguments)
            except Exception as error:  # the network, a full disk, the tool itself: of many kinds
                note(f"{tracker.name} is off from here on: {one_line(error)}")
                self.trackers.remove(tracker)


class Stopwatch:
    """Seconds of training: evaluations and saves stop it."""

    def __init__(self, seconds: float):
        self._before, self._started = seconds, None

    @property
    def seconds(self) -> float:
        return self._before + (time.perf_counter() - self._started if self._started else 0.0)

    def go(self) -> None:
        self._started = self._started or time.perf_counter()

    def pause(self) -> None:
        self._before, self._started = self.seconds, None


class Progress:
    """What a person sees of a run, on standard error: a bar on a terminal, plain lines elsewhere. Main only."""

    def __init__(self, start: int, max_iters: int, active: bool):
        self.active, self.max_iters = active, max_iters
        self.bar = tqdm(
            total=max_iters,
            initial=start,
            unit="update",
            disable=not (active and sys.stderr.isatty()),
            dynamic_ncols=True,
        )

    def tell(self, text: str, indent: str = "") -> None:
        if self.active:
            with contextlib.suppress(OSError):  # the terminal has gone, or who read: a run goes on, or has yet to save
                self.bar.write(indent + text.replace("\n", "\n" + indent), file=sys.stderr)

    def show(self, record: dict, seconds_left: float) -> None:
        mfu = f", mfu {record['mfu']:.1%}" if "mfu" in record else ""
        mfu += f" | {record['skipped']:,} skipped" if record.get("skipped") else ""
        figures = (
            f"loss {record['train_loss']:.4f} | lr {record['lr']:.2e} | norm {record['grad_norm']:.2f} "
            f"| {record['tokens_per_second']:,.0f} tok/s{mfu}"
        )
        if self.bar.disable:
            left = tqdm.format_interval(seconds_left)
            self.tell(f"step {record['step']}/{self.max_iters} | {figures} | {left} left")
        else:
            self.bar.set_postfix_str(figures)

    def advance(self) -> None:
        self.bar.update()

    def close(self) -> None:
        self.bar.close()


def read_metrics(path: Path) -> list[dict]:
    """The records of a metrics.jsonl; a line that a kill cut short is left out."""
    records = []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError, RecursionError):
            record = json.loads(line)
            if isinstance(record, dict) and all(
                type(v) in (int, float) for v in [record.get("step"), *record.values()]
            ):
                records.append(record)
    return records


PANELS = {
    "loss": "loss (nats a token)",
    "lr": "learning rate",
    "grad_norm": "gradient norm",
    "tokens_per_second": "tokens a second",
}


def draw(out_dirs: list[Path], picture: Path) -> bool:
    """The curves of one run or several, without a display; False if there is nothing to draw."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    if figure := curves(out_dirs):
        new = picture.with_name(f"{picture.name}.new")
        FigureCanvasAgg(figure).print_png(str(new))
        new.replace(picture)  # whole at any moment: a save takes a copy
    return figure is not None


def curves(out_dirs: list[Path]):
    """A matplotlib Figure: losses above, the rest below, a dotted line where a run was resumed; None without losses."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 7), layout="constrained")
    panels = figure.subplot_mosaic([["loss"] * 3, list(PANELS)[1:]], height_ratios=[5, 2])
    for name, axes in panels.items():
        axes.set_title(PANELS[name], fontsize="medium")
        axes.grid(alpha=0.3)
    for i, out_dir in enumerate(out_dirs):
        records, alone = read_metrics(Path(out_dir) / "metrics.jsonl"), len(out_dirs) == 1
        train, val = ("C0", "C1") if alone else (f"C{i}", f"C{i}")
        label = "" if alone else f"{Path(out_dir).name}: "
        _line(panels["loss"], records, "train_loss", f"{label}train loss", color=train, alpha=0.4, lw=1)
        _line(panels["loss"], records, "val_loss", f"{label}val loss", color=val, marker="o", ms=3)
        for name in list(PANELS)[1:]:
            _line(panels[name], records, name, color=train, lw=1)
        for resumed in sorted({record["resumed_from"] for record in records if "resumed_from" in record}):
            for axes in panels.values():
                axes.axvline(resumed, color=train, ls=":", lw=1, label=f"{label}resumed at {resumed:,}")
    panels["loss"].set_xlabel("updates")
    if not panels["loss"].lines:
        return None
    panels["loss"].legend()
    return figure


def _line(axes, records: list[dict], key: str, label: str | None = None, **style) -> None:
    points = [(record["step"], record[key]) for record in records if key in record]
    if points:
        axes.plot(*zip(*points), label=label and f"{label} {points[-1][1]:.3f}", **style)
