"""Find a model in a directory, in a run's directory or on the Hugging Face hub, and read its configuration."""

import os
from pathlib import Path

from model import GPTConfig
from plaingpt.console import UserError, one_line
from plaingpt.files import existing, read_json

TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "merges.txt")
FILES = ["config.json", "*.safetensors", *TOKENIZER_FILES, "tokenizer_config.json", "added_tokens.json"]
CONFIG_NAMES = {
    "block_size": "n_positions", "vocab_size": "vocab_size", "n_layer": "n_layer", "n_head": "n_head",
    "n_embd": "n_embd", "dropout": "resid_pdrop", "bias": "bias",
}  # fmt: skip
# Other values that a config.json of this type may set, and those of GPT-2
GPT2_VALUES = {
    "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False, "tie_word_embeddings": True, "add_cross_attention": False,
}  # fmt: skip
REASONS = {  # huggingface_hub's own messages have many lines
    "RepositoryNotFoundError": "no model has this name, or it is private; if so, log in: hf auth login",
    "GatedRepoError": "its owner has to grant you access, on the model's page; then log in: hf auth login",
    "RevisionNotFoundError": "it has no such branch, tag or commit",
    "LocalEntryNotFoundError": "the hub does not answer, and the model is not in the cache; you can name a directory",
    "HFValidationError": "names on the hub have the form owner/name",
}


def model_path(path_or_name: str | Path) -> Path:
    """The model directory or the nanoGPT ckpt.pt of that name; in a run's directory, `best`, `last` or ckpt.pt; or the
    cached copy of a model on the hub. A Path is always local."""
    if Path(path_or_name).suffix == ".pt":
        return Path(path_or_name)
    if os.path.isfile(path_or_name) and (Path(path_or_name).parent / "config.json").exists():
        raise UserError(f"{path_or_name} is a file: name its directory, {Path(path_or_name).parent}")
    found = existing(Path(path_or_name))
    if found and not (found / "config.json").exists():
        inner = existing(found / "best") or existing(found / "last") or found / "ckpt.pt"
        found = inner if inner.exists() else None
    if not found and (isinstance(path_or_name, Path) or os.path.isdir(path_or_name)):
        raise UserError(f"{path_or_name} contains no model; train one first, or name the directory of one")
    return found or download(str(path_or_name))


def read_config(directory: Path) -> GPTConfig:
    path = directory / "config.json"
    found = read_json(path)
    if found.get("model_type") != "gpt2":
        raise UserError(f"{path}: a model of type {found.get('model_type')}, not a GPT-2")
    if found.get("activation_function") == "gelu_pytorch_tanh":  # the same function
        found["activation_function"] = "gelu_new"
    for name, expected in GPT2_VALUES.items():
        if found.get(name, expected) != expected:
            raise UserError(f"{path}: {name} is {found[name]}, but GPT-2 has {expected}")
    if missing := set(CONFIG_NAMES.values()) - {"bias", "resid_pdrop"} - set(found):
        raise UserError(f"{path} does not describe a GPT-2: {', '.join(sorted(missing))} missing")
    sizes = {ours: found[theirs] for ours, theirs in CONFIG_NAMES.items() if theirs in found}
    return checked_config(path, GPTConfig(**sizes))


def checked_config(source: str | Path, c: GPTConfig) -> GPTConfig:
    sizes = (c.block_size, c.vocab_size, c.n_layer, c.n_head, c.n_embd)
    if not all(type(n) is int and 0 < n <= 2**20 for n in sizes) or c.n_embd % c.n_head or type(c.bias) is not bool:
        raise UserError(f"{source}: its configuration does not describe a GPT-2")
    return c


def download(name: str) -> Path:
    """Download a model, or find it in the cache; `name` may end in @ and a branch, tag or commit."""
    import huggingface_hub

    repository, _, revision = name.partition("@")
    try:
        # The configuration first: a model of another type is refused before its weights are downloaded.
        for patterns in ["config.json"], FILES:
            found = huggingface_hub.snapshot_download(repository, revision=revision or None, allow_patterns=patterns)
            read_config(Path(found))
    except UserError:
        raise
    except Exception as error:  # no such name, no network, no permission, not in the cache, …
        reason = REASONS.get(type(error).__name__) or one_line(error)
        raise UserError(f"{name} is not a local directory, and cannot be loaded from the hub: {reason}") from error
    return Path(found)
