# SPDX-License-Identifier: Apache-2.0
"""Write what is generated in docs/benchmarks.md and README.md, and the plots, from benchmarks/results:

python benchmarks/report.py
python benchmarks/report.py --agree A.json B.json    # do two runs of softprompt-fast bench say the same?
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from _plots import draw
from _report import disagreeing, pages
from _results import RESULTS, load
from _suite import read_rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--agree", nargs=2, type=Path, metavar="FILE", help="two runs; exit status 1 if they do not")
    args = parser.parse_args()
    if args.agree:
        count, said = disagreeing(*(read_rows(path) for path in args.agree))
        print(*said, f"{count - len(said)} of {count} ratios agree within their intervals", sep="\n")
        return 1 if said else 0
    rows = load()
    for path, text in pages(rows, draw(rows, RESULTS)).items():
        path.write_text(text, encoding="utf-8")
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
