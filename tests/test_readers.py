"""Readers: text, JSON Lines, Parquet and Hugging Face data sets, as wholes and in parts that fit together."""

import gzip
import json
import random
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_tokenizer import ANY_TEXT

from plaingpt.console import RunFailed, UserError
from plaingpt.text import arrow, readers, sources
from plaingpt.text.sources import find_source
from plaingpt.tokenizer import gpt2, make_tokenizer
from prepare_data import PrepareConfig

TEXTS = ["one", "two\nlines", "größer 字 👍", "", "a <|endoftext|> b", 'quotes " and \\', "x" * 3000]
TEXTS += map(str, range(60))
WHOLE = [text for text in TEXTS if text]


def source(*wanted, **options):
    return find_source(list(map(str, wanted)), PrepareConfig(**options))


def read(*wanted, unit_bytes: int = 1 << 62, **options) -> list[str]:
    found = source(*wanted, **options)
    documents = [d for item in found.items(unit_bytes) for d in item.documents(found.column, found.bad_files)]
    return [text.decode() for d in documents for text in d.texts]


def json_lines(texts: list[str], column: str = "text") -> bytes:
    return "\n".join(json.dumps({"id": 1, column: text}) for text in texts).encode()


def write_parquet(path: Path, texts: list, column: str = "text", kind=None, rows: int = 7) -> Path:
    pq.write_table(pa.table({"id": list(range(len(texts))), column: pa.array(texts, kind)}), path, row_group_size=rows)
    return path


def compressed(folder: Path, suffix: str, data: bytes) -> Path:
    path = folder / f"texts.{suffix}"
    pack = {"gz": gzip.compress, "zst": partial(pa.compress, codec="zstd", asbytes=True)}.get(
        suffix.split(".")[-1], bytes
    )
    path.write_bytes(pack(data))
    return path


# JSON Lines


@pytest.mark.parametrize("suffix", ["jsonl", "ndjson", "jsonl.gz", "jsonl.zst", "json.gz"])
def test_each_line_is_a_document_plain_or_compressed(tmp_path, suffix):
    path = compressed(tmp_path, suffix, json_lines(TEXTS).replace(b"\n", b"\r\n\n", 3) + b"\n")
    assert read(path) == WHOLE


@pytest.mark.parametrize("unit_bytes", [1, 7, 100, 5000])
def test_parts_of_a_file_hold_each_line_once(tmp_path, unit_bytes):
    assert read(compressed(tmp_path, "jsonl", json_lines(TEXTS)), unit_bytes=unit_bytes) == WHOLE


def test_the_column_is_named_and_a_missing_one_refused_with_the_nearest(tmp_path):
    path = compressed(tmp_path, "jsonl", json_lines(["one"], "content"))
    assert read(path, column="content") == ["one"]
    with pytest.raises(UserError, match=r"the line at byte 0, has no 'contents'; did you mean content\?.*--column"):
        read(path, column="contents")
    with pytest.raises(UserError, match=r"the line at byte 0, has no 'text'; name the --column: id, content$"):
        read(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "one"', "the line at byte 16, is not JSON"),
        (b'["one"]', "has no 'text'; a line has to be a JSON object"),
        (b'{"text": 1}', "'text' is no text"),
        (b'{"text": "\xff"}', "is not UTF-8 text (byte 0xff at 10)"),
        (b'{"text": "\\ud800"}', "is not UTF-8 text (byte 0xed at 0)"),
        (b"[" * 100_000, "is not JSON"),
    ],
)
def test_a_line_that_is_no_document_is_refused_with_its_place(tmp_path, line, message):
    path = compressed(tmp_path, "jsonl", b'{"text": "one"}\n' + line + b'\n{"text": "two"}\n')
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        read(path)
    assert str(caught.value).startswith(str(path))


@given(st.lists(st.tuples(ANY_TEXT, st.booleans(), st.none() | st.integers() | st.floats() | ANY_TEXT)), st.data())
def test_lines_read_at_once_are_those_read_one_by_one(tmp_path_factory, rows, data):
    lines = [json.dumps({"other": [other], "text": text}, ensure_ascii=ascii) for text, ascii, other in rows]
    path = compressed(tmp_path_factory.mktemp("lines"), "jsonl", "\n".join(lines).encode())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(readers, "PIECE", data.draw(st.integers(2, 200)))
        assert read(path, unit_bytes=data.draw(st.integers(1, 300))) == [text for text, _, _ in rows if text]


