"""Write a model as one GGUF file, for llama.cpp, Ollama and LM Studio. Requires `pip install gguf`.

python tools/to_gguf.py out-quickstart/best --out=model.gguf

llama.cpp's own converter handles GPT-2's tokenizer, but refuses tokenizers made from your text.
"""

import json
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import plaingpt.startup

from model import GPT
from plaingpt.checkpoint import load_model, with_biases
from plaingpt.console import UserError, note, run_script
from plaingpt.files import new_file
from plaingpt.settings import PathName, load_settings
from plaingpt.tokenizer import END_OF_TEXT, Tokenizer, as_ours, byte_symbols

NAMES = {
    "transformer.wte": "token_embd", "transformer.wpe": "position_embd", "transformer.ln_f": "output_norm",
    "transformer.h": "blk", "ln_1": "attn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output",
    "ln_2": "ffn_norm", "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
}  # fmt: skip
PRECISIONS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "int8": "Q8_0"}


@dataclass(frozen=True)
class ExportConfig:
    models: tuple[PathName, ...] = ()
    """the model: a directory such as out/best, gpt2 or another GPT-2 on the hub, or nanoGPT's ckpt.pt"""
    out: PathName = "model.gguf"
    """the file to write"""
    dtype: Literal[tuple(PRECISIONS)] = "float16"
    """precision of the matrices; int8 is llama.cpp's Q8_0"""


def write_gguf(path: Path, model: GPT, tokenizer: Tokenizer, dtype: str) -> None:
    """Write the model for llama.cpp, its matrices in `dtype`."""
    import gguf

    kind, c = gguf.GGMLQuantizationType[PRECISIONS[dtype]], model.config
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_context_length(c.block_size)
    writer.add_embedding_length(c.n_embd)
    writer.add_feed_forward_length(4 * c.n_embd)
    writer.add_block_count(c.n_layer)
    writer.add_head_count(c.n_head)
    writer.add_layer_norm_eps(1e-5)
    writer.add_vocab_size(c.vocab_size)
    writer.add_file_type(gguf.LlamaFileType[f"{'ALL' if dtype == 'float32' else 'MOSTLY'}_{kind.name}"])
    add_tokenizer(writer, tokenizer)
    for name, weight in with_biases(model.weights()).items():
        raw = kind if weight.dim() == 2 and "wpe" not in name else gguf.GGMLQuantizationType.F32
        for old, new in NAMES.items():
            name = name.replace(old, new)
        writer.add_tensor(name, gguf.quants.quantize(weight.numpy(), raw), raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_tokenizer(writer, tokenizer: Tokenizer) -> None:
    """For llama.cpp, all of ours are of GPT-2's kind, bytes and merges; byte and char tokenizers have no merges."""
    import gguf

    if not (ours := as_ours(json.loads(tokenizer.to_json()))):
        raise UserError("the tokenizer is neither GPT-2's nor plainGPT's: llama.cpp would split texts differently")
    vocabulary = tokenizer.vocabulary()
    texts = sorted(vocabulary, key=vocabulary.get)
    if ours["model"]["type"] == "WordLevel":
        if any(len(text.encode()) > 1 for text in texts if text != END_OF_TEXT):
            raise UserError("llama.cpp has no tokenizer for characters other than ASCII: use --tokenizer=bpe")
        texts = [byte_symbols()[ord(text)] if len(text) == 1 else text for text in texts]
    # llama.cpp requires a merge; the result of this one is not a token, so it has no effect
    no_merge = f"{byte_symbols()[0]} {byte_symbols()[0]}"
    merges = [" ".join(pair) for pair in ours["model"].get("merges", [])] or [no_merge]
    kinds = [gguf.TokenType.NORMAL] * len(texts)
    kinds[tokenizer.end_of_text] = gguf.TokenType.CONTROL
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
        raise UserError(f"this requires a package: {sys.executable} -m pip install gguf") from error
    model, tokenizer = load_model(config.models[0])
    if config.dtype == "int8" and model.config.n_embd % 32:
        raise UserError(f"--dtype=int8 needs n_embd to be a multiple of 32, not {model.config.n_embd}: use float16")
    path = Path(config.out)
    with new_file(path, "wb") as file:
        write_gguf(Path(file.name), model, tokenizer, config.dtype)
    note(f"{path}: {path.stat().st_size / 1e6:.2f} MB; next: llama-completion -m {shlex.quote(str(path))} -p …")


if __name__ == "__main__":
    run_script(main)
