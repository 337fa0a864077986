"""Data preparation, measured: rates against nanoGPT's way and tiktoken, memory, kills, batches, order of the batches.

python bench/prepare.py corpus --folder=F     # makes the text of the others: Python files of the installed packages
python bench/prepare.py speed --folder=F
python bench/prepare.py memory --folder=F
python bench/prepare.py kills --folder=F
python bench/prepare.py batches --folder=F
python bench/prepare.py quality --data_dir=D --dataset=python --recipe=config/quickstart.py
"""

import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import xxhash

from plaingpt.console import UserError, run_script
from plaingpt.settings import PositiveInt, load_settings
from plaingpt.text.config import PrepareConfig
from plaingpt.text.sources import find_source
from plaingpt.tokenizer import gpt2_by_tiktoken
from plaingpt.tokens import open_data_set

CORES = len(os.sched_getaffinity(0))
EOT = 50256
VAL = 0.0005  # nanoGPT's share of OpenWebText


@dataclass(frozen=True)
class BenchConfig:
    work: tuple[str, ...] = ()
    """corpus, speed, nanogpt, memory, kills, batches, quality"""
    folder: str = "bench-prepare"
    """where the text and what is made of it lie"""
    rounds: PositiveInt = 2
    """for `speed`"""
    kills: PositiveInt = 20
    """for `kills`"""
    data_dir: str = "data"
    """for `quality`: where the data sets lie"""
    dataset: str = "shakespeare_char"
    """for `quality`"""
    recipe: str = "config/train_shakespeare_cpu.py"
    """for `quality`"""
    seed: PositiveInt = 1
    """for `quality`"""


def corpus(folder: Path, config: BenchConfig) -> None:
    """200.parquet; 2000.parquet and 2000.txt, the same ten times, another tenth of the lines changed each time."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = []
    paths = sysconfig.get_paths()
    config = PrepareConfig([f"{paths[key]}/**/*.py" for key in ("stdlib", "purelib")], bad_files="skip")
    for text in find_source(config).texts(config):
        if len(text) < 1 << 22:  # a table of megabytes written as Python is no document
            texts.append(text)
    random.Random(0).shuffle(texts)
    size = np.cumsum([len(text.encode()) for text in texts])
    texts = texts[: int(np.searchsorted(size, 200e6)) + 1]
    pq.write_table(pa.table({"text": texts}), folder / "200.parquet", row_group_size=1000)
    schema = pa.schema([("text", pa.string())])
    with pq.ParquetWriter(folder / "2000.parquet", schema) as table, open(folder / "2000.txt", "w") as plain:
        for turn in range(10):
            changed = [varied(text, turn) for text in texts]
            table.write_table(pa.table({"text": changed}), row_group_size=1000)
            plain.write("\n".join(changed))
    print(f"{len(texts):,} documents, {sum(len(t.encode()) for t in texts) / 1e6:.1f} MB, and ten times that")


def varied(text: str, turn: int) -> str:
    lines = text.split("\n")
    lines[turn::10] = [f"{line}  # {turn} {i}" for i, line in enumerate(lines[turn::10])]
    return "\n".join(lines)


def texts_of(folder: Path) -> list[str]:
    return pq.read_table(folder / "200.parquet").column("text").to_pylist()


def preparation(folder: Path, file: str, name: str) -> list[str]:
    made = [f"--name={name}", "--tokenizer=gpt2", f"--val_fraction={VAL}", f"--data_dir={folder}/made"]
    return [sys.executable, str(ROOT / "prepare_data.py"), f"{folder}/{file}", *made]


def speed(folder: Path, config: BenchConfig) -> None:
    """Interleaved rounds. Ours and nanoGPT's way: whole processes, from a Parquet file to token files; nanoGPT's tells
    besides what it took after reading. tiktoken's batch: the call alone. Each is done twice in a row and the second
    time counts: memory that a virtual machine has not touched for a while costs its host seconds."""
    texts = texts_of(folder)
    size = sum(len(text.encode()) for text in texts)
    print(f"{len(texts):,} documents, {size / 1e6:.1f} MB, {CORES} cores", flush=True)
    files = ("200.parquet", "2000.parquet")
    rates = {}
    for turn in range(config.rounds):
        for file in files:
            seconds = timed(preparation(folder, file, file.split(".")[0]), folder)
            done = text_bytes(folder / "made" / file.split(".")[0])
            tell(rates, f"ours, the process from start to end, {file}", done, seconds)
        for _ in range(2):
            started = time.perf_counter()
            ids = gpt2_by_tiktoken().encode_ordinary_batch(texts, num_threads=CORES)
            seconds = time.perf_counter() - started
        tell(rates, "tiktoken.encode_ordinary_batch", size, seconds)
        if not turn:
            timed(preparation(folder, files[0], "200"), folder)
            check_ids(texts, ids, folder / "made" / "200")
        del ids
        seconds = timed([sys.executable, __file__, "nanogpt", f"--folder={folder}"], folder)
        tell(rates, "nanoGPT's way, the process from start to end", size, seconds)
        tell(rates, "nanoGPT's way, after reading", size, float((folder / "nanogpt.seconds").read_text()))
    medians = {name: float(np.median(found)) for name, found in rates.items()}
    for name, rate in medians.items():
        of_others = ", ".join(f"{rate / other:.1f} times {n}" for n, other in list(medians.items())[len(files) :])
        print(f"median of {name}: {rate:.1f} MB/s: {of_others}")


def clean(folder: Path) -> None:
    """What was made before is no part of the next process's work."""
    for old in (folder / "made", folder / "cache"):
        shutil.rmtree(old, ignore_errors=True)
    for split in ("train", "test"):
        (folder / f"{split}.bin").unlink(missing_ok=True)
    os.sync()


