"""tools/inspect_data.py: figures, documents and checksums of a data set."""

import json

import numpy as np
import pytest
from conftest import run_main

from plaingpt import tokens

DOCUMENTS = [f"Document {i}: " + "words and words " * (i % 7) for i in range(260)]


@pytest.fixture
def made(tmp_path):
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS))
    flags = [f"--data_dir={tmp_path}", "--name=set", "--tokenizer=gpt2"]
    assert run_main("prepare_data", tmp_path / "text.jsonl", *flags).status == 0
    return tmp_path / "set"


def test_it_prints_figures_and_documents_and_changes_nothing(made):
    before = {path.name: path.read_bytes() for path in made.iterdir()}
    result = run_main("tools.inspect_data", made)
    assert result.status == 0
    meta = json.loads((made / "meta.json").read_text())
    for split in ("train", "val"):
        figures = meta["splits"][split]
        assert (
            f"{split}: {figures['documents']:,} documents, {figures['tokens']:,} tokens, {figures['bytes']:,} bytes\n"
        ) in result.err
    assert "checksums and ids are correct" in result.err
    assert "document 1, 4 tokens: 'Document 0: '\n" in result.err
    assert {path.name: path.read_bytes() for path in made.iterdir()} == before


def test_a_data_set_is_found_by_the_name_that_train_takes(made, tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    made.rename(tmp_path / "data" / "books")
    monkeypatch.chdir(tmp_path)
    assert "data/books: from " in run_main("tools.inspect_data", "books").err


def test_after_an_interrupted_replacement_the_earlier_data_set_is_verified(made):
    made.rename(made.with_name(".set.old"))
    assert "checksums and ids are correct" in run_main("tools.inspect_data", made).err


def test_every_checksum_is_verified(made):
    ids = np.fromfile(made / "train.bin", np.uint16)
    ids[5] ^= 1
    ids.tofile(made / "train.bin")
    result = run_main("tools.inspect_data", made)
    assert result.status == 2 and "train.bin" in result.err and "checksums and ids are correct" not in result.err


def test_a_wrong_id_anywhere_in_a_data_set_without_meta_json_is_refused_with_its_file(tmp_path, monkeypatch):
    monkeypatch.setattr(tokens, "HASHED", 1000)
    monkeypatch.setattr(tokens, "SAMPLE", 100)
    for split, last in ("train", 60_000), ("val", 1):
        np.array([300] * 1000 + [last], np.uint16).tofile(tmp_path / f"{split}.bin")
    result = run_main("tools.inspect_data", tmp_path)
    assert result.status == 2 and "train.bin has the id 60000" in result.err and "are correct" not in result.err


def test_a_missing_data_set_is_refused_with_the_command_that_makes_it(tmp_path):
    missing = run_main("tools.inspect_data", tmp_path / "openwebtext")
    assert missing.status == 2 and "to get it: python prepare_data.py openwebtext" in missing.err


def test_nanogpts_data_set_is_described(tmp_path):
    for split in ("train", "val"):
        np.array([300, 301, 50256, 302], np.uint16).tofile(tmp_path / f"{split}.bin")
    result = run_main("tools.inspect_data", tmp_path)
    assert result.status == 0 and "train: 2 documents, 4 tokens\n" in result.err, result.err
    assert "document 1, 2 tokens: " in result.err and "no checksums; ids are correct" in result.err


def test_documents_are_counted_from_the_first_also_if_end_of_text_is_before_it(tmp_path):
    for split in ("train", "val"):  # as in llm.c's data sets
        np.array([50256, 300, 301, 50256, 302], np.uint16).tofile(tmp_path / f"{split}.bin")
    result = run_main("tools.inspect_data", tmp_path)
    assert "train: 2 documents, 5 tokens\n  document 1, 2 tokens: " in result.err
    assert "document 2, 1 token: " in result.err and "document 3" not in result.err
