import contextlib
import io
import itertools
import json
import subprocess
import sys
import weakref
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, child_environment, flags, made_text, run_main
from hypothesis import given, settings
from hypothesis import strategies as st
from test_checkpoint import make_model

import sample as script
from plaingpt.batches import derive_seed
from plaingpt.checkpoint import load_model, save_model
from plaingpt.generate import Decoder
from plaingpt.tokenizer import make_tokenizer
from sample import Sample, SampleConfig

LINE = "\n---------------\n"


def sample(out_dir, status=0, stdin="", **changes) -> str:
    values = dict(out_dir=out_dir, max_new_tokens=20, device="cpu", dtype="float32")
    if not {"start", "prompts", "interactive"} & set(changes):
        values["start"] = "the sea"
    ended = run_main("sample", *flags(**(values | changes)), stdin=stdin)
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


def test_only_one_batch_has_memory_for_its_cache_at_a_time(learned, monkeypatch):
    alive, counts = weakref.WeakSet(), []

    class Counted(script.Batch):
        def __init__(self, *arguments):
            alive.add(self)
            counts.append(len(alive))
            super().__init__(*arguments)

    monkeypatch.setattr(script, "Batch", Counted)
    sample(learned, num_samples=3, batch_size=1)
    assert counts == [1, 1, 1]


def test_a_seed_names_a_text(learned):
    assert sample(learned, seed=1) == sample(learned, seed=1) != sample(learned, seed=2)


def test_settings_that_leave_one_token_take_the_likeliest(learned):
    expected = sample(learned, temperature=0)
    assert sample(learned, temperature=1e-46) == expected  # float32 cannot divide by that
    assert sample(learned, temperature=5, top_k=1) == expected
    assert sample(learned, temperature=5, top_k=0, top_p=0) == expected
    assert sample(learned, temperature=5, top_k=0, min_p=1) == expected
    assert sample(learned, temperature=5, top_k=0) != expected


def test_samples_stand_apart(learned):
    texts = sample(learned, num_samples=3).removesuffix("\n").split(LINE)
    assert len(set(texts)) == 3
    assert texts[0] == sample(learned).removesuffix("\n")


def test_standard_output_is_only_the_text(learned):
    """As a process of its own: what a shell sees."""
    # Importing torch's compiler, data sets and pictures takes longer than a small model takes to write
    code = """if True:
        import sys
        sys.path.insert(0, sys.argv.pop(1))
        import sample
        sample.main()
        unneeded = {"torch._dynamo", "datasets", "matplotlib", "huggingface_hub"} & set(sys.modules)
        sys.exit(" ".join(unneeded) or 0)
    """
    changes = flags(out_dir=learned, start="a ", max_new_tokens=20, device="cpu")
    command = [sys.executable, "-c", code, ROOT, *changes]
    ended = subprocess.run(command, env=child_environment(), capture_output=True, check=False)
    assert ended.returncode == 0, ended.stderr
    text = ended.stdout.decode()
    assert set(text.removesuffix("\n")) <= set(made_text(4000))
    assert len(text) == len("a ") + 20 + 1


def test_a_prompt_from_a_file_and_from_standard_input(learned, tmp_path, monkeypatch):
    expected = sample(learned, start="and the sea")
    (tmp_path / "prompt.txt").write_text("and the sea")
    assert sample(learned, start=f"FILE:{tmp_path / 'prompt.txt'}") == expected
    monkeypatch.setenv("HOME", str(tmp_path))
    assert sample(learned, start="FILE:~/prompt.txt") == expected
    assert sample(learned, start="-", stdin="and the sea") == expected
    (tmp_path / "prompt.txt").write_bytes(b"the sea\r\n")  # as on Windows
    assert sample(learned, start=f"FILE:{tmp_path}/prompt.txt") == sample(learned, start="the sea\n")


def test_no_prompt_starts_from_nothing(learned):
    text = sample(learned, start="", max_new_tokens=30)
    assert text.endswith("\n")
    assert "endoftext" not in text


def test_a_folder_without_a_model_is_one_line_and_status_2(tmp_path):
    error = sample(tmp_path / "none", status=2)
    assert error.startswith(f"sample.py: {tmp_path / 'none'} contains no model")
    assert error.count("\n") == 1


