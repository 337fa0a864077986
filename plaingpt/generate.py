"""Fast sampling: packed weights, cached keys and values, many texts at once, each with its own random generator.

    batch = Batch(Decoder(model, torch.bfloat16), prompts, max_new_tokens, Sampling(top_k=50), generators)
    for text, token in batch.step(): ...

Shapes: B texts, T positions, C channels, H heads, D head width, L layers, V vocabulary, K ids that can be drawn.
"""

import collections
import contextlib
import functools
import itertools
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from model import GPT
from plaingpt.cpu import pack
from plaingpt.graphs import Captured, graphs_work


@dataclass(frozen=True)
class Sampling:
    """How an id is drawn. The filters apply in this order; with the defaults every id can be drawn.

    temperature: logits are divided by it; 0 takes the most likely id.
    top_k: the k most likely ids stay; 0: all.
    top_p: the smallest set of most likely ids that reaches this total probability stays (Holtzman et al. 2020).
    min_p: ids with at least this fraction of the highest probability stay (Nguyen et al. 2024).
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0


class Decoder:
    """A model prepared for sampling: packed weights in `dtype`, LayerNorms and the residual stream in float32.

    It moves the weights out of the model, which cannot be used afterwards.
    """

    def __init__(self, model: GPT, dtype: torch.dtype):
        self.model, self.config, self.device = model.eval(), model.config, model.logit_bias.device
        self.on_cuda = self.device.type == "cuda"
        self.draw_device = torch.device("cpu") if self.device.type == "mps" else self.device  # MPS has no float64
        # On a CPU attention in bfloat16 is slower than in float32.
        self.cache_dtype = torch.float32 if self.device.type == "cpu" else dtype
        self.head = pack(model, dtype)

    def hidden(self, idx: Tensor, positions: Tensor, attend: Callable[[int, Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """The input of the head for (B, T) ids at these positions: (B, T, C). attend: takes a layer, q, k and v."""
        attentions = [functools.partial(attend, layer) for layer in range(self.config.n_layer)]
        # cuDNN would build a plan for each new length, 0.1 to 0.7 s each.
        backends = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
        without_cudnn = sdpa_kernel(backends) if self.on_cuda else contextlib.nullcontext()
        with torch.autocast(self.device.type, enabled=False), without_cudnn:
            return self.model.hidden(idx, positions, attentions)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., C) to (..., V), in float32."""
        return self.head(hidden)[..., : self.config.vocab_size].float()

    def read(self, ids: dict[int, list[int]], cache: Tensor) -> None:
        """Store keys and values in a batch's cache. ids: T ids for each row, from position 0 on."""
        idx, rows = torch.tensor([*ids.values()], device=self.device), torch.tensor([*ids], device=self.device)
        T = idx.size(1)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (x.to(self.cache_dtype) for x in (q, k, v))
            cache[layer, 0, rows, :, :T], cache[layer, 1, rows, :, :T] = k, v
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

        self.hidden(idx, torch.arange(T, device=self.device), attend)


