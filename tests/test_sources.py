"""Sources: which files are read, what is refused, and downloads that are right or not there."""

import argparse
import hashlib
import json
import os
import re
import sysconfig
import threading
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from plaingpt.console import RunFailed, UserError
from plaingpt.text import sources, streams
from plaingpt.text.config import PrepareConfig
from plaingpt.text.sources import Source, find_source


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("b/2.txt", "b/1.md", "b/deep/3.txt", "b/.hidden.txt", "b/.git/config", "a.txt", ".outside.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"text of {name}")
    return tmp_path


def source(*wanted, **options) -> Source:
    return find_source(PrepareConfig(sources=list(map(str, wanted)), **options))


def documents(*wanted, **options) -> list[str]:
    texts = source(*wanted, **options).texts(PrepareConfig(**options))
    return [text.removeprefix("text of ") for text in texts]


# files, folders and globs


def test_a_file_that_is_changed_to_the_same_size_while_it_is_read_is_refused(here):
    texts = source("a.txt").files[0].texts(PrepareConfig())
    next(texts)
    (here / "a.txt").write_text("text of A.txt")
    os.utime(here / "a.txt", (1, 1))  # two writes within a tick of the clock have the same time
    with pytest.raises(RunFailed, match=r"a\.txt was changed while it was read"):
        next(texts)


def test_two_dots_after_a_link_lead_above_its_target(here):
    (here / "mine").mkdir()
    (here / "mine" / "link").symlink_to(here / "b" / "deep")
    (here / "mine" / "1.md").write_text("text of another file")
    assert documents("mine/link/../1.md") == ["b/1.md"]


def test_a_hidden_file_or_folder_is_read_when_it_is_named_itself(here):
    assert documents(".outside.txt") == [".outside.txt"]
    assert documents("b/.git") == ["b/.git/config"]


def test_a_glob_is_the_files_that_match(here):
    assert documents("b/*.txt") == ["b/2.txt"]
    assert documents("b/*") == ["b/1.md", "b/2.txt", "b/deep/3.txt"]
    assert documents("**/*.txt") == ["a.txt", "b/2.txt", "b/deep/3.txt"]
    assert documents("b/**") == documents("[a-b]/**/*") == documents(here / "b/**/*.*") == documents("b")
    assert documents("**/[d]eep/*") == documents("b/**/3*") == ["b/deep/3.txt"]
    assert documents("b/**/deep/**") == ["b/deep/3.txt"]
    (here / "b/node_modules").mkdir()
    (here / "b/node_modules/code.txt").write_text("text of somebody's code")
    (here / "b/SHA256SUMS").write_text("of a data set or a model\n")
    assert documents("b") == ["b/1.md", "b/2.txt", "b/deep/3.txt"]


def test_a_file_named_twice_is_read_once_and_the_order_of_words_does_not_matter(here):
    assert documents("b/2.txt", "a.txt", "b", "a.txt") == documents("a.txt", "b")
    assert documents("a.txt", "b") == ["a.txt", "b/1.md", "b/2.txt", "b/deep/3.txt"]


def test_links_are_followed_and_every_file_is_read_once(here):
    (here / "far").mkdir()
    (here / "far" / "4.txt").write_text("text of far/4.txt")
    (here / "b" / "far").symlink_to(here / "far")
    (here / "b" / "again").symlink_to(here / "b")
    (here / "b" / "deep" / "up").symlink_to(here / "b")
    (here / "b" / "2 again.txt").symlink_to(here / "b" / "2.txt")
    (here / "b" / "2 hard.txt").hardlink_to(here / "b" / "2.txt")
    (here / "b" / "broken.txt").symlink_to(here / "nowhere")
    expected = ["b/1.md", "b/2.txt", "b/deep/3.txt", "far/4.txt"]
    for words in (["b"], ["b", "b/*.txt", "b/far"], [here / "b"], ["b/again"]):
        assert sorted(documents(*words)) == expected, words
    assert documents("far", "b/far/**/*.txt") == ["far/4.txt"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["x" * 300], "no such file, directory or source"),
        (["x/" * 3000], "no such file, directory or source"),
        (["a.txt", "c.txt"], r"^c\.txt: no such file, directory or source$"),
        (["shakespear_char"], r"did you mean shakespeare_char\?"),
        (["owner/name"], r"owner/name: no such file, directory or source; did you mean hf:owner/name\?"),
        ([], "python, shakespeare, shakespeare_char"),
    ],
)
def test_what_is_no_source_is_refused(here, words, message):
    with pytest.raises(UserError, match=message):
        source(*words)


