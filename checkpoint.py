"""Model directories in Hugging Face's GPT-2 form, training state beside them, and import of GPT-2 and nanoGPT weights.

A checkpoint is a directory: config.json, model.safetensors, generation_config.json and the tokenizer's
files, which every GPT-2 tool reads; `last` also has optimizer.safetensors and training.json. Nothing
in it is code, and nothing is ever unpickled but nanoGPT's ckpt.pt, with weights_only.
"""

import dataclasses
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from config.settings import UserError, note, one_line
from data.token_files import DataSet
from data.tokenizer import Tokenizer, gpt2
from files import check_sums, existing, whole_directory
from model import GPT, GPTConfig

FORMAT_VERSION = 1
HUB_FILES = ["config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer.json"]

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
    _write_model(directory, model.config, model.weights(), tokenizer)


class Saver:
    """Saves a run from a thread of its own: training waits for the copying of its state, not for the disk.

    The next save waits for the one before. A save that fails leaves the earlier checkpoint whole.
    """

    def __init__(
        self, out_dir: Path, model: GPT, optimizers: list, tokenizer: Tokenizer, best_val_loss: float | None = None
    ):
        self.out_dir, self.model, self.optimizers, self.tokenizer = out_dir, model, optimizers, tokenizer
        self.best_val_loss = best_val_loss  # of the model in `best`, if there is one
        self._problem: str | None = None
        self._thread: threading.Thread | None = None

    def save(self, training: dict, val_loss: float | None = None) -> None:
        """Replace `last` by the state as it is now, and `best` too if `val_loss` is the lowest so far. Main only."""
        self.wait()
        weights = {name: _copy(weight) for name, weight in self.model.weights().items()}
        moments = {name: _copy(tensor) for name, tensor in _optimizer_tensors(self.model, self.optimizers).items()}
        self._thread = threading.Thread(target=self._write, args=(weights, moments, training, val_loss))
        self._thread.start()

    def wait(self) -> str | None:
        """Return when nothing is being written: what went wrong in the save before, or None."""
        if self._thread:
            self._thread.join()
        return self._problem

    def _write(self, weights: dict, moments: dict, training: dict, val_loss: float | None) -> None:
        def model_files(new: Path) -> None:
            _write_model(new, self.model.config, weights, self.tokenizer)

        def state_files(new: Path) -> None:
            model_files(new)
            safetensors.torch.save_file(moments, new / "optimizer.safetensors")
            best = {"best_val_loss": self.best_val_loss}
            _write_json(new / "training.json", {"format_version": FORMAT_VERSION} | training | best)

        self._problem = None
        improved = val_loss is not None and (self.best_val_loss is None or val_loss < self.best_val_loss)
        if improved and self._replace("best", model_files, training["step"]):
            self.best_val_loss = val_loss
        self._replace("last", state_files, training["step"])

    def _replace(self, name: str, fill: Callable[[Path], None], step: int) -> bool:
        try:
            with whole_directory(self.out_dir / name) as new:
                fill(new)
            return True
        except Exception as error:  # a full disk, no permission, a quota: whatever it is, training has to hear of it
            self._problem = f"update {step} could not be saved in {self.out_dir / name}: {one_line(error)}"
            return False


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def _write_model(directory: Path, config: GPTConfig, weights: dict[str, Tensor], tokenizer: Tokenizer) -> None:
    tensors = {}
    for name, weight in weights.items():
        tensors[name] = (weight.T if name.endswith(TRANSPOSED) else weight).contiguous().cpu()
        if not config.bias and name.endswith(".weight") and "wte" not in name and "wpe" not in name:
            tensors[name.removesuffix("weight") + "bias"] = weight.new_zeros(len(weight)).cpu()
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
    _write_json(directory / "generation_config.json", ends | {"max_new_tokens": 100, "do_sample": True})


def load_training(directory: Path) -> dict:
    """What `Saver.save` was told of the run."""
    found = existing(directory)
    if found is None:
        raise UserError(f"{directory}: no checkpoint there; start a run with --init_from=scratch")
    check_sums(found)
    training = _read_json(found / "training.json")
    if training.get("format_version") != FORMAT_VERSION:
        raise UserError(f"{found}: format version {training.get('format_version')}, this is for {FORMAT_VERSION}")
    if missing := {"step", "seconds", "best_val_loss", "settings", "derived", "data", "scaler"} - set(training):
        raise UserError(f"{found}/training.json lacks {', '.join(sorted(missing))}")
    return training


