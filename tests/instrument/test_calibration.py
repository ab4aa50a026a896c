from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from vlm_latency.errors import MeasurementError
from vlm_latency.instrument import calibration
from vlm_latency.instrument.calibration import calibrate, ceilings, verdict
from vlm_latency.instrument.clock import resolution_ns
from vlm_latency.instrument.injection import COMPONENTS, Delay, delayed, replayed_encoder
from vlm_latency.instrument.methods import METERS, make_meter
from vlm_latency.options import CalibrationOptions, ModelOptions

CPU = torch.device("cpu")
QUICK = CalibrationOptions(
    pairs=3, aa_comparisons=4, aa_pairs=3, delays_ms=(1.0, 3.0), injections=2, method_requests=2,
    output_tokens=3, ceiling_seconds=0.02,
)  # fmt: skip


@pytest.fixture
def loaded(llava: Any) -> Any:
    """The tiny model with all that the calibration asks of a loaded one."""
    vlm, prepared = llava
    vlm.options = ModelOptions(name="llava")
    vlm.prepare, vlm.place = lambda image, prompt: prepared, lambda prepared: prepared
    vlm.count_tokens = len
    return vlm, prepared


@pytest.mark.parametrize("component", COMPONENTS)
def test_an_injected_delay_is_in_its_component(family: Any, component: str) -> None:
    """The component lasts at least as long as the delay in it, and was shorter before."""
    vlm, prepared = family
    vlm.options = ModelOptions()
    delay = Delay(CPU)
    meter = make_meter(vlm)
    plain = meter(prepared, 4)

    def hooks() -> list[int]:
        return [len(module._forward_hooks) for module in vlm.model.modules()]

    before = hooks()
    with delayed(vlm, component, 20.0, delay):
        reading = meter(prepared, 4)
    assert delay.length_ms() >= 20
    assert reading.times[component] >= delay.length_ms()
    assert reading.token_ids == plain.token_ids
    if component == "T_LLM_decode":
        assert reading.times["decode_step_ms"][1] >= delay.length_ms()
    assert hooks() == before


def test_a_replayed_encoder_computes_nothing_and_changes_no_token(llava: Any) -> None:
    vlm, prepared = llava
    meter = make_meter(vlm)
    expected = meter(prepared, 5).token_ids
    ran: list[int] = []
    first = next(iter(vlm.components.vision_encoder.children()))
    handle = first.register_forward_hook(lambda *_: ran.append(1))
    with replayed_encoder(vlm, lambda: meter(prepared, 1)) as replayed:
        assert replayed
        assert len(ran) == 1
        assert meter(prepared, 5).token_ids == expected
        assert meter(prepared, 5).token_ids == expected
        assert len(ran) == 1
    meter(prepared, 1)
    assert len(ran) == 2
    handle.remove()


def test_an_encoder_with_the_projector_inside_is_not_replayed(qwen: Any) -> None:
    vlm, _ = qwen
    with replayed_encoder(vlm, lambda: None) as replayed:
        assert not replayed


def case(own: list[float], delay: float = 10.0, **elsewhere: Any) -> str:
    """The state of 12 pairs with these errors of the projector, and these everywhere else."""
    others = {name: elsewhere.get(name, 0.0) for name in (*COMPONENTS, "T_other")}
    del others["T_projector"]
    rows = [
        {
            "component": "T_projector",
            "delay_ms": delay,
            "injected_ms": delay,
            "recovered_ms": delay + error,
            "elsewhere_ms": {name: float(np.broadcast_to(v, 12)[i]) for name, v in others.items()},
        }
        for i, error in enumerate(own)
    ]
    return str(calibration._case(rows, "T_projector", delay)["state"])


def test_states_of_a_recovery() -> None:
    assert case([0.1] * 12) == "recovered"
    assert case([-0.19] * 12, T_LLM_prefill=0.1, T_vision_encoder=-0.1) == "recovered"
    assert case([0.1] * 12, T_LLM_prefill=0.3) == "disturbed"  # it runs after the projector
    assert case([0.1] * 12, T_LLM_prefill=-0.3) == "missed"  # no pause makes it faster
    noise = np.linspace(-2, 3, 12)  # a median of 0.5, and nothing that is sure
    assert case([0.1] * 12, T_LLM_prefill=noise) == "undecided"
    assert case([0.1] * 12, T_vision_encoder=0.3) == "missed"  # it has run before
    assert case([0.3] * 12) == "missed"
    assert case([-0.3] * 12) == "missed"
    assert case(list(np.linspace(-1, 2, 12))) == "undecided"
    assert case([0.4] * 12, delay=50.0) == "recovered"  # 1 % of 50 ms


