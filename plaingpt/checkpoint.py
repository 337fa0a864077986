"""Model directories in Hugging Face's GPT-2 form, and import of GPT-2 and nanoGPT weights.

A model is a directory: config.json, model.safetensors, generation_config.json and the tokenizer's files,
which every GPT-2 tool reads. It may be a stranger's: nothing in it is code, nothing is ever unpickled but
nanoGPT's ckpt.pt, with weights_only, and no path or link in it is followed out of it.
"""

import contextlib
import dataclasses
import json
import math
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from model import GPT, GPTConfig
from plaingpt.console import UserError, note, one_line
from plaingpt.files import check_sums, existing, inside
from plaingpt.tokenizer import Tokenizer, gpt2

HUB_FILES = ["config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer.json"]
HUB_ERRORS = {  # what huggingface_hub says in many lines
    "RepositoryNotFoundError": "there is none of that name, or it is private; then log in: hf auth login",
    "GatedRepoError": "its owner wants to be asked for access, on its page there; then log in: hf auth login",
    "RevisionNotFoundError": "it has no such branch, tag or commit",
    "LocalEntryNotFoundError": "it does not answer, and no copy is in the cache; it can be named as a directory",
    "HFValidationError": "a name there is owner/name",
}

WTE, WPE = "transformer.wte.weight", "transformer.wpe.weight"
# Hugging Face's GPT-2 keeps these matrices as (in, out), nn.Linear as (out, in).
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
CONFIG_NAMES = {
    "block_size": "n_positions", "vocab_size": "vocab_size", "n_layer": "n_layer", "n_head": "n_head",
    "n_embd": "n_embd", "dropout": "resid_pdrop", "bias": "bias",
}  # fmt: skip
# What else a config.json of this type could say, and what every GPT-2 has
OF_GPT2 = {
    "activation_function": "gelu_new", "layer_norm_epsilon": 1e-5, "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False, "tie_word_embeddings": True, "add_cross_attention": False,
}  # fmt: skip


def save_model(directory: Path, model: GPT, tokenizer: Tokenizer) -> None:
    """Fill `directory` with a complete Hugging Face model. Weights keep their precision; absent biases become zeros."""
    write_model(directory, model.config, model.weights(), tokenizer)


def write_model(directory: Path, config: GPTConfig, weights: dict[str, Tensor], tokenizer: Tokenizer) -> None:
    tensors = {
        name: (weight.T if name.endswith(TRANSPOSED) else weight).contiguous().cpu()
        for name, weight in with_biases(weights).items()
    }
    safetensors.torch.save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(directory)
    ends = {"bos_token_id": tokenizer.end_of_text, "eos_token_id": tokenizer.end_of_text}
    _write_json(
        directory / "config.json",
        {CONFIG_NAMES[name]: value for name, value in dataclasses.asdict(config).items()}
        | {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "activation_function": "gelu_new"}
        | {"n_ctx": config.block_size, "embd_pdrop": config.dropout, "attn_pdrop": config.dropout}
        | {"layer_norm_epsilon": 1e-5, "tie_word_embeddings": True, "torch_dtype": "float32"}
        | ends,
    )
    shutil.copymode(directory / "config.json", directory / "model.safetensors")  # its own is the owner's alone
    _write_json(directory / "generation_config.json", ends | {"max_new_tokens": 100, "do_sample": True})


