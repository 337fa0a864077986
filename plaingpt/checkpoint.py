"""Model directories in Hugging Face's GPT-2 format, and import of GPT-2 and nanoGPT weights.

A model is a directory with config.json, model.safetensors and the tokenizer's files. Directories are not trusted:
nothing is unpickled except nanoGPT's ckpt.pt (with weights_only).
"""

import contextlib
import dataclasses
import json
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import Tensor
from torch.nn import functional as F

from model import GPT, GPTConfig
from plaingpt.console import UserError, counted, errors_of_library, note
from plaingpt.files import check_sums
from plaingpt.hub import CONFIG_NAMES, TOKENIZER_FILES, checked_config, model_path, read_config
from plaingpt.tokenizer import Tokenizer, gpt2
from plaingpt.workarounds import SkipNormalInit

WTE, WPE = "transformer.wte.weight", "transformer.wpe.weight"
# Hugging Face's GPT-2 stores these matrices as (in, out), nn.Linear as (out, in).
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
CONVERT = (
    "pytorch_model.bin is a pickle, which can execute code when it is read: if you trust it, load model and tokenizer "
    "with transformers' from_pretrained and write both with save_pretrained"
)
HEAD = "lm_head.weight"
NOT_PARAMETERS = (".attn.bias", ".attn.masked_bias", HEAD)  # causal masks in old files, and the tied head
NANOGPT_ROWS = (50257, 50304)  # GPT-2's ids, alone or padded to a multiple of 64


def save_model(directory: Path, model: GPT, tokenizer: Tokenizer, weights: dict[str, Tensor] | None = None) -> None:
    """Write a complete Hugging Face model into `directory`. Weights keep their precision; missing biases become 0.

    weights: a copy of the model's, because training goes on meanwhile. Names in the file have no `transformer.`, as
    in OpenAI's GPT-2: MLX requires that, other tools accept both.
    """
    config, tensors = model.config, {}
    for name, tensor in with_biases(model.weights() if weights is None else weights).items():
        tensor = tensor.T if name.endswith(TRANSPOSED) else tensor
        tensors[name.removeprefix("transformer.")] = tensor.contiguous().cpu()
    safetensors.torch.save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(directory)
    ends = {"bos_token_id": tokenizer.end_of_text, "eos_token_id": tokenizer.end_of_text}
    described = {CONFIG_NAMES[name]: value for name, value in dataclasses.asdict(config).items()}
    described |= {"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2", "activation_function": "gelu_new"}
    described |= {"n_ctx": config.block_size, "embd_pdrop": config.dropout, "attn_pdrop": config.dropout}
    described |= {"layer_norm_epsilon": 1e-5, "tie_word_embeddings": True, "torch_dtype": "float32"} | ends
    generation = ends | {"max_new_tokens": 100, "do_sample": True}
    for name, content in {"config.json": described, "generation_config.json": generation}.items():
        (directory / name).write_text(json.dumps(content, indent=2) + "\n")


