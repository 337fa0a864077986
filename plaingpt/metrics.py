"""The record of a run: metrics.jsonl, loss.png, Weights & Biases, and what the terminal shows."""

import contextlib
import json
import math
import time
from pathlib import Path

from tqdm import tqdm

from plaingpt.console import UserError, note, one_line
from plaingpt.files import claim, new_file, release

WANDB_REMEDY = "pip install wandb; `wandb offline` or WANDB_MODE=offline needs no account"


class Metrics:
    """Records one run. In processes other than main, every method does nothing."""

    def __init__(self, out_dir: Path, active: bool, resumed_from: int | None = None):
        """Start a record, or continue it from that step. Lines are only ever added: see `read_metrics`."""
        self.active, self.path, self.wandb = active, Path(out_dir) / "metrics.jsonl", None
        self.resumed_from = resumed_from  # goes into the next record
        if not active:
            return
        earlier = self.path.read_bytes() if self.path.is_file() else b""
        if resumed_from is None and not b'{"step": '.startswith(earlier[:9]):
            raise UserError(f"{self.path} is not the record of a run; move it away, or choose another --out_dir")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.lock = claim(self.path.parent)
        if resumed_from is None:
            with new_file(self.path):
                pass
        elif earlier and not earlier.endswith(b"\n"):  # a kill cut the last line
            with open(self.path, "a") as file:
                file.write("\n")

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
        record["resumed_from"], self.resumed_from = self.resumed_from, None
        record = {key: value for key, value in record.items() if value is not None and math.isfinite(value)}
        try:
            with open(self.path, "a") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:  # a full disk does not stop training
            note(f"{self.path}: {one_line(error)}")
        self._call_wandb("log", record)

    def draw(self) -> None:
        if not self.active:
            return
        try:
            draw([self.path.parent], self.path.with_name("loss.png"))
        except Exception as error:  # a picture is no reason to end a run
            note(f"loss.png: {one_line(error)}")

    def close(self) -> None:
        self._call_wandb("finish")
        if self.active:
            release(self.lock)

    def _call_wandb(self, method: str, *arguments) -> None:
        if self.wandb:
            try:
                getattr(self.wandb, method)(*arguments)
            except Exception as error:  # of many kinds: the network, a full disk, wandb itself
                note(f"wandb is off from now on: {one_line(error)}")
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
    # Without this, wandb drops records whose own step number is not larger than its last one, as after a resume
    run.define_metric("*", step_metric="step")
    run_id.write_text(run.id + "\n")
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
        """Updates per second since the last call."""
        (seconds, before), self._last = self._last, (self.seconds, step)
        return (step - before) / max(self._last[0] - seconds, 1e-9)


def log_line(record: dict, max_iters: int, seconds_left: float) -> str:
    """A log record for people."""
    mfu = f", mfu {record['mfu']:.1%}" if "mfu" in record else ""
    skipped = f" | {record['skipped']:,} skipped" if record.get("skipped") else ""
    return (
        f"step {record['step']}/{max_iters} | loss {record['train_loss']:.4f} | lr {record['lr']:.2e} "
        f"| norm {record['grad_norm']:.2f} | {record['tokens_per_second']:,.0f} tok/s{mfu}{skipped} "
        f"| {tqdm.format_interval(seconds_left)} left"
    )


def read_metrics(path: Path) -> list[dict]:
    """The records of a metrics.jsonl, without damaged lines, such as one cut short by a kill.

    Records between the checkpoint from which a run was resumed and the end of the run before are left out.
    """
    records = []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError, RecursionError):
            record = json.loads(line)
            numbers = [record.get("step"), *record.values()] if isinstance(record, dict) else [None]
            if all(type(number) in (int, float) and abs(number) < 1e300 for number in numbers):
                kept = record.get("resumed_from", math.inf)
                records = [earlier for earlier in records if earlier["step"] <= kept] + [record]
    return records


PANELS = {"lr": "learning rate", "grad_norm": "gradient norm", "tokens_per_second": "tokens per second"}