def tell(rates: dict[str, list[float]], name: str, size: int, seconds: float) -> None:
    rates.setdefault(name, []).append(size / 1e6 / seconds)
    print(f"{name}: {seconds:.2f} s, {rates[name][-1]:.1f} MB/s", flush=True)


def timed(command: list[str], folder: Path) -> float:
    for _ in range(2):
        clean(folder)
        started = time.perf_counter()
        subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
        seconds = time.perf_counter() - started
    return seconds


def check_ids(texts: list[str], ids: list[list[int]], directory: Path) -> None:
    """What prepare_data.py wrote is tiktoken's ids of every document, end of text between them."""
    data = open_data_set(directory)
    for split in ("train", "val"):
        ours = np.concatenate(list(getattr(data, split).all()))
        in_val = [xxhash.xxh3_64_intdigest(text.encode()) < VAL * 2**64 for text in texts]
        mine = [i for i, is_val in zip(ids, in_val) if is_val == (split == "val")]
        theirs = np.concatenate([np.array([*document, EOT], np.uint16) for document in mine])[:-1]
        assert np.array_equal(ours, theirs), f"{split} differs"
        print(f"{split}: {len(ours):,} ids, the same as tiktoken's")


def nanogpt(folder: Path, config: BenchConfig) -> None:
    """One call a document over all cores through datasets.map, then the ids through a memory map in 1,024 parts."""
    import datasets

    datasets.disable_progress_bars()
    source = dict(data_files=str(folder / "200.parquet"), split="train", cache_dir=str(folder / "cache"))
    both = datasets.load_dataset("parquet", **source).train_test_split(test_size=VAL, seed=2357)
    started = time.perf_counter()
    encode_and_write(both, folder)
    (folder / "nanogpt.seconds").write_text(str(time.perf_counter() - started))


def encode_and_write(both: dict, folder: Path) -> None:
    encode = gpt2_by_tiktoken().encode_ordinary

    def process(row: dict) -> dict:
        ids = [*encode(row["text"]), EOT]
        return {"ids": ids, "len": len(ids)}

    encoded = both.map(process, remove_columns=["text"], num_proc=CORES)
    for split, rows in encoded.items():
        out = np.memmap(folder / f"{split}.bin", np.uint16, "w+", shape=(int(np.sum(rows["len"], dtype=np.uint64)),))
        filled = 0
        parts = min(1024, len(rows))
        for i in range(parts):
            part = rows.shard(parts, i, contiguous=True).with_format("numpy")
            ids = np.concatenate(part["ids"])
            out[filled : filled + len(ids)] = ids
            filled += len(ids)
        out.flush()


def memory(folder: Path, config: BenchConfig) -> None:
    """The most that all processes of a preparation occupied together, and the largest one of them."""
    for file in ("200.parquet", "2000.parquet", "2000.txt"):
        started = time.perf_counter()
        child = subprocess.Popen(preparation(folder, file, "memory"), stderr=subprocess.DEVNULL)
        together = largest = 0
        while child.poll() is None:
            sizes = [occupied(pid) for pid in family(child.pid)]
            together, largest = max(together, sum(sizes)), max(largest, *sizes, 0)
            time.sleep(0.05)
        assert child.returncode == 0
        size = (folder / file).stat().st_size if file.endswith("txt") else text_bytes(folder / "made" / "memory")
        seconds = time.perf_counter() - started
        print(
            f"{file}: {size / 1e6:,.0f} MB of text, at most {together / 1e6:,.0f} MB in all processes together, "
            f"{largest / 1e6:,.0f} MB in one; {seconds:.1f} s, {size / 1e6 / seconds:.0f} MB/s",
            flush=True,
        )


def text_bytes(directory: Path) -> int:
    return sum(split["bytes"] for split in json.loads((directory / "meta.json").read_text())["splits"].values())


def family(pid: int) -> list[int]:
    """The process and all below it."""
    found = [pid]
    for parent in found:
        with contextlib.suppress(OSError):
            found += map(int, Path(f"/proc/{parent}/task/{parent}/children").read_text().split())
    return found


def occupied(pid: int) -> int:
    """Bytes of memory of its own and its share of what it shares (PSS)."""
    with contextlib.suppress(OSError, IndexError):
        return int(Path(f"/proc/{pid}/smaps_rollup").read_text().split("\nPss:")[1].split()[0]) * 1024
    return 0


