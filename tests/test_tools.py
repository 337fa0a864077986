"""Other tools read our models; each test is skipped if its tool is not installed:

pip install gguf llama-cpp-python lm_eval peft accelerate
"""

import json
import os

import pytest
import tokenizers
import torch
from conftest import run_main
from test_checkpoint import TEXT, make_model, of_kind, transformers_model
from test_model import random_model

from model import GPTConfig
from plaingpt.checkpoint import load_model, save_model


def test_a_gguf_file_that_cannot_be_written_is_one_line(tmp_path, tiny_run):
    pytest.importorskip("gguf")
    os.mkfifo(tmp_path / "pipe")
    for out in ("", tmp_path, tmp_path / "pipe", tmp_path / "none" / "model.gguf"):
        ended = run_main("tools.to_gguf", tiny_run / "best", f"--out={out}")
        assert (ended.status, ended.err.count("\n")) == (2, 1), ended.err
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"] and (tmp_path / "pipe").is_fifo()


def test_a_gguf_file_replaces_a_link_and_not_its_target(tmp_path, tiny_run):
    pytest.importorskip("gguf")
    (tmp_path / "precious").write_text("precious")
    for name in ("m.gguf", ".m.gguf.new"):
        (tmp_path / name).symlink_to(tmp_path / "precious")
    ended = run_main("tools.to_gguf", tiny_run / "best", f"--out={tmp_path}/m.gguf")
    assert ended.status == 0, ended.err
    assert (tmp_path / "precious").read_text() == "precious" and not (tmp_path / "m.gguf").is_symlink()


def test_a_gguf_file_has_a_token_for_each_row_of_its_embedding(tmp_path):
    gguf = pytest.importorskip("gguf")
    tokenizer = of_kind("bpe")
    tokenizer.save(tmp_path)
    transformers_model(tokenizer.vocab_size + 10).save_pretrained(tmp_path)
    ended = run_main("tools.to_gguf", tmp_path, f"--out={tmp_path}/m.gguf")
    assert ended.status == 0, ended.err
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    (rows,) = (tensor.shape[1] for tensor in reader.tensors if tensor.name == "token_embd.weight")
    assert len(tokens) == rows == tokenizer.vocab_size
    assert len(set(tokens)) == len(tokens) == len(reader.fields["tokenizer.ggml.token_type"].contents())


@pytest.mark.parametrize("kind", ["gpt2", "char", "byte", "bpe"])
def test_llama_cpp_writes_the_same_greedy_text_and_ids(tmp_path, kind):
    llama_cpp, _ = pytest.importorskip("llama_cpp"), pytest.importorskip("gguf")
    tokenizer = of_kind(kind)
    text = TEXT
    if kind == "char":  # llama.cpp has no tokenizer for characters, but ASCII characters are bytes
        text = TEXT.encode("ascii", "ignore").decode()
        from plaingpt.tokenizer import make_tokenizer

        tokenizer = make_tokenizer("char", [text], 0)
    config = GPTConfig(64, tokenizer.vocab_size, n_layer=2, n_head=2, n_embd=64, bias=kind != "byte")
    model = random_model(config, std=0.1)
    (tmp_path / "model").mkdir()
    save_model(tmp_path / "model", model, tokenizer)
    ended = run_main("tools.to_gguf", tmp_path / "model", f"--out={tmp_path}/m.gguf", "--dtype=float32")
    assert ended.status == 0, ended.err
    theirs = llama_cpp.Llama(str(tmp_path / "m.gguf"), n_ctx=64, n_threads=1, verbose=False)
    assert theirs.tokenize(text.encode(), add_bos=False, special=False) == tokenizer.encode(text)
    assert theirs.token_eos() == tokenizer.end_of_text
    prompt = tokenizer.encode(text)[:10]
    ours, found = list(model.generate(prompt, 30, temperature=0)), []
    for token in theirs.generate(prompt, temp=0.0, repeat_penalty=1.0):
        found.append(token)
        if len(found) == 30:
            break
    assert found == ours
    assert theirs.detokenize(found).decode(errors="replace") == tokenizer.decode(found)


def test_a_tokenizer_of_other_characters_is_refused_for_llama_cpp(tmp_path):
    pytest.importorskip("gguf")
    save_model(tmp_path, make_model(of_kind("char")), of_kind("char"))
    ended = run_main("tools.to_gguf", tmp_path, f"--out={tmp_path}/m.gguf")
    assert ended.status == 2 and "llama.cpp has no tokenizer for characters other than ASCII" in ended.err
    assert not list(tmp_path.glob("m.gguf*"))


