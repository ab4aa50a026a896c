"""Lengths that a device plans for when it meets them first: found by trying, and then not measured."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pandas as pd
import pytest

from vlm_latency.instrument.lengths import Met, Novelty, found_in_runs, summary
from vlm_latency.instrument.protocol import measure
from vlm_latency.instrument.session import SessionLog
from vlm_latency.options import CAPTURED, MeasurementOptions, ModelOptions
from vlm_latency.records import measured_table
from vlm_latency.statistics import mark_outliers

from .test_protocol import picture

IMAGE_TOKENS, TEMPLATE_TOKENS = 20, 9
PREFILL_MS, STEP_MS = 20.0, 10.0


class Planner:
    """A model whose device makes a plan for every length that it meets, if that costs anything."""

    device = "cpu"

    def __init__(
        self, prompt_ms: float = 40.0, key_ms: float = 30.0, engine: str = "eager"
    ) -> None:
        self.options = ModelOptions(name="planner", engine=engine)
        self.architecture = SimpleNamespace(
            image_tokens=lambda *_: self._counts(IMAGE_TOKENS), max_positions=None, name="fake"
        )
        self.costs = {"prompt": prompt_ms, "key": key_ms}
        self.planned: set[tuple[str, int]] = set()
        self.calls: list[tuple[int, int]] = []
        self.odd: set[str] = set()  # prompts that are longer than anybody would think

    @staticmethod
    def _counts(total: int) -> SimpleNamespace:
        return SimpleNamespace(
            num_crops=2, tiling_rows=1, tiling_cols=1, num_vision_patches=32,
            num_vision_tokens=IMAGE_TOKENS, num_image_special_tokens=0, num_total_tokens=total,
        )  # fmt: skip

    def meter(self, make: Any) -> Planner:
        if self.options.engine in CAPTURED:
            self.planned.clear()  # its graphs are this meter's
        return self

    def set_threads(self, count: int) -> int:
        return count

    def close(self) -> None:
        pass

    def prepare(self, image: Any, prompt: str) -> Any:
        more = 100 if prompt in self.odd else 0
        length = IMAGE_TOKENS + TEMPLATE_TOKENS + self.count_tokens(prompt) + more
        return SimpleNamespace(counts=self._counts(length))

    def place(self, prepared: Any) -> Any:
        return prepared

    def count_tokens(self, text: str) -> int:
        return len(text.split())

    def decode(self, token_ids: list[int]) -> str:
        return ""

    def _plan(self, kind: str, length: int) -> float:
        new = (kind, length) not in self.planned
        self.planned.add((kind, length))
        return self.costs[kind] if new else 0.0

    def __call__(self, prepared: Any, tokens: int, stop: bool = False) -> Any:
        length = prepared.counts.num_total_tokens
        self.calls.append((length, tokens))
        jitter = 0.01 * (len(self.calls) % 7)  # what a steady machine shows
        prefill = PREFILL_MS + jitter + self._plan("prompt", length)
        steps = [
            STEP_MS + jitter + (self._plan("key", key) if self.options.engine == "eager" else 0.0)
            for key in range(length + 1, length + tokens)
        ]
        times = {
            "T_vision_encoder": 1.0, "T_projector": 0.0, "T_LLM_prefill": prefill - 1,
            "T_first_token": prefill, "T_LLM_decode": sum(steps), "decode_step_ms": steps,
            "T_total": prefill + sum(steps),
        }  # fmt: skip
        return SimpleNamespace(
            times=times, token_ids=[7] * tokens, peak_memory_bytes=None, kv_cache_bytes=0,
            timed_ms=times["T_total"], prefill_length=None,
        )  # fmt: skip


def requests(words: range, output_length: str = "4") -> pd.DataFrame:
    return pd.DataFrame(
        {
            "request_id": [f"r{count}" for count in words],
            "question": [" ".join(["word"] * count) for count in words],
            "answer": "a",
            "image_recipe": "0",
            "image_width": 20,
            "image_height": 10,
            "output_length": output_length,
        }
    )


def run(vlm: Planner, table: pd.DataFrame, **changes: Any) -> tuple[pd.DataFrame, dict[str, Any]]:
    settings = {"method": "timeline", "order": "blocks", "warmup": "plateau", "lengths": "warm"}
    log = SessionLog()
    options = MeasurementOptions(**{**settings, "warmup_runs": 1, **changes})
    chunks = measure(vlm, table, options, fetch=picture, progress=False, log=log)
    return measured_table([row for chunk in chunks for row in chunk]), log.to_dict()


def test_where_new_lengths_cost_all_are_visited_before_they_are_measured() -> None:
    vlm = Planner()
    rows, log = run(vlm, requests(range(1, 31)))
    assert not rows["first_of_length"].any()
    assert (rows["new_kv_lengths"] == 0).all()
    assert rows["T_total"].max() < PREFILL_MS + 3 * STEP_MS + 1
    found = log["lengths"]
    assert found["mode"] == "warm"
    assert found["prompt"]["costs"] and found["key"]["costs"]
    assert found["prompt"]["pairs"] == 6
    assert found["prompt"]["cost_ms"]["value"] == pytest.approx(40, abs=0.1)
    assert found["prompt"]["parts_ms"]["T_LLM_prefill"]["value"] == pytest.approx(40, abs=0.1)
    assert found["prompt"]["parts_ms"]["T_vision_encoder"]["value"] == 0
    assert "T_LLM_prefill" in found["prompt"]["sentence"]
    assert found["key"]["cost_ms"]["low"] == pytest.approx(30, abs=0.1)
    assert found["visited"] == {"prompts": 30, "keys": 32}
    assert found["late"] == 0
    assert len(vlm.calls) < 30 + 30 + 20  # each length once, and what was tried twice


def test_where_new_lengths_cost_nothing_no_time_is_spent_on_them() -> None:
    vlm = Planner(prompt_ms=0.0, key_ms=0.0)
    rows, log = run(vlm, requests(range(1, 31)))
    assert len(vlm.calls) == 2 + 12 + 2 + 30  # the shape, six prompts and one stretch of keys twice
    assert log["lengths"]["prompt"]["costs"] is False
    assert log["lengths"]["key"]["costs"] is False
    assert "costs nothing to speak of" in log["lengths"]["prompt"]["sentence"]
    assert rows["first_of_length"].sum() == 30 - 8  # they were new, and it made no difference


def test_one_part_may_cost_and_the_other_not() -> None:
    rows, log = run(Planner(prompt_ms=0.0), requests(range(1, 31)))
    assert log["lengths"]["prompt"]["costs"] is False
    assert log["lengths"]["key"]["costs"] is True
    assert (rows["new_kv_lengths"] == 0).all()


def test_a_long_output_is_covered_by_one_request() -> None:
    vlm = Planner()
    rows, _ = run(vlm, requests(range(1, 6), "200"), num_runs=1)
    assert (rows["new_kv_lengths"] == 0).all()
    long = [tokens for _, tokens in vlm.calls[: -len(rows)] if tokens > 50]
    assert len(long) == 1


def test_cold_keeps_first_visits_and_the_runs_tell_their_cost() -> None:
    rows, log = run(Planner(), requests(range(1, 31)), lengths="cold", num_runs=3)
    assert log["lengths"]["mode"] == "cold"
    assert log["lengths"]["prompt"]["pairs"] == 0
    assert rows["first_of_length"].sum() == 29  # one was met while its shape was warmed
    prompt, key = found_in_runs(rows)
    assert prompt.to_dict()["cost_ms"]["value"] == pytest.approx(40, abs=0.1)
    assert key.to_dict()["cost_ms"]["value"] == pytest.approx(30, abs=0.1)
    told = summary(rows, [log])
    assert told["costs"] is True
    assert told["prompt"]["sentence"] == prompt.to_dict()["sentence"]
    marks = mark_outliers(rows)
    first = rows["first_of_length"].astype(bool)
    assert set(marks["outlier_cause"][first & ~rows["first_of_shape"]]) == {
        "first visit of a length"
    }
    assert not marks["outlier"][~first & (rows["new_kv_lengths"] == 0)].any()
    blameless = mark_outliers(rows, lengths_cost=False)["outlier_cause"]
    assert "first visit of a length" not in set(blameless)


def test_what_a_session_has_met_the_next_one_knows() -> None:
    vlm = Planner()
    run(vlm, requests(range(1, 31)))
    calls = len(vlm.calls)
    rows, log = run(vlm, requests(range(11, 21)))
    assert not rows["first_of_length"].any()
    assert len(vlm.calls) == calls + 2 + 10
    assert log["lengths"]["prompt"]["pairs"] == 6  # and what it costs
    assert run(Planner(), requests(range(1, 31)))[1]["lengths"]["visited"]["prompts"] == 30


def test_graphs_that_went_with_a_session_are_captured_anew_before_the_next_ones_runs() -> None:
    vlm = Planner(engine="loop")
    vlm.architecture.max_positions = 512
    for words in (range(1, 31), range(11, 21)):
        rows, log = run(vlm, requests(words))
        assert not rows["first_of_length"].any()
        assert rows["T_first_token"].max() < PREFILL_MS + 1
        assert log["lengths"]["late"] == 0
        assert log["lengths"]["visited"]["prompts"] == len(words)


def test_a_length_that_was_not_foreseen_is_visited_before_its_run() -> None:
    vlm = Planner()
    table = requests(range(1, 31))
    vlm.odd = {table["question"][5], table["question"][17]}
    rows, log = run(vlm, table)
    assert log["lengths"]["late"] > 0
    assert not rows["first_of_length"].any()
    assert (rows["new_kv_lengths"] == 0).all()


def test_a_static_cache_has_no_new_key_lengths() -> None:
    vlm = Planner(engine="static")
    vlm.architecture.max_positions = 512
    rows, log = run(vlm, requests(range(1, 31)))
    assert log["lengths"]["key"]["pairs"] == 0
    assert log["lengths"]["prompt"]["costs"] is True
    assert (rows["new_kv_lengths"] == 0).all()
    assert not rows["first_of_length"].any()


def test_nothing_is_visited_where_nothing_is_warmed() -> None:
    vlm = Planner()
    rows, _ = run(vlm, requests(range(1, 6)), warmup_runs=0)
    assert len(vlm.calls) == 5
    assert rows["first_of_length"].all()


def test_few_lengths_cost_only_if_each_of_them_does() -> None:
    assert not Novelty("prompt length").costs
    assert Novelty("prompt length", [60.0, 55.0], [20.0, 20.0]).costs
    assert not Novelty("prompt length", [60.0, 20.0], [20.0, 20.0]).costs
    noisy = Novelty("prompt length", [60.0, 20, 21, 19, 20, 22], [20.0] * 6)
    assert not noisy.costs  # one slow run is no cost
    assert not Novelty("prompt length", [20.9] * 6, [20.0] * 6).costs  # under 5 %
    assert Novelty("prompt length", [21.2] * 6, [20.0] * 6).costs


def test_what_was_met_is_kept_on_the_model() -> None:
    vlm = SimpleNamespace()
    counts = SimpleNamespace(num_crops=1, num_vision_patches=4, num_total_tokens=9)
    assert Met.of(vlm).note(counts, range(10, 12)) == (True, 2)
    assert Met.of(vlm).note(counts, range(11, 13)) == (False, 1)
    assert Met.of(SimpleNamespace()).note(counts, range(0)) == (True, 0)


def test_warming_up_is_shown_and_has_no_part_in_the_rate(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    options = MeasurementOptions(
        method="timeline", order="blocks", warmup="plateau", lengths="warm", warmup_runs=1
    )
    vlm = Planner(engine="compiled")
    bars: list[float] = []
    from vlm_latency.instrument import protocol

    class Slow(protocol._WarmingUp):
        mininterval = 0.0

        def say(self, text: str) -> None:
            super().say(text)
            self.refresh()

    class Noted(protocol.Progress):
        def __init__(self, **options: Any) -> None:
            super().__init__(**options)
            bars.append(len(vlm.calls))

    monkeypatch.setattr(protocol, "_WarmingUp", Slow)
    monkeypatch.setattr(protocol, "Progress", Noted)
    list(measure(vlm, requests(range(1, 31)), options, fetch=picture))
    shown = capsys.readouterr().err
    assert "compiling the decode step" in shown
    assert "trying new lengths: 3 of 6" in shown
    assert "warming up: 12 of 23 lengths" in shown
    assert bars == [len(vlm.calls) - 30]  # the clock of the runs starts when warming is over
    assert "30/30" in shown
