"""Where documents come from: named sources, and any files, folders or globs of text."""

import glob
import hashlib
import http.client
import sysconfig
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from config.settings import UserError, closest, note

CACHE = Path(__file__).parent / ".downloads"


@dataclass(frozen=True)
class Source:
    """`documents()` may be called again for another pass; the other fields are what suits the text."""

    documents: Callable[[], Iterator[str]]
    name: str
    tokenizer: str
    val_fraction: float


def find_source(wanted: list[str], skip_bad_files: bool = False) -> Source:
    """The source that the words of the command line name: one of NAMED, or paths of files, folders and globs."""
    if len(wanted) == 1 and wanted[0] in NAMED and not Path(wanted[0]).exists():
        return NAMED[wanted[0]]
    if named := next((word for word in wanted if word in NAMED and not Path(word).exists()), None):
        raise UserError(
            f"{named} is a source of its own: prepare it without {' '.join(w for w in wanted if w != named)}"
        )
    if not wanted:
        raise UserError(f"name a source: one of {', '.join(NAMED)}, or files, folders and globs of text")
    files = sorted({path for word in wanted for path in _files(word)})
    if not files:
        raise UserError(f"{' '.join(wanted)}: no files there")
    return Source(
        documents=lambda: (text for path in files if (text := read_text(path, skip_bad_files))),
        name=Path(wanted[0]).stem or "text",
        tokenizer="gpt2",
        val_fraction=0.05,
    )


def read_text(path: Path, skip: bool = False) -> str | None:
    """The text of a UTF-8 file; of one that is not, None with a note if `skip`, else UserError."""
    try:
        data = path.read_bytes()
        text = data.decode("utf-8-sig")
        bad = data.find(b"\0")
    except UnicodeDecodeError as error:
        bad = error.start
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    if bad == -1:
        return text
    problem = f"{path} is not UTF-8 text (byte 0x{data[bad]:02x} at {bad:,})"
    if not skip:
        raise UserError(f"{problem}; leave it out, or go on without such files: --bad_files=skip")
    note(f"skipped: {problem}")
    return None


def download(url: str, path: Path, size: int, sha256: str, timeout: float = 30) -> Path:
    """`path`, downloaded if it is not there yet; kept only if size and checksum are right."""
    if path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256:
        return path
    instead = f"fetch it by other means and put it at {path}"
    data = bytearray()
    try:
        bar = tqdm(total=size, unit="B", unit_scale=True, desc=url.rsplit("/", 1)[-1], disable=None)
        with bar, urllib.request.urlopen(url, timeout=timeout) as response:
            while len(data) <= size and (chunk := response.read(1 << 16)):
                data += chunk
                bar.update(len(chunk))
    except urllib.error.HTTPError as error:
        raise UserError(f"{url}: the server answered {error.code} {error.reason}; {instead}") from error
    except (OSError, http.client.HTTPException) as error:  # no network, refused, timed out, broken off
        raise UserError(f"{url} cannot be downloaded ({getattr(error, 'reason', error)}); {instead}") from error
    if len(data) != size or hashlib.sha256(data).hexdigest() != sha256:
        raise UserError(f"{url} gave {len(data):,} bytes that are not the expected file; try again, or {instead}")
    partial = path.with_name(path.name + ".new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(data)
        partial.replace(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}") from error
    return path


def _files(word: str) -> Iterator[Path]:
    path = Path(word)
    if path.is_dir():
        for child in sorted(path.rglob("*")):
            hidden = any(part.startswith(".") for part in child.relative_to(path).parts)
            if child.is_file() and not hidden:
                yield child
    elif path.is_file():
        yield path
    elif matches := glob.glob(word, recursive=True):
        yield from (Path(match) for match in matches if Path(match).is_file())
    else:
        raise UserError(f"{word}: no such file, folder or source{closest(word, NAMED)}")


def _shakespeare() -> Iterator[str]:
    url = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
    digest = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
    yield download(url, CACHE / "tinyshakespeare.txt", size=1_115_394, sha256=digest).read_text("utf-8")


def _standard_library() -> Iterator[str]:
    """Python's own library without its tests: a file is a document."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test"} & set(path.relative_to(root).parts)
        if not left_out and (text := read_text(path, skip=True)):
            yield text


NAMED = {
    "python": Source(_standard_library, "python", tokenizer="bpe", val_fraction=0.05),
    "shakespeare": Source(_shakespeare, "shakespeare", tokenizer="gpt2", val_fraction=0.1),
    "shakespeare_char": Source(_shakespeare, "shakespeare_char", tokenizer="char", val_fraction=0.1),
}
