"""One interface to every tokenizer: text to ids and back, stored as Hugging Face's tokenizer.json.

Four kinds can be made: GPT-2's own, from the merges beside this file; characters; bytes; and a
byte-level BPE trained on the user's text. Any other tokenizer.json that comes with a model works too.
"""

import functools
import hashlib
import json
import os
import signal
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from plaingpt.console import UserError, errors_of_library
from plaingpt.files import read_json

END_OF_TEXT = "<|endoftext|>"
# A new kind is made in `make_tokenizer`. It must encode any text, even half a word: validation may begin inside one. No
# token may contain a place where text/streams.py cuts texts (SAFE_BOUNDARY). `decode` must return the text, and
# `byte_lengths` its bytes. Kinds that `as_ours` does not know are encoded slowly; tools/ cannot export their models.
KINDS = ("gpt2", "char", "byte", "bpe")
TRAINING_CHARACTERS = 64_000_000  # of text that a BPE is trained on: more hardly changes it


class Tokenizer:
    """`encode`, `decode`, `vocab_size` (largest id + 1) and `end_of_text` (an id, or None)."""

    def __init__(self, backend: tokenizers.Tokenizer, is_gpt2: bool = False):
        self._backend, self.is_gpt2 = backend, is_gpt2  # is_gpt2: for tiktoken and gigatoken
        self.vocab_size = max(backend.get_vocab().values(), default=-1) + 1  # ids may have gaps
        self.end_of_text = backend.token_to_id(END_OF_TEXT)

    def encode(self, text: str, special: bool = False) -> list[int]:
        """Ids of `text`. The text `<|endoftext|>` is ordinary text unless `special`."""
        self._backend.encode_special_tokens = not special
        try:
            with errors_of_library("the tokenizer cannot encode this text"):
                return self._backend.encode(text, add_special_tokens=False).ids
        except UserError as error:
            vocabulary = self._backend.get_vocab()
            unknown = "".join(sorted({c for c in text if c not in vocabulary}))
            if not isinstance(self._backend.model, models.WordLevel) or not unknown:
                raise
            raise UserError(f"the tokenizer does not know {unknown!r}: the text it was made from lacks it") from error

    def encode_documents(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, with several threads; all of it is ordinary text."""
        self._backend.encode_special_tokens = True
        with errors_of_library("the tokenizer cannot encode a document"):
            if self.is_gpt2:  # tiktoken gives the same ids
                return gpt2_by_tiktoken().encode_ordinary_batch(texts)
            return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Iterable[int]) -> str:
        with errors_of_library("the tokenizer cannot decode these ids"):
            return self._backend.decode(list(ids), skip_special_tokens=False)

    def byte_lengths(self) -> np.ndarray:
        """Bytes of text that each id stands for, (vocab_size,) int64; 0 for end of text."""
        lengths = np.zeros(self.vocab_size, np.int64)
        spells_bytes = isinstance(self._backend.model, models.BPE)  # a byte-level BPE: each byte is one symbol
        for token, i in self._backend.get_vocab().items():
            lengths[i] = len(token) if spells_bytes else len(token.encode())
        if self.end_of_text is not None:
            lengths[self.end_of_text] = 0
        return lengths

    def same_as(self, other: "Tokenizer") -> bool:
        """Whether ids mean the same in both."""
        return self._backend.get_vocab() == other._backend.get_vocab()

    def vocabulary(self) -> dict[str, int]:
        """{spelling: id} of all tokens, end of text included."""
        return self._backend.get_vocab()

    def to_json(self) -> str:
        """The content of tokenizer.json."""
        return self._backend.to_str()

    def save(self, directory: Path) -> None:
        """Write tokenizer.json, and the tokenizer_config.json that transformers' AutoTokenizer requires."""
        (directory / "tokenizer.json").write_text(self._backend.to_str(pretty=True), encoding="utf-8", newline="\n")
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
        # Otherwise transformers 4 passes token_type_ids, and its GPT-2 adds the embedding of id 0 at each position.
        config["model_input_names"] = ["input_ids", "attention_mask"]
        if self.end_of_text is not None:  # as in OpenAI's file; CTranslate2 requires all three
            tokens = ("bos_token", "eos_token", "unk_token")
            config |= dict.fromkeys(tokens, self._backend.id_to_token(self.end_of_text))
        (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")

    @classmethod
    def load(cls, directory: Path) -> "Tokenizer":
        """Read tokenizer.json, or the vocab.json and merges.txt of older GPT-2 directories. UserError if damaged."""
        path = directory / "tokenizer.json"
        is_old = not os.path.lexists(path)
        if is_old and not any((directory / name).exists() for name in ("vocab.json", "merges.txt")):
            best = f"; did you mean {directory / 'best'}?" if (directory / "best").is_dir() else ""
            raise UserError(f"{directory} has no tokenizer.json{best}")
        with errors_of_library(f"{directory}/{'vocab.json or merges.txt' if is_old else 'tokenizer.json'} is damaged"):
            backend = _from_vocab_and_merges(directory) if is_old else tokenizers.Tokenizer.from_file(str(path))
            backend.no_truncation()  # transformers stores how a text was last cut or padded: we never do either
            backend.no_padding()
            tokenizer = cls(backend)
            if len({*(vocabulary := tokenizer.vocabulary()).values()}) < len(vocabulary):
                raise ValueError("two tokens have the same id")
        if (directory / "tokenizer_config.json").is_file():
            token = read_json(directory / "tokenizer_config.json").get("eos_token")
            token = token.get("content") if isinstance(token, dict) else token
            special = {added.content: i for i, added in backend.get_added_tokens_decoder().items() if added.special}
            if isinstance(token, str):
                tokenizer.end_of_text = special.get(token, tokenizer.end_of_text)
        return tokenizer


class TextStream:
    """Decodes ids as they arrive; a character whose bytes span several ids comes with the last of them."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer, self._stream = tokenizer, decoders.DecodeStream(skip_special_tokens=False)
        self._pending = []  # ids without text so far

    def add(self, token: int) -> str:
        """The text that this id completes."""
        self._pending.append(token)
        with errors_of_library("the tokenizer cannot decode these ids"):
            text = self._stream.step(self._tokenizer._backend, token)
        if text:
            self._pending.clear()
        return text or ""

    def rest(self) -> str:
        """What the ids after the last complete text decode to: they may end inside a character."""
        return self._tokenizer.decode(self._pending) if self._pending else ""


def _from_vocab_and_merges(directory: Path) -> tokenizers.Tokenizer:
    names = "tokenizer_config.json", "added_tokens.json"
    config, added = (read_json(directory / name) if (directory / name).exists() else {} for name in names)
    model = models.BPE.from_file(str(directory / "vocab.json"), str(directory / "merges.txt"))
    prefix, has_end = config.get("add_prefix_space") is True, model.token_to_id(END_OF_TEXT) is not None
    backend = _byte_level(model, prefix, has_end)
    tokens = {i: {"content": token, "special": token == END_OF_TEXT} for token, i in added.items()}
    tokens |= {int(i): token for i, token in config.get("added_tokens_decoder", {}).items()}
    for i, token in sorted(tokens.items()):
        flags = {flag: token.get(flag, False) for flag in ("single_word", "lstrip", "rstrip", "normalized", "special")}
        new = tokenizers.AddedToken(token["content"], **flags)
        (backend.add_special_tokens if new.special else backend.add_tokens)([new])
        if backend.token_to_id(new.content) != i:
            raise UserError(f"{directory}: the added token {new.content!r} cannot have the id {i}")
    return backend


def make_tokenizer(kind: str, documents: Iterable[str], vocab_size: int) -> Tokenizer:
    """A tokenizer of one of KINDS; `char` and `bpe` are made from the documents, `bpe` with `vocab_size` ids."""
    if kind == "gpt2":
        return gpt2()
    if kind == "byte":
        return tokenizer_from_vocab("BPE", {symbol: byte for byte, symbol in byte_symbols().items()}, [])
    if kind == "char":
        characters = set()
        for text in documents:
            characters.update(text)
        return tokenizer_from_vocab("WordLevel", {c: i for i, c in enumerate(sorted(characters))}, [])
    assert kind == "bpe", kind
    return Tokenizer(_byte_level(_trained_bpe(documents, vocab_size - 1)))  # end of text is the last id, as in GPT-2


def _trained_bpe(documents: Iterable[str], vocab_size: int) -> models.BPE:
    backend = tokenizers.Tokenizer(models.BPE())
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    # Training takes time proportional to the square of a word's length, and Chinese or DNA can be one word.
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.FixedLength(256)])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet, show_progress=False)
    texts, size = [], 0
    for text in documents:
        texts.append(text[: TRAINING_CHARACTERS - size])
        size += len(text)
        if size >= TRAINING_CHARACTERS:
            break
    interrupted = signal.signal(signal.SIGINT, signal.SIG_DFL)  # the library may not return to Python for a minute
    try:
        backend.train_from_iterator(texts, trainer)
    finally:
        signal.signal(signal.SIGINT, interrupted)
    return backend.model


def tokenizer_from_vocab(model_type: str, vocab: dict[str, int], merges: list) -> Tokenizer:
    """A tokenizer of ours: by characters ("WordLevel"), by bytes ("BPE" without merges), or a BPE of words."""
    if model_type == "BPE":
        return Tokenizer(_byte_level(models.BPE(vocab, [*map(tuple, merges)]), split_words=bool(merges)))
    backend = tokenizers.Tokenizer(models.WordLevel(vocab))
    backend.pre_tokenizer = pre_tokenizers.Split(tokenizers.Regex(r"(?m:.)"), "isolated")  # m: newlines, too
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([END_OF_TEXT])
    return Tokenizer(backend)


def as_ours(description: dict) -> dict | None:
    """The parsed tokenizer.json of a tokenizer of ours that gives the same ids as `description`, another parsed
    tokenizer.json; None if there is none.

    A tokenizer that comes with a model, such as OpenAI's GPT-2, may be written otherwise. The order of its ids has to
    be that of its merges, which is how gigatoken and other programs rank them.
    """
    model, added = description["model"], description["added_tokens"]
    if model["type"] not in ("BPE", "WordLevel"):
        return None
    vocab, merges = model["vocab"], model.get("merges") or []
    ids = {*vocab.values(), *(token["id"] for token in added)}
    if sorted(ids) != list(range(len(ids))):
        return None
    if model["type"] == "BPE":
        ranked = [token for token in sorted(vocab, key=vocab.get) if token != END_OF_TEXT]
        symbols = byte_symbols()
        if ranked[256:] != list(dict.fromkeys(map("".join, merges))) or {*ranked[:256]} != {*symbols.values()}:
            return None
        if not merges and ranked != [symbols[byte] for byte in range(256)]:
            return None
    ours = json.loads(tokenizer_from_vocab(model["type"], vocab, merges).to_json())
    return ours if _encoding(ours) == _encoding(description) else None


def _encoding(description: dict) -> list:
    """The parts of a tokenizer.json that determine how ordinary text is encoded."""
    added = [{k: value for k, value in token.items() if k != "normalized"} for token in description["added_tokens"]]
    model = {k: value or None for k, value in description["model"].items()}  # some write "" for null
    return [description["normalizer"], description["pre_tokenizer"], model, added]


def resolve_tokenizer(wanted: str) -> tuple[str, Tokenizer | None]:
    """The name of the tokenizer for meta.json, and the tokenizer itself if it exists already."""
    if wanted in KINDS:
        return wanted, None
    if not os.path.isdir(wanted):
        raise UserError(f"--tokenizer={wanted}: use one of {', '.join(KINDS)}, or a directory with a tokenizer.json")
    tokenizer = Tokenizer.load(Path(wanted))
    if tokenizer.same_as(gpt2()) and as_ours(json.loads(tokenizer.to_json())):
        return "gpt2", None
    if tokenizer.end_of_text is None:
        raise UserError(f"--tokenizer={wanted}: no {END_OF_TEXT} and no special eos_token to put between documents")
    return f"a model's, {hashlib.sha256(tokenizer.to_json().encode()).hexdigest()[:16]}", tokenizer


@functools.cache
def gpt2() -> Tokenizer:
    """GPT-2's tokenizer."""
    merges = _gpt2_merges()
    symbols = [*byte_symbols().values(), *map("".join, merges)]
    model = models.BPE({symbol: i for i, symbol in enumerate(symbols)}, merges)
    return Tokenizer(_byte_level(model), is_gpt2=True)


@functools.cache
def gpt2_by_tiktoken():
    """tiktoken's GPT-2 encoding, built from the merges beside this file instead of a download."""
    import tiktoken
    from tiktoken_ext.openai_public import r50k_pat_str as pattern

    bytes_of = {symbol: bytes([byte]) for byte, symbol in byte_symbols().items()}
    tokens = [*bytes_of.values(), *(b"".join(map(bytes_of.get, left + right)) for left, right in _gpt2_merges())]
    ranks = {token: rank for rank, token in enumerate(tokens)}
    return tiktoken.Encoding("gpt2", pat_str=pattern, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: len(ranks)})


def _gpt2_merges() -> list[tuple[str, str]]:
    """Pairs of symbols in order of rank. A pair's id is 256 + its rank; ids below 256 are the bytes."""
    lines = (Path(__file__).parent / "gpt2.merges").read_text(encoding="utf-8").splitlines()
    return [tuple(line.split(" ")) for line in lines]


def _byte_level(
    model: models.Model, prefix_space: bool = False, end_of_text: bool = True, split_words: bool = True
) -> tokenizers.Tokenizer:
    """GPT-2's tokenizer around `model`: its word pattern, bytes as printable symbols, end of text as the last id."""
    backend = tokenizers.Tokenizer(model)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space, use_regex=split_words)
    backend.decoder = decoders.ByteLevel()
    if end_of_text:
        backend.add_special_tokens([END_OF_TEXT])
    return backend


def byte_symbols() -> dict[int, str]:
    """GPT-2's printable symbol for each byte, in order of ids: the character itself if printable, else U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}