def test_empty_files_are_no_documents(here):
    (here / "b/0.txt").write_text("")
    assert documents("b") == ["b/1.md", "b/2.txt", "b/deep/3.txt"]


def test_the_source_is_named_after_what_was_given(here):
    assert (source("b").name, source("a.txt").name, source(".").name) == ("b", "a", "text")
    (here / "My  notes, 2-3.txt").write_text("text")
    assert source("My  notes, 2-3.txt").name == "My_notes_2-3"


def test_an_empty_folder_is_refused(here):
    (here / "empty").mkdir()
    (here / "link").symlink_to("nowhere")
    for word in ("empty", "link", os.devnull):  # also beside other sources
        pipe = "; a pipe is read with -, from standard input" if word == os.devnull else ""
        with pytest.raises(UserError, match=f"^{word}: no files there{pipe}$"):
            source("a.txt", word)


# text


def test_text_is_read_as_it_is_but_for_a_byte_order_mark_and_line_ends_of_windows(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\r \xc3\xa9\n\xef\xbb\xbf")
    assert documents(tmp_path / "a.txt") == ["one\ntwo\r é\n\ufeff"]


@pytest.mark.parametrize("text", ["ACGT" * 15 + "\r\n", "a road \r\n\r\nthe sea", "\r\n", "\r\r\n"])
@pytest.mark.parametrize("piece", [5, 7, 64, 100])
def test_line_ends_of_windows_become_single_wherever_a_file_is_cut(tmp_path, monkeypatch, text, piece):
    monkeypatch.setattr(streams, "PIECE", piece)
    for length in (0, 1, 2, 3):
        (tmp_path / "a.txt").write_bytes(b"A" * length + text.encode() * 50)
        assert "".join(documents(tmp_path / "a.txt")) == "A" * length + (text * 50).replace("\r\n", "\n")


def test_a_line_end_of_windows_is_a_place_where_a_text_may_be_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(streams, "PIECE", 100)
    (tmp_path / "a.txt").write_bytes(b"ACGTACGTACGT\r\n" * 50)
    assert all(piece.endswith("T\n") for piece in documents(tmp_path / "a.txt"))


@pytest.mark.parametrize(
    ("data", "where"),
    [
        (b"abc\xff", "byte 0xff at 3"),
        (b"caf\xe9 in latin-1", "byte 0xe9 at 3"),
        (b"cut off \xc3", "byte 0xc3 at 8"),
        (b"surrogate \xed\xa0\x80", "byte 0xed at 10"),
    ],
)
def test_a_file_that_is_not_utf8_text_is_refused_with_name_and_place_or_skipped_with_a_note(
    tmp_path, capsys, data, where
):
    path = tmp_path / "bad.bin"
    path.write_bytes(data)
    with pytest.raises(UserError, match=f"^{re.escape(f'{path} is not UTF-8 text ({where})')}.*--bad_files=skip"):
        documents(path)
    assert documents(path, bad_files="skip") == []
    assert capsys.readouterr().err.splitlines().count(f"skipped: {path} is not UTF-8 text ({where})") == 1


@pytest.mark.skipif(os.name == "nt" or (hasattr(os, "geteuid") and os.geteuid() == 0), reason="root may read all")
def test_an_unreadable_file_is_refused(here):
    (here / "a.txt").chmod(0)
    with pytest.raises(PermissionError, match=r"a\.txt"):  # as what the system refuses prepare_data.py tells it
        documents("a.txt")
    (here / "b/deep").chmod(0)
    with pytest.raises(PermissionError, match="deep"):
        source("b")
    (here / "b/deep").chmod(0o600)  # its files can be listed, but not opened
    with pytest.raises(PermissionError, match="deep"):
        source("b")
    (here / "b/deep").chmod(0o700)


# the named source that needs no download


def test_python_is_the_standard_library_without_its_tests_and_without_what_was_installed():
    texts = set(documents("python"))
    assert len(texts) > 200
    assert {Path(module.__file__).read_text("utf-8") for module in (argparse, json.decoder)} <= texts
    library = Path(sysconfig.get_paths()["stdlib"])
    others = [Path(pytest.__file__), *library.glob("test/test_[a-d]*.py"), *library.glob("unittest/test/test_*.py")]
    assert texts.isdisjoint(path.read_text("utf-8", "replace") for path in others)


def test_a_file_of_that_name_comes_before_a_named_source(here):
    (here / "python").write_text("text of mine")
    assert documents("python") == ["mine"]
    assert source("python").tokenizer == "gpt2"


# the download of Tiny Shakespeare, from a server on this machine

BODY = b"To be, or not to be\n" * 10_000


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)
        if self.path == "/missing":
            return self.send_error(404)
        self.send_response(200)
        self.send_header("Content-Length", str(len(BODY)))
        self.end_headers()
        self.wfile.write({"/good": BODY, "/other": BODY[::-1]}.get(self.path, BODY[:1000]))

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch, tmp_path):
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.asked, server.url = [], f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        server.cache = tmp_path / ".downloads" / "tinyshakespeare.txt"
        monkeypatch.setattr(sources, "SHAKESPEARE_SHA256", hashlib.sha256(BODY).hexdigest())
        yield server
        server.shutdown()


