import dataclasses
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from model import GPTConfig
from plaingpt import plan
from plaingpt.console import UserError
from plaingpt.cpu import keep_freed_memory
from plaingpt.distributed import Distributed
from plaingpt.plan import check_memory, free_memory
from plaingpt.train_config import TrainConfig

CPU = Distributed(torch.device("cpu"), torch.float32)


def test_a_model_that_cannot_fit_is_refused(monkeypatch):
    if free_memory(CPU) == 1 << 60:
        pytest.skip("the system does not say how much memory is free")
    config = TrainConfig(batch_size=1, recompute=True)
    too_many = int(free_memory(CPU) / (12 * 12 * 768**2)) + 1
    with pytest.raises(UserError, match=r"needs at least .* is free for each process; try a smaller model,"):
        check_memory(config, CPU, GPTConfig(n_layer=too_many))
    check_memory(config, CPU, GPTConfig(n_layer=too_many // 2))
    with monkeypatch.context() as fixed:
        fixed.setattr("plaingpt.plan.free_memory", lambda dist: 25e9)  # of 1.5B parameters, AdamW alone needs 25.5 GB
        xl = GPTConfig(n_layer=48, n_head=25, n_embd=1600)
        check_memory(config, CPU, xl)
        with pytest.raises(UserError, match="needs at least"):
            check_memory(dataclasses.replace(config, optimizer="adamw"), CPU, xl)
    four = dataclasses.replace(CPU, world_size=4)
    monkeypatch.setattr(Distributed, "max", lambda self, number: number)  # no other process is there
    check_memory(dataclasses.replace(config, sharding="fsdp"), four, GPTConfig(n_layer=too_many))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="not Linux")
def test_memory_that_this_process_has_freed_counts_as_free():
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    keep_freed_memory()
    tensors = [torch.ones(10_000_000) for _ in range(10)]
    used = resident()
    del tensors
    assert resident() > used - 300e6  # it is kept, as a timed model's is
    free_memory(CPU)
    assert resident() < used - 300e6


def test_updating_the_weights_counts_once_per_step_however_many_micro_steps_there_are(monkeypatch):
    now = [0.0]

    def step(micro_steps: int) -> None:
        now[0] += 5 + 0.25 * micro_steps

    monkeypatch.setattr(plan, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    for micro_steps in (1, 2, 64):
        config = TrainConfig(gradient_accumulation_steps=micro_steps)
        seconds = plan.step_seconds(config, CPU, step, warmups=1, limit=10)
        assert seconds == pytest.approx(5 + 0.25 * micro_steps)


def test_a_dry_run_refuses_before_it_makes_the_model(tmp_path, train):
    err = train(tmp_path / "run", 2, dry_run=True, n_layer=1000, n_head=64, n_embd=65536).err
    assert "1,000 layers and width 65536 needs at least" in err and "a smaller model" in err


def test_a_dry_run_writes_nothing(tmp_path, train):
    err = train(tmp_path / "run", dry_run=True, gradient_accumulation_steps=6, batch_size=2, max_iters=50).err
    assert not (tmp_path / "run").exists()
    for words in ("50 steps of 192 tokens", "2.7 epochs of 3,600", "tokens/s", " for 50 steps"):
        assert words in err


def test_a_dry_run_of_a_resumed_run_is_about_the_steps_that_are_left(tmp_path, train, resume):
    train(tmp_path / "run", max_iters=6)
    assert resume(tmp_path / "run", max_iters=9, dry_run=True).err.endswith(" for 3 steps\n")


def test_numbers_of_one_and_next_to_nothing_are_printed_as_such(train, tmp_path):
    err = train(tmp_path / "run", max_iters=1, batch_size=1, block_size=1).err
    assert "1 step of 1 token, 0.00028 epochs of 3,600" in err
