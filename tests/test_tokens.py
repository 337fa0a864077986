"""Token files: what was written is what is read, and no damage is trained on."""

import hashlib
import json
import os
import pickle
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT, child_environment, run_main

import plaingpt.tokens
from plaingpt.console import UserError
from plaingpt.files import new_directory, sha256
from plaingpt.tokenizer import make_tokenizer
from plaingpt.tokens import Tokens, id_dtype, open_data_set

TRAIN, VAL = ["one document", "another: é"], ["the last"]


@pytest.fixture
def data_set(tmp_path):
    """A data set of bytes: ids below 256, and 256 between two documents."""
    tokenizer = make_tokenizer("byte", [], 1)
    with new_directory(tmp_path / "tiny") as new:
        splits = {}
        for split, texts in (("train", TRAIN), ("val", VAL)):
            ids = np.array([i for text in texts for i in (*text.encode(), 256)][:-1], np.uint16)
            ids.tofile(new / f"{split}.bin")
            files = [{"name": f"{split}.bin", "tokens": len(ids), "sha256": sha256(new / f"{split}.bin")}]
            splits[split] = {"bytes": sum(len(t.encode()) for t in texts), "files": files}
        tokenizer.save(new)
        meta = {"format_version": 1, "vocab_size": 257, "dtype": "uint16", "splits": splits}
        (new / "meta.json").write_text(json.dumps(meta))
    return tmp_path / "tiny"


def edit_meta(data_set, change):
    (data_set / "SHA256SUMS").unlink(missing_ok=True)  # what follows has to be seen without it
    path = data_set / "meta.json"
    meta = json.loads(path.read_text())
    change(meta)
    path.write_text(json.dumps(meta))


