"""Finetuning with its recipe, from each kind of model that it takes, on models with GPT-2's vocabulary."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, Ended, flags, made_text, run_main
from test_checkpoint import nanogpt_checkpoint, transformers_model

from plaingpt.tokens import open_data_set

BLOCK = 24
SMALL = {
    "dataset": "words", "block_size": BLOCK, "gradient_accumulation_steps": 2, "max_iters": 2, "eval_interval": 1,
    "eval_iters": 2, "sample_tokens": 2, "device": "cpu", "dtype": "float32", "compile": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def words(tmp_path_factory) -> Path:
    """The folder of a small text in GPT-2's tokens."""
    folder = tmp_path_factory.mktemp("words")
    (folder / "words.txt").write_text(made_text(4000))
    ended = run_main(
        "prepare_data", folder / "words.txt", *flags(tokenizer="gpt2", val_fraction=0.1, data_dir=folder, name="words")
    )
    assert ended.status == 0, ended.err
    return folder


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> Path:
    """A model directory as transformers writes it, with biases that are not zero."""
    folder = tmp_path_factory.mktemp("theirs")
    model = transformers_model(50257)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def finetune(words):
    def run(out_dir: Path, init_from: Path, **changes) -> Ended:
        given = SMALL | {"data_dir": words, "out_dir": out_dir, "init_from": init_from} | changes
        ended = run_main("train", ROOT / "config" / "finetune_shakespeare.py", *flags(**given))
        assert ended.status == 0, ended.err
        return ended

    return run


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory, finetune, pretrained) -> Path:
    out_dir = tmp_path_factory.mktemp("finetuned") / "secret-place" / "words-run"
    finetune(out_dir, pretrained)
    return out_dir


def losses(out_dir: Path) -> list[float]:
    lines = (json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines())
    return [line["val_loss"] for line in lines if "val_loss" in line]


def their_loss(directory: Path, words: Path) -> float:
    """transformers' mean loss over the validation split, in windows of BLOCK, the last one shorter."""
    from transformers import AutoModelForCausalLM

    model, tokens = AutoModelForCausalLM.from_pretrained(directory).eval(), open_data_set(words / "words").val
    ids = torch.from_numpy(np.concatenate(list(tokens.all())).astype(np.int64))
    total = 0.0
    with torch.no_grad():
        for start in range(0, len(ids) - 1, BLOCK):
            window = ids[start : start + BLOCK + 1]
            logits = model(window[None, :-1]).logits[0]
            total += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item()
    return total / (len(ids) - 1)


def test_a_model_of_transformers_is_finetuned_with_the_recipe(finetuned, pretrained):
    training = json.loads((finetuned / "last" / "training.json").read_text())
    assert training["step"] == 2 and (finetuned / "best" / "model.safetensors").is_file()
    recipe = {"optimizer": "adamw", "learning_rate": 3e-5, "decay_lr": False, "warmup_iters": 0, "dropout": 0.1}
    assert recipe.items() <= training["settings"].items()
    of_each = losses(finetuned)
    assert len(of_each) == 3 and of_each[-1] < of_each[0]


def test_the_best_of_a_finetuned_run_is_finetuned_again(tmp_path, finetune, finetuned):
    finetune(tmp_path / "again", finetuned / "best")
    assert losses(tmp_path / "again")[0] == pytest.approx(min(losses(finetuned)), abs=1e-6)
    assert losses(tmp_path / "again")[-1] < losses(tmp_path / "again")[0]
    assert (tmp_path / "again" / "best" / "model.safetensors").is_file()


@pytest.mark.parametrize("bias", [True, False])
def test_a_nanogpt_checkpoint_is_finetuned_with_the_recipe(tmp_path, finetune, bias):
    nanogpt_checkpoint(tmp_path / "ckpt.pt", bias)
    finetune(tmp_path / "run", tmp_path / "ckpt.pt")
    config = json.loads((tmp_path / "run" / "best" / "config.json").read_text())
    assert (config["vocab_size"], config["bias"]) == (50257, bias)
    assert losses(tmp_path / "run")[-1] < losses(tmp_path / "run")[0]


def test_eval_only_tells_transformers_own_loss(tmp_path, words, pretrained):
    given = SMALL | {"eval_only": True, "init_from": pretrained, "eval_iters": 0, "batch_size": 3}
    ended = run_main("train", *flags(**given, data_dir=words, out_dir=tmp_path / "none"))
    assert ended.status == 0, ended.err
    printed = re.search(r"val_loss (\S+), (\S+) bits per byte", ended.err)
    loss, bpb = map(float, printed.groups())
    expected = torch.tensor(their_loss(pretrained, words), dtype=torch.float64)
    val = open_data_set(words / "words").val
    assert loss == pytest.approx(expected.item(), abs=1e-4)
    assert bpb == pytest.approx(expected.item() / 0.6931472 * len(val) / val.n_bytes, abs=1e-4)
    assert not (tmp_path / "none").exists()
