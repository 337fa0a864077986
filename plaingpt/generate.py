"""Fast sampling: packed weights, cached keys and values, many texts at once, each with its own random generator.

    batch = Batch(Decoder(model, torch.bfloat16), prompts, max_new_tokens, Sampling(top_k=50), generators)
    for text, token in batch.step(): ...

Shapes: B texts, T positions, C channels, H heads, D head width, L layers, V vocabulary, K ids that can be drawn.
"""

import contextlib
import functools
import itertools
import weakref
from collections.abc import Callable, Iterable
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

    temperature: logits are divided by it; 0 takes the likeliest id.
    top_k: the k likeliest ids stay; 0: all.
    top_p: the fewest likeliest ids with this total probability stay (Holtzman et al. 2020).
    min_p: ids with at least this fraction of the likeliest one's probability stay (Nguyen et al. 2024).
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
        self.model, self.config, self.device = model.eval(), model.config, model.padding.device
        self.on_cuda = self.device.type == "cuda"  # where steps have few shapes: each can be captured as a graph
        self.draw_device = torch.device("cpu") if self.device.type == "mps" else self.device  # MPS has no float64
        # On a CPU attention in bfloat16 is slower than in float32.
        self.cache_dtype = torch.float32 if self.device.type == "cpu" else dtype
        self.head = pack(model, dtype)

    def hidden(self, idx: Tensor, positions: Tensor, attend: Callable[[int, Tensor, Tensor, Tensor], Tensor]) -> Tensor:
        """The input of the head for (B, T) ids at these positions: (B, T, C). attend: takes a layer, q, k and v."""
        attentions = [functools.partial(attend, layer) for layer in range(self.config.n_layer)]
        # cuDNN would build a plan for each new length, 40 to 440 ms each.
        backends = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
        without_cudnn = sdpa_kernel(backends) if self.on_cuda else contextlib.nullcontext()
        with torch.autocast(self.device.type, enabled=False), without_cudnn:
            return self.model.hidden(idx, positions, attentions)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., C) to (..., V), in float32."""
        return self.head(hidden)[..., : self.config.vocab_size].float()

    def read(self, ids: list[list[int]], cache: Tensor, rows: list[int]) -> None:
        """Store the keys and values of texts of T ids each, from position 0 on, in these rows of a batch's cache."""
        idx, rows = torch.tensor(ids, device=self.device), torch.tensor(rows, device=self.device)
        T = idx.size(1)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (x.to(self.cache_dtype) for x in (q, k, v))
            cache[layer, 0, rows, :, :T], cache[layer, 1, rows, :, :T] = k, v
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

        self.hidden(idx, torch.arange(T, device=self.device), attend)


