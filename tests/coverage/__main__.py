"""How often the printed intervals hold the truth: ``python tests/coverage`` writes docs/coverage.md.

Every public interval of ``vlm_latency.statistics`` is computed again and again on data whose truth
is known. Cells that the goals are about (normal, lognormal and clustered data) must hold in at
least 93 %, those of continuous statistics in at most 97.5 %; heavy tails and rare modes, of which
few values know nothing, are shown with the share of intervals that carried a warning.
"""

from __future__ import annotations

import argparse
import os
import time
from datetime import date
from pathlib import Path

from processes import Processes, matching
from table import page


def main() -> None:
    """Simulate the table and write it, or print a part of it."""
    parser = argparse.ArgumentParser(description="Simulate how often the intervals hold the truth.")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="of the number of samples; 0.1 for a trial"
    )
    parser.add_argument("--output", type=Path, default=Path("docs/coverage.md"))
    parser.add_argument(
        "--processes", type=int, default=1, help="the numbers are the same however many"
    )
    parser.add_argument(
        "--only", default="", metavar="TEXT",
        help="only cells whose statistic or data contains TEXT; prints them and writes nothing",
    )  # fmt: skip
    asked = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # the processes start anew and inherit it
    begin, rows, verdicts = time.monotonic(), [], []
    simulated = Processes(asked.processes, asked.scale)
    wanted, claims = matching(asked.only)
    if not (wanted or claims):
        parser.error(f"no cell has {asked.only!r} in its statistic or data.")
    for row in simulated.rows(wanted):
        rows.append(row)
        cell = row.cell
        print(
            f"{cell.statistic} | {cell.data} | {cell.n}: {100 * row.held:.1f} "
            f"± {100 * row.error:.1f} % of {row.runs}{' outside' if row.outside() else ''}",
            flush=True,
        )
    for found in simulated.verdicts(claims):
        verdicts.append(found)
        print(
            f"{found.claim} | {found.n}: {100 * found.right:.0f} % right, "
            f"{100 * found.opposite:.0f} % opposite",
            flush=True,
        )
    if asked.only:
        return
    minutes = (time.monotonic() - begin) / 60
    asked.output.parent.mkdir(parents=True, exist_ok=True)
    text = page(rows, verdicts, date.today(), asked.scale, minutes, asked.processes)
    asked.output.write_text(text, encoding="utf-8")
    print(f"written: {asked.output}")


if __name__ == "__main__":
    main()
