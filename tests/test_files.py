"""Files and directories are complete or absent, whatever happens while they are written."""

import errno
import hashlib
import os
import shutil
import stat
import tempfile
import threading
import time
from pathlib import Path

import pytest

from plaingpt import files
from plaingpt.console import UserError
from plaingpt.files import (
    SUMS,
    check_sums,
    check_writable,
    existing,
    holds_run,
    new_directory,
    new_file,
    set_aside,
    sha256,
)


def contents(directory):
    return {path.name: path.read_text() for path in directory.iterdir() if path.name != SUMS}


def write(final, text):
    with new_directory(final) as new:
        (new / "a.txt").write_text(text)


def test_success_replaces_the_old_directory_and_everything_in_it(tmp_path):
    final = tmp_path / "final"
    final.mkdir()
    (final / "only_in_the_old.txt").write_text("old")
    with new_directory(final) as new:
        (new / "a.txt").write_text("new")
        assert contents(final) == {"only_in_the_old.txt": "old"}
    assert contents(final) == {"a.txt": "new"}
    assert os.listdir(tmp_path) == ["final"]


@pytest.mark.parametrize("refusals", [2, 100])
def test_a_rename_that_windows_refuses_while_a_file_is_open_is_tried_again(tmp_path, monkeypatch, refusals):
    waits, replace = [], os.replace

    def refuse(source, target):
        if len(waits) < refusals:
            raise PermissionError(13, "Access is denied")
        replace(source, target)

    monkeypatch.setattr(files, "WINDOWS", True)
    monkeypatch.setattr(os, "replace", refuse)
    monkeypatch.setattr(time, "sleep", waits.append)
    if refusals > 50:
        with pytest.raises(PermissionError):
            write(tmp_path / "final", "new")
        assert len(waits) == 4 and not list(tmp_path.iterdir())
    else:
        write(tmp_path / "final", "new")
        assert len(waits) == 2 and contents(tmp_path / "final") == {"a.txt": "new"}


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_inside_leaves_everything_as_it_was(tmp_path, error):
    write(tmp_path / "final", "old")
    for name in ("final", "another"):
        with pytest.raises(error), new_directory(tmp_path / name) as new:
            (new / "a.txt").write_text("half")
            assert not (tmp_path / "another").exists()
            raise error
    assert contents(tmp_path / "final") == {"a.txt": "old"}
    assert os.listdir(tmp_path) == ["final"]


def test_leftovers_of_an_interrupted_write_are_removed(tmp_path):
    final = tmp_path / "final"
    write(final, "old")
    for leftover in (".final.new", ".final.old"):
        (tmp_path / leftover).mkdir()
        (tmp_path / leftover / "stale.txt").write_text("stale")
    write(final, "new")
    assert contents(final) == {"a.txt": "new"}
    assert os.listdir(tmp_path) == ["final"]


def test_if_only_the_old_directory_is_left_a_failure_keeps_it_and_a_success_replaces_it(tmp_path):
    final, old = tmp_path / "final", tmp_path / ".final.old"
    write(old, "old")
    with pytest.raises(ValueError), new_directory(final):
        raise ValueError
    assert contents(existing(final)) == {"a.txt": "old"}
    write(final, "new")
    assert contents(final) == {"a.txt": "new"}
    assert os.listdir(tmp_path) == ["final"]


def test_files_of_the_user_with_similar_names_are_not_touched(tmp_path):
    for name in ("final", "final.old", "final.new"):
        write(tmp_path / name, "mine")
    write(tmp_path / "final", "new")
    assert contents(tmp_path / "final.old") == contents(tmp_path / "final.new") == {"a.txt": "mine"}


def test_existing_follows_a_link(tmp_path):
    write(tmp_path / "far" / ".final.old", "old")
    (tmp_path / "final").symlink_to(tmp_path / "far" / "final")
    assert contents(existing(tmp_path / "final")) == {"a.txt": "old"}


def test_existing_prefers_the_directory_itself_to_the_old_one(tmp_path):
    final, old = tmp_path / "final", tmp_path / ".final.old"
    assert existing(final) is None
    old.mkdir()
    assert existing(final) == old
    final.mkdir()
    assert existing(final) == final


def test_existing_ignores_an_incomplete_directory_and_a_file(tmp_path):
    (tmp_path / ".final.new").mkdir()
    (tmp_path / "final").write_text("a file")
    assert existing(tmp_path / "final") is None


def test_sha256_is_the_digest_of_the_entire_file(tmp_path):
    data = bytes(range(256)) * 5000  # more than one buffer
    (tmp_path / "file").write_bytes(data)
    assert sha256(tmp_path / "file") == hashlib.sha256(data).hexdigest()


# checksums


