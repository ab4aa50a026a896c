"""A plan measured in parts, each for itself: together they are the one table, or are refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_latency.cli import user_error
from vlm_latency.errors import MeasurementError, UserError
from vlm_latency.journal import RUN
from vlm_latency.models.null import NullMeter
from vlm_latency.options import Options
from vlm_latency.shards import deal

EXP1 = {
    "model.name": "null-model",
    "exp1.sampling.num_samples": 12,
    "exp1.measurement.num_runs": 2,
    "exp1.measurement.noise_repeats": 3,
}
SAME = [*RUN, "num_crops", "num_total_tokens", "num_output_tokens", "status", "fingerprint"]
Run = Callable[..., pd.DataFrame]


@pytest.fixture
def run(tmp_path: Path, kedro_run: Callable[..., dict[str, Any]]) -> Run:
    """Measure a shard, or (``shard=None``) gather; give the table of measurements then."""

    def measured(
        shard: str | None = None, folder: str = "out", name: str = "exp1", **more: Any
    ) -> Any:
        parameters = EXP1 | {key.replace("__", "."): value for key, value in more.items()}
        if shard:
            return kedro_run(name, tmp_path / folder, {**parameters, "measurement.shard": shard})
        until = [f"{name}.measurement.collect"]
        made = kedro_run(name, tmp_path / folder, parameters, to_nodes=until)
        return made[f"{name}.measurements"].load()

    return measured


@pytest.fixture(scope="module")
def shards(
    tmp_path_factory: pytest.TempPathFactory, kedro_run: Callable[..., dict[str, Any]]
) -> Path:
    """Three shards, measured once."""
    folder = tmp_path_factory.mktemp("three")
    for index in (1, 2, 3):
        kedro_run("exp1", folder, {**EXP1, "measurement.shard": f"{index}/3"})
    return folder


@pytest.fixture
def three(run: Run, shards: Path, tmp_path: Path) -> Run:
    """All three shards are measured."""
    shutil.copytree(shards, tmp_path / "out")
    return run


def journal(root: Path, shard: str) -> Path:
    (path,) = (root / "out" / shard / "exp1" / "journal").glob("*.jsonl")
    return path


def refusal(run: Run, **more: Any) -> str:
    with pytest.raises(Exception) as error:
        run(**more)
    told = user_error(error.value)
    assert told is not None, error.value
    return told


@given(st.lists(st.integers(0, 4), min_size=1, max_size=40), st.integers(1, 5), st.integers(1, 9))
def test_every_hand_gets_its_share_of_every_shape(shapes: list[int], runs: int, hands: int) -> None:
    names = {f"r{n}": shape for n, shape in enumerate(shapes)}
    planned = pd.DataFrame(
        [(name, index) for index in range(runs) for name in names],
        columns=["request_id", "run_index"],
    ).sample(frac=1, random_state=0)
    dealt = deal(planned, names, hands)
    of = planned["request_id"].map(names)
    assert set(dealt) <= set(range(hands))
    for shape in set(shapes):
        counts = [int(((dealt == hand) & (of == shape)).sum()) for hand in range(hands)]
        whole = shapes.count(shape) >= hands
        assert max(counts) - min(counts) <= (runs if whole else 1)
        assert sum(counts) == runs * shapes.count(shape)
        if whole:  # all runs of a request are in one hand
            at = pd.DataFrame({"request": planned["request_id"], "hand": dealt})[of == shape]
            assert len(at.drop_duplicates()) == shapes.count(shape)


def test_three_shards_are_the_table_of_one_device(
    three: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = three(folder="one")
    monkeypatch.setattr(NullMeter, "__call__", lambda *_, **__: pytest.fail("it was measured"))
    table = three()
    pd.testing.assert_frame_equal(
        one[SAME].sort_values(RUN, ignore_index=True),
        table[SAME].sort_values(RUN, ignore_index=True),
    )
    assert len(table) == 12 * 2 + 3
    assert table["order_index"].tolist() == list(range(len(table)))
    assert table["started_at"].is_monotonic_increasing
    assert table["worker_index"].value_counts().between(7, 11).all()
    assert sorted(table["worker_index"].unique()) == [1, 2, 3]
    assert one["worker_index"].unique().tolist() == [1]
    files = {path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*.*")}
    beside = {path.parts[2] for path in files if path.parts[0].startswith("shard-") and path.suffix}
    assert beside == {"journal"}
    again = three()  # what was gathered before is no double
    pd.testing.assert_frame_equal(table, again)


def test_each_shard_sees_every_size_of_a_sweep(run: Run, tmp_path: Path) -> None:
    sweep = {"exp3__sampling__max_grid_size": 4, "exp3__measurement__num_runs": 4}
    for index in (1, 2):
        run(f"{index}/2", name="exp3", **sweep)
    table = run(name="exp3", **sweep)
    of_one, of_two = (table[table["worker_index"] == index]["request_id"] for index in (1, 2))
    assert set(of_one) == set(of_two) == set(table["request_id"])


def test_in_a_shard_experiments_wait_for_no_result(
    tmp_path: Path, kedro_run: Callable[..., dict[str, Any]]
) -> None:
    small = {
        "model.name": "null-model",
        "exp3.sampling.max_grid_size": 2,
        "exp4.sampling.num_samples": 1,
        "exp4.sampling.max_new_tokens_list": "2 4",
    }
    kedro_run("phase2", tmp_path, {**small, "measurement.shard": "2/2"})
    made = {path.relative_to(tmp_path).parts[:3] for path in tmp_path.rglob("*.jsonl")}
    assert made == {("shard-2of2", name, "journal") for name in ("exp3", "exp4")}
    assert not (tmp_path / "report").exists()


def test_a_gap_is_refused_by_name_and_reported_only_when_asked_for(
    three: Run, tmp_path: Path
) -> None:
    shutil.move(tmp_path / "out" / "shard-2of3", tmp_path / "away")
    path = journal(tmp_path, "shard-3of3")
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-2]))  # its last run, and what it said at its end
    told = refusal(three)
    assert "exp1: 10 of 27 runs are in no shard; shard 2/3 (not there at all) lacks 9: " in told
    assert "; shard 3/3 lacks 1: " in told
    lost = pd.read_json(path.parent / path.name, lines=True, dtype=False)["request_id"].dropna()
    assert told.count(" run ") >= 4
    part = three(measurement__allow_partial=True)
    assert len(part) == 17
    assert set(lost) <= set(part["request_id"])
    shutil.move(tmp_path / "away", tmp_path / "out" / "shard-2of3")
    three("3/3")  # continues with its one run
    whole = three()
    assert len(whole) == len(whole.drop_duplicates(RUN)) == 27
    assert whole["order_index"].is_unique


def test_a_run_in_two_places_is_refused_by_name(three: Run, tmp_path: Path) -> None:
    source, target = (journal(tmp_path, f"shard-{number}of3") for number in (1, 2))
    lines = [line for line in source.read_text().splitlines(True) if "request_id" in line]
    with target.open("a") as file:
        file.write(lines[0])
    told = refusal(three)
    assert "exp1: 1 runs are in shard 1/3 and shard 2/3: " in told
    assert json.loads(lines[0])["request_id"] in told
    shutil.copytree(tmp_path / "out" / "shard-1of3", tmp_path / "out" / "shard-4of3")
    told = refusal(three)
    assert "9 runs are in" in told
    assert "shard 4/3" in told


def test_shards_of_two_divisions_are_refused_by_name(three: Run) -> None:
    three("1/2")
    told = refusal(three)
    assert "shards of several divisions of exp1: shard-1of2, shard-1of3, shard-2of3" in told


def test_runs_measured_without_a_shard_are_doubles(run: Run) -> None:
    run()
    for index in (1, 2):
        run(f"{index}/2")
    told = refusal(run)
    assert "27 runs are in" in told
    assert "the journal without shard" in told


def test_a_shard_of_other_conditions_is_refused_by_name(run: Run) -> None:
    run("1/2")
    run("2/2", model__seed=1)
    told = refusal(run)
    assert "exp1: shard 2/2 was measured under other conditions" in told
    assert "model.seed: 1 → 0" in told


@pytest.mark.parametrize("wrong", ["0/8", "9/8", "3-8", "8", "3/0", "a/b", 3])
def test_a_part_that_is_none_is_refused(wrong: Any) -> None:
    with pytest.raises(UserError) as error:
        Options.from_parameters({"measurement": {"shard": wrong}})
    assert str(error.value) == (
        f"parameter 'measurement.shard': found {wrong!r}: expected one of N parts as 1/N … N/N, "
        "such as 3/8"
    )


def test_a_shard_is_of_the_whole_command() -> None:
    with pytest.raises(UserError, match=r"'exp1.measurement.shard' has no effect.*whole command"):
        Options.from_parameters({"exp1": {"measurement": {"shard": "1/2"}}})
    options = Options.from_parameters({"measurement": {"shard": "3/8"}, "output_dir": "a"})
    assert options.folder == Path("a/shard-3of8")
    assert options.experiment("exp1").model_dump(mode="json")["measurement"]["shard"] == "3/8"


def test_a_shard_of_nothing_is_refused(
    tmp_path: Path, kedro_run: Callable[..., dict[str, Any]]
) -> None:
    with pytest.raises(MeasurementError, match="shard=1/2 in a command that measures no experime"):
        kedro_run("exp5", tmp_path, {**EXP1, "measurement.shard": "1/2"})
