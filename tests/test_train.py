import hashlib
import json
import math
import shutil

import numpy as np
import pytest
import torch
from conftest import TINY, edit_json
from runs import GETS_WORSE, largest_difference, records, same_run, weights

from model import GPT, GPTConfig
from plaingpt.checkpoint import load_model
from plaingpt.distributed import Distributed
from plaingpt.metrics import read_metrics
from plaingpt.run_state import load_state, read_best
from plaingpt.tokens import Tokens, open_data_set
from train import Run, TrainConfig, train_step


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
    # here a token is a byte
    assert all(line["val_bpb"] == pytest.approx(line["val_loss"] / math.log(2)) for line in lines if "val_loss" in line)


def test_a_run_learns(tiny_run, data_dir):
    losses = [line["val_loss"] for line in records(tiny_run) if "val_loss" in line]
    vocab_size = open_data_set(data_dir / "tiny").tokenizer.vocab_size
    assert losses[0] == pytest.approx(math.log(vocab_size), abs=0.2)
    assert losses[2] < losses[1] < losses[0] - 0.1


def test_the_last_learning_rate_is_nanogpts_under_its_schedule_and_0_under_ours():
    assert TrainConfig(learning_rate=1e-2).final_lr == 0
    assert TrainConfig(learning_rate=1e-2, lr_schedule="cosine").final_lr == pytest.approx(1e-3)


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
    assert read_best(tmp_path / "run", load_state(tmp_path / "run" / "last")[0]) == (losses[best], best)
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
    for one, four in zip(records(tmp_path / "one"), records(tmp_path / "four"), strict=True):
        assert one == pytest.approx(four, rel=1e-4)


def test_evaluation_and_samples_do_not_change_the_run_but_dropout_does(tmp_path, train, tiny_run):
    train(tmp_path / "often", dropout=0.3, eval_interval=1, sample_tokens=9)
    train(tmp_path / "once", dropout=0.3, eval_interval=100, sample_tokens=0, log_interval=4)
    assert largest_difference(weights(tmp_path / "often"), weights(tmp_path / "once")) == 0
    assert largest_difference(weights(tiny_run), weights(tmp_path / "often")) > 1e-4


@pytest.mark.parametrize(
    ("changes", "zero"), [(dict(lr_decay_iters=20), 20), (dict(lr_decay_iters=10, warmup_iters=25), 25)]
)
def test_a_schedule_that_ends_before_the_run_does_is_refused(tmp_path, train, changes, zero):
    """Those steps would be computed and change nothing."""
    printed = train(tmp_path / "run", status=2, max_iters=40, **changes).err
    assert f"the learning rate would be 0 from step {zero} of 40 on: give --lr_decay_iters=40" in printed
    assert not (tmp_path / "run").exists()
    train(tmp_path / "run", max_iters=4, lr_decay_iters=2, min_lr=1e-3)


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
    assert f"a new run would rename {tmp_path / 'run'}, which contains {tmp_path / 'run' / 'best'}" in ended.err
    assert not (tmp_path / "run.1").exists()
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        train("scratch", max_iters=1)  # named like the default of init_from
    shutil.copytree(data_dir, tmp_path / "run" / "data")
    (tmp_path / "run" / "out").symlink_to(data_dir)
    (tmp_path / "in").symlink_to(tmp_path / "run" / "data")
    for place in ("run/data", "run/out", "in"):
        ended = train(tmp_path / "run", data_dir=tmp_path / place, status=2)
        assert f"a new run would rename {tmp_path / 'run'}, which contains {tmp_path / place / 'tiny'}" in ended.err
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


def test_finetuning_that_only_makes_a_model_worse_says_so(tmp_path, train, resume, tiny_run):
    worse = dict(init_from=tiny_run / "best", learning_rate=1)
    train(tmp_path / "run", **worse | {"max_iters": 3, "lr_decay_iters": 6})
    ended = resume(tmp_path / "run", max_iters=6)
    first, *later = [line["val_loss"] for line in records(tmp_path / "run") if "val_loss" in line]
    assert len(later) == 2 and first < min(later)
    note = f"lowest val_loss {min(later):.4f} at step "
    assert note in ended.err and f"; before training, val_loss was {first:.4f}\n" in ended.err


def test_finetuning_on_data_of_another_tokenizer_is_refused(tmp_path, train, tiny_run):
    for dataset in ("other", "bytes"):
        ended = train(tmp_path / "run", status=2, init_from=tiny_run / "last", dataset=dataset)
        assert "was not prepared with the tokenizer of" in ended.err
        assert f"with --tokenizer={tiny_run / 'last'} and another" in ended.err


def test_finetuning_with_another_shape_is_refused(tmp_path, train, tiny_run):
    ended = train(tmp_path / "run", status=2, init_from=tiny_run / "last", n_layer=3)
    assert "train.py: --n_layer=3: " in ended.err and "; give --n_layer=2, or leave the shape out\n" in ended.err


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
        run = Run(config, tokens, model, Distributed(torch.device("cpu"), torch.float32))
        run.dist = Distributed(torch.device("cpu"), torch.float32, rank, world_size=2)
        train_step(run, 0)
        seen.append(tokens.starts)
    assert [len(starts) for starts in seen] == [4, 4]
    assert sorted(seen[0] + seen[1]) == sorted((run.batches.starts(0) % len(tokens)).tolist())


def test_a_run_of_nothing_but_nans_ends_with_status_1_and_is_not_saved(tmp_path, train):
    """The evaluation sees them even if nothing is logged."""
    changes = dict(max_iters=60, eval_interval=40, log_interval=50, learning_rate=1e30, warmup_iters=0, grad_clip=0)
    ended = train(tmp_path / "run", status=1, **changes)
    assert "the gradients were not finite in 39 consecutive steps, seen after step 40" in ended.err.splitlines()[-1]
    assert [line["step"] for line in records(tmp_path / "run")] == [0]
    assert not (tmp_path / "run" / "last").exists()


@pytest.mark.parametrize("name", ["run", "run/deeper"])
def test_a_folder_that_cannot_be_written_is_one_line(tmp_path, train, name):
    (tmp_path / "run").write_text("a file")
    ended = train(tmp_path / name, status=2)
    assert "cannot be written" in ended.err.splitlines()[-1]


def test_the_settings_are_saved_with_the_run(tiny_run):
    settings = load_state(tiny_run / "last")[0].settings
    assert {name: settings[name] for name in TINY} == TINY
