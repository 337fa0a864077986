"""Writing with a model: keys and values kept, one token of every text a step, each drawn by its own random stream.

    for token in model.generate(tokenizer.encode("def "), max_new_tokens=50): ...

is the short way; sample.py writes many texts at once with `Decoder` and `Batch`.

Shapes: B texts, T positions, C channels, H heads, D head width, V vocabulary, K ids that can be drawn.
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from plaingpt.decoder import Decoder


@dataclass(frozen=True)
class Sampling:
    """How an id is drawn, in this order; with the values here nothing is left out.

    repetition_penalty: the logit of an id that the text has already is divided by it where positive and
        multiplied where negative (Keskar et al. 2019).
    temperature: logits are divided by it; at 0 the likeliest id is taken.
    top_k: the k likeliest ids stay; 0: all.
    top_p: the fewest likeliest ids that together have this probability stay (Holtzman et al. 2020).
    min_p: ids with at least this share of the likeliest one's probability stay (Nguyen et al. 2024).
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0


def generate(
    model: nn.Module,
    prompt: list[int],
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    end_of_text: int | None = None,
    generator: torch.Generator | None = None,
    **more: float,
) -> Iterator[int]:
    """Yield new token ids one by one, until `max_new_tokens` or `end_of_text`, which is not yielded.

    Settings are `Sampling`'s, `more` the rest of them. `generator` lives on the CPU. Products are in the
    precision of autocast where it is on. The weights are made ready at the start (a second for 124M on a
    CPU): for many texts keep a `Decoder`.
    """
    kind = model.transformer.wte.weight.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else torch.float32
    sampling = Sampling(temperature, top_k, top_p, **more)
    batch = Batch(Decoder(model, dtype), [prompt], max_new_tokens, sampling, [generator])
    for _ in range(max_new_tokens):
        ((_, token),) = batch.step()
        if token == end_of_text:
            return
        yield token


class Batch:
    """Texts that are written at once, each with a length, an end and a random stream of its own.

    Row r of the cache belongs to text `rows[r]`; the row of a text that has ended is given up. Positions end
    at block_size: a text that needs more goes on from its most recent half, read again from position 0. So
    a token costs a bounded time, and sees block_size / 2 tokens before it or more.
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
        assert all(prompts), "a text goes on from at least one token"
        c = decoder.config
        self.decoder, self.sampling, self.generators = decoder, sampling, generators
        self.texts = [list(prompt) for prompt in prompts]  # all ids of each
        self.starts = [max(0, len(text) - c.block_size) for text in self.texts]  # what the text's position 0 is
        self.rows = list(range(len(prompts)))
        self.lengths = [0] * len(prompts)  # positions of each text that are in the cache
        positions = min(c.block_size, max(map(len, prompts)) + max_new_tokens)
        shape = (c.n_layer, 2, len(prompts), c.n_head, positions, c.n_embd // c.n_head)  # 2: key and value
        self.cache = torch.empty(shape, dtype=decoder.cache_dtype, device=decoder.device)

    @torch.inference_mode()
    def step(self) -> list[tuple[int, int]]:
        """(text, its next token) of every text that has not ended."""
        with torch.autocast(self.decoder.device.type, enabled=False):
            logits = self.logits()
        ids = draw(logits, self.sampling, [self.texts[text] for text in self.rows], self.uniform)
        for text, token in zip(self.rows, ids):
            self.texts[text].append(token)
        return list(zip(self.rows, ids))

    @torch.inference_mode()
    def end(self, text: int) -> None:
        """Write no more of this text. The last row moves to where its row was."""
        row, last = self.rows.index(text), self.rows.pop()
        if last != text:
            self.rows[row], length = last, self.lengths[last]
            self.cache[:, :, row, :, :length] = self.cache[:, :, len(self.rows), :, :length]

    def uniform(self) -> Tensor:
        """(B,) numbers from 0 to 1, each from the random stream of its text."""
        draws = [torch.rand(1, generator=self.generators[text], dtype=torch.float64) for text in self.rows]
        return torch.cat(draws)

    @torch.inference_mode()
    def logits(self) -> Tensor:
        """(B, V) of the next token of each row, in float32. Reads whatever of the texts is not in the cache."""
        block = self.decoder.config.block_size
        unread = {}  # texts by how much they have to read before their last token, for exactness: no padding
        for row, text in enumerate(self.rows):
            if self.lengths[text] == block:
                self.starts[text] = len(self.texts[text]) - max(1, block // 2)
                self.lengths[text] = 0
            if ahead := len(self.texts[text]) - self.starts[text] - self.lengths[text] - 1:
                unread.setdefault(ahead, []).append(row)
        for length, rows in unread.items():
            self.fill(rows, length)
        return self.last()

    def fill(self, rows: list[int], length: int) -> None:
        """Read the first `length` tokens of these rows' windows into the cache."""

        def keep(layer: int, heads: Tensor) -> None:
            self.cache[layer][:, rows, :, :length] = heads[:, 1:].transpose(0, 1)

        texts = [self.rows[row] for row in rows]
        self.decoder.read([self.texts[t][self.starts[t] : self.starts[t] + length] for t in texts], keep)
        for text in texts:
            self.lengths[text] = length

    def last(self) -> Tensor:
        """Read the last token of every row: (B, V) logits."""
        decoder, rows = self.decoder, self.rows
        lengths = [self.lengths[text] for text in rows]
        groups = []  # of neighbours of one length, attended to at once: costs less than a mask, and is exact
        for length, group in itertools.groupby(range(len(rows)), lengths.__getitem__):
            members = list(group)
            which = slice(members[0], members[-1] + 1)
            cache = self.cache[:, :, which]
            new, whole = cache[..., length, :].unbind(), cache[..., : length + 1, :].flatten(0, 1).unbind()
            groups.append((which, new, whole[::2], whole[1::2]))  # views of each layer, all made here

        def attend(layer: int, qkv: Tensor) -> Tensor:
            heads, parts = qkv.view(len(rows), 3, decoder.config.n_head, 1, -1), []
            for which, new, keys, values in groups:
                new[layer].copy_(heads[which, 1:, :, 0].transpose(0, 1))
                query = heads[which, 0].to(decoder.cache_dtype)
                parts.append(F.scaled_dot_product_attention(query, keys[layer], values[layer]))
            return (parts[0] if len(parts) == 1 else torch.cat(parts)).view(len(rows), 1, -1)

        idx = torch.tensor([self.texts[text][-1:] for text in rows], device=decoder.device)
        hidden = decoder.hidden(idx, torch.tensor(lengths, device=decoder.device)[:, None], attend)
        for text in rows:
            self.lengths[text] += 1
        return decoder.head(hidden[:, 0]).float()


