"""Encoding in bulk: the ids are tiktoken's, whatever the text; where gigatoken is not installed too."""

import functools
import json
import random
import sys
import unicodedata

import numpy as np
import pytest
import tokenizers
from conftest import run_main
from hypothesis import given, settings
from hypothesis import strategies as st
from test_tokenizer import ANY_TEXT, TEXTS

from plaingpt.text.bulk import BulkEncoder
from plaingpt.tokenizer import END_OF_TEXT, KINDS, Tokenizer, as_ours, gpt2, make_tokenizer
from plaingpt.tokens import open_data_set

WORDS = [*"a 1!é字²ǅ👍\n\t\u00a0", "tree", "  ", "23", "'s", "'S", "<|endoftext|>"]


def encoded(encoder: BulkEncoder, texts: list[str]) -> list[list[int]]:
    ids = encoder.encode([text.encode() for text in texts])
    parts = np.split(ids, np.flatnonzero(ids == encoder._end_of_text))[1:]
    assert len(parts) == len(texts) and sum(map(len, parts)) == len(ids)
    return [part[1:].tolist() for part in parts]


@pytest.fixture(scope="module")
def fast() -> BulkEncoder:
    encoder = BulkEncoder(gpt2())
    assert encoder._gigatoken, "gigatoken is in requirements.txt"
    return encoder


@pytest.fixture(scope="module")
def oracle():
    """tiktoken's encode_ordinary_batch."""
    return gpt2().encode_documents


def test_every_character_of_unicode_in_its_neighbourhood_has_tiktokens_ids(fast, oracle):
    """Every character beside letters, digits, spaces and itself; of the long rows a sample.

    Of those that this Python takes for unassigned some are letters that gigatoken or tiktoken does not know.
    """
    rng = random.Random(0)
    shares = {"Cs": 0, "Co": 0.002, "Lo": 0.1}  # no character alone; private use; syllables and ideographs
    unassigned = [1, 0.02, 0.02, 0.02, *[0.0005] * 13]  # by plane
    chars = []
    for c in map(chr, range(0x110000)):
        kind = unicodedata.category(c)
        if rng.random() < (unassigned[ord(c) >> 16] if kind == "Cn" else shares.get(kind, 1)):
            chars.append(c)
    texts = [f"a{c}b {c}{c} 1{c}2{c} .{c}'{c}\n{c}'s {c}!'ll" for c in chars]
    assert len(texts) > 20_000
    for text, ours, theirs in zip(texts, encoded(fast, texts), oracle(texts), strict=True):
        assert ours == theirs, ascii(text)


@pytest.mark.parametrize("unit", ["a", "ab ", " ", "\n", " \n", "é", "字", "👍", "1", "'s", "<|endoftext|>", "\u0301"])
def test_repetitions_without_end_have_tiktokens_ids(fast, oracle, unit):
    texts = [unit * n for n in (1, 2, 3, 100, 20_000)]
    assert encoded(fast, texts) == oracle(texts)


def test_a_million_spaces_are_no_problem(fast, oracle):
    """With its earlier pattern, tiktoken ended in a panic."""
    assert encoded(fast, [" " * 1_100_000]) == oracle([" " * 1_100_000])


def test_documents_with_and_without_recent_letters_have_tiktokens_ids(fast, oracle):
    rng = random.Random(0)
    texts = ["".join(rng.choices([*WORDS, "\U0001e900's", "\u0c5c's", " tree", "\nx"], k=30_000)) for _ in range(3)]
    texts += ["between", "a " * 20_000 + "\U0001e900's" + " b" * 20_000, "\U0001e900" * 10_000]
    assert encoded(fast, texts) == oracle(texts)


@settings(max_examples=150)
@given(st.lists(st.one_of(ANY_TEXT, st.lists(st.sampled_from(WORDS), max_size=30).map("".join)), max_size=5))
def test_any_documents_have_tiktokens_ids(fast, oracle, texts):
    if texts:
        assert encoded(fast, texts) == oracle(texts)


def test_ids_do_not_change_when_the_memory_of_words_is_given_up(fast, oracle, monkeypatch):
    assert encoded(fast, ["some words"]) == oracle(["some words"])
    assert hasattr(fast._of_thread, "encoder")
    del fast._of_thread.encoder
    monkeypatch.setattr("plaingpt.text.bulk.RENEWED", -1.0)
    assert encoded(fast, ["some words"]) == oracle(["some words"])
    assert not hasattr(fast._of_thread, "encoder")
    assert encoded(fast, ["some more words"]) == oracle(["some more words"])


@pytest.mark.parametrize("installed", [True, False])
@pytest.mark.parametrize(("kind", "vocab_size"), [*((kind, 400) for kind in KINDS), ("bpe", 257)])
def test_every_kind_of_tokenizer_encodes_in_bulk_as_one_by_one(monkeypatch, kind, vocab_size, installed):
    if not installed:
        monkeypatch.setitem(sys.modules, "gigatoken", None)
    texts = [text for text in TEXTS.values() if text]
    tokenizer = make_tokenizer(kind, texts, vocab_size)
    encoder = BulkEncoder(tokenizer)
    assert bool(encoder._gigatoken) == (installed and kind in ("gpt2", "bpe") and vocab_size > 257)
    assert encoded(encoder, texts) == [tokenizer.encode(text) for text in texts]


