"""Readers: text, JSON, CSV, Parquet and Hugging Face data sets, in batches that fit together."""

import contextlib
import csv
import gzip
import io
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

from plaingpt.console import RunFailed, UserError
from plaingpt.text import pipeline, readers, streams
from plaingpt.text.config import PrepareConfig
from plaingpt.text.sources import find_files, find_source
from plaingpt.tokenizer import gpt2, make_tokenizer

TEXTS = ["one", "two\nlines", "größer 字 👍", "", "a <|endoftext|> b", 'quotes " and \\', "x" * 3000]
TEXTS += map(str, range(60))
WHOLE = [text for text in TEXTS if text]


def source(*wanted, **options):
    return find_source(PrepareConfig(sources=list(map(str, wanted)), **options))


def read(*wanted, **options) -> list[str]:
    return list(source(*wanted, **options).texts(PrepareConfig(**options)))


def batches(*wanted, by_content: bool = True) -> list[pipeline.Batch]:
    inputs, config = source(*wanted).inputs(), PrepareConfig(val_fraction=0.05)
    return list(pipeline.batches(pipeline.Part(Path(), Path("none"), 1, inputs, config, gpt2(), by_content)))


@contextlib.contextmanager
def pieces(size: int):
    """Read `size` bytes at a time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(streams, "PIECE", size)
        yield


def json_lines(texts: list[str], column: str = "text") -> bytes:
    return "\n".join(json.dumps({"id": 1, column: text}) for text in texts).encode()


def write_parquet(path: Path, texts: list, column: str = "text", kind=None, rows: int = 7) -> Path:
    pq.write_table(pa.table({"id": list(range(len(texts))), column: pa.array(texts, kind)}), path, row_group_size=rows)
    return path


def compressed(folder: Path, suffix: str, data: bytes) -> Path:
    path = folder / f"texts.{suffix}"
    pack = {"gz": gzip.compress, "zst": partial(pa.compress, codec="zstd", asbytes=True)}.get(
        suffix.lower().split(".")[-1], bytes
    )
    path.write_bytes(pack(data))
    return path


@pytest.mark.parametrize("suffix", ["txt.gz", "txt.zst", "TXT.GZ"])
def test_a_compressed_text_is_a_document_named_or_in_a_folder(tmp_path, suffix):
    path = compressed(tmp_path, suffix, "größer 字\n".encode() * 3000)
    assert "".join(read(path)) == "".join(read(tmp_path)) == "größer 字\n" * 3000
    compressed(tmp_path, "tar.gz", b"name\0" * 100)
    path.write_bytes(path.read_bytes()[:20])
    (tmp_path / "good.txt").write_text("good")
    assert read(tmp_path) == ["good"]
    with pytest.raises(UserError, match="cannot be decompressed"):
        read(path)


# JSON Lines


@pytest.mark.parametrize("suffix", ["jsonl", "ndjson", "jsonl.gz", "jsonl.zst", "json.gz", "JSONL", "Json.GZ", "json"])
def test_each_line_is_a_document_plain_or_compressed(tmp_path, suffix):
    path = compressed(tmp_path, suffix, json_lines(TEXTS).replace(b"\n", b"\r\n\n", 3) + b"\n")
    assert read(path) == WHOLE


@pytest.mark.parametrize("suffix", ["json", "JSON", "json.gz", "jsonl"])
def test_an_array_of_objects_is_read_too(tmp_path, suffix):
    data = json.dumps([{"text": text} for text in [*TEXTS, None]], indent=1)
    assert read(compressed(tmp_path, suffix, b" \n" + data.encode())) == WHOLE
    with pytest.raises(UserError, match=r"the value at byte 0, has no 'text'; name the --column: other"):
        read(compressed(tmp_path, suffix, b'[{"text": "one"}, {"other": "two"}]'))
    with pytest.raises(UserError, match="the value at byte 0, is not JSON"):
        read(compressed(tmp_path, suffix, b'[{"text": "one"}, {"text"'))


@pytest.mark.parametrize("suffix", ["json", "json.gz"])
def test_an_indented_object_is_read_too(tmp_path, suffix):
    data = json.dumps({"title": "one", "text": TEXTS[0]}, indent=2).encode()
    assert read(compressed(tmp_path, suffix, data)) == WHOLE[:1]
    with pytest.raises(UserError, match="the value at byte 0, is not JSON: Extra data"):
        read(compressed(tmp_path, suffix, data + b"\n" + data))


def test_a_large_object_is_left_out_of_a_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(streams, "MAX_RECORD", 1000)
    (tmp_path / "map.json").write_text(json.dumps({"points": [1] * 1000}, indent=1))
    (tmp_path / "a.txt").write_text("text")
    find_files([str(tmp_path)], PrepareConfig())
    assert capsys.readouterr().err.endswith("1 skipped: 1 json damaged or without 'text' (--column)\n")


def test_a_json_file_that_is_no_documents_is_refused_when_it_is_named_and_left_out_of_a_folder(tmp_path, capsys):
    for name, text in {
        "a.json": '{\n"x": 1\n}',
        "b.json": '["a"]',
        "c.csv": "a,b\n1,2",
        "d.tsv": "",
        "e.txt": "text",
    }.items():
        (tmp_path / name).write_text(text)
    assert read(tmp_path) == ["text"]
    skipped = ", ".join(f"{kind} damaged or without 'text' (--column)" for kind in ("2 json", "1 csv", "1 tsv"))
    assert capsys.readouterr().err.endswith(f": 1 text; 4 skipped: {skipped}\n")
    for name in ("a.json", "b.json", "c.csv", "d.tsv"):
        with pytest.raises(UserError, match=name):
            read(tmp_path / name)


def test_json_lines_and_parquet_that_are_no_documents_stop_a_folder_unless_they_are_skipped(tmp_path):
    (tmp_path / "a.txt").write_text("text")
    for name, content in (("metrics.jsonl", b'{"step": 1}\n'), ("b.parquet", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=name):
            read(tmp_path)
        assert read(tmp_path, bad_files="skip") == ["text"]
        (tmp_path / name).unlink()


@pytest.mark.parametrize("name", ["a.csv", "a.json"])
def test_a_table_in_another_encoding_stops_a_folder_and_is_not_left_out(tmp_path, name):
    data = "text\ncafé\n" if name == "a.csv" else json.dumps([{"text": "café"}], ensure_ascii=False)
    (tmp_path / name).write_bytes(data.encode("latin-1"))
    (tmp_path / "b.txt").write_text("text")
    with pytest.raises(UserError, match="is not UTF-8 text"):
        read(tmp_path)
    assert read(tmp_path, encoding="latin-1") == ["café", "text"]


@pytest.mark.parametrize(
    ("name", "data"),
    [("a.csv", "text,n\nhello, world,1\n"), ("a.tsv", 'text\n"open\n'), ("a.json", '[{"text": "' + "x" * 900 + '"}]')],
)
def test_documents_that_cannot_be_read_stop_a_folder_and_are_not_left_out(tmp_path, monkeypatch, name, data):
    monkeypatch.setattr(streams, "MAX_RECORD", 800)
    (tmp_path / name).write_text(data)
    (tmp_path / "b.txt").write_text("text")
    with pytest.raises(UserError, match=r"has 3 columns|cannot be read|is longer than"):
        read(tmp_path)
    assert read(tmp_path, bad_files="skip") == ["text"]


@pytest.mark.parametrize(
    ("suffix", "size"), [("csv", 10), ("CSV", 10), ("tsv", 10), ("csv.gz", 10), ("csv.gz", 1 << 20), ("tsv.zst", 10)]
)
def test_each_row_of_csv_and_tsv_is_a_document(tmp_path, suffix, size):
    file = io.StringIO(newline="")
    writer = csv.writer(file, delimiter="\t" if suffix.startswith("t") else ",")
    writer.writerows([["id", "text"], *([i, text] for i, text in enumerate(TEXTS))])
    for data in (file.getvalue().encode(), b"\xef\xbb\xbf" + file.getvalue().replace("\r\n", "\n").encode()):
        with pieces(size):
            assert read(compressed(tmp_path, suffix, data)) == [text.replace("\r\n", "\n") for text in WHOLE]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"id,content\n1,a", "has no column 'text'; name the --column: id, content"),
        (b"\nid,content\n1,a", "has no column 'text'; name the --column: id, content"),
        (b"text;n\na;1", "has no column 'text'; the separator has to be a comma (in .tsv, a tab): text;n"),
        (b"text,text\na,b", "has more than one column 'text'"),
        (b"id,text\n1,a\n2\n", "line 3 has 1 column, but the header has 2: put quotes around the text"),
        (b"text\nHello, world\n", "line 2 has 2 columns, but the header has 1: put quotes around the text"),
        (b'id,text\n1,"Hello," he said\n', "line 2 cannot be read: ',' expected after '\"'"),
        (b"id,text\n1,a\n2,\xff\n", "line 3 is not UTF-8 text (byte 0xff at 0)"),
        (b'id,text\n1,"a\n2,b\n', "line 2 cannot be read: unexpected end of data"),
        (b'id,text\n1,a\n\n\n2,"b\n', "line 5 cannot be read: unexpected end of data"),
    ],
)
def test_a_csv_row_that_is_no_document_is_refused_with_its_place(tmp_path, data, message):
    with pytest.raises(UserError, match=re.escape(message)):
        read(compressed(tmp_path, "csv", data))


def test_the_column_is_named_and_a_missing_one_refused_with_the_nearest(tmp_path):
    path = compressed(tmp_path, "jsonl", json_lines(["one"], "content"))
    assert read(path, column="content") == ["one"]
    with pytest.raises(UserError, match=r"the line at byte 0, has no 'contents'; name the --column"):
        read(path, column="contents")
    with pytest.raises(UserError, match=r"the line at byte 0, has no 'text'; name the --column: id, content$"):
        read(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": "one"', "the line at byte 16, is not JSON"),
        (b'"one"', "has no 'text'; write JSON objects with this field"),
        (b"{}", "has no 'text'; write JSON objects with this field"),
        (b'{"text": 1}', "'text' is not text"),
        (b'{"text": "\xff"}', "is not UTF-8 text (byte 0xff at 10)"),
        (b'{"text": "\\ud800"}', "is not UTF-8 text (byte 0xed at 0)"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"text": "one"}{"text": "two"}', "the line at byte 16, is not JSON: Extra data"),
        (b'{"text": "one"}\r{"text": "two"}\r', "the line at byte 16, is not JSON: Extra data"),
        (b'{\n"text":\n"one"\n}', "the line at byte 16, is not JSON"),
    ],
)
def test_a_line_that_is_no_document_is_refused_with_its_place(tmp_path, line, message):
    path = compressed(tmp_path, "jsonl", b'{"text": "one"}\n' + line + b'\n{"text": "two"}\n')
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        read(path)
    assert str(caught.value).startswith(str(path))


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
def test_each_row_is_a_document(tmp_path, kind):
    texts = [text.encode() for text in TEXTS] if kind in (pa.binary(), pa.large_binary()) else TEXTS
    path = write_parquet(tmp_path / "texts.parquet", [*texts, None], kind=kind)
    assert read(path) == WHOLE


def test_a_file_without_the_column_or_without_text_in_it_is_refused(tmp_path):
    path = write_parquet(tmp_path / "texts.parquet", ["one"], "content")
    with pytest.raises(UserError, match=r"has no column 'text'.*name the --column: id, content"):
        read(path)
    with pytest.raises(UserError, match="column 'id' is int64, not text"):
        read(path, column="id")
    assert read(path, column="content") == ["one"]


def test_a_column_of_nulls_alone_has_no_documents_and_one_named_twice_is_refused(tmp_path):
    write_parquet(tmp_path / "a.parquet", [None, None], kind=pa.null())
    write_parquet(tmp_path / "b.parquet", ["b"])
    assert read(tmp_path) == ["b"]
    twice = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], ["text", "text"])
    pq.write_table(twice, tmp_path / "c.parquet")
    with pytest.raises(UserError, match=r"c\.parquet has more than one column 'text'"):
        read(tmp_path)


def test_a_damaged_parquet_file_is_refused(tmp_path):
    path = write_parquet(tmp_path / "texts.parquet", TEXTS)
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    with pytest.raises(UserError, match=r"texts\.parquet is not a Parquet file, or is damaged"):
        read(path)
    path.write_bytes(b"\xff" * 200 + whole[200:])
    with pytest.raises(UserError, match=r"texts\.parquet is not a Parquet file, or is damaged"):
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
def test_a_large_file_in_pieces_has_the_text_and_the_tokens_of_the_whole(tmp_path, seed):
    text = made_text(random.Random(seed), 1500)
    path = tmp_path / "large.txt"
    for data in (b"\xef\xbb\xbf" + text.encode(), text.encode("utf-16")):
        path.write_bytes(data)
        for size in (500, 1 << 20):
            with pieces(size):
                parts = batches(path)
            texts = [text.decode() for part in parts for found in part.splits.values() for text in found]
            assert len(texts) == len(parts) and "".join(texts) == text
            assert len({split for part in parts for split in part.splits}) == 1
            for tokenizer in (gpt2(), make_tokenizer("bpe", [text], 300)):
                assert [i for part in texts for i in tokenizer.encode(part)] == tokenizer.encode(text)
            assert [bool(part.continued) for part in parts] == [False] + [True] * (len(parts) - 1)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-16"])
def test_of_few_documents_the_tail_of_a_large_one_goes_to_validation(tmp_path, encoding):
    path = tmp_path / "large.txt"
    path.write_text("some words " * 100, encoding)
    with pieces(300):
        parts = batches(path, by_content=False)
    texts = {split: b"".join(b"".join(part.splits[split]) for part in parts).decode() for split in ("train", "val")}
    assert texts["train"] + texts["val"] == "some words " * 100
    assert len(texts["val"]) == pytest.approx(0.05 * 1100, abs=12)
    for split in ("train", "val"):
        continued = [split in part.continued for part in parts if part.splits[split]]
        assert continued == [False] + [True] * (len(continued) - 1)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_the_size_of_a_large_text_is_that_of_its_pieces(tmp_path, encoding):
    path, config = tmp_path / "large.txt", PrepareConfig()
    path.write_bytes("".join(random.Random(0).choices(["\r\n", "\r", "\n", "a ", "ß"], k=2000)).encode(encoding))
    (file,) = source(path).inputs()
    for size in range(300, 320):
        with pieces(size):
            assert readers.text_size(file, config) == sum(len(piece.data) for piece in file.texts(config))


def test_a_text_without_spaces_is_cut_between_characters(tmp_path):
    path = tmp_path / "large.txt"
    path.write_text("字é👍" * 300, "utf-8")
    with pieces(50):
        assert "".join(read(path)) == "字é👍" * 300
        assert len(read(path)) > 20


def test_bytes_that_are_no_text_in_a_large_file_are_named_by_their_place(tmp_path):
    path = tmp_path / "large.txt"
    path.write_bytes(b"some words " * 100 + b"\xff" + b" more words" * 100)
    with pieces(300):
        with pytest.raises(UserError, match=r"byte 0xff at 1,100\)"):
            read(path)
        assert "".join(read(path, bad_files="replace")).count("\ufffd") == 1


def test_each_piece_of_a_large_file_that_is_no_text_is_skipped_with_one_note(tmp_path, capsys):
    (tmp_path / "a.txt").write_bytes((b"some words " * 100 + b"\xff") * 2 + b" more words" * 100)
    (tmp_path / "b.txt").write_text("good " * 100)
    with pieces(300):
        for _ in range(2):
            text = "".join(read(tmp_path, bad_files="skip"))
            assert text.endswith("good " * 100) and 3000 < len(text) < 3700
    notes = [f"skipped: {tmp_path}/a.txt is not UTF-8 text (byte 0xff at {at})\n" for at in ("1,100", "2,201")]
    skipped = [line for line in capsys.readouterr().err.splitlines(keepends=True) if line.startswith("skipped")]
    assert skipped == notes


# encodings

SAMPLE = "Größe, naïve, 字 👍\r\nline\n\u2028end"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig"])
@pytest.mark.parametrize("suffix", ["txt", "jsonl", "csv", "tsv", "json"])
def test_a_byte_order_mark_names_the_encoding(tmp_path, encoding, suffix):
    data = SAMPLE if suffix == "txt" else json.dumps([{"text": SAMPLE}], ensure_ascii=False)
    if suffix == "jsonl":
        data = data[1:-1]
    elif suffix in ("csv", "tsv"):
        data = f'text\n"{SAMPLE}"\n'
    (tmp_path / f"a.{suffix}").write_bytes(data.encode(encoding))
    for bad_files in ("stop", "skip", "replace"):
        assert read(tmp_path, bad_files=bad_files) == [SAMPLE.replace("\r\n", "\n") if suffix == "txt" else SAMPLE]


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "utf-16-le", "utf-16-be", "koi8-r"])
def test_another_encoding_is_named(tmp_path, encoding):
    text = "Привет" * 9 if encoding == "koi8-r" else "Größe, naïve" * 9
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    (tmp_path / "b.txt").write_text("with a mark", "utf-8-sig")
    for size in (30, 1 << 20):
        with pieces(size):
            assert "".join(read(tmp_path, encoding=encoding)) == text + "with a mark"
    (tmp_path / "a.txt").write_text(text)
    assert "".join(read(tmp_path, encoding="utf-8-sig")) == text + "with a mark"


def test_an_unknown_encoding_and_text_in_another_are_refused(tmp_path):
    (tmp_path / "a.txt").write_bytes("Größe".encode("utf-16")[:-1])
    for name in ("nothing", "base64", "utf\0"):
        with pytest.raises(UserError, match=r"--encoding=.*: unknown; examples: latin-1"):
            read(tmp_path, encoding=name)
    for bad_files in ("stop", "replace"):
        with pytest.raises(UserError, match=r"a\.txt is damaged, or not text in utf-16: .*truncated data"):
            read(tmp_path / "a.txt", bad_files=bad_files)


def test_utf_16_without_a_mark_is_binary(tmp_path):
    (tmp_path / "b.txt").write_bytes("UTF-16 without a mark".encode("utf-16-le"))
    with pytest.raises(UserError, match=r"b\.txt is binary, not text: convert it to text, name its --encoding"):
        read(tmp_path / "b.txt", bad_files="replace")


# <|endoftext|> between documents


def test_text_files_are_split_at_end_of_text_on_request(tmp_path):
    texts = [f"Document {i}\nof many" for i in range(40)]
    (tmp_path / "a.txt").write_text("\n<|endoftext|>\n".join(texts) + "<|endoftext|>")
    assert len(read(tmp_path)) == 1
    for size in (3, 30, 1 << 20):
        with pieces(size):
            assert read(tmp_path, split_documents=True) == texts


# bounded memory


@pytest.mark.parametrize("suffix", ["jsonl", "jsonl.gz", "jsonl.zst", "csv", "csv.zst", "json.gz", "txt"])
def test_what_is_longer_than_any_document_is_refused_while_it_is_read(tmp_path, monkeypatch, suffix):
    monkeypatch.setattr(streams, "MAX_RECORD", 1000)
    start = {"c": b'text\n"', "t": b""}.get(suffix[0], b'[{"text": "' if suffix == "json.gz" else b'{"text": "')
    path = compressed(tmp_path, suffix, start + b"a" * 100_000)
    with pieces(100), pytest.raises(UserError, match=r"texts\..*(longer|more|larger) than "):
        read(path, split_documents=True)


def test_equal_rows_that_take_little_room_in_a_file_make_batches_of_bounded_size(tmp_path):
    pq.write_table(pa.table({"text": ["a" * 100_000] * 300}), tmp_path / "a.parquet", compression="zstd")
    assert (tmp_path / "a.parquet").stat().st_size < 1000
    assert [sum(map(len, batch.splits.values())) for batch in batches(tmp_path)] == [11] * 27 + [3]


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


@pytest.mark.parametrize(("split", "shards"), [("train", 3), ("train[:100%]", 1)])
def test_a_data_set_is_streamed_and_a_part_of_a_split_read_from_a_copy(repository, split, shards):
    found = source(f"hf:{repository}", split=split)
    assert found.name == "stories" and len(found.inputs()) == shards
    assert f"--split={split}" in found.description.replace("'", "")
    assert read(f"hf:{repository}", split=split) == [text for i in range(3) for text in WHOLE[i::3]]
    assert read(f"hf:{repository}", split=split.replace("train", "validation")) == ["for validation"]


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_a_data_set_in_compressed_files_is_read(repository, suffix):
    for path in repository.glob("data/*.parquet"):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in pq.read_table(path)["text"].to_pylist())
        compressed(path.parent, f"jsonl.{suffix}", lines.encode()).rename(path.with_suffix(f".jsonl.{suffix}"))
        path.unlink()
    assert read(f"hf:{repository}") == [text for i in range(3) for text in WHOLE[i::3]]


def test_what_a_data_set_does_not_have_is_refused(repository):
    with pytest.raises(UserError, match=r"hf:.*stories cannot be opened: .*test"):
        read(f"hf:{repository}", split="test")
    with pytest.raises(UserError, match="no column 'content'"):
        read(f"hf:{repository}", column="content")
    with pytest.raises(UserError, match="cannot be opened"):
        read(f"hf:{repository}", config="french")
    assert len(read(f"hf:{repository}", split="train[:10%]")) == round(len(WHOLE) / 10)


def test_another_state_of_a_folder_is_another_source(repository):
    def described() -> str:
        return source(f"hf:{repository}").description

    before = described()
    assert described() == before
    write_parquet(next(repository.glob("data/train-00001*")), ["other texts"] * len(WHOLE[1::3]))
    assert described() != before


def test_a_data_set_of_text_files_is_refused_because_its_documents_would_be_lines(tmp_path):
    (tmp_path / "train.txt").write_text("a road\n\nthe sea\n")
    with pytest.raises(UserError, match=rf"^hf:{tmp_path} consists of text files: name their directory, without hf:"):
        read(f"hf:{tmp_path}")


def test_a_data_set_that_breaks_off_is_a_failure_to_be_tried_again(repository):
    found = source(f"hf:{repository}")
    next(repository.glob("data/train-00001*")).unlink()
    with pytest.raises(RunFailed, match=r"shard 1 cannot be read \(run again to continue\): "):
        list(found.texts(PrepareConfig()))


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
