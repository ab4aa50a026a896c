from __future__ import annotations

import gc
import io
import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from vlm_latency.errors import DataError, MeasurementError
from vlm_latency.instrument import session
from vlm_latency.instrument.plan import output_rule, plan
from vlm_latency.instrument.protocol import measure
from vlm_latency.instrument.session import Session, SessionLog
from vlm_latency.instrument.warmup import plateau
from vlm_latency.options import MeasurementOptions, ModelOptions
from vlm_latency.records import COMPONENTS, MEASURED_COLUMNS, measured_table

EXACT = {"method": "timeline", "order": "blocks", "warmup": "plateau", "lengths": "cold"}


def options(**changes: Any) -> MeasurementOptions:
    return MeasurementOptions(**{**EXACT, "warmup_runs": 1, **changes})


def table(count: int, **columns: Any) -> pd.DataFrame:
    frame = pd.DataFrame(
        {
            "request_id": [f"r{i}" for i in range(count)],
            "experiment": "exp1",
            "question_id": pd.array(range(count), dtype="Int64"),
            "image_id": pd.array([None] * count, dtype="Int64"),
            "question": "what {is} this?",
            "answer": "a red car",
            "image_recipe": [str(i) for i in range(count)],
            "image_width": 20,
            "image_height": 10,
            "output_length": "3",
        }
    )
    return frame.assign(**columns)


def picture(_: Any = None) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (20, 10)).save(file, "JPEG")
    return file.getvalue()


def counts(crops: int = 2, patches: int = 32, tiled: bool = True) -> SimpleNamespace:
    rows = 1 if tiled else None
    return SimpleNamespace(
        num_crops=crops, tiling_rows=rows, tiling_cols=rows, num_vision_patches=patches,
        num_vision_tokens=16, num_image_special_tokens=2, num_total_tokens=30,
    )  # fmt: skip


class Paper:
    """A model of paper: it notes what it is asked for and takes the times it is told."""

    def __init__(self, times: Any = None, shape: Any = None) -> None:
        self.options = ModelOptions(name="paper")
        self.device = "cpu"
        self.calls: list[tuple[Any, int, bool]] = []
        self.prompts: list[str] = []
        self.collecting: list[bool] = []
        self.closed = False
        self._times = times or (lambda: 5.0)
        self._shape = shape or (lambda *_: counts())
        self.architecture = SimpleNamespace(image_tokens=self._shape, max_positions=None)

    def meter(self, make: Any) -> Paper:
        return self

    def set_threads(self, count: int) -> int:
        return count

    def prepare(self, image: Image.Image, prompt: str) -> Any:
        self.prompts.append(prompt)
        return SimpleNamespace(counts=self._shape(*image.size))

    def place(self, prepared: Any) -> Any:
        return prepared

    def count_tokens(self, text: str) -> int:
        return len(text.split())

    def decode(self, token_ids: list[int]) -> str:
        return " ".join(map(str, token_ids))

    def close(self) -> None:
        self.closed = True

    def __call__(self, prepared: Any, tokens: int, stop: bool = False) -> Any:
        self.calls.append((prepared.counts.num_crops, tokens, stop))
        self.collecting.append(gc.isenabled())
        total = self._times()
        return SimpleNamespace(
            times={"T_total": total}, token_ids=[7] * tokens, peak_memory_bytes=None,
            kv_cache_bytes=12, timed_ms=total, prefill_length=None,
        )  # fmt: skip


def run(vlm: Any, requests: pd.DataFrame, settings: MeasurementOptions, **extra: Any) -> list[Any]:
    extra = {"fetch": picture, "progress": False, **extra}
    return [row for chunk in measure(vlm, requests, settings, **extra) for row in chunk]


def test_blocks_hold_every_request_once_in_orders_of_their_own() -> None:
    planned = plan(table(50), options(num_runs=3))
    assert planned["order_index"].tolist() == list(range(150))
    orders = []
    for block, runs in planned.groupby("block_index"):
        assert set(runs["request_id"]) == {f"r{i}" for i in range(50)}
        assert (runs["run_index"] == block).all()
        orders.append(runs["request_id"].tolist())
    assert orders[0] != orders[1] != orders[2]
    assert orders[0] != sorted(orders[0])
    assert planned.equals(plan(table(50), options(num_runs=3)))
    assert not planned.equals(plan(table(50), options(num_runs=3, seed=1)))


def test_ascending_order_repeats_each_request_at_once() -> None:
    planned = plan(table(3), options(num_runs=2, order="ascending"))
    assert planned["request_id"].tolist() == ["r0", "r0", "r1", "r1", "r2", "r2"]
    assert planned["run_index"].tolist() == [0, 1, 0, 1, 0, 1]