def load_optimizers(directory: Path, model: nn.Module, optimizers: list) -> None:
    """Put the saved optimizer state into `optimizers`."""
    path = existing(directory) / "optimizer.safetensors"
    tensors = _read_tensors(path)
    wanted = _optimizer_tensors(model, optimizers)
    if {name: tensor.shape for name, tensor in tensors.items()} != {name: t.shape for name, t in wanted.items()}:
        raise UserError(f"{path} does not fit the model and the optimizer")
    state = get_optimizer_state_dict(model, optimizers, options=_FULL)
    for name, tensor in tensors.items():
        parameter, key = name.split("/")
        state["state"][parameter][key] = tensor
    set_optimizer_state_dict(model, optimizers, state, options=_FULL)


def _optimizer_tensors(model: nn.Module, optimizers: list) -> dict[str, Tensor]:
    """{parameter/key: tensor} of all optimizers, whole: the same from one process or many."""
    state = get_optimizer_state_dict(model, optimizers, options=_FULL)["state"]
    return {f"{parameter}/{key}": tensor for parameter, values in state.items() for key, tensor in values.items()}


_FULL = StateDictOptions(full_state_dict=True)


def load_model(path_or_name: str | Path, block_size: int | None = None, dropout: float = 0.0) -> tuple[GPT, Tokenizer]:
    """(model, tokenizer) of a model directory, a nanoGPT ckpt.pt, or a GPT-2 on the hub such as `gpt2`.

    The model is on the CPU, in evaluation mode. A smaller `block_size` crops the positions.
    """
    path = Path(path_or_name)
    if path.suffix == ".pt":
        config, weights, tokenizer = _read_nanogpt(path)
    else:
        directory = existing(path) or _from_hub(str(path_or_name))
        check_sums(directory)
        config, weights = _read_model(directory)
        has_tokenizer = (directory / "tokenizer.json").is_file()
        tokenizer = Tokenizer.load(directory) if has_tokenizer or config.vocab_size != 50257 else gpt2()
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(f"{path_or_name}: the tokenizer has {tokenizer.vocab_size} ids, the model {config.vocab_size}")
    if block_size is not None and block_size != config.block_size:
        if block_size > config.block_size:
            raise UserError(f"block_size={block_size}: {path_or_name} has only {config.block_size} positions")
        wpe = "transformer.wpe.weight"
        weights |= {wpe: weights[wpe][:block_size].clone()} if wpe in weights else {}
    if not all(tensor.isfinite().all() for tensor in weights.values()):
        raise UserError(f"{path_or_name} has weights that are not finite numbers")
    config = dataclasses.replace(config, block_size=block_size or config.block_size, dropout=dropout)
    try:
        return GPT.from_weights(config, {name: tensor.float() for name, tensor in weights.items()}).eval(), tokenizer
    except (RuntimeError, KeyError) as error:
        raise UserError(f"{path_or_name}: the weights do not fit the configuration: {one_line(error)}") from error


def initial_model(config: Any, given: dict[str, str], data: DataSet, resumed: bool) -> tuple[GPT, Any]:
    """The model that `config` asks for, on the CPU: new, resumed or pretrained; and `config` with its true shape.

    Raises UserError where a setting in `given` or the data set's tokenizer contradicts a model that exists.
    """
    shape = ("block_size", "n_layer", "n_head", "n_embd", "dropout", "bias")
    if not resumed and config.init_from in ("scratch", "auto"):
        if config.n_embd % config.n_head:
            raise UserError(f"n_embd={config.n_embd} must be a multiple of n_head={config.n_head}")
        torch.manual_seed(config.seed)
        settings = {name: getattr(config, name) for name in shape}
        return GPT(GPTConfig(vocab_size=data.tokenizer.vocab_size, **settings)), config
    source = Path(config.out_dir) / "last" if resumed else config.init_from
    crop = "block_size" in given and not resumed
    model, tokenizer = load_model(source, config.block_size if crop else None, config.dropout)
    for name in shape:
        if name in given and getattr(config, name) != getattr(model.config, name):
            raise UserError(
                f"{given[name]}: {name}={getattr(config, name)}, but {source} has {getattr(model.config, name)}"
            )
    if not tokenizer.same_as(data.tokenizer):
        raise UserError(
            f"the data set {config.dataset} was prepared with another tokenizer than {source}; "
            "prepare it again with that one (python prepare_data.py --help)"
        )
    return model.train(), dataclasses.replace(config, **{name: getattr(model.config, name) for name in shape})


