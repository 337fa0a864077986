"""Saving a run and finding it again."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, child_environment, edit_json
from test_checkpoint import of_kind

from model import GPT, GPTConfig
from plaingpt.checkpoint import load_model
from plaingpt.console import UserError
from plaingpt.distributed import Distributed
from plaingpt.files import UNCHECKED, claim, holds_run, release, set_aside
from plaingpt.metrics import Metrics
from plaingpt.optimizer import apply_gradients, make_optimizers
from plaingpt.run_state import RunState, Saver, load_optimizers, load_state, read_best
from plaingpt.tokenizer import Tokenizer

HERE = Distributed(torch.device("cpu"), torch.float32)


def save_checkpoint(directory: Path, model: GPT, optimizers: list, tokenizer: Tokenizer, **state) -> str | None:
    """Save as a run does; the problem, if there was one."""
    saver = Saver(directory.parent, RunState(**state), model, optimizers, tokenizer, HERE)
    saver.save()
    return saver.wait()


def load(directory: Path, model: GPT, optimizers: list) -> None:
    state, found = load_state(directory)
    load_optimizers(found, state.scaler, model, optimizers, torch.amp.GradScaler("cpu", enabled=False))


def trained(kind: str = "muon", n_embd: int = 8) -> tuple[GPT, list]:
    torch.manual_seed(0)
    model = GPT(GPTConfig(24, of_kind("char").vocab_size, 2, 2, n_embd))
    optimizers = make_optimizers(model, kind, 0.01, 0.1, (0.9, 0.95))
    steps(model, optimizers, 3)
    return model, optimizers


def steps(model: GPT, optimizers: list, count: int) -> None:
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    idx = torch.randint(model.config.vocab_size, (2, 25), generator=torch.Generator().manual_seed(2))
    for _ in range(count):
        model(idx[:, :-1], idx[:, 1:])[1].backward()
        apply_gradients(list(model.parameters()), optimizers, scaler, 0.01, 1.0)


def test_training_comes_back(tmp_path):
    save_checkpoint(tmp_path / "last", *trained(), of_kind("char"), step=3, seconds=0.1 + 0.2)
    state, _ = load_state(tmp_path / "last")
    assert (state.step, state.seconds, state.lowest_val_loss) == (3, 0.1 + 0.2, None)


def test_optimizer_state_of_another_model_or_optimizer_is_refused(tmp_path):
    save_checkpoint(tmp_path / "last", *trained("adamw"), of_kind("char"))
    for other, message in ((trained("muon"), "does not match"), (trained("adamw", n_embd=16), "must match the size")):
        with pytest.raises(UserError, match=message):
            load(tmp_path / "last", *other)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"format_version": 99}', None])
def test_a_damaged_training_file_is_a_user_error(tmp_path, content):
    save_checkpoint(tmp_path / "last", *trained(), of_kind("char"), step=1)
    path = tmp_path / "last" / "training.json"
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(UserError, match=r"training\.json"):
        load_state(tmp_path / "last")


def test_no_checkpoint_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="no checkpoint there"):
        load_state(tmp_path / "last")
    (tmp_path / "ckpt.pt").touch()
    with pytest.raises(
        UserError, match=f"from nanoGPT's weights: --init_from={tmp_path / 'ckpt.pt'} and another --out_dir"
    ):
        load_state(tmp_path / "last")


def test_a_flipped_bit_anywhere_in_a_checkpoint_is_refused(tmp_path):
    save_checkpoint(tmp_path / "last", *trained(), of_kind("char"))
    read = (path for path in sorted((tmp_path / "last").iterdir()) if path.suffix not in UNCHECKED)
    for path in read:
        sound = path.read_bytes()
        path.write_bytes(sound[:-20] + bytes([sound[-20] ^ 1]) + sound[-19:])
        with pytest.raises(UserError, match="damaged"):
            load_model(tmp_path / "last")
        path.write_bytes(sound)
    load_model(tmp_path / "last")


def test_a_failed_save_leaves_the_earlier_checkpoint(tmp_path):
    save_checkpoint(tmp_path / "last", *trained(), of_kind("char"), step=1)
    problem = save_checkpoint(tmp_path / "last", *trained(), of_kind("char"), step=2, data={1})
    assert "step 2 could not be saved" in problem
    assert load_state(tmp_path / "last")[0].step == 1
    assert [path.name for path in tmp_path.iterdir()] == ["last"]


def test_an_earlier_run_is_set_aside_and_never_destroyed(tmp_path):
    for content in ("first", "second"):
        save_checkpoint(tmp_path / "out" / "last", *trained(), of_kind("char"))
        (tmp_path / "out" / "metrics.jsonl").write_text(content)
        set_aside(tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert [(tmp_path / name / "metrics.jsonl").read_text() for name in ("out.1", "out.2")] == ["first", "second"]


def test_a_folder_with_a_numbered_checkpoint_alone_is_set_aside(tmp_path):
    save_checkpoint(tmp_path / "out" / "step-000010", *trained(), of_kind("char"))
    set_aside(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out.1"]


def test_a_folder_where_a_run_goes_on_or_that_is_a_checkpoint_is_refused(tmp_path):
    save_checkpoint(tmp_path / "run" / "last", *trained(), of_kind("char"))
    lock = claim(tmp_path / "run")
    for check in (set_aside, holds_run):
        with pytest.raises(UserError, match=r"another run is still using .*; stop it, or choose another --out_dir"):
            check(tmp_path / "run")
    with pytest.raises(UserError, match="another run is still using"):
        Metrics(tmp_path / "run", active=True)
    release(lock)
    with pytest.raises(UserError, match="last is a model or a data set, not the directory of a run"):
        set_aside(tmp_path / "run" / "last")
    set_aside(tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["run.1"]
    assert [path.name for path in (tmp_path / "run.1").iterdir()] == ["last"]


def test_a_folder_without_a_run_is_not_set_aside(tmp_path):
    (tmp_path / "out").mkdir()
    set_aside(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    shutil.rmtree(tmp_path / "out")
    set_aside(tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_best_that_could_not_be_saved_is_not_counted_as_saved(tmp_path):
    state = RunState(step=1)
    saver = Saver(tmp_path, state, *trained(), of_kind("char"), HERE)
    (tmp_path / "file").touch()
    (tmp_path / "best").symlink_to(tmp_path / "file" / "best")  # where no directory can be created
    saver.save(val_loss=2.0)
    assert "best" in saver.wait()
    assert saver.best is None and load_state(tmp_path / "last")[0].step == 1
    (tmp_path / "best").unlink()
    state.step = 2
    saver.save(val_loss=2.5)
    assert saver.wait() is None
    assert saver.best == read_best(tmp_path, state) == (2.5, 2)
    load_model(tmp_path / "best")


def test_values_that_are_not_finite_never_reach_a_checkpoint(tmp_path, capsys):
    model, optimizers = trained()
    state = RunState(step=1)
    saver = Saver(tmp_path, state, model, optimizers, of_kind("char"), HERE)
    saver.save(val_loss=float("nan"))  # of an overflow, say: the weights are sound
    assert saver.wait() is None
    assert not (tmp_path / "best").exists()
    state.step = 2
    saver.save(val_loss=3.0)
    assert saver.wait() is None
    with torch.no_grad():
        model.transformer.wpe.weight[0, 0] = float("inf")
    state.step = 3
    saver.save(val_loss=2.0, keep=True)
    assert "wpe.weight contains NaN or infinity" in saver.wait()
    assert capsys.readouterr().err == f"{saver.wait()}; the earlier checkpoint is intact\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "last"]
    assert load_state(tmp_path / "last")[0].step == 2


def test_a_model_whose_loss_is_not_finite_replaces_no_checkpoint(tmp_path):
    """The weights of a run that has diverged can be finite."""
    model, optimizers = trained()
    state = RunState(step=1)
    saver = Saver(tmp_path, state, model, optimizers, of_kind("char"), HERE)
    saver.save(val_loss=3.0)
    state.step = 2
    saver.save(val_loss=float("nan"), keep=True)
    assert saver.wait() == "step 2 was not saved: its validation loss is nan; try a lower --learning_rate"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "last"]
    assert load_state(tmp_path / "last")[0].step == 1


def test_a_disk_that_is_full_at_any_write_leaves_the_earlier_checkpoint(tmp_path):
    """A limit to the size of files ends the writing of each file at each of its pages."""
    resource = pytest.importorskip("resource")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    model, optimizers = trained()
    state = RunState(step=1)
    saver = Saver(tmp_path, state, model, optimizers, of_kind("char"), HERE)
    saver.save(val_loss=2.0)
    saver.wait()
    sizes = [path.stat().st_size for path in (tmp_path / "last").iterdir()]
    for size in sorted({n - 1 for n in sizes} | set(range(0, max(sizes), 2048))):
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
            state.step = 2
            saver.save(val_loss=1.0)
            assert "step 2 could not be saved" in saver.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert load_state(tmp_path / "last")[0].step == 1
        load_model(tmp_path / "best")
    saver.save()
    assert saver.wait() is None
    assert load_state(tmp_path / "last")[0].step == 2


def test_a_run_that_had_no_loss_scale_begins_with_the_default(tmp_path):
    model, optimizers = trained()
    save_checkpoint(tmp_path / "last", model, optimizers, of_kind("char"))
    scaler = torch.amp.GradScaler("cpu")
    load_optimizers(tmp_path / "last", {}, model, optimizers, scaler)
    assert scaler.get_scale() == 65536.0


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted by /proc")
def test_background_threads_start_no_openmp_team_of_their_own(tmp_path):
    """More OpenMP threads than cores halve the speed of training from the first save to the end."""
    code = f"""