def kills(folder: Path, config: BenchConfig) -> None:
    """SIGKILL at random moments of the whole duration, started again each time; then the bytes are compared."""
    rng, command = random.Random(2), preparation(folder, "200.parquet", "killed")
    made, partial = folder / "made" / "killed", folder / "made" / ".killed.partial"
    for old in (made, partial):
        shutil.rmtree(old, ignore_errors=True)
    started = time.perf_counter()
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    duration = time.perf_counter() - started
    expected = contents(made)
    shutil.rmtree(made)
    count = ended = went_on = 0
    while count < config.kills:
        child = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        went_on += (partial / "part-1.json").exists()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(rng.uniform(0, duration))
        if child.poll() is None:
            child.send_signal(signal.SIGKILL)
            child.wait()
            count += 1
        if child.returncode == 0:
            assert contents(made) == expected, "other bytes"
            ended += 1
            shutil.rmtree(made)
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    assert contents(made) == expected, "other bytes"
    print(
        f"{count} kills, {went_on} starts continued, "
        f"{ended + 1} runs ended, each with the bytes of the undisturbed run of {duration:.1f} s"
    )


def contents(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(directory.iterdir())}


def batches(folder: Path, config: BenchConfig) -> None:
    """Tokens a second, from the page cache, against nanoGPT's way: random starts, two copies a sequence, stacked."""
    import torch

    from plaingpt.batches import TrainBatches

    torch.set_num_threads(1)
    path = folder / "made" / "200"
    tokens = open_data_set(path).train
    for ids in tokens.all():
        ids.max()
    for sequences, length in ((12, 64), (12, 1024), (64, 256), (40 * 12, 1024)):
        ours = TrainBatches(tokens, length, sequences, seed=0)
        size = min(sequences, 12 if length == 1024 else sequences)  # of a micro-batch

        def theirs(n=size, length=length) -> None:
            data = np.memmap(path / "train.bin", np.uint16, "r")
            starts = torch.randint(len(data) - length, (n,))
            for shift in (0, 1):
                torch.stack([torch.from_numpy(data[i + shift : i + shift + length].astype(np.int64)) for i in starts])

        micro_batches = ((step, i) for step in range(10**9) for i in range(sequences // size))
        rates = [
            rate(lambda: ours.micro_batch(*next(micro_batches), size), size * length),  # noqa: B023
            rate(theirs, size * length),
        ]
        print(
            f"{size} x {length}, {sequences} sequences an update: ours {rates[0] / 1e6:,.1f} million tokens/s "
            f"({rates[0] * 2 / 1e9:.2f} GB/s of uint16 read, {rates[0] * 8 / 1e9:.2f} GB/s of int64), nanoGPT's way "
            f"{rates[1] / 1e6:,.1f}: {rates[0] / rates[1]:.1f} times",
            flush=True,
        )


def rate(work, tokens: int, seconds: float = 1.5) -> float:
    for _ in range(20):
        work()
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        work()
        count += 1
    return tokens * count / (time.perf_counter() - started)


def quality(folder: Path, config: BenchConfig) -> None:
    """The same run with every window once an epoch, and with windows drawn at random; loss over all of validation."""
    for way in ("without", "with"):
        out_dir = folder / f"{config.dataset}-{way}-{config.seed}"
        flags = [config.recipe, f"--dataset={config.dataset}", f"--data_dir={config.data_dir}", f"--seed={config.seed}"]
        flags += [f"--out_dir={out_dir}", "--init_from=scratch", "--sample_tokens=0", "--eval_iters=0"]
        code = "import bench.prepare as b; b.train_way()"
        subprocess.run([sys.executable, "-c", code, way, *flags], check=True, cwd=ROOT, stderr=subprocess.DEVNULL)
        print(f"{config.dataset}, {way} replacement, seed {config.seed}: {', '.join(curve(out_dir))}", flush=True)


def train_way() -> None:
    """train.py in this process; with `with`, its windows begin anywhere, independently of one another."""
    import train
    from plaingpt.batches import TrainBatches

    def random_starts(self, step: int, first: int = 0, count: int | None = None) -> np.ndarray:
        rng = np.random.default_rng([self.seed, step])
        return rng.integers(0, len(self.tokens) - self.block_size, self.sequences)[first:][:count]

    if sys.argv.pop(1) == "with":
        TrainBatches.starts = random_starts
    run_script(train.main)


def curve(out_dir: Path) -> list[str]:
    found = map(json.loads, (out_dir / "metrics.jsonl").read_text().splitlines())
    return [
        f"{step}: {loss:.4f}" for step, loss in {m["step"]: m["val_loss"] for m in found if "val_loss" in m}.items()
    ]


def main() -> None:
    config, _ = load_settings(BenchConfig, positional="work")
    works = {f.__name__: f for f in (corpus, speed, nanogpt, memory, kills, batches, quality)}
    for name in config.work:
        if name not in works:
            raise UserError(f"there is no {name}: {', '.join(works)}")
        works[name](Path(config.folder), config)


if __name__ == "__main__":
    run_script(main)
