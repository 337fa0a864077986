"""Tokenizers: every kind gives back the text it was given, and GPT-2's ids are GPT-2's."""

import json
import os
import random
import signal
import subprocess
import sys

import pytest
import tokenizers
from conftest import child_environment, edit_json
from hypothesis import given, settings
from hypothesis import strategies as st
from test_checkpoint import save_vocab_and_merges
from tokenizers import models

from plaingpt.console import UserError
from plaingpt.tokenizer import KINDS, TextStream, Tokenizer, gpt2, make_tokenizer, resolve_tokenizer

TEXTS = {
    "english": "It's the King's; they'll say 'twas 1599, won't they?  Two  spaces.\n\n\tA tab.\r\n",
    "scripts": "Größe, naïve, Ελλάδα, Київ, עברית, العربية, हिन्दी, ไทย, 中文字, ひらがな, 한국어, አማርኛ, ᏣᎳᎩ",
    "combining": "e\u0301 a\u030a\u0323 \u1100\u1161\u11a8 \u0e01\u0e33 \u202eright to left\u202c",
    "emoji": "👩‍👩‍👧‍👦🏳️‍🌈👍🏽🇺🇳 💃🕺",
    "code": "def f(x):\n    return {'a': [x**2 for _ in range(10)]}  # ok\n\n\nif __name__ == '__main__':\n\tf(1)\n",
    "end_of_text": "before<|endoftext|>after <|endoftext|><|endoftext|>",
    "spaces": " " * 300 + "\n" * 300 + "\u00a0\u2003\u3000\u2028\x0b\x0c\x85 \x1c",
    "repetition": "a" * 2000 + "ab" * 1000 + "!?" * 500 + "9" * 500 + "é" * 300 + "字" * 300,
    "controls": "".join(map(chr, range(32))) + "\x7f\ufeff",
    "limits": "\ud7ff\ue000\uffff\U00010000\U0010ffff",
    "one": "x",
    "empty": "",
}
ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)  # Cs: surrogates, no text has them


@pytest.fixture(scope="module")
def made() -> dict[str, Tokenizer]:
    return {kind: make_tokenizer(kind, list(TEXTS.values()), vocab_size=400) for kind in KINDS}


@pytest.fixture(params=KINDS)
def tokenizer(request, made) -> Tokenizer:
    return made[request.param]


def test_documents_have_the_ids_that_each_text_has_alone(tokenizer):
    assert tokenizer.encode_documents(list(TEXTS.values())) == [tokenizer.encode(text) for text in TEXTS.values()]


def streamed(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    stream = TextStream(tokenizer)
    return [*map(stream.add, ids), stream.rest()]


def test_a_streams_pieces_are_whole_characters_and_join_to_the_text(tokenizer):
    for name, text in TEXTS.items():
        ids = tokenizer.encode(text)
        assert all(0 <= i < tokenizer.vocab_size for i in ids), name
        pieces = streamed(tokenizer, ids)
        assert "".join(pieces) == text == tokenizer.decode(ids), name
        assert not any("\ufffd" in piece for piece in pieces), name


def test_a_stream_gives_each_character_as_soon_as_it_is_whole(made):
    assert streamed(made["byte"], made["byte"].encode("aé字b")) == ["a", "", "é", "", "", "字", "b", ""]


def test_a_stream_of_ids_that_are_no_text_does_not_fail(made):
    ids = made["byte"].encode("é")[1:] * 3 + made["byte"].encode("and on")
    assert "".join(streamed(made["byte"], ids)) == "\ufffd\ufffd\ufffdand on"


# end of text


def test_end_of_text_is_the_last_id(tokenizer):
    assert tokenizer.end_of_text == tokenizer.vocab_size - 1
    assert tokenizer.decode([tokenizer.end_of_text]) == "<|endoftext|>"


@pytest.mark.parametrize("token", ["</s>", {"content": "</s>", "lstrip": False}, None, "a", ["</s>"]])
def test_a_model_may_name_another_token_that_ends_a_text(tmp_path, token):
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 1, "</s>": 2}))
    backend.add_special_tokens(["</s>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": token}))
    loaded = Tokenizer.load(tmp_path)
    assert loaded.end_of_text == (2 if token in ("</s>", {"content": "</s>", "lstrip": False}) else None)
    if loaded.end_of_text:
        loaded.save(tmp_path)  # as in a checkpoint of a finetuned model
        assert Tokenizer.load(tmp_path).end_of_text == 2
    backend.add_special_tokens(["<|endoftext|>"])  # as in models for chats, which keep it and end with another
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": token}))
    assert Tokenizer.load(tmp_path).end_of_text == (loaded.end_of_text or 3)