def test_out_dir_may_be_a_model_directory_and_init_from_names_one(learned):
    expected = sample(learned)
    assert sample(learned / "best") == expected
    assert sample("nowhere", init_from=learned / "best") == expected


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


def records(out_dir, **changes) -> list[dict]:
    return [json.loads(line) for line in sample(out_dir, output="jsonl", **changes).splitlines()]


def test_jsonl_says_what_the_text_output_shows(learned):
    found = records(learned, num_samples=3)
    texts = sample(learned, num_samples=3).removesuffix("\n").split(LINE)
    assert [record["prompt"] + record["text"] for record in found] == texts
    for record in found:
        assert list(record) == ["prompt", "text", "tokens", "stop_reason"]
        assert record["prompt"] == "the sea"
        assert record["tokens"] == len(record["text"])
        assert record["stop_reason"] == ("length" if record["tokens"] == 20 else "end_of_text")


def test_prompts_of_a_file_are_written_in_batches_in_their_order(learned, tmp_path):
    prompts = ["the sea", "a road, ", "east", "dust and stone " * 3, "n"]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts) + "\n")
    found = records(learned, prompts=tmp_path / "prompts.txt", num_samples=2, batch_size=3)
    assert [record["prompt"] for record in found] == [prompt for prompt in prompts for _ in range(2)]
    assert len({record["text"] for record in found}) > 5
    assert found[0]["text"] == records(learned)[0]["text"]
    for batch_size in (1, 64):
        assert records(learned, prompts=tmp_path / "prompts.txt", num_samples=2, batch_size=batch_size) == found


def test_a_line_of_a_file_of_prompts_or_typed_is_text_and_names_no_file(emoji, tmp_path):
    (tmp_path / "prompts.txt").write_text("FILE:nothing.txt\n-\n")
    found = records(emoji, prompts=tmp_path / "prompts.txt")
    assert [record["prompt"] for record in found] == ["FILE:nothing.txt", "-"]
    assert sample(emoji, interactive=True, stdin="-\n🙂\n").startswith("-")


def test_a_file_without_prompts_is_one_line_and_status_2(learned, tmp_path):
    (tmp_path / "empty.txt").write_text("\n\n")
    assert "empty.txt contains no prompt" in sample(learned, status=2, prompts=tmp_path / "empty.txt")


def test_a_prompt_beside_prompts_is_refused_in_one_line(learned, tmp_path):
    (tmp_path / "prompts.txt").write_text("the sea\n")
    error = sample(learned, status=2, start="", prompts=tmp_path / "prompts.txt")
    assert error == "sample.py: --start and --prompts cannot be combined: give one of them\n"
    assert sample(learned, start="east", interactive=False) == sample(learned, start="east")


def test_a_text_ends_before_a_stop_string_that_spans_several_tokens(learned):
    text = sample(learned, max_new_tokens=60).removeprefix("the sea").removesuffix("\n")
    stop, later = text[20:25], text[40:44]  # a token of this model is a character
    (record,) = records(learned, max_new_tokens=60, stop=f"{later}|{stop.replace(chr(10), chr(92) + 'n')}")
    end = min(text.index(stop), text.index(later))
    assert record["text"] == text[:end]
    assert record["stop_reason"] == "stop"
    assert record["tokens"] in (end + len(stop), end + len(later))
    assert sample(learned, max_new_tokens=60, stop=stop) == "the sea" + text[: text.index(stop)] + "\n"
    assert records(learned, max_new_tokens=60, stop="Ω")[0]["text"] == text


def test_a_stop_string_in_the_prompt_does_not_count(learned):
    assert records(learned, start="the sea", stop="the sea")[0]["tokens"] > 0
    assert sample(learned, stop="the sea").startswith("the sea")


def shown(pieces: list[str], stops: list[str]) -> list[str]:
    """What each token of a sample makes visible, if each adds a piece of text."""
    tokenizer = SimpleNamespace(end_of_text=None, decode=lambda ids: "")
    sample = Sample([], tokenizer, SampleConfig(stop="|".join(stops), max_new_tokens=max(1, len(pieces))))
    sample.stream = SimpleNamespace(add=pieces.__getitem__, rest=str)
    ends = [0]
    for i in range(len(pieces)):
        if not sample.stop_reason:
            sample.add(i)
            ends.append(sample.final)
    return [sample.text[start:end] for start, end in itertools.pairwise(ends)]


