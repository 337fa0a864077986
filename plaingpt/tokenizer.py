"""One interface over every tokenizer: text to ids and back, kept on disk in Hugging Face form (tokenizer.json).

Four kinds can be made: GPT-2's own, from the merges beside this file; characters; bytes; and a
byte-level BPE trained on the user's text. Any other tokenizer.json that a model comes with works too.
"""

import functools
import hashlib
import io
import json
import os
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from plaingpt.console import UserError

END_OF_TEXT = "<|endoftext|>"
KINDS = ("gpt2", "char", "byte", "bpe")
RICH_BYTES = 1 << 24  # of a text, in which a BPE's words are counted


class Tokenizer:
    """`encode`, `decode`, `vocab_size` and `end_of_text` (an id, or None where there is none)."""

    def __init__(self, backend: tokenizers.Tokenizer, bulk_encode=None):
        self._backend = backend
        self._bulk_encode = bulk_encode
        self.vocab_size = backend.get_vocab_size()
        self.end_of_text = backend.token_to_id(END_OF_TEXT)

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Ids of `text`. The text `<|endoftext|>` is ordinary text unless `special`."""
        self._backend.encode_special_tokens = not special
        try:
            return self._backend.encode(text, add_special_tokens=False).ids
        except Exception as error:  # the library's own class, raised by the character tokenizer alone
            vocabulary = self._backend.get_vocab()
            unknown = "".join(sorted({c for c in text if c not in vocabulary}))
            raise UserError(f"the tokenizer does not know {unknown!r}; it was made from text without it") from error

    def encode_documents(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, all of it ordinary text, on all cores."""
        if self._bulk_encode:
            return self._bulk_encode(texts)
        self._backend.encode_special_tokens = True
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        return self._backend.decode(list(ids), skip_special_tokens=False)

    def decode_stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Pieces of text as ids arrive; a character whose bytes span several ids comes when it is whole."""
        stream = decoders.DecodeStream(skip_special_tokens=False)
        held = []  # ids whose text has not come yet
        for token in ids:
            held.append(int(token))
            if piece := stream.step(self._backend, held[-1]):
                held.clear()
                yield piece
        if held:  # the text ended inside a character
            yield self.decode(held)

    def byte_lengths(self) -> np.ndarray:
        """Bytes of text that each id stands for, (vocab_size,) int64; end of text stands for none."""
        lengths = np.zeros(self.vocab_size, np.int64)
        one_a_byte = isinstance(self._backend.model, models.BPE)  # a byte-level BPE spells each byte with a symbol
        for token, i in self._backend.get_vocab().items():
            lengths[i] = len(token) if one_a_byte else len(token.encode())
        if self.end_of_text is not None:
            lengths[self.end_of_text] = 0
        return lengths

    def same_as(self, other: "Tokenizer") -> bool:
        """Whether ids mean the same in both."""
        return self._backend.get_vocab() == other._backend.get_vocab()

    def vocabulary(self) -> dict[str, int]:
        """Ids by the spelling of their tokens, end of text among them."""
        return self._backend.get_vocab()

    def to_json(self) -> str:
        """What tokenizer.json holds."""
        return self._backend.to_str()

    def save(self, directory: Path) -> None:
        """Write tokenizer.json and the configuration that transformers' AutoTokenizer wants beside it."""
        self._backend.save(str(Path(directory) / "tokenizer.json"))
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        if self.end_of_text is not None:
            config |= {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT}
        (Path(directory) / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")

    @classmethod
    def load(cls, directory: Path) -> "Tokenizer":
        path = Path(directory) / "tokenizer.json"
        if not path.is_file():
            raise UserError(f"{directory} has no tokenizer.json")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises plain Exception for every fault of the file
            raise UserError(f"{path} is damaged: {error}") from error
        backend.no_truncation()  # transformers writes down how a text was last cut or filled up: here all of it counts
        backend.no_padding()
        return cls(backend)


def make_tokenizer(kind: str, documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """A tokenizer of one of KINDS; `char` and `bpe` are learned from the documents, `bpe` up to `vocab_size`."""
    if kind == "gpt2":
        return gpt2()
    if kind == "byte":
        symbols = {symbol: byte for byte, symbol in byte_symbols().items()}
        return Tokenizer(_byte_level(models.BPE(symbols, []), use_regex=False))
    if kind == "char":
        characters = set()
        for text in documents:
            characters.update(text)
        backend = tokenizers.Tokenizer(models.WordLevel({c: i for i, c in enumerate(sorted(characters))}))
        backend.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"(?m:.)"), "isolated")  # m: newlines too
        backend.decoder = decoders.Fuse()
        backend.add_special_tokens([END_OF_TEXT])
        return Tokenizer(backend)
    if vocab_size < 257:
        raise UserError(f"--vocab_size={vocab_size}: a byte-level BPE needs 256 bytes and {END_OF_TEXT}: at least 257")
    return Tokenizer(_byte_level(_learn_bpe(documents, vocab_size - 1)))  # end of text comes last, as in GPT-2


