from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from vlm_latency.errors import MeasurementError
from vlm_latency.instrument.calibration import calibrate, verdict
from vlm_latency.instrument.calibration.bench import Bench, rounds_needed
from vlm_latency.instrument.calibration.known_truth import Case, judge
from vlm_latency.instrument.calibration.proofs import below_zero, closure, false_alarms, overhead
from vlm_latency.instrument.ceilings import ceilings
from vlm_latency.instrument.clock import resolution_ns
from vlm_latency.instrument.injection import (
    DELAYED,
    DeviceSleep,
    HostSpin,
    delayed,
    delays,
    leads,
    regime,
    replayed_encoder,
)
from vlm_latency.instrument.methods import METERS, make_meter, unable
from vlm_latency.instrument.timeline import Mark
from vlm_latency.option_groups import CalibrationOptions
from vlm_latency.options import ModelOptions
from vlm_latency.vqa import image_bytes
from vlm_latency.vqa.images import noise_recipe

QUICK = CalibrationOptions(
    pairs=3, half_width=9, aa_comparisons=4, aa_pairs=3, delays_ms=(1.0, 3.0), injections=2,
    method_requests=2, output_tokens=3, ceiling_seconds=0.02, proof_seconds=0.01,
)  # fmt: skip


@pytest.fixture
def loaded(llava: Any) -> Any:
    """The tiny model with all that the calibration asks of a loaded one."""
    vlm, prepared = llava
    vlm.options = ModelOptions(name="llava")
    vlm.prepare, vlm.place = lambda image, prompt: prepared, lambda prepared: prepared
    vlm.count_tokens = len
    shape = {"num_crops": 1, "tiling_rows": 1, "num_vision_patches": 16}
    tokens = {"num_vision_tokens": 16, "num_image_special_tokens": 0, "num_total_tokens": 20}
    counts = SimpleNamespace(**shape, **tokens)
    vlm.architecture = SimpleNamespace(
        image_tokens=lambda width, height: counts,
        image_size_for=lambda rows, cols: (336, 336),
        simulated=False,
    )
    vlm.meter, vlm.set_threads = lambda make: make(vlm), lambda count: count
    object.__setattr__(prepared, "counts", counts)
    return vlm, prepared


def image(_: Any) -> bytes:
    return image_bytes({"image_recipe": noise_recipe(0, 336, 336)}, None)


@pytest.mark.parametrize("where", ["start", "end"])
@pytest.mark.parametrize("component", DELAYED)
def test_an_injected_delay_is_in_its_component(family: Any, component: str, where: Any) -> None:
    """The component lasts at least as long as the delay in it, and was shorter before."""
    vlm, prepared = family
    vlm.options = ModelOptions()
    delay = HostSpin()
    meter = make_meter(vlm)
    plain = meter(prepared, 4)

    def hooks() -> list[int]:
        return [len(module._forward_hooks) for module in vlm.model.modules()]

    before = hooks()
    with delayed(vlm, component, 20.0, delay, where):
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


def judged(own: list[float], delay: float = 10.0, hides: bool = False, **elsewhere: Any) -> Any:
    """What comes of 12 pairs with these errors of the projector, and these everywhere else."""
    others = {name: elsewhere.get(name, 0.0) for name in (*DELAYED, "T_other")}
    del others["T_projector"]
    rows = [
        {
            "injected_ms": delay,
            "recovered_ms": delay + error,
            "elsewhere_ms": {name: float(np.broadcast_to(v, 12)[i]) for name, v in others.items()},
        }
        for i, error in enumerate(own)
    ]
    return judge(Case("T_projector", "host", "end", delay, hides), rows)


def state(*args: Any, **kwargs: Any) -> str:
    return str(judged(*args, **kwargs)["state"])


def test_states_of_a_recovery() -> None:
    assert state([0.1] * 12) == "recovered"
    assert state([-0.19] * 12, T_LLM_prefill=0.1, T_vision_encoder=-0.1) == "recovered"
    assert state([0.1] * 12, T_LLM_prefill=0.3) == "disturbed"  # it runs after the projector
    assert state([0.1] * 12, T_LLM_prefill=-0.3) == "missed"  # no pause makes it faster
    assert state([0.1] * 12, T_LLM_prefill=-0.3, hides=True) == "recovered"  # but hidden launches
    assert state([0.1] * 12, T_vision_encoder=0.3) == "missed"  # it has run before
    assert state([0.3] * 12) == "missed"
    assert state([-0.3] * 12) == "missed"
    assert state([0.4] * 12, delay=50.0) == "recovered"  # 1 % of 50 ms