def draw(logits: Tensor, sampling: Sampling, texts: list[list[int]], uniform: Callable[[], Tensor]) -> list[int]:
    """One id for each row of logits (B, V), where `uniform` gives (B,) numbers from 0 to 1."""
    if sampling.repetition_penalty != 1:
        logits = penalized(logits, texts, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return logits.argmax(-1).tolist()
    p, ids = candidates(logits, sampling)
    total = p.cpu().double().cumsum(-1)  # on the CPU: Apple GPUs have no float64
    which = torch.searchsorted(total, uniform()[:, None] * total[:, -1:], right=True).clamp(max=p.size(-1) - 1)
    return (which if ids is None else ids.cpu().gather(-1, which))[:, 0].tolist()


def penalized(logits: Tensor, texts: list[list[int]], penalty: float) -> Tensor:
    logits = logits.clone()
    for row, text in zip(logits, texts):
        seen = torch.tensor(list(set(text)), device=row.device)
        row[seen] = torch.where(row[seen] > 0, row[seen] / penalty, row[seen] * penalty)
    return logits


def candidates(logits: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor | None]:
    """The ids that can be drawn from logits (B, V) and their weights, likeliest first: (B, K) each.

    All ids in their own order, for which None stands, where none is left out.
    """
    largest = torch.finfo(torch.float32).max
    logits = logits.float().nan_to_num(-largest, largest, -largest)  # overflown: the likeliest is drawn
    ids = None
    if 0 < sampling.top_k < logits.size(-1):
        logits, ids = logits.topk(sampling.top_k)
    elif sampling.top_p < 1:
        logits, ids = logits.sort(descending=True, stable=True)
    p = ((logits - logits.amax(-1, keepdim=True)) / sampling.temperature).softmax(-1)
    if sampling.top_p < 1:
        reached = p.cumsum(-1) - p >= sampling.top_p  # the likelier ids have top_p already
        reached[:, 0] = False
        p = p.masked_fill(reached, 0)
    if sampling.min_p > 0:
        p = p.masked_fill(p < sampling.min_p * p.amax(-1, keepdim=True), 0)
    return p, ids