def refusal(directory, **options) -> str:
    with pytest.raises(UserError) as caught:
        open_data_set(directory, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def ids(tokens: Tokens) -> list[int]:
    return np.concatenate(list(tokens.all())).tolist()


# what is written is what is read


def test_a_data_set_opens_with_the_ids_and_the_tokenizer_that_were_written(data_set):
    data = open_data_set(data_set)
    assert ids(data.train) == [*TRAIN[0].encode(), 256, *TRAIN[1].encode()]
    assert ids(data.val) == list(VAL[0].encode())
    assert (len(data.train), len(data.val)) == (24, 8)
    assert (data.train.n_bytes, data.val.n_bytes) == (23, 8)
    assert data.tokenizer.same_as(make_tokenizer("byte", [], 1))


def test_ids_are_little_endian_and_as_short_as_the_vocabulary_allows(data_set):
    assert (data_set / "val.bin").read_bytes() == b"".join(bytes([byte, 0]) for byte in VAL[0].encode())
    assert [id_dtype(n).str for n in (256, 50256, 65535, 65536)] == ["<u2", "<u2", "<u2", "<u4"]


def test_a_data_set_whose_replacement_was_interrupted_is_opened(data_set):
    data_set.rename(data_set.with_name(".tiny.old"))
    assert len(open_data_set(data_set).train) == 24


def test_the_digest_names_the_content_of_both_splits(data_set, tmp_path):
    digest = open_data_set(data_set).digest
    assert open_data_set(data_set).digest == digest
    moved = data_set.rename(tmp_path / "moved")
    assert open_data_set(moved).digest == digest
    for split in ("train", "val"):
        edit_meta(moved, lambda meta, split=split: meta["splits"][split]["files"][0].update(sha256=split))
        changed = open_data_set(moved, check=False).digest
        assert changed != digest
        digest = changed


def test_a_split_may_be_several_files(data_set):
    whole = (data_set / "train.bin").read_bytes()
    names = ["train_000.bin", "train_001.bin"]
    for name, part in zip(names, (whole[:20], whole[20:])):
        (data_set / name).write_bytes(part)
    files = [
        {"name": name, "tokens": n, "sha256": hashlib.sha256((data_set / name).read_bytes()).hexdigest()}
        for name, n in zip(names, (10, 14))
    ]
    (data_set / "train.bin").unlink()
    edit_meta(data_set, lambda meta: meta["splits"]["train"].update(files=files))
    train = open_data_set(data_set).train
    assert ids(train) == [*TRAIN[0].encode(), 256, *TRAIN[1].encode()]
    (data_set / names[1]).unlink()
    assert "train_001.bin is missing" in refusal(data_set)


# damage


@pytest.mark.parametrize(("name", "n"), [("train.bin", 24), ("val.bin", 8)])
def test_a_truncated_missing_or_changed_file_is_refused(data_set, name, n):
    path = data_set / name
    sound = path.read_bytes()
    for check in (True, False):
        for cut in (1, 2):
            path.write_bytes(sound[:-cut])
            message = refusal(data_set, check=check)
            assert message.startswith(f"{path} was truncated or changed: its ") and f" not the {n} ids" in message
        path.unlink()
        assert refusal(data_set, check=check) == f"{path} is missing; prepare the data again"
    path.write_bytes(sound[:4] + bytes([sound[4] ^ 1]) + sound[5:])
    assert refusal(data_set).startswith(f"{path} has changed since meta.json was written")


def test_a_large_data_set_opens_without_being_read_and_is_compared_on_request(data_set, monkeypatch):
    monkeypatch.setattr(plaingpt.tokens, "HASHED", 63)  # bytes: one less than these files have
    (data_set / "val.bin").write_bytes(bytes(16))
    assert ids(open_data_set(data_set).val) == [0] * 8
    assert "val.bin has changed" in refusal(data_set, check_all=True)
    os.truncate(data_set / "val.bin", 14)
    assert "val.bin was truncated or changed" in refusal(data_set)


@pytest.mark.parametrize("files", [1, 2])
def test_an_id_outside_the_vocabulary_is_refused_wherever_it_is_read(files):
    tokens = Tokens(np.split(np.array([0, 1, 2, 3, 9, 3, 2, 1], np.uint16), files), None, vocab_size=9)
    assert tokens.windows(np.array([0, 1]), 3).tolist() == [[0, 1, 2], [1, 2, 3]]
    reads = (lambda: tokens.windows(np.array([0, 2]), 3), lambda: list(tokens.all()))
    for read in reads:
        with pytest.raises(UserError, match="the data set has the id 9, but the vocabulary ends at 8"):
            read()


def test_a_tokenizer_whose_ids_have_gaps_opens(data_set):
    """Such data sets were written with the number of ids as vocab_size."""
    path = data_set / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary[max(vocabulary, key=vocabulary.get)] = 300  # it was 255, which no UTF-8 text contains
    path.write_text(json.dumps(content))
    edit_meta(data_set, lambda meta: None)
    data = open_data_set(data_set)
    assert (data.tokenizer.vocab_size, data.tokenizer.end_of_text) == (301, 256)
    edit_meta(data_set, lambda meta: meta.update(vocab_size=301))
    assert open_data_set(data_set).tokenizer.vocab_size == 301
    edit_meta(data_set, lambda meta: meta.update(vocab_size=300))
    assert "tokenizer.json has 301 ids, but meta.json says 300" in refusal(data_set)


@pytest.mark.parametrize("name", ["n" * 300, "", "."])
def test_a_file_name_in_meta_json_that_no_file_can_have_is_refused(data_set, name):
    edit_meta(data_set, lambda meta: meta["splits"]["val"]["files"][0].update(name=name))
    assert "missing" in refusal(data_set)


def test_an_id_outside_the_vocabulary_is_refused(data_set):
    ids = np.fromfile(data_set / "val.bin", "<u2")
    ids[3] = 257
    ids.tofile(data_set / "val.bin")
    digest = hashlib.sha256(ids.tobytes()).hexdigest()
    edit_meta(data_set, lambda meta: meta["splits"]["val"]["files"][0].update(sha256=digest))
    assert refusal(data_set).startswith(f"{data_set / 'val.bin'} has the id 257, but the vocabulary ends at 256: ")


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: "null",
        lambda text: text.replace('"vocab_size"', '"size"'),
        lambda text: text.replace('"format_version"', '"version"'),
        lambda text: text.replace('"uint16"', '"letters"'),
        lambda text: text.replace('"val"', '"test"'),
        lambda text: text.replace('"sha256"', '"md5"'),
    ],
)
def test_a_damaged_meta_json_is_refused_with_its_name(data_set, damage):
    path = data_set / "meta.json"
    damaged = damage(path.read_text())
    assert damaged != path.read_text()
    path.write_text(damaged)
    assert refusal(data_set).startswith(f"{path} is damaged: it differs from its checksum")
    (data_set / "SHA256SUMS").unlink()
    assert re.match(f"{path} is (missing or )?damaged", refusal(data_set))