class Batch:
    """Texts that are generated together. Each has its own length, its own end and its own random generator.

    Row r of the cache belongs to text `rows[r]`; a text that has ended gives its row up. When a text fills block_size
    positions, its most recent half is read again from position 0. So the cost of a token is bounded, and later tokens
    see at least block_size / 2 tokens before them. The caller ends texts, with `end`: `step` may be called
    `max_new_tokens` times. generators: on the CPU.
    """

    @torch.inference_mode()
    def __init__(
        self,
        decoder: Decoder,
        prompts: list[list[int]],
        max_new_tokens: int,
        sampling: Sampling,
        generators: list[torch.Generator],
    ):
        assert all(prompts), "each prompt needs at least one token"
        c, B = decoder.config, len(prompts)
        self.decoder, self.sampling, self.generators = decoder, sampling, generators
        self.texts = [list(prompt) for prompt in prompts]  # all ids of each
        self.rows = list(range(B))
        self.lengths = [0] * B  # positions of each text in the cache
        positions = min(c.block_size, max(map(len, prompts)) + max_new_tokens)
        positions += -positions % 16  # a multiple of 16, for masked attention on GPUs
        shape = (c.n_layer, 2, B, c.n_head, positions, c.n_embd // c.n_head)  # 2: key and value
        self.cache = torch.zeros(shape, dtype=decoder.cache_dtype, device=decoder.device)
        self.last_ids = torch.zeros(B, dtype=torch.int64, device=decoder.device)  # of each row
        # Of each row: the position of its last id, and the bits of a random float64. One tensor: one upload per step
        self.inputs = torch.zeros(2, B, dtype=torch.int64, device=decoder.device)
        # A strong reference would make a cycle, which keeps the cache until Python's collector finds it
        self.next_ids = functools.partial(Batch._next_ids, weakref.proxy(self))
        if decoder.on_cuda and graphs_work():
            self.next_ids = Captured(self.next_ids)  # one launch in place of 200
        self.steps_left = max_new_tokens  # to start
        self.in_flight = None  # what `_start` returned for the step that is running

    @torch.inference_mode()
    def step(self) -> list[tuple[int, int]]:
        """(i, next token) of each text `i` that has not ended."""
        if not self.in_flight:
            self._read()
            self.in_flight = self._start()
        indices, ids, ready = self.in_flight
        full = any(self.lengths[i] == self.decoder.config.block_size for i in self.rows)  # `_read` has to shorten it
        ahead = self.decoder.on_cuda and self.steps_left > 0 and not full  # so the GPU does not wait for Python
        self.in_flight = self._start() if ahead else None
        if ready:
            ready.synchronize()
        new = [(i, token) for i, token in zip(indices, ids.tolist()) if i in self.rows]
        for i, token in new:
            self.texts[i].append(token)
        return new

    @torch.inference_mode()
    def end(self, i: int) -> None:
        """Stop generating text `i`. The last row moves into its row."""
        row, last = self.rows.index(i), self.rows.pop()
        if last != i:
            self.rows[row] = last
            # Positions that it has not reached are masked, but an infinity left there would become NaN
            self.cache[:, :, row] = self.cache[:, :, len(self.rows)]
            self.last_ids[row] = self.last_ids[len(self.rows)]

    def _read(self) -> None:
        """Upload the last id of each row, and read what the cache lacks before it."""
        self.last_ids[: len(self.rows)] = torch.tensor([self.texts[i][-1] for i in self.rows])
        block = self.decoder.config.block_size
        unread = collections.defaultdict(dict)  # {length: {row: ids}}: equal lengths need no padding
        for row, i in enumerate(self.rows):
            if self.lengths[i] in (0, block):  # the prompt, or a text that continues from its most recent half
                window = block if self.lengths[i] == 0 else max(1, block // 2)
                ids = self.texts[i][-window:-1]
                self.lengths[i] = len(ids)
                if ids:
                    unread[len(ids)][row] = ids
        for ids in unread.values():
            self.decoder.read(ids, self.cache)

    def _start(self) -> tuple[list[int], Tensor, torch.cuda.Event | None]:
        """Start a step. Returns the indices of its texts, their next ids, and what to wait for before reading those."""
        ids = self.next_ids(*self._prepare()).to("cpu", non_blocking=True, copy=True)
        ready = torch.cuda.Event() if self.inputs.is_cuda else None
        if ready:
            ready.record()
        self.steps_left -= 1
        return list(self.rows), ids, ready

    def _prepare(self) -> tuple[int, int]:
        """Upload the inputs of a step. Returns its shape: its rows, and the positions that it attends to."""
        n = len(self.rows)
        inputs = torch.zeros(self.inputs.shape, dtype=torch.int64)
        inputs[0, :n] = torch.tensor([self.lengths[i] for i in self.rows])
        draws = [torch.rand(1, generator=self.generators[i], dtype=torch.float64) for i in self.rows]
        inputs[1, :n] = torch.cat(draws).view(torch.int64)
        pinned = self.inputs.is_cuda
        self.inputs.copy_(inputs.pin_memory() if pinned else inputs, non_blocking=pinned)
        for i in self.rows:
            self.lengths[i] += 1
        length = max(self.lengths[i] for i in self.rows)
        if self.decoder.on_cuda:  # rounded up to powers of two, because a graph is captured for each shape
            n, length = (1 << (x - 1).bit_length() for x in (n, max(256, length)))
        return min(n, len(self.texts)), min(length, self.cache.size(-2))

    def _next_ids(self, rows: int, length: int) -> Tensor:
        """The next id of each row: (B,). A CUDA graph repeats this: only values of tensors may change between steps."""
        logits = self._logits(rows, length).to(self.decoder.draw_device)
        draws = self.inputs[1, :rows].to(self.decoder.draw_device)
        ids = draw(logits, self.sampling, draws.view(torch.float64))
        if self.decoder.on_cuda:  # for a step that starts ahead
            self.last_ids[:rows] = ids
        return ids

    def _logits(self, rows: int, length: int) -> Tensor:
        """Read the last id of each row: (B, V) in float32."""
        cache, positions = self.cache[:, :, :rows], self.inputs[0, :rows, None]  # positions: (B, T = 1)
        attention = masked_attention(cache, positions, length) if self.decoder.on_cuda else self._unmasked(cache)
        keys, values = layers(cache)
        where = positions[..., None, None].expand(-1, cache.size(3), -1, cache.size(5))  # (B, H, 1, D)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (x.to(cache.dtype) for x in (q, k, v))
            keys[layer].scatter_(2, where, k)
            values[layer].scatter_(2, where, v)
            return attention(layer, q)

        return self.decoder.logits(self.decoder.hidden(self.last_ids[:rows, None], positions, attend)[:, 0])

    def _unmasked(self, cache: Tensor) -> Callable[[int, Tensor], Tensor]:
        """As `masked_attention`, but rows of equal length together, without a mask: a text is the same alone and in a
        batch."""
        groups, start = [], 0
        for length, group in itertools.groupby(self.lengths[i] for i in self.rows):
            rows = slice(start, start + len(list(group)))
            groups.append((rows, *layers(cache[:, :, rows, :, :length])))
            start = rows.stop

        def attention(layer: int, q: Tensor) -> Tensor:
            parts = [F.scaled_dot_product_attention(q[rows], k[layer], v[layer]) for rows, k, v in groups]
            return parts[0] if len(parts) == 1 else torch.cat(parts)

        return attention


def layers(cache: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """The keys and the values in a cache: a (B, H, T, D) view for each layer. Views are made all at once, for speed."""
    keys, values = cache.unbind(1)
    return keys.unbind(), values.unbind()


def masked_attention(cache: Tensor, positions: Tensor, length: int) -> Callable[[int, Tensor], Tensor]:
    """Attention of all rows together to the first `length` positions; a mask hides those beyond `positions`, (B, 1).

    On CUDA, torch's fused attention reads all keys of a head in one thread block: three times slower for 1,024 keys.
    """
    unwritten = torch.arange(length, device=cache.device) > positions  # (B, T)
    mask = torch.zeros_like(unwritten, dtype=torch.float32).masked_fill_(unwritten, -torch.inf)[:, None, None]
    all_keys, all_values = layers(cache[..., :length, :])

    def attention(layer: int, q: Tensor) -> Tensor:  # (B, H, 1, D)
        keys, values = all_keys[layer], all_values[layer]
        exact = dict(out_dtype=torch.float32) if q.is_cuda and q.dtype != torch.float32 else {}
        if exact and q.dtype == torch.bfloat16 and torch.cuda.get_device_capability(q.device) < (8, 0):
            q, keys, exact = q.float(), keys.float(), {}  # older GPUs lack this product
        scores = torch.bmm(q.flatten(0, 1), keys.flatten(0, 1).mT, **exact).view(*q.shape[:3], -1)
        return torch.add(mask, scores, alpha=q.size(-1) ** -0.5).softmax(-1).to(values.dtype) @ values

    return attention


def draw(logits: Tensor, sampling: Sampling, uniform: Tensor) -> Tensor:
    """(B,) ids, one for each row of logits (B, V). uniform: (B,) float64 from 0 to 1."""
    largest = torch.finfo(torch.float32).max
    logits = logits.float().nan_to_num(-largest, largest, -largest)  # after an overflow the most likely id is drawn
    if sampling.temperature < 1e-6:  # float32 cannot divide by much less
        return logits.argmax(-1)
    p, ids = filtered(logits, sampling)
    total = p.double().cumsum(-1)
    which = torch.searchsorted(total, uniform[:, None] * total[:, -1:], right=True).clamp(max=p.size(-1) - 1)
    return (which if ids is None else ids.gather(-1, which))[:, 0]


def filtered(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor | None]:
    """Weights and ids, (B, K) each, of the ids that can be drawn from logits (B, V); a weight of 0 excludes one.

    With top_k or top_p, the most likely id comes first. Without both, `ids` is None: all V weights, in order of ids.
    """
    ids = None
    if 0 < sampling.top_k < logits.size(-1):
        logits, ids = logits.topk(sampling.top_k)
    elif sampling.top_p < 1:
        logits, ids = logits.sort(descending=True, stable=True)
    p = ((logits - logits.amax(-1, keepdim=True)) / sampling.temperature).softmax(-1)
    if sampling.top_p < 1:
        reached = p.cumsum(-1) - p >= sampling.top_p  # more likely ids reach top_p without this one
        reached[:, 0] = False
        p = p.masked_fill(reached, 0)
    if sampling.min_p > 0:
        p = p.masked_fill(p < sampling.min_p * p.amax(-1, keepdim=True), 0)
    return p, ids