def test_false_alarms_come_from_blocks_of_their_own() -> None:
    generator = np.random.default_rng(0)
    noise = np.random.default_rng(1)
    runs: list[float] = []

    def run() -> Any:
        runs.append(float(noise.lognormal(0, 0.1)))
        return SimpleNamespace(times={"T_total": runs[-1]})

    found = calibration.false_alarms(run, 200, 20, generator, seconds=60)
    assert found["runs"] == len(runs) == 8000
    assert found["blocks"] == found["n_comparisons"] == 200
    assert 0.01 <= found["share"]["value"] <= 0.1
    found = calibration.false_alarms(run, 30, 4, generator, seconds=0)  # no time: one block
    assert (found["blocks"], found["runs"], found["n_comparisons"]) == (1, 8, 30)


def test_the_time_of_a_proof_is_bounded(llava: Any) -> None:
    vlm, prepared = llava
    meter, generator = make_meter(vlm), np.random.default_rng(0)

    def pairs(seconds: float) -> int:
        found = calibration.overhead(meter, prepared, 2, 9, generator, seconds)
        return int(found["overhead"]["n_pairs"])

    assert pairs(0) == 6  # the fewest of which the interval has two ends
    assert pairs(600) == 9


def test_below_zero_counts_signed_values_and_closure_the_clamped() -> None:
    seed = {
        "T_vision_total": 10.0, "T_vision_encoder": 12.0, "T_projector": 0.0, "T_LLM_prefill": 3.0,
        "T_LLM_decode": 0.0, "T_other": -3.0, "T_total": 9.0, "decode_step_ms": None,
        "raw_T_projector": -2.0, "raw_T_LLM_prefill": 3.0, "raw_T_LLM_decode": -4.0,
    }  # fmt: skip
    fine = {**seed, "raw_T_projector": 1.0}
    assert calibration._below_zero([seed, fine]) == {
        "T_projector": 0.5,
        "T_LLM_prefill": 0.0,
        "T_LLM_decode": 1.0,
    }
    assert calibration._closure(seed) == 12 + 0 + 3 + 0 - 9
    one_pass = {**seed, "T_vision_encoder": 10.0, "T_other": -4.0, "decode_step_ms": [0.0]}
    assert calibration._closure(one_pass) == 0


def test_ceilings_are_measured_on_any_device() -> None:
    found = ceilings("cpu", "float32", threads=1, seconds=0.03)
    assert json.loads(json.dumps(found)) == found
    for name in ("flops_per_s", "bytes_per_s", "launch_overhead_us"):
        assert found[name] > 0
        assert found["intervals"][name]["value"] == found[name]
    assert (found["device"], found["dtype"], found["threads"]) == ("cpu", "float32", 1)
    assert found["measured_at"].endswith("+00:00")


def test_the_clock_has_a_resolution() -> None:
    found = resolution_ns(500)
    assert 0 < found["smallest_step_ns"] <= 1e6


def estimate(value: float, low: float, high: float) -> dict[str, Any]:
    return {"value": value, "low": low, "high": high}


def results(**changes: Any) -> dict[str, Any]:
    """What a quiet machine gives."""
    ratio = {"n_pairs": 20, "baseline_mean": 120.0}
    share = {"alarms": 10, "n_comparisons": 200, "nominal": 0.05, "runs": 8000}
    statistics = {
        "null": {**ratio, "ratio": estimate(1.0, 0.995, 1.004)},
        "overhead": {**ratio, "ratio": estimate(1.002, 0.998, 1.006)},
        "remainder": estimate(0.02, 0.01, 0.03),
        "false_alarms": {**share, "share": estimate(0.05, 0.024, 0.09)},
        "methods": {
            "subtraction": {
                "below_zero": {"T_projector": 0.46, "T_LLM_prefill": 0.0},
                "closure_ms": estimate(21.7, 20, 23),
                "wall_ratio": estimate(2.2, 2.1, 2.3),
            }
        },
    }
    cases = [{"component": "T_projector", "delay_ms": 2.0, "state": "recovered"}]
    found = {"known_truth": {"cases": cases}, "warmup": {"plateau": True, "runs": 3}}
    return {**found, "statistics": {**statistics, **changes.pop("statistics", {})}, **changes}


def test_verdict_of_a_quiet_machine() -> None:
    said = verdict(results())
    assert said[0] == (
        "the null ratio spans 0.995–1.004 here: differences under 0.5% cannot be seen with 20 pairs"
    )
    assert "not told from none; the target, at most 1.05, is met" in said[1]
    assert said[2].startswith("1 of 1 injected delays are recovered")
    assert "T_projector in 46%" in said[5]
    assert "T_LLM_prefill" not in said[5]
    assert "2.20 (2.10 to 2.30) times the wall time" in said[5]
    assert said[6] == "warm after 3 runs"


def test_verdict_of_a_noisy_machine_says_what_cannot_be_seen() -> None:
    noisy = {"null": {"n_pairs": 20, "ratio": estimate(1.0, 0.93, 1.08)}}
    assert verdict(results(statistics=noisy))[0] == (
        "the null ratio spans 0.930–1.080 here: differences under 8.0% cannot be seen with 20 "
        "pairs; use more pairs or a quieter machine"
    )


