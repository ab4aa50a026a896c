"""Whatever number or text is in an earlier result: what is computed from it is finite, or a sentence."""

from __future__ import annotations

import json
import random
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

sys.path.insert(0, str(Path(__file__).parent))
import made_up as m
from test_predict_pipeline import measured  # noqa: F401

from vlm_latency.costs import Hardware
from vlm_latency.errors import UserError
from vlm_latency.models import ModelHandle
from vlm_latency.options import ModelOptions, Options
from vlm_latency.pipelines.compare.nodes import compare_runs
from vlm_latency.pipelines.predict.nodes import predict
from vlm_latency.pipelines.reporting import exp5
from vlm_latency.results import read_earlier, read_run, result_path
from vlm_latency.statistics import plain

INFINITE = (float("nan"), float("inf"), -float("inf"))
NUMBERS = (*INFINITE, 1e308, -1e308, 1e-308, 10**30, 2**70, -5, -5.0, 0, 1)
VALUES = (
    *NUMBERS,
    None,
    True,
    "",
    "x",
    "\ud800",
    "$",
    "9" * 5000,
    [],
    {},
    [[[]]],
    {"a": {"b": [1e308]}},
)
TINY: dict[str, Any] = {"model": {"name": "tiny-molmo"}}

Job = Callable[[Path], Any]


def from_sweeps(folder: Path) -> Any:
    sweeps = [read_earlier(result_path(folder, name), name) for name in ("exp3", "exp4")]
    return exp5.report(m.options("exp5"), sweeps[0], sweeps[1])[0]


def prediction(folder: Path) -> Any:
    sweeps = [read_earlier(result_path(folder, name), name) for name in ("exp3", "exp4")]
    model = ModelHandle(ModelOptions.model_validate(TINY["model"]))
    return predict(Options.from_parameters(TINY), model, sweeps[0], sweeps[1])[0]


def comparison(folder: Path) -> Any:
    runs = [read_run(folder), read_run(folder.parent / "other")]
    return compare_runs(Options.from_parameters({}), runs, pd.DataFrame(), {}, {})[0]


def sweeps(folder: Path, made: Any) -> None:
    for name, result in zip(("exp3", "exp4"), made, strict=True):
        path = result_path(folder, name)
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(plain(result)))


def runs(folder: Path, _: Any) -> None:
    m.write_run(folder)
    m.write_run(folder.parent / "other", 1.1, 1)


def entries_only(folder: Path, _: Any) -> None:
    runs(folder, _)
    for path in folder.parent.rglob("*.parquet"):
        path.unlink()


JOBS: dict[str, tuple[Callable[[Path, Any], None], Job]] = {
    "exp5": (sweeps, from_sweeps),
    "predict": (sweeps, prediction),
    "compare": (runs, comparison),
    "compare entries": (entries_only, comparison),
}


def put(tree: Any, draw: random.Random) -> Any:
    """Put a value somewhere into a tree."""
    if isinstance(tree, dict | list) and tree and draw.random() < 0.95:
        key = draw.choice(list(tree) if isinstance(tree, dict) else range(len(tree)))
        tree[key] = put(tree[key], draw)
        return tree
    return draw.choice(VALUES)


def finite_or_refused(job: Job, folder: Path) -> str:
    """Compute; what is neither a sentence nor free of NaN and of numpy's warnings is an error."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = job(folder)
    except UserError as error:
        assert str(error)
        return "refused"
    json.dumps(plain(found), allow_nan=False, ensure_ascii=False).encode()
    return "right"


def attack(name: str, folder: Path, made: Any, times: int, seed: int) -> None:
    write, job = JOBS[name]
    write(folder, made)
    assert finite_or_refused(job, folder) == "right"
    whole = {path: path.read_text() for path in folder.glob("*/*.json")}
    draw, seen = random.Random(seed), set()
    for number in range(times):
        path = draw.choice(sorted(whole))
        path.write_text(json.dumps(put(json.loads(whole[path]), draw)))
        try:
            seen.add(finite_or_refused(job, folder))
        except Exception as error:
            error.add_note(f"{name}, seed {seed}, number {number}")
            raise
        path.write_text(whole[path])
    assert seen == {"right", "refused"}


@pytest.mark.parametrize("times", [12, pytest.param(150, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", JOBS)
def test_a_changed_result_is_computed_with_or_refused(
    name: str,
    times: int,
    tmp_path: Path,
    measured: Any,  # noqa: F811
) -> None:
    attack(name, tmp_path / "run", measured, times, seed=times)


@pytest.mark.parametrize("value", [*INFINITE, 1e308, -1e308, -5.0, 0.0])
def test_a_number_that_none_measured_in_records_is_compared_or_refused(
    value: float, tmp_path: Path
) -> None:
    runs(tmp_path / "run", None)
    path = tmp_path / "run" / "exp3" / "exp3_records.parquet"
    whole = pd.read_parquet(path)
    for column in ("T_total", "T_LLM_decode", "num_vision_tokens"):
        changed = whole.astype({column: float})
        changed.loc[3, column] = value
        changed.to_parquet(path)
        told = finite_or_refused(comparison, tmp_path / "run")
        assert told == "refused" or not abs(value) > 1e30, column


@pytest.mark.parametrize("value", [*INFINITE, 1e308, 2**70 * 10**20, -5, 0, None, "1", [1]])
@pytest.mark.parametrize("name", ["flops_per_s", "bytes_per_s", "launch_overhead_us"])
def test_ceilings_that_no_machine_has_are_refused(name: str, value: Any) -> None:
    given = {"flops_per_s": 5e10, "bytes_per_s": 1e10, "launch_overhead_us": 3, name: value}
    with pytest.raises(UserError, match=f"the ceilings of the machine have {name}"):
        Hardware.from_ceilings(given)
