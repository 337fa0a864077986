"""Bulk encoding: the ids of `Tokenizer.encode`, as arrays, at some 100 MB/s a core.

GPT-2's tokenizer and our own BPE go through gigatoken (about 20 times tiktoken's speed on one core), bytes and
characters through a table. Everything else, and a machine that gigatoken has no wheel for, uses the tokenizer itself.
"""

import contextlib
import functools
import json
import re
import secrets
import threading
from pathlib import Path

import numpy as np

from plaingpt.text.streams import SAFE_BORDER
from plaingpt.tokenizer import END_OF_TEXT, Tokenizer, byte_symbols, gpt2, make_tokenizer

# gigatoken 0.10 knows the letters of Unicode 17, tiktoken and tokenizers those of Unicode 16. Text around a letter or
# digit that came after Unicode 14, or a neighbour of one, goes to the slow encoder. Emoji are not letters.
YOUNG = re.compile(
    "[\u088f\u0c5c\u0cdc\u1c89\u1c8a\ua7cb-\ua7f1\U00010000-\U0001cfff\U0001d2c0-\U0001d2d3\U0001df00-\U0001efff"
    "\U0002b739-\U0002b73f\U0002cea2-\U0002cead\U0002ebf0-\U0003ffff]"
)
YOUNG_LEADS = [b"\xe0\xa2\x8f", b"\xe0\xb1\x9c", b"\xe0\xb3\x9c", b"\xe1\xb2", b"\xea\x9f"]  # of those below U+10000
FIRST_BYTES = (0xE0, 0xE1, 0xEA, 0xF0)
ASCII = bytes(range(128))
# gigatoken caches every word it has seen. When the process is larger than MEMORY plus MEMORY_EACH a thread, an encoder
# that has encoded REMEMBERED bytes since its start is replaced by a new one, which costs a quarter of a second.
MEMORY, MEMORY_EACH, REMEMBERED = 400_000_000, 150_000_000, 1 << 26