def test_a_text_may_end_inside_a_character():
    tokenizer = make_tokenizer("byte", [], 0)
    for changes, text, reason in ({}, "a\ufffd", "length"), ({"stop": "\ufffd"}, "a", "stop"):
        ended = Sample([], tokenizer, SampleConfig(max_new_tokens=2, **changes))
        for token in b"a\xf0":
            ended.add(token)
        assert (ended.text, ended.stop_reason) == (text, reason)


@settings(max_examples=200)
@given(st.lists(st.text("ab\n", max_size=4)), st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3))
def test_stop_strings_are_found_across_pieces_and_nothing_else_is_held_back(pieces, stops):
    text = "".join(pieces)
    ends = [(end, len(stop)) for end in range(len(text) + 1) for stop in stops if text[:end].endswith(stop)]
    first = min((end for end, _ in ends), default=None)
    expected = text if first is None else text[: first - max(length for end, length in ends if end == first)]
    assert "".join(shown(pieces, stops)) == expected
    if not stops:
        assert shown(pieces, stops) == pieces


def test_interactive_answers_line_by_line(learned):
    ended = run_main(
        "sample",
        *flags(out_dir=learned, interactive=True, max_new_tokens=20, device="cpu", dtype="float32"),
        stdin="the sea\na Ω\neast\n",
    )
    assert ended.status == 0
    assert ended.out.startswith(sample(learned))
    assert ended.out[len(sample(learned)) :].startswith("east")
    assert ended.err.count("> ") == 4
    assert "Ω" in ended.err  # printed, and asked again


def test_a_setting_can_be_changed_in_interactive_mode(learned):
    stdin = "the sea\n/temperature 0\nthe sea\n/max_new_tokens=2\nthe sea\n/temprature 1\n/top_k -1\n/dtype float32\n"
    arguments = [f"--out_dir={learned}", "--max_new_tokens=20", "--device=cpu", "--dtype=float32", "--interactive"]
    ended = run_main("sample", *arguments, stdin=stdin)
    assert ended.status == 0, ended.err
    drawn, likely, short = ended.out.splitlines()[:3]
    expected = likeliest(learned, "the sea", 20)
    assert (likely, short) == ("the sea" + expected, "the sea" + expected[:2]) and drawn != likely
    assert "/temprature cannot be changed here; these settings can: temperature, top_k" in ended.err
    assert "--top_k must be int (at least 0), not -1" in ended.err
    assert "/dtype cannot be changed here; these settings can: temperature, " in ended.err


def test_a_prompt_may_begin_with_a_slash(tiny_run):
    arguments = [f"--out_dir={tiny_run}", "--max_new_tokens=2", "--device=cpu", "--interactive"]
    ended = run_main("sample", *arguments, stdin="/ a\n//a b\n/a/b\n/n b\n")
    assert ended.err.count("the tokenizer does not know ") == 3  # of this model: they were taken for prompts
    assert ended.status == 0 and "/n cannot be changed here" in ended.err


def test_interactive_gives_as_many_samples_as_asked_for(learned):
    arguments = [f"--out_dir={learned}", "--max_new_tokens=20", "--device=cpu", "--temperature=2", "--num_samples=2"]
    expected = run_main("sample", *arguments, "--start=the sea").out
    ended = run_main("sample", *arguments, "--interactive", stdin="the sea\n/num_samples 1\n/seed 1337\nthe sea\n")
    assert ended.out == expected + expected.partition("\n---")[0] + "\n"


def test_interactive_makes_as_many_samples_at_once_as_allowed(learned, monkeypatch):
    seeds = []

    class Recorded(script.Batch):
        def __init__(self, decoder, prompts, max_new_tokens, sampling, generators):
            super().__init__(decoder, prompts, max_new_tokens, sampling, generators)
            seeds.append([generator.initial_seed() for generator in generators])

    monkeypatch.setattr(script, "Batch", Recorded)
    arguments = [f"--out_dir={learned}", "--max_new_tokens=2", "--device=cpu", "--num_samples=3", "--batch_size=2"]
    ended = run_main("sample", *arguments, "--interactive", stdin="the sea\neast\n")
    numbers = [[0, 1], [2], [3, 4], [5]]
    assert seeds == [[derive_seed(1337, number) for number in batch] for batch in numbers]
    assert ended.out.count("the sea") == 3


