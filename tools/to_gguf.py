"""A model as one GGUF file, for llama.cpp, Ollama and LM Studio. Needs a package more: pip install gguf.

python tools/to_gguf.py out-quickstart/best --out=model.gguf

llama.cpp's own converter does the same for GPT-2's tokenizer, and refuses any that was made from a text of yours.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import plaingpt.startup

from model import GPT
from plaingpt.checkpoint import load_model, with_biases
from plaingpt.console import UserError, note, one_line, run_script
from plaingpt.settings import PathName, load_settings
from plaingpt.text.bulk import of_our_form
from plaingpt.tokenizer import END_OF_TEXT, Tokenizer, byte_symbols

NAMES = {
    "transformer.wte": "token_embd", "transformer.wpe": "position_embd", "transformer.ln_f": "output_norm",
    "transformer.h": "blk", "ln_1": "attn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
}  # fmt: skip
KINDS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int8": "Q8_0"}


@dataclass(frozen=True)
class ExportConfig:
    models: list[PathName] = field(default_factory=list)
    """the model: a directory such as out/best, gpt2 or another GPT-2 on the hub, or nanoGPT's ckpt.pt"""
    out: PathName = "model.gguf"
    """the file to write"""
    dtype: Literal[tuple(KINDS)] = "float16"
    """of the matrices; int8 is llama.cpp's Q8_0"""


def write_gguf(path: Path, model: GPT, dtype: str, tokenizer: Tokenizer | None = None) -> None:
    """The model in llama.cpp's form, its matrices in `dtype`; without a tokenizer it takes and gives ids alone."""
    import gguf

    kind, c = gguf.GGMLQuantizationType[KINDS[dtype]], model.config
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_context_length(c.block_size)
    writer.add_embedding_length(c.n_embd)
    writer.add_feed_forward_length(4 * c.n_embd)
    writer.add_block_count(c.n_layer)
    writer.add_head_count(c.n_head)
    writer.add_layer_norm_eps(1e-5)
    writer.add_vocab_size(c.vocab_size)
    if tokenizer:
        add_tokenizer(writer, tokenizer)
    else:
        writer.add_tokenizer_model("no_vocab")
    for name, weight in with_biases(model.weights()).items():
        its = kind if weight.dim() == 2 and "wpe" not in name else gguf.GGMLQuantizationType.F32
        for old, new in NAMES.items():
            name = name.replace(old, new)
        writer.add_tensor(name, gguf.quants.quantize(weight.numpy(), its), raw_dtype=its)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_tokenizer(writer, tokenizer: Tokenizer) -> None:
    """Ours are all GPT-2's kind to llama.cpp: bytes, then merges; bytes and characters without a merge."""
    import gguf

    description = json.loads(tokenizer.to_json())
    model = description["model"]
    if not of_our_form(description):
        raise UserError("the tokenizer is neither GPT-2's nor one of ours: llama.cpp would part texts otherwise")
    tokens = sorted((i, token) for token, i in tokenizer.vocabulary().items())
    if [i for i, _ in tokens] != list(range(len(tokens))) or tokenizer.end_of_text is None:
        raise UserError(f"the tokenizer's ids have gaps, or no {END_OF_TEXT}: llama.cpp wants both otherwise")
    texts = [token for _, token in tokens]
    if model["type"] == "WordLevel":
        if any(len(text.encode()) > 1 for text in texts if text != END_OF_TEXT):
            raise UserError("llama.cpp has no tokenizer of characters, but for ASCII's alone: use --tokenizer=bpe")
        texts = [text if text == END_OF_TEXT else byte_symbols()[ord(text)] for text in texts]
    nothing = byte_symbols()[0]  # llama.cpp wants a merge; what this one makes is no token, and so stays as it was
    merges = [m if isinstance(m, str) else " ".join(m) for m in model.get("merges", [])] or [f"{nothing} {nothing}"]
    kinds = [gguf.TokenType.CONTROL if text == END_OF_TEXT else gguf.TokenType.NORMAL for text in texts]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(texts)
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(tokenizer.end_of_text)
    writer.add_eos_token_id(tokenizer.end_of_text)
    writer.add_add_bos_token(False)


def main() -> None:
    config, _ = load_settings(ExportConfig, positional="models")
    if len(config.models) != 1:
        raise UserError("name one model: python tools/to_gguf.py out/best --out=model.gguf")
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise UserError("this needs a package more: pip install gguf") from error
    model, tokenizer = load_model(config.models[0])
    if config.dtype == "int8" and model.config.n_embd % 32:
        raise UserError(f"--dtype=int8 takes 32 numbers at a time, and n_embd={model.config.n_embd}: use float16")
    path = Path(config.out)
    new = Path(f"{path}.new")
    if path.exists() and not path.is_file():
        raise UserError(f"--out={config.out}: that is no file")
    try:
        write_gguf(new, model, config.dtype, tokenizer)
        new.replace(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {one_line(error)}") from error
    finally:
        if new.exists():
            new.unlink()
    note(f"{path}: {path.stat().st_size / 1e6:.2f} MB; next: llama-cli -m {path}")


if __name__ == "__main__":
    run_script(main)
