"""What happens before a script's imports: an old Python, a missing package, Ctrl-C."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


@pytest.fixture
def script(tmp_path):
    """Write train.py of a project that has nothing but startup.py."""
    (tmp_path / "plaingpt").mkdir()
    shutil.copy(ROOT / "plaingpt" / "startup.py", tmp_path / "plaingpt")

    def write(text: str) -> Path:
        (tmp_path / "train.py").write_text(text)
        return tmp_path / "train.py"

    return write


def run(*command):
    return subprocess.run(list(map(str, command)), env=ENVIRONMENT, capture_output=True, text=True, timeout=600)


def test_an_old_python_is_one_line(script):
    ended = run(sys.executable, script("import sys\nsys.version_info = (3, 10, 1)\nimport plaingpt.startup\nprint(1)"))
    version = sys.version.split()[0]
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == f"train.py: needs Python 3.11 or later, but this is {version}\n"


def test_the_garbage_collector_rests_only_during_imports(script, tmp_path):
    shutil.copy(ROOT / "plaingpt" / "console.py", tmp_path / "plaingpt")
    path = script(
        "import plaingpt.startup, gc\nfrom plaingpt.console import run_script\n"
        "print(gc.isenabled())\nrun_script(lambda: print(gc.isenabled()))"
    )
    assert run(sys.executable, path).stdout == "False\nTrue\n"


def test_threads_spin_for_a_short_time_unless_the_user_decides_otherwise(script, monkeypatch):
    path = script("import plaingpt.startup, os\nprint(os.environ['GOMP_SPINCOUNT'])")
    monkeypatch.delitem(ENVIRONMENT, "GOMP_SPINCOUNT", raising=False)
    assert run(sys.executable, path).stdout == "1000\n"
    monkeypatch.setitem(ENVIRONMENT, "GOMP_SPINCOUNT", "77")
    assert run(sys.executable, path).stdout == "77\n"


@pytest.mark.parametrize("closed", ["--start=- <&-", "--start=a >&-"])
def test_closed_streams_end_no_script(tiny_run, closed):
    command = f"{sys.executable} {ROOT}/sample.py --out_dir={tiny_run} --max_new_tokens=2 --device=cpu {closed}"
    ended = subprocess.run(command, shell=True, env=ENVIRONMENT, capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (0, ""), ended.stderr


def test_without_standard_error_nothing_is_printed_elsewhere(tmp_path):
    (tmp_path / "a.txt").write_text("some text " * 100)
    flags = f"{tmp_path}/a.txt --data_dir={tmp_path} --name=x --tokenizer=byte"
    command = f"{sys.executable} {ROOT}/prepare_data.py {flags} 2>&-"
    ended = subprocess.run(command, shell=True, env=ENVIRONMENT, capture_output=True, text=True)
    assert (ended.returncode, ended.stdout) == (0, "") and (tmp_path / "x" / "meta.json").exists()


TOOLS = [f"tools/{path.name}" for path in (ROOT / "tools").glob("*.py")]


@pytest.mark.parametrize("name", ["train.py", "sample.py", "prepare_data.py", *TOOLS])
def test_a_missing_package_is_one_line_with_the_remedy(name):
    ended = run(sys.executable, "-S", ROOT / name)  # -S: without site-packages
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1), ended.stderr
    assert " is not installed; run " in ended.stderr or " -m pip install -r " in ended.stderr


def test_the_environment_of_the_project_is_suggested_where_there_is_one(script, tmp_path):
    path = script("import plaingpt.startup\nimport no_such_package")
    assert "no_such_package is not installed; " + sys.executable in run(sys.executable, path).stderr
    python = tmp_path / ".venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    python.parent.mkdir(parents=True)
    python.touch()
    assert f"is not installed; run {os.path.relpath(python)} {path}\n" in run(sys.executable, path).stderr


def test_another_error_of_an_import_has_its_traceback(script):
    path = script("import plaingpt.startup\nraise ModuleNotFoundError('a plugin')")
    assert run(sys.executable, path).stderr.count("Traceback") == 1
    ended = run(sys.executable, script("import plaingpt.startup\nimport plaingpt.nothing"))
    assert ended.returncode == 1 and "Traceback" in ended.stderr


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_ctrl_c_during_imports_ends_the_process_though_something_catches_the_exception(script):
    path = script(
        "import plaingpt.startup, time\nprint(1, flush=True)\n"
        "while True:\n    try:\n        time.sleep(60)\n    except BaseException:\n        pass\n"
    )
    process = subprocess.Popen(
        [sys.executable, path], env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "1\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=600) == ("", "") and process.returncode == -signal.SIGINT


def test_a_script_imported_as_a_module_leaves_the_process_as_it_is(tmp_path):
    code = "import gc, signal, sys, sample\nassert sys.excepthook is sys.__excepthook__ and gc.isenabled()\n"
    code += "assert signal.getsignal(signal.SIGINT) is signal.default_int_handler"
    environment = ENVIRONMENT | {"PYTHONPATH": str(ROOT)}
    docs = ROOT / "docs"  # or another subdirectory, where a notebook may be
    assert subprocess.run([sys.executable, "-c", code], cwd=docs, env=environment).returncode == 0
    for name in ("plaingpt", "model.py", "sample.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "mine.py").write_text(code)  # beside sample.py
    assert subprocess.run([sys.executable, tmp_path / "mine.py"], env=ENVIRONMENT).returncode == 0