def of_another_form(form: str) -> tokenizers.Tokenizer:
    """A tokenizer as a stranger's model may have it."""
    texts = list(TEXTS.values())
    if form == "unigram":
        pieces = sorted({c for text in [*texts, "Tree 123"] for c in text})
        backend = tokenizers.Tokenizer(tokenizers.models.Unigram([("?", 0.0), *((c, -1.0) for c in pieces)], unk_id=0))
        backend.add_special_tokens([END_OF_TEXT])
        return backend
    backend = tokenizers.Tokenizer.from_str(make_tokenizer("bpe", texts, vocab_size=400).to_json())
    if form == "normalizer":
        backend.normalizer = tokenizers.normalizers.Lowercase()
    elif form == "merges across words":
        backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    elif form == "space before":
        backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=True)
    elif form == "digits apart":
        before = [tokenizers.pre_tokenizers.Digits(individual_digits=True), backend.pre_tokenizer]
        backend.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(before)
    elif form == "more special tokens":
        backend.add_special_tokens(["<|user|>"])
    elif form == "a token that is not special":
        backend.add_tokens(["tree"])
    description = json.loads(backend.to_str())
    model = description["model"]
    merged = [token for token in model["vocab"] if model["vocab"][token] >= 300]
    if form == "ids in another order":
        model["vocab"] |= {token: model["vocab"][other] for token, other in zip(merged, merged[::-1])}
    elif form == "gaps between ids":
        model["vocab"] |= {token: model["vocab"][token] + 65_536 for token in merged}
    elif form == "a token that no merge makes":
        model["vocab"] |= {"Tree": model["vocab"].pop(merged[-1])}
        model["merges"] = [pair for pair in model["merges"] if "".join(pair) != merged[-1]]
    elif form == "a suffix":
        model["end_of_word_suffix"] = "e"
    return tokenizers.Tokenizer.from_str(json.dumps(description))


FORMS = [
    "unigram", "normalizer", "merges across words", "space before", "digits apart", "more special tokens",
    "a token that is not special", "ids in another order", "gaps between ids",
    "a token that no merge makes", "a suffix",
]  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_a_tokenizer_of_another_form_has_its_own_ids_in_bulk(form):
    texts = [*TEXTS.values(), "Tree 123 TREE tree", f"a {END_OF_TEXT}<|user|> b"]
    backend = of_another_form(form)
    assert not as_ours(json.loads(backend.to_str()))
    encoder = BulkEncoder(Tokenizer(tokenizers.Tokenizer.from_str(backend.to_str())))
    backend.encode_special_tokens = True  # in a document everything is text
    assert encoded(encoder, texts) == [backend.encode(text, add_special_tokens=False).ids for text in texts]


@functools.cache
def written(kind: str) -> dict:
    """The tokenizer.json of a tokenizer."""
    return json.loads(make_tokenizer(kind, list(TEXTS.values()), 400).to_json())


@pytest.mark.parametrize("kind", ["byte", "bpe"])
def test_every_setting_of_a_model_is_looked_at(kind):
    description = written(kind)
    assert as_ours(description)
    changes = dict(dropout=0.5, fuse_unk=True, byte_fallback=True, ignore_merges=True)
    changes |= dict.fromkeys(("end_of_word_suffix", "continuing_subword_prefix", "unk_token"), "x")
    for key, value in changes.items():
        assert key in description["model"], key
        assert not as_ours(description | {"model": description["model"] | {key: value}}), key


@pytest.mark.parametrize("kind", ["char", "byte", "bpe"])
def test_every_part_of_a_tokenizer_is_looked_at(kind):
    description = written(kind)
    assert as_ours(description)
    special = description["added_tokens"][0]
    assert not as_ours(description | {"added_tokens": [special | {"lstrip": True}]})
    assert not as_ours(description | {"normalizer": {"type": "NFC"}})
    assert not as_ours(description | {"pre_tokenizer": None})


@pytest.mark.parametrize("kind", ["gpt2", "byte", "bpe"])
def test_a_tokenizer_that_transformers_has_written_is_ours(kind):
    """As OpenAI's on the hub: empty strings where ours have null."""
    description = written(kind)
    empty = {"continuing_subword_prefix": "", "end_of_word_suffix": ""}
    theirs = description | {"model": description["model"] | empty}
    assert as_ours(theirs) == description
    tokenizer = Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(theirs)))
    assert json.loads(tokenizer.to_json())["model"]["end_of_word_suffix"] == ""
    assert encoded(BulkEncoder(tokenizer), list(TEXTS.values())) == list(map(tokenizer.encode, TEXTS.values()))


def test_ids_above_65_535_are_written_as_uint32(tmp_path):
    description = json.loads(of_another_form("gaps between ids").to_str())
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "tokenizer.json").write_text(json.dumps(description))
    (tmp_path / "a.txt").write_text(TEXTS["code"] * 30)
    ended = run_main(
        "prepare_data", tmp_path / "a.txt", f"--tokenizer={tmp_path}/model", f"--data_dir={tmp_path}", "--name=set"
    )
    assert ended.status == 0, ended.err
    data = open_data_set(tmp_path / "set")
    ids = np.concatenate(list(data.train.all()))
    assert ids.dtype == np.uint32 and ids.max() > 65_535
    assert data.tokenizer.decode(ids.tolist()) == (TEXTS["code"] * 30)[: len(data.tokenizer.decode(ids.tolist()))]
