"""Metrics for Weights & Biases. `Metrics` calls it, and continues without it after any error."""

import html
from pathlib import Path

REMEDY = "pip install wandb; `wandb offline` or WANDB_MODE=offline needs no account"


class WandB:
    """A run of Weights & Biases. A resumed run continues the same W&B run."""

    def __init__(self, settings: dict, out_dir: Path, resumed: bool):
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
            id=run_id.read_text().strip() if resumed and run_id.is_file() else None,
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
