"""The measurement pipeline through Kedro, on a model that takes no time: nothing is lost."""

from __future__ import annotations

import errno
import json
import os
import weakref
from collections.abc import Callable
from pathlib import Path
from traceback import clear_frames
from typing import Any

import pandas as pd
import pytest
from kedro.io import DatasetError

from vlm_latency.cli import user_error
from vlm_latency.errors import MeasurementError
from vlm_latency.journal import RUN
from vlm_latency.models.null import NullMeter


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


Measured = tuple[pd.DataFrame, dict[str, Any]]


@pytest.fixture
def measured(
    dataset: Any, out: Path, kedro_run: Callable[..., dict[str, Any]]
) -> Callable[..., Measured]:
    """Run exp1 up to its table of measurements; give that and the coverage."""

    def run(**parameters: Any) -> Measured:
        given = {
            "model.name": "null-model",
            "dataset.source": "official",
            "dataset.path": str(dataset.root),
            "exp1.sampling.num_samples": len(dataset),
            "exp1.measurement.num_runs": 2,
            "exp1.measurement.noise_repeats": 0,
            "exp1.measurement.output_length": "3",
            **{name.replace("__", "."): value for name, value in parameters.items()},
        }
        try:
            made = kedro_run("exp1", out, given, to_nodes=["exp1.measurement.collect"])
        except BaseException as error:
            clear_frames(error.__traceback__)  # as the command does: ends the measurement
            raise
        return made["exp1.measurements"].load(), made["exp1.coverage"].load()

    return run


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level("INFO", "vlm_latency")
    return caplog


def runs(table: pd.DataFrame) -> list[tuple[Any, ...]]:
    return sorted(table[RUN].itertuples(index=False, name=None))


def journals(out: Path) -> list[Path]:
    return sorted((out / "exp1" / "journal").iterdir())


