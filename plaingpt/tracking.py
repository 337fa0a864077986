"""Metrics for Weights & Biases and TensorBoard. Both are optional, and an error in them never stops a run."""

import html
import textwrap
from pathlib import Path


class WandB:
    """Weights & Biases. A resumed run continues the same W&B run."""

    name, remedy = "wandb", "pip install wandb; `wandb offline` or WANDB_MODE=offline needs no account"

    def __init__(self, settings: dict, out_dir: Path, resumed_from: int | None):
        import wandb

        # The mode may come from WANDB_MODE or from a settings file. `init` would wait for a login forever.
        if wandb.setup().settings.mode == "online" and not wandb.login(timeout=30):
            raise RuntimeError("not logged in")
        run_id = out_dir / "wandb_run_id"
        self.run = wandb.init(
            project=settings["wandb_project"],
            name=settings["wandb_run_name"],
            config=settings,
            dir=out_dir,
            id=run_id.read_text().strip() if resumed_from is not None and run_id.is_file() else None,
            resume="allow",
            allow_val_change=True,  # of settings changed on resume
        )
        # Without this, wandb drops records whose own step number is not larger than its last one, as after a resume
        self.run.define_metric("*", step_metric="step")
        run_id.write_text(self.run.id + "\n")

    def log(self, record: dict) -> None:
        self.run.log(record)

    def sample(self, step: int, text: str) -> None:
        import wandb

        page = f'<meta charset="utf-8"><pre style="white-space: pre-wrap">{html.escape(text)}</pre>'
        self.run.log({"step": step, "sample": wandb.Html(page)})

    def close(self) -> None:
        self.run.finish()


class TensorBoard:
    """Event files in out_dir/tensorboard. A resumed run removes what was logged after its checkpoint."""

    name, remedy = "tensorboard", "pip install tensorboard"

    def __init__(self, settings: dict, out_dir: Path, resumed_from: int | None):
        from torch.utils.tensorboard import SummaryWriter

        first_step = None if resumed_from is None else resumed_from + 1
        self.writer = SummaryWriter(str(out_dir / "tensorboard"), purge_step=first_step, flush_secs=10)
        self.writer.add_text("settings", "\n".join(f"    {name} = {value!r}" for name, value in settings.items()))

    def log(self, record: dict) -> None:
        for name, value in record.items():
            if name != "step":
                self.writer.add_scalar(name, value, record["step"])

    def sample(self, step: int, text: str) -> None:
        self.writer.add_text("sample", textwrap.indent(text, "    ", lambda line: True), step)  # a Markdown code block

    def close(self) -> None:
        self.writer.close()