def test_lines_are_read_at_once_where_each_has_a_text_and_none_is_very_long(monkeypatch):
    lines = b'{"text": "one", "more": [1]}\n{"text": ""}\n{"text": "\\u00e9"}'
    assert arrow.json_texts(lines, "text") == [b"one", b"", "é".encode()]
    assert arrow.json_texts(lines + b'\n{"text": null}', "text") is None
    monkeypatch.setattr(arrow, "LONG_LINE", len(lines) - 1)
    assert arrow.json_texts(lines, "text") is None


def test_a_line_that_has_to_be_looked_at_alone_changes_nothing_in_those_around(tmp_path):
    lines = ['{{"text": "line {}"}}', '{{"text": "no", "text": "line {}"}}', '{{"text": null, "number": {}}}']
    path = compressed(tmp_path, "jsonl", "\n".join(lines[i % 3].format(i) for i in range(30)).encode())
    assert read(path, unit_bytes=100) == [f"line {i}" for i in range(30) if i % 3 < 2]


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (b'{"text": "one"}{"text": "two"}', "the line at byte 0, is not JSON: Extra data"),
        (b'{"text": "one"}\r{"text": "two"}\r', "the line at byte 0, is not JSON: Extra data"),
        (b'{\n"text":\n"one"\n}\n{"text": "two"}', "the line at byte 0, is not JSON"),
        (b'{"other": "\xff", "text": "one"}\n{"text": "two"}', "is not UTF-8 text (byte 0xff at 11)"),
    ],
)
def test_what_is_refused_does_not_hang_on_the_lines_around(tmp_path, lines, message):
    for around in (b"", b'\n{"text": null}'):  # which has all of them looked at one by one
        with pytest.raises(UserError, match=re.escape(message)):
            read(compressed(tmp_path, "jsonl", lines + around))


def test_a_column_that_cannot_be_a_name_is_missing(tmp_path):
    with pytest.raises(UserError, match=r"has no '\\udcff'"):
        read(compressed(tmp_path, "jsonl", b'{"text": "one"}'), column="\udcff")


def test_null_is_no_document(tmp_path):
    assert read(compressed(tmp_path, "jsonl", b'{"text": null}\n{"text": "two"}')) == ["two"]


@pytest.mark.parametrize("suffix", ["jsonl.gz", "jsonl.zst"])
def test_a_compressed_file_that_is_cut_or_damaged_is_refused(tmp_path, suffix):
    data = json_lines([str(random.Random(0).random()) for _ in range(5000)])
    path = compressed(tmp_path, suffix, data)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=rf"texts\.{suffix}.* (cannot be decompressed|is not JSON)"):
        read(path)
    whole = bytearray(compressed(tmp_path, suffix, data).read_bytes())
    whole[10:] = b"\xff" * len(whole[10:])  # after gzip's header
    for damaged in (whole, b"nothing of that kind"):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="cannot be decompressed"):
            read(path)


# Parquet


@given(st.binary() | ANY_TEXT.map(str.encode))
def test_text_is_found_to_be_utf8_without_making_a_string(data):
    try:
        data.decode()
        assert arrow.is_utf8(data)
    except UnicodeDecodeError:
        assert not arrow.is_utf8(data)


@pytest.mark.parametrize(
    "kind",
    [
        pa.string(),
        pa.large_string(),
        pa.string_view(),
        pa.binary(),
        pa.large_binary(),
        pa.dictionary(pa.int32(), pa.string()),
    ],
)
@pytest.mark.parametrize("unit_bytes", [1, 200, 1 << 62])
def test_each_row_is_a_document(tmp_path, kind, unit_bytes):
    texts = [text.encode() for text in TEXTS] if kind in (pa.binary(), pa.large_binary()) else TEXTS
    path = write_parquet(tmp_path / "texts.parquet", [*texts, None], kind=kind)
    assert read(path, unit_bytes=unit_bytes) == WHOLE


def test_a_file_without_the_column_or_without_text_in_it_is_refused(tmp_path):
    path = write_parquet(tmp_path / "texts.parquet", ["one"], "content")
    with pytest.raises(UserError, match=r"has no column 'text'.*name the --column: id, content"):
        read(path)
    with pytest.raises(UserError, match="column 'id' is int64, no text"):
        read(path, column="id")
    assert read(path, column="content") == ["one"]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_the_parts_of_a_file_are_together_as_large_as_it(tmp_path, suffix):
    path = tmp_path / f"texts.{suffix}"
    path.write_bytes(json_lines(TEXTS)) if suffix == "jsonl" else write_parquet(path, TEXTS)
    few, many = ([readers.size_of(item) for item in source(path).items(size)] for size in (1 << 62, 200))
    assert sum(few) == sum(many) and len(few) == 1 and len(many) > 5


