"""Preparing in one pass: killed anywhere and started again, the result is that of an undisturbed process."""

import contextlib
import gzip
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash
from conftest import ROOT, Ended, child_environment, contents, run_main
from filelock import FileLock

from plaingpt.text import pipeline, streams
from plaingpt.text.config import PrepareConfig
from plaingpt.text.job import Job
from plaingpt.text.pipeline import Part
from plaingpt.text.sources import Source
from plaingpt.tokenizer import make_tokenizer
from plaingpt.tokens import open_data_set

DOCUMENTS = [f"Document {i}: " + "words and words " * (i % 7) for i in range(260)]


@pytest.fixture
def small(monkeypatch):
    """Small batches and frequent saves, so that a little text has dozens of them."""
    monkeypatch.setattr(streams, "PIECE", 400)
    monkeypatch.setattr(pipeline, "SAVE_TOKENS", 800)


@pytest.fixture
def text(tmp_path) -> Path:
    return write(tmp_path / "text.jsonl", DOCUMENTS)


@pytest.fixture
def mixed(tmp_path) -> Path:
    """A folder with documents in files of every kind."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    for i, document in enumerate(DOCUMENTS[:20]):
        (folder / f"{i:02}.txt").write_text(document + "\n")
    (folder / "large.md").write_text(" ".join(DOCUMENTS[20:60]))
    write(folder / "lines.jsonl", DOCUMENTS[60:110])
    (folder / "lines.json.gz").write_bytes(gzip.compress(write(folder / "x", DOCUMENTS[110:150]).read_bytes()))
    (folder / "x").write_text("text without a suffix, the last one")
    (folder / "rows.csv").write_text("id,text\n" + "".join(f'{i},"{d}"\n' for i, d in enumerate(DOCUMENTS[150:200])))
    copies = DOCUMENTS[60:69]  # of the first rows of lines.jsonl
    pq.write_table(pa.table({"text": DOCUMENTS[200:] + copies}), folder / "rows.parquet", row_group_size=20)
    return folder


def write(path: Path, documents: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


def prepare(source, folder: Path, *flags: str, status: int = 0, stdin: str = "") -> Ended:
    made = [f"--data_dir={folder}", "--name=set", "--tokenizer=byte", "--threads=1", *flags]
    ended = run_main("prepare_data", source, *made, stdin=stdin)
    assert ended.status == status, ended.err
    return ended


def documents(folder: Path, split: str) -> list[str]:
    ids = np.concatenate(list(getattr(open_data_set(folder / "set"), split).all()))
    return [bytes(part[part < 256].astype(np.uint8)).decode() for part in np.split(ids, np.flatnonzero(ids == 256))]


def forked(work) -> int:
    """Run `work` in a process of its own; its id."""
    pid = os.fork()
    if not pid:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return pid


def at_each_change(folder: Path, act) -> None:
    """From now on call `act(n)` before this process opens a file below `folder` for writing, renames or removes one."""
    count = 0

    def hook(event: str, arguments: tuple) -> None:
        nonlocal count
        changes = event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir")
        if event == "open" and isinstance(arguments[2], int):
            changes = bool(arguments[2] & (os.O_WRONLY | os.O_RDWR))
        if changes and str(arguments[0]).startswith(str(folder)):
            count += 1
            act(count)

    sys.addaudithook(hook)


# interrupted


def killed(work, folder: Path, n: int) -> bool:
    """Run `work` in a process that is killed before its n-th change below `folder`; whether it came so far."""

    def killed_work() -> None:
        at_each_change(folder, lambda count: count != n or os.kill(os.getpid(), signal.SIGKILL))
        work()

    return os.waitstatus_to_exitcode(os.waitpid(forked(killed_work), 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize(
    ("flags", "step"), [([], 4), (["--shard_tokens=1000", "--threads=3"], 9), (["--dedup"], 9)], ids=str
)
def test_killed_before_any_change_on_disk_and_started_again_it_ends_with_the_same_bytes(
    tmp_path, mixed, small, monkeypatch, flags, step
):
    monkeypatch.setattr(pipeline, "SAVE_TOKENS", 1200)  # each save makes the same changes: half as many are enough
    prepare(mixed, tmp_path / "undisturbed", *flags)
    expected = contents(tmp_path / "undisturbed")
    assert set(expected) >= {
        "set/meta.json",
        "set/train_000003.bin" if "--shard_tokens=1000" in flags else "set/train.bin",
    }
    n = continued = 0
    while killed(lambda: prepare(mixed, folder, *flags), folder := tmp_path / str(n), n := n + step):
        if (folder / "set").exists():
            assert contents(folder / "set") == contents(tmp_path / "undisturbed" / "set")
        continued += "continuing after" in prepare(mixed, folder, *flags).err
        assert contents(folder) == expected, f"killed before change {n}"
    assert n > 40 and continued > 5


def test_an_earlier_data_set_stays_complete_until_the_new_one_is(tmp_path, text, small):
    prepare(write(tmp_path / "old.jsonl", ["old text " * 50] * 3), tmp_path)
    old = contents(tmp_path / "set")
    assert killed(lambda: prepare(text, tmp_path), tmp_path, 30)
    assert contents(tmp_path / "set") == old and (tmp_path / ".set.partial").exists()
    prepare(text, tmp_path)
    assert len(documents(tmp_path, "train")) > 200 and not (tmp_path / ".set.partial").exists()


def test_the_progress_bar_of_a_data_set_of_the_hub_counts_all_its_shards(tmp_path):
    (tmp_path / "hub").mkdir()
    for i in range(2):
        write(tmp_path / "hub" / f"train-{i}.jsonl", ["a road", "the sea"] * 50)
    terminal, process_side = os.openpty()
    termios.tcsetwinsize(terminal, (24, 80))
    command = [
        sys.executable,
        "prepare_data.py",
        f"hf:{tmp_path}/hub",
        f"--data_dir={tmp_path}/data",
        "--tokenizer=byte",
    ]
    environment = child_environment(HF_HOME=str(tmp_path / "cache"))
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=process_side)
    os.close(process_side)
    shown = b""
    with contextlib.suppress(OSError):  # at the end
        while block := os.read(terminal, 1 << 16):
            shown += block
    os.close(terminal)
    assert process.wait() == 0
    assert b"encoding: 100%" in shown and b"2/2" in shown, shown


def test_work_on_a_revision_that_was_the_newest_is_continued_if_it_is_named(tmp_path):
    def digest(newest: str, **given) -> str:
        source = Source("set", f"hf:me/set --split=train --revision={newest}")
        return Job(tmp_path, source, PrepareConfig(**given), "gpt2", None, 1, 1).digests[0]

    assert digest("a") == digest("a", revision="a") == digest("a", split="train") != digest("b")


def test_a_finished_part_is_not_removed_by_another_command(tmp_path, mixed, small):
    prepare(mixed, tmp_path, "--part=1/2")
    before = contents(tmp_path / ".set.partial" / "shards")
    ended = prepare(mixed, tmp_path, "--part=2/2", "--val_fraction=0.2", status=2)
    assert "contains unfinished work on " in ended.err
    assert contents(tmp_path / ".set.partial" / "shards") == before
    prepare(f"{mixed}/", tmp_path, "--part=2/2")  # the same text
    assert len(documents(tmp_path, "train")) > 200


@pytest.fixture
def invalid(tmp_path) -> Path:
    """A folder with 300 files, of which one has lines and invalid bytes in the middle."""
    folder = tmp_path / "invalid"
    folder.mkdir()
    for i in range(300):
        (folder / f"{i:04}.txt").write_text(f"document {i} " + "words and words " * 20)
    lines = write(tmp_path / "lines", DOCUMENTS).read_bytes().splitlines(keepends=True)
    lines[50:200:50] = [b'{"text": "caf\xe9"}\n'] * 3
    (folder / "0201.jsonl").write_bytes(b"".join(lines))
    return folder


def token_files(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(folder).items() if name.endswith(".bin")}


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("bad_files", ["skip", "replace"])
def test_work_that_invalid_text_stopped_continues_with_another_choice(tmp_path, invalid, small, parts, bad_files):
    part = [f"--part={i}/{parts}" for i in range(1, parts + 1)]
    failed = part[201 % parts]  # the part of 0201.jsonl
    for given in part:
        prepare(invalid, tmp_path / "stopped", given, status=2 if given == failed else 0)
    ended = prepare(invalid, tmp_path / "stopped", failed, f"--bad_files={bad_files}")
    assert "continuing after" in ended.err
    for given in part:
        prepare(invalid, tmp_path / "undisturbed", given, f"--bad_files={bad_files}")
    assert token_files(tmp_path / "stopped") == token_files(tmp_path / "undisturbed")
    if parts == 3:
        assert "is already prepared" in prepare(invalid, tmp_path / "stopped", failed).err


def test_a_finished_part_stays_finished_whatever_was_done_about_invalid_text(tmp_path, invalid, small):
    prepare(invalid, tmp_path, "--part=1/3", status=2)
    prepare(invalid, tmp_path, "--part=1/3", "--bad_files=skip")
    before = token_files(tmp_path)
    assert "part 1 of 3 is done; 2 parts left" in prepare(invalid, tmp_path, "--part=1/3").err
    assert before and token_files(tmp_path) == before


@pytest.mark.parametrize(("first", "second"), [("skip", "replace"), ("replace", "skip")])
@pytest.mark.parametrize("after_stop", [True, False])
def test_work_with_one_choice_is_not_continued_with_another(tmp_path, invalid, small, first, second, after_stop):
    changed = tmp_path / "changed"
    if after_stop:
        prepare(invalid, changed, status=2)
    assert killed(lambda: prepare(invalid, changed, f"--bad_files={first}"), changed, 45 if after_stop else 150)
    if not after_stop:
        assert "contains unfinished work" in prepare(invalid, changed, f"--bad_files={second}", status=2).err
        shutil.rmtree(changed / ".set.partial")
    prepare(invalid, changed, f"--bad_files={second}")
    prepare(invalid, tmp_path / "undisturbed", f"--bad_files={second}")
    assert token_files(changed) == token_files(tmp_path / "undisturbed")


def test_validation_of_a_small_share_is_never_empty_by_chance(tmp_path, text):
    prepare(text, tmp_path, "--val_fraction=0.01")  # two documents on average, and perhaps none
    assert len(documents(tmp_path, "val")) > 200  # the tail of each
    source = write(tmp_path / "more.jsonl", [f"{i} " + "text " * 20 for i in range(2000)])
    prepare(source, tmp_path, "--val_fraction=0.0005")  # one document on average
    assert len(documents(tmp_path, "val")) == 2000


def test_other_settings_or_another_text_are_refused_until_the_unfinished_work_is_deleted(tmp_path, text, small):
    folder = tmp_path / "50% data"
    folder.mkdir()
    assert killed(lambda: prepare(text, folder), folder, 35)
    unfinished = f"unfinished work on {text}, with other settings or before it changed: finish it"
    assert unfinished in prepare(text, folder, "--tokenizer=gpt2", status=2).err
    assert "continuing after" in prepare(text, folder).err
    assert killed(lambda: prepare(text, folder), folder, 35)
    write(text, DOCUMENTS[::-1])
    assert unfinished in prepare(text, folder, status=2).err
    shutil.rmtree(folder / ".set.partial")
    prepare(text, folder)
    assert documents(folder, "train")[0] == DOCUMENTS[-1]


def test_work_without_progress_gives_way_to_other_settings(tmp_path, text):
    assert killed(lambda: prepare(text, tmp_path), tmp_path, 20)
    assert (tmp_path / ".set.partial" / "shards").exists()
    prepare(text, tmp_path, "--tokenizer=gpt2")


@pytest.mark.parametrize("n", range(3, 15, 2))
def test_killed_while_other_work_is_removed_that_work_can_be_done_after_all(tmp_path, text, n):
    prepare(text, tmp_path / "undisturbed")
    assert killed(lambda: prepare(text, tmp_path), tmp_path, 20)
    assert killed(lambda: prepare(text, tmp_path, "--tokenizer=gpt2"), tmp_path, n)
    prepare(text, tmp_path)
    assert contents(tmp_path / "set") == contents(tmp_path / "undisturbed" / "set")


@pytest.mark.parametrize(
    ("name", "flags", "n", "growing"),
    [("text.jsonl", [], 35, "train"), ("one document.txt", ["--val_fraction=0.5"], 50, "val")],
)
def test_a_shard_that_was_cut_before_going_on_is_made_anew(tmp_path, text, small, name, flags, n, growing):
    """Also one to which nothing would be added: the tail of a document is for validation."""
    (tmp_path / "one document.txt").write_text("some words and more\n" * 400)
    source, shards = tmp_path / name, tmp_path / ".set.partial" / "shards"
    prepare(source, tmp_path / "undisturbed", *flags)
    assert killed(lambda: prepare(source, tmp_path, *flags), tmp_path, n)
    assert (shards / f"part1_{growing}_000000.bin").stat().st_size > 1000
    cut = shards / "part1_train_000000.bin"
    os.truncate(cut, 1000)
    assert f"{cut} was truncated; run the command again" in prepare(source, tmp_path, *flags, status=1).err
    prepare(source, tmp_path, *flags)
    assert contents(tmp_path / "set") == contents(tmp_path / "undisturbed" / "set")


def test_progress_that_a_loss_of_power_left_empty_counts_as_none(tmp_path, text, small):
    prepare(text, tmp_path / "undisturbed")
    assert killed(lambda: prepare(text, tmp_path), tmp_path, 35)
    (tmp_path / ".set.partial" / "part-1.json").write_text("")
    prepare(text, tmp_path)
    assert contents(tmp_path / "set") == contents(tmp_path / "undisturbed" / "set")


@pytest.mark.parametrize("name", ["plan.json", "part-1.json"])
def test_progress_that_cannot_be_read_now_costs_no_work(tmp_path, text, small, name):
    assert killed(lambda: prepare(text, tmp_path), tmp_path, 30)
    path, shards = tmp_path / ".set.partial" / name, tmp_path / ".set.partial" / "shards"
    before = contents(shards)
    content = path.read_bytes()
    path.unlink()
    path.mkdir()  # as good as a file that may not be read, even for root
    assert f"{path}: Is a directory" in prepare(text, tmp_path, status=2).err and contents(shards) == before
    path.rmdir()
    path.write_bytes(content)
    assert "continuing after" in prepare(text, tmp_path).err


@pytest.mark.parametrize("flags", [[], ["--part=1/2"]])
def test_work_that_somebody_removes_under_way_is_no_success(tmp_path, text, small, flags):
    def work() -> None:
        at_each_change(tmp_path, lambda count: count != 30 or shutil.rmtree(tmp_path / ".set.partial"))
        prepare(text, tmp_path, *flags, status=2)
        (tmp_path / "refused").touch()

    os.waitpid(forked(work), 0)
    assert (tmp_path / "refused").exists() and not (tmp_path / "set").exists()


@pytest.mark.parametrize(
    ("running", "refused"),
    [([], [[], ["--part=2/2"]]), (["--part=1/2"], [["--part=1/2"], [], ["--part=2/2", "--tokenizer=gpt2"]])],
)
def test_two_at_once_on_one_data_set_are_refused(tmp_path, mixed, small, running, refused):
    read, write_end = os.pipe()

    def stay(count: int) -> None:
        if count == 30:
            os.write(write_end, b"here")
            time.sleep(60)

    def work() -> None:
        at_each_change(tmp_path, stay)
        prepare(mixed, tmp_path, *running)

    pid = forked(work)
    os.close(write_end)  # so that reading ends if the process does
    try:
        assert os.read(read, 4) == b"here"
        before = contents(tmp_path)
        for flags in refused:
            printed = prepare(mixed, tmp_path, *flags, status=2).err
            assert "set is being prepared by another process" in printed, flags
        assert {k: v for k, v in contents(tmp_path).items() if ".lock" not in k} == {
            k: v for k, v in before.items() if ".lock" not in k
        }
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    for flags in [running, ["--part=2/2"]] if running else [running]:
        prepare(mixed, tmp_path, *flags)
    assert len(documents(tmp_path, "train")) > 200


def test_while_another_process_makes_the_plan_a_second_one_is_refused(tmp_path, text):
    with FileLock(tmp_path / ".set.lock"):
        assert "set is being prepared by another process" in prepare(text, tmp_path, status=2).err
    prepare(text, tmp_path)


@pytest.mark.parametrize("finished", [False, True])
def test_a_shard_that_was_lost_before_going_on_is_noticed(tmp_path, text, small, finished):
    flags = ["--shard_tokens=1000"]
    if finished:
        prepare(text, tmp_path, *flags, "--part=1/2")
    else:
        assert killed(lambda: prepare(text, tmp_path, *flags), tmp_path, 45)
    os.remove(tmp_path / ".set.partial" / "shards" / "part1_train_000000.bin")
    again = [*flags, "--part=2/2"] if finished else flags
    message = f"a file in {tmp_path / '.set.partial' / 'shards'} is missing: delete {tmp_path / '.set.partial'} and"
    assert message in prepare(text, tmp_path, *again, status=1).err and not (tmp_path / "set").exists()


# in parts


@pytest.mark.parametrize("order", [[1, 2], [2, 1], [3, 1, 2], [20, *range(1, 20)]])
def test_any_number_of_parts_in_any_order_have_the_documents_of_one(tmp_path, mixed, small, order):
    prepare(mixed, tmp_path / "one")
    for part in order[:-1]:
        ended = prepare(mixed, tmp_path / "parts", f"--part={part}/{len(order)}")
        assert f"part {part} of {len(order)} is done; " in ended.err
        assert not (tmp_path / "parts" / "set").exists()
    last = prepare(mixed, tmp_path / "parts", f"--part={order[-1]}/{len(order)}")
    assert "next: python train.py" in last.err and os.listdir(tmp_path / "parts") == ["set"]
    for split in ("train", "val"):
        found = [document for document in documents(tmp_path / "parts", split) if document]
        assert sorted(found) == sorted(documents(tmp_path / "one", split))
    figures = [json.loads((tmp_path / name / "set" / "meta.json").read_text())["splits"] for name in ("one", "parts")]
    for key in ("bytes", "documents"):
        assert [figures[0][s][key] for s in ("train", "val")] == [figures[1][s][key] for s in ("train", "val")]


@pytest.mark.parametrize("n", range(1, 60, 14))
def test_a_part_that_was_killed_goes_on_and_the_last_part_ends_the_work(tmp_path, mixed, small, n):
    for part in (1, 2):
        prepare(mixed, tmp_path / "undisturbed", f"--part={part}/2")
    for part in (1, 2):
        killed(lambda part=part: prepare(mixed, tmp_path / "killed", f"--part={part}/2"), tmp_path / "killed", n)
    for part in (1, 2):
        prepare(mixed, tmp_path / "killed", f"--part={part}/2")
    assert contents(tmp_path / "killed") == contents(tmp_path / "undisturbed")
    assert "is already prepared" in prepare(mixed, tmp_path / "killed", "--part=1/2").err
    assert contents(tmp_path / "killed") == contents(tmp_path / "undisturbed")


def test_a_part_that_waits_to_begin_is_in_nobodys_way(tmp_path, mixed):
    with FileLock(tmp_path / ".set.lock"):
        pid = forked(lambda: prepare(mixed, tmp_path, "--part=1/2"))
        time.sleep(0.3)
    assert "is done" in prepare(mixed, tmp_path, "--part=2/2").err or (tmp_path / "set").exists()
    assert os.waitpid(pid, 0)[1] == 0
    assert len(documents(tmp_path, "train")) > 200 and sorted(os.listdir(tmp_path)) == ["mixed", "set"]


def test_a_finished_part_that_is_started_again_while_the_last_one_completes_the_data_set(tmp_path, mixed):
    prepare(mixed, tmp_path, "--part=1/2")
    started = []

    def again(_: int) -> None:
        if not started and (tmp_path / ".set.partial" / "shards" / "meta.json").exists():
            started.append(0)  # the process that is started inherits this hook, and must not start another
            started[0] = forked(lambda: prepare(mixed, tmp_path, "--part=1/2").err.index("already"))
            time.sleep(0.5)

    def last() -> None:
        at_each_change(tmp_path, again)
        prepare(mixed, tmp_path, "--part=2/2")
        os._exit(os.waitstatus_to_exitcode(os.waitpid(started[0], 0)[1]) or 7)

    assert os.waitstatus_to_exitcode(os.waitpid(forked(last), 0)[1]) == 7
    assert sorted(os.listdir(tmp_path)) == ["mixed", "set"] and len(documents(tmp_path, "train")) > 200


def test_threads_make_what_one_makes(tmp_path, mixed, small):
    for flags in ([], ["--dedup"]):
        prepare(mixed, tmp_path / "one", *flags)
        prepare(mixed, tmp_path / "three", *flags, "--threads=3")
        assert contents(tmp_path / "three") == contents(tmp_path / "one")


def test_long_documents_wait_in_bounded_memory(tmp_path, monkeypatch):
    waiting = [0]
    read, write_batch = pipeline.batches, pipeline.Part.write

    def counted(part):
        for batch in read(part):
            waiting.append(waiting[-1] + batch.size)
            yield batch

    def written(part, batch, ids):
        waiting.append(waiting[-1] - batch.size)
        write_batch(part, batch, ids)

    monkeypatch.setattr(pipeline, "batches", counted)
    monkeypatch.setattr(pipeline.Part, "write", written)
    prepare(write(tmp_path / "long.jsonl", ["long " * 800_000] * 12), tmp_path)
    assert 16 << 20 < max(waiting) < 21 << 20


def test_a_mistake_in_the_text_is_one_line_and_the_corrected_text_is_prepared(tmp_path):
    source = write(tmp_path / "text.jsonl", DOCUMENTS)
    with open(source, "a") as file:
        file.write('{"words": 1}\n')
    ended = prepare(source, tmp_path / "made", "--threads=2", status=2)
    assert "has no 'text'" in ended.err and sorted(os.listdir(tmp_path / "made")) == [".set.lock", ".set.partial"]
    write(source, DOCUMENTS)
    assert f"unfinished work on {source}: removing it" in prepare(source, tmp_path / "made", "--threads=2").err
    assert os.listdir(tmp_path / "made") == ["set"]


def test_killed_work_on_standard_input_gives_way(tmp_path, small):
    text = "\n".join(DOCUMENTS)
    assert killed(lambda: prepare("-", tmp_path, stdin=text), tmp_path, 35)
    assert list((tmp_path / ".set.partial").glob("part-1.json"))
    assert "unfinished work on standard input: removing it" in prepare("-", tmp_path, stdin=text).err


def test_a_name_that_is_no_utf8_is_reported(tmp_path):
    """Of a column here, which any system has; names of files may be such on Linux."""
    (tmp_path / "text.jsonl").write_text('{"\\udce9": "text"}')
    printed = prepare(tmp_path / "text.jsonl", tmp_path, status=2).err
    assert printed.endswith("has no 'text'; name the --column: \\udce9\n")


@pytest.mark.skipif(sys.platform != "linux", reason="names are text there")
def test_a_parquet_file_whose_name_is_no_utf8_is_read(tmp_path):
    pq.write_table(pa.table({"text": DOCUMENTS}), tmp_path / "rows.parquet")
    (tmp_path / "rows.parquet").rename(name := os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.parquet"))
    prepare(name, tmp_path)
    assert len(documents(tmp_path, "train")) > 200


def test_a_file_that_cannot_be_read_for_a_while_costs_no_work(tmp_path, mixed, small):
    prepare(mixed, tmp_path / "undisturbed")
    rows = mixed / "rows.parquet"

    def away(_: int) -> None:
        if (tmp_path / "made" / ".set.partial" / "shards").exists() and rows.exists():  # the plan is made
            rows.rename(tmp_path / "away")

    def work() -> None:
        at_each_change(tmp_path / "made", away)
        printed = prepare(mixed, tmp_path / "made", status=2).err
        assert re.search(r"set cannot be prepared: .*rows.parquet.*No such file or directory\n$", printed), printed
        (tmp_path / "away").rename(rows)

    os.waitpid(forked(work), 0)
    assert "continuing after" in prepare(mixed, tmp_path / "made").err
    assert contents(tmp_path / "made") == contents(tmp_path / "undisturbed")


def test_a_file_that_changes_while_it_is_read_is_no_mixture_of_both(tmp_path, text, small):
    def change(_: int) -> None:
        if (tmp_path / ".set.partial" / "shards").exists() and text.stat().st_size > 10_000:  # the plan is made
            write(text, DOCUMENTS[:200])

    def work() -> None:
        at_each_change(tmp_path / ".set.partial", change)
        assert f"{text} was changed while it was read; run again" in prepare(text, tmp_path, status=1).err
        (tmp_path / "refused").touch()

    os.waitpid(forked(work), 0)
    assert (tmp_path / "refused").exists() and not (tmp_path / "set").exists()
    assert "or before it changed" in prepare(text, tmp_path, status=2).err
    shutil.rmtree(tmp_path / ".set.partial")
    prepare(text, tmp_path)
    assert sorted(documents(tmp_path, "train") + documents(tmp_path, "val")) == sorted(DOCUMENTS[:200])


@pytest.mark.parametrize("part", ["0/2", "3/2", "a/b", "1/2/3"])
def test_a_part_that_is_none_is_refused(tmp_path, text, part):
    assert "write --part=3/16" in prepare(text, tmp_path, f"--part={part}", status=2).err


def test_what_cannot_be_done_in_parts_is_refused_with_the_reason(tmp_path, text):
    assert (
        "--dedup needs all documents in one process" in prepare(text, tmp_path, "--part=1/2", "--dedup", status=2).err
    )
    assert "save it to a file" in prepare("-", tmp_path, "--part=1/2", status=2, stdin="text").err
    assert not (tmp_path / ".set.partial").exists()


def test_a_split_beyond_the_size_of_a_file_has_several_and_is_read_as_one(tmp_path, text, small):
    prepare(text, tmp_path / "one")
    prepare(text, tmp_path / "many", "--shard_tokens=1000")
    one, many = (open_data_set(tmp_path / name / "set") for name in ("one", "many"))
    ids = np.concatenate(list(one.train.all()))
    assert np.array_equal(np.concatenate(list(many.train.all())), ids)
    names = sorted(path.name for path in (tmp_path / "many" / "set").glob("train*.bin"))
    assert names == [f"train_{i:06}.bin" for i in range(-(-len(ids) // 1000))] and len(names) > 5
    sizes = [(tmp_path / "many" / "set" / name).stat().st_size for name in names]
    assert set(sizes[:-1]) == {2000} and 0 < sizes[-1] <= 2000


@pytest.mark.parametrize("n", [30, 260])  # few: the tail of each is validation; many: whole ones are
def test_copies_are_left_out_wherever_they_are(tmp_path, small, n):
    rng = random.Random(0)
    copied = DOCUMENTS[:n] + rng.choices(DOCUMENTS[:n], k=150)
    source = write(tmp_path / "text.jsonl", copied)
    prepare(source, tmp_path / "all")
    prepare(source, tmp_path / "once", "--dedup=True")
    prepare(write(tmp_path / "unique.jsonl", DOCUMENTS[:n]), tmp_path / "expected")
    for split in ("train", "val"):
        assert documents(tmp_path / "once", split) == documents(tmp_path / "expected", split)
        meta = [json.loads((tmp_path / name / "set" / "meta.json").read_text()) for name in ("once", "expected", "all")]
        assert meta[0]["splits"][split] == meta[1]["splits"][split] != meta[2]["splits"][split]
    if n == 260:  # with copies too, none is in both splits
        assert not set(documents(tmp_path / "all", "train")) & set(documents(tmp_path / "all", "val"))


def test_a_large_file_is_not_taken_for_a_copy_and_counts_as_one_document(tmp_path, small):
    folder, text = tmp_path / "files", " ".join(DOCUMENTS[:20])  # in many pieces and batches
    folder.mkdir()
    (folder / "a.txt").write_text(text)
    (folder / "b.txt").write_text(text + " " + DOCUMENTS[20])
    prepare(folder, tmp_path, "--dedup")
    splits = json.loads((tmp_path / "set" / "meta.json").read_text())["splits"]
    assert sum(figures["bytes"] for figures in splits.values()) == sum(path.stat().st_size for path in folder.iterdir())
    assert {split: figures["documents"] for split, figures in splits.items()} == {"train": 2, "val": 2}


def test_the_split_is_the_same_in_another_form_order_and_size_of_the_source(tmp_path, small):
    def val(name: str, texts: list[str]) -> set[str]:
        prepare(write(tmp_path / f"{name}.jsonl", texts), tmp_path / name)
        return set(documents(tmp_path / name, "val"))

    first = val("first", DOCUMENTS)
    assert documents(tmp_path / "first", "train") == [text for text in DOCUMENTS if text not in first]  # in order
    assert first == val("backward", DOCUMENTS[::-1])
    grown = val("grown", [f"before {i}" for i in range(50)] + DOCUMENTS)
    assert grown & set(DOCUMENTS) == first
    chosen = {t for t in DOCUMENTS if xxhash.xxh3_64_intdigest(t.encode()) < 0.05 * 2**64}
    assert first == chosen


# standard input


def test_standard_input_is_a_document_or_with_a_column_json_lines(tmp_path):
    ended = prepare("-", tmp_path / "text", stdin="all of it is one document " * 10)
    assert "train: 247 tokens (1.00 bytes per token), 1 document\n" in ended.err
    assert ": 260 bytes of text, vocabulary" in ended.err
    meta = json.loads((tmp_path / "text" / "set" / "meta.json").read_text())
    assert meta["source"] == "standard input" and meta["splits"]["train"]["documents"] == 1
    lines = "\n".join(json.dumps({"story": text}) for text in DOCUMENTS)
    prepare("-", tmp_path / "lines", "--column=story", stdin=lines)
    assert len(documents(tmp_path / "lines", "train") + documents(tmp_path / "lines", "val")) == len(DOCUMENTS)
    assert list((tmp_path / "lines").iterdir()) == [tmp_path / "lines" / "set"]
    prepare("-", tmp_path / "damaged", "--column=story", stdin=lines + "\n{}", status=2)
    assert not list((tmp_path / "damaged").iterdir())


def test_another_text_on_standard_input_replaces_no_data_set_unasked(tmp_path):
    flags = ["-", f"--data_dir={tmp_path}", "--tokenizer=byte"]
    assert run_main("prepare_data", *flags, stdin="a text " * 10).status == 0
    ended = run_main("prepare_data", *flags, stdin="another text " * 10)
    assert ended.status == 2 and "was made from standard input: give --name=… (--name=stdin replaces it)" in ended.err


def test_who_stops_it_hears_whether_the_same_command_goes_on(tmp_path, text, small):
    def work() -> None:
        at_each_change(tmp_path, lambda count: count % 20 or os.kill(os.getpid(), signal.SIGINT))
        printed = [prepare(given, tmp_path, status=130, stdin="some text " * 1000).err for given in (text, "-")]
        assert printed[0].endswith("stopped; run the same command to continue\n")
        assert printed[1].endswith("stopped\n")
        (tmp_path / "done").touch()

    os.waitpid(forked(work), 0)
    assert (tmp_path / "done").exists()


def test_standard_input_whose_preparation_is_stopped_at_its_end_leaves_nothing(tmp_path):
    def work() -> None:
        stopped = []

        def stop(_) -> None:
            if not stopped and (tmp_path / ".set.partial" / "shards" / "meta.json").exists():
                stopped.append(True)
                raise KeyboardInterrupt

        at_each_change(tmp_path, stop)
        prepare("-", tmp_path, status=130, stdin="some text " * 1000)
        (tmp_path / "stopped").touch()

    os.waitpid(forked(work), 0)
    assert os.listdir(tmp_path) == ["stopped"]


def test_standard_input_must_be_text(tmp_path):
    binary = "some text\0" * 100
    assert "contains no text" in prepare("-", tmp_path, status=2).err
    refused = "prepare_data.py: standard input is binary, not text: convert it to text, or name its --encoding\n"
    assert prepare("-", tmp_path, status=2, stdin=binary).err == refused
    assert contents(tmp_path) == {}


def test_a_part_that_starts_over_leaves_no_old_shards(tmp_path):
    (tmp_path / "part1_train_000003.bin").touch()
    (tmp_path / "part-1.json").write_text(json.dumps({"bad_files": "replace", "position": [1, 1]}))
    config = PrepareConfig(bad_files="skip")
    part = Part(tmp_path, tmp_path / "part-1.json", 1, [], config, make_tokenizer("byte", [], 0), by_content=True)
    assert part.position == (0, 0) and not list(tmp_path.glob("*.bin"))