class Batch:
    """Texts that are generated together. Each has its own length, its own end and its own random generator.

    Row r of the cache belongs to text `rows[r]`; a text that has ended gives its row up. Positions end at block_size:
    a longer text continues from its most recent half, which is read again from position 0. So the cost of a token is
    bounded, and each token sees at least block_size / 2 tokens before it.
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
        self.starts = [max(0, len(text) - c.block_size) for text in self.texts]  # the token at position 0
        self.rows = list(range(B))
        self.lengths = [0] * B  # positions of each text in the cache
        positions = min(c.block_size, max(map(len, prompts)) + max_new_tokens)
        positions += -positions % 16  # as attention with a mask wants it on GPUs
        shape = (c.n_layer, 2, B, c.n_head, positions, c.n_embd // c.n_head)  # 2: key and value
        self.cache = torch.zeros(shape, dtype=decoder.cache_dtype, device=decoder.device)
        # Of each row: its last token, the position of that, and the bits of a random float64
        self.inputs = torch.zeros(3, B, dtype=torch.int64, device=decoder.device)
        # A strong reference would make a cycle, which keeps the cache until Python's collector finds it
        self.next_ids = functools.partial(Batch._draw, weakref.proxy(self))
        if decoder.on_cuda and graphs_work():
            self.next_ids = Captured(self.next_ids)  # one launch in place of 200
        self.steps_left = max_new_tokens  # to start
        self.started = None  # on CUDA, a step that was started before the tokens of the one before were read

    @torch.inference_mode()
    def step(self) -> list[tuple[int, int]]:
        """(text, its next token) for every text that has not ended."""
        texts, ids, ready = self.started or self._start()
        full = any(self.lengths[text] == self.decoder.config.block_size for text in self.rows)
        ahead = self.decoder.on_cuda and self.steps_left > 0 and not full  # so the GPU does not wait for Python
        self.started = self._start(ahead=True) if ahead else None
        if ready:
            ready.synchronize()
        new = [(text, token) for text, token in zip(texts, ids.tolist()) if text in self.rows]
        for text, token in new:
            self.texts[text].append(token)
        return new

    def _start(self, ahead: bool = False) -> tuple[list[int], Tensor, torch.cuda.Event | None]:
        """The texts of a step, their next tokens, and what to wait for before those are read.

        ahead: the last tokens are known only to the device.
        """
        ids, ready = self.next_ids(*self._prepare(ahead)).to("cpu", non_blocking=True, copy=True), None
        if self.inputs.is_cuda:
            ready = torch.cuda.Event()
            ready.record()
        self.steps_left -= 1
        return list(self.rows), ids, ready

    @torch.inference_mode()
    def end(self, text: int) -> None:
        """Stop generating this text. The last row moves into its row."""
        row, last = self.rows.index(text), self.rows.pop()
        if last != text:
            self.rows[row], length = last, self.lengths[last]
            self.cache[:, :, row, :, :length] = self.cache[:, :, len(self.rows), :, :length]
            self.cache[:, :, row, :, length:] = 0  # masked, but an overflow there would still become NaN
            self.inputs[0, row] = self.inputs[0, len(self.rows)]

    def _read(self) -> None:
        """Read all but the last token of each row that the cache lacks."""
        block = self.decoder.config.block_size
        unread = {}  # {length: {row: its unread ids before the last token}}: equal lengths need no padding
        for row, text in enumerate(self.rows):
            if self.lengths[text] == block:
                self.starts[text] = len(self.texts[text]) - max(1, block // 2)
                self.lengths[text] = 0
            if ids := self.texts[text][self.starts[text] + self.lengths[text] : -1]:
                unread.setdefault(len(ids), {})[row] = ids
                self.lengths[text] = len(ids)
        for ids_of in unread.values():
            self.decoder.read([*ids_of.values()], self.cache, [*ids_of])

    def _prepare(self, ahead: bool = False) -> tuple[int, int]:
        """Read what the cache lacks, and upload what a step needs.

        Returns the shape of the step: its rows, and the positions of the cache that it attends to.
        """
        inputs, n = torch.zeros(self.inputs.shape, dtype=torch.int64), len(self.rows)
        if not ahead:
            self._read()
            inputs[0, :n] = torch.tensor([self.texts[text][-1] for text in self.rows])
        inputs[1, :n] = torch.tensor([self.lengths[text] for text in self.rows])
        if self.sampling.temperature:
            draws = [torch.rand(1, generator=self.generators[text], dtype=torch.float64) for text in self.rows]
            inputs[2, :n] = torch.cat(draws).view(torch.int64)
        pinned = self.inputs.device.type == "cuda"
        inputs = inputs.pin_memory() if pinned else inputs
        self.inputs[int(ahead) :].copy_(inputs[int(ahead) :], non_blocking=pinned)
        for text in self.rows:
            self.lengths[text] += 1
        length = max(self.lengths[text] for text in self.rows)
        if self.decoder.on_cuda:  # powers of two
            n, length = (1 << (x - 1).bit_length() for x in (n, max(256, length)))
        return min(n, len(self.texts)), min(length, self.cache.size(-2))

    def _draw(self, rows: int, length: int) -> Tensor:
        """The next token of each row: (B,)."""
        logits = self._logits(rows, length).to(self.decoder.draw_device)
        draws = self.inputs[2, :rows].to(self.decoder.draw_device)
        ids = draw(logits, self.sampling, draws.view(torch.float64))
        if self.decoder.on_cuda:  # for a step that starts ahead
            self.inputs[0, :rows] = ids
        return ids

    def _logits(self, rows: int, length: int) -> Tensor:
        """Read the last token of each row: (B, V) in float32. On CUDA only `inputs` and the cache matter."""
        decoder, cache = self.decoder, self.cache[:, :, :rows]
        ids, positions, _ = self.inputs[:, :rows, None]
        where = positions[..., None, None].expand(-1, cache.size(3), -1, cache.size(5))  # (B, H, 1, D)

        def views(which: slice, length: int) -> Iterable[tuple[Tensor, ...]]:
            """The keys and the values of these rows: a (B, H, T, D) view for each layer."""
            return map(torch.unbind, cache[:, :, which, :, :length].unbind(1))

        groups = []  # rows that attend together, the function, and their keys and values
        if decoder.on_cuda:
            unwritten = torch.arange(length, device=decoder.device) > positions  # (B, T)
            mask = torch.zeros_like(unwritten, dtype=torch.float32).masked_fill_(unwritten, -torch.inf)
            attention = functools.partial(attend_once, mask[:, None, None])
            groups.append((slice(rows), attention, *views(slice(rows), length)))
        else:  # rows of equal length attend together without a mask: a text is the same alone and in a batch
            for equal, group in itertools.groupby(range(rows), lambda row: self.lengths[self.rows[row]]):
                members = list(group)
                which = slice(members[0], members[-1] + 1)
                groups.append((which, F.scaled_dot_product_attention, *views(which, equal)))
        keys, values = views(slice(rows), cache.size(4))

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (x.to(cache.dtype) for x in (q, k, v))
            keys[layer].scatter_(2, where, k)
            values[layer].scatter_(2, where, v)
            parts = [function(q[which], ks[layer], vs[layer]) for which, function, ks, vs in groups]
            return parts[0] if len(parts) == 1 else torch.cat(parts)

        return decoder.logits(decoder.hidden(ids, positions, attend)[:, 0])


def attend_once(mask: Tensor, q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attention of one query, (B, H, 1, D), over (B, H, T, D) keys and values; mask: (B, 1, 1, T) in float32.

    On CUDA, torch's fused attention reads all keys of a head in one thread block: three times slower for 1,024 keys.
    """
    exact = dict(out_dtype=torch.float32) if q.is_cuda and q.dtype != torch.float32 else {}
    if exact and q.dtype == torch.bfloat16 and torch.cuda.get_device_capability(q.device) < (8, 0):
        q, keys, exact = q.float(), keys.float(), {}  # older cards lack this product
    scores = torch.bmm(q.flatten(0, 1), keys.flatten(0, 1).mT, **exact).view(*q.shape[:3], -1)
    return torch.add(mask, scores, alpha=q.size(-1) ** -0.5).softmax(-1).to(values.dtype) @ values


