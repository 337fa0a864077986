"""Tokenizing by the gigabyte: the same ids as `Tokenizer.encode`, as arrays.

GPT-2's tokenizer and a BPE of ours go through gigatoken (about 20 times tiktoken's rate on a core), bytes
and characters through a table. Where gigatoken is not installed, `Tokenizer.encode_documents` does the work.
"""

import contextlib
import json
import re
import threading
from pathlib import Path

import numpy as np

from data.readers import SAFE_BORDER
from data.tokenizer import END_OF_TEXT, Tokenizer, byte_symbols

# gigatoken 0.10 knows the letters of Unicode 17, tiktoken and tokenizers those of Unicode 16. Documents that have
# a letter or digit that came after Unicode 14, or a neighbour of one, go to the slow encoder. Emoji are no letters.
YOUNG = re.compile(
    "[\u088f\u0c5c\u0cdc\u1c89\u1c8a\ua7cb-\ua7f1\U00010000-\U0001cfff\U0001d2c0-\U0001d2d3\U0001df00-\U0001efff"
    "\U0002b739-\U0002b73f\U0002cea2-\U0002cead\U0002ebf0-\U0003ffff]"
)
YOUNG_LEADS = [b"\xe0\xa2\x8f", b"\xe0\xb1\x9c", b"\xe0\xb3\x9c", b"\xe1\xb2", b"\xea\x9f"]  # of those below U+10000
ASCII = bytes(range(128))
# gigatoken remembers every word that it has seen. Where the process has become larger than MEMORY, an encoder starts
# anew, at a quarter of a second, if it has encoded REMEMBERED bytes since it last did.
MEMORY, REMEMBERED = 600_000_000, 1 << 26


class BulkEncoder:
    """Encodes batches of documents, in any thread; every one of them is ordinary text."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._table = self._json = None
        description = json.loads(tokenizer.to_json())
        model = description["model"]
        self._foreign = not of_our_form(description)
        if self._foreign:
            model = {"type": None}
        elif model["type"] == "WordLevel":
            characters = {ord(c): i for c, i in model["vocab"].items() if len(c) == 1}
            self._table = np.full(0x110000, -1, np.int32)
            self._table[list(characters)] = list(characters.values())
        elif model["type"] == "BPE" and description["pre_tokenizer"].get("use_regex"):
            with contextlib.suppress(ImportError):  # no wheel for this machine
                import gigatoken

                self._new_gigatoken = gigatoken.Tokenizer.from_json
                model["vocab"].pop(END_OF_TEXT, None)
                self._json = json.dumps(description | {"added_tokens": []})
        self._bytes = model["type"] == "BPE" and not description["pre_tokenizer"].get("use_regex")
        self._of_thread = threading.local()  # one for all would encode for one thread at a time

    def encode(self, documents: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all documents of valid UTF-8, one after the other, and how many each has."""
        if self._foreign:
            encoded = self._tokenizer.encode_documents([document.decode() for document in documents])
            lengths = np.array([len(ids) for ids in encoded], np.int64)
            return np.array([i for ids in encoded for i in ids], np.uint32), lengths
        if self._bytes:
            lengths = np.array([len(document) for document in documents], np.int64)
            return np.frombuffer(b"".join(documents), np.uint8), lengths
        if self._table is not None:
            texts = [document.decode() for document in documents]
            ids = self._table[np.frombuffer("".join(texts).encode("utf-32-le"), np.uint32)]
            if len(ids) and ids.min() < 0:
                self._tokenizer.encode("".join(texts))  # says which characters are not known
            return ids, np.array([len(text) for text in texts], np.int64)
        pieces, counts, slow = [], [], []
        for document in documents:
            if self._json and not _young(document):
                parts = [document]
            else:  # only what is near such a letter is slow
                parts = _safe_parts(document)
                slow += (len(pieces) + i for i, part in enumerate(parts) if not self._json or _young(part))
            pieces += parts
            counts.append(len(parts))
        if not slow:
            return self._encode_fast(documents)
        texts = [pieces[i].decode() for i in slow]
        arrays = {i: np.array(ids, np.uint32) for i, ids in zip(slow, self._tokenizer.encode_documents(texts))}
        if others := [i for i in range(len(pieces)) if i not in arrays]:
            ids, lengths = self._encode_fast([pieces[i] for i in others])
            arrays |= zip(others, np.split(ids, np.cumsum(lengths)[:-1]))
        ordered = [arrays[i] for i in range(len(pieces))]
        lengths = np.array([len(ids) for ids in ordered], np.int64)
        return np.concatenate(ordered), np.add.reduceat(lengths, np.cumsum([0, *counts[:-1]]))

    def _encode_fast(self, documents: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
        mine = self._of_thread
        if not hasattr(mine, "gigatoken"):
            mine.gigatoken, mine.encoded_bytes = self._new_gigatoken(self._json), 0
        encoded = mine.gigatoken.encode_batch(documents, parallel=False).layout  # the pipeline has threads
        ids, lengths = np.asarray(encoded.content.data), np.diff(np.asarray(encoded.offsets.data))
        mine.encoded_bytes += sum(map(len, documents))
        if mine.encoded_bytes > REMEMBERED and _resident_bytes(otherwise=mine.encoded_bytes) > MEMORY:
            del mine.gigatoken
        return ids, lengths


def of_our_form(description: dict) -> bool:
    """Whether a tokenizer.json is put together as data/tokenizer.py does it; a model may come with another."""
    model, before = description["model"], description["pre_tokenizer"] or {}
    if description["normalizer"] or [token["content"] for token in description["added_tokens"]] != [END_OF_TEXT]:
        return False
    if model["type"] == "WordLevel":
        return before.get("type") == "Split" and all(
            len(token) == 1 or token == END_OF_TEXT for token in model["vocab"]
        )
    of_bytes = model["type"] == "BPE" and before.get("type") == "ByteLevel" and not before["add_prefix_space"]
    by_number = all(model["vocab"].get(symbol) == byte for byte, symbol in byte_symbols().items())
    return of_bytes and not model["ignore_merges"] and (before["use_regex"] or (by_number and not model["merges"]))


def _safe_parts(document: bytes, size: int = 1 << 12) -> list[bytes]:
    """The document cut at safe borders, each part some `size` characters long: the tokens stay the same."""
    text, start, parts = document.decode(), 0, []
    while border := SAFE_BORDER.search(text, start + size):
        parts.append(text[start : border.start()].encode())
        start = border.start()
    return [*parts, text[start:].encode()]


def _young(document: bytes) -> bool:
    if document.isascii():
        return False
    # searches for bytes are twenty times as fast as that of the expression; F0 9F begins an emoji
    rest = document.translate(None, delete=ASCII)
    possible = rest.count(b"\xf0") > rest.count(b"\xf0\x9f") or any(lead in rest for lead in YOUNG_LEADS)
    return possible and YOUNG.search(document.decode()) is not None


def _resident_bytes(otherwise: int) -> int:
    """Memory that this process occupies, or, where the system has no /proc, a guess."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    except OSError:
        return otherwise