def test_a_tokenizer_that_splits_texts_in_its_own_way_is_refused_for_llama_cpp(tmp_path):
    pytest.importorskip("gguf")
    save_model(tmp_path, make_model(of_kind("bpe")), of_kind("bpe"))
    backend = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    backend.normalizer = tokenizers.normalizers.Lowercase()
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "SHA256SUMS").unlink(missing_ok=True)
    ended = run_main("tools.to_gguf", tmp_path, f"--out={tmp_path}/m.gguf")
    assert ended.status == 2 and "neither GPT-2's nor plainGPT's" in ended.err
    assert not list(tmp_path.glob("m.gguf*"))


@pytest.mark.parametrize(
    ("flag", "words"), [("--dtype=int8", "n_embd=8"), ("--out=nowhere/m.gguf", "m.gguf: No such file")]
)
def test_what_gguf_cannot_be_made_is_a_user_error(tmp_path, flag, words):
    pytest.importorskip("gguf")
    save_model(tmp_path, make_model(of_kind("byte")), of_kind("byte"))
    ended = run_main("tools.to_gguf", tmp_path, f"--out={tmp_path}/m.gguf", flag)
    assert ended.status == 2 and words in ended.err
    assert not list(tmp_path.glob("m.gguf*"))


TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
"""
ROLLING = """
output_type: loglikelihood_rolling
doc_to_text: ''
doc_to_target: '{{text}}'
metric_list: [{metric: bits_per_byte}]
"""
CHOICE = """
output_type: multiple_choice
doc_to_text: '{{start}}'
target_delimiter: ''
doc_to_choice: '{{ends}}'
doc_to_target: '{{right}}'
metric_list: [{metric: acc}]
"""


def test_the_evaluation_harness_finds_the_bits_per_byte_and_choices_that_we_find(tmp_path, tiny_run, data_dir):
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    text = "a road and the sea, dust"[:14]
    (tmp_path / "text.txt").write_text(text)
    (tmp_path / "rolling.jsonl").write_text(json.dumps({"text": text}) + "\n")
    lines = [
        {"start": "a ro", "ends": ["ad", "dd"], "right": 0},
        {"start": "stone ", "ends": ["nnn", "and"], "right": 1},
    ]
    (tmp_path / "choice.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, more in {"rolling": ROLLING, "choice": CHOICE}.items():
        (tmp_path / f"{name}.yaml").write_text(TASK.format(name=name, data=tmp_path / f"{name}.jsonl") + more)
    found = lm_eval.simple_evaluate(
        "hf", model_args=f"pretrained={tiny_run / 'best'},dtype=float32", tasks=["rolling", "choice"], device="cpu",
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False), bootstrap_iters=0,
    )["results"]  # fmt: skip
    model, tokenizer = load_model(tiny_run / "best")

    def log_probability(start: str, end: str) -> float:
        ids = torch.tensor(tokenizer.encode(start + end))
        with torch.no_grad():
            of_each = model(ids[None, :-1])[0].log_softmax(-1)[0].gather(1, ids[1:, None])
        return of_each[len(start) - 1 :].sum().item()

    right = [max((0, 1), key=lambda i, x=x: log_probability(x["start"], x["ends"][i])) == x["right"] for x in lines]
    assert found["choice"]["acc,none"] == sum(right) / len(right)


def test_lora_learns_by_peft_and_comes_back_as_a_model(tmp_path, tiny_run, data_dir, train):
    """What docs/finetuning.md shows, on a tiny model."""
    pytest.importorskip("peft")
    from conftest import ROOT

    code = (ROOT / "docs" / "finetuning.md").read_text("utf-8").split("```python\n")[1].split("```")[0]
    names = {"out-quickstart/best": tiny_run / "best", "data/python": data_dir / "tiny", "out-lora": tmp_path / "lora"}
    for shown, here in names.items():
        assert shown in code
        code = code.replace(shown, str(here))
    before = train(tmp_path / "none", eval_only=True, eval_iters=0, init_from=tiny_run / "best").err
    exec(compile(code, "docs/finetuning.md", "exec"), {})
    after = train(tmp_path / "none", eval_only=True, eval_iters=0, init_from=tmp_path / "lora").err
    loss = [float(printed.split("val_loss ")[1].split(",")[0]) for printed in (before, after)]
    assert loss[1] < loss[0]
