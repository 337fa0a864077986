"""Any damage to a file of a checkpoint or a data set gives the right result or one clear line.

bench/faults.py draws a thousand damages, each in another process.
"""

import shutil
from pathlib import Path

import pytest
from conftest import flags, run_main
from damage import CHECKPOINT, DATA_SET, SUMS_AFTER, damage, restore, same_model, ways
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from runs import records

from plaingpt.checkpoint import load_model
from plaingpt.console import UserError

examples = settings(max_examples=150, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])


def refused(ended) -> bool:
    """Whether a script refused its input with one line; any other failure fails the test."""
    if ended.status == 0:
        return False
    *notes, last = ended.err.splitlines()
    assert ended.status == 2 and last.startswith("train.py: "), ended.err
    assert not [line for line in notes if line.startswith((" ", "Traceback", "train.py"))], ended.err
    return True


def damage_one(files: list[str], folder: Path, data) -> tuple[Path, str]:
    """Damage one file of the folder; returns its path and what became of the checksums."""
    path = folder / data.draw(st.sampled_from(files))
    way = data.draw(st.sampled_from(ways(path)))
    damage(path, way, data.draw(st.integers(0, 2**32)), sums := data.draw(st.sampled_from(SUMS_AFTER)))
    return path, sums


@pytest.fixture
def checkpoint(tmp_path, tiny_run) -> tuple[Path, Path]:
    """The folder of a run, to be damaged, and an intact copy of its `last`."""
    shutil.copytree(tiny_run, tmp_path / "run")
    shutil.copytree(tiny_run / "last", tmp_path / "sound")
    return tmp_path / "run", tmp_path / "sound"


@examples
@given(data=st.data())
def test_a_damaged_checkpoint_gives_the_same_model_or_is_refused(checkpoint, data, data_dir, tmp_path):
    run, sound = checkpoint
    last = run / "last"
    restore(last, sound)
    _, sums = damage_one(CHECKPOINT, last, data)
    where = {"out_dir": run, "data_dir": data_dir, "device": "cpu", "dtype": "float32"}
    before = records(run)
    if refused(ended := run_main("train", *flags(init_from="resume", **where))):
        assert "--init_from=resume:" not in ended.err  # there is no other
    else:
        assert records(run) == before
    try:
        model, tokenizer = load_model(last)
    except UserError as error:
        assert "\n" not in str(error)
        return
    assert same_model(sound if sums == "kept" else last, model, tokenizer, tmp_path / "scratch")
    tokenizer.decode(range(tokenizer.vocab_size))


@examples
@given(data=st.data())
def test_a_damaged_data_set_gives_the_same_loss_or_is_refused(tmp_path, data, data_dir, tiny_run):
    if not (tmp_path / "sound").exists():
        shutil.copytree(data_dir / "tiny", tmp_path / "sound" / "tiny")
    folder = tmp_path / "data" / "tiny"
    restore(folder, tmp_path / "sound" / "tiny")
    damage_one(DATA_SET, folder, data)
    where = {"out_dir": tiny_run, "data_dir": tmp_path / "data", "device": "cpu", "dtype": "float32"}
    ended = run_main("train", *flags(init_from="resume", eval_only=True, **where))
    val_loss = [record["val_loss"] for record in records(tiny_run) if "val_loss" in record][-1]
    assert refused(ended) or f"val_loss {val_loss:.4f}" in ended.err