import os, time, torch
from pathlib import Path
from plaingpt.checkpoint import load_model
from plaingpt.generate import Decoder
from plaingpt.distributed import Distributed
from model import GPT, GPTConfig
from plaingpt.run_state import RunState, Saver
from plaingpt.tokenizer import make_tokenizer

def threads(wanted=None):
    end = time.monotonic() + 20  # a thread that has ended may be listed for an instant
    while wanted and len(os.listdir("/proc/self/task")) != wanted and time.monotonic() < end:
        time.sleep(0.01)
    return len(os.listdir("/proc/self/task"))

torch.set_num_threads(4)
model = GPT(GPTConfig(vocab_size=257, n_layer=1, n_head=2, n_embd=256))
torch.ones(1 << 20).sin_()  # starts the training thread's own team
before = threads()
dist = Distributed(torch.device("cpu"), torch.float32)
saver = Saver(Path({str(tmp_path)!r}), RunState(step=1), model, [], make_tokenizer("byte", [], 0), dist)
saver.save(1.0)
assert saver.wait() is None
assert threads(before + 1) == before + 1, "the saver's own thread, and no other"
Decoder(model, torch.float32)
assert threads(before + 1) == before + 1, f"{{threads()}} threads, {{before}} before"
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=child_environment(), check=True)