class BulkEncoder:
    """Encodes batches of documents, in any thread; every one of them is ordinary text."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer, self._end_of_text = tokenizer, tokenizer.end_of_text
        self._table = self._json = None
        # Stands before each document in the one text that gigatoken gets, whose tokenizer has it as end of text. It is
        # random, so no document contains it.
        self._border = secrets.token_hex(8).encode()
        written = tokenizer.to_json()
        description = json.loads(written)
        model = description["model"]
        form = of_our_form(description) and model["type"]
        by_words = form == "BPE" and bool(model["merges"])
        self._foreign, self._bytes = not form, form == "BPE" and not by_words
        if by_words:
            with contextlib.suppress(ImportError):  # no wheel for this machine
                import gigatoken

                self._gigatoken = gigatoken
                self._json = written.replace(f'"{END_OF_TEXT}"', f'"{self._border.decode()}"')
        elif form == "WordLevel":
            characters = {ord(c): i for c, i in model["vocab"].items() if len(c) == 1}
            self._table = np.full(0x110000, -1, np.int32)
            self._table[list(characters)] = list(characters.values())
        self._of_thread = threading.local()  # a shared encoder serves one thread at a time
        self._threads = set()

    def encode(self, documents: list[bytes]) -> np.ndarray:
        """Ids of documents in valid UTF-8, one after another, end of text before each."""
        if self._json and not any(map(_young, documents)):
            return self._encode_fast(documents)
        if self._bytes:
            encoded = [np.frombuffer(document, np.uint8) for document in documents]
        elif self._table is not None:
            encoded = [self._look_up(document.decode()) for document in documents]
        else:
            encoded = self._encode_slowly(documents)
        end_of_text = np.array([self._end_of_text], np.uint32)
        return np.concatenate([part for document in encoded for part in (end_of_text, document)])

    def _look_up(self, text: str) -> np.ndarray:
        ids = self._table[np.frombuffer(text.encode("utf-32-le"), np.uint32)]
        if len(ids) and ids.min() < 0:
            self._tokenizer.encode(text)  # says which characters are not known
        return ids

    def _encode_slowly(self, documents: list[bytes]) -> list[np.ndarray]:
        """Ids of each document; with gigatoken, only the text around a letter that it does not know is slow."""

        def fast(text: bytes) -> bool:
            return self._json is not None and not _young(text)

        parts_of = [[d] if self._foreign or fast(d) else _safe_parts(d) for d in documents]
        parts = dict.fromkeys(part for parts in parts_of for part in parts)
        slow = [part for part in parts if not fast(part)]
        for part, ids in zip(slow, self._tokenizer.encode_documents([part.decode() for part in slow])):
            parts[part] = np.array(ids, np.uint32)
        others = [part for part, ids in parts.items() if ids is None]
        ids = self._encode_fast(others) if others else np.empty(0, np.uint32)
        borders = np.flatnonzero(ids == self._end_of_text)
        parts |= zip(others, (part[1:] for part in np.split(ids, borders)[1:]))
        return [np.concatenate([parts[part] for part in of_one]) for of_one in parts_of]

    def _encode_fast(self, documents: list[bytes]) -> np.ndarray:
        joined = self._border.join([b"", *documents])
        mine = self._of_thread
        if not hasattr(mine, "encoder"):
            mine.encoder, mine.encoded_bytes = self._gigatoken.Tokenizer.from_json(self._json), 0
            self._threads.add(threading.get_ident())
        # one row without padding is the only result that needs no slow import of another library
        source = self._gigatoken.BytesSource([joined])
        [ids], _ = mine.encoder.encode_batch_padded(source, pad_id=0, parallel=False)
        mine.encoded_bytes += len(joined)
        allowed = MEMORY + MEMORY_EACH * len(self._threads)
        if mine.encoded_bytes > REMEMBERED and _resident_bytes(otherwise=mine.encoded_bytes) > allowed:
            del mine.encoder
        return ids


def of_our_form(description: dict) -> bool:
    """Whether a tokenizer.json encodes as one that plaingpt/tokenizer.py makes; a model may come with another.

    Everything that encoding depends on is compared, not only what is known to differ somewhere.
    """
    if _form(description) not in _our_forms():
        return False
    model, symbols = description["model"], byte_symbols()
    vocab = model["vocab"]
    ids = {*vocab.values(), *(token["id"] for token in description["added_tokens"])}
    if sorted(ids) != list(range(len(ids))):
        return False
    if model["type"] == "WordLevel":
        return all(len(token) == 1 or token == END_OF_TEXT for token in vocab)
    if not model["merges"]:
        return all(vocab.get(symbol) == byte for byte, symbol in symbols.items())
    ranked = [token for token in sorted(vocab, key=vocab.get) if token != END_OF_TEXT]
    merged = list(dict.fromkeys(map("".join, model["merges"])))
    by_words = description["pre_tokenizer"]["use_regex"]
    return by_words and set(ranked[:256]) == set(symbols.values()) and ranked[256:] == merged


def _form(description: dict) -> tuple:
    """What of a tokenizer.json decides how text is encoded, except the vocabulary."""
    model = {key: value for key, value in description["model"].items() if key not in ("vocab", "merges")}
    special = [
        {key: value for key, value in token.items() if key not in ("id", "normalized")}
        for token in description["added_tokens"]
    ]
    return description["normalizer"], description["pre_tokenizer"], model, special


@functools.cache
def _our_forms() -> list[tuple]:
    kinds = [make_tokenizer("byte", [], 0), make_tokenizer("char", ["a"], 0), gpt2()]
    return [_form(json.loads(tokenizer.to_json())) for tokenizer in kinds]


def _safe_parts(document: bytes, size: int = 1 << 12) -> list[bytes]:
    """The document cut at safe borders, which changes no token, about every `size` characters."""
    text, start, parts = document.decode(), 0, []
    while border := SAFE_BORDER.search(text, start + size):
        parts.append(text[start : border.start()].encode())
        start = border.start()
    return [*parts, text[start:].encode()]


def _young(document: bytes) -> bool:
    if document.isascii() or not any(first in document for first in FIRST_BYTES):  # the fastest of searches
        return False
    rest = document.translate(None, delete=ASCII)
    # F0 9F begins an emoji
    possible = rest.count(b"\xf0") > rest.count(b"\xf0\x9f") or any(lead in rest for lead in YOUNG_LEADS)
    return possible and YOUNG.search(rest.decode()) is not None


def _resident_bytes(otherwise: int) -> int:
    """Memory of this process, or `otherwise` where the system has no /proc."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    except OSError:
        return otherwise
