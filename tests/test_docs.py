"""README and docs/: links lead somewhere, and commands and Python code work with the code as it is."""

import dataclasses
import importlib
import re
import shlex
import subprocess

import pytest
from conftest import ROOT

from plaingpt.settings import load_settings

PAGES = [ROOT / name for name in subprocess.check_output(["git", "ls-files", "*.md"], cwd=ROOT, text=True).split()]
COMMAND = re.compile(r"\b(?:python|torchrun .*?) ((?:train|sample|prepare_data|tools/\w+)\.py)(?: (.*))?")
FENCED = re.compile(r"^```(\w*)\n(.*?)^```", flags=re.M | re.S)


def commands() -> list[tuple[str, str]]:
    """(script, arguments) of each command in a code block or in inline code, without those that have placeholders."""
    lines = []
    for page in PAGES:
        text = page.read_text("utf-8").replace("\\\n", " ")
        lines += [line for language, block in FENCED.findall(text) if not language for line in block.splitlines()]
        lines += [code.replace("\n", " ") for code in re.findall(r"`([^`]+)`", FENCED.sub("", text))]
    lines = [re.split(r"\s#|'$", line.strip())[0].replace("RECIPE", "config/quickstart.py") for line in lines]
    found = [match.groups("") for line in lines if (match := COMMAND.search(line))]
    return sorted({pair for pair in found if not re.search(r"PATH|FILE\b(?!:)|\bN\b|…|\$|\[|--help", pair[1])})


def test_links_lead_somewhere():
    broken = []
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text("utf-8")):
            if "://" not in target and not (page.parent / target).exists():
                broken.append(f"{page.relative_to(ROOT)}: {target}")
    assert not broken


def test_commands_are_found():
    scripts = [script for script, _ in commands()]
    assert {"train.py", "sample.py", "prepare_data.py", "tools/to_gguf.py"} <= {*scripts} and len(scripts) > 30


@pytest.mark.parametrize(("script", "arguments"), commands(), ids=[" ".join(pair) for pair in commands()])
def test_the_settings_of_a_command_are_accepted(monkeypatch, script, arguments):
    monkeypatch.chdir(ROOT)
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    classes = [value for value in vars(module).values() if dataclasses.is_dataclass(value)]
    (config,) = (value for value in classes if value.__name__.endswith("Config") and value.__name__ != "GPTConfig")
    lists = [
        field.name
        for field in dataclasses.fields(config)
        if field.name in ("sources", "models", "out_dirs", "data_sets")
    ]
    load_settings(config, shlex.split(arguments), positional=lists[0] if lists else "recipes")


@pytest.mark.parametrize(("page", "model"), [("README.md", "out-quickstart"), ("docs/model.md", "out-shakespeare-cpu")])
def test_the_python_code_of_a_page_runs(tmp_path, monkeypatch, train, page, model):
    train(tmp_path / model, dataset="bytes")
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.chdir(tmp_path)
    blocks = [code for language, code in FENCED.findall((ROOT / page).read_text("utf-8")) if language == "python"]
    for code in [code for code in blocks if "import" in code]:
        exec(compile(code, page, "exec"), {})