@given(st.integers(1, 20), st.integers(1, 4), st.integers(0, 30), st.sampled_from(["blocks", "ascending"]))  # fmt: skip
def test_every_planned_run_is_there_once(count: int, runs: int, noise: int, order: str) -> None:
    planned = plan(table(count), options(num_runs=runs, noise_repeats=noise, order=order))
    assert len(planned) == count * runs + min(noise, count)
    assert not planned.duplicated(["request_id", "run_index"]).any()
    assert planned["run_index"].max() == runs - (noise == 0)
    if order == "blocks":  # a repeat for noise is made after the request's other runs
        repeats = planned[planned["run_index"] == runs]
        assert (repeats["block_index"] == runs - 1).all()


def test_two_requests_of_one_id_are_refused() -> None:
    with pytest.raises(DataError, match="'r1' stands for two requests"):
        plan(table(3, request_id=["r1", "r2", "r1"]), options())


def test_rows_have_every_measured_column_that_is_known() -> None:
    vlm, log = Paper(), SessionLog()
    rows = run(
        vlm, table(4), options(num_runs=2), log=log, fingerprint="f", template="Q: {question}!"
    )
    assert json.loads(json.dumps(rows)) == rows
    unknown = {name for row in rows for name in row} - set(MEASURED_COLUMNS)
    assert not unknown
    measured = measured_table(rows)
    assert (measured["order_index"] == range(8)).all()
    assert (measured["status"] == "ok").all()
    assert (measured["num_language_tokens"] == 14).all()
    assert (measured["num_output_tokens"] == 3).all()
    assert (measured["generated_text"] == "7 7 7").all()
    assert (measured["fingerprint"] == "f").all()
    assert (measured["model"] == "paper").all()
    assert measured["image_id"].isna().all()
    assert (measured["T_preprocess"] > 0).all()
    assert measured["first_of_shape"].sum() == 1
    assert measured["first_of_shape"][0]
    assert set(vlm.prompts) == {"Q: what {is} this?!"}
    assert vlm.closed
    assert log.runs == 8
    assert log.measured_s == pytest.approx(8 * 5e-3)
    assert log.wall_s >= log.preprocess_s + log.warmup_s
    assert json.dumps(log.to_dict())


def test_what_is_done_is_not_measured_again_and_the_order_goes_on() -> None:
    requests = table(6)
    done = {("r1", 0), ("r4", 0)}
    rows = run(Paper(), requests, options(), done=done)
    assert {row["request_id"] for row in rows} == {"r0", "r2", "r3", "r5"}
    assert [row["order_index"] for row in rows] == [2, 3, 4, 5]
    rows = run(Paper(), table(8), options(), done=done, start_index=9)  # more samples than before
    assert [row["order_index"] for row in rows] == list(range(9, 15))


def test_with_nothing_left_nothing_is_touched() -> None:
    vlm = Paper()
    assert run(vlm, table(1), options(), done={("r0", 0)}) == []
    assert not vlm.closed


def test_chunks_are_no_larger_than_asked_for() -> None:
    chunks = list(measure(Paper(), table(10), options(chunk_size=4), fetch=picture, progress=False))
    assert [len(chunk) for chunk in chunks] == [4, 4, 2]


def failing(bad: set[str], error: Exception) -> Any:
    def fetch(row: Any) -> bytes:
        if row["request_id"] in bad:
            raise error
        return picture()

    return fetch


def test_a_failure_is_a_row_and_the_others_go_on() -> None:
    log = SessionLog()
    fetch = failing({"r2"}, DataError("image  r2 is\nmissing"))
    rows = run(Paper(), table(5), options(), fetch=fetch, log=log)
    (failed,) = (row for row in rows if row["status"] == "failed")
    assert failed["request_id"] == "r2"
    assert failed["error"] == "DataError: image r2 is missing"
    assert failed["wall_ms"] > 0
    assert len(rows) == 5
    assert log.failures == 1


def test_too_many_failures_stop_with_the_rows_measured_until_then() -> None:
    fetch = failing({f"r{i}" for i in range(50)}, DataError("gone"))
    rows: list[Any] = []
    with pytest.raises(MeasurementError, match=r"2 of 2 runs failed.*0\.01 of 50.*gone"):
        for chunk in measure(Paper(), table(50), options(), fetch=fetch, progress=False):
            rows += chunk
    assert [row["status"] for row in rows] == ["failed", "failed"]


def test_a_share_of_failures_is_allowed() -> None:
    fetch = failing({"r0", "r1", "r2"}, DataError("gone"))
    rows = run(Paper(), table(10), options(max_failures=0.3), fetch=fetch)
    assert sum(row["status"] == "failed" for row in rows) == 3