def test_special_makes_end_of_text_its_id_for_that_call_only(tokenizer):
    text, a, b = "a<|endoftext|>b", tokenizer.encode("a"), tokenizer.encode("b")
    assert tokenizer.encode(text, special=True) == [*a, tokenizer.end_of_text, *b]
    assert tokenizer.end_of_text not in tokenizer.encode_documents([text])[0]
    assert tokenizer.encode(text, special=True) == [*a, tokenizer.end_of_text, *b]
    assert tokenizer.end_of_text not in tokenizer.encode(text)


# vocabularies


def test_char_ids_are_the_sorted_characters():
    tokenizer = make_tokenizer("char", ["hello", "world\n"], vocab_size=1)
    assert tokenizer.encode("\ndehlorw") == list(range(8))
    assert tokenizer.vocab_size == 9  # and end of text


def test_char_refuses_a_character_it_does_not_know_by_name():
    tokenizer = make_tokenizer("char", ["abc"], vocab_size=1)
    with pytest.raises(UserError, match="does not know 'xz'"):
        tokenizer.encode("azbxz")


def test_bpe_of_little_text_is_smaller_and_still_knows_every_byte():
    tokenizer = make_tokenizer("bpe", ["abab"], vocab_size=5000)
    assert 257 < tokenizer.vocab_size < 270
    assert tokenizer.decode(tokenizer.encode(TEXTS["scripts"])) == TEXTS["scripts"]


def test_bpe_learns_what_is_frequent():
    tokenizer = make_tokenizer("bpe", ["the cat and the dog and the hen"] * 20, vocab_size=280)
    assert len(tokenizer.encode(" the")) == 1 < len(tokenizer.encode(" xqz"))


def test_bpe_of_text_without_spaces_takes_seconds():
    """Of one word of 200,000 characters, `tokenizers` would learn for minutes."""
    rng = random.Random(0)
    chinese = "".join(rng.choices([chr(c) for c in range(0x4E00, 0x5000)], k=200_000))
    tokenizer = make_tokenizer("bpe", [chinese, "ACGT" * 50_000], 700)
    assert tokenizer.vocab_size == 700 and tokenizer.decode(tokenizer.encode(chinese[:999])) == chinese[:999]


@pytest.mark.skipif(os.name == "nt", reason="no SIGINT between processes")
def test_ctrl_c_ends_the_training_of_a_bpe(tmp_path):
    """Without returning to Python, which would take seconds."""
    code = (
        "import signal, sys, prepare_data\n"
        "set_handler = signal.signal\n"
        "def seen(number, handler):\n"
        "    before = set_handler(number, handler)\n"
        "    if handler == signal.SIG_DFL: print('training', flush=True)\n"
        "    return before\n"
        "signal.signal = seen\n"
        "sys.argv = ['p', 'a.txt', '--tokenizer=bpe']\n"
        "try:\n    prepare_data.main()\n"
        "except KeyboardInterrupt:\n    print('Python again')"
    )
    (tmp_path / "a.txt").write_text("".join(random.Random(0).choices("ACGT", k=3_000_000)))
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=tmp_path, env=child_environment()
    )
    assert process.stdout.readline() == b"training\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=600)[0] == b"" and process.returncode == -signal.SIGINT