def test_bytes_that_are_no_text_in_meta_json_are_refused(data_set):
    (data_set / "meta.json").write_bytes(b"\xff\xfe\0")
    (data_set / "SHA256SUMS").unlink()
    assert "meta.json is missing or damaged" in refusal(data_set)


def test_another_format_version_is_refused_with_both_versions(data_set):
    edit_meta(data_set, lambda meta: meta.update(format_version=2))
    assert refusal(data_set) == f"{data_set / 'meta.json'}: format version 2, expected 1"


def test_a_tokenizer_that_does_not_fit_or_is_missing_is_refused(data_set):
    make_tokenizer("char", ["abc"], 1).save(data_set)
    assert refusal(data_set).startswith(f"{data_set / 'tokenizer.json'} is damaged: it differs")
    (data_set / "SHA256SUMS").unlink()
    assert refusal(data_set) == f"{data_set}: tokenizer.json has 4 ids, but meta.json says 257"
    (data_set / "tokenizer.json").unlink()
    assert refusal(data_set) == f"{data_set} has no tokenizer.json"


def test_a_data_set_without_its_meta_json_is_not_taken_for_gpt2_tokens(data_set):
    (data_set / "meta.json").unlink()
    printed = f"{data_set} is a model, or a data set that has lost its meta.json: prepare the text again"
    assert refusal(data_set) == printed
    (data_set / "tokenizer.json").unlink()  # the other file of the tokenizer is enough
    assert refusal(data_set) == printed


# nanoGPT's folders


@pytest.fixture
def nanogpt(tmp_path):
    folder = tmp_path / "old"
    folder.mkdir()
    np.array([15496, 11, 995, 0, 50256], "<u2").tofile(folder / "train.bin")
    np.array([464, 886], "<u2").tofile(folder / "val.bin")
    return folder


def test_a_folder_of_nanogpt_is_read_as_gpt2_tokens(nanogpt):
    data = open_data_set(nanogpt)
    assert data.tokenizer.vocab_size == 50257
    assert data.tokenizer.decode(ids(data.train)) == "Hello, world!<|endoftext|>"
    assert data.tokenizer.decode(ids(data.val)) == "The end"
    assert data.train.n_bytes is None
    for name in ("prepare.py", "readme.md", "input.txt"):  # which it has beside them
        (nanogpt / name).touch()
    assert ids(open_data_set(nanogpt).train) == ids(data.train)


def test_a_pickle_is_refused_unread_with_the_command_that_replaces_it(nanogpt, tmp_path):
    class Harm:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)

    (nanogpt / "meta.pkl").write_bytes(pickle.dumps(Harm()))
    assert refusal(nanogpt).endswith("python prepare_data.py FILES --tokenizer=char --name=old-new")
    assert not (tmp_path / "harm").exists()
    (nanogpt / "input.txt").write_text("a road and the sea " * 20)
    command = shlex.split(refusal(nanogpt).partition("again: python ")[2])
    assert run_main(command[0].removesuffix(".py"), *command[1:], f"--data_dir={nanogpt.parent}").status == 0
    open_data_set(nanogpt.parent / "old-new")


def test_characters_are_not_taken_for_gpt2s_tokens(nanogpt):
    (np.arange(1000) % 65).astype("<u2").tofile(nanogpt / "train.bin")
    assert "train.bin has no id above 255, so these are not GPT-2's tokens" in refusal(nanogpt)


@pytest.mark.parametrize("name", ["train.bin", "val.bin"])
def test_a_folder_of_nanogpt_without_a_split_is_refused(nanogpt, name):
    (nanogpt / name).unlink()
    assert refusal(nanogpt).startswith(f"{nanogpt} is not a prepared data set")


