import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY, child_environment, edit_json, run_main
from safetensors.torch import load_file
from test_distributed import TORCHRUN

import train as train_script
from model import GPT, GPTConfig
from plaingpt.checkpoint import load_model
from plaingpt.console import UserError
from plaingpt.distributed import Distributed
from plaingpt.metrics import read_metrics
from plaingpt.run_state import RunState, load_state
from plaingpt.tokens import DataSet, Tokens, open_data_set
from train import Run, TrainConfig, start_run, train_step

TIMES = {"seconds", "tokens_per_second", "mfu", "resumed_from"}
TWICE = {"batch_size": 2, "gradient_accumulation_steps": 2}
PLAN = {"lr_decay_iters": 6, "warmup_iters": 2, "min_lr": 1e-3}  # given, so that a shorter run has the same one


def records(out_dir: Path) -> list[dict]:
    """What was measured, apart from times and where it was interrupted."""
    return [{k: v for k, v in record.items() if k not in TIMES} for record in read_metrics(out_dir / "metrics.jsonl")]


def weights(out_dir: Path, name: str = "last/model.safetensors") -> dict[str, torch.Tensor]:
    return load_file(out_dir / name)


def largest_difference(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> float:
    assert left.keys() == right.keys()
    return max((left[name] - right[name]).abs().max().item() for name in left)


def same_run(left: Path, right: Path) -> bool:
    """Whether two runs ended in the same weights and optimizer state, bit for bit, and measured the same."""
    files = ("last/model.safetensors", "last/optimizer.safetensors", "best/model.safetensors")
    same_files = all((left / file).read_bytes() == (right / file).read_bytes() for file in files)
    return same_files and records(left) == records(right)


def test_a_run_leaves_its_files(tiny_run):
    assert sorted(path.name for path in tiny_run.iterdir()) == ["best", "last", "loss.png", "metrics.jsonl"]
    model_files = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}
    model_files |= {"tokenizer_config.json", "SHA256SUMS"}
    assert {path.name for path in (tiny_run / "best").iterdir()} == model_files | {"evaluation.json"}
    last = {path.name for path in (tiny_run / "last").iterdir()}
    assert last == model_files | {"optimizer.safetensors", "training.json"}


def test_metrics_have_the_keys_of_the_contract(tiny_run):
    lines = read_metrics(tiny_run / "metrics.jsonl")
    logged = {"step", "tokens", "seconds", "train_loss", "lr", "grad_norm", "tokens_per_second"}
    evaluated = {"step", "tokens", "val_loss", "val_bpb"}
    assert {frozenset(line) for line in lines} == {frozenset(logged), frozenset(evaluated)}
    assert [line["step"] for line in lines if "train_loss" in line] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines if "val_loss" in line] == [0, 3, 6]
    assert all(line["tokens"] == line["step"] * 4 * 16 for line in lines)
    assert all(math.isfinite(value) for line in lines for value in line.values())


def test_a_run_learns(tiny_run, data_dir):
    losses = [line["val_loss"] for line in records(tiny_run) if "val_loss" in line]
    vocab_size = open_data_set(data_dir / "tiny").tokenizer.vocab_size
    assert losses[0] == pytest.approx(math.log(vocab_size), abs=0.2)
    assert losses[2] < losses[1] < losses[0] - 0.1


def test_bits_per_byte_are_the_loss_in_bits_of_a_character(tiny_run):
    for line in records(tiny_run):
        if "val_loss" in line:
            assert line["val_bpb"] == pytest.approx(line["val_loss"] / math.log(2))  # here a token is a byte


def test_the_learning_rate_of_each_update_is_the_schedules(tiny_run):
    rates = [line["lr"] for line in records(tiny_run) if "lr" in line]
    assert rates == pytest.approx([1e-2 * (1 - step / 6) for step in range(6)])


def test_the_last_learning_rate_is_nanogpts_under_its_schedule_and_0_under_ours():
    assert TrainConfig(learning_rate=1e-2).min_lr == 0
    assert TrainConfig(learning_rate=1e-2, lr_schedule="cosine").min_lr == pytest.approx(1e-3)


def test_a_learning_rate_that_is_probably_a_mistake_is_reported_in_one_line(tmp_path, train):
    def warnings(**changes) -> list[str]:
        lines = train(tmp_path / "run", eval_interval=10, **changes).err.splitlines()
        return [line for line in lines if "learning rate" in line]

    (line,) = warnings(max_iters=10, warmup_iters=10)
    assert line.startswith("warmup_iters=10 is not below max_iters=10: the learning rate never reaches 0.01")
    assert warnings(max_iters=10, warmup_iters=9, min_lr=1e-2) == []
    (line,) = warnings(max_iters=10, min_lr=2e-2)
    assert line.startswith("min_lr=0.02 is above learning_rate=0.01: the learning rate will rise after the warmup")
    assert len(warnings(max_iters=10, warmup_iters=10, min_lr=2e-2)) == 1
    assert warnings(max_iters=10, min_lr=2e-2, decay_lr=False) == []


def test_max_iters_is_exact_and_the_last_update_is_evaluated_and_saved(tmp_path, train):
    train(tmp_path / "run", max_iters=5)
    lines = records(tmp_path / "run")
    assert max(line["step"] for line in lines if "train_loss" in line) == 5
    assert [line["step"] for line in lines if "val_loss" in line] == [0, 3, 5]
    assert load_state(tmp_path / "run" / "last")[0].step == 5


def test_best_is_the_model_of_the_lowest_loss(tmp_path, train):
    train(tmp_path / "run", **GETS_WORSE | {"max_iters": 4})
    evaluated = [line for line in records(tmp_path / "run") if "val_loss" in line and line["step"]]
    losses = {line["step"]: line["val_loss"] for line in evaluated}
    best = min(losses, key=losses.get)
    assert best != 4, "this test wants a run that gets worse"
    assert load_state(tmp_path / "run" / "last")[0].best_val_loss == losses[best]
    train(tmp_path / "short", **GETS_WORSE | {"max_iters": best})
    assert largest_difference(weights(tmp_path / "run", "best/model.safetensors"), weights(tmp_path / "short")) == 0