def test_bpe_can_be_as_small_as_bytes_and_end_of_text():
    smallest = make_tokenizer("bpe", ["abab"], vocab_size=257)
    assert smallest.vocab_size == 257 and len(smallest.encode("abab")) == 4


# gpt2's ids


def one_at_a_time(text: str) -> list[int]:
    return gpt2().encode(text)


def in_bulk(text: str) -> list[int]:
    return gpt2().encode_documents([text])[0]  # tiktoken


@pytest.mark.parametrize("encode", [one_at_a_time, in_bulk])
@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("Hello, world!", [15496, 11, 995, 0]),
        (" the the", [262, 262]),
        ("\n\n", [628]),
        ("a\n\nb", [64, 198, 198, 65]),  # the last blank goes with what follows
        ("  two", [220, 734]),
        ("I'll", [40, 1183]),
        ("<|endoftext|>", [27, 91, 437, 1659, 5239, 91, 29]),
    ],
)
def test_gpt2_ids_are_the_published_ones(encode, text, ids):
    assert encode(text) == ids


def test_gpt2_end_of_text_is_50256():
    assert gpt2().end_of_text == 50256
    assert gpt2().encode("<|endoftext|>", special=True) == [50256]


@settings(max_examples=60)
@given(ANY_TEXT)
def test_gpt2_ids_of_any_text_are_tiktokens(text):
    assert one_at_a_time(text) == in_bulk(text)
    assert gpt2().decode(in_bulk(text)) == text


@settings(max_examples=40)
@given(text=ANY_TEXT)
def test_bytes_of_any_text_give_it_back(made, text):
    ids = made["byte"].encode(text)
    assert ids == list(text.encode()) and made["byte"].decode(ids) == text


# on disk


def test_a_saved_tokenizer_loads_the_same(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert (loaded.vocab_size, loaded.end_of_text) == (tokenizer.vocab_size, tokenizer.end_of_text)
    assert loaded.same_as(tokenizer)
    for text in TEXTS.values():
        assert loaded.encode(text) == tokenizer.encode(text)
        assert loaded.decode(tokenizer.encode(text)) == text
    assert loaded.encode_documents([TEXTS["end_of_text"]]) == [tokenizer.encode(TEXTS["end_of_text"])]


def test_a_tokenizer_that_was_saved_to_cut_texts_and_fill_them_up_does_neither(made, tmp_path):
    made["bpe"].save(tmp_path)
    other = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    other.enable_truncation(3)
    other.enable_padding(length=5)
    other.save(str(tmp_path / "tokenizer.json"))
    loaded = Tokenizer.load(tmp_path)
    texts = ["a", "a text of more than three tokens"]
    assert [loaded.encode(text) for text in texts] == [made["bpe"].encode(text) for text in texts]
    assert loaded.encode_documents(texts) == made["bpe"].encode_documents(texts)


def test_the_configuration_beside_it_names_end_of_text(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert config["eos_token"] == config["bos_token"] == config["unk_token"] == "<|endoftext|>"
    assert "token_type_ids" not in config["model_input_names"]  # transformers' GPT-2 would add their embeddings


def test_a_tokenizer_that_splits_text_otherwise_is_not_gpt2s(made, tmp_path):
    made["gpt2"].save(tmp_path)
    assert resolve_tokenizer(str(tmp_path)) == ("gpt2", None)
    description = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(description | {"normalizer": {"type": "Lowercase"}}))
    kind, tokenizer = resolve_tokenizer(str(tmp_path))
    assert kind != "gpt2" and tokenizer.encode("A") == tokenizer.encode("a")


def test_tokenizers_of_other_text_are_not_the_same(made):
    others = [make_tokenizer("char", ["abc"], 1), make_tokenizer("char", ["abd"], 1), *made.values()]
    assert [[a.same_as(b) for b in others] for a in others] == [[a is b for b in others] for a in others]


def test_a_missing_tokenizer_file_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match=r"has no tokenizer\.json"):
        Tokenizer.load(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "{}", "not json", '{"model": {"type": "BPE"}}'])
