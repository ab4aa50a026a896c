"""How far the instrument's numbers can be trusted, on the model and machine at hand.

Each proof runs one request many times, interleaved with what it is compared with, and ends in an
estimate with its interval; ``calibrate`` puts them together and ``verdict`` says it in words.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import torch

from vlm_latency.errors import MeasurementError
from vlm_latency.instrument.ceilings import ceilings
from vlm_latency.instrument.clock import resolution_ns
from vlm_latency.instrument.injection import COMPONENTS, Delay, delayed, replayed_encoder
from vlm_latency.instrument.methods import METERS, OTHER, Meter, Reading, make_meter
from vlm_latency.instrument.noise import NoiseProbe
from vlm_latency.instrument.protocol import Fetch, output_rule, plateau, undisturbed
from vlm_latency.options import CalibrationOptions, MeasurementOptions
from vlm_latency.statistics import (
    a_a_false_alarms,
    bootstrap_ratio,
    compare_paired,
    percentile,
)
from vlm_latency.vqa import decode_image, image_bytes
from vlm_latency.vqa.images import noise_recipe

if TYPE_CHECKING:
    from vlm_latency.models.interface import ModelArchitecture

__all__ = ["calibrate", "ceilings", "verdict"]

log = logging.getLogger("vlm_latency")

TOLERANCE_SHARE, TOLERANCE_MS = 0.01, 0.2  # of an injected delay; the larger one counts
INJECTION_TOKENS = 3
TRIES = 3  # of a pair that was interrupted
AA_TOKENS = 8  # length of the text-only prompt of the A/A comparisons
FEWEST_PAIRS = 6  # from which on the interval of a median has two ends
WARMUP_RUNS = 30
TARGET_OVERHEAD = {True: 1.05, False: 1.01}  # of requests shorter and longer than LONG_MS
LONG_MS = 500.0
FALSE_ALARMS = (0.02, 0.09)  # at a nominal 5 %
CLAMPED = ("T_projector", "T_LLM_prefill", "T_LLM_decode")
_PARTS = ("T_vision_total", "T_LLM_prefill", "T_LLM_decode")


def calibrate(
    vlm: Any,
    options: CalibrationOptions,
    requests: pd.DataFrame,
    fetch: Fetch,
    *,
    template: str = "{question}",
    known_ceilings: Mapping[str, Any] | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Prove the instrument on a loaded model.

    Parameters
    ----------
    requests
        The methods are compared on the first ``method_requests`` of them; everything else runs
        one request, with an image of noise for ``options.tiling``.
    fetch
        Gives the encoded image of a request.
    known_ceilings
        What ``ceilings`` has found before; measured here where absent.

    Returns
    -------
    dict
        JSON-able. ``injections`` (one row per injection) and ``statistics`` are what
        ``plots.calibration`` draws; ``known_truth, methods, warmup, clock, ceilings`` hold the
        details, ``runs`` how many requests each proof made, ``seconds`` how long each took, and
        ``verdict`` what it all means, in sentences.

    Raises
    ------
    MeasurementError
        For a model without times of its own, such as the null model.
    """
    if vlm.architecture.simulated:
        raise MeasurementError(
            f"found model.name={vlm.options.name}; expected a model that takes time: there is "
            "nothing to calibrate"
        )
    generator = np.random.default_rng(seed)
    seconds = options.proof_seconds
    found: dict[str, Any] = {"seconds": {}, "runs": {}}

    def prove(name: str, function: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        log.info("calibration: %s", name.replace("_", " "))
        start = time.perf_counter()
        result = function()
        found["seconds"][name] = time.perf_counter() - start
        if "runs" in result:
            found["runs"][name] = result["runs"]
        return result

    engine = vlm.options.engine
    with undisturbed(vlm), make_meter(vlm, "timeline", engine) as meter:
        prepared = _prepared(
            vlm, _noise_image(vlm.architecture, options.tiling), template, "what is this?"
        )
        run = partial(_run, meter, prepared)
        found["clock"] = resolution_ns()
        warm = prove("warmup", lambda: warmup(lambda: run(options.output_tokens)))
        cost = prove(
            "overhead",
            lambda: overhead(
                meter, prepared, options.output_tokens, options.pairs, generator, seconds
            ),
        )
        truth = prove(
            "known_truth",
            lambda: known_truth(
                vlm, run, options.delays_ms, options.injections, generator, seconds
            ),
        )
        alarms = prove(
            "a_a",
            lambda: false_alarms(
                partial(_run, meter, _text_only(prepared), 1),
                options.aa_comparisons,
                options.aa_pairs,
                generator,
                seconds,
            ),
        )
        compared = prove(
            "methods",
            lambda: methods(
                vlm, requests[: options.method_requests], fetch, template, generator, seconds
            ),
        )
    if known_ceilings is None:
        known_ceilings = prove(
            "ceilings",
            lambda: ceilings(
                vlm.device,
                str(vlm.dtype).removeprefix("torch."),
                vlm.options.num_threads,
                options.ceiling_seconds,
            ),
        )
    found |= {
        "injections": truth.pop("injections"),
        "known_truth": truth,
        "warmup": warm,
        "methods": compared,
        "ceilings": dict(known_ceilings),
        "request": {"tiling": options.tiling, "output_tokens": options.output_tokens},
        "statistics": {
            "recovery_error": truth["recovery_error"],
            "remainder": cost["remainder"],
            "overhead": cost["overhead"],
            "null": cost["null"],
            "false_alarms": alarms,
            "methods": compared["methods"],
        },
    }
    return {**found, "verdict": verdict(found)}


def warmup(run: Callable[[], Reading]) -> dict[str, Any]:
    """Count the runs from cold until the plateau (see ``protocol.plateau``)."""
    times: list[float] = []
    while not plateau(times, at_least=3) and len(times) < WARMUP_RUNS:
        times.append(run().timed_ms)
    return {"runs": len(times), "plateau": plateau(times, at_least=3), "times_ms": times}


def overhead(
    meter: Meter,
    prepared: Any,
    tokens: int,
    pairs: int,
    generator: np.random.Generator,
    seconds: float,
) -> dict[str, Any]:
    """Compare instrumented with bare ``generate()``, and bare with bare, interleaved.

    Returns
    -------
    dict
        ``overhead`` and ``null`` (as ``statistics.compare_paired``), ``remainder`` (``T_other`` as
        a share of ``T_total`` over the instrumented runs), ``total_ms`` (their median), ``runs``.
    """
    times: dict[str, list[float]] = {"instrumented": [], "bare": [], "again": []}
    other = []
    for _ in _rounds(pairs, FEWEST_PAIRS, seconds):
        for kind in generator.permutation(list(times)):
            if kind == "instrumented":
                reading = _run(meter, prepared, tokens)
                times[kind].append(reading.times["T_total_host"] or reading.times["T_total"])
                other.append((reading.times[OTHER], reading.times["T_total"]))
            else:
                times[kind].append(meter.bare(prepared, tokens)[0])
                gc.collect(1)
    return {
        "overhead": compare_paired(times["bare"], times["instrumented"]).to_dict(),
        "null": compare_paired(times["bare"], times["again"]).to_dict(),
        "remainder": bootstrap_ratio(*np.transpose(other)).to_dict(),
        "total_ms": float(np.median(times["instrumented"])),
        "runs": 3 * len(times["bare"]),
    }


def known_truth(
    vlm: Any,
    run: Callable[[int], Reading],
    delays_ms: Sequence[float],
    injections: int,
    generator: np.random.Generator,
    seconds: float,
) -> dict[str, Any]:
    """Inject delays into each component and see how much every component grew.

    Each injected run has a plain one beside it, in random order; all pairs are interleaved. The
    encoder repeats its output meanwhile, so that its own jitter does not hide what is looked for;
    a pair in which the process was interrupted is measured again, twice at most.

    Parameters
    ----------
    run
        Measures the request with so many tokens.

    Returns
    -------
    dict
        ``injections``: a row per pair, with ``component, delay_ms`` as asked for, ``injected_ms``
        as it really was, ``recovered_ms`` by which the component grew, and ``elsewhere_ms`` by
        which each other part did. ``cases``: per component and delay the medians of the errors
        with their intervals, the tolerance (1 % or 0.2 ms), and a state: ``recovered``;
        ``disturbed`` (recovered, and a part that runs after it changed by more than the tolerance,
        by ``after_ms`` at most); ``undecided`` (its own error or that of a part before it is
        beyond the tolerance, but its interval is not); ``missed`` (so is the interval).
        ``recovery_error``: median over the cases of how far recovered / injected is from 1.
    """
    delay = Delay(torch.device(vlm.device))
    cases = list(itertools.product(COMPONENTS, delays_ms))
    rows: list[dict[str, Any]] = []
    with (
        replayed_encoder(vlm, lambda: run(1)) as replayed,
        contextlib.closing(NoiseProbe()) as noise,
    ):
        run(INJECTION_TOKENS)
        for _ in _rounds(injections, 2, seconds):
            for index in generator.permutation(len(cases)):
                component, milliseconds = cases[index]
                for _ in range(TRIES):
                    noise.start()
                    row = _injected(vlm, run, component, milliseconds, delay, generator)
                    row["involuntary_switches"] = noise.stop()["involuntary_switches"]
                    if not row["involuntary_switches"]:
                        break
                rows.append(row)
    summaries = [_case(rows, component, milliseconds) for component, milliseconds in cases]
    errors = [
        abs(np.median(_column(own, "recovered_ms") / _column(own, "injected_ms")) - 1)
        for own in (_of(rows, *case) for case in cases)
    ]
    return {
        "injections": rows,
        "cases": summaries,
        "encoder_replayed": replayed,
        "interrupted": sum(bool(row["involuntary_switches"]) for row in rows),
        "recovery_error": percentile(errors, 50).to_dict(),
        "runs": 2 * len(rows),
    }


def _injected(
    vlm: Any,
    run: Callable[[int], Reading],
    component: str,
    milliseconds: float,
    delay: Delay,
    generator: np.random.Generator,
) -> dict[str, Any]:
    """One injected run with a plain one beside it, in random order."""
    readings: dict[bool, dict[str, Any]] = {}
    for injected in generator.permutation([True, False]):
        if injected:
            with delayed(vlm, component, milliseconds, delay):
                readings[True] = run(INJECTION_TOKENS).times
            length = delay.length_ms()
        else:
            readings[False] = run(INJECTION_TOKENS).times
    grown = {name: readings[True][name] - readings[False][name] for name in (*COMPONENTS, OTHER)}
    return {
        "component": component,
        "delay_ms": milliseconds,
        "injected_ms": length,
        "recovered_ms": grown.pop(component),
        "elsewhere_ms": grown,
    }


def _case(rows: list[dict[str, Any]], component: str, milliseconds: float) -> dict[str, Any]:
    own = _of(rows, component, milliseconds)
    tolerance = max(TOLERANCE_SHARE * milliseconds, TOLERANCE_MS)
    errors = {component: _column(own, "recovered_ms") - _column(own, "injected_ms")}
    for name in own[0]["elsewhere_ms"]:
        errors[name] = np.array([row["elsewhere_ms"][name] for row in own])
    estimates = {name: percentile(values, 50) for name, values in errors.items()}
    beyond = {n: e for n, e in estimates.items() if abs(float(e.value or 0)) > tolerance}
    # A pause chills the caches of what runs after it, and of nothing that ran before.
    after = (*COMPONENTS[COMPONENTS.index(component) + 1 :], OTHER)
    chilled = {name: beyond[name] for name in after if name in beyond}
    strict = [estimate for name, estimate in beyond.items() if name not in after]
    if any(e.above(tolerance) or e.below(-tolerance) for e in strict) or any(
        e.below(-tolerance) for e in chilled.values()
    ):
        state = "missed"
    elif strict or any(not e.above(0) for e in chilled.values()):
        state = "undecided"
    else:
        state = "disturbed" if chilled else "recovered"
    error = estimates.pop(component)
    return {
        "component": component,
        "delay_ms": milliseconds,
        "tolerance_ms": tolerance,
        "state": state,
        "after_ms": max((float(e.value or 0) for e in chilled.values()), default=0.0),
        "error_ms": error.to_dict(),
        "elsewhere_ms": {name: estimate.to_dict() for name, estimate in estimates.items()},
    }


def _of(rows: list[dict[str, Any]], component: str, delay_ms: float) -> list[dict[str, Any]]:
    return [r for r in rows if r["component"] == component and r["delay_ms"] == delay_ms]


def _column(rows: list[dict[str, Any]], name: str) -> Any:
    return np.array([row[name] for row in rows])


def false_alarms(
    run: Callable[[], Reading],
    comparisons: int,
    pairs: int,
    generator: np.random.Generator,
    seconds: float,
) -> dict[str, Any]:
    """Compare a configuration with itself many times, through the project's own comparison.

    Every comparison has pairs of its own, measured one after the other; which of a pair counts
    as baseline is drawn. Where time does not suffice for all of them, the blocks of pairs that
    were measured are drawn upon again with other baselines, and ``blocks`` says how many there
    are.

    Parameters
    ----------
    run
        The cheapest request there is.
    seconds
        How long to measure at most.

    Returns
    -------
    dict
        As ``statistics.a_a_false_alarms``, with ``runs`` and ``blocks``.
    """
    blocks: list[Any] = []
    for _ in _rounds(comparisons, 1, seconds):
        times = [run().times["T_total"] for _ in range(2 * pairs)]
        blocks.append(np.reshape(times, (pairs, 2)))
    drawn = [
        generator.permuted(blocks[index % len(blocks)], axis=1).T for index in range(comparisons)
    ]
    found = a_a_false_alarms([(a, b) for a, b in drawn])
    return {**found.to_dict(), "runs": 2 * pairs * len(blocks), "blocks": len(blocks)}


def methods(
    vlm: Any,
    requests: pd.DataFrame,
    fetch: Fetch,
    template: str,
    generator: np.random.Generator,
    seconds: float,
) -> dict[str, Any]:
    """Measure the same requests by every method and by bare ``generate()``, in random order.

    Returns
    -------
    dict
        ``methods``: by name ``below_zero`` (share of requests in which a component was zero or
        negative before clamping), ``closure_ms`` (median of the parts' sum minus ``T_total``; the
        seed's methods know no other part than vision, prefill and decode), ``difference_ms``
        (median per component against ``timeline``) and ``wall_ratio`` (wall time per request over
        bare ``generate()``). ``requests``, ``runs``.
    """
    meters = {name: make_meter(vlm, name, vlm.options.engine) for name in METERS}
    taken: dict[str, list[Reading]] = {name: [] for name in METERS}
    wall: dict[str, list[float]] = {name: [] for name in (*METERS, "bare")}
    table = requests.astype(object).where(requests.notna(), None)
    rows = table.to_dict("records")
    for position in _rounds(len(rows), 1, seconds):
        row = rows[position]
        request = {str(name): value for name, value in row.items()}
        prepared = _prepared(vlm, fetch(request), template, request["question"])
        tokens, stop = output_rule(request, MeasurementOptions(), vlm.count_tokens)
        tokens = max(2, tokens)  # without a decode step there is nothing to tell apart
        if position == 0:
            for meter in meters.values():
                meter(prepared, tokens, stop)
        for name in generator.permutation(list(wall)):
            start = time.perf_counter()
            if name == "bare":
                meters["timeline"].bare(prepared, tokens, stop)
            else:
                taken[name].append(meters[name](prepared, tokens, stop))
            wall[name].append(time.perf_counter() - start)
            gc.collect(1)
    times = {name: [reading.times for reading in readings] for name, readings in taken.items()}
    return {
        "methods": {
            name: {
                "below_zero": _below_zero(rows),
                "closure_ms": percentile([_closure(row) for row in rows], 50).to_dict(),
                "difference_ms": _differences(rows, times["timeline"]),
                "wall_ratio": compare_paired(wall["bare"], wall[name]).ratio.to_dict(),
            }
            for name, rows in times.items()
        },
        "requests": len(wall["bare"]),
        "runs": (len(METERS) + 1) * len(wall["bare"]),
    }


def _below_zero(rows: list[dict[str, Any]]) -> dict[str, float]:
    """By component, the share of requests that came out as zero or less before clamping."""
    shares = {}
    for name in CLAMPED:
        signed = [row[name] if row[f"raw_{name}"] is None else row[f"raw_{name}"] for row in rows]
        known = [value <= 0 for value in signed if value is not None]
        if known:
            shares[name] = float(np.mean(known))
    return shares


def _closure(row: dict[str, Any]) -> float:
    """What the parts add up to, above T_total; a one-pass timeline has T_other as a part."""
    one_pass = row["decode_step_ms"] is not None
    vision = row["T_vision_total"]
    if row["T_projector"] is not None:
        vision = row["T_vision_encoder"] + row["T_projector"]
    parts = vision + row["T_LLM_prefill"] + row["T_LLM_decode"] + (row[OTHER] if one_pass else 0)
    return float(parts - row["T_total"])


def _differences(
    rows: list[dict[str, Any]], reference: list[dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Median difference per component, of the same requests."""
    differences = {}
    for name in ("T_total", "T_vision_encoder", "T_projector", *_PARTS):
        pairs = [(a[name], b[name]) for a, b in zip(rows, reference, strict=True)]
        known = [a - b for a, b in pairs if a is not None and b is not None]
        if known:
            differences[name] = percentile(known, 50).to_dict()
    return differences


def verdict(found: Mapping[str, Any]) -> list[str]:
    """Say in sentences how far the numbers can be trusted, given what ``calibrate`` found."""
    statistics = found["statistics"]
    return [
        *_noise_verdict(statistics["null"]),
        _overhead_verdict(statistics["overhead"], statistics["null"]),
        _truth_verdict(found["known_truth"]["cases"]),
        _remainder_verdict(statistics["remainder"]),
        _alarms_verdict(statistics["false_alarms"]),
        *(_method_verdict(name, about) for name, about in statistics["methods"].items()),
        _warmup_verdict(found["warmup"]),
    ]


def _noise_verdict(null: Mapping[str, Any]) -> list[str]:
    """What cannot be seen, and what to do about it where that is much."""
    ratio, pairs = null["ratio"], null["n_pairs"]
    unseen = max(ratio["high"] - 1, 1 - ratio["low"])
    message = (
        f"the null ratio spans {ratio['low']:.3f}–{ratio['high']:.3f} here: differences under "
        f"{unseen:.1%} cannot be seen with {pairs} pairs"
    )
    if unseen > 0.02:
        message += "; use more pairs or a quieter machine"
    return [message]


def _overhead_verdict(overhead: Mapping[str, Any], null: Mapping[str, Any]) -> str:
    ratio = overhead["ratio"]
    target = TARGET_OVERHEAD[overhead["baseline_mean"] < LONG_MS]
    said = f"measuring takes {_shown(ratio, '.3f')} times as long as a bare generate()"
    if ratio["low"] <= 1 <= ratio["high"]:
        said += ", which is not told from none"
    if ratio["high"] <= target:
        return f"{said}; the target, at most {target}, is met"
    if ratio["low"] > target:
        return f"{said}; the target, at most {target}, is missed"
    return f"{said}; whether the target, at most {target}, is met cannot be said with these pairs"


def _truth_verdict(cases: Sequence[Mapping[str, Any]]) -> str:
    which = {
        state: [case for case in cases if case["state"] == state]
        for state in ("recovered", "disturbed", "undecided", "missed")
    }
    found = len(which["recovered"]) + len(which["disturbed"])
    said = (
        f"{found} of {len(cases)} injected delays are recovered in their component within 1 % or "
        f"0.2 ms, {len(which['recovered'])} of them with no trace elsewhere"
    )
    if which["disturbed"]:
        most = max(case["after_ms"] for case in which["disturbed"])
        said += (
            f"; after the other {len(which['disturbed'])}, what runs next is slower by up to "
            f"{most:.1f} ms, as after any pause on a machine whose caches others use too"
        )
    for state, words in (
        ("undecided", "the noise is larger than the tolerance"),
        ("missed", "the error is certain"),
    ):
        names = [f"{case['component']} {case['delay_ms']:g} ms" for case in which[state]]
        if names:
            said += f"; {state} ({words}): {', '.join(names)}"
    return said


def _remainder_verdict(remainder: Mapping[str, Any]) -> str:
    return f"{remainder['value']:.1%} of T_total belongs to no component (T_other)"


def _alarms_verdict(alarms: Mapping[str, Any]) -> str:
    share = alarms["share"]["value"]
    said = (
        f"{alarms['alarms']} of {alarms['n_comparisons']} comparisons of a configuration with "
        f"itself saw a difference: {_shown(alarms['share'], '.1%')} at a nominal "
        f"{alarms['nominal']:.0%}, from {alarms['runs']} runs"
    )
    if alarms["n_comparisons"] < 100:
        return f"{said}; too few to tell"
    if not FALSE_ALARMS[0] <= share <= FALSE_ALARMS[1]:
        return f"{said}; do not trust comparisons on this machine"
    return said


def _method_verdict(name: str, about: Mapping[str, Any]) -> str:
    below = {part: share for part, share in about["below_zero"].items() if share}
    parts = ", ".join(f"{part} in {share:.0%}" for part, share in below.items()) or "never"
    closure = about["closure_ms"]["value"]
    return (
        f"{name}: components at or below zero before clamping: {parts}; its parts miss T_total by "
        f"{closure:+.2g} ms (median); {_shown(about['wall_ratio'], '.2f')} times the wall time of "
        "a bare generate()"
    )


def _shown(estimate: Mapping[str, Any], spec: str) -> str:
    value, low, high = (estimate[key] for key in ("value", "low", "high"))
    if low is None or high is None:
        return f"{value:{spec}} (no interval)"
    return f"{value:{spec}} ({low:{spec}} to {high:{spec}})"


def _warmup_verdict(warm: Mapping[str, Any]) -> str:
    if not warm["plateau"]:
        return f"no plateau within {warm['runs']} runs: the machine is not steady"
    return f"warm after {warm['runs']} runs"


def _rounds(count: int, at_least: int, seconds: float) -> Iterator[int]:
    """So many rounds, fewer where the time is up; never fewer than so many."""
    end = time.perf_counter() + seconds
    for index in range(count):
        if index >= at_least and time.perf_counter() > end:
            log.info(
                "calibration: %d of %d rounds after %.0f s (calibration.proof_seconds)",
                index,
                count,
                seconds,
            )
            return
        yield index


def _run(meter: Meter, prepared: Any, tokens: int) -> Reading:
    reading = meter(prepared, tokens)
    gc.collect(1)
    return reading


def _prepared(vlm: Any, data: bytes, template: str, question: str) -> Any:
    prompt = template.replace("{question}", question)
    return vlm.place(vlm.prepare(decode_image(data), prompt))


def _noise_image(architecture: ModelArchitecture, tiling: str) -> bytes:
    """An image that makes exactly this tiling."""
    rows, columns = (int(part) for part in tiling.split("x"))
    recipe = noise_recipe(0, *architecture.image_size_for(rows, columns))
    return image_bytes({"image_recipe": recipe}, None)


def _text_only(prepared: Any) -> Any:
    """The end of the prompt without its image: the cheapest request that is a real one."""
    ids = prepared.inputs["input_ids"][:, -AA_TOKENS:]
    return SimpleNamespace(inputs={"input_ids": ids, "attention_mask": torch.ones_like(ids)})