@pytest.mark.parametrize(
    ("mean", "low", "high", "words"),
    [
        (100.0, 1.02, 1.04, "is met"),
        (600.0, 1.02, 1.04, "at most 1.01, is missed"),
        (100.0, 1.02, 1.07, "cannot be said with these pairs"),
    ],
)
def test_verdict_on_overhead(mean: float, low: float, high: float, words: str) -> None:
    overhead = {"ratio": estimate((low + high) / 2, low, high), "baseline_mean": mean}
    assert verdict(results(statistics={"overhead": overhead}))[1].endswith(words)


def test_verdict_names_what_was_not_recovered() -> None:
    cases = [
        {"component": "T_projector", "delay_ms": 2.0, "state": "missed"},
        {"component": "T_LLM_decode", "delay_ms": 50.0, "state": "disturbed", "after_ms": 0.74},
    ]
    said = verdict(results(known_truth={"cases": cases}))[2]
    assert said.startswith("1 of 2")
    assert "0 of them with no trace elsewhere" in said
    assert "after the other 1, what runs next is slower by up to 0.7 ms" in said
    assert said.endswith("missed (the error is certain): T_projector 2 ms")


def test_verdict_distrusts_wrong_alarm_rates_only_when_it_can_tell() -> None:
    alarms = {**results()["statistics"]["false_alarms"], "share": estimate(0.16, 0.11, 0.22)}
    assert "do not trust" in verdict(results(statistics={"false_alarms": alarms}))[4]
    few = {**alarms, "n_comparisons": 4}
    assert verdict(results(statistics={"false_alarms": few}))[4].endswith("too few to tell")


def test_a_calibration_proves_everything(loaded: Any) -> None:
    vlm, _ = loaded
    requests = pd.DataFrame(
        {
            "request_id": ["a", "b", "c"],
            "question": "what?",
            "image_recipe": None,
            "output_length": ["3", "none", "5"],
        }
    )
    fetched: list[str] = []

    def fetch(row: Any) -> bytes:
        fetched.append(row["request_id"])
        return calibration._noise_image("1x1")

    found = calibrate(
        vlm, QUICK, requests, fetch, template="q: {question}", known_ceilings={"a": 1}
    )
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert fetched == ["a", "b"]
    assert found["ceilings"] == {"a": 1}
    assert found["runs"].pop("warmup") >= 3
    assert found["runs"] == {"overhead": 9, "known_truth": 32, "a_a": 24, "methods": 8}
    assert len(found["injections"]) == len(COMPONENTS) * 2 * 2
    assert {row["component"] for row in found["injections"]} == set(COMPONENTS)
    statistics = found["statistics"]
    assert set(statistics["methods"]) == set(METERS)
    assert not any(statistics["methods"]["timeline"]["below_zero"].values())
    assert statistics["methods"]["timeline"]["closure_ms"]["value"] == pytest.approx(0, abs=1e-9)
    assert statistics["methods"]["timeline"]["difference_ms"]["T_total"]["value"] == 0
    assert statistics["overhead"]["n_pairs"] == statistics["null"]["n_pairs"] == 3
    assert 0 < statistics["remainder"]["value"] < 1
    assert len(found["verdict"]) == 9


def test_the_figure_draws_what_a_calibration_finds(loaded: Any) -> None:
    from vlm_latency.plots.calibration import calibration as draw
    from vlm_latency.plots.style import FigureContext, Style

    vlm, _ = loaded
    requests = pd.DataFrame({"request_id": ["a"], "question": "q", "output_length": "3"})
    found = calibrate(vlm, QUICK, requests, lambda _: calibration._noise_image("1x1"))
    context = FigureContext(environment_line="here", marks=(), model="llava")
    figure = draw(pd.DataFrame(found["injections"]), found["statistics"], context, Style())
    assert len(figure.axes) == 6


def test_the_null_model_has_nothing_to_calibrate() -> None:
    from vlm_latency.models import load

    with pytest.raises(MeasurementError, match=r"found model\.name=null"):
        calibrate(load(ModelOptions(name="null-model")), QUICK, pd.DataFrame(), lambda _: b"")


@pytest.mark.gpu
def test_a_sleep_kernel_is_recovered_on_a_gpu(loaded: Any) -> None:
    vlm, prepared = loaded
    vlm.device = torch.device("cuda", 0)
    vlm.model.to(vlm.device)
    placed = type(prepared)({name: value.to(vlm.device) for name, value in prepared.inputs.items()})
    delay = Delay(vlm.device)
    meter = make_meter(vlm)
    meter(placed, 3)
    for component in COMPONENTS:
        with delayed(vlm, component, 20.0, delay):
            times = meter(placed, 3).times
        assert times[component] >= delay.length_ms()
        assert times["T_total"] >= delay.length_ms()
