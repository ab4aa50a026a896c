"""What a calibration found, in sentences: a function of its results and of nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Found = Mapping[str, Any]  # what one proof found, as JSON has it
TARGET_OVERHEAD = {True: 1.05, False: 1.01}  # of requests shorter and longer than LONG_MS
LONG_MS = 500.0
VISIBLE = 0.02  # differences above this should not go unseen
STATES = ("recovered", "disturbed", "undecided", "missed")


def verdict(found: Found) -> list[str]:
    """Say how far the numbers can be trusted, given what ``calibrate`` found.

    Every judgement is one of an interval: what the interval leaves open is called open, with the
    number of pairs that would settle it.
    """
    statistics = found["statistics"]
    return [
        _noise(statistics["null"]),
        _overhead(statistics["overhead"]),
        _truth(found["known_truth"]["cases"]),
        f"{statistics['remainder']['value']:.1%} of T_total belongs to no component (T_other)",
        _alarms(statistics["false_alarms"]),
        *(_method(name, about) for name, about in statistics["methods"].items()),
        *(f"not compared: {why}" for why in found["methods"]["left_out"].values()),
        _warmup(found["warmup"]),
    ]


def _noise(null: Found) -> str:
    """What cannot be seen, and what to do about it where that is much."""
    ratio, pairs = null["ratio"], null["n_pairs"]
    unseen = max(ratio["high"] - 1, 1 - ratio["low"])
    said = (
        f"the null ratio spans {ratio['low']:.3f}–{ratio['high']:.3f} here: differences under "
        f"{unseen:.1%} cannot be seen with {pairs} pairs"
    )
    if unseen > VISIBLE:
        more = f" ({_needed(null)})" if _needed(null) else ""
        said += f"; use more pairs{more} or a quieter machine"
    return said


def _overhead(overhead: Found) -> str:
    ratio = overhead["ratio"]
    target = TARGET_OVERHEAD[overhead["baseline_mean"] < LONG_MS]
    said = f"measuring takes {_shown(ratio, '.3f')} times as long as a bare generate()"
    if ratio["low"] <= 1 <= ratio["high"]:
        said += ", which is not told from none"
    if ratio["high"] <= target:
        return f"{said}; the target, at most {target}, is met"
    if ratio["low"] > target:
        return f"{said}; the target, at most {target}, is missed"
    more = f": {_needed(overhead)}" if _needed(overhead) else ""
    return (
        f"{said}; whether the target, at most {target}, is met cannot be said with "
        f"{overhead['n_pairs']} pairs{more}"
    )


def _needed(comparison: Found) -> str:
    """Say how many pairs would give the interval that was wanted, where that is known to be more."""
    needed = comparison["pairs_needed"]
    if needed is None or needed <= comparison["n_pairs"]:
        return ""
    return f"about {_about(needed)} for ± {comparison['half_width_wanted']:.1%}"


def _truth(cases: Sequence[Found]) -> str:
    which = {state: [case for case in cases if case["state"] == state] for state in STATES}
    back = which["recovered"] + which["disturbed"]
    clean = sum(bool(case["clean"]) for case in back)
    said = (
        f"{len(back)} of {len(cases)} injected delays are recovered in their component within 1 % "
        f"or 0.2 ms, {clean} of them surely with no trace elsewhere"
    )
    if which["disturbed"]:
        most = max(case["after_ms"] for case in which["disturbed"])
        said += (
            f"; after {len(which['disturbed'])} of them, what runs next is slower by up to "
            f"{most:.1f} ms, as after any pause on a machine whose caches others use too"
        )
    if which["undecided"]:
        needed = [case["pairs_needed"] for case in which["undecided"]]
        known = [pairs for pairs in needed if pairs is not None]
        more = f", about {_about(max(known))} pairs would tell" if known else ""
        said += (
            f"; undecided (the noise is larger than the tolerance{more}): "
            f"{_names(which['undecided'])}"
        )
    if which["missed"]:
        said += f"; missed (the error is certain): {_names(which['missed'])}"
    return said


def _names(cases: Sequence[Found]) -> str:
    return ", ".join(
        f"{case['component']} {case['delay_ms']:g} ms"
        + (" (device)" if case["kind"] == "device" else "")
        for case in cases
    )


def _alarms(alarms: Found) -> str:
    share, nominal = alarms["share"], alarms["nominal"]
    said = (
        f"{alarms['alarms']} of {alarms['n_comparisons']} comparisons of a configuration with "
        f"itself saw a difference: {_shown(share, '.1%')} at a nominal {nominal:.0%}, from "
        f"{alarms['runs']} runs"
    )
    if share["low"] > nominal:
        return f"{said}; do not trust comparisons on this machine"
    if share["high"] < nominal:
        return f"{said}; comparisons are conservative here: they claim less than they could"
    if alarms["n_comparisons"] < alarms["asked"]:
        return f"{said}; the time allowed no more of {alarms['asked']} (calibration.aa_seconds)"
    return said


def _method(name: str, about: Found) -> str:
    below = {part: share for part, share in about["below_zero"].items() if share}
    parts = ", ".join(f"{part} in {share:.0%}" for part, share in below.items()) or "never"
    closure = about["closure_ms"]["value"]
    return (
        f"{name}: components at or below zero before clamping: {parts}; its parts miss T_total by "
        f"{closure:+.2g} ms (median); {_shown(about['wall_ratio'], '.2f')} times the wall time of "
        "a bare generate()"
    )


def _warmup(warm: Found) -> str:
    if not warm["plateau"]:
        return f"no plateau within {warm['runs']} runs: the machine is not steady"
    return f"warm after {warm['runs']} runs"


def _about(pairs: int) -> int:
    """Round to two digits: it is an extrapolation.

    >>> _about(49950), _about(87)
    (50000, 87)
    """
    return round(pairs, 2 - len(str(pairs)))


def _shown(estimate: Found, spec: str) -> str:
    value, low, high = (estimate[key] for key in ("value", "low", "high"))
    if low is None or high is None:
        return f"{value:{spec}} (no interval)"
    return f"{value:{spec}} [{low:{spec}}, {high:{spec}}]"
