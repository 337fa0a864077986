"""Model directories: bit for bit in and out, other tools read them, and damage is one clear line."""

import dataclasses
import json
import math
import threading
from pathlib import Path

import pytest
import torch
from conftest import edit_json, made_text
from safetensors.torch import load_file, save_file
from test_model import random_model

from model import GPT, GPTConfig
from plaingpt.checkpoint import all_finite, load_model, save_model
from plaingpt.console import UserError
from plaingpt.files import new_directory
from plaingpt.tokenizer import Tokenizer, gpt2, make_tokenizer

TEXT = "The road, and the sea: 3 stones, ein Baum.\n\n  naïve 🙂 don't" + made_text(300)


def make_model(tokenizer: Tokenizer, bias: bool = True, seed: int = 0) -> GPT:
    config = GPTConfig(24, tokenizer.vocab_size, n_layer=2, n_head=2, n_embd=8, dropout=0.1, bias=bias)
    return random_model(config, std=0.1, seed=seed)


def of_kind(kind: str) -> Tokenizer:
    return make_tokenizer(kind, [TEXT], 300)


def logits(model, length: int = 24) -> torch.Tensor:
    """Of a model of ours or of transformers."""
    idx = torch.randint(model.config.vocab_size, (2, length), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model.eval()(idx)[0]


@pytest.fixture
def saved(tmp_path) -> Path:
    tokenizer = of_kind("char")
    save_model(tmp_path, make_model(tokenizer), tokenizer)
    return tmp_path


def test_another_name_of_gpt2s_gelu_is_read(saved):
    edit_json(saved / "config.json", activation_function="gelu_pytorch_tanh")
    assert load_model(saved)[0].config.n_layer == 2


@pytest.mark.parametrize("bias", [True, False])
def test_a_model_comes_back_bit_for_bit(tmp_path, bias):
    tokenizer = of_kind("char")
    model = make_model(tokenizer, bias)
    save_model(tmp_path, model, tokenizer)
    loaded, loaded_tokenizer = load_model(tmp_path, dropout=0.1)
    assert loaded.config == model.config
    assert loaded.state_dict().keys() == model.state_dict().keys()
    assert all(torch.equal(loaded.state_dict()[name], weight) for name, weight in model.state_dict().items())
    assert not loaded.training
    assert torch.equal(logits(loaded), logits(model))
    assert loaded_tokenizer.same_as(tokenizer)


def test_saved_files_are_those_of_a_hugging_face_model_and_no_pickle(saved):
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in saved.iterdir()} == names


@pytest.mark.parametrize("kind", ["gpt2", "char", "byte", "bpe"])
def test_transformers_loads_model_and_tokenizer(tmp_path, kind):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = of_kind(kind)
    model = make_model(tokenizer, bias=kind != "byte")
    save_model(tmp_path, model, tokenizer)
    assert torch.allclose(logits(model), logits(AutoModelForCausalLM.from_pretrained(tmp_path)), atol=1e-5)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer.encode(TEXT)
    assert theirs(TEXT)["input_ids"] == ids
    assert theirs.decode(ids) == tokenizer.decode(ids) == TEXT
    assert theirs.eos_token_id == tokenizer.end_of_text == tokenizer.vocab_size - 1
    prompt = ids[:10]
    written = AutoModelForCausalLM.from_pretrained(tmp_path).generate(
        torch.tensor([prompt]), do_sample=False, max_new_tokens=12, pad_token_id=0
    )
    greedy = list(model.generate(prompt, 12, temperature=0, end_of_text=tokenizer.end_of_text))
    assert written[0].tolist()[10:][: len(greedy)] == greedy
    assert len(greedy) == 12 or written[0][10 + len(greedy)] == tokenizer.end_of_text


def transformers_model(vocab_size: int, **changes):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = dict(n_positions=24, n_embd=8, n_layer=2, n_head=2) | changes
    return GPT2LMHeadModel(GPT2Config(vocab_size=vocab_size, initializer_range=0.3, **sizes))


