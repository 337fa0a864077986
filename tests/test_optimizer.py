import math

import pytest
import torch

from model import GPT, GPTConfig
from plaingpt.console import RunFailed
from plaingpt.optimizer import (
    MAX_SKIPPED,
    QUINTICS,
    SAFETY,
    SkippedSteps,
    apply_gradients,
    make_optimizers,
    orthogonalize,
    stacks_at_once,
)
from plaingpt.train_config import TrainConfig

CONFIG = GPTConfig(block_size=8, vocab_size=65, n_layer=2, n_head=2, n_embd=32, bias=True)
NO_SCALER = torch.amp.GradScaler("cpu", enabled=False)
KINDS = pytest.mark.parametrize("kind", ["adamw", "muon"])


def make(kind: str, weight_decay: float = 0.1) -> tuple[GPT, list]:
    torch.manual_seed(0)
    model = GPT(CONFIG)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.fill_(1)
    return model, make_optimizers(model, kind, 0.02, weight_decay, betas=(0.9, 0.95))


def set_gradients(model: GPT, seed: int, scale: float = 1.0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator) * scale
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def snapshot(model: GPT, optimizers: list) -> list[torch.Tensor]:
    tensors = [parameter.detach().clone() for parameter in model.parameters()]
    for optimizer in optimizers:
        for state in optimizer.state.values():
            tensors += [value.clone() for value in state.values()]
    return tensors


def equal(left: list[torch.Tensor], right: list[torch.Tensor]) -> bool:
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right))


def rates(peak: float, warmup: int, decay: int, lowest: float, steps: int, **more) -> list[float]:
    config = TrainConfig(learning_rate=peak, warmup_iters=warmup, lr_decay_iters=decay, min_lr=lowest, **more)
    return [config.learning_rate_at(step) for step in range(steps)]


def nanogpt_learning_rate(it, learning_rate, warmup_iters, lr_decay_iters, min_lr):
    if it < warmup_iters:
        return learning_rate * (it + 1) / (warmup_iters + 1)
    if it > lr_decay_iters:
        return min_lr
    decay_ratio = (it - warmup_iters) / (lr_decay_iters - warmup_iters)
    return min_lr + 0.5 * (1.0 + math.cos(math.pi * decay_ratio)) * (learning_rate - min_lr)


def test_cosine_schedule_is_nanogpts():
    expected = [nanogpt_learning_rate(step, 6e-4, 10, 100, 6e-5) for step in range(130)]
    assert rates(6e-4, 10, 100, 6e-5, 130, lr_schedule="cosine") == pytest.approx(expected, rel=1e-12)


def test_linear_schedule_is_a_straight_line_down():
    found = rates(1.0, 10, 110, 0.2, 121, lr_schedule="linear")
    assert found[9] == pytest.approx(10 / 11)
    assert found[10:111] == pytest.approx([1.0 - 0.8 * i / 100 for i in range(101)])
    assert found[111:] == [0.2] * 10


def test_constant_schedule_stays_at_the_peak_after_the_warm_up():
    found = rates(1.0, 3, 10, 0.1, 20, decay_lr=False)
    assert found[:3] == pytest.approx([0.25, 0.5, 0.75])
    assert found[3:] == [1.0] * 17


@pytest.mark.parametrize("shape", [{"lr_schedule": "cosine"}, {"lr_schedule": "linear"}, {"decay_lr": False}])
def test_a_warm_up_as_long_as_the_decay_is_no_division_by_zero(shape):
    found = rates(1.0, 5, 5, 0.1, 8, **shape)
    assert found[:5] == pytest.approx([i / 6 for i in range(1, 6)])
    assert found[5:] == [1.0 if "decay_lr" in shape else 0.1] * 3


@KINDS
def test_frozen_parameters_do_not_change(kind):
    model, _ = make(kind)
    frozen = model.transformer.h[0].requires_grad_(False)
    before = [parameter.clone() for parameter in frozen.parameters()]
    optimizers = make_optimizers(model, kind, 0.02, 0.1, betas=(0.9, 0.95))
    model(torch.tensor([[1, 2, 3]]), torch.tensor([[2, 3, 4]]))[1].backward()
    apply_gradients([p for p in model.parameters() if p.requires_grad], optimizers, NO_SCALER, 0.02, 1.0)
    assert all(map(torch.equal, before, frozen.parameters()))


