"""Bulk encoding: the ids of `Tokenizer.encode`, as arrays, at some 100 MB/s per core.

GPT-2's tokenizer and our own BPE use gigatoken (several times as fast as tiktoken); characters use a lookup table;
bytes are their own ids. All others, and machines without a gigatoken wheel, use the tokenizer itself.
"""

import contextlib
import itertools
import json
import re
import secrets
import threading
import time

import numpy as np

from plaingpt.tokenizer import END_OF_TEXT, Tokenizer, as_ours

# gigatoken 0.10 knows the letters of Unicode 17, tiktoken and tokenizers those of Unicode 16. Documents with a letter
# or digit newer than Unicode 14, or with one of the rare scripts near it, go to the tokenizer itself. The keys are the
# first bytes of these letters: looking for one byte first is much faster.
RECENT = {
    b"\xe0": re.compile(rb"\xe0(?:\xa2\x8f|[\xb1\xb3]\x9c)"),
    b"\xe1": re.compile(rb"\xe1\xb2[\x89\x8a]"),
    b"\xea": re.compile(rb"\xea\x9f[\x8b-\xb1]"),
    b"\xf0": re.compile(rb"\xf0(?:[^\x9d\x9f-\xae]|\x9d[\x8b\xbc-\xbf]|\xab\x9c|\xac\xba|\xae[\xaf-\xbf])"),
}
# gigatoken caches every word it has seen, up to 150 MB in a second of work. After RENEWED seconds, a thread replaces
# its encoder with a new one, which takes a tenth of a second.
RENEWED = 2.0


class BulkEncoder:
    """Encodes batches of documents, from any thread. `<|endoftext|>` in a document is ordinary text."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer, self._end_of_text = tokenizer, tokenizer.end_of_text
        self._gigatoken = self._table = None
        # A delimiter before each document in the text that gigatoken gets; gigatoken's tokenizer knows it as end of
        # text. It is random, so no document contains it.
        self._delimiter = secrets.token_hex(8).encode()
        found = json.loads(tokenizer.to_json())
        ours = found if tokenizer.is_gpt2 else as_ours(found)  # GPT-2's is ours; to compare takes up to a second
        model = ours["model"] if ours else {"type": None}
        self._is_bytes = model["type"] == "BPE" and not model["merges"]
        if model["type"] == "WordLevel":
            characters = {ord(c): i for c, i in model["vocab"].items() if len(c) == 1}
            self._table = np.full(0x110000, -1, np.int32)
            self._table[list(characters)] = list(characters.values())
        elif model["type"] == "BPE" and model["merges"]:
            with contextlib.suppress(ImportError):  # no wheel for this machine
                import gigatoken

                self._gigatoken = gigatoken
                self._json = json.dumps(ours).replace(f'"{END_OF_TEXT}"', f'"{self._delimiter.decode()}"')
        self._of_thread = threading.local()  # a shared encoder serves one thread at a time

    def encode(self, documents: list[bytes]) -> np.ndarray:
        """Ids of documents in valid UTF-8, one after another, end of text before each."""
        if self._gigatoken:
            runs = itertools.groupby(documents, has_recent_letter)
            encoded = [self._by_tokenizer([*run]) if slow else self._by_gigatoken([*run]) for slow, run in runs]
            return np.concatenate(encoded)
        if self._is_bytes:
            return self._joined([np.frombuffer(document, np.uint8) for document in documents])
        if self._table is not None:
            return self._joined([self._look_up(document.decode()) for document in documents])
        return self._by_tokenizer(documents)

    def _joined(self, encoded: list) -> np.ndarray:
        end_of_text = np.array([self._end_of_text], np.uint32)
        return np.concatenate([part for ids in encoded for part in (end_of_text, np.asarray(ids, np.uint32))])

    def _look_up(self, text: str) -> np.ndarray:
        ids = self._table[np.frombuffer(text.encode("utf-32-le"), np.uint32)]
        if (ids < 0).any():
            self._tokenizer.encode(text)  # says which characters are not known
        return ids

    def _by_tokenizer(self, documents: list[bytes]) -> np.ndarray:
        return self._joined(self._tokenizer.encode_documents([document.decode() for document in documents]))

    def _by_gigatoken(self, documents: list[bytes]) -> np.ndarray:
        joined = self._delimiter.join([b"", *documents])
        mine = self._of_thread
        if not hasattr(mine, "encoder"):
            mine.encoder, mine.end = self._gigatoken.Tokenizer.from_json(self._json), time.thread_time() + RENEWED
        # one row without padding is the only result that needs no slow import of another library
        source = self._gigatoken.BytesSource([joined])
        [ids], _ = mine.encoder.encode_batch_padded(source, pad_id=0, parallel=False)
        if time.thread_time() > mine.end:
            del mine.encoder
        return ids


def has_recent_letter(document: bytes) -> bool:
    return not document.isascii() and any(byte in document and rare.search(document) for byte, rare in RECENT.items())