def test_a_checkpoint_loads_in_transformers(tiny_run):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ours, tokenizer = load_model(tiny_run / "last")
    theirs = AutoModelForCausalLM.from_pretrained(tiny_run / "last").eval()
    ids = tokenizer.encode("a road, and")
    assert AutoTokenizer.from_pretrained(tiny_run / "last")("a road, and")["input_ids"] == ids
    with torch.no_grad():
        assert torch.allclose(ours(torch.tensor([ids]))[0], theirs(torch.tensor([ids])).logits, atol=1e-4)


def test_the_same_seed_is_the_same_run_and_another_seed_another(tmp_path, train, tiny_run):
    train(tmp_path / "same")
    train(tmp_path / "other", seed=1)
    assert same_run(tiny_run, tmp_path / "same")
    assert largest_difference(weights(tiny_run), weights(tmp_path / "other")) > 1e-3


def test_accumulated_micro_steps_equal_one_large_batch(tmp_path, train):
    train(tmp_path / "one", optimizer="adamw", gradient_accumulation_steps=1, batch_size=4)  # Muon's bf16 rounds more
    train(tmp_path / "four", optimizer="adamw", gradient_accumulation_steps=4, batch_size=1, eval_iters=8)
    # Adam divides gradients by their own size: where they are next to nothing, it makes much of their rounding
    assert largest_difference(weights(tmp_path / "one"), weights(tmp_path / "four")) < 2e-4
    for one, four in zip(records(tmp_path / "one"), records(tmp_path / "four")):
        assert one == pytest.approx(four, rel=1e-4)


def test_evaluation_and_samples_do_not_change_the_run(tmp_path, train):
    train(tmp_path / "often", dropout=0.3, eval_interval=1, sample_tokens=9)
    train(tmp_path / "once", dropout=0.3, eval_interval=100, sample_tokens=0, log_interval=4)
    assert largest_difference(weights(tmp_path / "often"), weights(tmp_path / "once")) == 0


def test_dropout_changes_the_run(tmp_path, train, tiny_run):
    train(tmp_path / "run", dropout=0.3)
    assert largest_difference(weights(tiny_run), weights(tmp_path / "run")) > 1e-4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_resumed_run_is_the_straight_run_bit_for_bit(tmp_path, train, resume, optimizer, dtype):
    settings = dict(optimizer=optimizer, dtype=dtype, dropout=0.2, gradient_accumulation_steps=2, batch_size=2) | PLAN
    train(tmp_path / "straight", **settings)
    train(tmp_path / "halves", max_iters=3, **settings)
    assert not same_run(tmp_path / "straight", tmp_path / "halves")
    resume(tmp_path / "halves", max_iters=6, dtype=dtype)
    assert same_run(tmp_path / "straight", tmp_path / "halves")


def test_a_run_can_be_resumed_twice(tmp_path, train, resume):
    train(tmp_path / "straight", **PLAN)
    train(tmp_path / "parts", max_iters=2, **PLAN)
    resume(tmp_path / "parts", max_iters=3)
    resume(tmp_path / "parts", max_iters=6)
    assert largest_difference(weights(tmp_path / "straight"), weights(tmp_path / "parts")) == 0


def test_a_finished_run_that_is_resumed_stays_as_it_is(tmp_path, train, resume):
    train(tmp_path / "run", max_iters=2)
    before, lines = weights(tmp_path / "run"), records(tmp_path / "run")
    resume(tmp_path / "run")
    assert largest_difference(before, weights(tmp_path / "run")) == 0
    assert records(tmp_path / "run") == lines


def test_what_was_derived_from_max_iters_is_derived_again(tmp_path, train, resume):
    train(tmp_path / "run", max_iters=2)
    resume(tmp_path / "run", max_iters=4)
    assert load_state(tmp_path / "run" / "last")[0].settings["lr_decay_iters"] == 4
    train(tmp_path / "given", max_iters=2, lr_decay_iters=3)
    resume(tmp_path / "given", max_iters=3)
    assert load_state(tmp_path / "given" / "last")[0].settings["lr_decay_iters"] == 3
    printed = resume(tmp_path / "given", status=2, max_iters=4).err
    assert "the learning rate would be 0 from step 3 of 4 on: give --lr_decay_iters=4, or" in printed
    resume(tmp_path / "given", max_iters=4, lr_decay_iters=4)


@pytest.mark.parametrize(
    ("changes", "zero"), [(dict(lr_decay_iters=20), 20), (dict(lr_decay_iters=10, warmup_iters=25), 25)]
)
def test_a_schedule_that_ends_before_the_run_does_is_refused(tmp_path, train, changes, zero):
    """Those steps would be computed and change nothing."""
    printed = train(tmp_path / "run", status=2, max_iters=40, **changes).err
    assert f"the learning rate would be 0 from step {zero} of 40 on: give --lr_decay_iters=40" in printed
    assert not (tmp_path / "run").exists()
    train(tmp_path / "run", max_iters=4, lr_decay_iters=2, min_lr=1e-3)


def test_what_an_interrupted_save_left_is_resumed(tmp_path, train, resume):
    train(tmp_path / "run", max_iters=2)
    (tmp_path / "run" / "last").rename(tmp_path / "run" / ".last.old")
    resume(tmp_path / "run", max_iters=4)
    assert load_state(tmp_path / "run" / "last")[0].step == 4


@pytest.fixture(scope="session")
def short_run(tmp_path_factory, train) -> Path:
    """Two steps; only for resumes that are refused."""
    out_dir = tmp_path_factory.mktemp("runs") / "short"
    train(out_dir, max_iters=2)
    return out_dir


@pytest.mark.parametrize(
    "changes",
    [{"n_embd": 48}, {"block_size": 8}, {"seed": 1}, {"optimizer": "adamw"}, {"bias": True}, {"dataset": "other"}],
)
def test_a_resume_that_contradicts_the_checkpoint_is_refused(short_run, resume, changes):
    ((name, value),) = changes.items()
    ended = resume(short_run, status=2, max_iters=4, **changes)
    assert f"--{name}: {name}={value}, but the checkpoint was trained with" in ended.err
    assert load_state(short_run / "last")[0].step == 2


def test_a_recipe_of_another_run_does_not_continue_this_one_by_itself(short_run, tmp_path):
    recipe = tmp_path / "recipe.py"
    recipe.write_text('dataset = "other"\n')
    ended = run_main("train", recipe, f"--out_dir={short_run}", "--init_from=auto")
    assert ended.status == 2 and f"{recipe}: dataset=other, but the checkpoint was trained with tiny" in ended.err