def draw(out_dirs: list[Path], picture: Path) -> bool:
    """The curves of one or more runs, without a display; False if there is nothing to draw."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    if figure := curves(out_dirs):
        with new_file(picture, "wb") as file:
            FigureCanvasAgg(figure).print_png(file)
    return figure is not None


def curves(out_dirs: list[Path]):
    """A matplotlib Figure: losses above, the rest below, a dotted line where a run was resumed; None without losses.

    Several runs are compared in bits per byte if all have them: losses of different tokenizers do not compare.
    """
    from matplotlib.figure import Figure

    names = [Path(out_dir).resolve().name for out_dir in out_dirs]
    if len({*names}) < len(names):
        names = [str(out_dir) for out_dir in out_dirs]
    names = [name.replace("$", r"\$") for name in names]  # matplotlib would read it as mathematics
    runs = {name: read_metrics(Path(out_dir) / "metrics.jsonl") for name, out_dir in zip(names, out_dirs)}
    alone = len(runs) == 1
    compare_bits = not alone and all(any("val_bpb" in record for record in records) for records in runs.values())
    figure = Figure(figsize=(9, 7), dpi=200, layout="constrained")
    figure.suptitle(", ".join(runs))
    panels = figure.subplot_mosaic([["loss"] * 3, list(PANELS)], height_ratios=[5, 2])
    for name, title in ({"loss": "bits per byte" if compare_bits else "loss (nats per token)"} | PANELS).items():
        panels[name].set_title(title, fontsize="medium")
        panels[name].grid(alpha=0.3)
    for i, (name, records) in enumerate(runs.items()):
        colors, label = (("C0", "C1"), "") if alone else ((f"C{i}", f"C{i}"), f"{name}: ")
        _draw_losses(panels["loss"], records, "val_bpb" if compare_bits else "val_loss", colors, label)
        for key in PANELS:
            panels[key].plot(*_points(records, key), color=colors[0], lw=1)
        for resumed in sorted({record["resumed_from"] for record in records if "resumed_from" in record}):
            for axes in panels.values():
                axes.axvline(resumed, color=colors[0], ls=":", lw=1, label=f"{label}resumed at {resumed:,}")
    panels["loss"].set_xlabel("steps")
    panels["tokens_per_second"].set_ylim(bottom=0)
    if not panels["loss"].lines:
        return None
    _ignore_the_start(panels["loss"])
    panels["loss"].legend()
    return figure


def _draw_losses(axes, records: list[dict], key: str, colors: tuple[str, str], label: str) -> None:
    """The training loss, raw and smoothed, and the evaluations, the best of them marked."""
    steps, losses = _points(records, "train_loss")
    if steps and key == "val_loss":
        axes.plot(steps, losses, color=colors[0], alpha=0.2, lw=0.8)
        axes.plot(
            steps, smoothed(losses), color=colors[0], lw=1.2, label=f"{label}train loss {smoothed(losses)[-1]:.3f}"
        )
    steps, losses = _points(records, key)
    if not steps:
        return
    lowest, step = min(zip(losses, steps))
    bits = dict(zip(*_points(records, "val_bpb"))).get(step) if key == "val_loss" else None
    best = f"{lowest:.3f}" + (f" ({bits:.3f} bits per byte)" if bits else "")
    axes.plot(steps, losses, color=colors[1], marker="o", ms=3, label=f"{label}validation, best {best}")
    axes.plot(step, lowest, color=colors[1], marker="*", ms=12)


def smoothed(values: list[float], keep: float = 0.8) -> list[float]:
    """The exponential moving average, without a bias towards its start."""
    mean = weight = 0.0
    means = []
    for value in values:
        mean, weight = keep * mean + (1 - keep) * value, keep * weight + (1 - keep)
        means.append(mean / weight)
    return means


def _ignore_the_start(axes) -> None:
    """Scale the axis to the curves after their first tenth: the loss at the start would flatten all the rest."""
    end = max(max(line.get_xdata()) for line in axes.lines)
    late = [y for line in axes.lines for x, y in zip(*line.get_data()) if x >= end / 10 and line.get_ls() != ":"]
    if late and (low := min(late)) < (high := max(late)):
        axes.set_ylim(low - 0.05 * (high - low), high + 0.1 * (high - low))


def _points(records: list[dict], key: str) -> tuple[list[int], list[float]]:
    found = [(record["step"], record[key]) for record in records if key in record]
    return [step for step, _ in found], [value for _, value in found]
