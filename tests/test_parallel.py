"""torch.compile and waits for the device, as the training loop meets them. Sharding is in test_sharding.py."""

import functools
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, child_environment, run_main
from torch.utils._python_dispatch import TorchDispatchMode

from model import GPT, GPTConfig
from plaingpt import parallel
from plaingpt.console import UserError
from plaingpt.distributed import Distributed, connect
from plaingpt.optimizer import SkippedSteps
from plaingpt.parallel import wrap
from plaingpt.tokens import Tokens
from train import Run, TrainConfig, train_step

SHAPE = dict(block_size=16, n_layer=3, n_head=2, n_embd=16)
needs_compiler = pytest.mark.skipif(sys.platform == "win32", reason="needs a C++ compiler")


@pytest.fixture
def compiler():
    """torch's compiler without what other tests left in it."""
    import torch._dynamo.utils

    def forget():
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        parallel._compiled_class.cache_clear()

    forget()
    yield torch._dynamo.utils.counters
    forget()


@needs_compiler
@pytest.mark.parametrize("recompute", [False, True])
def test_a_run_compiles_one_block_once_without_graph_breaks(tmp_path, tiny_flags, compiler, monkeypatch, recompute):
    """Training, evaluation, samples and a resumed run: a block and the head, each with and without gradients."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))  # only the graphs
    flags = tiny_flags(tmp_path / "run", compile=True, n_layer=5, dropout=0.1, recompute=recompute)
    ended = run_main("train", *flags, "--gradient_accumulation_steps=2", "--keep_every=3")
    assert ended.status == 0, ended.err
    ended = run_main("train", *flags, "--gradient_accumulation_steps=2", "--init_from=resume:step-000003")
    assert ended.status == 0, ended.err
    assert not compiler["graph_break"]
    assert 4 <= compiler["stats"]["unique_graphs"] <= 6  # 7 if sampling were compiled, too


@needs_compiler
def test_a_compiled_model_computes_the_same(compiler):
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=65, **SHAPE))
    idx = torch.randint(65, (2, 16))
    logits, loss = model(idx, idx)
    loss.backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    torch.compiler.config.cache_key_tag = ""
    compiled = wrap(model, connect("cpu", "float32"), compiled=True)
    assert compiled is model
    assert torch.compiler.config.cache_key_tag == "torch.float32"
    torch._dynamo.config.suppress_errors = False
    new_logits, new_loss = compiled(idx, idx)
    new_loss.backward()
    assert torch.allclose(logits, new_logits, atol=1e-5) and torch.allclose(loss, new_loss)
    assert all(torch.allclose(p.grad, e, atol=1e-5) for p, e in zip(model.parameters(), expected, strict=True))
    assert compiler["stats"]["unique_graphs"] == 3  # the trial, a block and the head


def test_recomputation_with_dropout_is_refused_on_mps():
    model = GPT(GPTConfig(vocab_size=65, dropout=0.1, **SHAPE))
    with pytest.raises(UserError, match="use only one of --recompute and --dropout"):
        wrap(model, Distributed(torch.device("mps"), torch.float32), recompute=True)


def test_a_run_goes_on_where_nothing_can_be_compiled(tmp_path, tiny_flags):
    flags = tiny_flags(tmp_path / "run", compile=True)
    environment = child_environment(CXX=str(tmp_path / "none"), TORCHINDUCTOR_CACHE_DIR=str(tmp_path / "cache"))
    command = [sys.executable, "train.py", *flags]
    ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stderr
    first, *others = ended.stderr.splitlines()
    assert first.startswith("torch.compile does not work here, continuing without it: ") and "C++" in first
    assert not [line for line in others if "compile" in line or line.startswith("Traceback")]


class NoWaiting(TorchDispatchMode):
    """Fails where the host would read a value that an operation computed on the device."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().partition("::")[2].partition(".")[0]
        assert name not in self.WAITS, f"{name} waits for the device"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_update_never_waits_for_the_device(dtype):
    """What would be a CPU-GPU sync point, seen on the CPU; the dispatcher is the same."""
    dist = connect("cpu", dtype)
    config = TrainConfig(**SHAPE, batch_size=2, gradient_accumulation_steps=2, dropout=0.1, max_iters=10)
    model = GPT(GPTConfig(vocab_size=65, dropout=0.1, **SHAPE))
    tokens = Tokens([torch.randint(65, (1000,)).numpy().astype("uint16")])
    run, skipped = Run(config, tokens, model, dist), SkippedSteps(0, dist.device)
    with NoWaiting():
        with pytest.raises(AssertionError, match="waits for the device"):
            torch.ones(1).item()
        for step in range(2):
            _, norm = train_step(run, step)
            skipped.count(norm)
    assert skipped.total(2) == 0