def saved(out_dir: Path, losses: list[float], **state) -> RunState:
    """The state after evaluations with these losses, one a step, each with a save."""
    state = RunState(**state)
    saver = Saver(out_dir, state, *trained(), of_kind("char"), HERE)
    for loss in losses:
        state.step += 1
        saver.save(loss, keep=True)
        assert saver.wait() is None
    return state


def test_a_return_to_an_earlier_checkpoint_does_not_forget_the_best_model(tmp_path):
    saved(tmp_path, [3.0, 2.0, 2.5])
    assert load_state(tmp_path / "last")[0].evaluations_since_lowest == 1
    state, _ = load_state(tmp_path / "step-000001")
    assert read_best(tmp_path, state) == (2.0, 2) and state.lowest_val_loss == 3.0
    state.eval_sequences = 7  # losses of other sequences are not comparable
    assert read_best(tmp_path, state) is None
    shutil.rmtree(tmp_path / "best")  # as when only `last` is copied to another folder
    assert read_best(tmp_path, load_state(tmp_path / "last")[0]) is None


def test_a_best_of_a_run_that_was_killed_before_last_was_saved_counts(tmp_path):
    saved(tmp_path, [3.0, 2.0])
    for name in ("last", "step-000002"):
        shutil.rmtree(tmp_path / name)
    (tmp_path / "step-000001").rename(tmp_path / "last")
    state, _ = load_state(tmp_path / "last")
    assert state.step == 1 and read_best(tmp_path, state) == (2.0, 2)


@pytest.mark.parametrize("changes", [None, {"val_loss": "x"}, {"step": None}, {"eval_sequences": 5}, {"data": "other"}])
def test_a_best_whose_loss_is_not_known_is_not_replaced_but_renamed(tmp_path, changes):
    saved(tmp_path, [3.0])
    path = tmp_path / "best" / "evaluation.json"
    if changes:
        edit_json(path, **changes)
    else:
        path.write_bytes(b"")
    state, _ = load_state(tmp_path / "last")
    assert read_best(tmp_path, state) is None
    state.step = 2
    saver = Saver(tmp_path, state, *trained(), of_kind("char"), HERE)
    saver.save(2.9)
    assert saver.wait() is None and (tmp_path / "best.1").is_dir()
    assert saver.best == read_best(tmp_path, state) == (2.9, 2)


def test_a_checkpoint_of_the_previous_version_loads(tmp_path):
    settings = dict(eval_iters=5, batch_size=2)
    save_checkpoint(tmp_path / "last", *trained(), of_kind("char"), step=4, settings=settings)
    path = tmp_path / "last" / "training.json"
    content = json.loads(path.read_text())
    del content["eval_sequences"], content["lowest_val_loss"], content["evaluations_since_lowest"]
    path.write_text(json.dumps(content | {"best_val_loss": 2.5}))
    (tmp_path / "last" / "SHA256SUMS").unlink()
    state, _ = load_state(tmp_path / "last")
    assert state == RunState(step=4, settings=settings)