def test_a_recovery_is_judged_by_its_interval_and_not_by_its_median() -> None:
    assert state(list(np.linspace(-1, 2, 12))) == "undecided"
    wide = judged(list(np.linspace(-2, 2, 12)))  # a median of zero, which says nothing
    assert wide["state"] == "undecided"
    assert wide["pairs_needed"] > wide["pairs"] == 12
    noise = np.linspace(-2, 3, 12)
    found = judged([0.1] * 12, T_LLM_prefill=noise)
    assert (found["state"], found["clean"]) == ("recovered", False)
    assert judged([0.1] * 12)["clean"]


def marks(*steps: tuple[str, float]) -> list[Mark]:
    """Marks at these milliseconds; ``+x`` opens x, ``-x`` closes it."""
    return [Mark(round(at * 1e6), name[1:], name[0] == "+") for name, at in steps]


def request_marks(*at: float) -> list[Mark]:
    encoder, projector, prefill = "T_vision_encoder", "T_projector", "T_LLM_prefill"
    forward = "T_LLM_decode_forward"
    names = ["+T_other", f"+{projector}", f"+{encoder}", f"-{encoder}", f"-{projector}"]
    names += [f"+{prefill}", f"-{prefill}", *(f"{sign}{forward}" for sign in "+-+-"), "-T_other"]
    return marks(*zip(names, at, strict=True))


def test_the_regime_says_what_adds_up() -> None:
    """An encoder of 10 ms that is launched in 2; a prefill that the host launches no faster than
    it runs; decode steps that are launched in 0.5 ms and run for 5.
    """
    host = request_marks(0, 0, 0.1, 2, 3, 3, 14, 14.5, 15, 20, 20.5, 26)
    device = request_marks(0, 0, 0.1, 10, 10.5, 10.5, 14.05, 14.5, 19.5, 20, 25, 26)
    lead = leads(host, device)
    found = {name: regime(host, lead, name) for name in DELAYED}
    assert found["T_vision_encoder"]["cases"] == [["device", "end"], ["host", "start"]]
    assert found["T_vision_encoder"]["end_ms"] == 8
    assert found["T_vision_encoder"]["hides_launches"]  # the prefill is launched meanwhile
    assert found["T_projector"]["cases"] == [["device", "end"], ["host", "start"]]
    assert found["T_LLM_prefill"]["cases"] == [["host", "end"]]
    assert found["T_LLM_decode"]["cases"] == [["device", "end"], ["host", "start"]]
    assert not found["T_LLM_decode"]["hides_launches"]
    alone = leads(host, None)  # a CPU: nothing runs ahead
    assert all(regime(host, alone, name)["cases"] == [["host", "end"]] for name in DELAYED)


def bench_of(meter: Any, prepared: Any = None, seconds: float = 60.0) -> Bench:
    return Bench(SimpleNamespace(meter=meter), prepared, np.random.default_rng(0), seconds)


def test_every_comparison_of_equals_has_runs_of_its_own() -> None:
    noise = np.random.default_rng(1)
    runs: list[float] = []

    def meter(*_: Any) -> Any:
        runs.append(float(noise.lognormal(0, 0.1)))
        return SimpleNamespace(times={"T_total": runs[-1]})

    ids = {"input_ids": torch.ones(1, 20, dtype=torch.long)}
    bench = bench_of(meter, SimpleNamespace(inputs=ids))
    options = CalibrationOptions(aa_comparisons=200, aa_pairs=20)
    found = false_alarms(bench, options)
    assert found["runs"] == len(runs) - 1 == 8000
    assert found["blocks"] == found["n_comparisons"] == found["asked"] == 200
    assert 0.01 <= found["share"]["value"] <= 0.1
    found = false_alarms(bench, options.model_copy(update={"aa_seconds": 1e-9}))
    assert (found["blocks"], found["n_comparisons"], found["asked"]) == (1, 1, 200)


def test_pairs_go_on_until_the_interval_is_narrow_or_the_time_is_up() -> None:
    noise = np.random.default_rng(2)
    times = {"T_total": 1.0, "T_total_host": None, "T_other": 0.1}

    class Meter:
        def __call__(self, *_: Any) -> Any:
            return SimpleNamespace(times={**times, "T_total": float(noise.lognormal(0, 0.05))})

        def bare(self, *_: Any) -> tuple[float, list[int]]:
            return float(noise.lognormal(0, 0.05)), []

    def pairs(seconds: float, half_width: float) -> tuple[int, int]:
        options = CalibrationOptions(pairs=6, half_width=half_width)
        found = overhead(bench_of(Meter(), seconds=seconds), options)["overhead"]
        return found["n_pairs"], found["pairs_needed"]

    assert pairs(1e-9, 0.01)[0] == 6  # the time is up; the fewest are made
    assert pairs(1e-9, 0.01)[1] > 50  # about (1.96 × √2 × 0.05 / 0.01)² = 192 are needed
    made, needed = pairs(600, 0.01)
    assert 100 < made < 500
    assert needed <= made
    assert rounds_needed(SimpleNamespace(low=None, high=1.0, n=2), 0.1) is None