# layers and heads of gpt2 and gpt2-xl, all their positions and ids; two channels a head
@pytest.mark.parametrize(("layers", "heads"), [(12, 12), (48, 25)])
def test_each_size_of_gpt2_comes_in_and_goes_out_bit_for_bit(tmp_path, layers, heads):
    theirs = transformers_model(50257, n_layer=layers, n_head=heads, n_embd=2 * heads, n_positions=1024)
    theirs.save_pretrained(tmp_path / "in", max_shard_size="3MB")
    assert len(list((tmp_path / "in").glob("*.safetensors"))) > 1
    model, tokenizer = load_model(tmp_path / "in")
    assert (model.config.n_layer, model.config.n_head, model.config.block_size) == (layers, heads, 1024)
    assert torch.allclose(logits(model), logits(theirs), atol=1e-3)
    (tmp_path / "out").mkdir()
    save_model(tmp_path / "out", model, tokenizer)
    before = {}
    for shard in (tmp_path / "in").glob("*.safetensors"):
        before |= {name.removeprefix("transformer."): tensor for name, tensor in load_file(shard).items()}
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert after.keys() == before.keys() - {"lm_head.weight"}  # OpenAI's names, which have no prefix
    assert all(torch.equal(after[name], before[name]) for name in after)
    shard.rename(shard.with_name("model-copy-of-it.safetensors"))
    with pytest.raises(UserError, match=r"in has \d+ files of weights instead of \d+"):
        load_model(tmp_path / "in")


@pytest.mark.parametrize(("dtype", "shard"), [(torch.float32, "1GB"), (torch.float16, "4KB"), (torch.bfloat16, "4KB")])
def test_a_model_that_transformers_wrote_loads(tmp_path, dtype, shard):
    tokenizer = of_kind("byte")
    theirs = transformers_model(tokenizer.vocab_size).to(dtype)
    theirs.save_pretrained(tmp_path, max_shard_size=shard)
    tokenizer.save(tmp_path)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "4KB")
    model, _ = load_model(tmp_path)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert torch.allclose(logits(model), logits(theirs.float()), atol=1e-4)


def test_a_gpt2_without_tokenizer_files_has_gpt2s(tmp_path):
    transformers_model(50257).save_pretrained(tmp_path)
    assert load_model(tmp_path)[1].same_as(of_kind("gpt2"))


def save_vocab_and_merges(directory: Path, tokenizer: Tokenizer, changes: dict[str, int] | None = None) -> None:
    """Write the files that older directories have instead of tokenizer.json, with these ids changed or added."""
    model = json.loads(tokenizer.to_json())["model"]
    (directory / "vocab.json").write_text(json.dumps(model["vocab"] | (changes or {})))
    (directory / "merges.txt").write_text("\n".join(["#version: 0.2", *map(" ".join, model["merges"]), ""]), "utf-8")


@pytest.mark.parametrize("kind", ["bpe", "gpt2"])
def test_the_vocab_and_merges_of_a_model_are_its_tokenizer(tmp_path, kind):
    """An older directory, without tokenizer.json; as many ids as GPT-2 has are not always GPT-2's."""
    old = of_kind(kind)
    a, b = map(old.vocabulary().get, "er")
    vocabulary = old.vocabulary() | {"e": b, "r": a}
    save_vocab_and_merges(tmp_path, old, vocabulary)
    transformers_model(len(vocabulary)).save_pretrained(tmp_path)
    _, tokenizer = load_model(tmp_path)
    assert tokenizer.vocabulary() == vocabulary and tokenizer.end_of_text == len(vocabulary) - 1
    swapped = {a: b, b: a}
    assert tokenizer.encode(TEXT) == [swapped.get(i, i) for i in old.encode(TEXT)]
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    from transformers import GPT2Tokenizer

    theirs = GPT2Tokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    assert tokenizer.encode(TEXT) == theirs(TEXT)["input_ids"]
    for missing in ("merges.txt", "vocab.json"):
        (tmp_path / missing).rename(tmp_path / "moved")
        with pytest.raises(UserError, match=r"damaged: .*No such file"):
            load_model(tmp_path)
        (tmp_path / "moved").rename(tmp_path / missing)
    (tmp_path / "merges.txt").write_text("#version: 0.2\nnot there\n")
    with pytest.raises(UserError, match=r"vocab\.json or merges\.txt is damaged"):
        load_model(tmp_path)


