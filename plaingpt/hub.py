"""Models on the Hugging Face hub: download a GPT-2 by name; its pickles are refused."""

import json
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from plaingpt.console import UserError, one_line

TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt")
FILES = ["config.json", "*.safetensors", *TOKENIZER_FILES, "tokenizer_config.json"]
REASONS = {  # huggingface_hub's own messages have many lines
    "RepositoryNotFoundError": "no model has this name, or it is private; if so, log in: hf auth login",
    "GatedRepoError": "its owner has to grant you access, on its page there; then log in: hf auth login",
    "RevisionNotFoundError": "it has no such branch, tag or commit",
    "LocalEntryNotFoundError": "the hub does not answer, and the model is not in the cache; you can name a directory",
    "HFValidationError": "names there have the form owner/name",
}


def download(name: str, check_config: Callable[[Path], Any]) -> Path:
    """Download a model, or find it in the cache; `name` may end in @ and a branch, tag or commit.

    `check_config` raises UserError if the config.json in a directory is not one we can read.
    """
    import huggingface_hub

    repository, _, revision = name.partition("@")
    try:
        # The configuration first: a model of another type is refused before its weights are downloaded.
        for patterns in ["config.json"], FILES:
            found = huggingface_hub.snapshot_download(repository, revision=revision or None, allow_patterns=patterns)
            check_config(Path(found))
    except UserError:
        raise
    except Exception as error:  # no such name, no network, no permission, not in the cache, …
        reason = REASONS.get(type(error).__name__) or one_line(error)
        raise UserError(f"{name} is not a directory here, and cannot be loaded from the hub: {reason}") from error
    if not any(Path(found).glob("*.safetensors")):
        raise UserError(
            f"{name} has no weights in safetensors, on the hub or in the cache; {how_to_convert(repository)}"
        )
    return Path(found)


def how_to_convert(source: str) -> str:
    """Why a pickle is refused, and the command that converts the model `source`, a directory or a name on the hub."""
    old, new = json.dumps(source), json.dumps(f"{Path(source).name}-safetensors")  # in double quotes
    code = f"[c.from_pretrained({old}).save_pretrained({new}) for c in (t.GPT2LMHeadModel, t.AutoTokenizer)]"
    return (
        "a pickle can run code when it is read. If you trust it, convert it: "
        f"python -c {shlex.quote(f'import transformers as t; {code}')}"
    )
