"""How often the printed intervals hold the truth: ``python tests/coverage`` writes docs/coverage.md.

Every public interval of ``vlm_latency.statistics`` is computed again and again on data whose truth
is known. Cells that the goals are about (normal, lognormal and clustered data) must hold in at
least 93 %, those of continuous statistics in at most 97.5 %; heavy tails and rare modes, of which
few values know nothing, are shown with the share of intervals that carried a warning.
"""

from __future__ import annotations

import argparse
import time
from datetime import date
from pathlib import Path

from cells import cells
from table import page, simulate
from verdicts import judge_claims


def main() -> None:
    """Simulate the table and write it."""
    parser = argparse.ArgumentParser(description="Simulate how often the intervals hold the truth.")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="of the number of samples; 0.1 for a trial"
    )
    parser.add_argument("--output", type=Path, default=Path("docs/coverage.md"))
    asked = parser.parse_args()
    begin, rows = time.monotonic(), []
    for cell in cells():
        rows.append(simulate(cell, asked.scale))
        print(f"{cell.statistic} | {cell.data} | {cell.n}: {100 * rows[-1].held:.1f} %", flush=True)
    asked.output.parent.mkdir(parents=True, exist_ok=True)
    verdicts = judge_claims(asked.scale)
    minutes = (time.monotonic() - begin) / 60
    text = page(rows, verdicts, date.today(), asked.scale, minutes)
    asked.output.write_text(text, encoding="utf-8")
    print(f"written: {asked.output}")


if __name__ == "__main__":
    main()
