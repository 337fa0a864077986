"""Directories that are whole or absent, whatever happens while they are written."""

import hashlib
import os
from pathlib import Path

import pytest

from plaingpt.console import UserError
from plaingpt.files import SUMS, check_sums, existing, sha256, whole_directory


def contents(directory):
    return {path.name: path.read_text() for path in directory.iterdir() if path.name != SUMS}


def write(final, text):
    with whole_directory(final) as new:
        (new / "a.txt").write_text(text)


def test_a_filled_directory_appears_at_the_end_of_the_block(tmp_path):
    final = tmp_path / "deep" / "final"
    with whole_directory(final) as new:
        (new / "a.txt").write_text("new")
        assert not final.exists()
    assert contents(final) == {"a.txt": "new"}
    assert os.listdir(final.parent) == ["final"]


def test_success_replaces_the_old_directory_and_all_that_was_in_it(tmp_path):
    final = tmp_path / "final"
    final.mkdir()
    (final / "only_in_the_old.txt").write_text("old")
    with whole_directory(final) as new:
        (new / "a.txt").write_text("new")
        assert contents(final) == {"only_in_the_old.txt": "old"}
    assert contents(final) == {"a.txt": "new"}
    assert os.listdir(tmp_path) == ["final"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_inside_leaves_the_old_directory_as_it_was(tmp_path, error):
    final = tmp_path / "final"
    write(final, "old")
    with pytest.raises(error), whole_directory(final) as new:
        (new / "a.txt").write_text("half")
        raise error
    assert contents(final) == {"a.txt": "old"}
    assert os.listdir(tmp_path) == ["final"]


def test_an_error_inside_leaves_nothing_where_nothing_was(tmp_path):
    with pytest.raises(ValueError), whole_directory(tmp_path / "final"):
        raise ValueError
    assert os.listdir(tmp_path) == []


def test_what_an_interrupted_writing_left_is_cleaned_away(tmp_path):
    final = tmp_path / "final"
    write(final, "old")
    for leftover in (".final.new", ".final.old"):
        (tmp_path / leftover).mkdir()
        (tmp_path / leftover / "stale.txt").write_text("stale")
    write(final, "new")
    assert contents(final) == {"a.txt": "new"}
    assert os.listdir(tmp_path) == ["final"]


def test_when_only_the_old_directory_is_left_a_failure_keeps_it_and_a_success_replaces_it(tmp_path):
    final, old = tmp_path / "final", tmp_path / ".final.old"
    write(old, "old")
    with pytest.raises(ValueError), whole_directory(final):
        raise ValueError
    assert contents(existing(final)) == {"a.txt": "old"}
    write(final, "new")
    assert contents(final) == {"a.txt": "new"}
    assert os.listdir(tmp_path) == ["final"]


def test_a_copy_that_somebody_keeps_beside_it_stays(tmp_path):
    for name in ("final", "final.old", "final.new"):
        write(tmp_path / name, "mine")
    write(tmp_path / "final", "new")
    assert contents(tmp_path / "final.old") == contents(tmp_path / "final.new") == {"a.txt": "mine"}


def test_existing_looks_where_a_link_leads(tmp_path):
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


def test_existing_does_not_take_a_half_written_directory_or_a_file(tmp_path):
    (tmp_path / ".final.new").mkdir()
    (tmp_path / "final").write_text("a file")
    assert existing(tmp_path / "final") is None


def test_sha256_is_the_digest_of_the_whole_file(tmp_path):
    data = bytes(range(256)) * 5000  # more than one buffer
    (tmp_path / "file").write_bytes(data)
    assert sha256(tmp_path / "file") == hashlib.sha256(data).hexdigest()


# checksums


def test_a_whole_directory_has_checksums_in_the_form_of_sha256sum(tmp_path):
    with whole_directory(tmp_path / "final") as new:
        for name in ("b.txt", "a.json", "huge.bin"):
            (new / name).write_text(name)
    expected = [f"{hashlib.sha256(name.encode()).hexdigest()}  {name}" for name in ("a.json", "b.txt")]
    assert (tmp_path / "final" / "SHA256SUMS").read_text().splitlines() == expected
    check_sums(tmp_path / "final")


def test_a_changed_file_is_found_and_named(tmp_path):
    write(tmp_path / "final", "as it was")
    (tmp_path / "final" / "a.txt").write_text("as it wss")
    with pytest.raises(UserError, match=r"a\.txt is not as it was written"):
        check_sums(tmp_path / "final")


def test_a_missing_file_is_found_and_named(tmp_path):
    write(tmp_path / "final", "as it was")
    (tmp_path / "final" / "a.txt").unlink()
    with pytest.raises(UserError, match=r"a\.txt"):
        check_sums(tmp_path / "final")


@pytest.mark.parametrize("text", ["no sums", "\n", "0123  "])
def test_damaged_checksums_are_a_user_error(tmp_path, text):
    write(tmp_path / "final", "as it was")
    (tmp_path / "final" / SUMS).write_text(text)
    with pytest.raises(UserError, match="damaged"):
        check_sums(tmp_path / "final")


def test_a_directory_without_checksums_and_a_file_that_others_added_are_let_through(tmp_path):
    write(tmp_path / "final", "as it was")
    (tmp_path / "final" / "notes.md").write_text("mine")
    check_sums(tmp_path / "final")
    (tmp_path / "final" / "a.txt").write_text("changed")
    (tmp_path / "final" / SUMS).unlink()
    check_sums(tmp_path / "final")


def test_a_link_to_another_disk_stays_a_link(tmp_path):
    (tmp_path / "big").mkdir()
    (tmp_path / "name").symlink_to(tmp_path / "big")
    for content in ("one", "two"):
        with whole_directory(tmp_path / "name") as new:
            (new / "file").write_text(content)
    assert (tmp_path / "name").is_symlink()
    assert (tmp_path / "big" / "file").read_text() == "two"


def test_the_folder_here_and_one_without_a_name_have_siblings_too():
    for name in ("", "."):
        assert existing(Path(name)) == Path()