@pytest.mark.parametrize("dtype", ["<u4", "<i8"])
def test_wider_integers_are_refused_with_a_remedy(nanogpt, dtype):
    np.arange(1, 100, dtype=dtype).tofile(nanogpt / "train.bin")
    assert refusal(nanogpt).endswith(
        "train.bin has integers of 4 or 8 bytes: convert it to uint16, or prepare the text again"
    )


def test_a_file_that_ends_in_zeros_is_refused(nanogpt):
    """nanoGPT allocates the entire file before it fills it."""
    np.array([*range(1, 100), *[0] * 16], "<u2").tofile(nanogpt / "train.bin")
    assert "train.bin ends in zeros: its preparation was interrupted" in refusal(nanogpt)


def test_only_a_sample_of_a_large_folder_is_read_when_it_opens(nanogpt, monkeypatch):
    monkeypatch.setattr(plaingpt.tokens, "HASHED", 0)
    monkeypatch.setattr(plaingpt.tokens, "SAMPLE", 4)
    for position, message in ((3, "train.bin has the id 60000"), (4, "the data set has the id 60000")):
        changed = np.arange(1, 20).astype("<u2")
        changed[position] = 60000
        changed.tofile(nanogpt / "train.bin")
        with pytest.raises(UserError, match=message):
            open_data_set(nanogpt).train.windows(np.array([0]), 8)


def test_half_an_id_is_refused(nanogpt):
    os.truncate(nanogpt / "train.bin", 9)
    assert re.match(f"{re.escape(str(nanogpt / 'train.bin'))} was truncated or changed: its 9 bytes", refusal(nanogpt))


# llm.c's shards


def llm_c_shard(path: Path, ids: list[int], **header: int) -> None:
    start = np.zeros(256, "<i4")
    start[:3] = header.get("magic", 20240520), header.get("version", 1), header.get("tokens", len(ids))
    path.write_bytes(start.tobytes() + np.array(ids, "<u2").tobytes())


@pytest.fixture
def llm_c(tmp_path):
    folder = tmp_path / "fineweb10B-gpt2"
    folder.mkdir()
    llm_c_shard(folder / "fineweb_train_000001.bin", [50256, 15496, 11])
    llm_c_shard(folder / "fineweb_train_000002.bin", [995, 0])
    llm_c_shard(folder / "fineweb_val_000000.bin", [50256, 464, 886])
    return folder


def test_shards_of_llm_c_are_read_as_one_without_their_headers(llm_c):
    data = open_data_set(llm_c)
    assert ids(data.train) == [50256, 15496, 11, 995, 0] and ids(data.val) == [50256, 464, 886]
    assert data.train.windows(np.array([1]), 4).tolist() == [[15496, 11, 995, 0]]
    assert ids(open_data_set(llm_c, check=False).train) == ids(data.train)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"magic": 20240521}, "has the id 55433, but the vocabulary ends at 50256"),
        ({"version": 2}, "has the id 55432, but the vocabulary ends at 50256"),
        ({"tokens": 4}, "was truncated or changed: its 6 bytes are not the 4 ids"),
    ],
)
def test_a_shard_of_another_kind_or_length_is_refused(llm_c, header, message):
    llm_c_shard(llm_c / "fineweb_train_000002.bin", [1, 2, 3], **header)
    assert refusal(llm_c).startswith(f"{llm_c / 'fineweb_train_000002.bin'} {message}")