@pytest.mark.parametrize("file", ["added_tokens.json", "tokenizer_config.json"])
def test_tokens_that_were_added_to_an_older_directory_are_known(tmp_path, file):
    """vocab.json does not have them."""
    size = of_kind("bpe").end_of_text
    save_vocab_and_merges(tmp_path, of_kind("bpe"))
    transformers_model(size + 2).save_pretrained(tmp_path)

    def load(added: dict[str, int]):
        described = {str(i): {"content": token, "special": token[0] == "<"} for token, i in added.items()}
        decoder = {"added_tokens_decoder": described}
        (tmp_path / file).write_text(json.dumps(added if file == "added_tokens.json" else decoder))
        return load_model(tmp_path)

    model, tokenizer = load({"<|user|>": size + 1, "<|endoftext|>": size})
    assert (model.config.vocab_size, tokenizer.end_of_text) == (size + 2, size)
    assert tokenizer.encode("e<|user|>", special=True) == [*tokenizer.encode("e"), size + 1]
    plain = load({"<|endoftext|>": size, "hello": size + 1})[1]
    assert plain.encode("e hello") == [*tokenizer.encode("e "), size + 1] != tokenizer.encode("e hello")
    with pytest.raises(UserError, match=r"the added token '<\|user\|>' cannot have the id"):
        load({"<|user|>": size + 1})
    (tmp_path / file).write_text('{"<')
    with pytest.raises(UserError, match=rf"{file} is missing or damaged"):
        load_model(tmp_path)


@pytest.mark.parametrize("kind", ["transformers", "nanogpt"])
def test_a_model_with_a_head_of_its_own_is_refused(tmp_path, kind):
    """As some tools write it, although config.json does not say so."""
    if kind == "nanogpt":
        path = tmp_path / "ckpt.pt"
        nanogpt_checkpoint(path)
        content = torch.load(path, weights_only=True)
        weights, name = content["model"], "_orig_mod.lm_head.weight"
    else:
        path = tmp_path
        of_kind("bpe").save(path)
        transformers_model(of_kind("bpe").vocab_size).save_pretrained(path)
        weights, name = load_file(path / "model.safetensors"), "lm_head.weight"
        weights[name] = weights["transformer.wte.weight"].clone()

    def load():
        torch.save(content, path) if kind == "nanogpt" else save_file(weights, path / "model.safetensors")
        return load_model(path)

    load()
    weights[name] = weights[name].clone()
    weights[name][7, 3] += 1
    with pytest.raises(UserError, match=r"lm_head\.weight differs from transformer\.wte\.weight"):
        load()


def test_rows_of_the_embedding_without_a_token_are_dropped(tmp_path, capsys):
    """Nobody can draw them, and an exported model has as many rows as its tokenizer has ids."""
    tokenizer = of_kind("byte")
    theirs = transformers_model(300)
    theirs.save_pretrained(tmp_path)
    tokenizer.save(tmp_path)
    model, _ = load_model(tmp_path)
    assert model.config.vocab_size == tokenizer.vocab_size == 257
    assert "dropped 43 embedding rows that no token uses" in capsys.readouterr().err
    idx = torch.randint(257, (2, 24))
    with torch.no_grad():
        assert torch.allclose(model(idx)[0], theirs.eval()(idx).logits[..., :257], atol=1e-5)
    assert max(model.generate([0], 500, temperature=100.0)) < 257
    (tmp_path / "again").mkdir()
    save_model(tmp_path / "again", model, tokenizer)
    assert load_file(tmp_path / "again" / "model.safetensors")["wte.weight"].shape == (257, 8)
    weights = load_file(tmp_path / "model.safetensors")
    save_file(weights | {"lm_head.weight": weights["transformer.wte.weight"] + 1}, tmp_path / "model.safetensors")
    capsys.readouterr()
    with pytest.raises(UserError, match="differs from"):
        load_model(tmp_path)
    assert "dropped" not in capsys.readouterr().err  # a refused model is read twice