@KINDS
def test_matrices_and_embeddings_decay_and_vectors_do_not(kind):
    model, optimizers = make(kind, weight_decay=0.5)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    apply_gradients(list(model.parameters()), optimizers, NO_SCALER, 0.02, 1.0)
    for name, parameter in model.named_parameters():
        kept = 1 - 0.02 * 0.5 if parameter.dim() == 2 else 1
        assert torch.allclose(parameter, before[name] * kept, rtol=1e-6, atol=0), name


def test_muon_takes_the_matrices_of_the_blocks_and_adamw_the_rest():
    model, (adamw, muon) = make("muon")
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    of_muon = {names[id(p)] for group in muon.param_groups for p in group["params"]}
    of_adamw = [names[id(p)] for group in adamw.param_groups for p in group["params"]]
    assert of_muon == {
        f"transformer.h.{i}.{part}.weight"
        for i in range(2)
        for part in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    }
    assert sorted([*of_muon, *of_adamw]) == sorted(names.values())


def test_adamw_equals_torchs_plain_one():
    model, optimizers = make("adamw", weight_decay=0.0)
    other, _ = make("adamw")
    plain = torch.optim.AdamW(other.parameters(), lr=0.02, betas=(0.9, 0.95), weight_decay=0.0, foreach=False)
    for seed in range(3):
        set_gradients(model, seed)
        set_gradients(other, seed)
        apply_gradients(list(model.parameters()), optimizers, NO_SCALER, 0.02, 0.0)
        plain.step()
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(model.parameters(), other.parameters()))


def plain_muon(weight: torch.Tensor, gradients: list[torch.Tensor], lr: float, weight_decay: float) -> torch.Tensor:
    """Muon on one matrix, step by step in float64."""
    weight, momentum = weight.double(), torch.zeros_like(weight, dtype=torch.float64)
    for gradient in gradients:
        gradient = gradient.double()
        momentum = 0.95 * momentum + 0.05 * gradient
        x = 0.05 * gradient + 0.95 * momentum
        x = x / (SAFETY * x.norm())
        for i, (a, b, c) in enumerate(QUINTICS):
            gram = x @ x.T / (SAFETY**2 if i else 1)
            x = (a * x + (b * gram + c * gram @ gram) @ x) / (SAFETY if i else 1)
        weight = weight * (1 - lr * weight_decay) - lr * 0.2 * max(weight.shape) ** 0.5 * x
    return weight


def test_momentum_is_muons():
    moved = []
    for momentum in (0.0, 0.95):
        model, _ = make("muon")
        optimizers = make_optimizers(model, "muon", 0.02, 0.1, (0.9, 0.95), momentum)
        for seed in range(2):
            set_gradients(model, seed)
            apply_gradients(list(model.parameters()), optimizers, NO_SCALER, 0.02, 0.0)
        weights = (model.transformer.h[0].mlp.c_fc.weight, model.transformer.wte.weight)
        moved.append([p.detach().clone() for p in weights])
    (matrix, embedding), (other_matrix, other_embedding) = moved
    assert not torch.equal(matrix, other_matrix)
    assert torch.equal(embedding, other_embedding)


# bfloat16 has 8 bits
@pytest.mark.parametrize("dtype, most", [(torch.bfloat16, 0.03), (torch.float16, 0.03), (torch.float32, 1e-4)])
def test_muon_equals_a_plain_reference_matrix_by_matrix(dtype, most):
    model, _ = make("muon")
    optimizers = make_optimizers(model, "muon", 0.02, 0.5, betas=(0.9, 0.95), dtype=dtype)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    gradients = []
    for seed in range(3):
        gradients.append(set_gradients(model, seed))
        apply_gradients(list(model.parameters()), optimizers, NO_SCALER, 0.02, 0.0)
    for name, parameter in model.named_parameters():
        if ".h." not in name or parameter.dim() != 2:
            continue
        parts = 3 if "c_attn" in name else 1
        for i in range(parts):
            first = start[name].chunk(parts)[i]
            expected = plain_muon(first, [step[name].chunk(parts)[i] for step in gradients], 0.02, 0.5)
            error = (parameter.detach().chunk(parts)[i] - expected).norm() / (expected - first).norm()
            assert error < most, f"{name} {i}: {error}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(32, 32), (16, 64), (64, 16), (256, 1024)])