def with_biases(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """`weights` plus zeros for the biases of a model without them: other tools expect biases in every GPT-2."""
    layers = [name for name in weights if name.endswith(".weight") and name not in (WTE, WPE)]
    zeros = {name.removesuffix("weight") + "bias": weights[name].new_zeros(len(weights[name])) for name in layers}
    return weights | {name: zero for name, zero in zeros.items() if name not in weights}


def load_model(
    path_or_name: str | Path, block_size: int | None = None, dropout: float = 0.0, check: bool = True
) -> tuple[GPT, Tokenizer]:
    """(model, tokenizer) of a model directory, a run's directory (its best/, last/ or ckpt.pt), nanoGPT's ckpt.pt, or a
    GPT-2 on the hub: `gpt2`, `owner/name@revision` (a Path is always local).

    The model is in fp32 on the CPU, in evaluation mode. Loading maps the files, and copies the weights one by one.
    `model.config.vocab_size` is the tokenizer's: embedding rows that belong to no token are dropped. A smaller
    `block_size` crops the positions. With `check`, files are compared with their checksums, if there are any.
    A run may replace the directory while it is read: then it is read once more.
    """
    if (path := model_path(path_or_name)).suffix == ".pt":
        config, weights, tokenizer = _read_nanogpt(path)
    else:
        try:
            config, weights, tokenizer = _read_directory(path, check)
        except UserError:  # a run may have replaced it meanwhile; if not, the second attempt fails like the first
            config, weights, tokenizer = _read_directory(model_path(path_or_name), check)
    with errors_of_library(f"{path_or_name}: the weights do not match config.json"):
        if block_size is not None and block_size != config.block_size:
            if not 1 <= block_size <= config.block_size:
                raise UserError(f"block_size={block_size}: {path_or_name} has {config.block_size} positions")
            weights[WPE] = weights[WPE][:block_size].clone()
        config = dataclasses.replace(config, block_size=block_size or config.block_size, dropout=dropout)
        return model_with(config, weights).eval(), tokenizer


def model_with(config: GPTConfig, weights: dict[str, Tensor]) -> GPT:
    """A model that uses these tensors, without initializing it first; `wte` may lack its padding."""
    with torch.device("meta"), SkipNormalInit():
        model = GPT(config)
    wte = weights[WTE]
    if missing := config.padded_vocab_size - len(wte):
        wte = F.pad(wte, (0, 0, 0, missing))
    model.load_state_dict(weights | {WTE: wte}, assign=True)
    model.logit_bias = torch.empty(config.padded_vocab_size)
    model.init_logit_bias()
    return model


def _read_directory(directory: Path, check: bool) -> tuple[GPTConfig, dict[str, Tensor], Tokenizer]:
    with ThreadPoolExecutor(1) as thread:  # checksums in a thread beside reading: half a second each for 124M
        sums = thread.submit(check_sums, directory) if check else None
        try:
            config = read_config(directory)
            if not any(directory.glob("*.safetensors")):
                raise UserError(f"{directory} has no weights in safetensors; {CONVERT}")
            if config.vocab_size != 50257 or any(os.path.lexists(directory / name) for name in TOKENIZER_FILES):
                tokenizer = Tokenizer.load(directory)
            else:
                note(f"{directory} has no tokenizer files: using GPT-2's tokenizer")
                tokenizer = gpt2()
            return *_read_weights(directory, config, tokenizer), tokenizer
        finally:
            if sums:
                sums.result()  # replaces another error, as a failed checksum explains it


def all_finite(tensor: Tensor) -> bool:
    """Whether all is finite (a NaN becomes both bounds); faster than `tensor.isfinite().all()`."""
    return not tensor.numel() or all(bound.isfinite() for bound in tensor.aminmax())


def _fp32_copy(source: Path, name: str, tensor: Tensor, config: GPTConfig) -> Tensor:
    """A copy of the parameter in fp32; `wte` gets its padding here, so that it is copied only once.

    Raises UserError if it has too few rows, or numbers that are not finite.
    """
    rows = config.vocab_size if name == WTE else len(tensor)
    padded = config.padded_vocab_size if name == WTE else rows
    if len(tensor) < rows:
        raise UserError(f"{source}: the embedding has {len(tensor)} rows; config.json or the tokenizer requires {rows}")
    copy = torch.zeros(padded, *tensor.shape[1:])
    copy[:rows] = tensor[:rows]
    if not tensor.is_floating_point() or not all_finite(copy):
        raise UserError(f"{source}: {name} ({tensor.dtype}) has weights that are not finite floating-point numbers")
    return copy


def _read_weights(directory: Path, config: GPTConfig, tokenizer: Tokenizer) -> tuple[GPTConfig, dict[str, Tensor]]:
    shards = sorted(path.name for path in directory.glob("model-[0-9]*-of-[0-9]*.safetensors"))
    files = shards if shards and not (directory / "model.safetensors").exists() else ["model.safetensors"]
    if files == shards and len(shards) != (wanted := int(re.search(r"of-(\d+)", shards[0])[1])):
        raise UserError(f"{directory} has {len(shards)} files of weights instead of {wanted}")
    if tokenizer.vocab_size > config.vocab_size:
        problem = f"the tokenizer has {tokenizer.vocab_size} ids, the model {config.vocab_size}"
        raise UserError(f"{directory}: {problem}; remove the added tokens, or resize the embedding in transformers")
    unused_rows = config.vocab_size - tokenizer.vocab_size
    config = dataclasses.replace(config, vocab_size=tokenizer.vocab_size)
    weights, head = {}, None
    for file in files:
        with open_tensors(directory / file) as tensors:
            for theirs in tensors.keys():  # noqa: SIM118 (not a dictionary)
                if theirs == HEAD:
                    head = tensors.get_tensor(theirs)
                if theirs.endswith(NOT_PARAMETERS):
                    continue
                name = f"transformer.{theirs.removeprefix('transformer.')}"
                tensor = tensors.get_tensor(theirs)
                weights[name] = _fp32_copy(directory, name, tensor.mT if name.endswith(TRANSPOSED) else tensor, config)
    _check_tied(directory, head, weights, config)
    if unused_rows:
        note(f"{directory}: dropped {counted(unused_rows, 'embedding row')} that no token uses")
    if config.bias:
        return config, weights
    biases = [name for name in weights if name.endswith("bias")]
    if any(weights[name].any() for name in biases):  # `save_model` wrote zeros; another tool has trained them
        return dataclasses.replace(config, bias=True), weights
    return config, {name: tensor for name, tensor in weights.items() if name not in biases}


def _check_tied(source: Path, head: Tensor | None, weights: dict[str, Tensor], config: GPTConfig) -> None:
    """UserError if a model has its own head, which config.json often does not say."""
    n = config.vocab_size
    if head is not None and WTE in weights and not (head.dim() and torch.equal(head[:n].float(), weights[WTE][:n])):
        raise UserError(f"{source}: {HEAD} differs from {WTE}, so this is not a GPT-2, whose head is its embedding")


@contextlib.contextmanager
def open_tensors(path: Path) -> Iterator[safetensors.safe_open]:
    """A safetensors file, from which tensors are read one at a time. UserError if it is missing or damaged."""
    with errors_of_library(f"{path} is missing or damaged"), safetensors.safe_open(path, "pt") as tensors:
        yield tensors


def _read_nanogpt(path: Path) -> tuple[GPTConfig, dict[str, Tensor], Tokenizer]:
    """The weights in a ckpt.pt; those of the optimizer, twice as large, are not read."""
    if not os.path.isfile(path):
        raise UserError(f"{path}: no such file")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        config = checked_config(path, GPTConfig(**checkpoint["model_args"]))
        if config.vocab_size not in NANOGPT_ROWS:
            raise UserError(
                f"{path} has {config.vocab_size} ids, and its tokenizer is in a pickle elsewhere: only GPT-2's "
                "vocabulary (50,257 ids, or 50,304 with padding) can be imported"
            )
        note(f"{path}: only the weights are imported, and GELU is OpenAI's tanh form: the loss differs a little")
        config = dataclasses.replace(config, vocab_size=gpt2().vocab_size)
        tensors = {name.removeprefix("_orig_mod."): tensor for name, tensor in checkpoint["model"].items()}
        names = [name for name in tensors if not name.endswith(NOT_PARAMETERS)]
        weights = {name: _fp32_copy(path, name, tensors[name], config) for name in names}
        _check_tied(path, tensors.get(HEAD), weights, config)
        return config, weights, gpt2()
    except (UserError, OSError):
        raise
    except Exception as error:  # torch's messages advise reading it unsafely
        problem = f"not a nanoGPT checkpoint that can be read safely: {type(error).__name__}"
        raise UserError(f"{path} is {problem}") from error