def test_a_setting_that_agrees_with_the_checkpoint_may_be_given(tmp_path, train, resume):
    train(tmp_path / "run", max_iters=2)
    resume(tmp_path / "run", max_iters=3, n_embd=16)
    assert load_state(tmp_path / "run" / "last")[0].step == 3


def test_a_resume_with_another_learning_rate_is_used_and_reported(tmp_path, train, resume):
    train(tmp_path / "run", max_iters=2)
    ended = resume(tmp_path / "run", max_iters=4, learning_rate=5e-3, decay_lr=False)
    assert "changed on resume: learning_rate=0.005" in ended.err
    assert [line["lr"] for line in records(tmp_path / "run") if "lr" in line][2:] == [5e-3, 5e-3]


def test_none_on_resume_is_derived_from_the_settings_of_the_run(tmp_path, train, resume):
    train(tmp_path / "run", max_iters=2, learning_rate=None)
    before = load_state(tmp_path / "run" / "last")[0].settings["learning_rate"]
    resume(tmp_path / "run", max_iters=2, learning_rate=None, eval_only=True)
    resume(tmp_path / "run", max_iters=3, learning_rate=None, lr_decay_iters=None, warmup_iters=None)
    after = load_state(tmp_path / "run" / "last")[0].settings
    assert abs(after["learning_rate"] / before - 1) < 0.2  # of three steps, not of two
    assert (after["lr_decay_iters"], after["warmup_iters"]) == (3, 0)


def test_a_resume_keeps_the_sequences_of_an_update(tmp_path, train, resume, short_run):
    assert "keep the product" in resume(short_run, status=2, max_iters=4, batch_size=2).err
    train(tmp_path / "straight", **PLAN)
    train(tmp_path / "run", max_iters=3, **PLAN)
    resume(tmp_path / "run", max_iters=6, batch_size=2, gradient_accumulation_steps=2)
    assert largest_difference(weights(tmp_path / "straight"), weights(tmp_path / "run")) < 1e-5


def test_a_resume_with_another_batch_size_evaluates_the_same_sequences(tmp_path, train, resume):
    train(tmp_path / "run", max_iters=2)
    path = tmp_path / "run" / "last" / "training.json"
    content = json.loads(path.read_text())
    assert content.pop("eval_sequences") == 2 * 4
    path.write_text(json.dumps(content))  # as an earlier version wrote it
    (path.parent / "SHA256SUMS").unlink()
    losses = [resume(tmp_path / "run", eval_only=True, **changes).err.splitlines()[-1] for changes in ({}, TWICE)]
    assert losses[0] == losses[1] != resume(tmp_path / "run", eval_only=True, eval_iters=1).err.splitlines()[-1]


def test_a_recipe_given_again_on_resume_changes_neither_evaluations_nor_what_is_derived(tmp_path, train, data_dir):
    train(tmp_path / "run", max_iters=2)
    (tmp_path / "recipe.py").write_text("eval_iters = 2\nmin_lr = 0.001\n")
    where = [f"--out_dir={tmp_path / 'run'}", f"--data_dir={data_dir}", "--init_from=resume", "--max_iters=3"]
    changed = [f"--{name}={value}" for name, value in TWICE.items()]
    ended = run_main("train", tmp_path / "recipe.py", *where, *changed, "--device=cpu", "--dtype=float32")
    assert ended.status == 0, ended.err
    state, _ = load_state(tmp_path / "run" / "last")
    assert state.eval_sequences == 2 * 4 and "min_lr" in state.derived


def test_a_resume_on_other_data_is_reported(tmp_path, train, resume, data_dir):
    train(tmp_path / "run", max_iters=1)
    edit_json(tmp_path / "run" / "last" / "training.json", data="another")
    assert "is not the one that" in resume(tmp_path / "run", max_iters=2).err


def test_the_best_loss_on_other_data_is_forgotten(tmp_path, train, resume):
    train(tmp_path / "run", max_iters=6)
    edit_json(tmp_path / "run" / "last" / "training.json", data="another", evaluations_since_lowest=1)
    edit_json(tmp_path / "run" / "best" / "evaluation.json", data="another", val_loss=0.01)
    resume(tmp_path / "run", max_iters=7)
    assert load_state(tmp_path / "run" / "last")[0].best_step == 7


def test_a_run_that_does_not_fit_in_memory_is_refused_before_it_is_loaded(tmp_path, train, resume):
    train(tmp_path / "run", max_iters=1)
    edit_json(tmp_path / "run" / "last" / "config.json", n_embd=2**20)
    assert "needs at least" in resume(tmp_path / "run", max_iters=2, status=2).err


def test_resume_without_a_checkpoint_is_one_line_and_status_2(tmp_path, resume):
    problem = f"{tmp_path / 'none' / 'last'}: no checkpoint there; name the directory of a run with --out_dir"
    assert resume(tmp_path / "none", status=2).err == f"train.py: {problem}\n"


def test_auto_starts_a_run_and_then_goes_on_with_it(tmp_path, train):
    train(tmp_path / "straight", **PLAN)
    train(tmp_path / "run", init_from="auto", max_iters=3, **PLAN)
    train(tmp_path / "run", init_from="auto", **PLAN)
    assert same_run(tmp_path / "straight", tmp_path / "run")


def test_eval_only_tells_the_loss_and_writes_nothing(tmp_path, train, resume, tiny_run):
    val_loss = [line["val_loss"] for line in records(tiny_run) if "val_loss" in line][-1]
    before = {path: path.stat().st_mtime_ns for path in tiny_run.rglob("*")}
    printed = resume(tiny_run, eval_only=True).err
    assert resume(tiny_run, eval_only=True, batch_size=3, eval_iters=0).err.splitlines()[-1].startswith("val_loss ")
    resumed, evaluated = printed.splitlines()
    assert resumed == f"resuming {tiny_run}/last at step 6" and evaluated.startswith(f"val_loss {val_loss:.4f}")
    assert {path: path.stat().st_mtime_ns for path in tiny_run.rglob("*")} == before
    train(tmp_path / "new", eval_only=True)
    assert not (tmp_path / "new").exists()


def test_eval_only_evaluates_a_run_on_another_data_set(tmp_path, resume, tiny_run, data_dir):
    (tmp_path / "same").symlink_to(data_dir / "tiny")
    ended = resume(tiny_run, eval_only=True, data_dir=tmp_path, dataset="same")
    assert "changed on resume: dataset=same" in ended.err and "\nval_loss " in ended.err


