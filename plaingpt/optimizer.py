"""AdamW and Muon, and steps that skip non-finite gradients.

optimizers = make_optimizers(model, "muon", 1e-3, weight_decay=0.1, betas=(0.9, 0.95))
norm = apply_gradients(list(model.parameters()), optimizers, scaler, lr=1e-3, grad_clip=1.0)
"""

import inspect
import math

import torch
import torch.distributed as torch_dist
from torch import Tensor, nn

from plaingpt.console import RunFailed
from plaingpt.parallel import full, is_sharded

ELEMENTS_AT_ONCE = 2**27  # of a stack of matrices: 0.5 GB in float32 for each of four temporary tensors
SMALL_MODEL = 2**22  # elements of its matrices; below, launching the kernels takes longer than running them
MAX_SKIPPED = 20  # consecutive steps with non-finite gradients after which a run ends


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

    dtype: of Muon's matrix products; use the model's.
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    matrices = {name: p for name, p in named.items() if kind == "muon" and ".h." in name and p.dim() == 2}
    others = [p for name, p in named.items() if name not in matrices]
    groups = [
        {"params": [p for p in others if p.dim() == 2], "weight_decay": weight_decay},
        {"params": [p for p in others if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizers = [AdamW(groups, learning_rate, betas)]
    if matrices:
        optimizers.append(Muon([*matrices.values()], learning_rate, weight_decay, momentum, dtype))
    return optimizers


class AdamW(torch.optim.AdamW):
    """Torch's, with its state from the beginning, so that `load_optimizers` only has to fill it."""

    # Unwrapped: torch's wrappers, which exclude these methods from compilation, import the compiler (over a second)
    add_param_group = inspect.unwrap(torch.optim.AdamW.add_param_group)
    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))

    def __init__(self, groups: list[dict], lr: float, betas: tuple[float, float]):
        super().__init__(groups, lr, betas, fused=True)
        for group in groups:
            for p in group["params"]:
                step = torch.zeros((), device=p.device)
                self.state[p] = {"step": step, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalized matrix by matrix (Jordan et al. 2024), with the step's size matched to AdamW's
    (0.2 sqrt(longer side), Liu et al. 2025), so that both share one learning rate.

    Each of W processes (all, or those of a node under hybrid) orthogonalizes 1/W of the matrices. Under DDP an
    all-gather in `dtype` then brings the other updates. Under FSDP a process stores some rows of every matrix: an
    all-to-all brings the rows of its matrices in float32, and another returns their updates in `dtype`. For N
    parameters each process receives 2 N bytes per step under DDP and 6 N / W under FSDP (in bf16), little compared with
    gradients and weights.
    """

    add_param_group = AdamW.add_param_group  # torch's own, without its wrapper

    def __init__(self, matrices: list[Tensor], lr: float, weight_decay: float, momentum: float, dtype: torch.dtype):
        super().__init__(matrices, dict(lr=lr, weight_decay=weight_decay, momentum=momentum))
        self.dtype, self.found_inf = dtype, torch.zeros((), device=matrices[0].device)
        for p in matrices:
            self.state[p]["momentum_buffer"] = torch.zeros_like(p)

    @torch.no_grad()
    def step(self) -> None:
        """Update. If the tensor `found_inf`, which `apply_gradients` sets, is 1, parameters and state do not change.
        Overwrites the gradients."""
        (group,), skipped = self.param_groups, self.found_inf.bool()
        matrices, lr, momentum = group["params"], group["lr"], group["momentum"]
        weights, gradients = [local_rows(p) for p in matrices], [local_rows(p.grad) for p in matrices]
        buffers = [local_rows(self.state[p]["momentum_buffer"]) for p in matrices]
        for gradient, buffer in zip(gradients, buffers):
            torch.where(skipped, buffer, gradient, out=gradient)  # skipped: the next line leaves the buffer as it is
        torch._foreach_lerp_(buffers, gradients, 1 - momentum)
        torch._foreach_lerp_(gradients, buffers, momentum)  # Nesterov momentum
        torch._foreach_mul_(weights, torch.where(skipped, 1.0, 1 - lr * group["weight_decay"]))
        for stacks in stacks_at_once(matrices):
            shares = [take_share(torch.stack([local_rows(p.grad) for p in same]), same[0]) for same in stacks]
            orthogonalize(shares, self.dtype)
            for same, share in zip(stacks, shares):
                size = 0.2 * wide_maps(share).size(2) ** 0.5
                update = return_share(share, len(same), same[0], self.dtype)
                update.mul_(torch.where(skipped, 0.0, lr * size))
                torch._foreach_sub_([local_rows(p) for p in same], list(update))


def stacks_at_once(matrices: list[Tensor]) -> list[list[list[Tensor]]]:
    """Stacks of matrices of one shape (at most ELEMENTS_AT_ONCE, or one matrix per process), in groups that are
    orthogonalized together: all stacks of a small model, because few large products are fastest, else one by one."""
    of_shape, stacks = {}, []
    for matrix in matrices:
        of_shape.setdefault(matrix.shape, []).append(matrix)
    for shape, same in of_shape.items():
        # a multiple of the processes, so that none is idle
        at_once = max(1, ELEMENTS_AT_ONCE // shape.numel() // processes()) * processes()
        stacks += [same[i : i + at_once] for i in range(0, len(same), at_once)]
    is_small = sum(matrix.numel() for matrix in matrices) <= SMALL_MODEL
    return [stacks] if is_small else [[stack] for stack in stacks]


def processes() -> int:
    return torch_dist.get_world_size() if torch_dist.is_initialized() else 1


def local_rows(matrix: Tensor) -> Tensor:
    """The rows of a matrix that this process stores: under FSDP some, otherwise all."""
    return matrix.to_local() if is_sharded(matrix) else matrix


def take_share(stack: Tensor, like: Tensor) -> Tensor:
    """The matrices of a stack (n, R, C) that this process orthogonalizes. All ranks.

    like: a parameter that says how the stack is distributed: by rows, or a copy in each process.
    """
    if is_sharded(like):
        return redistribute(stack, len(stack), like, 1, 0)
    if processes() == 1:
        return stack
    count = math.ceil(len(stack) / processes())
    mine = torch.arange(count, device=stack.device) + torch_dist.get_rank() * count
    return stack[mine % len(stack)]  # modulo: the last process may take some again


def return_share(share: Tensor, n: int, like: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of `take_share`, for a stack of n matrices, exchanged in `dtype`. All ranks."""
    if is_sharded(like):
        return redistribute(share.to(dtype), n, like, 0, 1).to(share.dtype)
    if processes() == 1:
        return share
    gathered = share.new_empty(processes() * len(share), *share.shape[1:], dtype=dtype)
    # its name in torch 2.13; 2.11 has only the old one
    all_gather = getattr(torch_dist, "all_gather_single", None) or torch_dist.all_gather_into_tensor
    all_gather(gathered, share.to(dtype))
    return gathered[:n].to(share.dtype)


def redistribute(local: Tensor, n: int, like: Tensor, before: int, after: int) -> Tensor:
    """This process's shard of a stack (n, R, C) of matrices in the shape of `like`. `local` is its shard if the stack
    is sharded along dimension `before`, the result that along dimension `after`. All ranks."""
    from torch.distributed.tensor import DTensor, Shard  # takes two seconds to import

    def along(dim: int) -> list:
        return [Shard(dim) if placement.is_shard() else placement for placement in like.placements]

    shape, stride = torch.Size([n, *like.shape]), (like.numel(), like.size(1), 1)
    stack = DTensor.from_local(local, like.device_mesh, along(before), run_check=False, shape=shape, stride=stride)
    return stack.redistribute(placements=along(after)).to_local().contiguous()


# Odd quintics a x + b x^3 + c x^5 of the Polar Express (Amsel et al. 2025; for singular values from 1e-3 to 1), each
# optimal given the ones before it. Four raise the smallest values by a factor of about 430, almost as five with
# Jordan's coefficients (485), with a fifth less work and equal losses (bench/LOG.md).
QUINTICS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
)
SAFETY = 1.01  # bf16 rounds: keep values this much below the bound beyond which the quintics diverge


def orthogonalize(stacks: list[Tensor], dtype: torch.dtype) -> None:
    """Make the matrices in contiguous stacks, (n, R, C) each, nearly orthogonal, in place, with products in `dtype`.
    Singular vectors stay the same.

    Singular values above a thousandth of the matrix's norm become 0.4 to 1.6, which trains as well as exactly 1.
    """
    of_shape = {}
    for maps in map(wide_maps, stacks):
        of_shape.setdefault(maps.shape[1:], []).append(maps)
    for same in of_shape.values():
        norms = [SAFETY * maps.norm(dim=(1, 2), keepdim=True) + 1e-7 for maps in same]
        x = torch.cat([(maps / norm).to(dtype) for maps, norm in zip(same, norms)])
        for i, (a, b, c) in enumerate(QUINTICS):
            if i > 0:  # the first one's input has been divided by SAFETY
                a, b, c = a / SAFETY, b / SAFETY**3, c / SAFETY**5
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        torch._foreach_copy_(same, x.split([len(maps) for maps in same]))


def wide_maps(stack: Tensor) -> Tensor:
    """A view (m, r, c) of the linear maps in matrices (n, R, C), with at most as many rows as columns. Only c_attn has
    R = 3 C: it is three maps, to query, key and value."""
    R, C = stack.shape[1:]
    return stack.view(-1, C, C) if R == 3 * C else stack.mT if R > C else stack


def apply_gradients(
    parameters: list[Tensor], optimizers: list, scaler: torch.amp.GradScaler, lr: float | Tensor, grad_clip: float
) -> Tensor:
    """Update the parameters. Return the norm of the gradients before clipping, a scalar tensor on the device.

    If it is not finite, parameters and optimizer state do not change. The optimizers' kernels check that on the
    device: the host waits only on MPS.
    """
    for optimizer in optimizers:
        scaler.unscale_(optimizer)
    norm = full(nn.utils.clip_grad_norm_(parameters, grad_clip or math.inf))
    skip = (~norm.isfinite()).float()
    if norm.device.type == "mps" and skip:  # its fused kernel ignores found_inf: here the host waits
        clear_gradients(parameters)
        scaler.update()
        return norm
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
            group["capturable"] = norm.is_cuda and torch.cuda.is_current_stream_capturing()  # AdamW asks for it
        # Not scaler.step, which decides for each optimizer: all must skip or none. AdamW reads both attributes.
        optimizer.grad_scale, optimizer.found_inf = None, skip
        optimizer.step()
    scaler.update()
    clear_gradients(parameters)
    return norm


def clear_gradients(parameters: list[Tensor]) -> None:
    for parameter in parameters:
        parameter.grad = None


class SkippedSteps:
    """Counts the steps with non-finite gradients on the device, so that the host waits only where it asks."""

    def __init__(self, before: int, device: torch.device):
        self._total, self._in_a_row, self._longest = torch.tensor([before, 0, 0], device=device)

    def count(self, norm: Tensor) -> None:
        """After each step, with the norm of its gradients."""
        bad = ~norm.isfinite()
        self._total, self._in_a_row = self._total + bad, (self._in_a_row + 1) * bad
        self._longest = torch.maximum(self._longest, self._in_a_row)

    def total(self, step: int) -> int:
        """The number of skipped steps; a CPU-GPU sync point. RunFailed, with `step` in its message, if MAX_SKIPPED or
        more were in a row."""
        if (failing := int(self._longest)) >= MAX_SKIPPED:
            raise RunFailed(
                f"the gradients were not finite in {failing} consecutive steps, seen after step {step}; "
                "they changed no weights: resume from the last save or start again, with a lower --learning_rate"
            )
        return int(self._total)
