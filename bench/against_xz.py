"""A run's bits per byte beside what xz -9 makes of the same validation text.

python bench/against_xz.py --out_dir=out-quickstart
"""

import argparse
import json
import lzma
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from plaingpt.metrics import read_metrics
from plaingpt.tokens import open_data_set


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out_dir", default="out-quickstart")
    parser.add_argument("--data_dir", default="data")
    arguments = parser.parse_args()
    training = json.loads((Path(arguments.out_dir) / "last" / "training.json").read_text())
    data = open_data_set(Path(arguments.data_dir) / training["settings"]["dataset"], check=False)
    text = data.tokenizer.decode(token for piece in data.val.all() for token in piece.tolist()).encode()
    xz = len(lzma.compress(text, preset=9)) * 8 / len(text)
    model = min(r["val_bpb"] for r in read_metrics(Path(arguments.out_dir) / "metrics.jsonl") if "val_bpb" in r)
    print(f"bits per byte of {len(text):,} bytes of validation text: xz -9 {xz:.3f}, this model {model:.3f}")


if __name__ == "__main__":
    main()
