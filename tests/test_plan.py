from dataclasses import replace
from functools import partial

import pytest
import torch

from model import GPT, GPTConfig
from plaingpt.console import UserError
from plaingpt.distributed import Distributed
from plaingpt.optimizer import make_optimizers
from plaingpt.plan import check_memory, free_memory, memory

SMALL = GPTConfig(block_size=16, vocab_size=65, n_layer=2, n_head=2, n_embd=32, bias=False)
CPU = Distributed(torch.device("cpu"), torch.float32)
SHAPES = {"124M": (12, 12, 768, 30), "355M": (24, 16, 1024, 10), "774M": (36, 20, 1280, 5), "1.5B": (48, 25, 1600, 10)}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_state_is_what_training_allocates(optimizer, bias):
    config = replace(SMALL, bias=bias)
    model = GPT(config)
    optimizers = make_optimizers(model, optimizer, 1e-3, 0.1, (0.9, 0.95))
    model(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4, dtype=torch.long))[1].backward()
    for one in optimizers:
        one.step()
    parts = memory(1, optimizer, False, False, 1, config)
    assert parts["weights"] == sum(p.nbytes for p in model.parameters())
    assert parts["gradients"] == sum(p.grad.nbytes for p in model.parameters())
    states = [value for one in optimizers for state in one.state.values() for value in state.values()]
    assert parts["optimizer"] == sum(value.nbytes for value in states if value.dim() > 0)
    shard = memory(1, optimizer, False, False, 4, config)
    assert all(shard[name] == parts[name] / 4 for name in ("weights", "gradients", "optimizer"))


@pytest.mark.parametrize(
    ("size", "recompute", "compiled", "reserved"),
    [
        ("124M", False, True, 16.94),
        ("124M", False, False, 19.64),
        ("124M", True, True, 8.77),
        ("124M", True, False, 10.59),
        ("355M", False, True, 15.28),
        ("774M", False, True, 20.87),
        ("774M", True, False, 14.92),
        ("1.5B", False, True, 53.23),
        ("1.5B", True, True, 27.46),
    ],
)
def test_memory_is_what_torch_reserves_on_a_card(size, recompute, compiled, reserved):
    """GB that the recipes' batch sizes took (bench/results/2026-11-27-gpu-simulated.md)."""
    n_layer, n_head, n_embd, batch_size = SHAPES[size]
    config = GPTConfig(1024, 50257, n_layer, n_head, n_embd, bias=False)
    parts = memory(batch_size, "muon", recompute, compiled, 1, config)
    assert sum(parts.values()) / 1e9 == pytest.approx(reserved, rel=0.1)


def test_a_model_that_cannot_fit_is_refused():
    if free_memory(CPU) is None:
        pytest.skip("the system does not say how much memory is free")
    cost = partial(memory, 1, "adamw", False, False, 1)
    too_many = int(free_memory(CPU) / (16 * 12 * 768**2)) + 1
    with pytest.raises(UserError, match=r"need at least .* is free; try a smaller model,"):
        check_memory(CPU, cost, GPTConfig(n_layer=too_many))
    check_memory(CPU, cost, GPTConfig(n_layer=too_many // 3))


def test_a_dry_run_refuses_before_it_makes_the_model(tmp_path, train):
    err = train(tmp_path / "run", 2, dry_run=True, n_layer=1000, n_head=64, n_embd=65536).err
    assert "1,000 layers of width 65536 need at least" in err and "a smaller model" in err


def test_a_dry_run_writes_nothing(tmp_path, train):
    err = train(tmp_path / "run", dry_run=True, gradient_accumulation_steps=6, batch_size=2, max_iters=50).err
    assert not (tmp_path / "run").exists()
    for words in ("50 steps of 192 tokens", "2.7 epochs of 3,600", "peak", "tokens/s"):
        assert words in err


def test_numbers_of_one_and_next_to_nothing_are_printed_as_such(train, tmp_path):
    err = train(tmp_path / "run", max_iters=1, batch_size=1, block_size=1).err
    assert "1 step of 1 token, 0.00028 epochs of 3,600" in err
