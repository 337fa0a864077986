"""What a run leaves to look at: metrics.jsonl, loss.png, and Weights & Biases when asked.

python metrics.py out-a out-b        # several runs in one picture, compare.png
"""

import json
import sys
from pathlib import Path

from config.settings import UserError, note, run_script


class Metrics:
    """The record of one run, on the main process; elsewhere every call does nothing."""

    def __init__(self, out_dir: Path, active: bool, wandb_settings: dict | None = None, until_step: int | None = None):
        """Start anew, or with `until_step` go on after the lines of an interrupted run up to that step."""
        self.active, self.path, self.wandb = active, Path(out_dir) / "metrics.jsonl", None
        if not active:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        kept = [] if until_step is None else [r for r in read_metrics(self.path) if r["step"] <= until_step]
        self.path.write_text("".join(json.dumps(record) + "\n" for record in kept))
        if wandb_settings is not None:
            self.wandb = _start_wandb(wandb_settings, self.path.parent)

    def write(self, **record) -> None:
        if not self.active:
            return
        record = {k: round(v, 7) if isinstance(v, float) else v for k, v in record.items() if v is not None}
        with open(self.path, "a") as file:
            file.write(json.dumps(record) + "\n")
        if self.wandb:
            self.wandb.log(record, step=record["step"])

    def draw(self) -> None:
        if self.active:
            draw([self.path.parent], self.path.with_name("loss.png"))

    def close(self) -> None:
        if self.wandb:
            self.wandb.finish()


def read_metrics(path: Path) -> list[dict]:
    """The records of a metrics.jsonl; a line that a kill cut short is left out."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:
            pass
    return records


def draw(out_dirs: list[Path], picture: Path) -> None:
    """Loss curves of one run or several, without a display; nothing if there is nothing to draw."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    drawn = False
    for i, out_dir in enumerate(out_dirs):
        records = read_metrics(Path(out_dir) / "metrics.jsonl")
        prefix = f"{Path(out_dir).name}: " if len(out_dirs) > 1 else ""
        for key, style in (("train_loss", {"alpha": 0.4, "lw": 1}), ("val_loss", {"marker": "o", "ms": 3})):
            points = [(r["step"], r[key]) for r in records if key in r]
            if points:
                drawn = True
                label = f"{prefix}{key.replace('_', ' ')} {points[-1][1]:.3f}"
                axes.plot(*zip(*points), color=f"C{i if prefix else len(key) % 3}", label=label, **style)
    if not drawn:
        return
    axes.set(xlabel="updates", ylabel="loss (nats a token)")
    axes.grid(alpha=0.3)
    axes.legend()
    FigureCanvasAgg(figure).print_png(str(picture))


def _start_wandb(settings: dict, directory: Path):
    """A wandb run, or None with a note: tracking never stops training."""
    try:
        import wandb

        return wandb.init(dir=directory, **settings)
    except Exception as error:  # missing, no login, no network: of many kinds
        note(f"wandb is off: {str(error).splitlines()[0]} (WANDB_MODE=offline keeps the records here)")
        return None


def main() -> None:
    out_dirs = [Path(argument) for argument in sys.argv[1:]]
    for out_dir in out_dirs:
        if not (out_dir / "metrics.jsonl").exists():
            raise UserError(f"{out_dir} has no metrics.jsonl")
    if not out_dirs:
        raise UserError("name the folders of one run or more")
    draw(out_dirs, Path("compare.png"))
    note("drawn: compare.png")


if __name__ == "__main__":
    run_script(main)
