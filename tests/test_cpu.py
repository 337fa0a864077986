"""The fast versions of what the model does compute the same."""

import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import run_main
from test_model import SMALL, random_ids, random_model
from torch.nn import functional as F

from model import GPT, IGNORED, GPTConfig
from plaingpt.cpu import PackedLinear, attention, cross_entropy, dropout, has_fp16_products, pack, speed_up


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-7), (torch.bfloat16, 1e-4)])
def test_the_loss_without_logits_is_the_same_with_the_same_gradient(dtype, tolerance):
    V, N = 2**20, 9  # wide enough that the rows come in several parts
    logits = torch.randn(N, V, generator=torch.Generator().manual_seed(0)).to(dtype)
    logits[:, -10:] = -torch.inf
    targets = torch.tensor([0, 5, IGNORED, 7, V - 11, 1, IGNORED, 2, 3])
    reference = logits.float().requires_grad_()
    expected = F.cross_entropy(reference, targets, ignore_index=IGNORED)
    (expected / 3).backward()
    logits.requires_grad_()
    loss = cross_entropy(logits * 1, targets, IGNORED)
    (loss / 3).backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    assert (logits.grad.float() - reference.grad).abs().max() < tolerance
    assert logits.grad[[2, 6]].abs().max() == 0


@pytest.mark.parametrize("fast", [False, True])
def test_a_model_asked_for_the_loss_alone_gives_it(fast):
    model, ids = random_model(SMALL), random_ids(SMALL, 3, 12)
    if fast:
        speed_up(model)
    logits, loss = model(ids, ids)
    assert logits.shape == (3, 12, 65)
    with torch.no_grad():
        nothing, alone = model(ids, ids, need_logits=False)
    assert nothing is None and alone.item() == pytest.approx(loss.item(), abs=1e-6)


def test_a_second_backward_pass_through_the_loss_without_logits_fails():
    logits = torch.randn(2, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = cross_entropy(logits * 1, torch.tensor([1, 2]), IGNORED)
    loss.backward(retain_graph=True)
    with pytest.raises(AttributeError):
        loss.backward()


@pytest.mark.parametrize("T", [1, 64, 700])
def test_attention_on_the_cpu_is_torchs_in_fp32_but_for_rounding(T):
    q, k, v = torch.randn(3, 2, 3, T, 16, generator=torch.Generator().manual_seed(0)).bfloat16().requires_grad_()
    exact = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=True)
    # the path with dropout, where nothing is dropped
    assert torch.allclose(attention(q.float(), k.float(), v.float(), 1e-9), exact, atol=1e-5)
    y = attention(q, k, v, 0.0)
    assert y.shape == exact.shape and (y.float() - exact).abs().max() < 0.03
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    for ours, reference in zip(
        torch.autograd.grad(y, (q, k, v), direction.bfloat16()), torch.autograd.grad(exact, (q, k, v), direction)
    ):
        assert (ours - reference).float().norm() <= 0.02 * reference.float().norm() + 1e-6


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_attention_on_the_cpu_drops_out_without_torchs_slow_path(monkeypatch, dtype):
    monkeypatch.delattr(F, "scaled_dot_product_attention")
    q, k, v = torch.ones(3, 1, 1, 256, 4, dtype=dtype)
    torch.manual_seed(0)
    y = attention(q, k, v, 0.5)
    assert y[..., 100:, :].std() > 0.02 and y[..., 100:, :].float().mean() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("p", [0.0, 0.1, 0.5, 0.99999, 1.0])
def test_dropout_drops_each_number_by_itself_and_scales_the_others(dtype, p):
    torch.manual_seed(0)
    x = torch.full((1001, 997), 3.0, dtype=dtype, requires_grad=True)
    y = dropout(x, p)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    kept = y != 0
    assert torch.equal(kept, gradient != 0)
    if p < 1:
        wanted = torch.tensor(1 / (1 - p), dtype=dtype) if p != 0.99999 else gradient[kept][:1]
        assert torch.allclose(gradient[kept], wanted, rtol=1e-2 if dtype == torch.bfloat16 else 2e-5)
        assert torch.equal(y, x * gradient)
    deviation = math.sqrt(p * (1 - p))
    apart = kept.flatten().double() - (1 - p)
    assert abs(apart.mean()) <= 4 * deviation / 1000 + 2**-16
    for distance in (1, 2, 3, 4, 997):  # four of them come from one draw
        assert abs((apart[distance:] * apart[:-distance]).mean()) <= 4 * deviation**2 / 1000 + 2**-16


@pytest.mark.parametrize("fast", [False, True])
def test_dropout_acts_in_training_only(fast):
    model = GPT(GPTConfig(block_size=12, vocab_size=65, n_layer=1, n_head=1, n_embd=32, dropout=0.5))
    if fast:
        speed_up(model)
    idx = random_ids(SMALL, 1, 12)
    model.train()
    assert not torch.equal(model(idx)[0], model(idx)[0])
    model.eval()
    assert torch.equal(model(idx)[0], model(idx)[0])


def test_speeding_a_model_up_changes_its_logits_by_rounding_alone():
    model, ids = random_model(SMALL), random_ids(SMALL, 3, 12)
    before, loss = model(ids, ids)
    speed_up(model)
    after, fast_loss = model(ids, ids)
    assert torch.allclose(after, before, atol=1e-5) and fast_loss.item() == pytest.approx(loss.item(), abs=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(model(ids)[0].float(), before, atol=0.05 * before.abs().max().item())
    fast = {type(module).__module__ for module in model.modules() if hasattr(module, "attention")}
    assert fast == {"plaingpt.cpu"}


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_a_packed_matrix_multiplies_as_its_linear_layer_does(dtype, bias):
    torch.manual_seed(0)
    linear, x = torch.nn.Linear(24, 65, bias=bias), torch.randn(2, 3, 24)
    expected = F.linear(x, linear.weight.to(dtype).float(), linear.bias)
    got = PackedLinear(linear.weight.detach(), linear.bias, dtype)(x).float()
    assert torch.allclose(got, expected, atol=1e-5 if dtype == torch.float32 else 0.03)


@pytest.mark.parametrize("dtype", DTYPES)
def test_packing_frees_each_matrix_and_returns_the_head(dtype):
    model, x = random_model(SMALL), torch.randn(1, 3, 32)
    expected = F.linear(x, model.transformer.wte.weight)
    head = pack(model, dtype)
    assert torch.allclose(head(x).float(), expected, atol=1e-4 if dtype == torch.float32 else 0.1)
    assert not [name for name in model.state_dict() if ".h." in name and ".c_" in name]


def test_threads_started_after_packing_compute_on_all_cores():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        pack(random_model(SMALL), torch.float32)
        with ThreadPoolExecutor(1) as thread:
            assert thread.submit(torch.get_num_threads).result() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(not has_fp16_products(), reason="torch has no products with float16 weights here")
def test_without_torchs_quantized_operators_sampling_uses_the_model_precision(monkeypatch, tiny_run):
    """They are to leave torch after 2.13."""

    def text() -> str:
        ended = run_main("sample", f"--out_dir={tiny_run}", "--device=cpu", "--max_new_tokens=5", "--temperature=0")
        assert ended.status == 0, ended.err
        return ended.out

    expected = text()
    monkeypatch.setattr(torch.ops, "quantized", object())
    assert not has_fp16_products()
    assert text() == expected
    PackedLinear(torch.ones(4, 4), None, torch.float16)(torch.ones(1, 4))
