"""Sampling from a model: cached keys and values, many texts at once, each with its own random generator.

    for token in generate(model, tokenizer.encode("def "), max_new_tokens=50): ...

Shapes: B texts, T positions, C channels, H heads, D head width, L layers, V vocabulary, K ids that can be drawn.
"""

import contextlib
import copy
import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from model import GPT
from plaingpt.cpu import pack


@dataclass(frozen=True)
class Sampling:
    """How an id is drawn. The filters apply in this order; with the defaults every id can be drawn.

    repetition_penalty: the logit of an id that occurs in the text is divided by it if positive and
        multiplied by it if negative (Keskar et al. 2019).
    temperature: logits are divided by it; 0 takes the likeliest id.
    top_k: the k likeliest ids stay; 0: all.
    top_p: the fewest likeliest ids with this total probability stay (Holtzman et al. 2020).
    min_p: ids with at least this fraction of the likeliest one's probability stay (Nguyen et al. 2024).
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


def generate(
    model: GPT,
    prompt: list[int],
    max_new_tokens: int,
    end_of_text: int | None = None,
    generator: torch.Generator | None = None,
    **sampling: float,
) -> Iterator[int]:
    """Yield new token ids until `max_new_tokens` or `end_of_text`, which is not yielded.

    sampling: the fields of `Sampling`. generator: on the CPU. Products are in the precision of autocast where it is
    on. Packing the weights takes a second for 124M on a CPU: for many texts use one `Decoder`.
    """
    kind = model.padding.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
    batch = Batch(Decoder(shallow_copy(model), dtype), [prompt], max_new_tokens, Sampling(**sampling), [generator])
    for _ in range(max_new_tokens):
        ((_, token),) = batch.step()
        if token == end_of_text:
            return
        yield token


def shallow_copy(model: nn.Module) -> nn.Module:
    """A second model of the same tensors, whose modules can be replaced."""
    return copy.deepcopy(model, {id(t): t for t in itertools.chain(model.parameters(), model.buffers())})


class Decoder:
    """A model prepared for sampling: packed weights in `dtype`, LayerNorms and the residual stream in float32.

    It takes the model's matrices away: the model itself cannot be used afterwards.
    """

    def __init__(self, model: GPT, dtype: torch.dtype):
        self.model, self.config, self.device = model.eval(), model.config, model.padding.device
        # On a CPU attention in bfloat16 is slower than in float32.
        self.cache_dtype = torch.float32 if self.device.type == "cpu" else dtype
        self.head = pack(model, dtype)

    def hidden(self, idx: Tensor, positions: Tensor, attentions: list) -> Tensor:
        """The input of the head for (B, T) ids at these positions: (B, T, C)."""
        # cuDNN would build a plan for each new length, 40 to 440 ms each.
        backends = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
        without_cudnn = sdpa_kernel(backends) if self.device.type == "cuda" else contextlib.nullcontext()
        with torch.autocast(self.device.type, enabled=False), without_cudnn:
            return self.model.hidden(idx, positions, attentions)

    def read(self, ids: list[list[int]], keep: Callable[[int, Tensor, Tensor], None] | None = None) -> Tensor:
        """The input of the head for B lists of T ids from position 0: (B, T, C).

        keep: is called with each layer's number and its keys and values, (B, H, T, D) each.
        """

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            q, k, v = (x.to(self.cache_dtype) for x in (q, k, v))
            if keep:
                keep(layer, k, v)
            return F.scaled_dot_product_attention(q, k, v, is_causal=True)

        idx = torch.tensor(ids, device=self.device)
        attentions = [functools.partial(attend, layer) for layer in range(self.config.n_layer)]
        return self.hidden(idx, torch.arange(idx.size(1), device=self.device), attentions)


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
        generators: list[torch.Generator | None],
    ):
        assert all(prompts), "each prompt needs at least one token"
        c = decoder.config
        self.decoder, self.sampling, self.generators = decoder, sampling, generators
        self.texts = [list(prompt) for prompt in prompts]  # all ids of each
        self.starts = [max(0, len(text) - c.block_size) for text in self.texts]  # the token at position 0
        self.rows = list(range(len(prompts)))
        self.lengths = [0] * len(prompts)  # positions of each text in the cache
        positions = min(c.block_size, max(map(len, prompts)) + max_new_tokens)
        shape = (c.n_layer, 2, len(prompts), c.n_head, positions, c.n_embd // c.n_head)  # 2: key and value
        self.cache = torch.empty(shape, dtype=decoder.cache_dtype, device=decoder.device)

    @torch.inference_mode()
    def step(self) -> list[tuple[int, int]]:
        """(text, its next token) for every text that has not ended."""
        ids = draw(self.logits(), self.sampling, [self.texts[text] for text in self.rows], self._uniform)
        for text, token in zip(self.rows, ids):
            self.texts[text].append(token)
        return list(zip(self.rows, ids))

    @torch.inference_mode()
    def end(self, text: int) -> None:
        """Stop generating this text. The last row moves into its row."""
        row, last = self.rows.index(text), self.rows.pop()
        if last != text:
            self.rows[row], length = last, self.lengths[last]
            self.cache[:, :, row, :, :length] = self.cache[:, :, len(self.rows), :, :length]

    def _uniform(self) -> Tensor:
        """(B,) numbers from 0 to 1, each from its text's generator."""
        draws = [torch.rand(1, generator=self.generators[text], dtype=torch.float64) for text in self.rows]
        return torch.cat(draws)

    @torch.inference_mode()
    def logits(self) -> Tensor:
        """(B, V) of the next token of each row, in float32. Reads what the cache does not have yet."""
        block = self.decoder.config.block_size
        unread = {}  # rows by how much they have to read before their last token: equal lengths need no padding
        for row, text in enumerate(self.rows):
            if self.lengths[text] == block:
                self.starts[text] = len(self.texts[text]) - max(1, block // 2)
                self.lengths[text] = 0
            if ahead := len(self.texts[text]) - self.starts[text] - self.lengths[text] - 1:
                unread.setdefault(ahead, []).append(row)
        for length, rows in unread.items():
            self._fill(rows, length)
        return self._read_last()

    def _fill(self, rows: list[int], length: int) -> None:
        """Read the first `length` tokens of these rows' windows into the cache."""

        def keep(layer: int, k: Tensor, v: Tensor) -> None:
            self.cache[layer, 0, rows, :, :length], self.cache[layer, 1, rows, :, :length] = k, v

        texts = [self.rows[row] for row in rows]
        self.decoder.read([self.texts[t][self.starts[t] : self.starts[t] + length] for t in texts], keep)
        for text in texts:
            self.lengths[text] = length

    def _read_last(self) -> Tensor:
        """Read the last token of every row: (B, V) in float32."""
        decoder, rows = self.decoder, self.rows
        lengths = [self.lengths[text] for text in rows]
        groups = []  # neighbours of equal length attend together: exact, and cheaper than a mask
        for length, group in itertools.groupby(range(len(rows)), lengths.__getitem__):
            members = list(group)
            which = slice(members[0], members[-1] + 1)
            # views of all layers, made once: L of (2, B, H, D), and L of (B, H, T, D) twice
            cache = self.cache[:, :, which]
            groups.append((which, cache[..., length, :].unbind(), *cache[..., : length + 1, :].unbind(1)))

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            parts = []
            for which, new, keys, values in groups:
                new[layer][0].copy_(k[which, :, 0])
                new[layer][1].copy_(v[which, :, 0])
                query = q[which].to(decoder.cache_dtype)
                parts.append(F.scaled_dot_product_attention(query, keys[layer], values[layer]))
            return parts[0] if len(parts) == 1 else torch.cat(parts)

        idx = torch.tensor([self.texts[text][-1:] for text in rows], device=decoder.device)
        attentions = [functools.partial(attend, layer) for layer in range(decoder.config.n_layer)]
        hidden = decoder.hidden(idx, torch.tensor(lengths, device=decoder.device)[:, None], attentions)
        for text in rows:
            self.lengths[text] += 1
        return decoder.head(hidden[:, 0]).float()


def draw(logits: Tensor, sampling: Sampling, texts: list[list[int]], uniform: Callable[[], Tensor]) -> list[int]:
    """One id for each row of logits (B, V). uniform: gives (B,) numbers from 0 to 1."""
    if sampling.repetition_penalty != 1:
        logits = penalized(logits, texts, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return logits.argmax(-1).tolist()
    p, ids = candidates(logits, sampling)
    if p.device.type == "mps":  # which has no float64
        p, ids = p.cpu(), None if ids is None else ids.cpu()
    total = p.double().cumsum(-1)
    wanted = uniform().to(total.device)[:, None] * total[:, -1:]
    which = torch.searchsorted(total, wanted, right=True).clamp(max=p.size(-1) - 1)
    return (which if ids is None else ids.gather(-1, which))[:, 0].tolist()


def penalized(logits: Tensor, texts: list[list[int]], penalty: float) -> Tensor:
    logits = logits.clone()
    for row, text in zip(logits, texts):
        seen = torch.tensor(list(set(text)), device=row.device)
        row[seen] = torch.where(row[seen] > 0, row[seen] / penalty, row[seen] * penalty)
    return logits


def candidates(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor | None]:
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