def test_a_model_of_text_without_line_breaks_begins_without_one(tmp_path):
    tokenizer = make_tokenizer("char", ["emma", "olivia"], 0)
    (tmp_path / "model").mkdir()
    save_model(tmp_path / "model", make_model(tokenizer), tokenizer)
    arguments = [f"--out_dir={tmp_path / 'model'}", "--device=cpu", "--max_new_tokens=5"]
    assert run_main("sample", *arguments).status == 0
    ended = run_main("sample", *arguments, "--start=\n")
    assert ended.status == 2 and "the tokenizer does not know '\\n'" in ended.err and ended.err.count("\n") == 1


def test_a_seed_given_again_gives_the_same_text_again(learned):
    stdin = "the sea\nthe sea\n/nothing\n/seed 1337\nthe sea\n"
    arguments = [f"--out_dir={learned}", "--max_new_tokens=20", "--device=cpu", "--temperature=2", "--interactive"]
    _, first, second, again = run_main("sample", *arguments, stdin=stdin).out.split("the sea")
    assert first == again != second


def test_a_text_that_ends_at_once_is_explained(learned):
    arguments = [f"--out_dir={learned}", "--num_samples=100", "--max_new_tokens=1", "--temperature=9", "--top_k=0"]
    lines = run_main("sample", *arguments, "--start=a", "--device=cpu", "--output=jsonl").out.splitlines()
    ended = run_main("sample", *arguments, "--start=a", "--device=cpu")
    empty = [i for i, line in enumerate(lines, 1) if json.loads(line)["tokens"] == 0]
    notes = [f"sample {i} is empty: its first token is the end of text" for i in empty]
    assert empty and notes == [line for line in ended.err.splitlines() if "is empty" in line]


def test_bytes_that_are_no_text_do_not_end_interactive_mode(learned):
    command = [sys.executable, str(ROOT / "sample.py"), f"--out_dir={learned}", "--max_new_tokens=2", "--interactive"]
    ended = subprocess.run([*command, "--device=cpu"], input=b"the sea\nthe \xff\nthe sea\n", capture_output=True)
    assert ended.returncode == 0 and b"Traceback" not in ended.stderr
    assert ended.stdout.count(b"the sea") == 2


@pytest.mark.parametrize("prompt", ["--prompts=missing.txt", "--start=FILE:missing.txt"])
def test_a_prompt_that_cannot_be_read_is_reported_before_a_model_is_looked_for(prompt):
    ended = run_main("sample", "--init_from=no/such-model", prompt)
    assert (ended.status, ended.err) == (2, "sample.py: missing.txt: No such file or directory\n")


def test_only_a_line_feed_ends_a_prompt_in_a_file(emoji, tmp_path):
    text = "the sea\u2028and\x85rain\x0cor dust"
    (tmp_path / "prompts.txt").write_bytes(f"{text}\r\na road\n".encode())
    lines = sample(emoji, output="jsonl", prompts=tmp_path / "prompts.txt").split("\n")
    assert [json.loads(line)["prompt"] for line in lines if line] == [text, "a road"]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("output", "expected"),
    [("text", r"\x1b[31mred \u202e"), ("jsonl", r'{"prompt": "\u001b[31mred \u202e", ')],
)
def test_a_terminal_gets_no_escape_codes(emoji, output, expected):
    model, tokenizer = load_model(emoji / "best")
    config, prompt = SampleConfig(max_new_tokens=1, output=output), tokenizer.encode("\x1b[31mred \u202e")
    with contextlib.redirect_stdout(Terminal()) as terminal:
        script.write_all(Decoder(model, torch.float32), tokenizer, config, [prompt])
    printed = terminal.getvalue()
    assert printed.startswith(expected) and printed.replace("\n", "").isprintable()


def test_several_processes_are_refused(learned, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    ended = run_main("sample", f"--out_dir={learned}")
    assert (ended.status, ended.out) == (2, "")
    assert "sample.py runs as one process, without torchrun or WORLD_SIZE" in ended.err
