"""Imported first by every script, before the imports that take seconds.

A Python that is too old, or a package that is missing, is reported in one line with the remedy. Ctrl-C ends the process
at once.
"""

import gc
import logging
import os
import signal
import sys
import time

for name, mode in ("stdin", "r"), ("stdout", "w"), ("stderr", "w"):
    if getattr(sys, name) is None:  # closed: the next file that is opened would take its place
        setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115
STARTED = time.monotonic()  # train.py --minutes counts from here
# While torch's CPU threads wait for each other, they spin at most this many times before they sleep. OpenMP's default,
# 300,000, halves the training speed beside one busy process and gains 2% on an idle machine. Read when torch is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
logging.getLogger("matplotlib").setLevel(logging.ERROR)  # it warns where the home directory is not writable
# On macOS, this logger would warn every user that redirects, which we do not use, are not supported.
logging.getLogger("torch.distributed.elastic.multiprocessing.redirects").disabled = True
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SCRIPT = os.path.abspath(getattr(sys.modules["__main__"], "__file__", None) or os.devnull)  # Jupyter has none


def refuse(problem: str) -> None:
    print(f"{os.path.basename(SCRIPT)}: {problem}", file=sys.stderr, flush=True)
    os._exit(2)


def explain(kind: type, error: BaseException, traceback: object) -> None:
    """Print an uncaught exception: its traceback, unless a package is not installed."""
    package = (error.name or "").partition(".")[0] if kind is ModuleNotFoundError else ""
    if package in ("", "plaingpt", "model"):
        return sys.__excepthook__(kind, error, traceback)
    python = os.path.join(ROOT, ".venv", *(("Scripts", "python.exe") if os.name == "nt" else ("bin", "python")))
    if os.path.exists(python) and sys.prefix != os.path.join(ROOT, ".venv"):
        remedy = f"run {os.path.relpath(python)} {sys.argv[0]}"
    else:
        remedy = f"{sys.executable} -m pip install -r {os.path.relpath(os.path.join(ROOT, 'requirements.txt'))}"
    refuse(f"the Python package {error.name} is not installed; {remedy}")


OURS = [os.path.join(ROOT, name) for name in ("train.py", "sample.py", "prepare_data.py")]
if SCRIPT in OURS or os.path.dirname(SCRIPT) == os.path.join(ROOT, "tools"):  # not for programs that import us
    if sys.version_info < (3, 11):  # noqa: UP036
        refuse(f"needs Python 3.11 or later, but this is {sys.version.split()[0]}")
    sys.excepthook = explain
    gc.disable()  # until `run_script`: imports leave little garbage, and searching for it takes a tenth of their time
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # until `run_script`