def test_a_new_directory_has_checksums_in_the_format_of_sha256sum(tmp_path):
    final = tmp_path / "deep" / "final"
    with new_directory(final) as new:
        for name in ("b.txt", "a.json", "huge.bin"):
            (new / name).write_text(name)
    expected = [f"{hashlib.sha256(name.encode()).hexdigest()}  {name}" for name in ("a.json", "b.txt")]
    assert (final / "SHA256SUMS").read_text().splitlines() == expected
    check_sums(final)


def test_a_changed_or_missing_file_is_detected_and_named(tmp_path):
    write(tmp_path / "final", "as it was")
    (tmp_path / "final" / "a.txt").write_text("as it wss")
    with pytest.raises(UserError, match=r"a\.txt is damaged: it differs from its checksum"):
        check_sums(tmp_path / "final")
    (tmp_path / "final" / "a.txt").unlink()
    with pytest.raises(UserError, match=r"a\.txt: No such file"):
        check_sums(tmp_path / "final")


@pytest.mark.parametrize("name", ["/dev/zero", "../outside.txt"])
def test_checksums_of_files_elsewhere_are_damage_and_not_read(tmp_path, name):
    (tmp_path / "outside.txt").write_text("x")
    (tmp_path / "final").mkdir()
    (tmp_path / "final" / SUMS).write_text(f"{sha256(tmp_path / 'outside.txt')}  {name}\n")
    with pytest.raises(UserError, match=r"final is damaged: .*No such file"):
        check_sums(tmp_path / "final")


def test_a_directory_without_checksums_and_files_added_later_are_accepted(tmp_path):
    write(tmp_path / "final", "as it was")
    (tmp_path / "final" / "notes.md").write_text("mine")
    check_sums(tmp_path / "final")
    (tmp_path / "final" / "a.txt").write_text("changed")
    (tmp_path / "final" / SUMS).unlink()
    check_sums(tmp_path / "final")


def test_a_link_to_another_disk_remains_a_link(tmp_path):
    (tmp_path / "big").mkdir()
    (tmp_path / "name").symlink_to(tmp_path / "big")
    for content in ("one", "two"):
        with new_directory(tmp_path / "name") as new:
            (new / "file").write_text(content)
    assert (tmp_path / "name").is_symlink()
    assert (tmp_path / "big" / "file").read_text() == "two"


def test_existing_takes_the_current_folder_and_names_that_no_file_can_have(tmp_path):
    assert existing(Path()) == Path()
    assert existing(tmp_path / ("n" * 300)) is None


def test_existing_is_never_none_while_a_directory_is_replaced(tmp_path):
    """Between the renames only `.final.old` exists, and after them only `final`."""
    write(tmp_path / "final", "0")
    stop, missing = threading.Event(), []

    def look():
        while not stop.is_set():
            missing.extend([1] if existing(tmp_path / "final") is None else [])

    thread = threading.Thread(target=look)
    thread.start()
    for _ in range(100):
        write(tmp_path / "final", "1")
    stop.set()
    thread.join()
    assert not missing


# links in a folder that others may write to


@pytest.mark.parametrize(("mode", "content"), [("w", "größer"), ("wb", b"\xff")])
def test_a_new_file_replaces_the_old_one_and_writes_through_no_link(tmp_path, mode, content):
    (tmp_path / "precious").write_text("precious")
    for name in ("metrics.jsonl", ".metrics.jsonl.new"):
        (tmp_path / name).symlink_to(tmp_path / "precious")
    with new_file(tmp_path / "metrics.jsonl", mode) as file:
        file.write(content)
    assert (tmp_path / "metrics.jsonl").read_bytes() == (content if mode == "wb" else content.encode())
    assert not (tmp_path / "metrics.jsonl").is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["metrics.jsonl", "precious"]
    assert (tmp_path / "precious").read_text() == "precious"


def test_a_file_whose_writing_fails_leaves_the_old_one(tmp_path):
    (tmp_path / "a").write_text("old")
    with pytest.raises(ValueError), new_file(tmp_path / "a") as file:
        file.write("half")
        raise ValueError
    assert contents(tmp_path) == {"a": "old"}


@pytest.mark.parametrize("name", [".final.new", ".final.old"])
def test_a_new_directory_is_not_written_through_a_link(tmp_path, name):
    write(tmp_path / "final", "old")
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "a.txt").write_text("precious")
    (tmp_path / name).symlink_to(tmp_path / "precious")
    write(tmp_path / "final", "new")
    assert contents(tmp_path / "final") == {"a.txt": "new"}
    assert contents(tmp_path / "precious") == {"a.txt": "precious"}
    assert sorted(os.listdir(tmp_path)) == ["final", "precious"]


# the folder of a run


def test_a_run_behind_a_link_is_set_aside_on_its_own_disk(tmp_path):
    write(tmp_path / "disk" / "out" / "last", "earlier")
    (tmp_path / "disk" / "out" / "best").mkdir()
    (tmp_path / "disk" / "out" / "best" / "config.json").touch()
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "out")
    set_aside(tmp_path / "out")
    write(tmp_path / "out" / "last", "new")
    assert contents(tmp_path / "disk" / "out.1" / "last") == {"a.txt": "earlier"}
    assert contents(tmp_path / "disk" / "out" / "last") == {"a.txt": "new"}
    assert sorted(os.listdir(tmp_path)) == ["disk", "out"] and (tmp_path / "out").is_symlink()


