"""A model's weights in the form that is read fastest: on a CPU a token of one text costs one reading of them.

Shapes: B texts, T positions, C channels, H heads, D head width, V vocabulary, M rows of a product.
"""

import ctypes
import os
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Product = Callable[[Tensor], Tensor]
FBGEMM = "fbgemm" in torch.backends.quantized.supported_engines  # products on x86 CPUs with weights in 16 or 8 bits


class Decoder:
    """The weights of a model as they are now, in the form that is read fastest.

    dtype: of weights and products; the sums of the residual stream and LayerNorms are in float32, and on a
    CPU attention too. float16 on an x86 CPU is the weights' alone. int8: weights in 8 bits, x86 CPUs only.
    consume: the model gives up each matrix as soon as it is ready here, and cannot be used any more, so that
    there are never two copies of all of them.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, int8: bool = False, consume: bool = False):
        t = model.transformer
        self.config, self.device = model.config, t.wte.weight.device
        self.wte, self.wpe, self.ln_f = t.wte.weight.detach(), t.wpe.weight.detach(), t.ln_f
        self.cache_dtype = torch.float32 if self.device.type == "cpu" else dtype  # bf16 attention is slower there
        self.blocks = []

        def ready(linear: nn.Linear, gelu: bool) -> Product:
            weight, bias = linear.weight.detach(), linear.bias
            if consume:
                linear.weight = None
            return product(weight, bias, dtype, int8, gelu)

        # Each with one OpenMP thread: more than there are cores would slow all of them down.
        count = torch.get_num_threads()
        with ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)) as threads:
            for layer, b in enumerate(t.h):
                if layer == len(t.h) // 2:  # of GPT-2 the head takes one thread as long as the blocks that are left
                    embeddings = self.wte[: self.config.vocab_size]  # no padded id is ever drawn
                    head = threads.submit(product, embeddings, None, dtype, int8)
                linears = (b.attn.c_attn, b.attn.c_proj, b.mlp.c_fc, b.mlp.c_proj)
                c_attn, attn_c_proj, c_fc, mlp_c_proj = threads.map(ready, linears, (False, False, True, False))
                self.blocks.append((b.ln_1, c_attn, attn_c_proj, b.ln_2, c_fc, mlp_c_proj))
                if consume:
                    give_back_freed_memory()
            self.head = head.result()

    def hidden(self, idx: Tensor, positions: Tensor, attend: Callable[[int, Tensor], Tensor]) -> Tensor:
        """What the head reads: (B, T) ids at (B or 1, T) positions to (B, T, C).

        attend: takes a layer's number and its queries, keys and values, (B, T, 3C), to (B, T, C).
        """
        x = F.embedding(idx, self.wte) + F.embedding(positions, self.wpe)
        for layer, (ln_1, c_attn, attn_c_proj, ln_2, c_fc, mlp_c_proj) in enumerate(self.blocks):
            x += attn_c_proj(attend(layer, c_attn(norm(x, ln_1))))
            x += mlp_c_proj(c_fc(norm(x, ln_2)))
        return norm(x, self.ln_f)

    def heads(self, qkv: Tensor) -> Tensor:
        """(B, T, 3C) to (B, 3, H, T, D): query, key, value."""
        B, T, _ = qkv.shape
        return qkv.view(B, T, 3, self.config.n_head, -1).permute(0, 2, 3, 1, 4).to(self.cache_dtype)

    def read(self, ids: list[list[int]], keep: Callable[[int, Tensor], None] | None = None) -> Tensor:
        """(B, T, C) of B lists of T ids from position 0; `keep` is given each layer's (B, 3, H, T, D)."""

        def attend(layer: int, qkv: Tensor) -> Tensor:
            heads = self.heads(qkv)
            if keep:
                keep(layer, heads)
            y = F.scaled_dot_product_attention(*heads.unbind(1), is_causal=True)
            return y.transpose(1, 2).flatten(2)

        idx = torch.tensor(ids, device=self.device)
        return self.hidden(idx, torch.arange(idx.size(1), device=self.device)[None], attend)

    @torch.inference_mode()
    def log_probabilities(self, ids: list[int]) -> Tensor:
        """Of each id but the first, given those before it: (len(ids) - 1,), in nats, on the CPU.

        Windows of block_size overlap by half: but at the start an id is read after block_size / 2 others at least.
        """
        block, parts, done = self.config.block_size, [], 0
        with torch.autocast(self.device.type, enabled=False):
            while done < len(ids) - 1:
                start = max(0, done - block // 2)
                end = min(len(ids) - 1, start + block)
                hidden = self.read([ids[start:end]])[0, done - start :]
                targets = torch.tensor(ids[done + 1 : end + 1], device=self.device)
                parts.append(-F.cross_entropy(self.head(hidden).float(), targets, reduction="none").cpu())
                done = end
        return torch.cat(parts) if parts else torch.empty(0)


def give_back_freed_memory() -> None:
    """Have glibc give all of it to the system: what a thread frees is not used by the others."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim:
        trim(0)


def norm(x: Tensor, layer: nn.LayerNorm) -> Tensor:
    return torch.layer_norm(x, layer.normalized_shape, layer.weight, layer.bias, layer.eps)


def product(weight: Tensor, bias: Tensor | None, dtype: torch.dtype, int8: bool = False, gelu: bool = False) -> Product:
    """x (..., in) to x @ weight.T + bias (..., out), with the weights in the form that is read fastest.

    gelu: of the result, in the tanh form. On a CPU a row of the result does not depend on how many others there
    are (but for float32 sums over 3,072 inputs), so that a text is the same alone and among others.
    """
    bias = None if bias is None else bias.detach()
    cpu = weight.device.type == "cpu"
    if int8:
        return activated(int8_product(weight, bias), gelu)
    if cpu and dtype == torch.float16 and FBGEMM:
        packed = torch.ops.quantized.linear_prepack_fp16(weight.float(), None if bias is None else bias.float())
        return activated(lambda x: torch.ops.quantized.linear_dynamic_fp16(x, packed), gelu)
    weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
    onednn = cpu and torch.backends.mkldnn.is_available() and dtype != torch.float16
    if onednn and (dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()):
        packed = torch.ops.mkldnn._reorder_linear_weight(weight)  # oneDNN's own layout: twice as fast as F.linear
        after = ("gelu", [], "tanh") if gelu else ("none", [], "")
        return lambda x: torch.ops.mkldnn._linear_pointwise(x.to(dtype), packed, bias, *after)
    return activated(lambda x: F.linear(x.to(dtype), weight, bias), gelu)


def activated(multiply: Product, gelu: bool) -> Product:
    return (lambda x: F.gelu(multiply(x), approximate="tanh")) if gelu else multiply


def int8_product(weight: Tensor, bias: Tensor | None) -> Product:
    """Weights in 8 bits with a scale for each output, inputs in two halves of 8 bits each: only the weights
    lose precision. Both halves go through one product, so that the weights are read once."""
    scale = weight.abs().amax(1).clamp(min=1e-30).double() / 127
    with warnings.catch_warnings():  # quantized tensors are to leave torch after 2.13
        warnings.simplefilter("ignore")
        weight = torch.quantize_per_channel(weight.float(), scale, torch.zeros(len(scale)).long(), 0, torch.qint8)
    packed = torch.ops.quantized.linear_prepack(weight, None)
    multiply = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
    out, into = weight.shape
    offset = torch.zeros(()) if bias is None else bias.float()
    ranges = torch.tensor([127.0, 127.0 * 254]).view(2, 1, 1)

    def apply(x: Tensor) -> Tensor:
        rows = x.reshape(-1, into)
        largest = torch.linalg.vector_norm(rows, torch.inf, -1, keepdim=True).clamp_(min=1e-30)  # (M, 1)
        halves = rows * (ranges / largest)  # (2, M, in)
        coarse, fine = halves.unbind()
        fine.sub_(coarse.round_(), alpha=254)  # half a step of the first is the whole range of the second
        coarse, fine = multiply(halves.view(-1, into), 1.0, 128, packed).view(2, -1, out).unbind()
        return torch.addcmul(offset, coarse.add_(fine, alpha=1 / 254), largest, value=1 / 127).view(*x.shape[:-1], out)

    return apply