OPENS = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
from pathlib import Path
from plaingpt.console import run_script
from plaingpt.tokens import open_data_set
run_script(lambda: print(len(open_data_set(Path(sys.argv[1])).train)))
"""


@pytest.mark.parametrize("kind", ["llm.c", "ours"])
def test_more_shards_than_a_process_may_open_files_are_refused_with_the_remedy(llm_c, data_set, kind):
    directory = llm_c if kind == "llm.c" else data_set
    for i in range(3, 100):
        llm_c_shard(llm_c / f"fineweb_train_{i:06}.bin", [50256, i])
    if kind == "ours":
        (data_set / "train.bin").unlink()
        files = []
        for i in range(100):
            (data_set / f"train_{i}.bin").write_bytes(bytes([i, 0]))
            files.append({"name": f"train_{i}.bin", "tokens": 1, "sha256": hashlib.sha256(bytes([i, 0])).hexdigest()})
        edit_meta(data_set, lambda meta: meta["splits"]["train"].update(files=files))
    command, run = [sys.executable, "-c", OPENS, str(directory)], dict(cwd=ROOT, env=child_environment())
    opened = subprocess.run(command, **run, capture_output=True, text=True)
    assert re.fullmatch("-c: .*Too many open files; raise the limit: ulimit -n 10000\n", opened.stderr)
    assert opened.returncode == 2


@pytest.mark.parametrize("corpus", ["medieval", "val_and_train"])
def test_the_name_of_the_corpus_does_not_decide_about_the_split_of_a_shard(llm_c, corpus):
    for path in llm_c.iterdir():
        path.rename(llm_c / path.name.replace("fineweb", corpus))
    data = open_data_set(llm_c)
    assert (len(data.train), len(data.val)) == (5, 3)


def test_files_of_llm_c_may_be_one_per_split_and_have_its_name_or_nanogpts(llm_c, nanogpt):
    for folder in (llm_c, nanogpt):
        for path in folder.iterdir():
            path.unlink()
    for split in ("train", "val"):
        llm_c_shard(llm_c / f"tiny_shakespeare_{split}.bin", [50256, 15496, 11])
        llm_c_shard(nanogpt / f"{split}.bin", [50256, 15496, 11])
    for folder in (llm_c, nanogpt):
        data = open_data_set(folder)
        assert ids(data.train) == ids(data.val) == [50256, 15496, 11]


def test_an_id_of_a_shard_outside_gpt2s_vocabulary_is_refused(llm_c):
    llm_c_shard(llm_c / "fineweb_val_000000.bin", [1, 50257])
    assert "fineweb_val_000000.bin has the id 50257, but the vocabulary ends at 50256" in refusal(llm_c)


def test_shards_without_validation_are_refused(llm_c):
    (llm_c / "fineweb_val_000000.bin").unlink()
    assert refusal(llm_c).startswith(f"{llm_c} is not a prepared data set")


def test_the_bytes_of_validation_text_are_counted_where_others_prepared_it(llm_c, nanogpt):
    assert open_data_set(llm_c).val.n_bytes == open_data_set(nanogpt).val.n_bytes == len("The end")


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("openwebtext", "python prepare_data.py openwebtext --data_dir={.parent}"),
        ("fineweb10B-gpt2", "hf download kjj0/fineweb10B-gpt2 --repo-type=dataset --local-dir={}"),
        ("mine", "python prepare_data.py FILES --name=mine --data_dir={.parent}"),
        ("a;b", "python prepare_data.py FILES --name='a;b' --data_dir={.parent}"),
    ],
)
def test_a_data_set_that_is_missing_is_answered_with_the_command_that_works(tmp_path, name, command):
    assert refusal(tmp_path / name).endswith(f"no such data set; to get it: {command.format(tmp_path / name)}")


def test_a_path_instead_of_a_name_is_answered_with_the_name(data_set):
    path = data_set.parent / data_set.parent.name / data_set.name  # --dataset=data/books
    meant = f"--dataset={data_set.name} --data_dir={data_set.parent}"
    assert refusal(path) == f"{path}: no such data set; did you mean {meant}?"
    assert refusal(data_set.parent / "other").endswith(f"; available: {data_set.name}")
    for file in [data_set / "meta.json", *data_set.glob("*.bin")]:  # a directory of text, for example
        file.unlink()
    assert "to get it: python prepare_data.py" in refusal(path)


# reading


@pytest.mark.parametrize("sizes", [[10], [3, 7], [1, 0, 4, 5], [0, 10, 0], [1] * 10])
@pytest.mark.parametrize("dtype", [np.uint16, np.uint32])
def test_windows_go_round_the_files_like_a_ring(sizes, dtype):
    tokens = Tokens(np.split(np.arange(65520, 65530).astype(dtype), np.cumsum(sizes)[:-1]))
    assert len(tokens) == 10
    for length in (0, 1, 2, 4, 10, 23):
        windows = tokens.windows(np.arange(25), length)
        assert windows.dtype == np.int64
        assert windows.tolist() == [[65520 + (start + i) % 10 for i in range(length)] for start in range(25)]


def test_no_tokens_have_no_length():
    assert len(Tokens([])) == len(Tokens([np.zeros(0, np.uint16)])) == 0
