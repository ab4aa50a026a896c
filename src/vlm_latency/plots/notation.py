"""Numbers and estimates in words, for figures, tables and the page."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from vlm_latency.statistics import Estimate

# An estimate, as statistics give it or as a result on disk has it; a bare number has no interval.
Statistic: TypeAlias = "Estimate | Mapping[str, Any] | float | int | None"

LABELS = {
    "T_vision_encoder": "vision encoder",
    "T_projector": "projector",
    "T_LLM_prefill": "LLM prefill",
    "T_LLM_decode": "LLM decode",
    "T_LLM_decode_forward": "LLM decode, forwards",
    "T_LLM_decode_between": "LLM decode, between forwards",
    "T_other": "other",
    "T_preprocess": "preprocessing",
    "T_per_output_token": "per output token",
    "T_first_token": "time to first token",
    "T_vision_total": "vision total",
    "T_total": "total",
    "T_reduction": "reducing tokens",
}


def ends(statistic: Statistic) -> tuple[float, float | None, float | None]:
    """Take an estimate or a number apart: value, low, high; NaN where there is no value."""
    if isinstance(statistic, Mapping):
        value, low, high = (statistic.get(key) for key in ("value", "low", "high"))
    elif statistic is None or isinstance(statistic, float | int):
        value, low, high = statistic, None, None
    else:
        value, low, high = statistic.value, statistic.low, statistic.high
    return (
        math.nan if value is None else float(value),
        None if low is None or not math.isfinite(low) else float(low),
        None if high is None or not math.isfinite(high) else float(high),
    )


def number(value: float | None, digits: int = 3) -> str:
    """Write a number with so many significant digits, without an exponent while it is readable.

    >>> number(1234.5), number(0.01234), number(7.0), number(None)
    ('1,234', '0.0123', '7', '?')
    """
    if value is None or not math.isfinite(value):
        return "?"
    if abs(value) >= 1e7 or 0 < abs(value) < 1e-4:
        return f"{value:.{digits - 1}e}"
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def interval(statistic: Statistic, unit: str = "", scale: float = 1.0) -> str:
    """Write an estimate with its interval; the interval decides the digits.

    >>> interval({"value": 12.3456, "low": 12.1, "high": 12.6}, "ms")
    '12.35 ms [12.10, 12.60]'
    >>> interval({"value": 540.0, "low": 496.0, "high": None}, "ms"), interval(0.5, "%", 100)
    ('540 ms [496, ?]', '50 %')
    >>> interval({"value": 1554950, "low": 1307899, "high": 1802000})
    '1,550,000 [1,310,000, 1,800,000]'
    >>> interval({"value": 1.07, "low": None, "high": None})
    '1.07 (no interval)'
    >>> interval({"value": 4.04, "low": 1.14, "high": 14.3})  # that it excludes 1 can be read
    '4.0 [1.1, 14.3]'
    >>> interval({"value": 0.679, "low": 0.0065, "high": 71.07})  # ends of other sizes: each its own
    '0.68 [0.0065, 71]'
    >>> interval({"value": 218.8, "low": 1.9, "high": 25558.1}, "ms")
    '219 ms [1.9, 25,558]'
    >>> interval({"value": 5.8, "low": -0.31, "high": 11.4})  # and that it holds 0
    '6 [-0.3, 11]'
    """
    value, low, high = ends(statistic)
    unit = f" {unit}" if unit else ""
    bounds = [scale * bound for bound in (low, high) if bound is not None]
    if not bounds:
        bare = statistic is None or isinstance(statistic, float | int)
        missing = " (no interval)" if not bare and math.isfinite(value) else ""
        return number(scale * value) + unit + missing
    drawn = [*bounds, scale * value]
    width = max(drawn) - min(drawn)
    if width <= 1e-12 * abs(scale * value):
        shown = number(scale * value)
        return f"{shown}{unit} [{shown}, {shown}]"
    decimals = 1 - math.floor(math.log10(width))
    if min(drawn) > 0:  # two digits of the lower end
        needed = 1 - math.floor(math.log10(min(drawn)))
        if needed > decimals + 1:
            low_end, high_end = ("?" if x is None else number(scale * x, 2) for x in (low, high))
            return f"{number(scale * value, 2)}{unit} [{low_end}, {high_end}]"
        decimals = max(decimals, needed)
    decimals = min(decimals, 6)

    def written(x: float | None) -> str:
        if x is None:
            return "?"
        if x and not round(scale * x, decimals):
            return number(scale * x, 1)
        return f"{round(scale * x, decimals):,.{max(0, decimals)}f}"

    return f"{written(value)}{unit} [{written(low)}, {written(high)}]"
