"""Overhead, A/A comparisons, and the three methods beside each other."""

from __future__ import annotations

import gc
import time

import numpy as np

from vlm_latency.instrument.calibration.bench import Bench, half_width, rounds_needed
from vlm_latency.instrument.intervals import OTHER
from vlm_latency.instrument.meter import Reading
from vlm_latency.instrument.methods import METERS, make_meter, unable
from vlm_latency.instrument.plan import output_rule
from vlm_latency.option_groups import CalibrationOptions
from vlm_latency.records import Row
from vlm_latency.statistics import (
    Comparison,
    a_a_false_alarms,
    compare_paired,
    percentile,
    ratio_estimate,
)

CLAMPED = ("T_projector", "T_LLM_prefill", "T_LLM_decode")
_PARTS = ("T_vision_total", "T_LLM_prefill", "T_LLM_decode")


def overhead(bench: Bench, options: CalibrationOptions) -> dict[str, object]:
    """Compare instrumented with bare ``generate()``, and bare with bare, interleaved.

    Pairs go on until both intervals have a half-width of ``options.half_width``, or
    ``options.proof_seconds`` are over.

    Returns
    -------
    dict
        ``overhead`` and ``null`` (as ``statistics.compare_paired``, with ``pairs_needed`` for that
        half-width), ``remainder`` (``T_other`` as a share of ``T_total`` over the instrumented
        runs), ``total_ms`` (their median), ``runs``.
    """
    times: dict[str, list[float]] = {"instrumented": [], "bare": [], "again": []}
    other = []

    def compared() -> list[Comparison]:
        return [compare_paired(times["bare"], times[kind]) for kind in ("instrumented", "again")]

    def narrow() -> bool:
        return all(half_width(c.ratio) <= options.half_width for c in compared())

    for _ in bench.rounds(options.pairs, enough=narrow):
        for kind in bench.generator.permutation(list(times)):
            if kind == "instrumented":
                reading = bench.run(options.output_tokens)
                times[kind].append(reading.times["T_total_host"] or reading.times["T_total"])
                other.append((reading.times[OTHER], reading.times["T_total"]))
            else:
                times[kind].append(bench.meter.bare(bench.prepared, options.output_tokens)[0])
                gc.collect(1)
    found = {
        name: {
            **comparison.to_dict(),
            "half_width_wanted": options.half_width,
            "pairs_needed": rounds_needed(comparison.ratio, options.half_width),
        }
        for name, comparison in zip(("overhead", "null"), compared(), strict=True)
    }
    return {
        **found,
        "remainder": ratio_estimate(*np.transpose(other)).to_dict(),
        "total_ms": float(np.median(times["instrumented"])),
        "runs": 3 * len(times["bare"]),
    }


def false_alarms(bench: Bench, options: CalibrationOptions) -> dict[str, object]:
    """Compare a configuration with itself many times, through the project's own comparison.

    Every comparison has runs of its own: ``aa_pairs`` pairs of the cheapest request there is,
    measured one after the other; which of a pair counts as baseline is drawn. Where
    ``aa_seconds`` do not suffice there are fewer comparisons.

    Returns
    -------
    dict
        As ``statistics.a_a_false_alarms``, with ``runs``, ``blocks`` (as many as comparisons) and
        ``asked``.
    """
    prepared, pairs = bench.text_only(), options.aa_pairs
    bench.run(1, prepared)  # a length of its own
    blocks: list[np.ndarray] = []
    for _ in bench.rounds(1, options.aa_comparisons, seconds=options.aa_seconds):
        times = [bench.run(1, prepared).times["T_total"] for _ in range(2 * pairs)]
        blocks.append(bench.generator.permuted(np.reshape(times, (pairs, 2)), axis=1).T)
    found = a_a_false_alarms([(a, b) for a, b in blocks])
    return {
        **found.to_dict(),
        "runs": 2 * pairs * len(blocks),
        "blocks": len(blocks),
        "asked": options.aa_comparisons,
    }