def test_out_of_memory_frees_what_it_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    emptied: list[bool] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append(True))
    fetch = failing({"r1"}, torch.OutOfMemoryError("tried to allocate 20 GiB"))
    rows = run(Paper(), table(3), options(), fetch=fetch)
    assert [row["error"] for row in rows if row["error"]] == [
        "OutOfMemoryError: tried to allocate 20 GiB"
    ]
    assert emptied


def test_an_interruption_comes_after_the_rows_measured_until_then() -> None:
    def fetch(row: Any) -> bytes:
        if len(vlm.prompts) == 4:
            raise KeyboardInterrupt
        return picture()

    vlm, log, rows = Paper(), SessionLog(), []
    with pytest.raises(KeyboardInterrupt):
        for chunk in measure(
            vlm, table(9), options(warmup_runs=0), fetch=fetch, log=log, progress=False
        ):
            rows += chunk
    assert len(rows) == 3  # the fourth prompt was the warm-up's
    assert log.interrupted
    assert vlm.closed
    assert gc.isenabled()


def test_an_abandoned_measurement_cleans_up() -> None:
    vlm = Paper()
    chunks = measure(vlm, table(9), options(chunk_size=2), fetch=picture, progress=False)
    next(chunks)
    assert not gc.isenabled()
    chunks.close()
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0
    assert vlm.closed
    assert set(vlm.collecting) == {False}


def test_bytes_are_fetched_once_per_image_and_decoded_every_time() -> None:
    fetched: list[str] = []

    def fetch(row: Any) -> bytes:
        fetched.append(row["image_recipe"])
        return picture()

    vlm = Paper()
    run(vlm, table(3), options(num_runs=4, warmup_runs=0), fetch=fetch)
    assert sorted(fetched) == ["0", "1", "2"]
    assert len(vlm.prompts) == 12 + 1


def test_the_cache_of_bytes_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(session, "IMAGE_CACHE_BYTES", 10)
    fetched: list[str] = []

    def fetch(request: Any) -> bytes:
        fetched.append(request["image_path"])
        return b"1234"

    cache = session.cached(fetch)
    for name in "aabcab":
        assert cache({"image_path": name}) == b"1234"
    assert fetched == ["a", "b", "c", "a", "b"]
    monkeypatch.setattr(session, "IMAGE_CACHE_BYTES", 3)
    assert session.cached(fetch)({"image_path": "larger than all of it"}) == b"1234"


def test_every_shape_is_warmed_the_largest_first_with_short_outputs() -> None:
    sizes = {"0": 3, "1": 12, "2": 7, "3": 12}
    requests = table(4, image_width=[3, 12, 7, 12], output_length=["40", "9", "9", "9"])
    times = iter([90.0, 50.0, 49.0, 30.0, 30.0, 20.0, 21.0, *[10.0] * 4])
    vlm = Paper(times.__next__, lambda width, height: counts(width, 16 * width))
    log = SessionLog()
    data = {"0": 3, "1": 12, "2": 7, "3": 12}

    def fetch(row: Any) -> bytes:
        file = io.BytesIO()
        Image.new("RGB", (data[row["image_recipe"]], 10)).save(file, "PNG")
        return file.getvalue()

    run(vlm, requests, options(warmup_runs=3), fetch=fetch, log=log)
    assert vlm.calls[:7] == [(12, 3, False)] * 3 + [(7, 3, False)] * 2 + [(3, 3, False)] * 2
    assert [(entry["num_crops"], entry["runs"]) for entry in log.warmup] == [
        (12, 3),
        (7, 2),
        (3, 2),
    ]
    assert all(entry["plateau"] for entry in log.warmup)
    assert sorted(crops for crops, *_ in vlm.calls[7:]) == sorted(sizes.values())
    assert log.measured_s == pytest.approx(4 * 10e-3)  # warm-up is not what is measured


def test_a_shape_that_never_settles_is_capped_and_said_so() -> None:
    faster = iter(range(1000, 0, -100))
    log = SessionLog()
    run(Paper(lambda: float(next(faster))), table(1), options(warmup_max_runs=4), log=log)
    (entry,) = log.warmup
    assert entry["runs"] == 4
    assert not entry["plateau"]
    assert (entry["first_ms"], entry["last_ms"]) == (1000, 700)


def test_models_without_tiles_are_warmed_by_steps_of_patches() -> None:
    requests = table(40, image_width=range(100, 140))
    shapes = lambda width, height: counts(1, width * 10, tiled=False)  # noqa: E731
    vlm, log = Paper(shape=shapes), SessionLog()
    run(vlm, requests, options(), log=log)
    assert 2 <= len(log.warmup) <= 4  # 1000 to 1390 patches: two quarters of an octave


