"""Faster replacements for parts of the model where torch.compile is off or gains little, mostly on CPUs.

    speed_up(model)                         # training and evaluation: dropout, attention, the loss
    head = pack(model, torch.bfloat16)      # sampling: weights in the layout and precision that is read fastest

Shapes: B batch, T time, C channels, H heads, D head width, V vocabulary, N targets.
"""

import contextlib
import ctypes
import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model import GPT, CausalSelfAttention

CHUNK = 512  # queries whose attention is computed at once
LOGITS_AT_ONCE_CPU = 1 << 22  # 16 MB of them fit into a CPU's cache
LOGITS_AT_ONCE_GPU = 1 << 26


def speed_up(model: GPT) -> None:
    """Replace dropout and attention with versions that are faster on CPUs, the loss with one that needs less memory.

    Torch's dropout is used on GPUs and under torch.compile, its attention on CUDA.
    """
    faster = {nn.Dropout: FastDropout, CausalSelfAttention: FastAttention}
    for module in model.modules():
        if type(module) in faster:
            module.__class__ = faster[type(module)]
    model.cross_entropy = cross_entropy


class FastDropout(nn.Dropout):
    def forward(self, x: Tensor) -> Tensor:
        return dropout(x, self.p) if self.training else x


class FastAttention(CausalSelfAttention):
    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, self.dropout if self.training else 0.0)


def dropout(x: Tensor, p: float) -> Tensor:
    """F.dropout with one random draw for four numbers: torch's draws take a quarter of a step's time on a CPU.

    Each element gets 16 random bits, so p becomes a multiple of 2**-16.
    """
    if x.device.type != "cpu" or p in (0, 1) or torch.compiler.is_compiling():
        return F.dropout(x, p)
    draws = torch.empty(math.ceil(x.numel() / 4), dtype=torch.int64).random_(-(2**63), None)  # all 64 bits
    dropped = int(p * 2**16)
    kept = draws.view(torch.int16)[: x.numel()].view(x.shape) >= dropped - 2**15
    return x * kept.to(x.dtype).mul_(2**16 / (2**16 - dropped))


def attention(q: Tensor, k: Tensor, v: Tensor, p: float) -> Tensor:
    """Causal scaled dot-product attention of (B, H, T, D) queries, keys and values; p: dropout.

    In bfloat16, torch's fused attention for CPUs multiplies at the speed of float32, and its backward pass is slower
    still; with dropout it is not fused at all. Plain products take half the time. In long sequences, keys that no query
    of a chunk may see are skipped. (On MPS, torch's attention has no dropout: pytorch pull request 184126.)
    """
    if q.device.type == "cuda" or (p == 0 and (q.dtype == torch.float32 or q.device.type == "mps")):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=p)
    B, H, T, D = q.shape
    q, k, v = (x.reshape(B * H, T, D) for x in (q, k, v))
    mask = torch.full((T, T), -torch.inf, dtype=q.dtype, device=q.device).triu_(1)
    parts = []
    for start in range(0, T, CHUNK):
        end = min(start + CHUNK, T)
        scores = torch.baddbmm(mask[start:end, :end], q[:, start:end], k[:, :end].mT, alpha=D**-0.5)
        parts.append(dropout(scores.softmax(dim=-1), p) @ v[:, :end])
    return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)).view(B, H, T, D)


