"""Delays of known length, injected into each component and looked for in every one."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from vlm_latency.instrument.calibration.bench import Bench, half_width, rounds_needed
from vlm_latency.instrument.injection import (
    DELAYED,
    Delay,
    Regime,
    Where,
    delayed,
    delays,
    leads,
    regime,
    replayed_encoder,
)
from vlm_latency.instrument.intervals import OTHER
from vlm_latency.instrument.noise import NoiseProbe
from vlm_latency.option_groups import CalibrationOptions
from vlm_latency.records import Row
from vlm_latency.statistics import Estimate, percentile

TOLERANCE_SHARE, TOLERANCE_MS = 0.01, 0.2  # of an injected delay; the larger one counts
INJECTION_TOKENS = 3
TRIES = 3  # of a pair that was interrupted
REGIME_RUNS = 5


@dataclass(frozen=True)
class Case:
    """One delay in one component: its kind (``host`` or ``device``), its place, its length."""

    component: str
    kind: str
    where: Where
    delay_ms: float
    hides_launches: bool = False

    @property
    def tolerance_ms(self) -> float:
        """How far off a recovery may be."""
        return max(TOLERANCE_SHARE * self.delay_ms, TOLERANCE_MS)

    @property
    def after(self) -> tuple[str, ...]:
        """What runs after the delay."""
        return (*DELAYED[DELAYED.index(self.component) + 1 :], OTHER)


def known_truth(bench: Bench, options: CalibrationOptions) -> dict[str, object]:
    """Inject delays into each component and see how much every component grew.

    A spin of the host is injected where the device waits for the host, a sleep of the device where
    it does not, both where both add up (see `injection.regime`): the component is expected to grow
    by the delay's length. Each injected run has a plain one beside it, in random order; all pairs
    are interleaved, and go on until every median's interval is narrower than the tolerance, or
    ``options.proof_seconds`` are over. On a CPU the encoder repeats its output meanwhile, so that
    its own jitter does not hide what is looked for; a pair in which the process was interrupted is
    measured again, twice at most.

    Returns
    -------
    dict
        ``injections``: a row per pair, with ``component, kind, where, delay_ms`` as asked for,
        ``injected_ms`` as it really was (and as is expected back), ``recovered_ms`` by which the
        component grew, and ``elsewhere_ms`` by which each other part did. ``cases``: what
        `judge` makes of them. ``regimes``: by component the host's lead at its ends.
        ``recovery_error``: median over the cases of how far recovered / injected is from 1.
    """
    device = torch.device(bench.vlm.device)
    on_cpu = device.type == "cpu"
    with (
        replayed_encoder(bench.vlm, lambda: bench.run(1)) if on_cpu else contextlib.nullcontext()
    ) as replayed:
        bench.run(INJECTION_TOKENS)
        regimes = _regimes(bench)
        known = delays(device)
        cases = [
            Case(component, kind, where, length, kind == "device" and found["hides_launches"])
            for component, found in regimes.items()
            for kind, where in found["cases"]
            for length in options.delays_ms
        ]
        rows = _pairs(bench, options, cases, known)
    errors = [
        abs(float(np.median([r["recovered_ms"] / r["injected_ms"] for r in rows[case]])) - 1)
        for case in cases
    ]
    flat = [row for case in cases for row in rows[case]]
    return {
        "injections": flat,
        "cases": [judge(case, rows[case]) for case in cases],
        "regimes": regimes,
        "encoder_replayed": bool(replayed),
        "interrupted": sum(bool(row["involuntary_switches"]) for row in flat),
        "recovery_error": percentile(errors, 50).to_dict(),
        "runs": 2 * len(flat),
    }


def _regimes(bench: Bench) -> dict[str, Regime]:
    """Ask some plain runs how far ahead the host is; the medians decide."""
    timeline = bench.meter.timeline
    seen = []
    for _ in range(REGIME_RUNS):
        bench.run(INJECTION_TOKENS)
        marks = timeline.host_marks()
        seen.append(leads(marks, timeline.device_marks()))
    lead_ms = np.median(seen, axis=0).tolist()
    return {component: regime(marks, lead_ms, component) for component in DELAYED}


def _pairs(
    bench: Bench, options: CalibrationOptions, cases: list[Case], known: Mapping[str, Delay]
) -> dict[Case, list[Row]]:
    rows: dict[Case, list[Row]] = {case: [] for case in cases}

    def narrow() -> bool:
        return all(half_width(_error(own)) <= case.tolerance_ms / 2 for case, own in rows.items())

    with contextlib.closing(NoiseProbe()) as noise:
        for _ in bench.rounds(options.injections, enough=narrow):
            for index in bench.generator.permutation(len(cases)):
                case = cases[index]
                for _ in range(TRIES):
                    noise.start()
                    row = _injected(bench, case, known[case.kind])
                    row["involuntary_switches"] = noise.stop()["involuntary_switches"]
                    if not row["involuntary_switches"]:
                        break
                rows[case].append(row)
    return rows


def _injected(bench: Bench, case: Case, delay: Delay) -> Row:
    """One injected run with a plain one beside it, in random order."""
    readings: dict[bool, Row] = {}
    for injected in bench.generator.permutation([True, False]):
        if injected:
            with delayed(bench.vlm, case.component, case.delay_ms, delay, case.where):
                readings[True] = bench.run(INJECTION_TOKENS).times
            length = delay.length_ms()
        else:
            readings[False] = bench.run(INJECTION_TOKENS).times
    grown = {name: readings[True][name] - readings[False][name] for name in (*DELAYED, OTHER)}
    return {
        "component": case.component,
        "kind": case.kind,
        "where": case.where,
        "delay_ms": case.delay_ms,
        "injected_ms": length,
        "recovered_ms": grown.pop(case.component),
        "elsewhere_ms": grown,
    }


def _error(rows: list[Row]) -> Estimate:
    return percentile([row["recovered_ms"] - row["injected_ms"] for row in rows], 50)


def judge(case: Case, rows: list[Row]) -> dict[str, object]:
    """Say whether a delay came back, by the intervals of medians over its pairs.

    Returns
    -------
    dict
        ``state``: ``missed`` (its own error is surely beyond the tolerance, or a part that ran
        before it surely changed by more, or one after it surely became faster by more);
        ``undecided`` (its own interval reaches beyond the tolerance); ``disturbed`` (recovered, and
        a part that runs after it is surely slower by more than the tolerance, by ``after_ms`` at
        most); ``recovered``. ``clean``: whether every other part surely changed by less than the
        tolerance. ``error_ms`` and ``elsewhere_ms``, medians with intervals; ``tolerance_ms``;
        ``pairs``, and ``pairs_needed`` for an interval half as long as the tolerance allows. Where
        a sleep of the device hides launches, what follows may be faster.
    """
    tolerance = case.tolerance_ms
    own = _error(rows)
    elsewhere = {
        name: percentile([row["elsewhere_ms"][name] for row in rows], 50)
        for name in rows[0]["elsewhere_ms"]
    }
    # A pause lets caches cool for what runs after it, not for what ran before.
    after = [elsewhere[name] for name in case.after]
    strict = [own, *(e for name, e in elsewhere.items() if name not in case.after)]
    faster = [] if case.hides_launches else after
    slower = [float(e.value or 0) for e in after if e.above(tolerance)]
    if any(e.above(tolerance) or e.below(-tolerance) for e in strict) or any(
        e.below(-tolerance) for e in faster
    ):
        state = "missed"
    elif not own.within(-tolerance, tolerance):
        state = "undecided"
    else:
        state = "disturbed" if slower else "recovered"
    return {
        "component": case.component,
        "kind": case.kind,
        "where": case.where,
        "delay_ms": case.delay_ms,
        "tolerance_ms": tolerance,
        "hides_launches": case.hides_launches,
        "state": state,
        "clean": all(e.within(-tolerance, tolerance) for e in elsewhere.values()),
        "after_ms": max(slower, default=0.0),
        "pairs": len(rows),
        "pairs_needed": rounds_needed(own, tolerance / 2),
        "error_ms": own.to_dict(),
        "elsewhere_ms": {name: estimate.to_dict() for name, estimate in elsewhere.items()},
    }
