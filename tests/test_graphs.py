import functools
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_parallel import NoWaiting
from torch.utils._pytree import tree_leaves

import train
from model import GPT, GPTConfig
from plaingpt.distributed import Distributed, connect
from plaingpt.graphs import Captured
from plaingpt.tokens import Tokens
from train import Run, TrainConfig, forward_backward, train_step, uses_graphs

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
SHAPE = dict(block_size=16, n_layer=2, n_head=2, n_embd=32)


class Recorded(Captured):
    """Runs on a CPU as CUDA graphs do: records operations, and repeats them in the same memory.

    changed: gives the tensors that the function changes. Recording computes, a capture does not: it is undone.
    Fails where a graph would wait for the device.
    """

    def __init__(self, function, changed=list):
        super().__init__(function)
        self.changed = changed

    def _capture(self, arguments):
        inputs = [value.clone() if isinstance(value, torch.Tensor) else value for value in arguments]
        before = [(tensor, tensor.clone()) for tensor in self.changed()]
        with torch.random.fork_rng(devices=()), Recorder() as recorder:
            result = self.function(*inputs)
        with torch.no_grad():
            for tensor, values in before:
                tensor.copy_(values)
        return recorder, inputs, result


class Recorder(NoWaiting):
    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = super().__torch_dispatch__(function, types, args, kwargs)
        self.calls.append((function, args, kwargs or {}, result))
        return result

    @torch.no_grad()
    def replay(self):
        for function, args, kwargs, result in self.calls:
            for old, new in zip(tree_leaves(result), tree_leaves(function(*args, **kwargs)), strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def trained(device: str, captured: bool, dtype: str = "float32", **settings) -> dict[str, torch.Tensor]:
    """Weights after five steps."""
    # no biases: those of keys have gradients of nothing but rounding, which AdamW would enlarge
    config = TrainConfig(
        **SHAPE, bias=False, batch_size=2, gradient_accumulation_steps=3, max_iters=10, dtype=dtype, **settings
    )
    torch.manual_seed(0)
    dist = connect(device, config.dtype)
    tokens = Tokens([np.random.default_rng(0).integers(0, 65, 1000).astype(np.uint16)])
    model = GPT(GPTConfig(vocab_size=65, bias=False, dropout=config.dropout, **SHAPE))
    run = Run(config, tokens, model, dist)
    first = run.parameters[0].detach().clone()
    for step in range(5):
        train_step(run, step)
    assert bool(run.gradients) == captured and not run.parameters[0].equal(first)
    if captured:
        assert len(run.micro_step.graphs) == len(run.update.graphs) == 1
        assert all(run.micro_step.graphs.values()) and all(run.update.graphs.values())
    return model.weights()


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_captured_step_trains_the_same_weights(monkeypatch, optimizer):
    expected = trained("cpu", False, dropout=0.1, optimizer=optimizer)
    monkeypatch.setattr(train, "uses_graphs", lambda *_: True)

    def recorded(function: functools.partial, pool_of: Recorded | None = None) -> Recorded:
        def changed() -> list[torch.Tensor]:
            if function.func is forward_backward:
                return [parameter.grad for parameter in function.args[0].parameters()]
            parameters, optimizers, _ = function.args
            states = [list(optimizer.state.values()) for optimizer in optimizers]
            return [*parameters, *(parameter.grad for parameter in parameters), *tree_leaves(states)]

        return Recorded(function, changed)

    monkeypatch.setattr(train, "Captured", recorded)
    found = trained("cpu", True, dropout=0.1, optimizer=optimizer)
    # the learning rate is a float32 tensor in a graph
    assert all(torch.allclose(found[name], expected[name], atol=1e-6) for name in expected)


def test_only_small_micro_steps_of_one_process_on_cuda_are_captured(monkeypatch):
    monkeypatch.setattr(train, "graphs_work", lambda: True)
    model = GPT(GPTConfig(vocab_size=65, **SHAPE))
    alone, config = Distributed(torch.device("cuda"), torch.bfloat16), TrainConfig(**SHAPE, batch_size=2)
    assert uses_graphs(config, alone, model)
    assert not uses_graphs(replace(config, batch_size=10**7), alone, model)
    assert not uses_graphs(replace(config, recompute=True), alone, model)
    assert not uses_graphs(config, replace(alone, world_size=2), model)
    assert not uses_graphs(config, replace(alone, device=torch.device("cpu")), model)


@needs_cuda
@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("compiled", [False, True])
def test_on_cuda_a_captured_step_trains_the_same_weights(monkeypatch, compiled, dtype):
    settings = dict(dropout=0.1, compile=compiled, dtype=dtype, optimizer="adamw")  # Muon would enlarge rounding
    found = trained("cuda", True, **settings)
    monkeypatch.setattr(train, "uses_graphs", lambda *_: False)
    expected = trained("cuda", False, **settings)
    assert all(torch.allclose(found[name], expected[name], atol=1e-4) for name in expected)
