"""Plot the curves of several runs in compare.png.

python tools/compare_runs.py out-a out-b
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import plaingpt.startup

from plaingpt.console import UserError, note, run_script
from plaingpt.metrics import draw_runs
from plaingpt.settings import PathName, load_settings


@dataclass(frozen=True)
class CompareConfig:
    out_dirs: tuple[PathName, ...] = ()
    """directories of runs"""


def main() -> None:
    config, _ = load_settings(CompareConfig, positional="out_dirs")
    out_dirs, picture = [Path(name) for name in config.out_dirs], Path("compare.png")
    if not out_dirs:
        raise UserError("name the directories of one or more runs: python tools/compare_runs.py out-a out-b")
    for out_dir in out_dirs:
        if not (out_dir / "metrics.jsonl").exists():
            raise UserError(f"{out_dir} has no metrics.jsonl")
    if not draw_runs(out_dirs, picture):
        raise UserError("the runs have no losses to plot yet")
    note(f"wrote {picture}")


if __name__ == "__main__":
    run_script(main)
