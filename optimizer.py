"""How parameters change: groups, AdamW, the learning rate of each update, and the guard against non-finite gradients."""

import math

import torch
from torch import Tensor, nn


def make_optimizers(model: nn.Module, learning_rate: float, weight_decay: float, betas: tuple[float, float]) -> list:
    """AdamW (Loshchilov and Hutter 2019). Matrices decay; biases and LayerNorms do not."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [torch.optim.AdamW([g for g in groups if g["params"]], lr=learning_rate, betas=betas, fused=True)]


def scheduled_learning_rate(
    step: int, peak: float, warmup_iters: int, decay_iters: int, min_lr: float, decay: bool = True
) -> float:
    """nanoGPT's: a linear rise to `peak` at `warmup_iters`, then half a cosine down to `min_lr` at `decay_iters`."""
    if step < warmup_iters:
        return peak * (step + 1) / (warmup_iters + 1)
    if not decay:
        return peak
    if step >= decay_iters:
        return min_lr
    progress = (step - warmup_iters) / (decay_iters - warmup_iters)
    return min_lr + 0.5 * (1 + math.cos(math.pi * progress)) * (peak - min_lr)


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
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate
        if not scaler.is_enabled():  # a scaler sets the same two attributes itself
            optimizer.grad_scale, optimizer.found_inf = None, (~norm.isfinite()).float()
        scaler.step(optimizer)
    scaler.update()
    model.zero_grad(set_to_none=True)
    return norm
