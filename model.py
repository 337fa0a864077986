"""GPT-2 (Radford et al. 2019), exactly: token ids in, logits and loss out.

Shapes: B batch, T time (positions), C channels (n_embd), H heads, D head width (C / H), V vocabulary.
Parameter names are those of nanoGPT and Hugging Face; docs/model.md walks through the computation.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from plaingpt.generate import generate

IGNORED = -1  # a target with this id does not count in the loss


@dataclass(frozen=True)
class GPTConfig:
    block_size: int = 1024
    vocab_size: int = 50257
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = True

    @property
    def padded_vocab_size(self) -> int:
        """Rows of `wte`: matrix products are fastest in multiples of 64. Outside the model nobody sees the padding."""
        return math.ceil(self.vocab_size / 64) * 64


def drop(x: Tensor, p: float) -> Tensor:
    """F.dropout. torch's on a CPU draws one number after the other, a quarter of the time of a step; here one draw
    serves four, each with 16 bits, so that p is rounded down to a multiple of 2**-16."""
    if x.device.type != "cpu" or p in (0, 1) or torch.compiler.is_compiling():
        return F.dropout(x, p)
    draws = torch.empty(math.ceil(x.numel() / 4), dtype=torch.int64).random_(-(2**63), None)  # all 64 bits
    dropped = int(p * 2**16)
    kept = draws.view(torch.int16)[: x.numel()].view(x.shape) >= dropped - 2**15
    return x * kept.to(x.dtype).mul_(2**16 / (2**16 - dropped))


class Dropout(nn.Dropout):
    def forward(self, x: Tensor) -> Tensor:
        return drop(x, self.p) if self.training else x


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # query, key and value in one
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:  # (B, T, C)
        B, T, C = x.shape
        q, k, v = (part.view(B, T, self.n_head, -1).transpose(1, 2) for part in self.c_attn(x).split(C, dim=2))
        y = attention(q, k, v, self.dropout if self.training else 0.0)  # (B, H, T, D)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, C)))


def attention(q: Tensor, k: Tensor, v: Tensor, dropout: float) -> Tensor:
    """Causal scaled dot-product attention of (B, H, T, D) queries, keys and values."""
    if q.device.type != "cpu" or q.dtype == torch.float32:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
    # torch's fused attention for CPUs computes bf16 products at the speed of fp32 and goes backward slower still: plain
    # products take half its time. Of long sequences, a part that no query of a chunk may see is left out.
    B, H, T, D = q.shape
    q, k, v = (x.reshape(B * H, T, D) for x in (q, k, v))
    unseen = torch.full((T, T), -torch.inf, dtype=q.dtype).triu_(1)
    parts, chunk = [], 512
    for start in range(0, T, chunk):
        end = min(start + chunk, T)
        scores = torch.baddbmm(unseen[start:end, :end], q[:, start:end], k[:, :end].mT, alpha=D**-0.5)
        parts.append(drop(scores.softmax(dim=-1), dropout) @ v[:, :end])
    return (parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)).view(B, H, T, D)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate="tanh")))  # tanh: OpenAI's form


class CrossEntropy(torch.autograd.Function):
    """F.cross_entropy of logits (N, V) that nobody needs afterwards: they become their own gradient, some rows at a
    time. Of the four (N, V) matrices of the usual way, three of them in fp32, one is left.
    """

    @staticmethod
    def forward(ctx, logits: Tensor, targets: Tensor) -> Tensor:
        rows = max(
            1, 2 ** (22 if logits.device.type == "cpu" else 28) // logits.size(1)
        )  # 16 MB fit into a CPU's cache
        total = torch.zeros((), device=logits.device)
        for x, target in zip(logits.split(rows), targets.split(rows)):
            log_p = x.float().log_softmax(dim=1)
            total += F.nll_loss(log_p, target, ignore_index=IGNORED, reduction="sum")
            if ctx.needs_input_grad[0]:
                gradient = log_p.exp_()
                gradient[torch.arange(len(x), device=x.device), target.clamp(min=0)] -= 1
                x.copy_(gradient.mul_((target != IGNORED)[:, None]))
        count = (targets != IGNORED).sum()
        ctx.save_for_backward(count)
        ctx.gradient = logits
        return total / count

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (count,) = ctx.saved_tensors
        return ctx.gradient.mul_(grad / count), None


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class NoDraws(TorchFunctionMode):
    """Within it no normal numbers are drawn: on the meta device that would import torch's compiler, over a second."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return kwargs["tensor"] if function is nn.init.normal_ else function(*args, **(kwargs or {}))


