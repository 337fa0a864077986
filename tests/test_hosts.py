"""Training over a network that fails: two hosts, each with a torchrun of its own, as a scheduler would start them."""

import contextlib
from pathlib import Path

import pytest
from conftest import ROOT
from hosts import Host, hosts, why_not
from runs import TWO, largest_difference, same_run, weights

from plaingpt.run_state import load_state

REASON = why_not()
PATIENCE = 75  # seconds: five times what a run takes on a machine with nothing else to do
pytestmark = [pytest.mark.skipif(REASON is not None, reason=str(REASON)), pytest.mark.timeout(3 * PATIENCE)]

RUN = TWO | dict(max_iters=32, eval_interval=10, lr_decay_iters=32, sample_tokens=0, log_interval=2, init_from="auto")
RUN |= dict(optimizer="adamw")  # without Muon's products in bfloat16 one process and two differ in the last digits only
# torchrun's shared store keeps addresses of dead workers, and does not tell a later host where it is (issue 135712)
REPLACEABLE = dict(TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")


@pytest.fixture
def two(tmp_path):
    with hosts(tmp_path) as made:
        yield made


@contextlib.contextmanager
def both(two: list[Host], flags: list, **how):
    """A torchrun on each; where the block fails, the test says what they wrote."""
    try:
        yield [host.torchrun(ROOT / "train.py", *flags, **how) for host in two]
    except BaseException as error:
        error.add_note("\n".join(f"--- {host.name}\n{host.log.read_text()[-3000:]}" for host in two))
        raise


@pytest.fixture(scope="module")
def straight(tmp_path_factory, tiny_flags) -> Path:
    """The folder of an undisturbed run of two hosts."""
    folder = tmp_path_factory.mktemp("hosts")
    with hosts(folder) as two, both(two, tiny_flags(folder / "run", **RUN)) as runs:
        assert [run.wait(PATIENCE) for run in runs] == [0, 0]
    assert "2 x cpu" in two[0].log.read_text()
    assert "restarts need TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in two[0].log.read_text()
    assert "step" not in two[1].log.read_text()  # rank 0 speaks
    return folder / "run"


def test_a_host_that_dies_and_comes_back_goes_on_with_the_run(tmp_path, tiny_flags, straight, two):
    flags = tiny_flags(tmp_path / "run", **RUN)
    with both(two, flags, **REPLACEABLE) as runs:
        two[0].wait_for("step 12/", runs[0])
        two[1].kill()
        again = two[1].torchrun(ROOT / "train.py", *flags, **REPLACEABLE)
        assert [run.wait(PATIENCE) for run in (runs[0], again)] == [0, 0]
    assert two[0].log.read_text().count("2 x cpu") == 2
    assert same_run(tmp_path / "run", straight)


def test_a_cut_for_good_ends_the_run_in_time_and_harms_nothing(tmp_path, tiny_flags, straight, resume, two):
    with both(two, tiny_flags(tmp_path / "run", **RUN, timeout=5), max_restarts=0) as runs:
        two[0].wait_for("step 12/", runs[0])
        two[1].link("down")
        assert all(run.wait(PATIENCE) for run in runs)
    assert load_state(tmp_path / "run" / "last")[0].step == 10
    resume(tmp_path / "run")
    assert largest_difference(weights(tmp_path / "run"), weights(straight)) < 1e-5
