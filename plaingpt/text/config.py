"""Settings of prepare_data.py, which turns text into token files.

python prepare_data.py my/books 'notes/*.md' --name=books --tokenizer=bpe --vocab_size=4096
"""

from dataclasses import dataclass
from typing import Annotated, Literal

from plaingpt.settings import PathName, PositiveInt, Range


@dataclass(frozen=True)
class PrepareConfig:
    sources: tuple[PathName, ...] = ()
    """files, directories and globs (text, JSON, CSV, TSV, Parquet); - (standard input); hf:owner/name; or python,
    shakespeare, shakespeare_char, tinystories, openwebtext, fineweb_edu"""
    name: str | None = None
    """name of the data set: its directory in data_dir, train.py's `dataset` (default: from the source)"""
    tokenizer: PathName | None = None
    """gpt2, char, byte, bpe (trained on your text), or a model directory (default for files: gpt2)"""
    vocab_size: Annotated[int, Range("from 257 to 1,048,576", lambda n: 257 <= n <= 2**20)] = 2048
    """ids of a bpe tokenizer, including the 256 bytes and end of text"""
    val_fraction: Annotated[float, Range("from 0.00001 to 0.5", lambda x: 1e-5 <= x <= 0.5)] | None = None
    """fraction of the text held out for validation (default: 0.05 for files, 0.01 for hf:; named sources differ)"""
    dedup: bool = False
    """drop documents that are exact copies of earlier ones (text files over 1 MB are never dropped); needs about 100
    bytes of memory per document"""
    split_documents: bool = False
    """split text files into documents at <|endoftext|>"""
    bad_files: Literal["stop", "skip", "replace"] | None = None
    """invalid UTF-8: stop; skip the document (in a text file over 1 MB, the bad megabyte; in a JSON array, the entire
    array); or replace the invalid bytes with U+FFFD (default: stop; skip for python)"""
    encoding: str | None = None
    """encoding of text, JSON, CSV and TSV without a byte order mark, such as latin-1 (default: UTF-8)"""
    column: str = "text"
    """name of the text column in JSON, CSV, TSV, Parquet and Hugging Face data sets; if given, standard input is read
    as JSON Lines"""
    config: str | None = None
    """configuration of a Hugging Face data set, such as sample-10BT"""
    split: str = "train"
    """split of a Hugging Face data set; for a slice, such as train[:10%], the entire data set is downloaded first"""
    revision: str | None = None
    """revision of a Hugging Face data set (default: the newest)"""
    shard_tokens: PositiveInt = 1 << 28
    """maximum number of ids per file; a larger split is written to several files"""
    part: str = "1/1"
    """this machine's part of the work: 3/16 is the third of 16; single files are not divided; the last part to finish
    completes the data set"""
    threads: PositiveInt | None = None
    """number of encoding threads (default: one per core)"""
    data_dir: PathName = "data"
    """directory of the data sets"""
