"""nanoGPT's settings: each is accepted here under the same name, or ignored with a note, as the docs say."""

import re
from pathlib import Path

import pytest

from plaingpt.settings import load_settings
from sample import SampleConfig
from train import TrainConfig

TRAIN = {
    "out_dir": "out", "eval_interval": 2000, "log_interval": 1, "eval_iters": 200, "eval_only": False,
    "always_save_checkpoint": True, "init_from": "scratch", "wandb_log": False, "wandb_project": "owt",
    "wandb_run_name": "gpt2", "dataset": "openwebtext", "gradient_accumulation_steps": 40, "batch_size": 12,
    "block_size": 1024, "n_layer": 12, "n_head": 12, "n_embd": 768, "dropout": 0.0, "bias": False,
    "learning_rate": 6e-4, "max_iters": 600000, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.95, "grad_clip": 1.0,
    "decay_lr": True, "warmup_iters": 2000, "lr_decay_iters": 600000, "min_lr": 6e-5, "backend": "nccl",
    "device": "cuda", "dtype": "bfloat16", "compile": True,
}  # fmt: skip
SAMPLE = {
    "init_from": "resume", "out_dir": "out", "start": "\n", "num_samples": 10, "max_new_tokens": 500,
    "temperature": 0.8, "top_k": 200, "seed": 1337, "device": "cuda", "dtype": "bfloat16", "compile": False,
}  # fmt: skip
RETIRED = {"train": {"backend", "always_save_checkpoint"}, "sample": {"compile"}}
SCRIPTS = [("train", TrainConfig, TRAIN), ("sample", SampleConfig, SAMPLE)]


@pytest.mark.parametrize(("script", "cls", "settings"), SCRIPTS, ids=["train", "sample"])
@pytest.mark.parametrize("how", ["flag", "recipe"])
def test_each_setting_of_nanogpt_is_accepted_or_ignored_with_a_note(tmp_path, capsys, script, cls, settings, how):
    recipe = tmp_path / "recipe.py"
    for name, value in settings.items():
        recipe.write_text(f"{name} = {value!r}\n")
        config, _ = load_settings(cls, [f"--{name}={value}" if how == "flag" else str(recipe)])
        notes = capsys.readouterr().err
        if name in RETIRED[script]:
            assert f"{name}: ignored: " in notes and not hasattr(config, name), name
        else:
            assert getattr(config, name) == value and notes == "", name


def rows_of(script: str) -> dict[str, str]:
    """The first word on each setting in the docs' table for a script; a row may be about several."""
    text = (Path(__file__).parent.parent / "docs" / "from_nanogpt.md").read_text("utf-8")
    section = text.split(f"## Settings of {script}.py")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| (\w+)", section, flags=re.M)
    return {name: here for names, here in rows for name in re.findall(r"\w+", names)}


@pytest.mark.parametrize(("script", "cls", "settings"), SCRIPTS, ids=["train", "sample"])
def test_the_table_lists_every_setting_and_those_that_are_retired(script, cls, settings):
    rows = rows_of(script)
    assert list(rows) and rows.keys() == settings.keys()
    assert {name for name, here in rows.items() if here == "retired"} == RETIRED[script]