def test_a_damaged_tokenizer_file_is_a_user_error_with_its_name(tmp_path, text):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(UserError, match=r"tokenizer\.json is damaged: "):
        Tokenizer.load(tmp_path)


def test_a_stream_that_ends_inside_a_character_gives_what_it_has():
    tokenizer = make_tokenizer("byte", [], 0)
    assert "".join(streamed(tokenizer, [*b"a", 0xE3, 0x83])) == tokenizer.decode([*b"a", 0xE3, 0x83])


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
        {"normalizer": {"type": "Replace", "pattern": {"Regex": "("}, "content": ""}},
        {
            "model": {
                "type": "BPE",
                "vocab": {"a": 0, "b": 1},
                "merges": [["a", "b"]],
                "continuing_subword_prefix": "##",
            }
        },
    ],
)
def test_a_file_that_makes_the_library_panic_is_a_user_error(made, tmp_path, changes):
    """Panics of Rust are BaseExceptions."""
    made["byte"].save(tmp_path)
    edit_json(tmp_path / "tokenizer.json", **changes)
    with pytest.raises(UserError, match=r"tokenizer\.json is damaged: ") as caught:
        Tokenizer.load(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_that_panics_later_is_a_user_error(made, tmp_path):
    made["byte"].save(tmp_path)
    edit_json(tmp_path / "tokenizer.json", decoder={"type": "Strip", "content": "a", "start": 5, "stop": 5})
    tokenizer = Tokenizer.load(tmp_path)
    with pytest.raises(UserError, match="the tokenizer cannot decode these ids"):
        tokenizer.decode([97])
    with pytest.raises(UserError, match="the tokenizer cannot decode these ids"):
        streamed(tokenizer, [97, 98])
    model = {"type": "WordPiece", "unk_token": "?", "continuing_subword_prefix": "", "max_input_chars_per_word": 9}
    edit_json(tmp_path / "tokenizer.json", model=model | {"vocab": {"a": 0}})
    tokenizer = Tokenizer.load(tmp_path)
    with pytest.raises(UserError, match="the tokenizer cannot encode this text: "):
        tokenizer.encode("xy")
    with pytest.raises(UserError, match="the tokenizer cannot encode a document: "):
        tokenizer.encode_documents(["xy"])


@pytest.mark.parametrize("prefix", [True, False])
def test_vocab_and_merges_are_read_where_there_is_no_tokenizer_file(made, tmp_path, prefix):
    save_vocab_and_merges(tmp_path, made["bpe"])
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_prefix_space": prefix}))
    loaded = Tokenizer.load(tmp_path)
    for text in filter(None, TEXTS.values()):
        spaced = " " * (prefix and not text[0].isspace()) + text
        assert loaded.encode(text) == made["bpe"].encode(spaced)
    assert loaded.end_of_text is None and loaded.vocab_size == made["bpe"].vocab_size - 1


def test_two_tokens_with_one_id_are_refused(tmp_path):
    tokenizer = make_tokenizer("char", ["abc"], 1)
    tokenizer.save(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["model"]["vocab"]["c"] = content["model"]["vocab"]["b"]
    edit_json(tmp_path / "tokenizer.json", model=content["model"])
    with pytest.raises(UserError, match=r"tokenizer\.json is damaged: two tokens have the same id"):
        Tokenizer.load(tmp_path)


def test_the_vocabulary_ends_after_the_largest_id(tmp_path):
    """With gaps there are fewer ids than that."""
    tokenizer = make_tokenizer("char", ["abc"], 1)
    tokenizer.save(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    content["model"]["vocab"]["c"] = 70_000
    edit_json(tmp_path / "tokenizer.json", model=content["model"])
    loaded = Tokenizer.load(tmp_path)
    assert loaded.vocab_size == 70_001 and loaded.encode("c") == [70_000]
    assert loaded.byte_lengths()[[0, 1, 2, 70_000]].tolist() == [1, 1, 0, 1]