def test_weights_in_a_pickle_are_refused_and_can_be_converted(tmp_path):
    folder = tmp_path / "it's mine"
    theirs = transformers_model(257)
    theirs.save_pretrained(folder)
    of_kind("byte").save(folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no weights in safetensors; pytorch_model\.bin is a pickle") as caught:
        load_model(folder)
    assert "load model and tokenizer with transformers' from_pretrained and write both" in str(caught.value)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for kind in AutoModelForCausalLM, AutoTokenizer:
        kind.from_pretrained(folder).save_pretrained(tmp_path / "converted")
    model, _ = load_model(tmp_path / "converted")
    assert torch.allclose(logits(model), logits(theirs), atol=1e-5)


def test_a_model_that_is_replaced_before_it_is_read_is_read_again(tmp_path, monkeypatch):
    saved, tokenizer = tmp_path / "last", of_kind("byte")
    with new_directory(saved) as new:
        save_model(new, make_model(tokenizer), tokenizer)
    removed = [tmp_path / ".last.old"]  # by the save that put `last` in its place
    monkeypatch.setattr("plaingpt.checkpoint.model_path", lambda _: removed.pop() if removed else saved)
    assert load_model(saved)[1].same_as(tokenizer) and not removed


def test_a_model_loaded_while_a_run_saves_is_one_of_those_saved(tmp_path):
    """The n-th save writes n everywhere; a loaded model must not consist of two."""
    tokenizer, stop = of_kind("char"), threading.Event()
    config = GPTConfig(24, tokenizer.vocab_size, n_layer=6, n_head=2, n_embd=8)

    def save(number: int) -> None:
        model = GPT(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(number)
        with new_directory(tmp_path / "last") as new:
            save_model(new, model, tokenizer)

    def save_always() -> None:
        number = 1
        while not stop.wait(0.2):  # a run saves less often than a model can be read twice
            save(number := number + 1)

    save(1)
    thread = threading.Thread(target=save_always)
    thread.start()
    try:
        found = []
        while len(set().union(*found)) < 5:
            weights = load_model(tmp_path / "last")[0].weights()
            found.append({value for weight in weights.values() for value in weight.flatten().tolist()})
    finally:
        stop.set()
        thread.join()
    assert all(len(numbers) == 1 for numbers in found)


def test_a_tensor_is_finite_without_nan_and_infinity_and_also_if_it_is_empty():
    assert all_finite(torch.zeros(0)) and all_finite(torch.tensor([-3e38, 3e38]))
    assert not any(all_finite(torch.tensor([0.0, bad, 1.0])) for bad in (math.nan, math.inf, -math.inf))


def nanogpt_checkpoint(path: Path, bias: bool = True, rows: int = 50304) -> GPT:
    """Write a ckpt.pt as nanoGPT does, of a compiled model with a padded vocabulary; return the model in it."""
    torch.manual_seed(0)
    args = dict(n_layer=2, n_head=2, n_embd=8, block_size=24, bias=bias, vocab_size=rows, dropout=0.0)
    model = GPT(GPTConfig(**args)).eval()
    weights = {f"_orig_mod.{name}": weight for name, weight in model.state_dict().items()}
    weights["_orig_mod.lm_head.weight"] = model.transformer.wte.weight.detach()
    optimizer = torch.optim.AdamW(model.parameters()).state_dict()
    checkpoint = {"model": weights, "optimizer": optimizer, "model_args": args, "iter_num": 5, "config": {"seed": 1}}
    torch.save(checkpoint | {"best_val_loss": torch.tensor(3.0)}, path)
    return model


@pytest.mark.parametrize("bias", [True, False])
def test_a_nanogpt_checkpoint_loads_without_its_padding(tmp_path, bias):
    original = nanogpt_checkpoint(tmp_path / "ckpt.pt", bias)
    model, tokenizer = load_model(tmp_path / "ckpt.pt")
    assert dataclasses.asdict(model.config) == dataclasses.asdict(original.config) | {"vocab_size": 50257}
    assert tokenizer.same_as(of_kind("gpt2"))
    idx = torch.randint(50257, (2, 24))
    assert torch.equal(model(idx)[0], original(idx)[0][..., :50257])


@pytest.mark.parametrize("way", ["sparse", "number", "nothing"])
@pytest.mark.filterwarnings("ignore")
def test_a_nanogpt_checkpoint_with_what_is_no_weight_is_refused(tmp_path, way):
    nanogpt_checkpoint(tmp_path / "ckpt.pt")
    checkpoint = torch.load(tmp_path / "ckpt.pt", weights_only=True)
    name = "_orig_mod.transformer.h.0.mlp.c_fc.weight"
    weight = checkpoint["model"][name]
    checkpoint["model"][name] = {"sparse": weight.to_sparse(), "number": torch.tensor(1.0), "nothing": None}[way]
    torch.save(checkpoint, tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match="is not a nanoGPT checkpoint that can be read safely"):
        load_model(tmp_path / "ckpt.pt")


@pytest.mark.parametrize("rows", [50256, 50258, 100288])
def test_only_gpt2s_vocabulary_is_imported_from_nanogpt(tmp_path, rows):
    nanogpt_checkpoint(tmp_path / "ckpt.pt", rows=rows)
    with pytest.raises(UserError, match=rf"has {rows} ids, and its tokenizer is in a pickle elsewhere"):
        load_model(tmp_path / "ckpt.pt")


class Malice:
    """Unpickled, it would make a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_checkpoint_with_code_in_it_is_refused_and_not_run(tmp_path):
    torch.save({"model_args": {}, "model": {}, "more": Malice(tmp_path / "ran")}, tmp_path / "ckpt.pt")
    with pytest.raises(UserError, match=r"ckpt\.pt is not a nanoGPT checkpoint that can be read safely"):
        load_model(tmp_path / "ckpt.pt")
    assert not (tmp_path / "ran").exists()


def test_an_error_of_the_system_is_not_taken_for_a_damaged_nanogpt_checkpoint(tmp_path, monkeypatch):
    nanogpt_checkpoint(tmp_path / "ckpt.pt")

    def refused(*_, **__):
        raise PermissionError(13, "Permission denied", str(tmp_path / "ckpt.pt"))

    monkeypatch.setattr(torch, "load", refused)
    with pytest.raises(PermissionError):
        load_model(tmp_path / "ckpt.pt")


def test_block_size_crops_the_positions_and_adds_none_and_dropout_is_the_loaders_choice(saved):
    full, cropped = load_model(saved)[0], load_model(saved, block_size=10, dropout=0.3)[0]
    assert (full.config.dropout, cropped.config.dropout, cropped.config.block_size) == (0.0, 0.3, 10)
    assert cropped.transformer.wpe.weight.shape[0] == 10
    assert torch.allclose(logits(cropped, 10), logits(full, 10), atol=1e-6)
    for size in (25, 0):
        with pytest.raises(UserError, match=rf"block_size={size}: .* 24 positions"):
            load_model(saved, block_size=size)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "llama"}, "type llama, not a GPT-2"),
        ({"activation_function": "relu"}, "activation_function is relu"),
        ({"n_head": 3}, "does not describe a GPT-2"),
        ({"n_head": 0}, "does not describe a GPT-2"),
        ({"n_head": ...}, "n_head missing"),
        ({"n_layer": "two"}, "does not describe a GPT-2"),
        ({"n_layer": 10**9}, "does not describe a GPT-2"),  # before a model of that size is made
        ({"n_layer": 3}, "weights do not match"),
        ({"n_embd": 16}, "weights do not match"),
        ({"vocab_size": 5}, "the tokenizer has .* ids, the model 5"),
    ],
)
def test_a_config_that_is_not_this_gpt2s_is_one_clear_line(saved, changes, message):
    content = json.loads((saved / "config.json").read_text()) | changes
    content = {name: value for name, value in content.items() if value is not ...}  # that one is missing
    (saved / "config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message) as caught:
        load_model(saved)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("config.json", "contains no model"),
        ("model.safetensors", "has no weights in safetensors"),
        ("tokenizer.json", r"has no tokenizer\.json"),
    ],
)
@pytest.mark.parametrize("damage", ["missing", "empty", "truncated", "noise"])
def test_a_damaged_model_file_is_a_user_error(saved, name, missing, damage):
    path = saved / name
    content = path.read_bytes()
    path.write_bytes({"empty": b"", "truncated": content[: len(content) // 2], "noise": b"\xff" * 999}.get(damage, b""))
    if damage == "missing":
        path.unlink()
    message = f" {missing}" if damage == "missing" else f"/{name} is (missing or )?damaged"
    with pytest.raises(UserError, match=f"^{saved}{message}"):
        load_model(saved)


@pytest.mark.parametrize("name", ["nowhere/at/all", "n" * 300, "n" * 300 + ".pt"])
def test_a_name_of_nothing_is_a_user_error(tmp_path, name):
    with pytest.raises(UserError, match="no such file" if name.endswith(".pt") else "contains no model") as caught:
        load_model(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_of_the_folder_of_a_run_best_is_taken_or_last_or_nanogpts_file(tmp_path):
    tokenizer = of_kind("char")
    for name, seed in (("last", 1), ("best", 2)):
        model = make_model(tokenizer, seed=seed)
        (tmp_path / "run" / name).mkdir(parents=True)
        save_model(tmp_path / "run" / name, model, tokenizer)
        assert torch.equal(logits(load_model(tmp_path / "run")[0]), logits(model)), name
    nanogpt_checkpoint(tmp_path / "ckpt.pt")
    assert load_model(tmp_path)[1].same_as(gpt2()) and load_model(str(tmp_path))[0].config.vocab_size == 50257
    (tmp_path / "ckpt.pt").unlink()
    for path in tmp_path, tmp_path / "gpt2":  # a Path is never a name on the hub
        with pytest.raises(UserError, match="contains no model; train one first, or name the directory of one"):
            load_model(path)


def test_the_files_of_a_model_have_the_same_permissions(tiny_run):
    assert len({path.stat().st_mode for folder in ("best", "last") for path in (tiny_run / folder).iterdir()}) == 1


def test_links_are_followed(saved, tmp_path_factory):
    """As in the cache of the hub, or where the weights are on another disk."""
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    for path in list(saved.iterdir()):
        path.rename(elsewhere / path.name)
        path.symlink_to(elsewhere / path.name)
    load_model(saved)
    (elsewhere / "link").symlink_to(saved)
    load_model(elsewhere / "link")


def test_only_the_models_own_tensors_are_read(saved):
    """Another file in the directory changes nothing, even one that would load."""
    before = load_model(saved)[0]
    other = {name: tensor + 1 for name, tensor in load_file(saved / "model.safetensors").items()}
    save_file(other, saved / "zzz.safetensors")
    assert torch.equal(logits(load_model(saved)[0]), logits(before))


def test_biases_that_another_tool_has_trained_are_loaded(tmp_path):
    """A model without biases is saved with zeros for them; transformers trains these, and keeps `"bias": false`."""
    tokenizer = of_kind("char")
    save_model(tmp_path, make_model(tokenizer, bias=False), tokenizer)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["h.1.mlp.c_fc.bias"] += 1
    save_file(tensors, tmp_path / "model.safetensors")
    model, _ = load_model(tmp_path)
    assert model.config.bias and model.transformer.h[1].mlp.c_fc.bias.eq(1).all()
    assert model.transformer.ln_f.bias.eq(0).all()


MATRIX = "h.1.mlp.c_fc.weight"
NO_MATRIX = r"missing or damaged|size mismatch for .*mlp\.c_fc\.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda old: {"wpe.weight": old["wpe.weight"].index_fill(0, torch.tensor([0]), math.nan)}, "not finite"),
        (lambda old: {"wte.weight": old["wte.weight"].view(torch.int32)}, "not finite"),
        (lambda old: {"wte.weight": old["wte.weight"][:1].clone()}, "the embedding has 1 rows"),
        (lambda old: {"h.2.ln_1.weight": old["h.1.ln_1.weight"].clone()}, "weights do not match"),
        (lambda old: {MATRIX: old[MATRIX].flatten()}, NO_MATRIX),
        (lambda old: {MATRIX: old[MATRIX][None].clone()}, NO_MATRIX),
    ],
)
@pytest.mark.filterwarnings("error")
def test_tensors_that_are_not_this_models_are_refused(saved, change, message):
    tensors = load_file(saved / "model.safetensors")
    save_file(tensors | change(tensors), saved / "model.safetensors")
    with pytest.raises(UserError, match=message):
        load_model(saved)
