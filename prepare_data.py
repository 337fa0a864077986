"""Text in, token files out: data/<name>/ with train.bin, val.bin (numbered if large), meta.json and tokenizer.json.

python prepare_data.py python                # Python's standard library: nothing to download
python prepare_data.py my/books 'notes/*.md' --name=books --tokenizer=bpe --vocab_size=4096
python prepare_data.py hf:owner/name --column=text --part=3/16          # one of 16 machines
"""

import plaingpt.startup

import dataclasses
import os
import re
import shlex
from pathlib import Path

from plaingpt.console import UserError, cores, counted, note, one_line, run_script
from plaingpt.files import check_writable, json_or_empty
from plaingpt.settings import load_settings
from plaingpt.text.config import PrepareConfig
from plaingpt.text.job import Job, prepare
from plaingpt.text.sources import Source, find_source
from plaingpt.tokenizer import resolve_tokenizer
from plaingpt.tokens import data_dir_flag

DATA_SET_FILES = re.compile(r"(train|val)(_\d+)?\.bin|meta\.json|tokenizer(_config)?\.json|SHA256SUMS|\.DS_Store")


def main() -> None:
    config, given = load_settings(PrepareConfig, positional="sources")
    source = find_source(config, json_lines="column" in given)
    name = source.name if config.name is None else config.name
    if not re.fullmatch(r"\w[\w.-]*", name) or len(name.encode()) > 200:
        raise UserError(f"{name[:50]!r} cannot be the data set's name: up to 200 letters, digits, '.', '_' and '-'")
    directory = Path(config.data_dir) / name
    match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", config.part)
    part, parts = map(int, match.groups()) if match else (0, 0)
    if not 1 <= part <= parts:
        raise UserError(f"--part={config.part}: write --part=3/16 for the third of 16 parts")
    if parts > 1 and source.once:
        raise UserError("standard input cannot be split into parts: save it to a file first")
    if parts > 1 and config.dedup:
        raise UserError("--dedup needs all documents in one process: leave out --part")
    kind, tokenizer = resolve_tokenizer(config.tokenizer or source.tokenizer)
    if source.dataset is None and (unused := {"config", "split", "revision"} & given.keys()):
        raise UserError(f"--{min(unused)} is for Hugging Face data sets (hf:owner/name)")
    if "vocab_size" in given and kind != "bpe":
        raise UserError(f"--vocab_size is for --tokenizer=bpe, but this is {kind}")
    bad_files = config.bad_files or source.bad_files
    config = dataclasses.replace(config, val_fraction=config.val_fraction or source.val_fraction, bad_files=bad_files)
    job = Job(directory, source, config, kind, tokenizer, part, parts)
    check_writable(job.partial.parent)
    if parts == 1 or not job.is_done():
        check_replaceable(directory, source, config.name)
    try:
        meta = prepare(job, config.threads or cores())
    except OSError as error:
        raise UserError(f"{directory} cannot be prepared: {one_line(error)}") from error
    except KeyboardInterrupt:
        note("stopped" if source.once else "stopped; run the same command to continue")
        raise
    if meta:
        report(directory, meta, config.tokenizer, config.val_fraction)


def check_replaceable(directory: Path, source: Source, name: str | None) -> None:
    """UserError if `directory` exists but is no data set, has other files, or is from another source without --name."""
    if not os.path.lexists(directory):
        return
    found = json_or_empty(directory / "meta.json")
    if not {"format_version", "splits"} <= found.keys():
        raise UserError(f"{directory} exists but is not a plainGPT data set; choose another --name")
    if name is None and (found.get("source") != source.description or source.once):
        replace = f"give --name=… (--name={directory.name} replaces it)"
        raise UserError(f"{directory} was made from {found.get('source')!s:.300}: {replace}")
    if others := [path.name for path in directory.glob("*") if not DATA_SET_FILES.fullmatch(path.name)]:
        raise UserError(f"replacing {directory} would delete {others[0]}: move that, or choose another --name")
    note(f"will replace {directory} (tokenizer {found.get('tokenizer')}, vocabulary of {found.get('vocab_size')})")


def report(directory: Path, meta: dict, tokenizer: str | None, val_fraction: float) -> None:
    """Print what was prepared, and the command that trains on it."""
    for split, figures in meta["splits"].items():
        tokens, documents = counted(figures["tokens"], "token"), counted(figures["documents"], "document")
        files = f" in {len(figures['files'])} files" if len(figures["files"]) > 1 else ""
        average = figures["bytes"] / figures["tokens"]
        note(f"{split}: {tokens} ({average:.2f} bytes per token), {documents}{files}")
    size = sum(figures["bytes"] for figures in meta["splits"].values())
    amount = f"{size / 1e6:,.1f} MB" if size > 1e5 else f"{size:,} bytes"
    note(f"{directory}: {amount} of text, vocabulary of {meta['vocab_size']:,}")
    if (share := meta["splits"]["val"]["bytes"] / size) > 3 * val_fraction:
        reason = "the documents are few or short, or differ in length"
        note(f"{share:.2%} of the text is in validation instead of {val_fraction:.2%}: {reason}")
    name = directory.name
    if tokenizer is None and meta["tokenizer"] == "gpt2" and size < 1e8:
        note("GPT-2's tokenizer suits finetuning GPT-2; to train a new model on so little text, use --tokenizer=bpe")
    is_model = tokenizer and os.path.isfile(os.path.join(tokenizer, "config.json"))
    finetune = f" --init_from={shlex.quote(tokenizer)}" if is_model else ""
    flags = f"--dataset={name}{data_dir_flag(directory)}{finetune} --out_dir=out-{name}"
    note(f"next: python train.py {flags} --minutes=10")


if __name__ == "__main__":
    run_script(main, less_memory="--threads")
