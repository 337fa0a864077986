"""train.py, resumed."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import child_environment, contents, edit_json, run_main
from runs import GETS_WORSE, PLAN, largest_difference, records, same_run, weights

import train as train_script
from plaingpt.checkpoint import load_model
from plaingpt.run_state import load_state, read_best

TWICE = {"batch_size": 2, "gradient_accumulation_steps": 2}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_that_is_resumed_twice_is_the_straight_run_bit_for_bit(tmp_path, train, resume, optimizer, dtype):
    settings = TWICE | PLAN | dict(optimizer=optimizer, dtype=dtype, dropout=0.2, eval_interval=1)
    train(tmp_path / "straight", **settings)
    train(tmp_path / "parts", max_iters=3, **settings)
    assert not same_run(tmp_path / "straight", tmp_path / "parts")
    for steps in (4, 6):
        resume(tmp_path / "parts", max_iters=steps, dtype=dtype)
    assert same_run(tmp_path / "straight", tmp_path / "parts")


def test_neither_a_new_nor_a_resumed_run_imports_torchs_compiler(tmp_path, tiny_flags):
    """That takes over a second."""
    code = (
        "import sys, train; train.main(); sys.argv[-1] = '--init_from=resume'; "
        "sys.exit(train.main() or 'torch._dynamo' in sys.modules)"
    )
    command = [sys.executable, "-c", code, *tiny_flags(tmp_path / "run", max_iters=1, init_from="scratch")]
    ended = subprocess.run(command, env=child_environment(), stderr=subprocess.PIPE, text=True, check=False)
    assert ended.returncode == 0, ended.stderr


def test_what_was_derived_from_max_iters_is_derived_again(tmp_path, train, resume):
    train(tmp_path / "run", max_iters=2)
    resume(tmp_path / "run", max_iters=4)
    assert [line["lr"] for line in records(tmp_path / "run") if "lr" in line] == [1e-2, 5e-3, 5e-3, 2.5e-3]
    train(tmp_path / "given", max_iters=2, lr_decay_iters=3)
    resume(tmp_path / "given", max_iters=3)
    assert load_state(tmp_path / "given" / "last")[0].settings["lr_decay_iters"] == 3
    printed = resume(tmp_path / "given", status=2, max_iters=4).err
    assert "the learning rate would be 0 from step 3 of 4 on: give --lr_decay_iters=4, or" in printed
    resume(tmp_path / "given", max_iters=4, lr_decay_iters=4)


def test_what_an_interrupted_save_left_is_resumed(tmp_path, train, resume):
    train(tmp_path / "run", max_iters=2)
    (tmp_path / "run" / "last").rename(tmp_path / "run" / ".last.old")
    assert load_model(tmp_path / "run" / "last")[0]
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
    assert f"--{name}={value}, but the checkpoint was trained with" in ended.err
    assert load_state(short_run / "last")[0].step == 2


def test_a_recipe_of_another_run_does_not_continue_this_one_by_itself(short_run, tmp_path):
    recipe = tmp_path / "recipe.py"
    recipe.write_text('dataset = "other"\n')
    ended = run_main("train", recipe, f"--out_dir={short_run}", "--init_from=auto")
    assert ended.status == 2 and f"{recipe}: dataset=other, but the checkpoint was trained with tiny" in ended.err
    assert ended.err.endswith(f", or from these weights: --init_from={short_run}/best --out_dir=…\n")


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
    after, lines = load_state(tmp_path / "run" / "last")[0].settings, records(tmp_path / "run")
    assert abs(after["learning_rate"] / before - 1) < 0.2  # of three steps, not of two
    assert (after["lr_decay_iters"], after["warmup_iters"]) == (None, 0)
    assert lines[-2]["lr"] == pytest.approx(after["learning_rate"] / 3)  # after two of three steps


def test_a_resume_keeps_the_sequences_of_an_update(tmp_path, train, resume, short_run):
    assert "keep the product" in resume(short_run, status=2, max_iters=4, batch_size=2).err
    train(tmp_path / "straight", **PLAN)
    train(tmp_path / "run", max_iters=3, **PLAN)
    resume(tmp_path / "run", max_iters=6, batch_size=2, gradient_accumulation_steps=2)
    assert largest_difference(weights(tmp_path / "straight"), weights(tmp_path / "run")) < 1e-5


def test_a_resume_with_another_batch_size_evaluates_the_same_sequences(tmp_path, train, resume):
    train(tmp_path / "run", max_iters=2)
    assert load_state(tmp_path / "run" / "last")[0].eval_sequences == 2 * 4
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
    assert state.eval_sequences == 2 * 4 and state.settings["min_lr"] is None


def test_the_best_loss_on_other_data_is_forgotten(tmp_path, train, resume):
    train(tmp_path / "run", max_iters=6)
    edit_json(tmp_path / "run" / "last" / "training.json", data="another", evaluations_since_lowest=1)
    edit_json(tmp_path / "run" / "best" / "evaluation.json", data="another", val_loss=0.01)
    resume(tmp_path / "run", max_iters=7)
    assert read_best(tmp_path / "run", load_state(tmp_path / "run" / "last")[0])[1] == 7


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


def test_a_cropped_block_survives_a_resume(tmp_path, train, resume, tiny_run):
    cropped = dict(init_from=tiny_run / "last", block_size=8) | PLAN
    train(tmp_path / "straight", **cropped)
    train(tmp_path / "halves", max_iters=3, **cropped)
    resume(tmp_path / "halves", max_iters=6)
    assert same_run(tmp_path / "straight", tmp_path / "halves")
    assert load_model(tmp_path / "halves" / "last")[0].config.block_size == 8


def test_a_run_whose_data_were_prepared_in_another_way_goes_on_once_they_are_prepared_again(tmp_path, train, resume):
    text, place = tmp_path / "text.txt", dict(data_dir=tmp_path, dataset="text")
    text.write_text("a road, the sea and rain " * 80)
    prepare = [text, "--val_fraction=0.2", f"--data_dir={tmp_path}", "--name=text"]
    assert run_main("prepare_data", *prepare, "--tokenizer=char").status == 0
    train(tmp_path / "run", **place, max_iters=2)
    assert run_main("prepare_data", *prepare, "--tokenizer=byte").status == 0
    printed = resume(tmp_path / "run", status=2, data_dir=tmp_path, max_iters=4).err
    flag = re.search(
        r"prepare its text again with (--tokenizer=\S+), or start a new run: --init_from=scratch\n$", printed
    )[1]
    assert run_main("prepare_data", *prepare, flag).status == 0
    resume(tmp_path / "run", data_dir=tmp_path, max_iters=4)
    assert load_state(tmp_path / "run" / "last")[0].step == 4


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
    ended = resume(tmp_path / "run", max_iters=10, lr_decay_iters=10)  # beyond that step, with higher losses
    assert "at step 8, saved in" in ended.err and "best, before the run went back to an earlier step" in ended.err


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
    assert f"best to {tmp_path / 'run' / 'best.1'}: its loss is not comparable" in ended.err
    assert (tmp_path / "run" / "best.1" / "model.safetensors").read_bytes() == best
    shutil.rmtree(tmp_path / "run" / "best")
    resume(tmp_path / "run")
    assert load_model(tmp_path / "run" / "best")[0]


def test_a_checkpoint_that_is_replaced_while_a_resume_starts_is_refused(tmp_path, train, resume, monkeypatch):
    train(tmp_path / "run", max_iters=3)

    def connect(*arguments):
        monkeypatch.undo()
        resume(tmp_path / "run", max_iters=4)  # an earlier run goes on and ends
        return train_script.connect(*arguments)

    monkeypatch.setattr(train_script, "connect", connect)
    printed = resume(tmp_path / "run", max_iters=6, status=2).err
    assert re.search("another run, which has ended, replaced .*last: run the command again", printed)
    assert load_state(tmp_path / "run" / "last")[0].step == 4


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
    before = contents(tmp_path / "run")
    printed = resume(tmp_path / "run", status=2, init_from="resume:step-000004", max_iters=3).err
    assert "max_iters=3, but the checkpoint in" in printed and "is at step 4" in printed
    printed = resume(tmp_path / "run", max_iters=3).err
    assert "the run is complete at step 3; to train longer: --init_from=resume with --minutes or a higher" in printed
    assert contents(tmp_path / "run") == before


def test_patience_ends_a_run_that_gets_no_better_and_survives_a_resume(tmp_path, train, resume):
    ended = train(tmp_path / "run", patience=3, **GETS_WORSE)
    losses = [line["val_loss"] for line in records(tmp_path / "run") if "val_loss" in line][1:]
    best = min(range(len(losses)), key=losses.__getitem__)
    assert len(losses) == best + 1 + 3 < 30
    assert f"ended early, after step {len(losses)}: 3 evaluations without improvement" in ended.err
    lowest = f"lowest val_loss {min(losses):.4f} at step {best + 1}"
    assert f"{lowest}, saved in {tmp_path}/run/best; no later one is lower" in ended.err
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
    changes = {"lowest_val_loss": 0.0, "evaluations_since_lowest": 2}
    edit_json(tmp_path / "run" / "last" / "training.json", **changes)
    edit_json(tmp_path / "run" / "best" / "evaluation.json", val_loss=0.0)
    ended = resume(tmp_path / "run", max_iters=9, patience=3)
    reason = "3 evaluations without improvement; to continue: --init_from=resume --out_dir="
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
    assert "optimizer.safetensors is damaged" in message
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


def test_a_resumed_run_keeps_its_precision(tmp_path, train, tiny_flags):
    train(tmp_path / "run", max_iters=1, dtype="bfloat16")
    arguments = [f"--out_dir={tmp_path / 'run'}", "--init_from=resume", "--max_iters=2", "--device=cpu"]
    assert "in bfloat16" in run_main("train", *arguments).err


def test_a_run_goes_on_in_float16_that_was_not_in_it_before(tmp_path, train, resume):
    train(tmp_path / "run", max_iters=1)
    assert "in float16" in resume(tmp_path / "run", max_iters=2, dtype="float16").err