def test_eval_only_needs_no_training_split(tmp_path, train, tiny_run, data_dir):
    shutil.copytree(data_dir / "tiny", tmp_path / "tiny")
    meta = json.loads((tmp_path / "tiny" / "meta.json").read_text())
    ids = (tmp_path / "tiny" / "train.bin").read_bytes()[:4]
    meta["splits"]["train"]["files"][0] |= {"tokens": 2, "sha256": hashlib.sha256(ids).hexdigest()}
    edit_json(tmp_path / "tiny" / "meta.json", splits=meta["splits"])
    (tmp_path / "tiny" / "train.bin").write_bytes(ids)
    given = {"init_from": tiny_run / "best", "data_dir": tmp_path}
    assert "val_loss " in train(tmp_path / "run", eval_only=True, **given).err
    assert "the train split has 2 tokens" in train(tmp_path / "run", status=2, **given).err


def test_a_run_does_not_read_what_is_in_the_directory_that_it_renames(tmp_path, train, data_dir, monkeypatch):
    train(tmp_path / "run", max_iters=1)
    ended = train(tmp_path / "run", init_from=tmp_path / "run" / "best", status=2)
    assert f"{tmp_path / 'run' / 'best'} is in {tmp_path / 'run'}, which a new run renames" in ended.err
    assert not (tmp_path / "run.1").exists()
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        train("scratch", max_iters=1)  # named like the default of init_from
    shutil.copytree(data_dir, tmp_path / "run" / "data")
    (tmp_path / "run" / "out").symlink_to(data_dir)
    (tmp_path / "in").symlink_to(tmp_path / "run" / "data")
    for place in ("run/data", "run/out", "in"):
        ended = train(tmp_path / "run", data_dir=tmp_path / place, status=2)
        assert f"{tmp_path / place / 'tiny'} is in {tmp_path / 'run'}, which a new run renames" in ended.err
    assert (tmp_path / "scratch.1").exists()