def test_orthogonalize_brings_singular_values_near_one_and_keeps_their_directions(shape, dtype):
    """float16 on cards without bfloat16: its smallest numbers are still far below the products of a large matrix."""
    generator = torch.Generator().manual_seed(0)
    n = 1 if max(shape) > 1000 else 3  # on many CPUs products in 16 bits are slow
    u, values, vh = torch.linalg.svd(torch.randn(n, *shape, generator=generator), full_matrices=False)
    result = u @ torch.diag_embed(values.clamp(min=values.max() / 200)) @ vh * 100
    orthogonalize([result], dtype)
    assert torch.equal(result, result.to(dtype).float())
    values = torch.linalg.svdvals(result)
    assert values.min() > 0.35
    assert values.max() < 1.65
    inner = u.mT @ result @ vh.mT  # diagonal where the directions are the same
    assert (inner - torch.diag_embed(inner.diagonal(dim1=1, dim2=2))).abs().max() < 0.1


def test_matrices_are_orthogonalized_alike_alone_and_together():
    """In few large products, or in many: with several layers, tall and wide matrices and c_attn's three maps."""
    shapes = [(2, 48, 16), (3, 16, 16), (2, 64, 16), (1, 16, 64), (1, 80, 16)]
    alone = [torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i, shape in enumerate(shapes)]
    together = [stack.clone() for stack in alone]
    orthogonalize(together, torch.float32)
    for stack, same in zip(alone, together):
        n, R, C = stack.shape
        for i in range(n):
            for part in range(3 if R == 3 * C else 1):
                one = stack[i].view(-1, C, C)[part].clone() if R == 3 * C else stack[i].clone()
                expected = one.clone()[None]
                orthogonalize([expected], torch.float32)
                found = same[i].view(-1, C, C)[part] if R == 3 * C else same[i]
                assert torch.allclose(found, expected[0], atol=1e-5)
                assert (one * found).sum() > 0.5 * one.norm()  # and it is the matrix's own


def test_a_small_model_and_a_large_one_are_updated_alike(monkeypatch):
    """In one batch, or in several of at most so many elements."""
    updated = []
    for small, at_once in ((2**22, 2**27), (0, 2**27), (0, 2000), (0, 1)):
        monkeypatch.setattr("plaingpt.optimizer.SMALL_MODEL", small)
        monkeypatch.setattr("plaingpt.optimizer.ELEMENTS_AT_ONCE", at_once)
        model, _ = make("muon")
        optimizers = make_optimizers(model, "muon", 0.02, 0.1, (0.9, 0.95), dtype=torch.float32)
        sizes = [[len(stack) for stack in batch] for batch in stacks_at_once(optimizers[1].param_groups[0]["params"])]
        assert len(sizes) == {2**22: 1, 2**27: 4, 2000: 8, 1: 8}[small or at_once], sizes
        set_gradients(model, 0)
        apply_gradients(list(model.parameters()), optimizers, NO_SCALER, 0.02, 1.0)
        updated.append(torch.nn.utils.parameters_to_vector(model.parameters()).detach())
    assert all(torch.allclose(weights, updated[0], atol=1e-6) for weights in updated)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_muon_changes_nothing_if_a_tensor_on_the_device_says_so(bad):
    """On CUDA the host does not wait for the norm of the gradients."""
    model, (_, muon) = make("muon")
    for seed, found_inf in (0, 0.0), (1, 1.0), (2, 0.0):
        before = snapshot(model, [muon])
        set_gradients(model, seed)
        muon.param_groups[0]["lr"], muon.found_inf = torch.tensor(0.02), torch.tensor(found_inf)
        if found_inf:
            model.transformer.h[1].mlp.c_fc.weight.grad[3, 4] = bad
        muon.step()
        assert equal(before, snapshot(model, [muon])) == bool(found_inf)
    plain, (_, other) = make("muon")
    for seed in (0, 2):
        set_gradients(plain, seed)
        other.step()
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(snapshot(model, [muon]), snapshot(plain, [other])))


