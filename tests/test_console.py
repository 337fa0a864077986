"""How scripts end: exit statuses, and one line instead of a traceback where a line says it all."""

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from plaingpt.console import UserError, counted, errors_of_library, escaped, note, run_script

ROOT = Path(__file__).parent.parent
SCRIPT = """
import sys
from plaingpt.console import RunFailed, UserError, note, run_script
class PanicException(BaseException):
    "As pyo3, which Rust libraries such as tokenizers use, has it."
def main():
    note("a note")
    match sys.argv[1]:
        case "mistake": raise UserError("bread.txt: there is no flour in it")
        case "failure": raise RunFailed("the oven went out")
        case "bug": raise KeyError("flour")
        case "permission": raise PermissionError(13, "Permission denied", "bread.txt")
        case "long name": open("x" * 300)
        case "many files": raise OSError(24, "Too many open files", "bread.txt")
        case "memory": bytearray(1 << 60)
        case "torch memory":
            import torch
            torch.empty(1 << 56, dtype=torch.uint8)
        case "panic": raise PanicException("index out of bounds")
        case "lost": raise RuntimeError("[/third_party/gloo/gloo/transport/tcp/pair.cc:537] Connection reset by peer")
        case "escapes": raise UserError("\x1b[31mred\x07, \u202ereversed, caf\u00e9 \u2603\t\U0001f642")
        case "snow": print("\u2603")
        case "seven": return 7
        case "pipe": raise BrokenPipeError
run_script(main)
"""


def run(argument, **environment):
    env = {**os.environ, "PYTHONPATH": str(ROOT)} | environment
    return subprocess.run(
        [sys.executable, "-c", SCRIPT, argument], env=env, capture_output=True, text=True, encoding="utf-8"
    )


@pytest.mark.parametrize(
    ("case", "status", "line"),
    [
        ("mistake", 2, "bread.txt: there is no flour in it"),
        ("permission", 2, "bread.txt: Permission denied"),
        ("long name", 2, f"{'x' * 199} … {'x' * 78}: File name too long"),
        ("many files", 2, "bread.txt: Too many open files; raise the limit: ulimit -n 10000"),
        ("failure", 1, "the oven went out"),
        ("memory", 1, "out of memory: MemoryError; try a smaller model"),
        ("panic", 1, "a library failed: index out of bounds"),
        (
            "lost",
            1,
            "the connection to the other processes failed: [/third_party/gloo/gloo/transport/tcp/pair.cc:537] "
            "Connection reset by peer; if one ended, its error is the cause",
        ),
        ("escapes", 2, r"\x1b[31mred\x07, \u202ereversed, café ☃\t🙂".replace(r"\t", "\t")),
    ],
)
def test_an_error_with_an_explanation_is_one_line(case, status, line):
    ended = run(case)
    assert (ended.returncode, ended.stdout, ended.stderr) == (status, "", f"a note\n-c: {line}\n")


def test_want_of_memory_on_a_cpu_is_one_line():
    ended = run("torch memory")
    assert ended.returncode == 1
    assert ended.stderr.startswith("a note\n-c: out of memory: ") and ended.stderr.count("\n") == 2
    assert ended.stderr.endswith("; try a smaller model\n")


def test_torchrun_is_told_that_a_lost_connection_follows_from_other_errors(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    monkeypatch.setattr("time.time", lambda: 1000.5)
    times = []
    for error in (UserError("a mistake"), MemoryError(), RuntimeError("gloo/transport/tcp/pair.cc: reset by peer")):

        def main(error=error):
            raise error

        with pytest.raises(SystemExit):
            run_script(main)
        times.append(json.loads((tmp_path / "error.json").read_text())["message"]["extraInfo"]["timestamp"])
    assert times == ["999", "999", "1000"]


def test_an_error_without_an_explanation_has_its_traceback():
    ended = run("bug")
    assert ended.returncode == 1 and "Traceback" in ended.stderr and ended.stderr.endswith("KeyError: 'flour'\n")


def test_text_goes_out_as_utf8_whatever_the_machines_encoding_is():
    ended = run("snow", PYTHONIOENCODING="cp1252")
    assert (ended.returncode, ended.stdout) == (0, "☃\n")


def test_without_an_error_the_status_is_what_main_returns():
    assert run("fine").returncode == 0
    assert run("seven").returncode == 7


def test_a_reader_that_has_seen_enough_ends_a_script_quietly():
    ended = run("pipe")
    assert (ended.returncode, ended.stderr) == (141, "a note\n")


def test_other_ranks_say_which_they_are_and_give_no_notes():
    ended = run("mistake", RANK="3")
    assert (ended.returncode, ended.stderr) == (2, "-c [rank 3]: bread.txt: there is no flour in it\n")


def test_a_stream_of_jupyter_serves():
    out = io.StringIO()  # which, as Jupyter's, cannot be reconfigured
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as ended:
        run_script(lambda: print("☃"))
    assert (ended.value.code, out.getvalue()) == (None, "☃\n")


def test_control_characters_are_escaped_and_letters_of_any_language_are_not():
    assert escaped("a\x00b\x7f\x9b\r\u2066") == r"a\x00b\x7f\x9b\r\u2066"
    text = "Zwölf　漢字 שלום नमस्ते 👩‍👧\n\t"
    assert escaped(text) == text


def test_a_note_cannot_control_the_terminal(capsys):
    note("red: \x1b[31m\nnext line")
    assert capsys.readouterr().err == "red: \\x1b[31m\nnext line\n"


@pytest.mark.parametrize(("rank", "printed"), [(None, "hello\n"), ("", "hello\n"), ("0", "hello\n"), ("1", "")])
def test_only_rank_0_speaks_and_an_empty_rank_is_none(capsys, monkeypatch, rank, printed):
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    note("hello")
    assert capsys.readouterr().err == printed


def test_numbers_are_short():
    assert [counted(n, "file") for n in (1, 2000)] == ["1 file", "2,000 files"]


def test_a_lack_of_memory_inside_a_library_is_not_the_users_mistake():
    with pytest.raises(UserError, match="x is damaged: no"), errors_of_library("x is damaged"):
        raise ValueError("no")
    with pytest.raises(MemoryError), errors_of_library("x is damaged"):
        raise MemoryError
