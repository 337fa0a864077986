import subprocess
import sys
from pathlib import Path

import pytest
import torch

from model import GPT, GPTConfig
from plaingpt.optimizer import make_optimizers
from plaingpt.plan import hours, memory, tokens_per_update
from train import TrainConfig

ROOT = Path(__file__).parent.parent
SHAPE = dict(block_size=16, n_layer=2, n_head=2, n_embd=32)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_memory_counts_what_training_allocates(optimizer):
    model = GPT(GPTConfig(vocab_size=65, bias=False, **SHAPE))
    optimizers = make_optimizers(model, optimizer, 1e-3, 0.1, (0.9, 0.95))
    model(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4, dtype=torch.long))[1].backward()
    for one in optimizers:
        one.step()
    parts = memory(model, TrainConfig(optimizer=optimizer, batch_size=3, **SHAPE))
    assert parts["weights"] == sum(p.nbytes for p in model.parameters())
    assert parts["gradients"] == sum(p.grad.nbytes for p in model.parameters())
    states = [value for one in optimizers for state in one.state.values() for value in state.values()]
    assert parts["optimizer"] == sum(value.nbytes for value in states if value.dim() > 0)
    assert parts["activations"] == 3 * 16 * (36 * 32 * 2 + 4 * 128)


def test_hours_are_those_of_the_published_speed():
    config = TrainConfig(max_iters=1000, batch_size=12, gradient_accumulation_steps=40)
    with torch.device("meta"):
        model = GPT(GPTConfig(bias=False))
    seconds = 1000 * tokens_per_update(config) / 0.85e6  # nanoGPT on eight A100
    assert hours(model, config, "A100", 8) * 3600 == pytest.approx(seconds, rel=0.03)
    assert hours(model, config, "A100", 1) == pytest.approx(8 * hours(model, config, "A100", 8))


def test_the_tables_of_the_documentation_are_those_that_the_code_computes():
    made = subprocess.run([sys.executable, "docs/scale.py"], cwd=ROOT, capture_output=True, text=True, check=True)
    tables = made.stdout.strip().split("\n\n")
    assert len(tables) == 2 and all(table in (ROOT / "docs/scaling.md").read_text("utf-8") for table in tables)


def test_a_dry_run_tells_and_writes_nothing(tmp_path, train):
    told = train(tmp_path / "run", dry_run=True, gradient_accumulation_steps=6, batch_size=2, max_iters=50).err
    assert not (tmp_path / "run").exists()
    for words in ("50 updates of 192 tokens", "2.7 epochs of 3,600", "optimizer 0.04 MB", "at its peak", "tokens/s"):
        assert words in told


def test_numbers_of_one_and_next_to_nothing_are_told_as_such(train, tmp_path):
    told = train(tmp_path / "run", max_iters=1, batch_size=1, block_size=1).err
    assert "1 update of 1 token, 0.00028 epochs of 3,600" in told
    assert (
        "the run has 1 update already"
        in train(tmp_path / "run", max_iters=1, init_from="auto", batch_size=1, block_size=1).err
    )