def test_a_new_run_sets_the_old_one_aside(tmp_path, train):
    train(tmp_path / "run", max_iters=1)
    old = weights(tmp_path / "run")
    ended = train(tmp_path / "run", max_iters=2, seed=5)
    assert "moved the earlier run" in ended.err
    assert largest_difference(old, weights(tmp_path / "run.1")) == 0
    assert load_state(tmp_path / "run" / "last")[0].step == 2
    assert [line["step"] for line in records(tmp_path / "run")] == [0, 1, 2, 2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_embd": 15}, "n_embd=15 must be a multiple of n_head=2"),
        ({"n_layer": -1}, "--n_layer must be int"),
        ({"batch_size": 0}, "--batch_size must be int"),
        ({"dataset": "nowhere"}, "no such data set"),
        ({"block_size": 5000}, "too few for one block of 5,000"),
        ({"init_from": "no/such/model"}, "no/such/model"),
        ({"init_from": ""}, "init_from is empty"),
        ({"learning_rat": 1}, "did you mean learning_rate?"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(tmp_path, train, changes, message):
    ended = train(tmp_path / "run", status=2, **changes)
    assert message in ended.err
    assert ended.err.startswith("train.py: ")
    assert ended.err.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device")
def test_cuda_without_cuda_is_one_line_and_status_2(tmp_path, tiny_flags):
    """As a process of its own: what a shell sees."""
    command = [sys.executable, ROOT / "train.py", *tiny_flags(tmp_path / "run", device="cuda")]
    ended = subprocess.run(command, cwd=tmp_path, env=child_environment(), capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("train.py: --device=cuda")
    assert ended.stderr.count("\n") == 1


def test_micro_steps_that_do_not_divide_among_the_processes_are_refused():
    two = Distributed(torch.device("cpu"), torch.float32, rank=0, world_size=2)
    with pytest.raises(UserError, match="gradient_accumulation_steps=3 must be a multiple of"):
        start_run(TrainConfig(gradient_accumulation_steps=3), {}, RunState(), None, two)


def test_finetuning_starts_from_the_pretrained_model(tmp_path, train, tiny_run):
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 16}
    train(tmp_path / "run", init_from=tiny_run / "last", max_iters=2, learning_rate=1e-3, **shape)
    before = [line["val_loss"] for line in records(tiny_run) if "val_loss" in line]
    after = [line["val_loss"] for line in records(tmp_path / "run") if "val_loss" in line]
    assert after[0] == pytest.approx(before[-1], abs=1e-6)
    assert after[-1] != after[0]
    assert load_state(tmp_path / "run" / "last")[0].step == 2


def test_finetuning_can_crop_the_block(tmp_path, train, tiny_run):
    train(tmp_path / "run", init_from=tiny_run / "last", max_iters=1, block_size=8)
    assert load_model(tmp_path / "run" / "last")[0].config.block_size == 8


def test_a_cropped_block_survives_a_resume(tmp_path, train, resume, tiny_run):
    cropped = dict(init_from=tiny_run / "last", block_size=8) | PLAN
    train(tmp_path / "straight", **cropped)
    train(tmp_path / "halves", max_iters=3, **cropped)
    resume(tmp_path / "halves", max_iters=6)
    assert same_run(tmp_path / "straight", tmp_path / "halves")
    assert load_model(tmp_path / "halves" / "last")[0].config.block_size == 8


def test_finetuning_on_data_of_another_tokenizer_is_refused(tmp_path, train, tiny_run):
    for dataset in ("other", "bytes"):
        ended = train(tmp_path / "run", status=2, init_from=tiny_run / "last", dataset=dataset)
        assert "another tokenizer" in ended.err and f"with --tokenizer={tiny_run / 'last'} and another" in ended.err


def test_a_run_whose_data_were_prepared_in_another_way_goes_on_once_they_are_prepared_again(tmp_path, train, resume):
    text, place = tmp_path / "text.txt", dict(data_dir=tmp_path, dataset="text")
    text.write_text("a road, the sea and rain " * 80)
    prepare = [text, "--val_fraction=0.2", f"--data_dir={tmp_path}", "--name=text"]
    assert run_main("prepare_data", *prepare, "--tokenizer=char").status == 0
    train(tmp_path / "run", **place, max_iters=2)
    assert run_main("prepare_data", *prepare, "--tokenizer=byte").status == 0
    printed = resume(tmp_path / "run", status=2, data_dir=tmp_path, max_iters=4).err
    flag = re.search(r"prepare its text again with (--tokenizer=\S+), or choose another --out_dir\n$", printed)[1]
    assert run_main("prepare_data", *prepare, flag).status == 0
    resume(tmp_path / "run", data_dir=tmp_path, max_iters=4)
    assert load_state(tmp_path / "run" / "last")[0].step == 4


def test_finetuning_with_another_shape_is_refused(tmp_path, train, tiny_run):
    ended = train(tmp_path / "run", status=2, init_from=tiny_run / "last", n_layer=3)
    assert "--n_layer: n_layer=3" in ended.err


class Seen(Tokens):
    """Tokens that remember where they were read."""

    def windows(self, starts, length):
        self.starts = [*getattr(self, "starts", []), *(starts % len(self)).tolist()]
        return super().windows(starts, length)


def test_each_process_reads_its_own_sequences_alone():
    config = TrainConfig(block_size=8, batch_size=2, gradient_accumulation_steps=4, optimizer="adamw")
    seen = []
    for rank in range(2):
        tokens, model = Seen([np.arange(1000, dtype=np.uint16) % 65]), GPT(GPTConfig(8, 65, 1, 1, 4, bias=False))
        run = Run(config, DataSet(tokens, tokens, None, ""), model, 1, Distributed(torch.device("cpu"), torch.float32))
        run.dist = Distributed(torch.device("cpu"), torch.float32, rank, world_size=2)
        train_step(run, 0)
        seen.append(tokens.starts)
    assert [len(starts) for starts in seen] == [4, 4]
    assert sorted(seen[0] + seen[1]) == sorted((run.train_batches.starts(0) % len(tokens)).tolist())


def test_a_run_of_nothing_but_nans_ends_with_status_1_and_is_not_saved(tmp_path, train):
    """However rarely it logs, evaluates and saves."""
    changes = dict(max_iters=60, eval_interval=40, log_interval=50, learning_rate=1e30, warmup_iters=0, grad_clip=0)
    ended = train(tmp_path / "run", status=1, **changes)
    assert "the gradients were not finite in 39 consecutive steps, seen after step 40" in ended.err.splitlines()[-1]
    assert [line["step"] for line in records(tmp_path / "run")] == [0]
    assert not (tmp_path / "run" / "last").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_stopped_run_saves_and_goes_on_exactly(tmp_path, train, resume, tiny_flags, number):
    settings = dict(eval_interval=10**6, sample_tokens=0, dropout=0.1, warmup_iters=0, lr_decay_iters=10**6, min_lr=0)
    flags = tiny_flags(tmp_path / "run", max_iters=10**6, **settings)
    command = [sys.executable, ROOT / "train.py", *flags]
    process = subprocess.Popen(command, cwd=tmp_path, env=child_environment(), stderr=subprocess.PIPE, text=True)
    try:
        for line in process.stderr:
            if line.startswith("step 3/"):
                process.send_signal(number)
                break
        rest = process.stderr.read()
        assert process.wait(60) == 128 + number
    finally:
        process.kill()
    assert f"stopped by {number.name}" in rest
    step = load_state(tmp_path / "run" / "last")[0].step
    assert step >= 3
    resume(tmp_path / "run", max_iters=step + 2)
    train(tmp_path / "straight", max_iters=step + 2, **settings)
    assert largest_difference(weights(tmp_path / "run"), weights(tmp_path / "straight")) == 0


@pytest.mark.parametrize("steps", [2, 4])
def test_a_stop_within_an_evaluation_saves_at_once_and_the_resumed_run_evaluates_again(
    tmp_path, tiny_flags, train, resume, steps
):
    """The last evaluation, too: a run is complete with it."""
    settings = dict(eval_interval=2, max_iters=4, sample_tokens=0, learning_rate=1e-4) | PLAN
    train(tmp_path / "straight", **settings)
    code = """
import os, signal
import train
from plaingpt.batches import EvalBatches
from plaingpt.console import run_script
batch, calls, train_step = EvalBatches.batch, 0, train.train_step

def counted(self, *arguments):
    global calls
    calls += 1
    if calls == STOP:  # the first batch of an evaluation
        os.kill(os.getpid(), signal.SIGTERM)
    assert calls <= STOP, "the evaluation went on"
    return batch(self, *arguments)

EvalBatches.batch = counted
run_script(train.main)
"""
    code = code.replace("STOP", str(steps + 1))  # two batches an evaluation
    command = [sys.executable, "-c", code, *tiny_flags(tmp_path / "run", **settings)]
    ended = subprocess.run(command, env=child_environment(), cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 128 + signal.SIGTERM, ended.stderr
    assert f"stopped by SIGTERM after step {steps}, saved" in ended.stderr
    evaluated = [record["step"] for record in records(tmp_path / "run") if "val_loss" in record]
    assert evaluated == list(range(0, steps, 2))
    resume(tmp_path / "run")
    assert [record["step"] for record in records(tmp_path / "run") if "val_loss" in record] == [0, 2, 4]
    for name in ("last", "best"):
        path = f"{name}/model.safetensors"
        assert largest_difference(weights(tmp_path / "run", path), weights(tmp_path / "straight", path)) == 0


def test_a_return_to_an_earlier_checkpoint_loses_no_record_and_blames_no_loss(tmp_path, train, resume):
    settings = dict(max_iters=8, eval_interval=2, keep_every=2)
    train(tmp_path / "run", **settings)
    metrics = tmp_path / "run" / "metrics.jsonl"
    before = metrics.read_bytes()
    ended = resume(tmp_path / "run", init_from="resume:step-000002", max_iters=4, learning_rate=1e-6, lr_decay_iters=4)
    assert metrics.read_bytes().startswith(before)
    assert [record["step"] for record in records(tmp_path / "run") if "val_loss" in record] == [0, 2, 4]
    assert "at step 8, saved in" in ended.err and "best, before the run went back to an earlier step" in ended.err
    assert "overfit" not in ended.err
    assert load_state(tmp_path / "run" / "last")[0].evaluations_since_lowest == 0


def test_a_return_to_a_checkpoint_before_the_first_evaluation_keeps_a_better_model(tmp_path, train, resume):
    train(tmp_path / "run", max_iters=8, eval_interval=2, keep_every=1)
    best = (tmp_path / "run" / "best" / "model.safetensors").read_bytes()
    resume(tmp_path / "run", init_from="resume:step-000001", max_iters=4, learning_rate=1e-6, lr_decay_iters=4)
    assert (tmp_path / "run" / "best" / "model.safetensors").read_bytes() == best
    assert not (tmp_path / "run" / "best.1").exists()


def test_patience_counts_from_an_earlier_checkpoint_as_it_did_the_first_time(tmp_path, train, resume):
    settings = dict(max_iters=8, eval_interval=1, keep_every=2, patience=2)
    train(tmp_path / "run", **settings)
    expected = weights(tmp_path / "run")
    ended = resume(tmp_path / "run", init_from="resume:step-000002")  # each loss is above that of step 8, and falls
    assert "ended early" not in ended.err and largest_difference(weights(tmp_path / "run"), expected) == 0


def test_losses_of_another_set_of_batches_are_not_compared(tmp_path, train, resume):
    train(tmp_path / "run")
    ended = resume(tmp_path / "run", max_iters=7, eval_iters=5, learning_rate=1e-9, min_lr=1e-9)
    again, last = [record["val_loss"] for record in records(tmp_path / "run") if "val_loss" in record][-2:]
    assert f"lowest val_loss {min(again, last):.4f} at step {6 if again <= last else 7}" in ended.err


def test_a_complete_run_is_evaluated_again_where_its_losses_do_not_compare(tmp_path, train, resume):
    train(tmp_path / "run")
    best = (tmp_path / "run" / "best" / "model.safetensors").read_bytes()
    ended = resume(tmp_path / "run", eval_iters=5)
    assert f"lowest val_loss {records(tmp_path / 'run')[-1]['val_loss']:.4f} at step" in ended.err
    assert f"best is now {tmp_path / 'run' / 'best.1'}: its loss does not compare" in ended.err
    assert (tmp_path / "run" / "best.1" / "model.safetensors").read_bytes() == best
    shutil.rmtree(tmp_path / "run" / "best")
    resume(tmp_path / "run")
    assert load_model(tmp_path / "run" / "best")[0]


@pytest.mark.parametrize("steps", [0, 2])
def test_a_stop_is_heard_within_a_long_step_and_leaves_no_half_of_it(tmp_path, tiny_flags, train, resume, steps):
    settings = dict(gradient_accumulation_steps=8, sample_tokens=0, eval_interval=100, max_iters=4) | PLAN
    train(tmp_path / "straight", **settings)
    if steps:
        train(tmp_path / "run", **settings | {"max_iters": steps})
    code = """
import os, signal, sys
import train
from plaingpt.console import run_script
micro_batch, calls = train.TrainBatches.micro_batch, 0

def counted(self, *arguments):
    global calls
    calls += 1
    if calls == 3:
        os.kill(os.getpid(), signal.SIGINT)
    assert calls < 5, "the step went on"
    return micro_batch(self, *arguments)

train.TrainBatches.micro_batch = counted
run_script(train.main)
"""
    flags = tiny_flags(tmp_path / "run", **settings, init_from="auto")
    command = [sys.executable, "-c", code, *flags]
    ended = subprocess.run(command, env=child_environment(), cwd=ROOT, capture_output=True, text=True, check=False)
    assert ended.returncode == 128 + signal.SIGINT, ended.stderr
    assert f"stopped by SIGINT after step {steps}" in ended.stderr
    assert (tmp_path / "run" / "last").exists() == (steps > 0)
    train(tmp_path / "run", **settings, init_from="auto")
    assert largest_difference(weights(tmp_path / "run"), weights(tmp_path / "straight")) == 0


def test_a_run_that_is_stopped_before_its_first_step_leaves_last_and_a_recipe(tmp_path, tiny_flags, train):
    train(tmp_path / "run", max_iters=4, eval_interval=9, keep_every=2)
    code = """
import os, signal
import train
from plaingpt.console import run_script

corrected = train.Deadline.corrected

def stopped(*arguments):
    train.Deadline.corrected = corrected
    os.kill(os.getpid(), signal.SIGINT)
    return corrected(*arguments)

train.Deadline.corrected = stopped
run_script(train.main)
"""
    flags = [f"--{name}={value}" for name, value in dict(out_dir=tmp_path / "run", sample_tokens=0).items()]
    back = [*flags, "--init_from=resume:step-000002", next(f for f in tiny_flags("") if f.startswith("--data_dir"))]
    timed = [*tiny_flags(tmp_path / "new", minutes=1), "--n_embd=16"]
    timed = [flag for flag in timed if not flag.startswith(("--max_iters", "--warmup_iters", "--lr_decay_iters"))]
    for arguments in (back, timed):
        command = [sys.executable, "-c", code, *arguments]
        ended = subprocess.run(command, env=child_environment(), cwd=ROOT, capture_output=True, text=True, check=False)
        assert ended.returncode == 128 + signal.SIGINT and "nothing new to save" in ended.stderr, ended.stderr
    assert load_state(tmp_path / "run" / "last")[0].step == 4
    assert (tmp_path / "new" / "recipe.py").exists()


def test_a_second_interrupt_leaves_at_once():
    code = "import os; from plaingpt.distributed import StopSignal; stop = StopSignal(); os.kill(os.getpid(), 2)\n"
    code += "print(stop.number, flush=True); os.kill(os.getpid(), 2); print('still here')"
    command = [sys.executable, "-c", code]
    ended = subprocess.run(command, env=child_environment(), cwd=ROOT, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (-signal.SIGINT, "2\n")
    assert "Ctrl-C" in ended.stderr


# two processes

TWO = dict(gradient_accumulation_steps=4, batch_size=2, dropout=0.2, max_iters=24, eval_interval=6, optimizer="muon")
TWO |= dict(lr_decay_iters=24, warmup_iters=2, learning_rate=1e-3, min_lr=1e-4)
ROUNDING = 3e-4  # Muon's products are in bfloat16; one batch that is another makes ten times the difference


def torchrun(flags: list, *options: str, script: Path = ROOT / "train.py") -> subprocess.CompletedProcess:
    """Run train.py in two processes."""
    command = [*TORCHRUN, *options, script, *flags]
    pipes = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(command, env=child_environment(), start_new_session=True, **pipes)
    watchdog = threading.Timer(90, os.killpg, [process.pid, signal.SIGKILL])  # a run that hangs fails its own test only
    watchdog.start()
    try:
        printed = process.communicate()[1]
        return subprocess.CompletedProcess(command, process.returncode, None, printed)
    finally:
        watchdog.cancel()


def signalled(path: Path, step: int, name: str) -> Path:
    """A script that is train.py, but the second process sends itself a signal before that step, unless restarted."""
    path.write_text(f"""
import os, signal
import train
from plaingpt.console import run_script

train_step = train.train_step

def signalled(run, step, *arguments):
    if (step, run.dist.rank, os.environ["TORCHELASTIC_RESTART_COUNT"]) == ({step}, 1, "0"):
        os.kill(os.getpid(), signal.{name})
    return train_step(run, step, *arguments)

train.train_step = signalled
run_script(train.main)
""")
    return path


@pytest.fixture(scope="module")
def both(tmp_path_factory, tiny_flags) -> Path:
    """The folder of an undisturbed run of two processes."""
    out_dir = tmp_path_factory.mktemp("two") / "both"
    ended = torchrun(tiny_flags(out_dir, **TWO))
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("step 24/24") == 1
    assert "2 x cpu" in ended.stderr
    return out_dir


def test_two_processes_make_the_same_run_as_one(tmp_path, train, both):
    train(tmp_path / "one", **TWO)
    assert largest_difference(weights(tmp_path / "one"), weights(both)) < ROUNDING
    for one, two in zip(records(tmp_path / "one"), records(both), strict=True):
        assert one == pytest.approx(two, rel=1e-3)


def test_two_processes_stop_together_and_any_number_goes_on(tmp_path, tiny_flags, both, resume):
    """One of the two gets the signal, and both stop after the same step: else they would wait for each other."""
    flags = tiny_flags(tmp_path / "two", **TWO)
    ended = torchrun(flags, script=signalled(tmp_path / "script.py", 3, "SIGUSR1"))
    assert "stopped by SIGUSR1 after step 3, saved" in ended.stderr
    assert load_state(tmp_path / "two" / "last")[0].step == 3
    shutil.copytree(tmp_path / "two", tmp_path / "one")
    resume(tmp_path / "one")
    assert largest_difference(weights(tmp_path / "one"), weights(both)) < ROUNDING
    ended = torchrun([*flags, "--init_from=resume"])
    assert ended.returncode == 0, ended.stderr
    assert same_run(tmp_path / "two", both)


def test_two_processes_go_on_with_the_run_of_one(tmp_path, train, tiny_flags, both):
    train(tmp_path / "run", **TWO | {"max_iters": 12})
    ended = torchrun(tiny_flags(tmp_path / "run", **TWO | {"init_from": "resume"}))
    assert ended.returncode == 0, ended.stderr
    assert largest_difference(weights(tmp_path / "run"), weights(both)) < ROUNDING


def test_a_run_whose_worker_is_killed_ends_as_an_undisturbed_one(tmp_path, tiny_flags, both):
    flags = tiny_flags(tmp_path / "run", **TWO | {"init_from": "auto"})
    ended = torchrun(flags, "--max_restarts=3", script=signalled(tmp_path / "script.py", 13, "SIGKILL"))
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("2 x cpu") >= 2, ended.stderr  # it was started again
    assert same_run(tmp_path / "run", both)


def test_a_checkpoint_that_is_replaced_while_a_resume_starts_is_refused(tmp_path, train, resume, monkeypatch):
    train(tmp_path / "run", max_iters=3)

    def connect(*arguments):
        monkeypatch.undo()
        resume(tmp_path / "run", max_iters=4)  # an earlier run goes on and ends
        return train_script.connect(*arguments)

    monkeypatch.setattr(train_script, "connect", connect)
    printed = resume(tmp_path / "run", max_iters=6, status=2).err
    assert "last was replaced meanwhile, by a run that has ended: run the command again" in printed
    assert load_state(tmp_path / "run" / "last")[0].step == 4


# keeping more, ending early


def test_numbered_checkpoints_are_kept_and_can_be_resumed_from(tmp_path, train, resume, tiny_run):
    train(tmp_path / "run", keep_every=2)
    kept = sorted(path.name for path in (tmp_path / "run").glob("step-*"))
    assert kept == ["step-000002", "step-000004", "step-000006"]
    assert [load_state(tmp_path / "run" / name)[0].step for name in kept] == [2, 4, 6]
    assert load_model(tmp_path / "run" / kept[0])[0]
    assert same_run(tmp_path / "run", tiny_run)
    resume(tmp_path / "run", init_from="resume:step-000002")
    assert same_run(tmp_path / "run", tiny_run)
    resume(tmp_path / "run", init_from="resume:step-000002", max_iters=3)
    assert load_state(tmp_path / "run" / "last")[0].step == 3
    printed = resume(tmp_path / "run", status=2, init_from="resume:step-9").err
    assert "no checkpoint there; available: last, step-000002, step-000004, step-000006" in printed
    for elsewhere in ("../run/last", tiny_run / "last"):
        printed = resume(tmp_path / "run", status=2, init_from=f"resume:{elsewhere}").err
        assert "is not a checkpoint of out_dir=" in printed
    before = (tmp_path / "run" / "last" / "training.json").read_bytes()
    printed = resume(tmp_path / "run", status=2, init_from="resume:step-000004", max_iters=3).err
    assert "max_iters=3, but the checkpoint in" in printed and "has 4 steps" in printed
    printed = resume(tmp_path / "run", max_iters=3).err
    assert "the run is complete at step 3; to train longer: --init_from=resume with --minutes or a higher" in printed
    assert (tmp_path / "run" / "last" / "training.json").read_bytes() == before


GETS_WORSE = dict(learning_rate=0.5, warmup_iters=0, grad_clip=0, min_lr=0.5, eval_interval=1, max_iters=30)


def test_patience_ends_a_run_that_gets_no_better_and_survives_a_resume(tmp_path, train, resume):
    ended = train(tmp_path / "run", patience=3, **GETS_WORSE)
    losses = [line["val_loss"] for line in records(tmp_path / "run") if "val_loss" in line][1:]
    best = min(range(len(losses)), key=losses.__getitem__)
    assert len(losses) == best + 1 + 3 < 30
    assert f"ended early, after step {len(losses)}: 3 evaluations without improvement" in ended.err
    lowest = f"lowest val_loss {min(losses):.4f} at step {best + 1}"
    assert f"{lowest}, saved in {tmp_path}/run/best, and has not fallen since" in ended.err
    assert load_state(tmp_path / "run" / "last")[0].step == len(losses)
    train(tmp_path / "parts", patience=3, **GETS_WORSE | {"max_iters": best + 2})
    resume(tmp_path / "parts", max_iters=30)
    assert same_run(tmp_path / "run", tmp_path / "parts")
    resume(tmp_path / "run")  # it has ended
    assert load_state(tmp_path / "run" / "last")[0].step == len(losses)
    resume(tmp_path / "run", patience=0, max_iters=len(losses) + 1)
    assert load_state(tmp_path / "run" / "last")[0].step == len(losses) + 1


def test_a_best_loss_of_zero_counts(tmp_path, train, resume):
    train(tmp_path / "run", max_iters=1)
    changes = {"lowest_val_loss": 0.0, "best_val_loss": 0.0, "evaluations_since_lowest": 2}
    edit_json(tmp_path / "run" / "last" / "training.json", **changes)
    edit_json(tmp_path / "run" / "best" / "evaluation.json", val_loss=0.0)
    ended = resume(tmp_path / "run", max_iters=9, patience=3)
    reason = "3 evaluations without improvement; to go on: --init_from=resume --out_dir="
    assert f"ended early, after step 3: {reason}" in ended.err
    assert "lowest val_loss 0.0000 at step" in ended.err


# what goes wrong


def test_the_loss_scale_is_saved_and_comes_back(tmp_path, train, resume):
    settings = dict(dtype="float16", eval_interval=100) | PLAN
    train(tmp_path / "straight", **settings)
    train(tmp_path / "halves", max_iters=3, **settings)
    path = tmp_path / "halves" / "last" / "training.json"
    assert load_state(path.parent)[0].scaler["_growth_tracker"] == 3
    resume(tmp_path / "halves", max_iters=6, dtype="float16")
    scalers = [load_state(tmp_path / name / "last")[0].scaler for name in ("straight", "halves")]
    assert scalers[0] == scalers[1]
    assert scalers[0]["_growth_tracker"] == 6


def test_skipped_updates_are_counted_and_reported_and_a_resume_goes_on_counting(tmp_path, train, resume):
    train(tmp_path / "run", max_iters=1, dtype="float16")
    path = tmp_path / "run" / "last" / "training.json"
    scaler = json.loads(path.read_text())["scaler"]
    edit_json(path, scaler=scaler | {"scale": 2.0**27})  # gradients overflow until it has been halved some times
    ended = resume(tmp_path / "run", max_iters=15, dtype="float16")
    counts = [line.get("skipped", 0) for line in records(tmp_path / "run") if "train_loss" in line]
    assert counts[:2] == [0, 1] and counts == sorted(counts)
    assert 0 < counts[-1] < 14
    assert f"| {counts[-1]} skipped" in ended.err
    assert load_state(path.parent)[0].scaler["scale"] == 2.0 ** (27 - counts[-1])
    resume(tmp_path / "run", max_iters=16, dtype="float16")
    assert records(tmp_path / "run")[-2]["skipped"] == load_state(path.parent)[0].skipped == counts[-1]


def test_a_damaged_last_is_refused_with_the_names_of_other_checkpoints(tmp_path, train, resume):
    train(tmp_path / "run", keep_every=2)
    (tmp_path / "run" / "last" / "optimizer.safetensors").write_bytes(b"")
    (message,) = resume(tmp_path / "run", status=2).err.splitlines()
    assert message.endswith("; available: step-000002, step-000004, step-000006 (--init_from=resume:NAME)")
    resume(tmp_path / "run", init_from="resume:step-000004")
    resume(tmp_path / "run")


def test_a_data_set_that_was_made_anew_is_noticed(tmp_path, train, resume, data_dir):
    shutil.copytree(data_dir / "tiny", tmp_path / "data" / "tiny")
    train(tmp_path / "run", max_iters=1, data_dir=tmp_path / "data")
    assert "is not the one that" not in resume(tmp_path / "run", max_iters=2, data_dir=tmp_path / "data").err
    text = (data_dir / "tiny.txt").read_text()
    (tmp_path / "tiny.txt").write_text(text[100:] + text[:100])
    again = [f"--data_dir={tmp_path / 'data'}", "--tokenizer=char", "--name=tiny", "--val_fraction=0.1"]
    assert run_main("prepare_data", tmp_path / "tiny.txt", *again).status == 0
    assert "is not the one that" in resume(tmp_path / "run", max_iters=3, data_dir=tmp_path / "data").err


def test_a_full_disk_is_reported_and_the_next_save_tried_and_the_last_has_to_succeed(tmp_path, tiny_flags, resume):
    """A limit to the size of files is as good as a full disk."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        ended = run_main("train", *tiny_flags(tmp_path / "run"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert ended.status == 1
    printed = [line for line in ended.err.splitlines() if "could not be saved in" in line and line.startswith("step")]
    assert [line.split(" could not be saved")[0] for line in printed[::2]] == ["step 3", "step 6"]
    assert ended.err.splitlines()[-1].startswith("train.py: the last save failed: step 6 could not be saved in ")
    assert records(tmp_path / "run")[-1]["step"] == 6


@pytest.mark.parametrize("name", ["run", "run/deeper"])
def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, train, name):
    (tmp_path / "run").write_text("a file")
    ended = train(tmp_path / name, status=2)
    assert "cannot be written" in ended.err.splitlines()[-1]


def test_the_settings_are_saved_with_the_run(tiny_run):
    settings = load_state(tiny_run / "last")[0].settings
    assert {name: settings[name] for name in TINY} == TINY


def test_a_resumed_run_keeps_its_precision(tmp_path, train, tiny_flags):
    train(tmp_path / "run", max_iters=1, dtype="bfloat16")
    arguments = [f"--out_dir={tmp_path / 'run'}", "--init_from=resume", "--max_iters=2", "--device=cpu"]
    assert "in bfloat16" in run_main("train", *arguments).err


def test_a_run_goes_on_in_float16_that_was_not_in_it_before(tmp_path, train, resume):
    train(tmp_path / "run", max_iters=1)
    assert "in float16" in resume(tmp_path / "run", max_iters=2, dtype="float16").err