def _learn_bpe(documents: Iterable[str], vocab_size: int) -> models.BPE:
    """The merges that `tokenizers` learns, from gigatoken where it learns the same, in a fifteenth of the time."""
    border, joined = secrets.token_hex(16).encode(), io.BytesIO()
    for document in documents:
        joined.write(border + document.encode())
    text, alphabet = joined.getvalue(), sorted(pre_tokenizers.ByteLevel.alphabet())
    if merges := _learn_fast(text, border, vocab_size):
        symbols, ids = byte_symbols(), {symbol: i for i, symbol in enumerate(alphabet)}
        pairs = [tuple("".join(symbols[byte] for byte in part) for part in pair) for pair in merges]
        for pair in pairs:
            ids.setdefault("".join(pair), len(ids))
        return models.BPE(ids, pairs)
    learned = tokenizers.Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    learned.train_from_iterator(map(bytes.decode, text.split(border)), trainer)
    return learned.model


def _learn_fast(text: bytes, border: bytes, vocab_size: int) -> list[tuple[bytes, bytes]] | None:
    """gigatoken's merges; None where it is not installed, or a pair would run out: then it goes on with any."""
    try:
        from gigatoken import gigatoken_rs
    except ImportError:  # no wheel for this machine
        return None
    kept = [os.dup(stream) for stream in (1, 2)]  # it prints what it is at, past Python's streams
    with open(os.devnull, "wb") as nowhere:
        for stream in (1, 2):
            os.dup2(nowhere.fileno(), stream)
    try:
        words = gigatoken_rs.pretokenized_counts(text[:RICH_BYTES], separator=border)
        # of more words than ids one at least has a pair left
        return gigatoken_rs.train_bpe(text, vocab_size, [], separator=border)[1] if len(words) > vocab_size else None
    finally:
        for stream, copy in zip((1, 2), kept):
            os.dup2(copy, stream)
            os.close(copy)


def tokenizer_of(wanted: str) -> tuple[str, Tokenizer | None]:
    """What meta.json calls the tokenizer, and the tokenizer itself where it exists already."""
    if wanted in KINDS:
        return wanted, None
    if not Path(wanted).is_dir():
        raise UserError(
            f"--tokenizer={wanted}: give one of {', '.join(KINDS)}, or a directory that has a tokenizer.json"
        )
    tokenizer = Tokenizer.load(Path(wanted))
    if tokenizer.same_as(gpt2()):
        return "gpt2", None
    if tokenizer.end_of_text is None:
        raise UserError(f"--tokenizer={wanted}: it has no {END_OF_TEXT}, which stands between documents")
    return f"a model's, {hashlib.sha256(tokenizer.to_json().encode()).hexdigest()[:16]}", tokenizer


@functools.cache
def gpt2() -> Tokenizer:
    """GPT-2's tokenizer. tiktoken encodes in bulk; its ids are the same."""
    merges = _gpt2_merges()
    symbols = [*byte_symbols().values(), *map("".join, merges)]
    model = models.BPE({symbol: i for i, symbol in enumerate(symbols)}, merges)
    return Tokenizer(_byte_level(model), bulk_encode=lambda texts: gpt2_by_tiktoken().encode_ordinary_batch(texts))


@functools.cache
def gpt2_by_tiktoken():
    """tiktoken's encoding of GPT-2, from the merges beside this file in place of a download."""
    import tiktoken

    bytes_of = {symbol: bytes([byte]) for byte, symbol in byte_symbols().items()}
    tokens = [*bytes_of.values(), *(b"".join(map(bytes_of.get, left + right)) for left, right in _gpt2_merges())]
    return tiktoken.Encoding(
        name="gpt2",
        pat_str=r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+""",
        mergeable_ranks={token: rank for rank, token in enumerate(tokens)},
        special_tokens={END_OF_TEXT: len(tokens)},
    )


def _gpt2_merges() -> list[tuple[str, str]]:
    """Pairs of symbols, the first merge first: a pair's id is 256 and its line; below are the bytes."""
    lines = (Path(__file__).parent / "gpt2.merges").read_text(encoding="utf-8").splitlines()
    return [tuple(line.split(" ")) for line in lines]


def _byte_level(model: models.Model, use_regex: bool = True) -> tokenizers.Tokenizer:
    """GPT-2's arrangement around `model`: its splitting pattern, bytes as printable symbols, end of text as last id."""
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([END_OF_TEXT])
    return backend


def byte_symbols() -> dict[int, str]:
    """GPT-2's printable stand-in for each byte, in order of their ids: itself where it prints, else from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