@pytest.mark.parametrize("name", ["last", "best", "step-000003"])
def test_what_is_not_a_checkpoint_is_neither_renamed_nor_replaced(tmp_path, name):
    for make in (lambda path: path.write_text("mine"), lambda path: path.mkdir()):
        path = tmp_path / "out" / name
        path.parent.mkdir()
        make(path)
        with pytest.raises(UserError, match=f"{name} exists but is not a checkpoint; choose another --out_dir"):
            set_aside(tmp_path / "out")
        assert os.listdir(tmp_path) == ["out"] and os.listdir(tmp_path / "out") == [name]
        shutil.rmtree(tmp_path / "out")


def test_damaged_sums_are_a_user_error(tmp_path):
    with new_directory(tmp_path / "set") as new:
        for name in ("config.json", "model.safetensors"):
            (new / name).write_text(name)
    whole = (tmp_path / "set" / SUMS).read_text()
    check_sums(tmp_path / "set")
    for damaged in (whole[:30], whole[:64], whole[:-2], "no sums", "\n", "0123  "):
        (tmp_path / "set" / SUMS).write_text(damaged)
        with pytest.raises(UserError, match="damaged"):
            check_sums(tmp_path / "set")


def test_a_run_in_the_current_folder_is_not_renamed(tmp_path, monkeypatch):
    write(tmp_path / "out" / "last", "earlier")
    (tmp_path / "out" / "best").mkdir()
    (tmp_path / "out" / "best" / "config.json").touch()
    (tmp_path / "out" / "inner").mkdir()
    for here, name in ((tmp_path / "out", "."), (tmp_path / "out" / "inner", "..")):
        monkeypatch.chdir(here)
        with pytest.raises(UserError, match=r"cannot be renamed \(it is the current directory\); choose another"):
            set_aside(Path(name))
    assert contents(tmp_path / "out" / "last") == {"a.txt": "earlier"}


def test_a_folder_that_can_be_written_passes_and_any_other_is_refused_in_one_line(tmp_path):
    check_writable(tmp_path)
    check_writable(tmp_path / "deep" / "out")
    assert os.listdir(tmp_path) == []
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "unmounted" / "out")
    for refused in ("file", "file/out", "link"):
        with pytest.raises(UserError, match="cannot be written to: ") as caught:
            check_writable(tmp_path / refused)
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "unmounted").exists()


def test_a_file_system_that_syncs_no_directories_and_changes_no_permissions_is_written_to(tmp_path, monkeypatch):
    sync = os.fsync

    def files_only(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        sync(descriptor)

    def refuse(*_, **__):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "fsync", files_only)
    monkeypatch.setattr(os, "chmod", refuse)
    write(tmp_path / "final", "new")
    assert contents(tmp_path / "final") == {"a.txt": "new"}


@pytest.fixture
def shared():
    """A folder in which everyone may write. Root becomes another user, who may not write everywhere."""
    if not hasattr(os, "geteuid"):
        pytest.skip("Windows has other permissions")
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o777)
        is_root = os.geteuid() == 0
        if is_root:
            os.seteuid(65534)
        yield Path(name)
        if is_root:
            os.seteuid(0)
        for path in Path(name).rglob("*"):
            path.chmod(0o700)


def test_a_folder_without_permission_is_refused(shared):
    (shared / "out").mkdir(0o500)
    with pytest.raises(UserError, match="Permission denied"):
        check_writable(shared / "out")


def test_a_lock_of_another_user_is_respected(shared):
    (shared / "run.lock").touch(0)
    for _ in range(2):
        with pytest.raises(UserError, match=r"another user's run may be using .*run.lock is theirs; delete it if no"):
            holds_run(shared)
    assert os.listdir(shared) == ["run.lock"]


def test_files_of_another_user_do_not_prevent_saves(shared, capfd):
    for name in (".last.new", "last"):
        (shared / name).mkdir()
        (shared / name / "a.txt").write_text("theirs")
        (shared / name).chmod(0o500)
    for text in ("first", "second", "third"):
        write(shared / "last", text)
        assert contents(shared / "last") == {"a.txt": text}
    assert sorted(os.listdir(shared)) == [".last.new.1", ".last.old.1", "last"]
    assert capfd.readouterr().err.count("cannot be deleted; renamed it to") == 2


def test_what_is_not_a_file_is_not_replaced_by_one(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="it exists but is not a file"), new_file(tmp_path / "pipe"):
        pass
    assert (tmp_path / "pipe").is_fifo() and os.listdir(tmp_path) == ["pipe"]
