# SPDX-License-Identifier: Apache-2.0
"""Write what is generated in docs/benchmarks.md and README.md, and the plots, from benchmarks/results:
python benchmarks/report.py"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from _plots import draw
from _report import pages
from _results import RESULTS, load

if __name__ == "__main__":
    rows = load()
    for path, text in pages(rows, draw(rows, RESULTS)).items():
        path.write_text(text, encoding="utf-8")
        print(path)
