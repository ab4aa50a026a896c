"""The table of coverage, small: no cell falls short of its goal by more than chance allows."""

import sys
from dataclasses import replace
from datetime import date
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "coverage"))
from cells import cells
from public import COVERED, public_intervals
from table import Cell, Row, page, simulate
from verdicts import judge_claims

from vlm_latency import statistics as st


@pytest.mark.slow
def test_no_cell_falls_short() -> None:
    rows = [simulate(cell, scale=0.1) for cell in cells()]
    assert not [row for row in rows if row.outside(sigmas=4)]


@pytest.mark.slow
def test_claims_are_judged_right_at_the_default_size() -> None:
    verdicts = judge_claims(scale=0.25).set_index("claim and truth")
    assert (verdicts["opposite"] <= 0.1).all()  # 5 % of 50, by chance
    cannot = ["tail: P99 / P50 = 1.1"]
    assert (verdicts.drop(index=cannot)["right"] >= 0.7).all()


def test_every_public_interval_has_its_cells_and_every_cell_its_interval() -> None:
    assert set(COVERED) == public_intervals()
    simulated = {cell.statistic.removesuffix(", over images") for cell in cells()}
    assert set(COVERED.values()) <= simulated
    doc = (Path(__file__).parents[2] / "docs" / "coverage.md").read_text(encoding="utf-8")
    shown = {line.split(" | ")[0].removeprefix("| ") for line in doc.splitlines() if "|" in line}
    assert {cell.statistic for cell in cells()} <= shown


def test_a_summary_has_the_intervals_of_its_parts() -> None:
    values = np.exp(np.random.default_rng(0).normal(3, 0.3, 60))
    images = np.arange(60) % 20
    found = st.summary(values, images)
    assert found.mean == st.mean_estimate(values, images)
    for q in (50, 95, 99):
        assert getattr(found, f"P{q}") == st.percentile(values, q, clusters=images)
    assert found.tail_ratio == st.tail_ratio(values, clusters=images)


def test_an_interval_that_does_not_hold_is_outside() -> None:
    honest = next(cell for cell in cells() if cell.statistic == "mean")
    short = replace(honest, draw=lambda rng: st.mean_estimate(rng.normal(100, 5, 8), level=0.8))
    wide = replace(honest, draw=lambda rng: st.mean_estimate(rng.normal(100, 5, 8), level=0.999))
    found = [simulate(cell, scale=0.2) for cell in (honest, short, wide)]
    assert [row.outside() for row in found] == [False, True, True]
    assert not replace(found[1], cell=replace(short, goal=False)).outside()


def test_what_has_no_interval_is_counted_apart() -> None:
    row = simulate(Cell("mean", "one", "1", 0.0, lambda rng: st.mean_estimate([rng.normal()])))
    assert (row.runs, row.without, row.outside()) == (0, 1.0, False)


def test_every_cell_has_its_own_name_and_the_page_its_rows() -> None:
    found = list(cells())
    names = {(cell.statistic, cell.data, cell.n) for cell in found}
    assert len(names) == len(found)
    text = page([Row(found[0], 0.5, 1_000, 0, 0)], judge_claims(0).head(2), date(2026, 1, 1))
    assert "| mean | normal | 8 | 50.0 |" in text and "**outside**" in text
