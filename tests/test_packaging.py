"""What gets installed: pyproject.toml, requirements.txt, and the Makefile's choice of torch."""

import os
import re
import shutil
import subprocess
import sys
from email.parser import Parser
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PYTHON = """#!/bin/sh
case "$*" in
  *"-m venv"*) mkdir -p .venv/bin; cp "$0" .venv/bin/python ;;
  *"config list"*) echo "$PIP_CONFIGURATION" ;;
  *"pip install"*) echo "$*" >> pip.log; case "$*" in *--index-url*) exit "$INDEX_STATUS" ;; esac ;;
esac
"""


def required(name: str) -> set[str]:
    lines = (ROOT / name).read_text("utf-8").splitlines()
    return {line.partition("#")[0].strip() for line in lines} - {""}


def normal(requirement: str) -> tuple[str, frozenset]:
    name, bounds = re.match(r"([\w-]+)(.*)", requirement).groups()
    return name.lower().replace("_", "-"), frozenset(bounds.replace(" ", "").split(","))


def test_the_project_needs_what_the_requirements_files_name(tmp_path):
    pytest.importorskip("setuptools", minversion="77")
    for name in ("pyproject.toml", "README.md", "LICENSE", "requirements.txt", "requirements-dev.txt", "model.py"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "plaingpt", tmp_path / "plaingpt")
    code = "from setuptools.build_meta import prepare_metadata_for_build_wheel as prepare; print(prepare('made'))"
    (tmp_path / "made").mkdir()
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True)
    (path,) = (tmp_path / "made").glob("*.dist-info/METADATA")
    found = Parser().parsestr(path.read_text("utf-8")).get_all("Requires-Dist")
    needed = {normal(line) for line in found if "extra ==" not in line}
    extra = {normal(line.partition(";")[0]) for line in found if 'extra == "dev"' in line}
    assert needed == {normal(line) for line in required("requirements.txt")}
    assert extra == {normal(line) for line in required("requirements-dev.txt")}


def test_every_package_of_the_library_is_in_the_project():
    packages = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "plaingpt").rglob("__init__.py")}
    listed = re.search(r"^packages = \[(.*)\]", (ROOT / "pyproject.toml").read_text("utf-8"), flags=re.M)[1]
    assert set(re.findall(r'"([\w.]+)"', listed)) == packages


@pytest.mark.skipif(not shutil.which("make") or sys.platform != "linux", reason="needs make on Linux")
@pytest.mark.skipif(any(Path("/dev").glob("nvidia*")) or bool(shutil.which("nvidia-smi")), reason="has an NVIDIA GPU")
@pytest.mark.parametrize(
    ("configuration", "index_status", "installed"),
    [
        ("", "0", ["torch for CPUs", "all"]),
        ("", "1", ["torch for CPUs", "all"]),  # the index cannot be reached
        ("global.index-url='https://mirror'", "0", ["all"]),
    ],
)
def test_without_an_nvidia_gpu_make_installs_torch_for_cpus_where_it_can(
    tmp_path, configuration, index_status, installed
):
    for name in ("Makefile", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "python").write_text(PYTHON)
    (tmp_path / "python").chmod(0o755)
    env = os.environ | {"PIP_CONFIGURATION": configuration, "INDEX_STATUS": index_status}
    command = ["make", "PYTHON=./python", ".venv/ready"]
    subprocess.run(command, cwd=tmp_path, env=env, check=True, capture_output=True)
    log = (tmp_path / "pip.log").read_text().splitlines()
    (torch,) = (line for line in required("requirements.txt") if line.startswith("torch") and "!=" in line)
    wanted = {
        "torch for CPUs": [f"whl/cpu --retries=1 {torch.partition(';')[0]}"],
        "all": ["--requirement=requirements.txt"],
    }
    assert len(log) == len(installed)
    assert all(word in line for line, name in zip(log, installed) for word in wanted[name])


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
def test_make_refuses_an_old_python_before_any_work(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "requirements.txt").touch()
    (tmp_path / "python").write_text(
        f'#!/bin/sh\nshift\nexec {sys.executable} -c "import sys; sys.version_info = (3, 10, 1); $*"\n'
    )
    (tmp_path / "python").chmod(0o755)
    command = ["make", "PYTHON=./python", "quickstart"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 2 and ended.stderr.startswith("plainGPT needs Python 3.11 to 3.14, but this is ")
    assert not (tmp_path / ".venv").exists()
