import copy
import gc
import itertools
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_graphs import Recorded
from test_model import SMALL, random_ids, random_model

from model import GPT, GPTConfig
from plaingpt.cpu import has_fp16_products
from plaingpt.generate import Batch, Decoder, Sampling, draw, filtered

GREEDY = Sampling(temperature=0)
BLOCK = SMALL.block_size
on_x86 = pytest.mark.skipif(not has_fp16_products(), reason="torch has no products with float16 weights here")


def seen(text: list[int], prompt_length: int, block: int) -> list[int]:
    """What the model sees of a text: all of it up to the block; then, whenever that is full, the most recent half."""
    start = max(0, prompt_length - block)
    for length in range(prompt_length, len(text) + 1):
        if length - start > block:
            start = length - max(1, block // 2)
    return text[start:]


@torch.no_grad()
def uncached(model: GPT, text: list[int], prompt_length: int) -> torch.Tensor:
    return model(torch.tensor([seen(text, prompt_length, model.config.block_size)]))[0][0, -1].float()


def batch(model: GPT, prompts, max_new_tokens=50, sampling=GREEDY, seeds=None, dtype=torch.float32) -> Batch:
    generators = [torch.Generator().manual_seed(seed) for seed in seeds or range(len(prompts))]
    return Batch(Decoder(copy.deepcopy(model), dtype), prompts, max_new_tokens, sampling, generators)


@torch.inference_mode()
def next_logits(batch: Batch) -> torch.Tensor:
    """(B, V) of the next token of each row, and with fixed shapes some rows more."""
    batch._read()
    return batch._logits(*batch._prepare())


def write(batch: Batch, lengths: list[int]) -> list[list[int]]:
    """The tokens of each text, each ended at a length of its own."""
    new = [[] for _ in lengths]
    while batch.rows:
        for text, token in batch.step():
            new[text].append(token)
            if len(new[text]) == lengths[text]:
                batch.end(text)
    return new


def test_the_cache_goes_with_its_batch():
    texts = batch(random_model(SMALL), [[1], [2]])
    texts.step()
    cache = weakref.ref(texts.cache)
    gc.disable()
    try:
        del texts
        assert cache() is None
    finally:
        gc.enable()


ragged = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=5)


@settings(max_examples=60)
@given(ragged, st.sampled_from([(12, True), (1, True), (2, False), (150, False)]), st.integers(0, 9), st.booleans())
def test_cached_logits_equal_uncached_ones(lengths, shape, seed, on_cuda):
    """Prompts of 1 to beyond the block, unequal lengths and ends in one batch, across the window's moves.

    on_cuda: with the shapes that steps have on a GPU.
    """
    block, bias = shape
    model = random_model(GPTConfig(block, 65, 2, 2, 32, bias=bias), std=0.1)
    ids = torch.randint(65, (len(lengths), 60), generator=torch.Generator().manual_seed(seed)).tolist()
    texts = batch(model, [row[:n] for row, (n, _) in zip(ids, lengths)])
    texts.decoder.on_cuda = on_cuda
    for step in range(max(new for _, new in lengths)):
        for row, logits in zip(list(texts.rows), next_logits(texts)):
            prompt, new = lengths[row]
            expected = uncached(model, ids[row][: prompt + step], prompt)
            assert (logits - expected).abs().max() <= 1e-5 * max(1, expected.abs().max())
            texts.texts[row].append(ids[row][prompt + step])
            if step + 1 == new:
                texts.end(row)


@pytest.mark.parametrize("sampling", [GREEDY, Sampling(0.8, 40), Sampling(0.9, 0, 0.9, 0.01)], ids=str)
def test_steps_recorded_once_for_each_shape_and_repeated_write_the_same(sampling):
    """What a GPU does, with graphs of torch.fx for CUDA's: so a step reads nothing but tensors, and waits for none."""
    model = random_model(GPTConfig(300, 65, 2, 2, 32), std=0.1)
    ids = random_ids(model.config, 5, 320).tolist()
    prompts, lengths = [ids[i][:n] for i, n in enumerate((3, 120, 290, 7, 320))], [6, 20, 20, 15, 30]
    alone = [batch(model, [prompt], 50, sampling, [i]) for i, prompt in enumerate(prompts)]
    expected = [write(text, [length])[0] for text, length in zip(alone, lengths)]
    texts = batch(model, prompts, 50, sampling)
    texts.decoder.on_cuda = True
    texts.next_ids = Recorded(texts._next_ids, lambda: [texts.last_ids])
    assert write(texts, lengths) == expected
    # powers of two, or as many as there are
    assert texts.next_ids.graphs.keys() == {(5, 304), (4, 304), (4, 256), (1, 256)}
    assert all(texts.next_ids.graphs.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, pytest.param(torch.float16, marks=on_x86)])