def test_a_fixed_warm_up_runs_the_first_request() -> None:
    vlm, log = Paper(), SessionLog()
    run(vlm, table(3), options(warmup="fixed", warmup_runs=5), log=log)
    assert len(vlm.calls) == 5 + 3
    assert [entry["runs"] for entry in log.warmup] == [5]


def test_a_request_that_breaks_the_warm_up_fails_in_its_own_row() -> None:
    log = SessionLog()
    fetch = failing({"r0"}, DataError("gone"))
    rows = run(Paper(), table(1), options(), fetch=fetch, log=log)
    assert log.warmup[0]["error"] == "DataError: gone"
    assert rows[0]["status"] == "failed"


@pytest.mark.parametrize(
    ("times", "at_least", "warm"),
    [
        ([], 0, True),
        ([], 1, False),
        ([50.0], 1, False),
        ([50.0, 48.0], 2, True),
        ([50.0, 47.0], 2, False),
        ([50.0, 47.0], 3, False),
        ([90.0, 47.0, 60.0], 3, True),
        ([0.0, 0.0], 2, True),
    ],
)
def test_plateau(times: list[float], at_least: int, warm: bool) -> None:
    assert plateau(times, at_least) is warm


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("none", (1, False)),
        ("12", (12, False)),
        ("≤12", (12, True)),
        ("natural", (16, True)),
        ("answer", (3, False)),
    ],
)
def test_output_rules(rule: str, expected: tuple[int, bool]) -> None:
    request = {"output_length": rule, "answer": "a red car"}
    assert output_rule(request, MeasurementOptions(), lambda text: len(text.split())) == expected


def test_an_answer_has_at_least_one_token_and_must_be_there() -> None:
    request: dict[str, Any] = {"output_length": "answer", "answer": ""}
    assert output_rule(request, MeasurementOptions(), len) == (1, False)
    with pytest.raises(DataError, match="output_length=answer needs"):
        output_rule({**request, "answer": None}, MeasurementOptions(), len)
    rows = run(Paper(), table(1, answer=None, output_length="answer"), options())
    assert rows[0]["status"] == "failed"


def test_real_models_are_measured_with_the_chosen_threads(llava: Any) -> None:
    vlm, prepared = llava
    threads: list[int] = []
    prepared = type(prepared)(prepared.inputs, counts())

    def prepare(image: Any, prompt: str) -> Any:
        threads.append(torch.get_num_threads())
        return prepared

    vlm.options = ModelOptions(name="llava", num_threads=1)
    vlm.architecture = SimpleNamespace(image_tokens=lambda *_: counts(), max_positions=None)
    vlm.prepare, vlm.place = prepare, lambda prepared: prepared
    vlm.decode, vlm.count_tokens = str, len
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        rows = run(vlm, table(3), options(num_runs=2))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert set(threads) == {1}
    frame = measured_table(rows)
    assert (frame["status"] == "ok").all(), frame["error"][0]
    parts = frame[list(COMPONENTS)].sum(axis=1)
    assert np.allclose(parts, frame["T_total"], atol=1e-9)
    assert (frame["wall_ms"] > frame["T_total"] + frame["T_preprocess"]).all()


@pytest.mark.parametrize("engine", ["static", "compiled"])
def test_one_cache_length_fits_every_run(engine: str) -> None:
    vlm = Paper()
    vlm.options = ModelOptions(name="paper", engine=engine)
    open_session = Session(vlm, options(), picture, "{question}", SessionLog())
    rows = table(3, output_length=["3", "200", "9"]).to_dict("records")
    assert open_session._cache_length(rows) == 320  # 16 + 2 + 3 + 200 tokens, to 64, and 64 more
    open_session.close()


def test_a_command_that_goes_on_keeps_the_cache_length(monkeypatch: Any) -> None:
    """Attention runs over the whole static cache: another length is another measurement."""
    lengths = []

    def make_meter(vlm: Any, method: str, engine: str, length: int, nvtx: bool) -> Any:
        lengths.append(length)
        return paper

    monkeypatch.setattr("vlm_latency.instrument.methods.make_meter", make_meter)
    paper = Paper()
    paper.options = ModelOptions(name="paper", engine="static")
    paper.meter = lambda make: make(paper)
    requests = table(3, output_length=["3", "200", "9"])
    for done in (set(), {("r1", 0)}):
        run(paper, requests, options(), done=done)
    assert lengths == [320, 320]