def methods(bench: Bench, requests: list[Row]) -> dict[str, object]:
    """Measure the same requests by every method and by bare ``generate()``, in random order.

    Returns
    -------
    dict
        ``methods``: by name ``below_zero`` (share of requests in which a component was zero or
        negative before clamping), ``closure_ms`` (median of the parts' sum minus ``T_total``; the
        seed's methods know no other part than vision, prefill and decode), ``difference_ms``
        (median per component against ``timeline``) and ``wall_ratio`` (wall time per request over
        bare ``generate()``). ``left_out``: why, by name of a method that cannot run here.
        ``requests``, ``runs``.
    """
    vlm = bench.vlm
    engine = vlm.options.engine
    left_out = {name: why for name in METERS if (why := unable(vlm, name, engine))}
    meters = {
        name: bench.meter
        if name == "timeline"
        else make_meter(vlm, name, engine, bench.meter.max_cache_len)
        for name in METERS
        if name not in left_out
    }
    taken: dict[str, list[Reading]] = {name: [] for name in meters}
    wall: dict[str, list[float]] = {name: [] for name in (*meters, "bare")}
    for position in bench.rounds(1, len(requests)):
        request = requests[position]
        prepared = bench.session.prepare(request)
        tokens, stop = output_rule(request, bench.session.options, vlm.count_tokens)
        tokens = max(2, tokens)  # without a decode step there is nothing to tell apart
        if position == 0:
            for meter in meters.values():
                meter(prepared, tokens, stop)
        for name in bench.generator.permutation(list(wall)):
            start = time.perf_counter()
            if name == "bare":
                bench.meter.bare(prepared, tokens, stop)
            else:
                taken[name].append(meters[name](prepared, tokens, stop))
            wall[name].append(time.perf_counter() - start)
            gc.collect(1)
    times = {name: [reading.times for reading in readings] for name, readings in taken.items()}
    return {
        "methods": {
            name: {
                "below_zero": below_zero(rows),
                "closure_ms": percentile([closure(row) for row in rows], 50).to_dict(),
                "difference_ms": _differences(rows, times["timeline"]),
                "wall_ratio": compare_paired(wall["bare"], wall[name]).ratio.to_dict(),
            }
            for name, rows in times.items()
        },
        "left_out": left_out,
        "requests": len(wall["bare"]),
        "runs": len(wall) * len(wall["bare"]),
    }


def below_zero(rows: list[Row]) -> dict[str, float]:
    """Give by component the share of requests that came out at or below zero before clamping."""
    shares = {}
    for name in CLAMPED:
        signed = [row[name] if row[f"raw_{name}"] is None else row[f"raw_{name}"] for row in rows]
        known = [value <= 0 for value in signed if value is not None]
        if known:
            shares[name] = float(np.mean(known))
    return shares


def closure(row: Row) -> float:
    """Give the parts' sum less T_total, milliseconds; a one-pass timeline has T_other as a part."""
    one_pass = row["decode_step_ms"] is not None
    vision = row["T_vision_total"]
    if row["T_projector"] is not None:
        vision = row["T_vision_encoder"] + row["T_projector"]
    parts = vision + row["T_LLM_prefill"] + row["T_LLM_decode"] + (row[OTHER] if one_pass else 0)
    return float(parts - row["T_total"])


def _differences(rows: list[Row], reference: list[Row]) -> dict[str, dict[str, object]]:
    """Median difference per component, of the same requests."""
    differences = {}
    for name in ("T_total", "T_vision_encoder", "T_projector", *_PARTS):
        pairs = [(a[name], b[name]) for a, b in zip(rows, reference, strict=True)]
        known = [a - b for a, b in pairs if a is not None and b is not None]
        if known:
            differences[name] = percentile(known, 50).to_dict()
    return differences