def test_below_zero_counts_signed_values_and_closure_the_clamped() -> None:
    seed = {
        "T_vision_total": 10.0, "T_vision_encoder": 12.0, "T_projector": 0.0, "T_LLM_prefill": 3.0,
        "T_LLM_decode": 0.0, "T_other": -3.0, "T_total": 9.0, "decode_step_ms": None,
        "raw_T_projector": -2.0, "raw_T_LLM_prefill": 3.0, "raw_T_LLM_decode": -4.0,
    }  # fmt: skip
    fine = {**seed, "raw_T_projector": 1.0}
    assert below_zero([seed, fine]) == {
        "T_projector": 0.5,
        "T_LLM_prefill": 0.0,
        "T_LLM_decode": 1.0,
    }
    assert closure(seed) == 12 + 0 + 3 + 0 - 9
    one_pass = {**seed, "T_vision_encoder": 10.0, "T_other": -4.0, "decode_step_ms": [0.0]}
    assert closure(one_pass) == 0


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


def case(component: str, delay_ms: float, state: str, **more: Any) -> dict[str, Any]:
    about = {"kind": "host", "clean": False, "after_ms": 0.0, "pairs_needed": None}
    return {"component": component, "delay_ms": delay_ms, "state": state, **about, **more}


def results(**changes: Any) -> dict[str, Any]:
    """What a quiet machine gives."""
    ratio = {"n_pairs": 20, "baseline_mean": 120.0, "pairs_needed": 60, "half_width_wanted": 0.003}
    share = {"alarms": 10, "n_comparisons": 200, "asked": 200, "nominal": 0.05, "runs": 8000}
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
    cases = [case("T_projector", 2.0, "recovered", clean=True)]
    found = {
        "known_truth": {"cases": cases},
        "warmup": {"plateau": True, "runs": 3},
        "methods": {"left_out": {}},
    }
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
    assert "2.20 [2.10, 2.30] times the wall time" in said[5]
    assert said[6] == "warm after 3 runs"


def test_verdict_of_a_noisy_machine_says_what_cannot_be_seen() -> None:
    null = {**results()["statistics"]["null"], "ratio": estimate(1.0, 0.93, 1.08)}
    noisy = {"null": {**null, "pairs_needed": 9000}}
    assert verdict(results(statistics=noisy))[0] == (
        "the null ratio spans 0.930–1.080 here: differences under 8.0% cannot be seen with 20 "
        "pairs; use more pairs (about 9000 for ± 0.3%) or a quieter machine"
    )


@pytest.mark.parametrize(
    ("mean", "low", "high", "words"),
    [
        (100.0, 1.02, 1.04, "is met"),
        (600.0, 1.02, 1.04, "at most 1.01, is missed"),
        (100.0, 1.02, 1.07, "cannot be said with 20 pairs: about 60 for ± 0.3%"),
    ],
)
def test_verdict_on_overhead(mean: float, low: float, high: float, words: str) -> None:
    ratio = {"ratio": estimate((low + high) / 2, low, high), "baseline_mean": mean}
    overhead = {**results()["statistics"]["overhead"], **ratio}
    assert verdict(results(statistics={"overhead": overhead}))[1].endswith(words)


def test_verdict_names_what_was_not_recovered() -> None:
    cases = [
        case("T_projector", 2.0, "missed", kind="device"),
        case("T_LLM_decode", 50.0, "disturbed", after_ms=0.74),
        case("T_LLM_prefill", 2.0, "undecided", pairs_needed=800),
    ]
    said = verdict(results(known_truth={"cases": cases}))[2]
    assert said.startswith("1 of 3")
    assert "0 of them surely with no trace elsewhere" in said
    assert "after 1 of them, what runs next is slower by up to 0.7 ms" in said
    assert "tolerance, about 800 pairs would tell): T_LLM_prefill 2 ms" in said
    assert said.endswith("missed (the error is certain): T_projector 2 ms (device)")


@pytest.mark.parametrize(
    ("alarms", "n", "low", "high", "words"),
    [
        (32, 200, 0.11, 0.22, "do not trust comparisons on this machine"),
        (3, 200, 0.003, 0.043, "conservative here: they claim less than they could"),
        (10, 200, 0.024, 0.09, "from 8000 runs"),  # neither: nothing is said
        (24, 200, 0.079, 0.173, "do not trust comparisons on this machine"),
        (1, 4, 0.006, 0.81, "the time allowed no more of 200 (calibration.aa_seconds)"),
    ],
)
def test_verdict_on_alarm_rates_is_one_of_the_interval(
    alarms: int, n: int, low: float, high: float, words: str
) -> None:
    share = {**results()["statistics"]["false_alarms"], "alarms": alarms, "n_comparisons": n}
    share["share"] = estimate(alarms / n, low, high)
    assert verdict(results(statistics={"false_alarms": share}))[4].endswith(words)


