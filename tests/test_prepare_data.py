"""prepare_data.py: text in, token files out, and never half a data set."""

import hashlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tokenizers
import xxhash
from conftest import ROOT, child_environment, contents, run_main

import prepare_data
from plaingpt.console import UserError
from plaingpt.text import streams
from plaingpt.text.config import PrepareConfig
from plaingpt.text.pipeline import training_bytes
from plaingpt.tokenizer import KINDS
from plaingpt.tokens import open_data_set

LANGUAGES = (
    "Hello, world! Größe, naïve. Ελλάδα Київ עברית العربية हिन्दी ไทย 中文字 ひらがな 한국어 አማርኛ\r\n"
    "\te\u0301 👩‍👩‍👧‍👦🏳️‍🌈👍🏽 def f(x): return {'a': x**2}  # <|endoftext|> is text\n\n" + "a" * 200 + "\u2028 \x01\n"
) * 4


@pytest.fixture
def prepare(tmp_path, monkeypatch):
    """Run the script's main in this process, in a folder of its own; return the data set's folder."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, name="set") -> Path:
        monkeypatch.setattr(sys, "argv", ["prepare_data.py", *map(str, arguments), f"--name={name}"])
        prepare_data.main()
        return tmp_path / "data" / name

    return run


@pytest.fixture
def folder(tmp_path):
    def make(texts: dict[str, str], name: str = "texts") -> Path:
        for file, text in texts.items():
            path = tmp_path / name / file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text.encode())
        return tmp_path / name

    return make


def split_texts(directory: Path, split: str) -> list[str]:
    """The documents of a split, decoded: its ids parted at end of text."""
    data = open_data_set(directory)
    ids = np.concatenate(list(getattr(data, split).all())).tolist()
    parts = [[]]
    for i in ids:
        parts.append([]) if i == data.tokenizer.end_of_text else parts[-1].append(i)
    return [data.tokenizer.decode(part) for part in parts]


def tokenizer_flags(kind: str) -> list[str]:
    return [f"--tokenizer={kind}", *(["--vocab_size=300"] if kind == "bpe" else [])]


# what is written


@pytest.mark.parametrize("kind", KINDS)
def test_every_tokenizer_gives_the_text_back_and_the_same_bytes_each_time(prepare, folder, kind):
    source = folder({"a.txt": LANGUAGES, "b.txt": LANGUAGES[::-1]})
    directory = prepare(source, *tokenizer_flags(kind))
    train, val = split_texts(directory, "train"), split_texts(directory, "val")
    texts = [text.replace("\r\n", "\n") for text in (LANGUAGES, LANGUAGES[::-1])]
    assert [a + b for a, b in zip(train, val, strict=True)] == texts and "\r" in texts[1]
    names = {"train.bin", "val.bin", "meta.json", "tokenizer.json", "tokenizer_config.json", "SHA256SUMS"}
    assert contents(directory).keys() == names
    assert contents(prepare(source, *tokenizer_flags(kind), name="again")) == contents(directory)


@pytest.mark.parametrize("n", [10, 997, 1000, 1003])
def test_one_document_is_split_where_nanogpt_splits_it(prepare, folder, n):
    text = "".join(chr(97 + i % 26) for i in range(n))
    source = folder({"input.txt": text})
    directory = prepare(source, "--val_fraction=0.1", "--tokenizer=char")
    assert split_texts(directory, "train") == [text[: int(n * 0.9)]]
    assert split_texts(directory, "val") == [text[int(n * 0.9) :]]


def test_shakespeare_char_is_split_at_nine_tenths():
    source = prepare_data.find_source(prepare_data.PrepareConfig(sources=["shakespeare_char"]))
    assert (source.val_fraction, source.tokenizer) == (0.1, "char")


def test_a_document_too_short_to_be_parted_goes_to_validation_and_leaves_no_empty_one_in_training(prepare, folder):
    source = folder({"a.txt": "aaaa", "b.txt": "b", "c.txt": "cccc"})
    directory = prepare(source, "--val_fraction=0.5", "--tokenizer=byte")
    assert split_texts(directory, "train") == ["aa", "cc"]
    assert split_texts(directory, "val") == ["aa", "b", "cc"]


def test_end_of_text_stands_between_documents_and_nowhere_else(prepare, folder):
    source = folder({"a.txt": "aaaa", "b.txt": "bbbb", "c.txt": "cccc"})
    directory = prepare(source, "--val_fraction=0.5", "--tokenizer=byte")
    a, b, c = (ord(letter) for letter in "abc")
    expected = [a, a, 256, b, b, 256, c, c]
    for split in ("train", "val"):
        assert np.fromfile(directory / f"{split}.bin", "<u2").tolist() == expected


def test_the_share_of_many_documents_that_is_validation_is_the_fraction_asked_for():
    digests = [xxhash.xxh3_64_intdigest(f"number {i}".encode()) for i in range(4000)]
    for fraction in (0.05, 0.5):
        part = SimpleNamespace(by_content=True, config=PrepareConfig(val_fraction=fraction))
        shares = [training_bytes(part, None, None, digest) for digest in digests]
        assert shares.count(0) / 4000 == pytest.approx(fraction, abs=0.03)


@pytest.mark.parametrize("at_a_time", [1, 500, 10_000])
def test_the_order_does_not_depend_on_how_much_is_encoded_at_a_time(prepare, folder, monkeypatch, at_a_time):
    size = 300
    monkeypatch.setattr(streams, "PIECE", at_a_time)
    texts = {f"{letter}.txt": letter * size for letter in "abc"}
    directory = prepare(folder(texts), "--tokenizer=char", "--val_fraction=0.25")
    runs = [(i, len(list(group))) for i, group in itertools.groupby(np.fromfile(directory / "train.bin", "<u2"))]
    boundary = int(size * 0.75)
    assert runs == [(0, boundary), (3, 1), (1, boundary), (3, 1), (2, boundary)]


def test_another_text_replaces_a_data_set_only_by_its_name(prepare, folder, monkeypatch):
    books = folder({"a.txt": "abc " * 100}, "books")
    made = prepare(books, "--tokenizer=byte", name="books")
    before = (made / "train.bin").read_bytes()
    more = folder({"b.txt": "other " * 100}, "more")
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", str(books), str(more)])
    with pytest.raises(UserError, match=r"data/books was made from .*--name=books replaces it"):
        prepare_data.main()
    assert (made / "train.bin").read_bytes() == before
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", str(books), "--tokenizer=byte"])
    prepare_data.main()  # the same text
    prepare(books, more, "--tokenizer=byte", name="books")
    assert (made / "train.bin").read_bytes() != before


def test_meta_json_counts_tokens_bytes_and_documents(prepare, folder):
    text = "é" * 100  # two bytes each
    source = folder({"a.txt": text, "b.txt": text})
    directory = prepare(source, "--tokenizer=char", "--val_fraction=0.25")
    meta = json.loads((directory / "meta.json").read_text())
    files = {split: meta["splits"][split].pop("files") for split in ("train", "val")}
    assert meta == {
        "format_version": 1,
        "tokenizer": "char",
        "vocab_size": 2,
        "dtype": "uint16",
        "end_of_text": 1,
        "source": str(source),
        "plan": meta["plan"],
        "splits": {
            "train": {"tokens": 151, "bytes": 300, "documents": 2},
            "val": {"tokens": 51, "bytes": 100, "documents": 2},
        },
    }
    for split, tokens in (("train", 151), ("val", 51)):
        digest = hashlib.sha256((directory / f"{split}.bin").read_bytes()).hexdigest()
        assert files[split] == [{"name": f"{split}.bin", "tokens": tokens, "sha256": digest}]


def test_a_bpe_is_trained_on_the_text_to_the_size_asked_for(prepare, folder):
    source = folder({"a.txt": Path(prepare_data.__file__).read_text("utf-8")})
    directory = prepare(source, "--tokenizer=bpe", "--vocab_size=500")
    assert open_data_set(directory).tokenizer.vocab_size == 500
    assert len(open_data_set(directory).train) < len(source.joinpath("a.txt").read_text()) / 1.5


def test_of_python_bad_files_are_skipped_unless_asked_otherwise(prepare, folder, monkeypatch):
    library = folder({"good.py": "text " * 100})
    (library / "latin.py").write_bytes(b"gr\xf6\xdfe")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(library))
    assert split_texts(prepare("python", "--tokenizer=byte"), "train") == ["text " * 95]
    with pytest.raises(UserError, match=r"latin\.py is not UTF-8 text"):
        prepare("python", "--tokenizer=byte", "--bad_files=stop")


def test_a_link_to_another_place_stays_one(prepare, folder, tmp_path):
    prepare(folder({"a.txt": "old " * 100}), "--tokenizer=byte", name="elsewhere").rename(tmp_path / "far")
    (tmp_path / "data" / "set").symlink_to(tmp_path / "far")
    prepare(folder({"a.txt": "new " * 100}), "--tokenizer=byte")
    assert (tmp_path / "data" / "set").is_symlink() and split_texts(tmp_path / "far", "train") == ["new " * 95]
    assert os.listdir(tmp_path / "data") == ["set"]


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a folder in which not even root can write")
def test_a_link_to_where_nothing_can_be_written_is_refused(prepare, folder, tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "set").symlink_to("/proc/far")
    with pytest.raises(UserError, match=r"^/proc cannot be written to: .*; choose another directory$"):
        prepare(folder({"a.txt": "text " * 100}))


# which files


def test_the_source_gives_the_name_and_data_dir_the_place(prepare, folder, monkeypatch, tmp_path, capsys):
    folder({"a.txt": "text " * 100}, "my_books")
    monkeypatch.setattr(sys, "argv", ["prepare_data.py", "my_books", "--data_dir=elsewhere"])
    prepare_data.main()
    assert len(open_data_set(tmp_path / "elsewhere" / "my_books").train) > 0
    command = "python train.py --dataset=my_books --data_dir=elsewhere --out_dir=out-my_books --minutes=10"
    assert capsys.readouterr().err.endswith(f"next: {command}\n")


def test_a_data_set_that_is_replaced_is_named_and_a_models_tokenizer_is_for_finetuning(
    prepare, folder, tiny_run, capsys
):
    source = folder({"a.txt": "and " * 100})
    prepare(source, "--tokenizer=byte")
    assert "will replace" not in capsys.readouterr().err
    prepare(source, f"--tokenizer={tiny_run / 'best'}")
    printed = capsys.readouterr().err
    assert "(tokenizer byte, vocabulary of 257)" in printed and f" --init_from={tiny_run / 'best'} " in printed


def test_a_large_document_that_goes_to_validation_is_noted(prepare, folder, capsys):
    texts = (f"{i} " * 5000 for i in range(999))
    large = next(text for text in texts if xxhash.xxh3_64_intdigest(text.encode()) < 0.05 * 2**64)
    prepare(folder({f"{i}.txt": f"document {i}" for i in range(220)} | {"large.txt": large}), "--tokenizer=byte")
    printed = capsys.readouterr().err
    reason = "the documents are few or short, or differ in length"
    assert f"of the text is in validation instead of 5.00%: {reason}" in printed


def test_a_default_tokenizer_for_little_text_is_noted(prepare, folder, capsys):
    for flags, noted in ([], True), (["--tokenizer=gpt2"], False):
        prepare(folder({"a.txt": "and " * 1000}), *flags)
        assert ("on so little text, use --tokenizer=bpe" in capsys.readouterr().err) == noted


# failures


def test_a_flag_for_the_hub_is_refused_for_files(prepare, folder):
    with pytest.raises(UserError, match=r"--revision is for Hugging Face data sets \(hf:owner/name\)"):
        prepare(folder({"a.txt": "text"}), "--revision=main")


@pytest.mark.parametrize("text", ["the road the sea", "the unknown sea"])
def test_text_that_a_models_tokenizer_loses_is_noted(prepare, folder, tmp_path, capsys, text):
    words = {word: i for i, word in enumerate(["?", "the", "road", "sea", " ", "</s>"])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="?"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Split(" ", "isolated")
    backend.decoder = tokenizers.decoders.Fuse()
    backend.add_special_tokens(["</s>"])
    (tmp_path / "model").mkdir()
    backend.save(str(tmp_path / "model" / "tokenizer.json"))
    (tmp_path / "model" / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    prepare(folder({"a.txt": "the sea " * 20, "b.txt": f"{text} " * 20}), f"--tokenizer={tmp_path / 'model'}")
    assert ("does not reproduce this text exactly" in capsys.readouterr().err) == ("unknown" in text)


def test_what_is_not_text_is_left_out_of_a_folder_and_refused_by_name(prepare, folder, capsys):
    source = folder({"a.txt": "a" * 100, "c.txt": "c" * 100, "c.json": "{}", "node_modules/d.txt": "d", "e.csv": "x,y"})
    for name, data in {
        "b.png": b"\x89PNG\r\n\0", "b2.PNG": b"\x89PNG\r\n\0", "b.pdf": b"%PDF-1.4", "b.doc": b"{\\rtf1", "b": b"\0"
    }.items():  # fmt: skip
        (source / name).write_bytes(data)
    directory = prepare(source, "--tokenizer=byte")
    assert split_texts(directory, "train") == ["a" * 95, "c" * 95]
    printed = capsys.readouterr().err
    assert "reading 2 files: 2 text; 7 skipped: 5 binary, " in printed
    for kind in ("1 json damaged or without 'text' (--column)", "1 csv damaged or without 'text' (--column)"):
        assert kind in printed.splitlines()[0]
    for name, message in {
        "b.png": "b.png is binary, not text", "b.pdf": "is binary, not text", "c.json": "has no 'text'",
        "e.csv": "no column",
    }.items():  # fmt: skip
        with pytest.raises(UserError, match=re.escape(message)):
            prepare(source / name)
    (source / "a.txt").unlink()
    (source / "c.txt").unlink()
    with pytest.raises(UserError, match="texts: 7 skipped: 5 binary"):
        prepare(source)


def test_files_of_a_folder_that_are_not_in_the_encoding_are_counted_as_such(prepare, folder, capsys):
    prepare(folder({"a.txt": "a" * 100, "b.txt": "é" * 100}), "--tokenizer=byte", "--encoding=ascii")
    assert "reading 1 file: 1 text; 1 skipped: 1 binary or not ascii\n" in capsys.readouterr().err


@pytest.mark.parametrize("bad_files", ["skip", "replace"])
def test_of_a_large_file_with_bad_bytes_the_tail_of_what_is_left_goes_to_validation(prepare, tmp_path, bad_files):
    (tmp_path / "a.txt").write_bytes(b"a" * (2**20 + 9) + b"\xff" * 9 + b"a" * (2**21 - 18))
    directory = prepare("a.txt", "--tokenizer=byte", f"--bad_files={bad_files}")
    train, val = (len("".join(split_texts(directory, split)).encode()) for split in ("train", "val"))
    assert train == int(0.95 * (train + val)) and (train + val > 3 * 2**20) == (bad_files == "replace")


def test_copies_do_not_count_as_many_documents(prepare, folder):
    texts = {f"{i}.txt": f"text {i % 20} " * 20 for i in range(250)}
    directory = prepare(folder(texts), "--tokenizer=byte", "--dedup")
    assert len(split_texts(directory, "train")) == len(split_texts(directory, "val")) == 20  # the tail of each


def failed(*arguments) -> str:
    """The one line, besides notes and the progress bar, with which the script ends in status 2."""
    ended = run_main("prepare_data", *arguments)
    others = ("encoding:", "reading ", "will replace ")
    lines = [line for line in ended.err.splitlines() if line and not line.startswith(others)]
    assert (ended.status, ended.out, len(lines)) == (2, "", 1), ended.err
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["good.txt", "--name="], "prepare_data.py: '' cannot be the data set's name"),
        (["good.txt", "--vocab_size=300"], "prepare_data.py: --vocab_size is for --tokenizer=bpe, but this is gpt2"),
        (["nothing/*.txt"], "prepare_data.py: nothing/*.txt: no such file"),
        (["empty.txt"], "prepare_data.py: empty.txt contains no text"),
        (["good.txt", "binary.txt"], "prepare_data.py: binary.txt is binary, not text: "),
        (["one.txt"], "prepare_data.py: too little text: the train split is empty"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_failure_is_one_line_and_leaves_an_existing_data_set_as_it_was(prepare, folder, tmp_path, arguments, message):
    directory = prepare(folder({"a.txt": "as it was " * 50}), "--tokenizer=byte")
    folder({"good.txt": "good text " * 50, "empty.txt": "", "one.txt": "1"}, ".")
    (tmp_path / "binary.txt").write_bytes(b"ab\xff\0")
    before = contents(directory)
    assert failed("--name=set", *arguments).startswith(message)
    assert contents(directory) == before
    assert [name for name in os.listdir(directory.parent) if not name.startswith(".")] == ["set"]


def test_what_the_system_refuses_is_named_with_its_reason(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder({"a.txt": "text " * 100, "file": ""}, ".")
    line = failed("a.txt", "--name=set", "--data_dir=file")
    assert line == "prepare_data.py: file cannot be written to: Not a directory; choose another directory"


@pytest.mark.parametrize("name", ["../out", "a/b", ".hidden", "with space", "-", "ends\n", "x" * 300, "é" * 150])
def test_a_name_that_is_no_plain_folder_name_is_refused(prepare, folder, tmp_path, name):
    source = folder({"a.txt": "text " * 100})
    before = contents(tmp_path)
    with pytest.raises(UserError, match="cannot be the data set's name"):
        prepare(source, name=name)
    assert contents(tmp_path) == before and not (tmp_path / "data").exists()


@pytest.mark.parametrize("theirs", [{"train.bin": "nanoGPT's", "prepare.py": ""}, {"meta.json": '{"title": "mine"}'}])
def test_a_folder_that_is_not_a_data_set_is_left_alone(prepare, folder, tmp_path, theirs):
    source = folder({"a.txt": "text " * 100})
    folder(theirs, "data/set")
    before = contents(tmp_path)
    with pytest.raises(UserError, match="set exists but is not a plainGPT data set; choose another --name"):
        prepare(source)
    assert contents(tmp_path) == before


def test_end_of_text_in_a_text_gets_a_note_and_splits_documents_on_request(prepare, folder, capsys):
    streams.note_once.cache_clear()
    source = folder({"a.txt": "\n<|endoftext|>\n".join(["one " * 20, "two " * 20])})
    prepare(source, "--tokenizer=byte")
    printed = capsys.readouterr().err
    assert printed.count("<|endoftext|> in the text is encoded as ordinary text") == 1
    assert "--split_documents" in printed
    directory = prepare(source, "--tokenizer=byte", "--split_documents", "--val_fraction=0.5")
    assert split_texts(directory, "train") == ["one " * 10, "two " * 10]
    assert "encoded as ordinary text" not in capsys.readouterr().err
    prepare(folder({"b.txt": "a | b " * 20}, "other"), "--tokenizer=byte")
    assert "encoded as ordinary text" not in capsys.readouterr().err


def test_files_of_the_user_in_the_directory_of_a_data_set_are_not_replaced(tmp_path):
    (tmp_path / "a.txt").write_text("some text " * 100)
    flags = [f"--data_dir={tmp_path}", "--name=set", "--tokenizer=byte"]
    assert run_main("prepare_data", tmp_path / "a.txt", *flags).status == 0
    for name in ("embeddings.bin", ".notes", "more.txt"):
        (tmp_path / "set" / name).write_text("more text " * 100)
        ended = run_main("prepare_data", tmp_path / "set" / name, *flags)
        assert ended.status == 2 and f"set would delete {name}: move that" in ended.err
        assert (tmp_path / "set" / "meta.json").exists()
        (tmp_path / "set" / name).unlink()
    (tmp_path / "set" / ".DS_Store").touch()
    assert run_main("prepare_data", tmp_path / "a.txt", *flags).status == 0


def test_an_unfinished_data_set_is_not_to_be_begun_anew(tmp_path):
    (tmp_path / ".set.partial").mkdir()  # nothing has been begun
    with pytest.raises(UserError, match="to get it: python"):
        open_data_set(tmp_path / "set")
    (tmp_path / "a.txt").write_text("some text " * 100)
    flags = [tmp_path / "a.txt", f"--data_dir={tmp_path}", "--name=set", "--tokenizer=byte"]
    assert run_main("prepare_data", *flags, "--part=1/2").status == 0
    with pytest.raises(UserError, match=r"its preparation is unfinished: run the same prepare_data\.py command again"):
        open_data_set(tmp_path / "set")


def test_a_tokenizer_without_a_model_is_not_to_be_finetuned(tmp_path, tiny_run):
    (tmp_path / "a.txt").write_text("tree sea stone road and east north rain dust a " * 30)
    flags = [tmp_path / "a.txt", f"--data_dir={tmp_path}"]
    ended = run_main("prepare_data", *flags, "--name=one", f"--tokenizer={tiny_run}/best")
    assert ended.status == 0 and f" --init_from={tiny_run}/best " in ended.err.splitlines()[-1], ended.err
    ended = run_main("prepare_data", *flags, "--name=two", f"--tokenizer={tmp_path}/one")
    assert ended.status == 0 and "next: python train.py" in ended.err and "--init_from" not in ended.err


@pytest.mark.skipif(os.name == "nt", reason="no SIGINT for one process")
def test_nothing_is_left_if_standard_input_is_interrupted(tmp_path):
    command = [sys.executable, "prepare_data.py", "-", "--name=x", "--tokenizer=byte", f"--data_dir={tmp_path}"]
    pipes = dict(stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen(command, cwd=ROOT, env=child_environment(), **pipes) as process:
        process.stdin.write("text")
        process.stdin.flush()
        end = time.monotonic() + 60
        while not list(tmp_path.glob(".x.partial/*stdin.txt*")) and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(0.5)  # Python notices a signal that comes just before a read only after it
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130 and process.stderr.read() == "stopped\n"
    assert not list(tmp_path.iterdir())