class GPT(nn.Module):
    generate = generate  # model.generate(prompt, max_new_tokens, …) yields token ids
    recompute = False  # activation checkpointing: the backward pass computes each block again

    def __init__(self, config: GPTConfig):
        super().__init__()
        assert config.n_embd % config.n_head == 0, "each head takes an equal part of the channels"
        self.config = config
        self.transformer = nn.ModuleDict(
            dict(
                wte=nn.Embedding(config.padded_vocab_size, config.n_embd),
                wpe=nn.Embedding(config.block_size, config.n_embd),
                drop=Dropout(config.dropout),
                h=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                ln_f=nn.LayerNorm(config.n_embd, bias=config.bias),
            )
        )
        self.register_buffer("padding", torch.empty(config.padded_vocab_size), persistent=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """GPT-2's: N(0, 0.02), residual projections N(0, 0.02 / sqrt(2 n_layer)), biases 0, LayerNorms the identity."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 1:
                nn.init.ones_(parameter)
            else:
                residual = name.endswith("c_proj.weight")
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * self.config.n_layer) if residual else 0.02)
        self.transformer.wte.weight[self.config.vocab_size :] = 0
        self.init_padding()

    def init_padding(self) -> None:
        """Set what is added to the logits: a padded id has probability exactly 0, so that its row of wte
        gets no gradient and stays 0."""
        self.padding.zero_()[self.config.vocab_size :] = -torch.inf

    @classmethod
    def from_weights(cls, config: GPTConfig, weights: dict[str, Tensor]) -> "GPT":
        """A model of these very tensors, by name; `wte` may lack its padding. Nothing is initialised in vain."""
        with torch.device("meta"), NoDraws():
            model = cls(config)
        wte = weights["transformer.wte.weight"]
        if missing := config.padded_vocab_size - len(wte):
            wte = F.pad(wte, (0, 0, 0, missing))
        model.load_state_dict(weights | {"transformer.wte.weight": wte}, assign=True)
        model.requires_grad_(True)
        model.padding = torch.empty(config.padded_vocab_size)
        model.init_padding()
        return model

    def weights(self) -> dict[str, Tensor]:
        """The parameters by name, `wte` without its padding: what `from_weights` takes."""
        weights = self.state_dict()
        wte = "transformer.wte.weight"
        return weights | {wte: weights[wte][: self.config.vocab_size]}

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, need_logits: bool = True
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return (logits, loss) for token ids.

        idx: (B, T) int64, T at most block_size. targets: (B, T), the next id of each position, or IGNORED.
        logits: (B, T, vocab_size), in the precision of the matrix products; None if not needed, which
        saves memory. loss: the mean cross-entropy in nats over the targets that count, or None without targets.
        """
        logits, loss = self.logits(self.hidden(idx)), None
        if targets is not None and (need_logits or torch.compiler.is_compiling()):  # compiled, it is fused anyway
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
        elif targets is not None:
            loss = CrossEntropy.apply(logits.flatten(0, 1), targets.flatten())
        return logits[..., : self.config.vocab_size] if need_logits else None, loss

    def hidden(self, idx: Tensor) -> Tensor:
        """What the head reads: (B, T) ids to (B, T, C)."""
        T = idx.size(1)
        assert self.config.block_size >= T, f"{T} positions, but the model has {self.config.block_size}"
        t = self.transformer
        x = t.drop(t.wte(idx) + t.wpe.weight[:T])  # (B, T, C)
        for block in t.h:
            x = checkpoint(block, x, use_reentrant=False) if self.recompute and self.training else block(x)
        return t.ln_f(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., C) to (..., padded V). The head is tied to wte."""
        return F.linear(hidden, self.transformer.wte.weight, self.padding)

    def num_parameters(self) -> int:
        """Parameters of the model as saved: without the padding of the vocabulary."""
        padding = (self.config.padded_vocab_size - self.config.vocab_size) * self.config.n_embd
        return sum(parameter.numel() for parameter in self.parameters()) - padding

    def flop_per_token(self) -> int:
        """FLOP to train on one token, forward and backward: 6N + 12 L H D T (PaLM, Chowdhery et al. 2022, appendix B).

        N leaves out wpe, which is looked up, not multiplied.
        """
        c = self.config
        return 6 * (self.num_parameters() - c.block_size * c.n_embd) + 12 * c.n_layer * c.n_embd * c.block_size
