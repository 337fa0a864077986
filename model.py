"""GPT-2 (Radford et al. 2019): token ids in, logits and loss out.

    model = GPT(GPTConfig(n_layer=4, n_head=4, n_embd=128, vocab_size=256, block_size=64))
    logits, loss = model(idx, targets)

Shapes: B batch, T time (positions), C channels (n_embd), H heads, D head width (C / H), V vocabulary.
Parameters have nanoGPT's and Hugging Face's names. docs/model.md explains the computation step by step.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

IGNORED = -1  # targets with this id do not count in the loss

# Attention over queries, keys and values, (B, H, T, D) each, to (B, H, T, D)
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


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
        """Rows of `wte`: matrix products are fastest in multiples of 64. A saved model does not have the padding."""
        return math.ceil(self.vocab_size / 64) * 64


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # query, key and value in one
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.resid_dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, attention: Attention | None = None) -> Tensor:  # (B, T, C)
        B, T, C = x.shape
        q, k, v = (part.view(B, T, self.n_head, -1).transpose(1, 2) for part in self.c_attn(x).split(C, dim=2))
        y = (attention or self.attention)(q, k, v)  # (B, H, T, D)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, C)))

    def attention(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(F.gelu(self.c_fc(x), approximate="tanh")))  # tanh: OpenAI's form


class Block(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, attention: Attention | None = None) -> Tensor:
        x = x + self.attn(self.ln_1(x), attention)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    recompute = False  # activation checkpointing: the backward pass computes each block again
    cross_entropy = staticmethod(F.cross_entropy)  # cpu.speed_up replaces it

    def __init__(self, config: GPTConfig):
        super().__init__()
        assert config.n_embd % config.n_head == 0, "each head takes an equal part of the channels"
        self.config = config
        parts = dict(
            wte=nn.Embedding(config.padded_vocab_size, config.n_embd),
            wpe=nn.Embedding(config.block_size, config.n_embd),
            drop=nn.Dropout(config.dropout),
            h=nn.ModuleList(Block(config) for _ in range(config.n_layer)),
            ln_f=nn.LayerNorm(config.n_embd, bias=config.bias),
        )
        self.transformer = nn.ModuleDict(parts)
        self.register_buffer("logit_bias", torch.empty(config.padded_vocab_size), persistent=False)
        self.init_weights()

    @torch.no_grad()
    def init_weights(self) -> None:
        """As nanoGPT: N(0, 0.02), residual projections N(0, 0.02 / sqrt(2 n_layer)), biases 0, LayerNorm weights 1."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() == 1:
                nn.init.ones_(parameter)
            else:
                residual = name.endswith("c_proj.weight")
                nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * self.config.n_layer) if residual else 0.02)
        self.transformer.wte.weight[self.config.vocab_size :] = 0
        self.init_logit_bias()

    def init_logit_bias(self) -> None:
        """A padded id has probability exactly 0, so its row of `wte` gets no gradient and stays 0."""
        self.logit_bias.zero_()[self.config.vocab_size :] = -torch.inf

    def weights(self) -> dict[str, Tensor]:
        """The parameters by name, `wte` without its padding: what `checkpoint.model_with` takes."""
        weights = self.state_dict()
        wte = "transformer.wte.weight"
        return weights | {wte: weights[wte][: self.config.vocab_size]}

    def forward(
        self, idx: Tensor, targets: Tensor | None = None, need_logits: bool = True
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return (logits, loss) for token ids.

        idx: (B, T) int64, below vocab_size; T is at most block_size. targets: (B, T), the ids that follow, or IGNORED.
        logits: (B, T, V), in the precision of the matrix products; None without `need_logits`, which saves memory.
        loss: the mean cross-entropy in nats over the targets that count; None without targets.
        """
        return self.head(self.hidden(idx), targets, need_logits)

    def hidden(
        self, idx: Tensor, positions: Tensor | None = None, attentions: Sequence[Attention] | None = None
    ) -> Tensor:
        """The input of the head: (B, T) ids to (B, T, C).

        positions: (T,) or (B, T), from 0 on unless given. attentions: what replaces each block's attention, such
        as one that remembers earlier keys and values.
        """
        T = idx.size(1)
        assert self.config.block_size >= T, f"{T} positions, but the model has {self.config.block_size}"
        t = self.transformer
        x = t.drop(t.wte(idx) + (t.wpe.weight[:T] if positions is None else t.wpe(positions)))  # (B, T, C)
        for i, block in enumerate(t.h):
            if self.recompute and self.training:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x, attentions and attentions[i])
        return t.ln_f(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., C) to (..., padded V). The head is tied to `wte`."""
        return F.linear(hidden, self.transformer.wte.weight, self.logit_bias)

    def head(self, hidden: Tensor, targets: Tensor | None, need_logits: bool) -> tuple[Tensor | None, Tensor | None]:
        """(logits, loss) as `forward`. `parallel` compiles it as one piece."""
        logits = self.logits(hidden)
        loss = None
        if targets is not None:
            cross_entropy = F.cross_entropy if need_logits else self.cross_entropy  # which may overwrite the logits
            loss = cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED)
        return logits[..., : self.config.vocab_size] if need_logits else None, loss

    @torch.inference_mode()
    def generate(
        self,
        prompt: list[int],
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int = 0,
        end_of_text: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Iterator[int]:
        """Yield new token ids until `max_new_tokens` or `end_of_text`, which is not yielded.

        Call `eval` first, or dropout applies. temperature: 0 takes the most likely id. top_k: draw from the k most
        likely ids; 0: from all. generator: on the CPU. When a text fills block_size positions, its last block_size / 2
        tokens are kept. Recomputes the context for every id; plaingpt/generate.py caches keys and values.
        """
        assert prompt, "the prompt needs at least one token"
        block_size = self.config.block_size
        text = list(prompt[-block_size:])  # what the model sees
        for _ in range(max_new_tokens):
            if len(text) > block_size:
                text = text[-max(1, block_size // 2) :]
            idx = torch.tensor([text], device=self.logit_bias.device)
            logits = self.logits(self.hidden(idx)[0, -1])[: self.config.vocab_size]
            logits = logits.float().cpu().nan_to_num()  # weights that overflow must not end a run
            if top_k:
                logits[logits < logits.topk(min(top_k, len(logits))).values[-1]] = -torch.inf
            if temperature > 1e-6:  # float32 cannot divide by much less
                p = ((logits - logits.max()) / temperature).softmax(-1)
                token = int(torch.multinomial(p, 1, generator=generator))
            else:
                token = int(logits.argmax())
            if token == end_of_text:
                return
            yield token
            text.append(token)

    def num_parameters(self) -> int:
        """Number of parameters, without the padding of the vocabulary."""
        padding = (self.config.padded_vocab_size - self.config.vocab_size) * self.config.n_embd
        return sum(parameter.numel() for parameter in self.parameters()) - padding

    def flop_per_token(self) -> int:
        """FLOP to train on one token, forward and backward: 6N + 12 L H D T (PaLM, Chowdhery et al. 2022, appendix B).

        N leaves out wpe, which is looked up, not multiplied.
        """
        c = self.config
        return 6 * (self.num_parameters() - c.block_size * c.n_embd) + 12 * c.n_layer * c.n_embd * c.block_size