def cross_entropy(logits: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
    """F.cross_entropy that overwrites the logits, (N, V). torch.compile fuses it anyway."""
    if torch.compiler.is_compiling():
        return F.cross_entropy(logits, targets, ignore_index=ignore_index)
    return CrossEntropy.apply(logits, targets, ignore_index)


class CrossEntropy(torch.autograd.Function):
    """Overwrites the logits with their gradient, some rows at a time: one (N, V) matrix instead of four."""

    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor, ignore_index: int) -> Tensor:
        on_cpu = logits.device.type == "cpu"
        rows = max(1, (LOGITS_AT_ONCE_CPU if on_cpu else LOGITS_AT_ONCE_GPU) // logits.size(1))
        total = torch.zeros((), device=logits.device)
        for x, target in zip(logits.split(rows), targets.split(rows)):
            log_p = x.float()  # a copy, or x itself
            log_p = torch.log_softmax(log_p, dim=1, out=log_p if on_cpu else None)  # in place is untested elsewhere
            total += F.nll_loss(log_p, target, ignore_index=ignore_index, reduction="sum")
            if ctx.needs_input_grad[0]:
                gradient = log_p.exp_()
                gradient[torch.arange(len(x), device=x.device), target.clamp(min=0)] -= 1
                x.copy_(gradient.mul_((target != ignore_index)[:, None]))
        count = (targets != ignore_index).sum()
        ctx.save_for_backward(count)
        ctx.gradient = logits
        return total / count

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (count,) = ctx.saved_tensors
        gradient, ctx.gradient = ctx.gradient, None  # frees it; a second backward pass would find it changed
        return gradient.mul_(grad / count), None, None


def has_fp16_products() -> bool:
    """Whether torch can multiply by float16 weights fast on this CPU. A later torch will remove the operators."""
    quantized = torch.ops.quantized
    available = hasattr(quantized, "linear_prepack_fp16") and hasattr(quantized, "linear_dynamic_fp16")
    return available and "fbgemm" in torch.backends.quantized.supported_engines


def pack(model: GPT, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Pack the matrices of the model's blocks in `dtype`; return the packed head, (..., C) to (..., padded V).

    Each matrix is freed as soon as it is packed, so there are never two copies of all weights. On an x86 CPU, float16
    applies to the weights only.
    """

    def pack_matrices(part: nn.Module) -> None:
        for name, child in part.named_children():
            if type(child) is nn.Linear:
                setattr(part, name, PackedLinear(child.weight.detach(), child.bias, dtype))
                child.weight = None  # frees it now: the loop keeps the module

    parts = [part for block in model.transformer.h for part in (block.attn, block.mlp)]
    # Packing a matrix uses one core, so several are packed at once, by one OpenMP thread each: with more of these than
    # cores, all would be slow.
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        head = pool.submit(PackedLinear, model.transformer.wte.weight.detach(), None, dtype)
        list(pool.map(pack_matrices, parts))
    torch.set_num_threads(threads)  # the 1 would hold for every thread that is started later
    return head.result()


class PackedLinear(nn.Module):
    """nn.Linear without gradients, (..., in) to (..., out), its weights in the form that is read fastest.

    On a CPU a row of the result is the same however many rows there are (in float32 only with fewer than 3,072 inputs),
    so a text is the same alone and in a batch.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype):
        super().__init__()
        bias = None if bias is None else bias.detach()
        cpu = weight.device.type == "cpu"
        if cpu and dtype == torch.float16 and has_fp16_products():
            packed = torch.ops.quantized.linear_prepack_fp16(weight.float(), None if bias is None else bias.float())
            self.multiply = lambda x: torch.ops.quantized.linear_dynamic_fp16(x, packed)
            return
        weight, bias = weight.to(dtype), None if bias is None else bias.to(dtype)
        onednn = cpu and torch.backends.mkldnn.is_available() and dtype != torch.float16
        if onednn and (dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()):
            packed = torch.ops.mkldnn._reorder_linear_weight(weight)  # oneDNN's own layout: twice as fast as F.linear
            self.multiply = lambda x: torch.ops.mkldnn._linear_pointwise(x.to(dtype), packed, bias, "none", [], "")
        else:
            self.multiply = lambda x: F.linear(x.to(dtype), weight, bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.multiply(x)


def keep_freed_memory() -> None:
    """Let glibc keep what a step frees for the next: returning it and asking for it again costs a tenth of the time."""
    with contextlib.suppress(OSError, TypeError, AttributeError):  # another C library
        mallopt = ctypes.CDLL(None).mallopt
        M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
        mallopt(M_TRIM_THRESHOLD, -1)  # never
        mallopt(M_MMAP_MAX, 0)


def return_freed_memory() -> None:
    """Return to the system what glibc has kept so far."""
    with contextlib.suppress(OSError, TypeError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
