"""Preparing in units: killed anywhere, shared out in any way, the result is that of one undisturbed process."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash
from conftest import ROOT, Ended, child_environment, run_main
from filelock import FileLock

import plaingpt.text.merger
import plaingpt.text.pipeline
import prepare_data
from plaingpt.console import UserError
from plaingpt.text.pipeline import Encoder
from plaingpt.tokens import open_data_set

DOCUMENTS = [f"Document {i}: " + "words and words " * (i % 7) for i in range(260)]


@pytest.fixture
def units(monkeypatch):
    """Small units of work, so that a little text has a dozen of them."""
    monkeypatch.setattr(prepare_data, "UNIT_BYTES", 1500)
    monkeypatch.setattr(plaingpt.text.pipeline, "BATCH_BYTES", 400)


@pytest.fixture
def text(tmp_path) -> Path:
    return write(tmp_path / "text.jsonl", DOCUMENTS)


def write(path: Path, documents: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
    return path


def prepare(source, folder: Path, *flags: str, status: int = 0, stdin: str = "") -> Ended:
    made = [f"--data_dir={folder}", "--name=set", "--tokenizer=byte", "--threads=1", *flags]
    ended = run_main("prepare_data", source, *made, stdin=stdin)
    assert ended.status == status, ended.err
    return ended


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def documents(folder: Path, split: str) -> list[str]:
    ids = np.concatenate(list(getattr(open_data_set(folder / "set"), split).all()))
    return [bytes(part[part < 256].astype(np.uint8)).decode() for part in np.split(ids, np.flatnonzero(ids == 256))]


def forked(work) -> int:
    """Run `work` in a process of its own; its id."""
    pid = os.fork()
    if not pid:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        try:
            work()
        finally:
            os._exit(0)
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


@pytest.mark.parametrize(
    ("flags", "held", "step"),
    [([], 1 << 23, 4), (["--shard_tokens=1000"], 0, 16), (["--dedup=True"], 0, 16)],
    ids=["merged from memory", "merged from disk, in several files", "merged at the end"],
)
def test_killed_before_any_change_on_disk_and_started_again_it_ends_with_the_same_bytes(
    tmp_path, text, units, monkeypatch, flags, held, step
):
    monkeypatch.setattr(plaingpt.text.pipeline, "HELD_TOKENS", held)
    prepare(text, tmp_path / "whole", *flags)
    expected, n, went_on = contents(tmp_path / "whole"), 0, 0
    assert set(expected) >= {
        "set/meta.json",
        "set/train_000003.bin" if "--shard_tokens=1000" in flags else "set/train.bin",
    }

    def killed_at(n: int, folder: Path) -> bool:
        def kill(count: int) -> None:
            if count == n:
                os.kill(os.getpid(), signal.SIGKILL)

        def work() -> None:
            at_each_change(folder, kill)
            prepare(text, folder, *flags)

        return os.waitstatus_to_exitcode(os.waitpid(forked(work), 0)[1]) == -signal.SIGKILL

    while killed_at(n := n + step, folder := tmp_path / str(n)):  # the hook counts from 1
        if (folder / "set").exists():
            assert contents(folder / "set") == contents(tmp_path / "whole" / "set")
        ended = prepare(text, folder, *flags)
        went_on += "going on after" in ended.err
        assert contents(folder) == expected, f"killed before change {n}"
    assert n > 40 and went_on > 4


@pytest.mark.parametrize("waiting", [0, 2500, 1 << 25], ids=["on disk", "on disk and in memory", "in memory"])
def test_units_that_wait_for_their_turn_make_the_same_bytes(tmp_path, text, units, monkeypatch, waiting):
    """Of four threads the one with the first unit is the last to end."""
    prepare(text, tmp_path / "expected")
    monkeypatch.setattr(plaingpt.text.merger, "WAITING_TOKENS", waiting)
    encode, started, kept, on_disk = Encoder.encode, threading.Barrier(4), [], {}

    def late(self, unit: int) -> int:
        if unit < 4:
            started.wait(10)
        while unit == 0 and len(kept) < 3:
            time.sleep(0.01)
        ended = encode(self, unit)
        on_disk[unit] = self.job.manifest(unit).exists()
        kept.append(unit)
        return ended

    monkeypatch.setattr(Encoder, "encode", late)
    prepare(text, tmp_path / "found", "--threads=4")
    assert contents(tmp_path / "found") == contents(tmp_path / "expected") and 0 not in kept[:3]
    waited = {on_disk[unit] for unit in (1, 2, 3)}
    assert waited == {0: {True}, 2500: {True, False}, 1 << 25: {False}}[waiting]


def test_an_earlier_data_set_stays_whole_until_the_new_one_is(tmp_path, text, units):
    prepare(write(tmp_path / "old.jsonl", ["old text " * 50] * 3), tmp_path)
    old = contents(tmp_path / "set")

    def kill(count: int) -> None:
        if count == 24:
            os.kill(os.getpid(), signal.SIGKILL)

    def work() -> None:
        at_each_change(tmp_path, kill)
        prepare(text, tmp_path)

    os.waitpid(forked(work), 0)
    assert contents(tmp_path / "set") == old and (tmp_path / "set.partial").exists()
    prepare(text, tmp_path)
    assert len(documents(tmp_path, "train")) > 200 and not (tmp_path / "set.partial").exists()


def test_other_settings_or_another_text_begin_anew(tmp_path, text, units):
    (tmp_path / "set.partial").mkdir()
    part = ["--part=1/2"]
    prepare(text, tmp_path, *part)
    assert "going on after" in prepare(text, tmp_path, *part).err
    assert "going on after" not in prepare(text, tmp_path, *part, "--tokenizer=gpt2").err
    write(text, DOCUMENTS[::-1])
    told = prepare(text, tmp_path, *part, "--tokenizer=gpt2").err
    assert "going on after" not in told and "unfinished work of another text or other settings: it is removed" in told
    prepare(text, tmp_path, "--part=2/2", "--tokenizer=gpt2")
    assert len(open_data_set(tmp_path / "set").train) > 1000


@pytest.mark.parametrize("at", range(3, 15, 2))
def test_killed_while_other_work_is_removed_that_work_can_be_done_after_all(tmp_path, text, units, at):
    prepare(text, tmp_path / "whole")
    prepare(text, tmp_path, "--part=1/2")

    def work() -> None:
        at_each_change(tmp_path, lambda count: count < at or os.kill(os.getpid(), signal.SIGKILL))
        prepare(text, tmp_path, "--part=1/2", "--tokenizer=gpt2")

    os.waitpid(forked(work), 0)
    prepare(text, tmp_path)
    assert contents(tmp_path / "set") == contents(tmp_path / "whole" / "set")


def test_a_folder_of_the_user_in_the_place_of_unfinished_work_is_left_alone(tmp_path, text):
    (tmp_path / "set.partial").mkdir()
    (tmp_path / "set.partial" / "poem.txt").write_text("mine")
    before = contents(tmp_path)
    assert "is no unfinished preparation; choose another --name" in prepare(text, tmp_path, status=2).err
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("file", "damaged", "flags"),
    [
        ("*.train.bin", lambda data: data[::-1], []),
        ("*.train.documents", lambda _: b"", ["--dedup=True"]),
        ("*.train.documents", lambda data: bytes(len(data)), ["--dedup=True"]),
    ],
)
def test_a_unit_that_was_damaged_is_found_and_made_anew(tmp_path, text, units, file, damaged, flags):
    prepare(text, tmp_path / "whole", *flags)
    prepare(text, tmp_path, "--part=1/2", *flags)
    unit = next(path for path in (tmp_path / "set.partial").glob(file))
    unit.write_bytes(damaged(unit.read_bytes()))
    assert f"{unit} is not as it was written; run again" in prepare(text, tmp_path, "--part=2/2", *flags, status=1).err
    prepare(text, tmp_path, *flags)
    assert contents(tmp_path / "set") == contents(tmp_path / "whole" / "set")


def test_a_manifest_that_a_loss_of_power_left_empty_counts_as_none(tmp_path, text, units):
    prepare(text, tmp_path / "whole")
    prepare(text, tmp_path, "--part=1/2")
    next((tmp_path / "set.partial").glob("*.json")).write_text("")
    assert "left to the others: 1 of " in prepare(text, tmp_path, "--part=2/2").err
    prepare(text, tmp_path)
    assert contents(tmp_path / "set") == contents(tmp_path / "whole" / "set")


def test_merged_units_that_a_loss_of_power_damaged_are_made_anew(tmp_path, text, units):
    prepare(text, tmp_path / "whole")

    def work() -> None:
        at_each_change(tmp_path, lambda count: count < 24 or os.kill(os.getpid(), signal.SIGKILL))
        prepare(text, tmp_path)

    os.waitpid(forked(work), 0)
    merged = tmp_path / "set.partial" / "merged" / "train_000000.bin"
    assert merged.stat().st_size > 1000
    merged.write_bytes(bytes(merged.stat().st_size))
    assert f"{merged} is not as it was written; run again" in prepare(text, tmp_path, status=1).err
    prepare(text, tmp_path)
    assert contents(tmp_path / "set") == contents(tmp_path / "whole" / "set")


def test_no_lock_is_held_any_more_when_the_unfinished_work_is_removed(tmp_path, text):
    """Windows renames no folder in which a file is open."""

    def look(event: str, arguments: tuple) -> None:
        if event == "os.rename" and Path(str(arguments[0])).name == "set.partial":
            for lock in (tmp_path / "set.partial").glob("*.lock"):
                FileLock(lock, blocking=False).acquire().lock.release()
            (tmp_path / "seen").touch()

    def work() -> None:
        sys.addaudithook(look)
        prepare(text, tmp_path)

    os.waitpid(forked(work), 0)
    assert (tmp_path / "seen").exists() and not (tmp_path / "set.partial").exists()


@pytest.mark.parametrize("flags", [[], ["--part=1/2"]])
def test_work_that_somebody_removes_under_way_is_no_success(tmp_path, text, units, flags):
    def work() -> None:
        at_each_change(tmp_path, lambda count: count != 20 or shutil.rmtree(tmp_path / "set.partial"))
        prepare(text, tmp_path, *flags, status=2)
        (tmp_path / "refused").touch()

    os.waitpid(forked(work), 0)
    assert (tmp_path / "refused").exists() and not (tmp_path / "set").exists()


def test_unfinished_work_that_cannot_be_removed_is_no_failure(tmp_path, text):
    (tmp_path / f"set.partial.{os.getpid()}" / "of a process of the same number elsewhere").mkdir(parents=True)
    assert "next: python train.py" in prepare(text, tmp_path).err
    assert "is prepared already" in prepare(text, tmp_path).err


@pytest.mark.parametrize(
    ("running", "refused"),
    [
        ([], {"set is being prepared by another process": [[], ["--part=2/2"]]}),
        (
            ["--part=1/2"],
            {
                "set is being prepared by another process": [[], ["--part=1/2"]],
                "is in use for other sources or settings": [["--part=2/2", "--tokenizer=gpt2"]],
            },
        ),
    ],
)
def test_two_at_once_on_one_data_set_are_refused(tmp_path, text, units, running, refused):
    read, write_end = os.pipe()

    def stay(count: int) -> None:
        if count == 20:
            os.write(write_end, b"here")
            time.sleep(60)

    def work() -> None:
        at_each_change(tmp_path, stay)
        prepare(text, tmp_path, *running)

    pid = forked(work)
    assert os.read(read, 4) == b"here"
    before = contents(tmp_path)
    for message, others in refused.items():
        for flags in others:
            assert message in prepare(text, tmp_path, *flags, status=2).err
    assert {k: v for k, v in contents(tmp_path).items() if ".lock" not in k} == {
        k: v for k, v in before.items() if ".lock" not in k
    }
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    prepare(text, tmp_path)
    assert len(documents(tmp_path, "train")) > 200


def test_who_waits_while_the_other_ends_is_refused_in_the_same_words(tmp_path, text):
    partial = tmp_path / "set.partial"
    partial.mkdir()

    def work() -> None:
        at_each_change(tmp_path, lambda count: count != 3 or shutil.rmtree(partial))
        assert "is being prepared by another process" in prepare(text, tmp_path, status=2).err
        (tmp_path / "refused").touch()

    with FileLock(partial / "part-1-of-1.lock"):
        os.waitpid(forked(work), 0)
    assert (tmp_path / "refused").exists()


# shared out


@pytest.mark.parametrize("order", [[1], [2, 1], [3, 1, 2], [20, *range(1, 20)]])
def test_any_number_of_parts_in_any_order_make_what_one_makes(tmp_path, text, units, order):
    prepare(text, tmp_path / "one")
    for part in order[:-1]:
        ended = prepare(text, tmp_path / "parts", f"--part={part}/{len(order)}")
        if len(order) < 20:  # of 20 some have nothing to do
            assert "left to the others" in ended.err and not (tmp_path / "parts" / "set").exists()
    last = prepare(text, tmp_path / "parts", f"--part={order[-1]}/{len(order)}")
    assert ("next: python train.py" in last.err) == (len(order) < 20)
    assert contents(tmp_path / "parts") == contents(tmp_path / "one")


def test_a_part_that_waits_to_begin_is_in_nobodys_way(tmp_path, text, units):
    (tmp_path / "set.partial").mkdir()
    with FileLock(tmp_path / "set.partial" / "part-1-of-2.lock"):
        assert "left to the others" in prepare(text, tmp_path, "--part=2/2").err
    prepare(text, tmp_path, "--part=1/2")
    assert len(documents(tmp_path, "train")) > 200


def test_a_part_that_is_done_again_after_the_last_changes_nothing(tmp_path, text, units):
    for part in ("1/2", "2/2"):
        prepare(text, tmp_path, f"--part={part}")
    before = contents(tmp_path)
    assert "is prepared already" in prepare(text, tmp_path, "--part=1/2").err
    assert contents(tmp_path) == before


def test_threads_make_what_one_makes(tmp_path, text, units):
    prepare(text, tmp_path / "one", "--dedup=True")
    prepare(text, tmp_path / "three", "--dedup=True", "--threads=3")
    assert contents(tmp_path / "three") == contents(tmp_path / "one")


def test_a_mistake_in_a_thread_is_one_line_and_leaves_nothing(tmp_path, units):
    source = write(tmp_path / "text.jsonl", DOCUMENTS)
    with open(source, "a") as file:
        file.write('{"words": 1}\n')
    ended = prepare(source, tmp_path / "made", "--threads=2", status=2)
    assert "has no 'text'" in ended.err and contents(tmp_path / "made") == {}


def test_a_name_that_is_no_utf8_is_told_all_the_same(tmp_path):
    """Of a column here, which any system has; names of files may be such on Linux."""
    (tmp_path / "text.jsonl").write_text('{"\\udce9": "text"}')
    told = prepare(tmp_path / "text.jsonl", tmp_path, status=2).err
    assert told.endswith("has no 'text'; name the --column: \\udce9\n")


@pytest.mark.parametrize("suffix", ["txt", "jsonl", "parquet"])
def test_a_file_that_cannot_be_read_for_a_while_costs_no_work(tmp_path, units, suffix):
    texts, nine = [f"text {i} " * 300 for i in range(12)], tmp_path / f"9.{suffix}"
    for i, text in enumerate(texts):
        path = tmp_path / f"{i}.{suffix}"
        if suffix == "parquet":
            pq.write_table(pa.table({"text": [text]}), path)
        else:
            path.write_text(text if suffix == "txt" else json.dumps({"text": text}))
    flags = [tmp_path / f"*.{suffix}", tmp_path, "--val_fraction=0.5"]
    prepare(flags[0], tmp_path / "whole", flags[2])

    def away(_: int) -> None:
        if (tmp_path / "set.partial" / "merged").exists() and nine.exists():  # the plan is made
            nine.rename(tmp_path / "away")

    def work() -> None:
        at_each_change(tmp_path / "set.partial", away)
        told = prepare(*flags, status=2).err
        assert re.search(rf"{tmp_path}/set cannot be made: .*{nine}.*No such file or directory\n$", told), told
        (tmp_path / "away").rename(nine)

    os.waitpid(forked(work), 0)
    assert "going on after" in prepare(*flags).err
    assert contents(tmp_path / "set") == contents(tmp_path / "whole" / "set")


def test_a_file_that_changes_while_it_is_read_is_no_mixture_of_both(tmp_path, text, units):
    def work() -> None:
        at_each_change(tmp_path / "set.partial", lambda n: n != 20 or write(text, DOCUMENTS[:100]))
        assert f"{text} was changed while it was read; run again" in prepare(text, tmp_path, status=1).err
        (tmp_path / "refused").touch()

    os.waitpid(forked(work), 0)
    assert (tmp_path / "refused").exists() and not (tmp_path / "set").exists()
    assert "unfinished work of another text" in prepare(text, tmp_path).err
    assert len(documents(tmp_path, "train") + documents(tmp_path, "val")) == 200  # the tail of each


def test_torchrun_shares_the_work_out(tmp_path):
    source = write(tmp_path / "text.jsonl", DOCUMENTS)
    prepare(source, tmp_path / "one")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "prepare_data.py"]
    flags = [source, f"--data_dir={tmp_path}/two", "--name=set", "--tokenizer=byte"]
    environment = child_environment()
    ended = subprocess.run([*command, *flags], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0 and "config/quickstart.py --dataset=set " in ended.stderr, ended.stderr
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


@pytest.mark.parametrize(
    ("environment", "flag", "expected"),
    [
        ({}, None, (1, 1)),
        ({}, "3/16", (3, 16)),
        ({"RANK": "2", "WORLD_SIZE": "8"}, None, (3, 8)),
        ({"RANK": "2", "WORLD_SIZE": "8"}, "1/1", (1, 1)),
        ({"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_COUNT": "4"}, None, (4, 4)),
        (
            {"SLURM_ARRAY_TASK_ID": "21", "SLURM_ARRAY_TASK_MIN": "1", "SLURM_ARRAY_TASK_COUNT": "4"}
            | {"SLURM_ARRAY_TASK_STEP": "10"},
            None,
            (3, 4),
        ),
    ],
)
def test_which_share_a_process_does(monkeypatch, environment, flag, expected):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert prepare_data.share(flag) == expected


@pytest.mark.parametrize("part", ["0/2", "3/2", "2", "a/b", "1/2/3", "-1/2"])
def test_a_part_that_is_none_is_refused(tmp_path, text, part):
    assert "write --part=3/16" in prepare(text, tmp_path, f"--part={part}", status=2).err


def test_a_slurm_array_with_gaps_is_refused(monkeypatch):
    for name, value in {"ID": 5, "MIN": 1, "MAX": 7, "STEP": 1, "COUNT": 3}.items():  # --array=1,5,7
        monkeypatch.setenv(f"SLURM_ARRAY_TASK_{name}", str(value))
    with pytest.raises(UserError, match="a Slurm array with gaps: write --part=3/16"):
        prepare_data.share(None)


# what is made


def test_a_split_beyond_the_size_of_a_file_has_several_and_is_read_as_one(tmp_path, text, units):
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
def test_copies_are_left_out_wherever_they_are(tmp_path, units, n):
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


def test_the_split_is_the_same_in_another_form_order_and_size_of_the_source(tmp_path, units):
    def val(name: str, texts: list[str]) -> set[str]:
        prepare(write(tmp_path / f"{name}.jsonl", texts), tmp_path / name)
        return set(documents(tmp_path / name, "val"))

    first = val("first", DOCUMENTS)
    assert first == val("backward", DOCUMENTS[::-1])
    grown = val("grown", [f"before {i}" for i in range(50)] + DOCUMENTS)
    assert grown & set(DOCUMENTS) == first
    chosen = {t for t in DOCUMENTS if xxhash.xxh3_64_intdigest(t.encode()) < 0.05 * 2**64}
    assert first == chosen


# standard input


def test_standard_input_is_a_document_or_with_a_column_json_lines(tmp_path):
    ended = prepare("-", tmp_path / "text", stdin="all of it is one document " * 10)
    assert "train: 247 tokens of 1.00 bytes, 1 document\n" in ended.err and ": 260 bytes, vocabulary" in ended.err
    meta = json.loads((tmp_path / "text" / "set" / "meta.json").read_text())
    assert meta["source"] == "standard input" and meta["splits"]["train"]["documents"] == 1
    lines = "\n".join(json.dumps({"story": text}) for text in DOCUMENTS)
    prepare("-", tmp_path / "lines", "--column=story", stdin=lines)
    assert len(documents(tmp_path / "lines", "train") + documents(tmp_path / "lines", "val")) == len(DOCUMENTS)
    assert list((tmp_path / "lines").iterdir()) == [tmp_path / "lines" / "set"]


def test_another_text_on_standard_input_replaces_no_data_set_unasked(tmp_path):
    flags = ["-", f"--data_dir={tmp_path}", "--tokenizer=byte"]
    assert run_main("prepare_data", *flags, stdin="a text " * 10).status == 0
    ended = run_main("prepare_data", *flags, stdin="another text " * 10)
    assert ended.status == 2 and "holds standard input: give --name=… (with --name=stdin it is replaced)" in ended.err


def test_who_stops_it_hears_whether_the_same_command_goes_on(tmp_path, text, units):
    def work() -> None:
        at_each_change(tmp_path, lambda count: count % 20 or os.kill(os.getpid(), signal.SIGINT))
        told = [prepare(given, tmp_path, status=130, stdin="some text " * 1000).err for given in (text, "-")]
        assert [line.splitlines()[-1] for line in told] == ["stopped; the same command goes on from here", "stopped"]
        (tmp_path / "told").touch()

    os.waitpid(forked(work), 0)
    assert (tmp_path / "told").exists()


def test_standard_input_cannot_be_shared_out_and_must_not_be_empty(tmp_path):
    assert "save it to a file" in prepare("-", tmp_path, "--part=1/2", status=2, stdin="text").err
    assert "there is no text in it" in prepare("-", tmp_path, status=2).err
    assert contents(tmp_path) == {}


# a look at it


def test_inspect_tells_figures_samples_and_borders_and_draws(tmp_path, text, units):
    prepare(text, tmp_path, "--tokenizer=gpt2")
    before = contents(tmp_path)
    told = run_main("prepare_data", "--inspect=set", f"--data_dir={tmp_path}")
    assert told.status == 0
    meta = json.loads((tmp_path / "set" / "meta.json").read_text())
    for split in ("train", "val"):
        figures = meta["splits"][split]
        assert (
            f"{split}: {figures['documents']:,} documents, {figures['tokens']:,} tokens, {figures['bytes']:,} bytes: "
            f"{figures['bytes'] / figures['tokens']:.2f} bytes a token"
        ) in told.err
    assert "of 50,257 ids of the vocabulary occur" in told.err and "checksums and ids are right" in told.err
    assert "document 1, 4 tokens: 'Document 0: ' (ends here)" in told.err
    assert "shortest, 4 tokens: 'Document " in told.err and "longest, " in told.err
    picture = tmp_path / "set" / "inspect.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    picture.unlink()
    picture.mkdir()
    refused = run_main("prepare_data", "--inspect=set", f"--data_dir={tmp_path}")
    assert refused.status == 2 and refused.err.endswith(f"{picture} cannot be written: Is a directory\n")
    after = {k: v for k, v in contents(tmp_path).items() if not k.endswith((".checked", ".png"))}
    assert after == before


def test_inspect_verifies_again_what_was_verified_before(tmp_path, text, units):
    prepare(text, tmp_path)
    path = tmp_path / "set" / "train.bin"
    open_data_set(tmp_path / "set")
    status, ids = path.stat(), np.fromfile(path, np.uint16)
    ids[5] ^= 1
    ids.tofile(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    told = run_main("prepare_data", "--inspect=set", f"--data_dir={tmp_path}")
    assert told.status == 2 and "train.bin was changed since meta.json was written" in told.err
    missing = run_main("prepare_data", "--inspect=openwebtext", f"--data_dir={tmp_path}")
    assert missing.status == 2 and "to get it: python prepare_data.py openwebtext" in missing.err