def test_in_16_bits_the_likeliest_ids_are_those_of_the_uncached_model(dtype):
    model = random_model(SMALL)
    ids = random_ids(SMALL, 4, 40).tolist()
    texts = batch(model, [row[: 3 * i + 1] for i, row in enumerate(ids)], dtype=dtype)
    for step in range(25):
        for i, logits in enumerate(next_logits(texts)):
            text = ids[i][: 3 * i + 1 + step]
            with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
                expected = uncached(model, text, 3 * i + 1)
            error = (logits - expected).abs().max()
            assert error < 0.03 * expected.abs().max()
            margin = expected.topk(2).values
            assert logits.argmax() == expected.argmax() or margin[0] - margin[1] < 2 * error  # a tie but for rounding
            texts.texts[i].append(ids[i][len(text)])


def greedy(model: GPT, prompt: list[int], count: int) -> list[int]:
    """The likeliest continuation, by whole forward passes."""
    text = list(prompt)
    for _ in range(count):
        text.append(int(uncached(model, text, len(prompt)).argmax()))
    return text[len(prompt) :]


@pytest.mark.parametrize("prompt_length", [1, 5, 12, 30])
def test_temperature_zero_generates_the_likeliest(prompt_length):
    model = random_model(SMALL)
    prompt = random_ids(SMALL, 1, prompt_length)[0].tolist()
    expected = greedy(model, prompt, 30)
    assert len(set(expected)) > 3
    assert write(batch(model, [prompt]), [30]) == [expected]
    assert list(model.generate(prompt, 30, temperature=0)) == expected
    assert list(model.generate(prompt, 30, top_k=1)) == expected
    end = expected[6]
    assert list(model.generate(prompt, 30, temperature=0, end_of_text=end)) == expected[: expected.index(end)]


def test_the_models_own_method_draws_by_temperature_and_top_k():
    model = random_model(SMALL)
    logits = model(torch.tensor([[3]]))[0][0, -1]
    generator = torch.Generator().manual_seed(0)
    draws = [next(model.generate([3], 1, temperature=2.0, top_k=4, generator=generator)) for _ in range(2000)]
    likeliest = logits.topk(4)
    expected = 2000 * (likeliest.values / 2).softmax(-1)
    counts = torch.tensor([draws.count(int(i)) for i in likeliest.indices])
    assert counts.sum() == 2000
    assert ((counts - expected) ** 2 / expected).sum() < 16.3  # exceeded once in 1,000 with 3 degrees of freedom


def test_a_seed_names_a_text():
    model = random_model(SMALL, std=0.02)

    def texts(seed: int) -> list[list[int]]:
        drawn = model.generate([1], 20, generator=torch.Generator().manual_seed(seed))
        return [list(drawn), *write(batch(model, [[1]], sampling=Sampling(), seeds=[seed]), [20])]

    assert texts(1) == texts(1) != texts(2)
    assert list(map(len, texts(1))) == [20, 20]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=on_x86)])
def test_a_text_is_the_same_alone_and_among_64_of_other_lengths_and_ends(dtype):
    model = random_model(SMALL, std=0.05)
    prompts = [random_ids(SMALL, 64, 20)[i, : 1 + i % 17].tolist() for i in range(64)]
    lengths = [5 + i * 7 % 31 for i in range(64)]
    sampling = Sampling(top_k=40)
    together = write(batch(model, prompts, 40, sampling, dtype=dtype), lengths)
    for i in range(0, 64, 5):
        alone = write(batch(model, [prompts[i]], 40, sampling, [i], dtype), [lengths[i]])
        assert alone == [together[i]]
    assert len({tuple(text[:5]) for text in together}) > 32


