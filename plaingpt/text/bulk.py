"""Tokenizing by the gigabyte: the same ids as `Tokenizer.encode`, as arrays.

GPT-2's tokenizer and a BPE of ours go through gigatoken (about 20 times tiktoken's rate on a core), bytes
and characters through a table. Where gigatoken is not installed, `Tokenizer.encode_documents` does the work.
"""

import contextlib
import json
import re
import secrets
import threading
from pathlib import Path

import numpy as np

from plaingpt.text.readers import SAFE_BORDER
from plaingpt.tokenizer import END_OF_TEXT, Tokenizer, byte_symbols

# gigatoken 0.10 knows the letters of Unicode 17, tiktoken and tokenizers those of Unicode 16. Documents that have
# a letter or digit that came after Unicode 14, or a neighbour of one, go to the slow encoder. Emoji are no letters.
YOUNG = re.compile(
    "[\u088f\u0c5c\u0cdc\u1c89\u1c8a\ua7cb-\ua7f1\U00010000-\U0001cfff\U0001d2c0-\U0001d2d3\U0001df00-\U0001efff"
    "\U0002b739-\U0002b73f\U0002cea2-\U0002cead\U0002ebf0-\U0003ffff]"
)
YOUNG_LEADS = [b"\xe0\xa2\x8f", b"\xe0\xb1\x9c", b"\xe0\xb3\x9c", b"\xe1\xb2", b"\xea\x9f"]  # of those below U+10000
FIRST_BYTES = (0xE0, 0xE1, 0xEA, 0xF0)
ASCII = bytes(range(128))
# gigatoken remembers every word that it has seen. Where the process has become larger than MEMORY and as much as
# MEMORY_EACH for each thread, an encoder starts anew, at a quarter of a second, if it has encoded REMEMBERED bytes
# since it last did.
MEMORY, MEMORY_EACH, REMEMBERED = 400_000_000, 150_000_000, 1 << 26


class BulkEncoder:
    """Encodes batches of documents, in any thread; every one of them is ordinary text."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer, self._end_of_text = tokenizer, tokenizer.end_of_text
        self._table = self._json = None
        # Stands before each document and is end of text in gigatoken's eyes, which gets all of them in one piece. No
        # document can have it: it is drawn anew each time.
        self._border = secrets.token_hex(8).encode()
        written = tokenizer.to_json()
        description = json.loads(written)
        model = description["model"]
        form = of_our_form(description) and model["type"]
        by_words = form == "BPE" and description["pre_tokenizer"]["use_regex"]
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
        self._of_thread = threading.local()  # one for all would encode for one thread at a time
        self._threads = set()

    def encode(self, documents: list[bytes]) -> np.ndarray:
        """Ids of all documents of valid UTF-8, one after the other, end of text before each."""
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
        """Ids of each document; with gigatoken only what is near a letter that it does not know is slow."""

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
        # the pipeline has threads; a row without padding is the only form that needs no further, slow import
        source = self._gigatoken.BytesSource([joined])
        [ids], _ = mine.encoder.encode_batch_padded(source, pad_id=0, parallel=False)
        mine.encoded_bytes += len(joined)
        allowed = MEMORY + MEMORY_EACH * len(self._threads)
        if mine.encoded_bytes > REMEMBERED and _resident_bytes(otherwise=mine.encoded_bytes) > allowed:
            del mine.encoder
        return ids


def of_our_form(description: dict) -> bool:
    """Whether a tokenizer.json is put together as plaingpt/tokenizer.py does it; a model may come with another."""
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
    if document.isascii() or not any(first in document for first in FIRST_BYTES):  # the fastest of searches
        return False
    rest = document.translate(None, delete=ASCII)
    # F0 9F begins an emoji
    possible = rest.count(b"\xf0") > rest.count(b"\xf0\x9f") or any(lead in rest for lead in YOUNG_LEADS)
    return possible and YOUNG.search(rest.decode()) is not None


def _resident_bytes(otherwise: int) -> int:
    """Memory that this process occupies, or, where the system has no /proc, a guess."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096
    except OSError:
        return otherwise