def with_biases(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """`weights`, and zeros for the biases of a model that has none: to other tools every GPT-2 has them."""
    layers = [name for name in weights if name.endswith(".weight") and name not in (WTE, WPE)]
    zeros = {name.removesuffix("weight") + "bias": weights[name].new_zeros(len(weights[name])) for name in layers}
    return weights | {name: zero for name, zero in zeros.items() if name not in weights}


def load_model(
    path_or_name: str | Path, block_size: int | None = None, dropout: float = 0.0, check: bool = True
) -> tuple[GPT, Tokenizer]:
    """(model, tokenizer) of a model directory, a nanoGPT ckpt.pt, or a GPT-2 on the hub: `gpt2`, `owner/name@revision`.

    The model is in fp32 on the CPU, in evaluation mode; loading needs little more memory than its weights. A smaller
    `block_size` crops the positions. With `check`, the files are compared with their checksums, where there are any.
    """
    path = Path(path_or_name)
    if path.suffix == ".pt":
        config, weights = _read_nanogpt(path)
        tokenizer = gpt2()
    else:
        directory = model_directory(path_or_name)
        with ThreadPoolExecutor(1) as thread:  # both take half a second for 124M
            sums = thread.submit(check_sums, directory) if check else None
            try:
                config, weights = _read_model(directory)
            finally:
                if sums:
                    sums.result()  # that a file is damaged says more than how reading it failed
        if (directory / "tokenizer.json").exists() or config.vocab_size != 50257:
            inside(directory, "tokenizer.json")
            tokenizer = Tokenizer.load(directory)
        else:
            tokenizer = gpt2()
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(f"{path_or_name}: the tokenizer has {tokenizer.vocab_size} ids, the model {config.vocab_size}")
    if block_size is not None and block_size != config.block_size:
        if block_size > config.block_size:
            raise UserError(f"block_size={block_size}: {path_or_name} has only {config.block_size} positions")
        weights[WPE] = weights[WPE][:block_size].clone()
    config = dataclasses.replace(config, block_size=block_size or config.block_size, dropout=dropout)
    try:
        return GPT.from_weights(config, weights).eval(), tokenizer
    except (RuntimeError, KeyError) as error:
        raise UserError(f"{path_or_name}: the weights do not fit the configuration: {one_line(error)}") from error


def model_directory(path_or_name: str | Path) -> Path:
    """The directory of that name or, of a model on the hub, the copy of it in the cache."""
    found = existing(Path(path_or_name))
    if found and (found / "best").is_dir() and not (found / "config.json").exists():
        raise UserError(f"{found} is the folder of a run: name the model in it, {found / 'best'}")
    return found or _from_hub(str(path_or_name))


def _check_shape(source: str | Path, config: GPTConfig, shapes: dict[str, list[int]]) -> None:
    """Raise UserError if `config` is no GPT-2's or not that of the weights, before any of them is read."""
    sizes = (config.block_size, config.vocab_size, config.n_layer, config.n_head, config.n_embd)
    if (
        any(type(n) is not int or n < 1 for n in sizes)
        or config.n_embd % config.n_head
        or type(config.bias) is not bool
    ):
        raise UserError(f"{source}: its configuration does not describe a GPT-2")
    layers = len({name.split(".")[2] for name in shapes if name.startswith("transformer.h.")})
    found = [shapes.get(WTE), shapes.get(WPE), layers]
    wanted = [[config.vocab_size, config.n_embd], [config.block_size, config.n_embd], config.n_layer]
    if found != wanted:
        raise UserError(
            f"{source}: the weights do not fit the configuration: wte, wpe and layers are {found}, "
            f"and should be {wanted}"
        )
    for name, shape in shapes.items():
        if name.endswith(TRANSPOSED) and len(shape) != 2:
            raise UserError(f"{source}: the weights do not fit the configuration: {name} is {shape}, and no matrix")


def _in_memory(source: Path, name: str, tensor: Tensor, config: GPTConfig) -> Tensor:
    """A copy of the parameter in fp32; `wte` with the padding that it has inside the model, so that it is copied once.

    Raises UserError if a number in it is not finite.
    """
    rows = config.padded_vocab_size - config.vocab_size if name == WTE else 0
    copy = torch.empty(len(tensor) + rows, *tensor.shape[1:])
    copy[: len(tensor)] = tensor
    copy[len(tensor) :] = 0
    if not tensor.is_floating_point() or not copy.isfinite().all():
        raise UserError(f"{source}: {name} has weights that are not finite numbers")
    return copy


def _from_hub(name: str) -> Path:
    """Download, or take from the cache, a GPT-2 of the hub; `name` may end in @ and a branch, tag or commit."""
    import huggingface_hub

    repository, _, revision = name.partition("@")
    try:
        # The configuration first: a model of another type is refused before its weights are fetched.
        for patterns in (["config.json"], HUB_FILES):
            found = Path(
                huggingface_hub.snapshot_download(repository, revision=revision or None, allow_patterns=patterns)
            )
            _read_config(found)
    except UserError:
        raise
    except Exception as error:  # of many kinds: no such name, no network, no permission, not in the cache
        reason = HUB_ERRORS.get(type(error).__name__) or one_line(error)
        raise UserError(f"{name} is no directory here, and cannot be had from the hub: {reason}") from error
    if not any(found.glob("*.safetensors")):
        raise UserError(f"{name} has no weights in safetensors on the hub, or not in the cache; pickles are not read")
    return found


def _read_config(directory: Path) -> GPTConfig:
    path = directory / "config.json"
    found = read_json(directory, path.name)
    if found.get("model_type") != "gpt2":
        raise UserError(f"{path}: a model of type {found.get('model_type')}, not a GPT-2")
    for name, gpt2s in OF_GPT2.items():
        if found.get(name, gpt2s) != gpt2s:
            raise UserError(f"{path}: {name} is {found[name]}, but GPT-2 has {gpt2s}")
    if missing := set(CONFIG_NAMES.values()) - {"bias", "resid_pdrop"} - set(found):
        raise UserError(f"{path} does not describe a GPT-2: it lacks {', '.join(sorted(missing))}")
    return GPTConfig(**{ours: found[theirs] for ours, theirs in CONFIG_NAMES.items() if theirs in found})


def _read_model(directory: Path) -> tuple[GPTConfig, dict[str, Tensor]]:
    config = _read_config(directory)
    files, index = ["model.safetensors"], "model.safetensors.index.json"
    if not (directory / files[0]).exists() and (directory / index).exists():
        shards = read_json(directory, index).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
            raise UserError(f"{directory / index} is damaged: no weight_map of names")
        files = sorted(set(shards.values()))
    shapes, places = {}, {}
    for file in files:
        with _opened(directory, file) as tensors:
            for theirs in tensors.keys():  # noqa: SIM118 (it is no dictionary)
                if theirs.endswith((".attn.bias", ".attn.masked_bias")) or theirs == "lm_head.weight":
                    continue  # the causal mask, which old files carry, and the tied head
                name = f"transformer.{theirs.removeprefix('transformer.')}"
                shapes[name], places[name] = list(tensors.get_slice(theirs).get_shape()), (file, theirs)
    _check_shape(directory, config, shapes)
    weights = {}
    # A file is mapped into memory: opened anew for each tensor, and the largest first, so that what was read is let go.
    for name in sorted(shapes, key=lambda name: math.prod(shapes[name]), reverse=True):
        file, theirs = places[name]
        with _opened(directory, file) as tensors:
            tensor = tensors.get_tensor(theirs)
            weight = _in_memory(directory, name, tensor.T if name.endswith(TRANSPOSED) else tensor, config)
        if config.bias or not name.endswith("bias"):
            weights[name] = weight
        elif weight.any():  # anything but the zeros that `save_model` wrote for other tools
            raise UserError(f"{directory}: the model has no biases, but {name} is not zero")
    return config, weights


@contextlib.contextmanager
def _opened(directory: Path, name: str) -> Iterator[safetensors.safe_open]:
    path = inside(directory, name)
    try:
        with safetensors.safe_open(path, "pt") as tensors:
            yield tensors
    except UserError:
        raise
    except Exception as error:  # SafetensorError, OSError, and what torch raises for a shape that cannot be
        raise UserError(f"{path} is missing or damaged: {one_line(error)}") from error


def _read_nanogpt(path: Path) -> tuple[GPTConfig, dict[str, Tensor]]:
    """The weights of a ckpt.pt; those of the optimizer, twice as large, stay on the disk."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        config = GPTConfig(**checkpoint["model_args"])
        tensors = {name.removeprefix("_orig_mod."): tensor for name, tensor in checkpoint["model"].items()}
        assert all(isinstance(t, Tensor) and t.dim() for t in tensors.values()) and type(config.vocab_size) is int
    except Exception as error:  # a damaged file, or one that wants to run code, fails in many ways
        raise UserError(f"{path} is no nanoGPT checkpoint that can be read safely: {type(error).__name__}") from error
    ids = gpt2().vocab_size
    if config.vocab_size < ids:
        raise UserError(
            f"{path} was trained with {config.vocab_size} ids of its own, and their letters are in a pickle elsewhere: "
            "only GPT-2's can be imported"
        )
    tensors = {k: v for k, v in tensors.items() if k != "lm_head.weight" and not k.endswith(".attn.bias")}
    _check_shape(path, config, {name: list(tensor.shape) for name, tensor in tensors.items()})
    tensors[WTE], config = tensors[WTE][:ids], dataclasses.replace(config, vocab_size=ids)  # nanoGPT pads to 50,304
    note(f"{path}: only the weights are taken, and GELU is OpenAI's tanh form here: the loss differs a little")
    return config, {name: _in_memory(path, name, tensor, config) for name, tensor in tensors.items()}


def read_tensors(directory: Path, name: str) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of a safetensors file, read one at a time. UserError where it is missing or damaged."""
    with _opened(directory, name) as file:
        for key in file.keys():  # noqa: SIM118 (it is no dictionary)
            yield key, file.get_tensor(key)


def read_json(directory: Path, name: str) -> dict:
    def refuse(number: str):
        raise ValueError(f"{number} is no number")

    path = inside(directory, name)
    try:
        found = json.loads(path.read_bytes(), parse_constant=refuse)
        assert isinstance(found, dict), "not an object"
        return found
    except (OSError, ValueError, AssertionError, RecursionError) as error:
        raise UserError(f"{path} is missing or damaged: {one_line(error)}") from error


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
