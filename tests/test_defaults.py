"""What train.py does without a recipe or a learning rate."""

import pytest
from conftest import run_main

from plaingpt.console import UserError
from plaingpt.run import check_default
from plaingpt.run_state import load_state
from plaingpt.train_config import TrainConfig


def test_without_a_recipe_a_cpu_does_not_start_gpt2(tmp_path, data_dir):
    flags = ["--device=cpu", "--dataset=tiny", f"--data_dir={data_dir}", f"--out_dir={tmp_path / 'out'}"]
    ended = run_main("train", *flags, "--block_size=8")
    assert ended.status == 2 and not (tmp_path / "out").exists()
    assert "add --minutes=10, which chooses settings for that time, or name a recipe from config/" in ended.err


@pytest.mark.parametrize(
    ("settings", "given", "device"),
    [
        ({}, {"max_iters": "config/mine.py"}, "cpu"),
        ({}, {"n_embd": "--n_embd"}, "cpu"),
        ({}, {}, "cuda"),
        ({"dry_run": True}, {}, "cpu"),
        ({"init_from": "gpt2"}, {"batch_size": "--batch_size"}, "cpu"),
    ],
)
def test_whoever_asks_for_it_or_has_the_machine_is_not_refused(settings, given, device):
    check_default(TrainConfig(**settings), given, device)


def test_without_a_recipe_a_cpu_does_not_finetune_on_480_sequences_per_step():
    refused = "a step would have 480 sequences, which is too much for a CPU: add "
    with pytest.raises(UserError, match=f"{refused}--dataset=NAME --minutes=10"):
        check_default(TrainConfig(init_from="gpt2"), {"max_iters": "--max_iters"}, "cpu")
    with pytest.raises(UserError, match=f"{refused}--minutes=10"):
        check_default(TrainConfig(init_from="gpt2"), {"dataset": "--dataset"}, "cpu")


def test_the_learning_rate_follows_from_width_and_steps_for_a_new_model_under_muon():
    shapes = ((128, 1000), (256, 1000), (128, 16000))
    rates = [TrainConfig(n_embd=n_embd, max_iters=steps).peak_lr for n_embd, steps in shapes]
    assert rates[0] == 0.0086 and rates[0] / rates[1] == pytest.approx(2) and rates[0] / rates[2] == pytest.approx(2)
    others = TrainConfig(optimizer="adamw"), TrainConfig(init_from="gpt2"), TrainConfig(learning_rate=6e-4)
    assert {config.peak_lr for config in others} == {6e-4}


def test_a_run_that_is_resumed_for_longer_has_the_learning_rate_it_had(tmp_path, train, resume):
    train(tmp_path / "run", learning_rate=None, max_iters=2)
    before = TrainConfig(n_embd=16, max_iters=2).peak_lr
    assert TrainConfig(n_embd=16, max_iters=4).peak_lr != before
    resume(tmp_path / "run", max_iters=4)
    settings = (tmp_path / "run/last/training.json").read_text()
    assert f'"learning_rate": {before}' in settings


def test_the_warmup_of_a_run_stays_when_it_is_resumed_for_longer(tmp_path, train, resume):
    train(tmp_path / "run", max_iters=40, eval_interval=40)
    resume(tmp_path / "run", max_iters=80)
    assert load_state(tmp_path / "run" / "last")[0].settings["warmup_iters"] == 2  # derived again, it would be 4