@KINDS
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(kind, bad):
    model, optimizers = make(kind)
    for seed in range(2):
        set_gradients(model, seed)
        apply_gradients(list(model.parameters()), optimizers, NO_SCALER, 0.02, 1.0)
    before = snapshot(model, optimizers)
    set_gradients(model, 2)
    model.transformer.h[1].ln_1.weight.grad[3] = bad
    norm = apply_gradients(list(model.parameters()), optimizers, NO_SCALER, 0.02, 1.0)
    assert not norm.isfinite()
    assert len(before) > 2 * len(list(model.parameters()))
    assert equal(before, snapshot(model, optimizers))
    set_gradients(model, 3)
    assert apply_gradients(list(model.parameters()), optimizers, NO_SCALER, 0.02, 1.0).isfinite()
    assert not equal(before, snapshot(model, optimizers))


@KINDS
def test_a_first_gradient_that_is_not_finite_leaves_no_trace(kind):
    model, optimizers = make(kind)
    set_gradients(model, 0)
    model.transformer.wte.weight.grad[0, 0] = math.nan
    apply_gradients(list(model.parameters()), optimizers, NO_SCALER, 0.02, 0.0)
    fresh, fresh_optimizers = make(kind)
    assert equal(list(model.parameters()), list(fresh.parameters()))
    for m, o in ((model, optimizers), (fresh, fresh_optimizers)):
        set_gradients(m, 1)
        apply_gradients(list(m.parameters()), o, NO_SCALER, 0.02, 0.0)
    assert equal(snapshot(model, optimizers), snapshot(fresh, fresh_optimizers))


def test_skipped_steps_are_counted_and_too_many_in_a_row_end_the_run():
    skipped = SkippedSteps(5, torch.device("cpu"))
    counts = []
    for norm in (1.0, math.nan, math.inf, 0.0, math.nan):
        skipped.count(torch.tensor(norm))
        counts.append(skipped.total(1))
    assert counts == [5, 6, 7, 7, 8]
    for _ in range(MAX_SKIPPED - 1):
        skipped.total(1)
        skipped.count(torch.tensor(math.nan))
    with pytest.raises(RunFailed, match=f"not finite in {MAX_SKIPPED} consecutive steps, seen after step 40;"):
        skipped.total(40)


def loss_scaler() -> torch.amp.GradScaler:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, enabled=True)
    scaler.scale(torch.zeros(()))  # makes the scale
    return scaler


@KINDS
def test_a_loss_scale_changes_no_update(kind):
    model, optimizers = make(kind)
    scaled, scaled_optimizers = make(kind)
    set_gradients(model, 0)
    set_gradients(scaled, 0, scale=2.0**10)
    norm = apply_gradients(list(model.parameters()), optimizers, NO_SCALER, 0.02, 1.0)
    assert apply_gradients(list(scaled.parameters()), scaled_optimizers, loss_scaler(), 0.02, 1.0) == norm
    assert equal(snapshot(model, optimizers), snapshot(scaled, scaled_optimizers))


@KINDS
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_scaled_gradient_that_is_not_finite_changes_nothing_but_the_scale(kind, bad):
    model, optimizers = make(kind)
    scaler = loss_scaler()
    set_gradients(model, 0)
    apply_gradients(list(model.parameters()), optimizers, scaler, 0.02, 1.0)
    before = snapshot(model, optimizers)
    set_gradients(model, 1)
    model.transformer.wte.weight.grad[0, 0] = bad  # of one optimizer of two, if there are two
    apply_gradients(list(model.parameters()), optimizers, scaler, 0.02, 1.0)
    assert equal(before, snapshot(model, optimizers))
    assert scaler.get_scale() == 2.0**9


@pytest.mark.parametrize(("grad_clip", "moved"), [(0.5, 0.5), (1e6, None), (0.0, None)])
def test_gradients_are_clipped_to_a_norm_and_their_own_norm_is_returned(grad_clip, moved):
    model, _ = make("adamw")
    start = torch.nn.utils.parameters_to_vector(model.parameters()).detach()
    gradients = set_gradients(model, 0)
    norm = math.sqrt(sum(gradient.double().square().sum().item() for gradient in gradients.values()))
    plain = torch.optim.SGD(model.parameters(), lr=123.0, fused=True)
    found = apply_gradients(list(model.parameters()), [plain], NO_SCALER, 0.1, grad_clip)
    assert found.item() == pytest.approx(norm, rel=1e-4)
    step = torch.nn.utils.parameters_to_vector(model.parameters()).detach() - start
    assert step.norm().item() == pytest.approx(0.1 * (moved or norm), rel=1e-3)
    assert all(parameter.grad is None for parameter in model.parameters())
