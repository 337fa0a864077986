"""How parameters change: AdamW and Muon, the learning rate of each update, the guard against non-finite gradients."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from plaingpt.console import RunFailed
from plaingpt.parallel import is_shared, whole

MAX_SKIPPED = 20  # consecutive updates with non-finite gradients after which the run ends


def make_optimizers(
    model: nn.Module,
    kind: str,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float],
    momentum: float = 0.95,
    dtype: torch.dtype = torch.bfloat16,
) -> list[torch.optim.Optimizer]:
    """`adamw` for everything (Loshchilov and Hutter 2019), or `muon` for the matrices of the blocks and AdamW for
    the rest. Matrices and embeddings decay; biases and LayerNorms do not.

    dtype: what the model's products are in. Muon's are in float32 with float32, and in bfloat16 with anything else.
    """
    named = dict(model.named_parameters())
    matrices = {name: p for name, p in named.items() if kind == "muon" and ".h." in name and p.dim() == 2}
    others = [p for name, p in named.items() if name not in matrices]
    groups = [
        {"params": [p for p in others if p.dim() == 2], "weight_decay": weight_decay},
        {"params": [p for p in others if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizers = [torch.optim.AdamW([g for g in groups if g["params"]], lr=learning_rate, betas=betas, fused=True)]
    if matrices:
        fused = {id(p) for name, p in matrices.items() if name.endswith("c_attn.weight")}
        optimizers.append(Muon(list(matrices.values()), learning_rate, weight_decay, fused, momentum, dtype))
    return optimizers


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised matrix by matrix (Jordan et al. 2024), with the step's size matched to AdamW's
    (0.2 sqrt(longer side), Liu et al. 2025), so that both share one learning rate.

    Matrices of one shape are orthogonalised together: one batched product in place of many small
    ones. Those in `fused_qkv` (by id) count as three: query, key and value are different maps.

    Under FSDP a process holds some rows of every matrix, and updates those. In between it orthogonalises some whole
    matrices: an all-to-all brings their rows, in float32, and another takes them back, in bfloat16. For N parameters
    and W processes each sends 6 N / W bytes an update, a small part of the gathering of the weights, and does a W-th of
    the work. (Gathering all matrices everywhere: 4 N bytes, and all of the work.)
    """

    def __init__(
        self,
        parameters: list[Tensor],
        lr: float,
        weight_decay: float,
        fused_qkv: set[int],
        momentum: float,
        dtype: torch.dtype = torch.bfloat16,
    ):
        super().__init__(parameters, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))
        self.fused_qkv = fused_qkv
        self.dtype = torch.float32 if dtype == torch.float32 else torch.bfloat16

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update; where the tensor `found_inf`, an attribute set before, is 1, everything stays as it is."""
        skipped = getattr(self, "found_inf", torch.zeros((), device=self.param_groups[0]["params"][0].device)).bool()
        for group in self.param_groups:
            stacks = {}
            for p in group["params"]:
                stacks.setdefault((p.shape, id(p) in self.fused_qkv), []).append(p)
            for (_, fused), parameters in stacks.items():
                self._step_together(parameters, 3 if fused else 1, group, skipped)

    def _step_together(self, parameters: list[Tensor], parts: int, group: dict, skipped: Tensor) -> None:
        """One step of n parameters of one shape (R, C), each of which is `parts` matrices stacked in its rows."""
        for p in parameters:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        buffers = [rows(self.state[p]["momentum_buffer"]) for p in parameters]
        gradients = torch.stack([rows(p.grad) for p in parameters])  # (n, R, C), of a sharded R this process's part
        old = torch.stack(buffers)
        new = old.lerp(gradients, 1 - group["momentum"])
        update = gradients.lerp_(new, group["momentum"])  # Nesterov's look ahead

        def orthogonal(x: Tensor) -> Tensor:  # (n, R, C) of whole matrices
            x = x.unflatten(1, (parts, -1)).flatten(0, 1)  # (n parts, R / parts, C)
            return orthogonalize(x, self.dtype).unflatten(0, (-1, parts)).flatten(1, 2)

        update = on_whole_matrices(orthogonal, update, parameters[0]).to(old.dtype)
        size = 0.2 * max(parameters[0].size(0) // parts, parameters[0].size(1)) ** 0.5
        torch._foreach_copy_(buffers, list(torch.where(skipped, old, new)))
        parameters = [rows(p) for p in parameters]
        kept = torch.where(skipped, 1.0, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_mul_(parameters, kept)
        torch._foreach_add_(parameters, list(torch.where(skipped, 0.0, update)), alpha=-group["lr"] * size)


def rows(matrix: Tensor) -> Tensor:
    """The rows of a matrix that this process holds: all of them, but under FSDP."""
    return matrix.to_local() if is_shared(matrix) else matrix


def on_whole_matrices(function: Callable[[Tensor], Tensor], stack: Tensor, like: Tensor) -> Tensor:
    """function(stack), for a stack (n, R, C) of matrices that are sharded as the parameter `like` is, by rows or not
    at all; each of the processes that share them takes some of the n to `function`.
    """
    if not is_shared(like):
        return function(stack)
    from torch.distributed.tensor import DTensor, Shard  # two seconds that nobody else is to wait for

    mesh, size = like.device_mesh, torch.Size([len(stack), *like.shape])
    stride = (like.numel(), like.size(1), 1)
    by_row = [Shard(1) if placement.is_shard() else placement for placement in like.placements]
    by_matrix = [Shard(0) if placement.is_shard() else placement for placement in like.placements]
    stack = DTensor.from_local(stack, mesh, by_row, run_check=False, shape=size, stride=stride)
    done = function(stack.redistribute(placements=by_matrix).to_local()).contiguous()
    done = DTensor.from_local(done, mesh, by_matrix, run_check=False, shape=size, stride=stride)
    return done.redistribute(placements=by_row).to_local()


# Odd quintics a x + b x^3 + c x^5 of the Polar Express (Amsel et al. 2025; for singular values from 1e-3 to 1), each
# the best after those before it. Four of them raise the smallest values 444 times, as much as five with Jordan's
# coefficients, at a fifth less work; the losses are as good (bench/LOG.md).
QUINTICS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
)
SAFETY = 1.01  # bf16 rounds: values are kept this much below the bound beyond which the quintics diverge


def orthogonalize(matrices: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """(n, R, C) to nearly orthogonal matrices of the same singular directions, in `dtype`.

    Singular values from a thousandth of the matrix's norm upwards end between 0.4 and 1.6, which serves as well as 1.
    """
    x = matrices / (SAFETY * matrices.norm(dim=(1, 2), keepdim=True) + 1e-7)
    tall = x.size(1) > x.size(2)
    x = (x.mT if tall else x).to(dtype).contiguous()
    for i, (a, b, c) in enumerate(QUINTICS):
        if i > 0:
            a, b, c = a / SAFETY, b / SAFETY**3, c / SAFETY**5
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def scheduled_learning_rate(
    step: int, peak: float, warmup_iters: int, decay_iters: int, min_lr: float, shape: str = "cosine"
) -> float:
    """A linear rise to `peak` at `warmup_iters`, then down to `min_lr` at `decay_iters`.

    Down along half a `cosine`, as in nanoGPT, along a `linear` slope, or not at all: `constant`.
    """
    if step < warmup_iters:
        return peak * (step + 1) / (warmup_iters + 1)
    if shape == "constant":
        return peak
    if step >= decay_iters:
        return min_lr
    progress = (step - warmup_iters) / (decay_iters - warmup_iters)
    left = 0.5 * (1 + math.cos(math.pi * progress)) if shape == "cosine" else 1 - progress
    return min_lr + left * (peak - min_lr)


def apply_gradients(
    model: nn.Module, optimizers: list, scaler: torch.amp.GradScaler, learning_rate: float, grad_clip: float
) -> Tensor:
    """Update the parameters and return the norm that the gradients had, a scalar tensor on the device.

    If the norm is not finite, parameters and optimizer state stay as they are. The optimizer's
    own kernel decides that on the device: the host never waits.
    """
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    norm = nn.utils.clip_grad_norm_(model.parameters(), grad_clip or math.inf)
    norm = whole(norm)
    skip = (~norm.isfinite()).float()
    if norm.device.type == "mps" and skip:  # its fused kernel takes found_inf and ignores it: here the host has to wait
        model.zero_grad(set_to_none=True)
        scaler.update()
        return norm
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        # Not scaler.step: it judges each optimizer by its own gradients, and all have to skip or none.
        optimizer.grad_scale, optimizer.found_inf = None, skip
        optimizer.step()
    scaler.update()
    model.zero_grad(set_to_none=True)
    return norm


class SkippedUpdates:
    """Counts the updates whose gradients were not finite, on the device: the host never waits for one."""

    def __init__(self, before: int, device: torch.device):
        self._all, self._in_a_row = torch.tensor([before, 0], device=device)
        self._heard = torch.zeros((), dtype=torch.long, pin_memory=device.type == "cuda")  # `_in_a_row` on the host

    def count(self, norm: Tensor) -> None:
        """After each update, with the norm that its gradients had."""
        bad = ~norm.isfinite()
        self._all, self._in_a_row = self._all + bad, (self._in_a_row + 1) * bad
        self._heard.copy_(self._in_a_row, non_blocking=True)  # it arrives when the device has come so far

    @property
    def all(self) -> int:
        """How many; a CPU-GPU sync point."""
        return int(self._all)

    @property
    def in_a_row(self) -> int:
        """How many after the last one that was not skipped, as far as the device has come: without waiting for it."""
        return int(self._heard)


def check_gradients(failing: int, step: int) -> None:
    """RunFailed if the gradients were not finite in too many consecutive updates."""
    if failing >= MAX_SKIPPED:
        raise RunFailed(
            f"the gradients were not finite in {failing} consecutive updates, seen after update {step}; "
            "no weights were changed: resume from the last save, or start anew, with a lower --learning_rate"
        )