def test_a_damaged_parquet_file_is_refused(tmp_path):
    path = write_parquet(tmp_path / "texts.parquet", TEXTS)
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    with pytest.raises(UserError, match=r"texts\.parquet is no Parquet file, or a damaged one"):
        read(path)
    path.write_bytes(b"\xff" * 200 + whole[200:])
    with pytest.raises(UserError, match=r"texts\.parquet is no Parquet file, or a damaged one"):
        read(path)


# text that is not UTF-8


def test_a_character_in_two_rows_is_text_in_neither(tmp_path, capsys):
    path = write_parquet(tmp_path / "halves.parquet", ["é".encode()[:1], "é".encode()[1:], b"good"], kind=pa.binary())
    assert read(path, bad_files="skip") == ["good"]
    assert capsys.readouterr().err.count("skipped: ") == 2


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "parquet"])
def test_bytes_that_are_no_text_are_refused_skipped_or_replaced_by_choice(tmp_path, capsys, suffix):
    path = tmp_path / f"bad.{suffix}"
    if suffix == "parquet":
        write_parquet(path, [b"ab\xffcd", b"good"], kind=pa.binary())
    elif suffix == "jsonl":
        path.write_bytes(b'{"text": "ab\xffcd"}\n{"text": "good"}')
    else:
        path.write_bytes(b"ab\xffcd")
    good = [] if suffix == "txt" else ["good"]
    with pytest.raises(UserError, match=r"is not UTF-8 text \(byte 0xff .*--bad_files=skip.*--bad_files=replace"):
        read(path)
    assert read(path, bad_files="skip") == good
    assert f"skipped: {path}" in capsys.readouterr().err
    assert read(path, bad_files="replace") == ["ab\ufffdcd", *good]


# large text files


def made_text(rng: random.Random, n: int) -> str:
    words = [*" \n\t1é字!\u00a0\x1c", "tree", "  ", "\n\n", " and", " 👍", "'s", "def f:\n    "]
    return "".join(rng.choice(words) for _ in range(n))


@pytest.mark.parametrize("seed", range(5))
def test_a_large_file_in_parts_has_the_text_and_the_tokens_of_the_whole(tmp_path, monkeypatch, seed):
    monkeypatch.setattr(sources, "LARGE", 100)
    monkeypatch.setattr(readers, "PIECE", 70)
    text = made_text(random.Random(seed), 1500)
    path = tmp_path / "large.txt"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    found = source(path, val_fraction=None)
    for unit_bytes in (40, 150, 1 << 62):
        parts = [d for i in found.items(unit_bytes) for d in i.documents("text", "stop")]
        texts = [text.decode() for part in parts for text in part.texts]
        assert len(texts) == len(parts) and "".join(texts) == text
        assert len({part.split for part in parts}) == 1
        for tokenizer in (gpt2(), make_tokenizer("bpe", [text], 300)):
            assert [i for part in texts for i in tokenizer.encode(part)] == tokenizer.encode(text)
        assert [part.begins for part in parts] == [True] + [False] * (len(parts) - 1)


def test_of_few_documents_the_tail_of_a_large_one_goes_to_validation(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "LARGE", 100)
    path = tmp_path / "large.txt"
    path.write_text("some words " * 100)
    found = source(path)
    parts = [d for i in found.items(300, by_content=False) for d in i.documents("text", "stop")]
    texts = {split: b"".join(d.texts[0] for d in parts if d.split == split).decode() for split in ("train", "val")}
    assert texts["train"] + texts["val"] == "some words " * 100
    assert len(texts["val"]) == pytest.approx(0.05 * 1100, abs=12)


def test_a_text_without_spaces_is_cut_between_characters(tmp_path, monkeypatch):
    for name, value in {"PIECE": 50, "WINDOW": 60}.items():
        monkeypatch.setattr(readers, name, value)
    monkeypatch.setattr(sources, "LARGE", 100)
    path = tmp_path / "large.txt"
    path.write_text("字é👍" * 300, "utf-8")
    assert "".join(read(path, unit_bytes=77)) == "字é👍" * 300


