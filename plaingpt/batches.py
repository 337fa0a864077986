"""Which tokens make which batch: a pure function of (seed, step), so that nothing of it needs saving.

An epoch reads every window of the corpus once, in an order of its own: no sampling with
replacement, no permutation held in memory, and the same batches for any number of processes.
"""

import functools
import hashlib
import math

import numpy as np
import torch
from torch import Tensor

from model import IGNORED
from plaingpt.console import UserError
from plaingpt.tokens import Tokens

# Sequences whose place is computed at once: some milliseconds, and the first thousand take the most of one
AHEAD = 1 << 15


def mix(*numbers: int) -> int:
    """A 63-bit hash of integers: an independent random stream for each (seed, purpose, index)."""
    return int.from_bytes(hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest(), "little") >> 1


def permute(index: np.ndarray, n: int, key: int) -> np.ndarray:
    """A pseudo-random permutation of range(n), evaluated at `index` alone (int64), in O(1) memory.

    A four-round Feistel network over the next power of four is a permutation; walking the cycle
    until the value falls below n makes it one of range(n) (Black and Rogaway 2002).
    """
    half = max(1, math.ceil(math.log2(max(n, 2)) / 2))
    mask = np.uint64((1 << half) - 1)
    keys = [np.uint64(mix(key, turn)) for turn in range(4)]
    value, outside = index.astype(np.uint64), np.arange(len(index))
    while len(outside):
        walking = value[outside]
        left, right = walking >> np.uint64(half), walking & mask
        h, shifted = np.empty_like(left), np.empty_like(left)
        for turn_key in keys:
            # splitmix64's finaliser (Steele et al. 2014), in place; products wrap at 64 bits
            np.bitwise_xor(right, turn_key, out=h)
            h *= np.uint64(0xBF58476D1CE4E5B9)
            h ^= np.right_shift(h, np.uint64(27), out=shifted)
            h *= np.uint64(0x94D049BB133111EB)
            h ^= np.right_shift(h, np.uint64(31), out=shifted)
            h &= mask
            h ^= left
            left, right, h = right, h, left
        left <<= np.uint64(half)
        left |= right
        value[outside] = left
        outside = outside[left >= n]
    return value.astype(np.int64)


class TrainBatches:
    """The training batches of a run. An update reads `sequences` windows of `block_size` tokens."""

    def __init__(self, tokens: Tokens, block_size: int, sequences: int, seed: int):
        check_length(tokens, block_size, "train")
        self.tokens, self.block_size, self.sequences, self.seed = tokens, block_size, sequences, seed
        self.windows = len(tokens) // block_size  # in an epoch; what is left over differs by epoch
        self._block = functools.lru_cache(2)(self._starts_of_block)

    def starts(self, step: int, first: int = 0, count: int | None = None) -> np.ndarray:
        """Where in the corpus sequences `first` to `first + count` of update `step` begin, or all that follow."""
        begin = step * self.sequences + first
        end = (step + 1) * self.sequences if count is None else begin + count
        blocks = [self._block(block) for block in range(begin // AHEAD, -(-end // AHEAD))]
        return (np.concatenate(blocks) if len(blocks) > 1 else blocks[0])[begin % AHEAD :][: end - begin]

    def _starts_of_block(self, block: int) -> np.ndarray:
        """Where sequences `block * AHEAD` and the AHEAD - 1 that follow begin, counted over the whole run."""
        index = block * AHEAD + np.arange(AHEAD)
        epochs = index // self.windows
        starts = np.empty(AHEAD, np.int64)
        for epoch in np.unique(epochs):
            of_epoch = epochs == epoch
            window = permute(index[of_epoch] % self.windows, self.windows, mix(self.seed, int(epoch)))
            shift = mix(self.seed, int(epoch), 1) % self.block_size  # borders fall elsewhere each epoch
            starts[of_epoch] = shift + window * self.block_size
        return starts

    def micro_batch(self, step: int, index: int, batch_size: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets, (batch_size, block_size) int64: part `index` of the sequences of update `step`."""
        starts = self.starts(step, index * batch_size, batch_size)
        ids = self.tokens.windows(starts, self.block_size + 1)
        return torch.from_numpy(ids[:, :-1]), torch.from_numpy(ids[:, 1:])


class EvalBatches:
    """The same windows each time, evenly spread over the split: `limit` batches of them, or with 0 every token."""

    def __init__(self, tokens: Tokens, block_size: int, batch_size: int, limit: int):
        check_length(tokens, block_size, "val")
        self.tokens, self.block_size, self.batch_size = tokens, block_size, batch_size
        windows = math.ceil((len(tokens) - 1) / block_size)
        wanted = min(windows, limit * batch_size) if limit else windows
        self.windows = np.arange(wanted) * windows // wanted

    def __len__(self) -> int:
        return math.ceil(len(self.windows) / self.batch_size)

    def batch(self, index: int) -> tuple[Tensor, Tensor]:
        """Batch `index`, always of full size (one shape to compile for): what has no target is IGNORED."""
        ids = np.zeros((self.batch_size, self.block_size + 1), np.int64)
        targets = np.full((self.batch_size, self.block_size), IGNORED, np.int64)
        for row, window in enumerate(self.windows[index * self.batch_size :][: self.batch_size]):
            start = int(window) * self.block_size
            length = min(self.block_size + 1, len(self.tokens) - start)
            self.tokens.read(start, ids[row, :length])
            targets[row, : length - 1] = ids[row, 1:length]
        return torch.from_numpy(ids[:, :-1]), torch.from_numpy(targets)


def check_length(tokens: Tokens, block_size: int, split: str) -> None:
    if len(tokens) <= block_size:
        raise UserError(
            f"the {split} split has {len(tokens):,} tokens, too few for one block of {block_size:,}: "
            "prepare more text" + (f", or set --block_size={max(len(tokens) // 4, 1)}" if len(tokens) > 1 else "")
        )
