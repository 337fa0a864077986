"""Training of a byte-level BPE: gigatoken learns what `tokenizers` learns, in a fifteenth of the time."""

import contextlib
import io
import os
import re
import secrets
import signal
import threading
from collections.abc import Iterable, Iterator

import numpy as np
import tokenizers
from tokenizers import models, pre_tokenizers, trainers

RICH_BYTES = 1 << 24  # of the text, in which words are counted
LONGEST_WORD = 256  # characters: learning takes time proportional to the square of a word's length
LONG_WORD = re.compile(r"[^\W\d_]{256}|\d{256}|[^\w\s]{256}|_{256}|\s{256}")


def learn_bpe(documents: Iterable[str], vocab_size: int, symbols: dict[int, str]) -> models.BPE:
    """A BPE of `vocab_size` ids: the merges that `tokenizers` learns, from gigatoken where that learns the same.

    symbols: a printable character for each byte.
    """
    separator, joined = secrets.token_hex(16).encode(), io.BytesIO()
    for document in documents:
        for short in _without_long_words(document):
            joined.write(separator + short.encode())
    text, alphabet = joined.getvalue(), sorted(pre_tokenizers.ByteLevel.alphabet())
    with _interruptible():
        if merges := _learn_fast(text, separator, vocab_size):
            ids = {symbol: i for i, symbol in enumerate(alphabet)}
            pairs = [tuple("".join(symbols[byte] for byte in part) for part in pair) for pair in merges]
            for pair in pairs:
                ids.setdefault("".join(pair), len(ids))
            return models.BPE(ids, pairs)
        learned = tokenizers.Tokenizer(models.BPE())
        learned.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
        learned.train_from_iterator(map(bytes.decode, text.split(separator)), trainer)
        return learned.model


def _without_long_words(document: str) -> Iterator[str]:
    """The document, cut after every LONGEST_WORD characters of a word, of digits, of signs or of white space.

    Learning takes time proportional to the square of a word's length, and Chinese or DNA can be one word of megabytes.
    """
    start = 0
    if len(document) > LONGEST_WORD:
        spaces = np.isin(np.frombuffer(document.encode("utf-32-le"), np.uint32), [9, 10, 13, 32])
        edges = np.flatnonzero(np.diff(spaces, prepend=~spaces[:1], append=~spaces[-1:]))
        for i in np.flatnonzero(np.diff(edges) > LONGEST_WORD):
            for word in LONG_WORD.finditer(document, edges[i], edges[i + 1]):
                yield document[start : word.end()]
                start = word.end()
    yield document[start:]


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Let Ctrl-C end the process at once: libraries that do not return to Python for minutes would not notice it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _learn_fast(text: bytes, separator: bytes, vocab_size: int) -> list[tuple[bytes, bytes]] | None:
    """gigatoken's merges; None if it is not installed, or if there may be too few pairs: then it invents some."""
    try:
        from gigatoken import gigatoken_rs
    except ImportError:  # no wheel for this machine
        return None
    saved = [os.dup(stream) for stream in (1, 2)]  # it prints its progress, past Python's streams
    with open(os.devnull, "wb") as nowhere:
        for stream in (1, 2):
            os.dup2(nowhere.fileno(), stream)
    try:
        words = gigatoken_rs.pretokenized_counts(text[:RICH_BYTES], separator=separator)
        # among more words than ids, one at least has a pair left
        return gigatoken_rs.train_bpe(text, vocab_size, [], separator=separator)[1] if len(words) > vocab_size else None
    finally:
        for stream, copy in zip((1, 2), saved):
            os.dup2(copy, stream)
            os.close(copy)