def _from_hub(name: str) -> Path:
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=HUB_FILES))
    except Exception as error:  # of many kinds: no such name, no network, no permission, not in the cache
        reason = one_line(error)
        raise UserError(f"{name} is no directory here, and cannot be had from the hub: {reason}") from error


def _read_model(directory: Path) -> tuple[GPTConfig, dict[str, Tensor]]:
    path = directory / "config.json"
    found = _read_json(path)
    if found.get("model_type") != "gpt2":
        raise UserError(f"{path}: a model of type {found.get('model_type')}, not a GPT-2")
    for name, gpt2s in OF_GPT2.items():
        if found.get(name, gpt2s) != gpt2s:
            raise UserError(f"{path}: {name} is {found[name]}, but GPT-2 has {gpt2s}")
    try:
        config = GPTConfig(**{ours: found[theirs] for ours, theirs in CONFIG_NAMES.items() if theirs in found})
        assert config.n_embd % config.n_head == 0 and min(config.n_layer, config.vocab_size, config.block_size) > 0
    except (TypeError, AssertionError, ZeroDivisionError) as error:
        raise UserError(f"{path} does not describe a GPT-2") from error
    tensors = {}
    for file in sorted(directory.glob("*.safetensors")):
        if file.name != "optimizer.safetensors":
            tensors |= _read_tensors(file)
    if not tensors:
        raise UserError(f"{directory} has no model.safetensors")
    weights = {}
    for name, tensor in tensors.items():
        if name.endswith((".attn.bias", ".attn.masked_bias")) or name == "lm_head.weight":
            continue  # the causal mask, which old files carry, and the tied head
        if name.endswith("bias") and not config.bias:
            continue  # the zeros that `save_model` wrote for other tools
        name = f"transformer.{name.removeprefix('transformer.')}"
        weights[name] = tensor.T.contiguous() if name.endswith(TRANSPOSED) else tensor
    return config, weights


def _read_nanogpt(path: Path) -> tuple[GPTConfig, dict[str, Tensor], Tokenizer]:
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        config = GPTConfig(**checkpoint["model_args"])
        weights = {name.removeprefix("_orig_mod."): tensor for name, tensor in checkpoint["model"].items()}
    except Exception as error:  # a damaged file, or one that wants to run code, fails in many ways
        raise UserError(f"{path} is no nanoGPT checkpoint that can be read safely: {type(error).__name__}") from error
    weights = {k: v for k, v in weights.items() if k != "lm_head.weight" and not k.endswith(".attn.bias")}
    tokenizer = gpt2()
    if config.vocab_size < tokenizer.vocab_size:
        raise UserError(f"{path} was trained with {config.vocab_size} ids of its own; only GPT-2's can be imported")
    note(f"{path}: only the weights are taken, and GELU is OpenAI's tanh form here: the loss differs a little")
    wte = "transformer.wte.weight"
    if wte in weights:  # nanoGPT pads 50,257 ids to 50,304
        weights[wte] = weights[wte][: tokenizer.vocab_size].clone()
    return dataclasses.replace(config, vocab_size=tokenizer.vocab_size), weights, tokenizer


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return safetensors.torch.load_file(path)
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} is missing or damaged: {error}") from error


def _read_json(path: Path) -> dict:
    try:
        found = json.loads(path.read_bytes())
        assert isinstance(found, dict), "not an object"
        return found
    except (OSError, ValueError, AssertionError) as error:
        raise UserError(f"{path} is missing or damaged: {error}") from error


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
