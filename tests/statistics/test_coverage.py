"""The table of coverage, small: no cell falls short of its goal by more than chance allows."""

import subprocess
import sys
from dataclasses import replace
from datetime import date
from pathlib import Path

import numpy as np
import pytest
import yaml

sys.path.insert(0, str(Path(__file__).parents[1] / "coverage"))
from cells import cells
from processes import Processes, matching
from public import COVERED, HEADLINES, PLAIN, public_intervals
from table import Cell, Row, page, simulate
from verdicts import claims, count_verdicts

from vlm_latency import statistics as st
from vlm_latency.experiments import EXPERIMENTS
from vlm_latency.options import Options


@pytest.mark.slow
def test_no_cell_falls_short() -> None:
    rows = [simulate(cell, scale=0.1) for cell in cells()]
    assert not [row for row in rows if row.outside(sigmas=4)]


@pytest.mark.slow
def test_claims_are_judged_right_at_the_default_size() -> None:
    for name in claims():
        found = count_verdicts(name, scale=0.25)
        assert found.opposite <= 0.1, found  # 5 % of 50, by chance
        assert found.right >= 0.7 or name == "tail: P99 / P50 = 1.1", found


def test_every_public_interval_has_its_cells_and_every_cell_its_interval() -> None:
    assert set(COVERED) == public_intervals()
    simulated = {cell.statistic.removesuffix(", over images") for cell in cells()}
    assert set(COVERED.values()) <= simulated
    doc = (Path(__file__).parents[2] / "docs" / "coverage.md").read_text(encoding="utf-8")
    shown = {line.split(" | ")[0].removeprefix("| ") for line in doc.splitlines() if "|" in line}
    assert {cell.statistic for cell in cells()} <= shown


def test_every_headline_of_a_default_run_has_a_cell_of_its_size() -> None:
    facts = {(name, *fact.path) for name, own in EXPERIMENTS.items() for fact in own.facts}
    assert facts == HEADLINES.keys() | PLAIN
    files = (Path(__file__).parents[2] / "conf" / "base").glob("parameters*.yml")
    read = (yaml.safe_load(file.read_text(encoding="utf-8")) for file in files)
    given = Options.from_parameters({key: value for one in read for key, value in one.items()})
    exp1, exp2, exp3, exp4 = (given.experiment(f"exp{i}") for i in (1, 2, 3, 4))
    images, lengths = exp4.sampling.num_samples, len(exp4.sampling.max_new_tokens_list)
    shapes = exp3.sampling.max_grid_size + 3  # and three grids of as many crops as another
    sizes = {
        "exp1": {f"{exp1.sampling.num_samples} + {exp1.measurement.noise_repeats}"},
        "exp2": {str(exp2.sampling.num_samples)},
        "exp3": {f"{shapes} × {exp3.measurement.num_runs}"},
        "exp4": {f"{images} × {lengths}", f"{images} images"},
        "exp5": {f"{shapes + lengths} shapes"},
    }
    simulated = {(cell.statistic, cell.n) for cell in cells()}
    lacking = [
        (headline, statistic)
        for headline, statistic in HEADLINES.items()
        if not any((statistic, n) in simulated for n in sizes[headline[0]])
    ]
    assert not lacking


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
    text = page(
        [Row(found[0], 0.5, 1_000, 0, 0)],
        [count_verdicts(next(iter(claims())), 0)],
        date(2026, 1, 1),
    )
    assert "| mean | normal | 8 | 50.0 |" in text and "**outside**" in text


@pytest.mark.slow
def test_the_number_of_processes_changes_no_number() -> None:
    # one process would share the draws of both held-out errors
    asked = [*matching("held-out error of")[0][:2], *matching("P99 / P50")[0][:1]]
    claim = matching("llm_bottleneck: 60")[1]
    assert {cell.n for cell in asked} == {"8 shapes", "80"}
    here = [simulate(cell, scale=0.1) for cell in asked]
    for processes in (Processes(2, 0.1), Processes(1, 0.1)):
        for row, same in zip(processes.rows(asked), here, strict=True):
            assert replace(row, cell=same.cell) == same
    assert list(Processes(2, 0.1).verdicts(claim)) == [count_verdicts(claim[0], 0.1)]


def test_only_a_part_is_simulated_and_nothing_written(tmp_path: Path) -> None:
    cells_of_it, claims_of_it = matching("P99 / P50")
    assert {cell.statistic for cell in cells_of_it} == {"P99 / P50"}
    assert all(name.startswith("tail") for name in claims_of_it) and claims_of_it
    ran = subprocess.run(
        [sys.executable, Path(__file__).parents[1] / "coverage", "--only", "jump", "--scale", "0"],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert ran.stdout.startswith("jump of a staircase | normal | 2 × 8: ")
    assert not list(tmp_path.iterdir())