@pytest.mark.parametrize("value", [float("nan"), 1e38, -1e38])
def test_a_model_that_overflows_still_generates_ids(value):
    """A sample at an evaluation must not end the run."""
    model = random_model(SMALL)
    with torch.no_grad():
        model.transformer.ln_f.weight.fill_(value)
    for how in dict(), dict(top_k=3), dict(temperature=0):
        ids = list(model.generate([1], 20, **how))
        assert len(ids) == 20 and max(ids) < SMALL.vocab_size


def test_padded_ids_are_never_generated():
    model = random_model(GPTConfig(block_size=8, vocab_size=3, n_layer=1, n_head=1, n_embd=8))
    with torch.no_grad():
        # where the real logits are lowest, the zeros of the padding would win
        model.transformer.ln_f.weight.zero_()
        model.transformer.ln_f.bias.fill_(1)
        model.transformer.wte.weight[:3] = -5
    assert set(model.generate([0], 60, generator=torch.Generator().manual_seed(0))) == {0, 1, 2}
    assert {*write(batch(model, [[0]], 60, Sampling()), [60])[0]} == {0, 1, 2}


def reference(logits: np.ndarray, s: Sampling) -> np.ndarray:
    """The distribution that is drawn from, id by id."""
    p = np.exp((logits - logits.max()) / s.temperature)
    order = np.argsort(-p)[: s.top_k or None]
    p = {i: p[i] / p[order].sum() for i in order}
    kept, reached = {}, 0.0
    for i in order:
        if s.top_p == 1 or reached < s.top_p or not kept:
            kept[i] = p[i]
        reached += p[i]
    kept = {i: value for i, value in kept.items() if value >= s.min_p * max(kept.values())}
    return np.array([kept.get(i, 0) / sum(kept.values()) for i in range(len(logits))])


def test_candidates_equal_plain_reference_code():
    logits = np.random.default_rng(0).normal(0, 2, (2, 100))
    for values in itertools.product([0.5, 1.0, 2.0], [0, 1, 7, 500], [0.0, 0.5, 0.9, 1.0], [0.0, 0.3, 1.0]):
        p, ids = filtered(torch.from_numpy(logits).float(), Sampling(*values))
        ids = torch.arange(100).expand(2, 100) if ids is None else ids
        got = torch.zeros(2, 100).scatter(1, ids, p / p.sum(1, keepdim=True))
        expected = np.stack([reference(row, Sampling(*values)) for row in logits])
        assert np.allclose(got.numpy(), expected, atol=1e-6), values


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=0.7),
        Sampling(temperature=1.6),
        Sampling(top_k=5),
        Sampling(top_p=0.8),
        Sampling(min_p=0.4),
        Sampling(0.9, 6, 0.9, 0.2),
    ],
    ids=str,
)
def test_draws_follow_the_settings(sampling):
    logits = torch.tensor([[1.0, 0.5, 0.0, -0.5, 0.2, 0.8, -1.0, -2.0]])
    generator, draws = torch.Generator().manual_seed(0), 8000
    counts = np.zeros(8)
    for _ in range(draws):
        uniform = torch.rand(1, generator=generator, dtype=torch.float64)
        counts[draw(logits, sampling, uniform)] += 1
    expected = draws * reference(logits[0].numpy().astype(float), sampling)
    possible = expected > 0
    assert counts[~possible].sum() == 0
    chi_squared = ((counts - expected)[possible] ** 2 / expected[possible]).sum()
    assert chi_squared < 24.3  # exceeded once in 1,000 with 7 degrees of freedom, more rarely with fewer


@pytest.mark.parametrize("values", [[0.0, float("inf"), 1.0], [0.0, 9.0, float("nan")], [-3e38, 3e38, float("-inf")]])
def test_overflown_logits_draw_the_likeliest_id_and_no_error(values):
    for sampling in (Sampling(), Sampling(0.01, 2, 0.9), Sampling(0.0)):
        uniform = torch.tensor([0.999], dtype=torch.float64)
        assert draw(torch.tensor([values]), sampling, uniform) == 1
