"""Batches are a pure function of (seed, step): nothing about the data order has to be saved.

Each epoch reads every window of the corpus once, in a new order: no sampling with replacement, no
permutation in memory, and the same batches for any number of processes.
"""

import hashlib
import math

import numpy as np
import torch
from torch import Tensor

from model import IGNORED
from plaingpt.console import UserError, counted
from plaingpt.tokens import Tokens


def derive_seed(*values: object) -> int:
    """A 63-bit hash of values, as a random seed: of (seed, epoch), say, or of (seed, step, micro-batch)."""
    return int.from_bytes(hashlib.blake2b(repr(values).encode(), digest_size=8).digest(), "little") >> 1


def permute(index: np.ndarray, n: int, key: int) -> np.ndarray:
    """The values at `index` (int64) of a pseudo-random permutation of range(n), in O(1) memory.

    A four-round Feistel network permutes the next power of four; applying it again until the value is
    below n ("cycle walking") permutes range(n) (Black and Rogaway 2002).
    """
    bits = math.ceil(math.log2(max(n, 2)) / 2)
    half, mask = np.uint64(bits), np.uint64((1 << bits) - 1)
    keys = [np.uint64(derive_seed(key, turn)) for turn in range(4)]
    value, outside = index.astype(np.uint64), np.arange(len(index))
    while len(outside):
        left, right = value[outside] >> half, value[outside] & mask
        for turn_key in keys:  # the end of splitmix64 (Steele et al. 2014); products wrap at 64 bits
            h = (right ^ turn_key) * np.uint64(0xBF58476D1CE4E5B9)
            h = (h ^ (h >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            left, right = right, left ^ ((h ^ (h >> np.uint64(31))) & mask)
        value[outside] = left << half | right
        outside = outside[value[outside] >= n]
    return value.astype(np.int64)


class TrainBatches:
    """The training batches of a run. Each step reads `sequences` windows of `block_size` tokens."""

    def __init__(self, tokens: Tokens, block_size: int, sequences: int, seed: int):
        check_length(tokens, block_size, "train")
        self.tokens, self.block_size, self.sequences, self.seed = tokens, block_size, sequences, seed
        self.windows = len(tokens) // block_size  # per epoch; which tokens are left over differs between epochs

    def starts(self, step: int, first: int = 0, count: int | None = None) -> np.ndarray:
        """Start positions in the corpus of `count` (default: all) sequences of a step, from sequence `first` on."""
        index = step * self.sequences + first + np.arange(count or self.sequences - first)  # from the start of the run
        epochs, starts = index // self.windows, np.empty_like(index)
        for epoch in np.unique(epochs):
            of_epoch = epochs == epoch
            window = permute(index[of_epoch] % self.windows, self.windows, derive_seed(self.seed, int(epoch)))
            # each epoch cuts the text at other positions
            shift = derive_seed(self.seed, int(epoch), 1) % self.block_size
            starts[of_epoch] = shift + window * self.block_size
        return starts

    def micro_batch(self, step: int, index: int, batch_size: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets, (batch_size, block_size) int64: micro-batch `index` of step `step`."""
        starts = self.starts(step, index * batch_size, batch_size)
        ids = self.tokens.windows(starts, self.block_size + 1)
        return torch.from_numpy(ids[:, :-1]), torch.from_numpy(ids[:, 1:].copy())  # targets may be masked


class EvalBatches:
    """The same `sequences` windows at each evaluation, evenly spread over the split; 0: all of its tokens.

    Which tokens are evaluated does not depend on `batch_size`.
    """

    def __init__(self, tokens: Tokens, block_size: int, batch_size: int, sequences: int):
        check_length(tokens, block_size, "val")
        self.tokens, self.block_size, self.batch_size = tokens, block_size, batch_size
        windows = math.ceil((len(tokens) - 1) / block_size)
        wanted = min(windows, sequences or windows)
        self.starts = np.arange(wanted) * windows // wanted * block_size

    def __len__(self) -> int:
        return math.ceil(len(self.starts) / self.batch_size)

    def batch(self, index: int) -> tuple[Tensor, Tensor]:
        """Batch `index`, always of full size (one shape to compile for): positions without a target are IGNORED."""
        starts = np.full(self.batch_size, len(self.tokens))  # unused rows start past the end: no target is in the split
        found = self.starts[index * self.batch_size :][: self.batch_size]
        starts[: len(found)] = found
        ids = self.tokens.windows(starts, self.block_size + 1)
        positions = starts[:, None] + np.arange(1, self.block_size + 1)  # of the targets
        targets = np.where(positions < len(self.tokens), ids[:, 1:], IGNORED)
        return torch.from_numpy(ids[:, :-1]), torch.from_numpy(targets)


def check_length(tokens: Tokens, block_size: int, split: str) -> None:
    if len(tokens) <= block_size:
        raise UserError(
            f"the {split} split has {counted(len(tokens), 'token')}, too few for one block of {block_size:,}: "
            "prepare more text" + (f", or set --block_size={max(len(tokens) // 4, 1)}" if len(tokens) > 1 else "")
        )
