import io
import subprocess
import sys

import pytest
from conftest import ROOT, child_environment, flags, made_text, run_main

from checkpoint import load_model

LINE = "\n---------------\n"


def sample(out_dir, status=0, stdin="", **changes) -> str:
    settings = dict(out_dir=out_dir, start="the sea", max_new_tokens=20, device="cpu", dtype="float32")
    ended = run_main("sample", *flags(**(settings | changes)), stdin=stdin)
    assert ended.status == status, ended.err
    return ended.err if status else ended.out


def likeliest(out_dir, prompt: str, count: int) -> str:
    model, tokenizer = load_model(out_dir / "best")
    return tokenizer.decode(model.generate(tokenizer.encode(prompt), count, 0, end_of_text=tokenizer.end_of_text))


@pytest.fixture(scope="module")
def learned(tmp_path_factory, train):
    """A run long enough that its text is not always the same."""
    out_dir = tmp_path_factory.mktemp("runs") / "learned"
    train(out_dir, max_iters=60, eval_interval=60, log_interval=60)
    return out_dir


@pytest.mark.parametrize("prompt", ["a road", "the sea, and the stone " * 5])
def test_temperature_zero_writes_the_likeliest_text(learned, prompt):
    text = sample(learned, start=prompt, temperature=0)
    assert text == prompt + likeliest(learned, prompt, 20) + "\n"
    assert sample(learned, start=prompt, temperature=0, seed=5, top_p=0.3, top_k=2) == text


def test_a_seed_names_a_text(learned):
    assert sample(learned, seed=1) == sample(learned, seed=1) != sample(learned, seed=2)


def test_top_k_one_and_top_p_zero_are_the_likeliest(learned):
    expected = sample(learned, temperature=0)
    assert sample(learned, temperature=5, top_k=1) == expected
    assert sample(learned, temperature=5, top_k=0, top_p=0) == expected
    assert sample(learned, temperature=5, top_k=0) != expected


def test_samples_stand_apart(learned):
    texts = sample(learned, num_samples=3).removesuffix("\n").split(LINE)
    assert len(set(texts)) == 3
    assert texts[0] == sample(learned).removesuffix("\n")


def test_standard_output_is_only_the_text(learned):
    """As a process of its own: what a shell sees."""
    command = [sys.executable, ROOT / "sample.py", *flags(out_dir=learned, start="a ", max_new_tokens=20, device="cpu")]
    ended = subprocess.run(command, env=child_environment(), capture_output=True, check=False)
    assert ended.returncode == 0, ended.stderr
    text = ended.stdout.decode()
    assert set(text.removesuffix("\n")) <= set(made_text(4000))
    assert len(text) == len("a ") + 20 + 1


def test_a_prompt_from_a_file_and_from_standard_input(learned, tmp_path):
    expected = sample(learned, start="and the sea")
    (tmp_path / "prompt.txt").write_text("and the sea")
    assert sample(learned, start=f"FILE:{tmp_path / 'prompt.txt'}") == expected
    assert sample(learned, start="-", stdin="and the sea") == expected


def test_no_prompt_starts_from_nothing(learned):
    text = sample(learned, start="", max_new_tokens=30)
    assert text.endswith("\n")
    assert "endoftext" not in text


def test_a_prompt_file_that_is_missing_is_one_line_and_status_2(learned, tmp_path):
    error = sample(learned, status=2, start=f"FILE:{tmp_path / 'nothing.txt'}")
    assert "nothing.txt" in error
    assert error.count("\n") == 1


def test_an_unknown_character_is_one_line_and_status_2(learned):
    error = sample(learned, status=2, start="the Ω")
    assert error.startswith("sample.py: ")
    assert "Ω" in error
    assert error.count("\n") == 1


def test_a_folder_without_a_model_is_one_line_and_status_2(tmp_path):
    error = sample(tmp_path / "none", status=2)
    assert error.startswith(f"sample.py: {tmp_path / 'none'} has no model")
    assert error.count("\n") == 1


def test_out_dir_may_be_a_model_directory_and_init_from_names_one(learned):
    expected = sample(learned)
    assert sample(learned / "best") == expected
    assert sample("nowhere", init_from=learned / "best") == expected


def test_last_is_used_where_there_is_no_best(learned, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "last").symlink_to(learned / "last")
    assert sample(tmp_path / "run") == sample(learned)


@pytest.fixture(scope="module")
def emoji(tmp_path_factory, train):
    """A byte model that knows "🙂🎈ß " by heart."""
    out_dir = tmp_path_factory.mktemp("runs") / "emoji"
    train(out_dir, dataset="bytes", max_iters=200, eval_interval=200, log_interval=200, n_embd=32, warmup_iters=5)
    return out_dir


def test_characters_of_several_bytes_come_whole(emoji, monkeypatch):
    written = []

    class Output(io.TextIOWrapper):
        def write(self, text):
            written.append(text)
            return super().write(text)

    monkeypatch.setattr(io, "TextIOWrapper", Output)  # what run_main gives the script as its output
    text = sample(emoji, start="🙂", temperature=0, max_new_tokens=40)
    assert text == "🙂🎈ß " * 4 + "\n"
    assert "🎈" in written
    assert not any("\ufffd" in piece for piece in written)
