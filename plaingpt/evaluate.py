"""How good a model is: its loss on fixed batches, bits per byte, and a short sample."""

import math

import numpy as np
import torch
from torch import nn

from model import GPT, IGNORED
from plaingpt.batches import EvalBatches
from plaingpt.checkpoint import model_with
from plaingpt.distributed import Distributed, StopSignal
from plaingpt.parallel import gather, is_sharded
from plaingpt.tokens import DataSet, Tokens


@torch.no_grad()
def evaluate(model: nn.Module, batches: EvalBatches, dist: Distributed, stop: StopSignal | None = None) -> float | None:
    """Mean loss in nats over all targets; each rank computes some of the batches. None if `stop` is set meanwhile. All
    ranks."""
    was_training = model.training
    model.eval()
    losses, count = [], 0
    # Every rank makes the same number of passes, because a sharded model needs all ranks. A batch past the last one has
    # no targets.
    for first in range(0, len(batches), dist.world_size):
        if stop and dist.max(stop.number):
            model.train(was_training)
            return None
        inputs, targets = batches.batch(first + dist.rank)
        n_targets = int((targets != IGNORED).sum())
        inputs, targets = dist.to_device(inputs, targets)
        with dist.autocast():
            loss = model(inputs, targets, need_logits=False)[1]
        if n_targets:
            losses.append(loss.float() * n_targets)
        count += n_targets
    model.train(was_training)
    total = torch.stack(losses).cpu().double().sum().item() if losses else 0.0
    return dist.sum(total) / dist.sum(count)


def bits_per_byte(loss: float, tokens: Tokens) -> float | None:
    """The loss per byte of text, comparable between tokenizers; None if the size of the text is unknown."""
    return loss / math.log(2) * len(tokens) / tokens.n_bytes if tokens.n_bytes else None


def describe_loss(loss: float, data: DataSet) -> str:
    bpb = bits_per_byte(loss, data.val)
    return f"val_loss {loss:.4f}" + (f", {bpb:.4f} bits per byte" if bpb else "")


def sample_text(model: GPT, data: DataSet, length: int, dist: Distributed, seed: int) -> str:
    """A short text that starts from the first token of the validation split; empty except on main. All ranks."""
    if any(map(is_sharded, model.parameters())):
        weights = gather(model.weights(), dist)
        if dist.is_main:  # in dist.dtype: a GPU that needs sharding has no room for a float32 copy
            model = model_with(model.config, weights).to(dist.device, dist.dtype)
    if not dist.is_main:
        return ""
    prompt = data.val.windows(np.zeros(1, np.int64), 1)[0].tolist()
    generator, end = torch.Generator().manual_seed(seed), data.tokenizer.end_of_text
    model.eval()
    new = list(model.generate(prompt, length, temperature=0.8, top_k=200, end_of_text=end, generator=generator))
    model.train()
    return data.tokenizer.decode([*prompt, *new])
