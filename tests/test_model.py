import math

import pytest
import torch
from torch.nn import functional as F

from model import GPT, IGNORED, GPTConfig
from plaingpt.checkpoint import save_model
from plaingpt.distributed import Distributed
from plaingpt.optimizer import apply_gradients, make_optimizers
from plaingpt.parallel import wrap
from plaingpt.tokenizer import make_tokenizer

SMALL = GPTConfig(block_size=12, vocab_size=65, n_layer=2, n_head=2, n_embd=32)


def random_model(config: GPTConfig, std: float = 0.2, seed: int = 0) -> GPT:
    """A model in which every parameter matters: biases and LayerNorms too are random."""
    torch.manual_seed(seed)
    model = GPT(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * std)
        model.transformer.wte.weight[config.vocab_size :] = 0
    return model


def random_ids(config: GPTConfig, batch: int, length: int) -> torch.Tensor:
    return torch.randint(config.vocab_size, (batch, length), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(16, 65, 2, 2, 32), (33, 300, 3, 4, 64), (8, 64, 1, 1, 8)])
def test_logits_and_loss_equal_those_of_transformers(tmp_path, shape, bias):
    from transformers import AutoModelForCausalLM

    config = GPTConfig(*shape, bias=bias)
    model = random_model(config)
    save_model(tmp_path, model, make_tokenizer("char", ["abc"], 0))
    reference = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    idx = random_ids(config, 3, config.block_size)
    with torch.no_grad():
        logits, _ = model(idx)
        expected = reference(idx, labels=idx)
        _, loss = model(idx[:, :-1], idx[:, 1:])
    assert logits.shape == expected.logits.shape
    assert torch.allclose(logits, expected.logits, atol=1e-4)
    assert loss.item() == pytest.approx(expected.loss.item(), abs=1e-5)


def test_ignored_targets_do_not_count():
    model = random_model(SMALL)
    idx, targets = random_ids(SMALL, 2, 12), random_ids(SMALL, 2, 12).flip(1)
    some = targets.clone()
    some[0, 3:] = IGNORED
    logits, loss = model(idx, some)
    counted = some != IGNORED
    assert loss.item() == pytest.approx(F.cross_entropy(logits[counted], targets[counted]).item(), abs=1e-5)
    assert loss.item() != pytest.approx(model(idx, targets)[1].item(), abs=1e-3)


def test_recomputation_computes_each_block_twice_and_changes_nothing():
    model = GPT(GPTConfig(16, 65, n_layer=3, n_head=2, n_embd=16, dropout=0.1)).train()
    idx, passes, found = torch.arange(16)[None], [], []
    for block in model.transformer.h:
        block.register_forward_pre_hook(lambda *_: passes.append(1))
    for recompute in (False, True):
        wrap(model, Distributed(torch.device("cpu"), torch.float32), recompute=recompute)
        model.zero_grad()
        torch.manual_seed(0)
        loss = model(idx, idx, need_logits=False)[1]
        loss.backward()
        found.append([loss, *(parameter.grad.clone() for parameter in model.parameters())])
        assert len(passes) == (9 if recompute else 3)
    assert all(torch.equal(a, b) for a, b in zip(*found))


def test_no_loss_without_targets():
    assert random_model(SMALL)(random_ids(SMALL, 1, 4))[1] is None


def test_a_token_changes_no_logits_before_it():
    model = random_model(SMALL)
    idx = random_ids(SMALL, 1, 12)
    changed = idx.clone()
    changed[0, 7] = (idx[0, 7] + 1) % 65
    before, after = model(idx)[0][0], model(changed)[0][0]
    assert torch.equal(before[:7], after[:7])
    assert all(not torch.allclose(before[t], after[t]) for t in range(7, 12))


def test_more_positions_than_the_block_are_refused():
    with pytest.raises(AssertionError, match="13 positions"):
        random_model(SMALL)(random_ids(SMALL, 1, 13))


def test_initial_weights_are_nanogpts():
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, vocab_size=1000, n_layer=4, n_head=2, n_embd=64))
    for name, parameter in model.named_parameters():
        weights = parameter[:1000] if "wte" in name else parameter
        if name.endswith("bias"):
            assert (weights == 0).all(), name
        elif ".ln_" in name:
            assert (weights == 1).all(), name
        else:
            expected = 0.02 / math.sqrt(8) if name.endswith("c_proj.weight") else 0.02
            assert weights.std().item() == pytest.approx(expected, rel=0.05), name
            assert abs(weights.mean().item()) < 0.1 * expected, name


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_padded_rows_of_the_embedding_stay_zero(kind):
    torch.manual_seed(0)
    model = GPT(SMALL)
    start = model.transformer.wte.weight.detach().clone()
    optimizers = make_optimizers(model, kind, 0.01, weight_decay=0.5, betas=(0.9, 0.95))
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    idx = random_ids(SMALL, 4, 13)
    for _ in range(4):
        model(idx[:, :-1], idx[:, 1:])[1].backward()
        apply_gradients(list(model.parameters()), optimizers, scaler, 0.01, 1.0)
    wte = model.transformer.wte.weight
    assert wte.shape == (128, 32)
    assert (wte[65:] == 0).all()
    assert (wte[:65] != start[:65]).any(dim=1).all()


def test_number_of_parameters_of_gpt2():
    with torch.device("meta"):
        assert GPT(GPTConfig(bias=True)).num_parameters() == 124_439_808


def test_flop_per_token_by_hand():
    model = GPT(GPTConfig(block_size=8, vocab_size=60, n_layer=1, n_head=1, n_embd=4, bias=False))
    wte, block, ln_f = 60 * 4, 4 + 4 * 12 + 4 * 4 + 4 + 4 * 16 + 16 * 4, 4
    attention = 12 * 1 * 4 * 8
    assert model.flop_per_token() == 6 * (wte + block + ln_f) + attention == 3048


def test_one_batch_can_be_learned_by_heart():
    torch.manual_seed(0)
    model = GPT(SMALL)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    idx = random_ids(SMALL, 4, 13)
    for _ in range(80):
        loss = model(idx[:, :-1], idx[:, 1:])[1]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1
