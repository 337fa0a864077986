"""Training of a BPE: long words are cut, which changes nothing else, and Ctrl-C is heard."""

import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest
from conftest import child_environment
from hypothesis import given
from hypothesis import strategies as st
from test_tokenizer import ANY_TEXT, TEXTS

from plaingpt.text import bpe
from plaingpt.tokenizer import make_tokenizer


@given(
    st.lists(
        ANY_TEXT | st.sampled_from([*TEXTS.values(), "a" * 300, " " * 700, "-" * 256, "1" * 257, "字" * 900, "_" * 256])
    )
)
def test_only_long_runs_of_one_kind_are_cut_and_nothing_is_lost(parts):
    document = "".join(parts)
    found = list(bpe._without_long_words(document))
    assert "".join(found) == document
    assert len(found) == 1 or bpe.LONG_WORD.search(document)
    for part in found[:-1]:
        assert bpe.LONG_WORD.search(part[-256:])
    too_long = re.compile(bpe.LONG_WORD.pattern.replace("256", "257").removesuffix(r"|\s{257}"))
    assert not any(map(too_long.search, found))


def test_text_without_long_words_is_learned_as_without_the_limit(monkeypatch):
    texts = [*TEXTS.values(), *("word " * 500, "a-b=c;d" * 300, "x1y2" * 400, "\n    " * 90)]
    texts = [text for text in texts if not bpe.LONG_WORD.search(text)]
    learned = make_tokenizer("bpe", texts, 600).to_json()
    monkeypatch.setattr(bpe, "_without_long_words", lambda document: [document])
    assert make_tokenizer("bpe", texts, 600).to_json() == learned


@pytest.mark.parametrize("installed", [True, False])
def test_text_without_spaces_is_learned_word_by_word(monkeypatch, installed):
    """Of one word of 200,000 characters, `tokenizers` would learn for minutes."""
    if not installed:
        monkeypatch.setitem(sys.modules, "gigatoken", None)
    rng = random.Random(0)
    chinese = "".join(rng.choices([chr(c) for c in range(0x4E00, 0x5000)], k=200_000))
    assert max(map(len, bpe._without_long_words(chinese))) == 256
    tokenizer = make_tokenizer("bpe", [chinese, "ACGT" * 50_000], 700)
    assert tokenizer.vocab_size == 700 and tokenizer.decode(tokenizer.encode(chinese[:999])) == chinese[:999]


@pytest.mark.skipif(os.name == "nt", reason="no SIGINT between processes")
def test_ctrl_c_ends_the_learning(tmp_path):
    code = (
        "import sys, prepare_data; from plaingpt.text import bpe; "
        "bpe._without_long_words = lambda d: print('here', flush=True) or [d]; "
        "sys.argv = ['p', 'a.txt', '--tokenizer=bpe']; prepare_data.main()"
    )
    (tmp_path / "a.txt").write_text("".join(random.Random(0).choices("ACGT", k=3_000_000)))
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=tmp_path, env=child_environment()
    )
    assert process.stdout.readline() == b"here\n"
    time.sleep(1)  # into the library
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == -signal.SIGINT