def test_a_calibration_proves_everything(loaded: Any) -> None:
    vlm, _ = loaded
    requests = pd.DataFrame(
        {
            "request_id": ["a", "b", "c"],
            "question": "what?",
            "image_recipe": None,
            "image_width": 336,
            "image_height": 336,
            "output_length": ["3", "none", "5"],
        }
    )
    fetched: list[str] = []

    def fetch(row: Any) -> bytes:
        fetched.append(row["request_id"])
        return image(row)

    found = calibrate(
        vlm, QUICK, requests, fetch, template="q: {question}", known_ceilings={"a": 1}
    )
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert {"calibration", "a"} <= set(fetched) <= {"calibration", "a", "b"}
    assert found["ceilings"] == {"a": 1}
    assert found["runs"].pop("warmup") >= 3
    methods = found["runs"].pop("methods")
    assert methods in (4, 8)  # as many as the time allows
    assert found["runs"] == {"overhead": 9, "known_truth": 32, "a_a": 24}
    assert len(found["injections"]) == len(DELAYED) * 2 * 2
    assert {row["component"] for row in found["injections"]} == set(DELAYED)
    statistics = found["statistics"]
    assert set(statistics["methods"]) == set(METERS)
    assert not any(statistics["methods"]["timeline"]["below_zero"].values())
    assert statistics["methods"]["timeline"]["closure_ms"]["value"] == pytest.approx(0, abs=1e-9)
    assert statistics["methods"]["timeline"]["difference_ms"]["T_total"]["value"] == 0
    assert statistics["overhead"]["n_pairs"] == statistics["null"]["n_pairs"] == 3
    assert 0 < statistics["remainder"]["value"] < 1
    assert len(found["verdict"]) == 9


def test_methods_that_cannot_run_here_are_left_out_by_name(
    loaded: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with a captured engine, where no hook fires in a replayed graph."""
    vlm, _ = loaded
    monkeypatch.setattr(
        "vlm_latency.instrument.calibration.proofs.unable",
        lambda vlm, method, engine: unable(vlm, method, "loop"),
    )
    about = {"question": "q", "output_length": "3", "image_width": 336, "image_height": 336}
    requests = pd.DataFrame({"request_id": ["a"], **about})
    found = calibrate(vlm, QUICK, requests, image, known_ceilings={"a": 1})
    assert set(found["methods"]["methods"]) == {"timeline"}
    assert set(found["methods"]["left_out"]) == {"subtraction", "hook"}
    assert found["runs"]["methods"] == 2
    assert [said for said in found["verdict"] if "not compared" in said and "loop" in said]


def test_the_figure_draws_what_a_calibration_finds(loaded: Any) -> None:
    from vlm_latency.plots.calibration import calibration as draw
    from vlm_latency.plots.style import FigureContext, Style

    vlm, _ = loaded
    about = {"question": "q", "output_length": "3", "image_width": 336, "image_height": 336}
    requests = pd.DataFrame({"request_id": ["a"], **about})
    found = calibrate(vlm, QUICK, requests, image)
    context = FigureContext(environment_line="here", marks=(), model="llava")
    figure = draw(
        pd.DataFrame(found["injections"]),
        found["known_truth"]["cases"],
        found["statistics"],
        context,
        Style(),
    )
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
    delay = DeviceSleep(vlm.device)
    meter = make_meter(vlm)
    meter(placed, 3)
    for component in DELAYED:
        with delayed(vlm, component, 20.0, delay):
            times = meter(placed, 3).times
        assert times[component] >= delay.length_ms()
        assert times["T_total"] >= delay.length_ms()


@pytest.mark.gpu
def test_what_adds_up_on_a_gpu_comes_back_there(loaded: Any) -> None:
    """Each delay that the regime names, host or device, lengthens its component by its length."""
    vlm, prepared = loaded
    vlm.device = torch.device("cuda", 0)
    vlm.model.to(vlm.device)
    placed = type(prepared)({name: value.to(vlm.device) for name, value in prepared.inputs.items()})
    meter = make_meter(vlm)
    for _ in range(3):
        plain = meter(placed, 3).times
    host = meter.timeline.host_marks()
    lead = leads(host, meter.timeline.device_marks())
    known = delays(vlm.device)
    for component in DELAYED:
        for kind, where in regime(host, lead, component)["cases"]:
            with delayed(vlm, component, 100.0, known[kind], where):
                times = meter(placed, 3).times
            length = known[kind].length_ms()
            assert times[component] - plain[component] == pytest.approx(length, rel=0.1)