def draw(logits: Tensor, sampling: Sampling, uniform: Tensor) -> Tensor:
    """(B,) ids, one for each row of logits (B, V). uniform: (B,) float64 from 0 to 1."""
    if sampling.temperature < 1e-6:  # float32 cannot divide by much less
        return logits.argmax(-1)
    p, ids = filtered(logits, sampling)
    total = p.double().cumsum(-1)
    which = torch.searchsorted(total, uniform[:, None] * total[:, -1:], right=True).clamp(max=p.size(-1) - 1)
    return (which if ids is None else ids.gather(-1, which))[:, 0]


def filtered(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor | None]:
    """The ids that can be drawn from logits (B, V), likeliest first, and their weights: (B, K) each.

    With no filter, weights are in the order of the ids, and None stands for the ids.
    """
    largest = torch.finfo(torch.float32).max
    logits = logits.float().nan_to_num(-largest, largest, -largest)  # after an overflow the likeliest id is drawn
    ids = None
    if 0 < sampling.top_k < logits.size(-1):
        logits, ids = logits.topk(sampling.top_k)
    elif sampling.top_p < 1:
        logits, ids = logits.sort(descending=True, stable=True)
    p = ((logits - logits.amax(-1, keepdim=True)) / sampling.temperature).softmax(-1)
    if sampling.top_p < 1:
        reached = p.cumsum(-1) - p >= sampling.top_p  # the likelier ids reach top_p without this one
        reached[:, 0] = False
        p = p.masked_fill(reached, 0)
    if sampling.min_p > 0:
        p = p.masked_fill(p < sampling.min_p * p.amax(-1, keepdim=True), 0)
    return p, ids
