"""A run's metrics for other tools as well. Their packages are optional, and whatever they raise never stops a run."""

import html
import os
import textwrap
from pathlib import Path


class WandB:
    """Weights & Biases. A resumed run goes on in the same run there."""

    name, remedy = "wandb", "pip install wandb; WANDB_MODE=offline keeps the records here"

    def __init__(self, settings: dict, out_dir: Path, resumed_from: int | None):
        import wandb

        # At a terminal `init` would wait for an answer for ever
        if os.environ.get("WANDB_MODE", "online") == "online" and not wandb.login(timeout=30):
            raise RuntimeError("no login")
        known = out_dir / "wandb_run_id"
        self.run = wandb.init(
            project=settings["wandb_project"],
            name=settings["wandb_run_name"],
            config=settings,
            dir=out_dir,
            id=known.read_text().strip() if resumed_from is not None and known.is_file() else None,
            resume="allow",
            allow_val_change=True,  # what was changed on resume
        )
        # wandb drops a record that is older than its last, as after a resume: it is to count by our `step`
        self.run.define_metric("*", step_metric="step")
        known.write_text(self.run.id + "\n")

    def log(self, record: dict) -> None:
        self.run.log(record)

    def sample(self, step: int, text: str) -> None:
        import wandb

        page = f'<meta charset="utf-8"><pre style="white-space: pre-wrap">{html.escape(text)}</pre>'
        self.run.log({"step": step, "sample": wandb.Html(page)})

    def close(self) -> None:
        self.run.finish()


class TensorBoard:
    """Event files in out_dir/tensorboard. What an interrupted run wrote after its last save is taken off the curves."""

    name, remedy = "tensorboard", "pip install tensorboard"

    def __init__(self, settings: dict, out_dir: Path, resumed_from: int | None):
        from torch.utils.tensorboard import SummaryWriter

        after = None if resumed_from is None else resumed_from + 1
        self.writer = SummaryWriter(str(out_dir / "tensorboard"), purge_step=after, flush_secs=10)
        self.writer.add_text("settings", "\n".join(f"    {name} = {value!r}" for name, value in settings.items()))

    def log(self, record: dict) -> None:
        for name, value in record.items():
            if name != "step":
                self.writer.add_scalar(name, value, record["step"])

    def sample(self, step: int, text: str) -> None:
        self.writer.add_text("sample", textwrap.indent(text, "    ", lambda line: True), step)  # Markdown's verbatim

    def close(self) -> None:
        self.writer.close()