def test_bytes_that_are_no_text_in_a_large_file_are_named_by_their_place(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "LARGE", 100)
    path = tmp_path / "large.txt"
    path.write_bytes(b"some words " * 100 + b"\xff" + b" more words" * 100)
    with pytest.raises(UserError, match=r"byte 0xff at 1,100\)"):
        read(path, unit_bytes=300)
    assert "".join(read(path, unit_bytes=300, bad_files="replace")).count("\ufffd") == 1


def test_a_large_file_that_is_no_text_is_skipped_whole_with_one_note(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sources, "LARGE", 100)
    (tmp_path / "a.txt").write_bytes(b"some words " * 100 + b"\xff" + b" more words" * 100)
    (tmp_path / "b.txt").write_text("good " * 100)
    for _ in range(2):
        assert "".join(read(tmp_path, unit_bytes=300, bad_files="skip")) == "good " * 100
    assert capsys.readouterr().err == f"skipped: {tmp_path}/a.txt is not UTF-8 text (byte 0xff at 1,100)\n"


# Hugging Face data sets: a folder here has the form of a repository there


@pytest.fixture
def repository(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "owner" / "stories"
    (folder / "data").mkdir(parents=True)
    for i in range(3):
        write_parquet(folder / "data" / f"train-{i:05}-of-00003.parquet", WHOLE[i::3])
    write_parquet(folder / "data" / "validation-00000-of-00001.parquet", ["for validation"])
    return folder


@pytest.mark.parametrize("streaming", [True, False])
def test_a_data_set_is_read_streamed_or_from_a_copy(repository, streaming):
    found = source(f"hf:{repository}", streaming=streaming)
    assert found.name == "stories"
    assert read(f"hf:{repository}", streaming=streaming) == [text for i in range(3) for text in WHOLE[i::3]]
    assert len(list(found.items(1))) >= 3  # which can be read apart
    assert read(f"hf:{repository}", streaming=streaming, split="validation") == ["for validation"]


def test_what_a_data_set_does_not_have_is_refused(repository):
    with pytest.raises(UserError, match=r"hf:.*stories cannot be opened: .*test"):
        read(f"hf:{repository}", split="test")
    with pytest.raises(UserError, match="no column 'content'"):
        read(f"hf:{repository}", column="content")
    with pytest.raises(UserError, match="cannot be opened"):
        read(f"hf:{repository}", config="french")


def test_another_state_of_a_folder_is_another_source(repository):
    def described() -> str:
        return repr(list(source(f"hf:{repository}").items(1)))

    before = described()
    assert described() == before
    write_parquet(next(repository.glob("data/train-00001*")), ["other texts"] * len(WHOLE[1::3]))
    assert described() != before


def test_a_data_set_that_breaks_off_is_a_failure_to_be_tried_again(repository):
    found = source(f"hf:{repository}")
    next(repository.glob("data/train-00001*")).unlink()
    with pytest.raises(RunFailed, match=r"shard 1 cannot be read: .*; run again to go on"):
        [d for item in found.items(1) for d in item.documents("text", "stop")]


@pytest.mark.parametrize(
    ("name", "repository", "expected"),
    [
        ("openwebtext", "Skylion007/openwebtext", {"revision": "79d93d786212f7344586290adb811d4ae6a1762c"}),
        ("fineweb_edu", "HuggingFaceFW/fineweb-edu", {"config": "sample-10BT", "revision": "5" * 40}),
        ("tinystories", "roneneldan/TinyStories", {"revision": "5" * 40}),
    ],
)
def test_named_sources_ask_the_hub_for_these(monkeypatch, name, repository, expected):
    import datasets

    asked = []

    def load_dataset(repository, config, **options):
        asked.append((repository, {"config": config} | options))
        return datasets.IterableDataset.from_generator(lambda: iter([{"text": "a", "id": 1}]))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    found = source(name, revision=None if name == "openwebtext" else "5" * 40)
    assert asked == [(repository, {"config": None, "split": "train", "streaming": True} | expected)]
    assert (found.name, found.tokenizer) == (name, "gpt2")


def test_without_the_network_the_hub_is_one_line(tmp_path):
    code = "import sys, prepare_data; from plaingpt.console import run_script; run_script(prepare_data.main)"
    ended = subprocess.run(
        [sys.executable, "-c", code, "hf:owner/name"],
        env={"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(Path(__file__).parent.parent), "HF_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert ended.returncode == 2, ended.stderr
    assert re.fullmatch(r"-c: hf:owner/name cannot be opened: .*\n", ended.stderr)