def downloaded(server) -> str:
    config, partial = PrepareConfig(), server.cache.parents[1] / ".shakespeare.partial"
    return "".join(source("shakespeare").fetched(partial, config).texts(config))


def files_in_cache(server) -> list[str]:
    return [name for name in os.listdir(server.cache.parent) if not name.endswith(".lock")]


def test_a_good_download_is_kept_and_not_fetched_again(server, monkeypatch):
    monkeypatch.setattr(sources, "SHAKESPEARE_URL", f"{server.url}/good")
    for _ in range(2):
        assert downloaded(server) == BODY.decode()
    assert server.asked == ["/good"]
    assert files_in_cache(server) == [server.cache.name]
    server.cache.write_text("<html>put there by hand")
    assert downloaded(server) == BODY.decode()


@pytest.mark.parametrize(
    ("page", "reason"),
    [
        ("missing", "HTTP Error 404: Not Found"),
        ("short", "IncompleteRead"),
        ("other", "the 200,000 bytes received are not the expected file"),
    ],
)
def test_a_failed_download_is_refused_with_address_reason_and_remedy_and_leaves_nothing(
    server, monkeypatch, page, reason
):
    monkeypatch.setattr(sources, "SHAKESPEARE_URL", f"{server.url}/{page}")
    with pytest.raises(UserError, match=re.escape(reason)) as caught:
        downloaded(server)
    assert str(caught.value).startswith(f"{server.url}/{page} cannot be downloaded")
    assert f"put it at {server.cache}" in str(caught.value)
    assert files_in_cache(server) == []


def test_first_downloads_at_once_do_not_disturb_each_other(server, monkeypatch):
    monkeypatch.setattr(sources, "SHAKESPEARE_URL", f"{server.url}/good")
    with ThreadPoolExecutor(4) as threads:
        texts = [*threads.map(lambda _: downloaded(server), range(4))]
    assert texts == [BODY.decode()] * 4 and server.asked == ["/good"]