def broken_meter(at: int, raising: Callable[[], BaseException]) -> Callable[..., Any]:
    """A null meter that raises at its n-th call."""
    whole, calls = NullMeter.__call__, [0]

    def call(self: NullMeter, *args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == at:
            raise raising()
        return whole(self, *args, **kwargs)

    return call


def test_every_request_is_measured_once_per_run(measured: Callable[..., Measured]) -> None:
    table, coverage = measured()
    assert len(table) == len(set(runs(table))) == 24
    assert sorted(table["order_index"]) == list(range(24))
    assert (table["num_output_tokens"] == 3).all()
    counted = {key: coverage[key] for key in ("planned", "measured", "failed", "missing")}
    assert counted == {"planned": 24, "measured": 24, "failed": 0, "missing": 0}
    assert coverage["partial"] is False
    assert [session["runs"] for session in coverage["sessions"]] == [24]


def test_a_complete_run_loads_no_model_again(
    measured: Callable[..., Measured],
    log: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, _ = measured()
    monkeypatch.setattr("vlm_latency.models.load", lambda _: pytest.fail("the model was loaded"))
    again, coverage = measured()
    pd.testing.assert_frame_equal(first, again)
    assert coverage["measured"] == 24
    assert "exp1: all 24 runs were measured before; reporting again without measuring" in log.text


def test_raising_num_samples_measures_only_what_is_new(
    measured: Callable[..., Measured], log: pytest.LogCaptureFixture
) -> None:
    few, _ = measured(exp1__sampling__num_samples=5)
    many, _ = measured()
    assert "exp1: continuing, 10 of 24 runs are done" in log.text
    kept = many[many["request_id"].isin(set(few["request_id"]))]
    columns = [*RUN, "started_at", "order_index"]
    pd.testing.assert_frame_equal(
        few[columns].sort_values(RUN, ignore_index=True),
        kept[columns].sort_values(RUN, ignore_index=True),
    )
    assert len(many) == 24
    assert many["order_index"].is_unique
    fewer, _ = measured(exp1__sampling__num_samples=5)
    assert runs(fewer) == runs(few)


def test_other_conditions_begin_another_journal_and_the_log_says_so(
    measured: Callable[..., Measured], out: Path, log: pytest.LogCaptureFixture
) -> None:
    first, _ = measured()
    (old,) = journals(out)
    before = old.read_bytes()
    second, _ = measured(prompt__template="Q: {question}")
    assert old.read_bytes() == before
    assert len(journals(out)) == 2
    assert not set(first["fingerprint"]) & set(second["fingerprint"])
    assert len(second) == 24
    told = f"{old.name} was measured under other conditions (prompt_template: vqa2: {{question}} → "
    assert told in log.text
    measured(model__seed=1)
    assert f"{old.name} was measured under other conditions (model.seed: 0 → 1)" in log.text
    back, _ = measured()  # and going back finds what was measured then
    pd.testing.assert_frame_equal(first, back)


def test_a_request_that_asks_for_something_else_is_measured_again(
    measured: Callable[..., Measured], dataset: Any
) -> None:
    first, _ = measured()
    dataset.ask("And what is this, then?")
    second, _ = measured()
    assert set(first["request_id"]) == set(second["request_id"])
    assert not set(first["request_sha256"]) & set(second["request_sha256"])
    assert (second["num_language_tokens"] > first["num_language_tokens"].max()).all()
    assert len(second) == 24


def test_without_resume_everything_is_measured_afresh(
    measured: Callable[..., Measured], out: Path, log: pytest.LogCaptureFixture
) -> None:
    first, _ = measured()
    second, _ = measured(measurement__resume=False)
    assert runs(first) == runs(second)
    assert first["started_at"].max() < second["started_at"].min()
    assert len(journals(out)) == 2
    assert "exp1: measured afresh; what was there is kept as" in log.text


@pytest.mark.parametrize("how", ["missing", "corrupt", "truncated"])
def test_a_broken_image_costs_only_its_own_request(
    how: str, measured: Callable[..., Measured], dataset: Any
) -> None:
    dataset.break_image(3, how)
    generous = {"measurement__max_failures": 0.5}
    table, coverage = measured(**generous)
    failed = table[table["status"] == "failed"]
    assert failed["question_id"].tolist() == ["3", "3"]
    assert failed["T_total"].isna().all()
    assert len(table) == 24
    assert (coverage["measured"], coverage["failed"], coverage["missing"]) == (22, 2, 0)
    assert sum(coverage["failures"].values()) == 2
    assert all(reason.startswith("DataError: image") for reason in coverage["failures"])

    dataset.write_image(3)
    table, coverage = measured(**generous)
    assert (table["status"] == "ok").all()
    assert (coverage["measured"], coverage["failed"]) == (24, 0)
    assert table["order_index"].is_unique


def test_all_images_corrupt_is_no_result(measured: Callable[..., Measured], dataset: Any) -> None:
    for n in range(1, len(dataset) + 1):
        dataset.break_image(n, "corrupt")
    with pytest.raises(MeasurementError, match="no run succeeded; nothing to report"):
        measured(measurement__max_failures=1)


def test_too_many_failures_stop_the_run_with_a_summary(
    measured: Callable[..., Measured], dataset: Any
) -> None:
    for n in (2, 5, 7):
        dataset.break_image(n, "corrupt")
    told = r"2 of \d+ runs failed, more than measurement.max_failures=0.01 of 24 allows.*DataError"
    with pytest.raises(MeasurementError, match=told):
        measured()
    for n in (2, 5, 7):
        dataset.write_image(n)
    table, coverage = measured()
    assert (table["status"] == "ok").all()
    assert coverage["measured"] == 24


def test_no_failure_is_allowed_where_none_is(
    measured: Callable[..., Measured], dataset: Any
) -> None:
    dataset.break_image(2, "corrupt")
    with pytest.raises(MeasurementError, match=r"1 of \d+ runs failed, more than .*=0 of 24"):
        measured(measurement__max_failures=0)
    dataset.write_image(2)
    table, _ = measured(measurement__max_failures=0)
    assert (table["status"] == "ok").all()


def test_a_part_is_reported_only_when_asked_for(
    measured: Callable[..., Measured],
    monkeypatch: pytest.MonkeyPatch,
    log: pytest.LogCaptureFixture,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(NullMeter, "__call__", broken_meter(12, KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            measured()
        assert "reporting on" not in log.text
    part, coverage = measured(measurement__allow_partial=True)
    assert 0 < len(part) < 24
    assert coverage["partial"] is True
    assert coverage["missing"] == 24 - len(part)
    assert f"exp1: reporting on {len(part)} of 24 runs" in log.text


def test_collect_refuses_a_part_and_names_the_command(
    measured: Callable[..., Measured], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = measured
    monkeypatch.setattr("vlm_latency.instrument.protocol.measure", lambda *_, **__: iter(()))
    with pytest.raises(MeasurementError) as error:
        whole()
    assert "0 of 24 runs of exp1 are measured; run 'kedro run --pipeline exp1' again" in str(
        error.value
    )
    assert "measurement.allow_partial=true" in str(error.value)


def test_an_interrupted_run_continues(
    measured: Callable[..., Measured],
    monkeypatch: pytest.MonkeyPatch,
    log: pytest.LogCaptureFixture,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(NullMeter, "__call__", broken_meter(15, KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            measured()
    table, _ = measured()
    assert "exp1: continuing" in log.text
    assert len(table) == len(set(runs(table))) == 24
    assert table["order_index"].is_unique


def test_a_full_disk_stops_the_run_and_loses_nothing(
    measured: Callable[..., Measured], monkeypatch: pytest.MonkeyPatch, out: Path
) -> None:
    real, calls = os.fsync, [0]

    def full(descriptor: int) -> None:
        calls[0] += 1
        if calls[0] > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr("vlm_latency.journal.os.fsync", full)
        with pytest.raises(DatasetError) as error:
            measured(measurement__chunk_size=4)
    assert "No space left on device; free some space" in str(user_error(error.value))
    assert calls[0] == 3
    (journal,) = journals(out)
    whole = journal.read_bytes().splitlines(keepends=True)
    assert all(line.endswith(b"\n") and json.loads(line) for line in whole)
    table, _ = measured(measurement__chunk_size=4)
    assert len(table) == len(set(runs(table))) == 24


def test_running_out_of_memory_fails_one_run_and_frees_what_it_held(
    measured: Callable[..., Measured], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip("torch")

    class Held:
        """Stands for the tensors that the frames of a failed run hold."""

    whole, calls, held = NullMeter.__call__, [0], []

    def call(self: NullMeter, *args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == 9:
            tensors = Held()
            tensors.itself = tensors  # only a collection frees it
            held.append(weakref.ref(tensors))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        if calls[0] == 10:
            held.append(held[0]())
        return whole(self, *args, **kwargs)

    monkeypatch.setattr(NullMeter, "__call__", call)
    table, coverage = measured()
    assert coverage["failed"] == 1
    (error,) = table.loc[table["status"] == "failed", "error"]
    assert error.startswith("OutOfMemoryError: CUDA out of memory")
    assert held[1] is None


def test_a_torn_last_line_is_measured_again(measured: Callable[..., Measured], out: Path) -> None:
    first, _ = measured()
    (journal,) = journals(out)
    journal.write_bytes(journal.read_bytes()[:-2000])
    second, _ = measured()
    assert runs(first) == runs(second)
    assert second["order_index"].is_unique


def test_a_torn_header_of_another_journal_stops_nothing(
    measured: Callable[..., Measured], out: Path
) -> None:
    folder = out / "exp1" / "journal"
    folder.mkdir(parents=True)
    (folder / "0123456789abcdef.jsonl").write_bytes(b'{"schema_version":1,"finger')
    table, _ = measured()
    assert len(table) == 24


def test_what_belongs_to_measuring_survives_a_report_made_again(
    measured: Callable[..., Measured],
    kedro_run: Callable[..., dict[str, Any]],
    out: Path,
    dataset: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vlm_latency.instrument import environment

    def told(commit: str) -> dict[str, Any]:
        code = {"git_commit": commit, "git_dirty": False}
        monkeypatch.setattr(environment, "_commit", lambda: code)
        measured()
        given = {
            "model.name": "null-model",
            "dataset.source": "official",
            "dataset.path": str(dataset.root),
            "exp1.sampling.num_samples": len(dataset),
            "exp1.measurement.num_runs": 2,
            "exp1.measurement.noise_repeats": 0,
            "exp1.measurement.output_length": "3",
        }
        kedro_run("exp1", out, given)
        return json.loads((out / "exp1" / "exp1_latency_distribution.json").read_text())

    before, after = told("first")["environment"], told("second")["environment"]
    assert after["code"]["git_commit"] == "first"
    assert after["process"] == before["process"]
    assert after["measured"] == before["measured"]
    assert after["measured"]["git_commits"] == ["first"] and after["measured"]["commands"] == 1
    assert after["reported"]["code"]["git_commit"] == "second"
