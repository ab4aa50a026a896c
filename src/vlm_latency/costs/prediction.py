"""Latency from costs: what predicts it, and how well.

Four predictors of T_total are compared on held-out shapes (`predictors`): FLOPs alone, tokens, the
roofline at the hardware's ceilings as they are, and the roofline calibrated. The last learns, for
each part, how many milliseconds one millisecond at the ceiling really takes: a coefficient each
for compute, memory and launches, none below zero. Its parts add up to the prediction, so that a
latency comes with its composition (`calibrate_predictor`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd

from vlm_latency.costs.hardware import Hardware
from vlm_latency.costs.shapes import PARTS
from vlm_latency.errors import UserError
from vlm_latency.records import COST_TIMES, SHAPE
from vlm_latency.statistics import AsGiven, Estimate, cross_validate, nnls_relative_fit

# Prompts that differ by a smaller share are near-twins: one of them tells the other's latency.
TWINS = 0.05

_PART_TERMS = tuple((part, term) for part in PARTS for term in ("compute", "memory", "launch"))
_OTHER_TERMS = (("other", "constant"), ("other", "step"))
TERMS = _PART_TERMS + _OTHER_TERMS
PART_TIMES = {**{part: COST_TIMES[part] for part in PARTS}, "other": "T_other"}


@dataclass(frozen=True)
class Predictor:
    """Predicts latency on one device from costs; see `calibrate_predictor`.

    Attributes
    ----------
    coefficients : mapping of (part, term) to float
        Measured per ceiling milliseconds; of ``other``, milliseconds. None: the roofline as it is.
    hardware : Hardware
    dtype : str
    interval : Estimate or None
        Of a prediction of 1, at 95 %: one request lies between low × and high × its prediction
        (`CrossValidation.interval`); its ends are None where the shapes were too few.
    median_error, mape : float or None
        Of |prediction / measured − 1| on held-out shapes.
    n, num_shapes : int
        Entries and shapes it was calibrated on.
    calibrated_on : str or None
        The device, where it is not `hardware`: then the interval is no guarantee.
    measured : mapping of column to (lowest, highest)
        Token counts that it was calibrated on; empty without a calibration.
    """

    coefficients: Mapping[tuple[str, str], float] | None
    hardware: Hardware
    dtype: str
    interval: Estimate | None = None
    median_error: float | None = None
    mape: float | None = None
    n: int = 0
    num_shapes: int = 0
    calibrated_on: str | None = None
    measured: Mapping[str, tuple[float, float]] = field(default_factory=dict)

    def outside(self, table: pd.DataFrame) -> np.ndarray:
        """Say of each row whether a token count lies outside of those calibrated on.

        There the prediction is an extrapolation, which its interval does not cover.
        """
        beyond = np.zeros(len(table), dtype=bool)
        for name, (low, high) in self.measured.items():
            if name in table:
                counts = _floats(table, name)
                beyond |= (counts < low) | (counts > high)
        return beyond

    def predict(self, table: pd.DataFrame) -> pd.DataFrame:
        """Predict each row of a table with `cost_columns`.

        Returns
        -------
        DataFrame
            Milliseconds: ``T_vision_encoder``, ``T_projector``, ``T_LLM_prefill``,
            ``T_LLM_decode``, ``T_other``, ``T_total``, and ``T_total_low``, ``T_total_high``
            (NaN without an interval).
        """
        terms = roofline_terms(table, self.hardware, self.dtype)
        times: dict[str, Any] = {}
        for part, column in PART_TIMES.items():
            if self.coefficients is not None:
                own = [key for key in TERMS if key[0] == part]
                times[column] = sum(terms[key] * self.coefficients[key] for key in own)
            elif part == "other":
                times[column] = np.zeros(len(table))
            else:
                compute, memory, launch = (
                    terms[part, name] for name in ("compute", "memory", "launch")
                )
                times[column] = np.maximum(compute, memory) + launch
        total = sum(times.values())
        times["T_total"] = total
        for end in ("low", "high"):
            times[f"T_total_{end}"] = total * (getattr(self.interval, end, None) or np.nan)
        return pd.DataFrame(times, index=table.index)

    def on(self, hardware: Hardware) -> Predictor:
        """Assume the same shares of the ceilings on another device."""
        return replace(self, hardware=hardware, calibrated_on=self.hardware.name)


def roofline_terms(
    table: pd.DataFrame, hardware: Hardware, dtype: str
) -> dict[tuple[str, str], np.ndarray]:
    """Give the milliseconds that each part's compute, bytes and launches take at the ceilings.

    Parameters
    ----------
    table : DataFrame
        Per part ``flops_*_analytic`` (else ``flops_*``), ``bytes_*``, ``launches_*``; and
        ``num_output_tokens``.

    Returns
    -------
    dict
        By (part, "compute" | "memory" | "launch"), and for what is outside the parts
        ("other", "constant") and ("other", "step"): 1, and the number of decode steps.
    """
    wanted = [f"{name}_{part}" for name in ("flops", "bytes", "launches") for part in PARTS]
    absent = [name for name in (*wanted, "num_output_tokens") if name not in table]
    if absent:
        raise UserError(
            f"no columns {', '.join(absent)} found, which the roofline needs; run the experiment "
            "again so that its results have them"
        )
    terms: dict[tuple[str, str], np.ndarray] = {}
    for part in PARTS:
        exact = f"flops_{part}_analytic"
        flops = _floats(table, exact if exact in table else f"flops_{part}")
        terms[part, "compute"] = flops / hardware.peak(dtype) * 1e3
        terms[part, "memory"] = _floats(table, f"bytes_{part}") / hardware.bytes_per_s * 1e3
        overhead = hardware.launch_overhead_us / 1e3
        terms[part, "launch"] = _floats(table, f"launches_{part}") * overhead
    terms["other", "constant"] = np.ones(len(table))
    terms["other", "step"] = np.maximum(_floats(table, "num_output_tokens") - 1, 0)
    return terms


def predictors(
    entries: pd.DataFrame, hardware: Hardware, dtype: str
) -> dict[str, tuple[np.ndarray, Callable[..., Any]]]:
    """Say what each of the four predictors reads and how it is fitted: for `cross_validate`.

    Parameters
    ----------
    entries : DataFrame
        Measured requests: ``T_total``, the four token counts, and the columns of `cost_columns`.
        ``flops_total`` may be any estimator's. Where all parts' times are there the calibrated
        roofline is fitted part by part, else on the total.
    hardware : Hardware
        Its ceilings.
    dtype : str

    Returns
    -------
    dict
        ``flops``, ``tokens``, ``roofline_nominal`` and ``roofline_calibrated``: (X, fit) each,
        where ``fit(X, y)`` has ``predict(X)``. The roofline's are left out where the entries
        have no bytes or launches (results of others).
    """
    ones = np.ones(len(entries))
    vision, total = _floats(entries, "num_vision_tokens"), _floats(entries, "num_total_tokens")
    found: dict[str, tuple[np.ndarray, Callable[..., Any]]] = {
        "flops": (np.column_stack([ones, _floats(entries, "flops_total")]), nnls_relative_fit),
        "tokens": (
            np.column_stack([ones, vision, total - vision, _floats(entries, "num_output_tokens")]),
            nnls_relative_fit,
        ),
    }
    try:
        terms = roofline_terms(entries, hardware, dtype)
    except UserError:
        return found
    nominal = Predictor(None, hardware, dtype).predict(entries)["T_total"].to_numpy()
    found["roofline_nominal"] = (nominal[:, None], AsGiven.fit)
    X = np.column_stack([terms[key] for key in TERMS])
    if set(PART_TIMES.values()) <= set(entries) and entries[[*PART_TIMES.values()]].notna().all(
        axis=None
    ):
        # The measured parts travel with the features, to be fitted and not to be predicted from.
        times = [_floats(entries, column) for column in PART_TIMES.values()]
        found["roofline_calibrated"] = (np.column_stack([X, *times]), _PartwiseFit)
    else:
        found["roofline_calibrated"] = (X, nnls_relative_fit)
    return found


def shapes(table: pd.DataFrame) -> np.ndarray:
    """Number the shapes of requests; those that differ only in a few text tokens are one.

    Parameters
    ----------
    table : DataFrame
        The columns of `SHAPE`, as far as they are known in every row; without any, every row is
        a shape of its own.

    Returns
    -------
    array of int, shape (n,)
        Within equal crops, vision tokens and output tokens a new shape begins where the prompt
        grows by more than 5 % from one request to the next longer one.

    Examples
    --------
    >>> shapes(pd.DataFrame({"num_vision_tokens": 700, "num_total_tokens": [755, 757, 900]}))
    array([0, 0, 1])
    """
    known = [name for name in SHAPE if name in table and table[name].notna().all()]
    if not known:
        return np.arange(len(table))
    numbers = table[known].astype(float).reset_index(drop=True)
    prompt = numbers.pop("num_total_tokens") if "num_total_tokens" in known else None
    fixed = list(numbers)
    codes = numbers.groupby(fixed).ngroup() if fixed else pd.Series(0, index=numbers.index)
    if prompt is not None:
        ordered = pd.DataFrame({"codes": codes, "prompt": prompt}).sort_values(["codes", "prompt"])
        longer = ordered["prompt"] > ordered["prompt"].shift() * (1 + TWINS)
        codes = ((ordered["codes"].diff() != 0) | longer).cumsum().sort_index() - 1
    return codes.to_numpy()


def calibrate_predictor(entries: pd.DataFrame, hardware: Hardware, dtype: str) -> Predictor:
    """Fit how many milliseconds one millisecond at the ceiling takes, with held-out errors.

    Parameters
    ----------
    entries : DataFrame
        Measured requests or runs, of several shapes, with times of all parts and `cost_columns`.
        ``runs_ms``, where it is there, has the T_total of the single runs behind each entry: the
        interval is for one request; without it entries are taken for single runs.
    hardware : Hardware
    dtype : str

    Raises
    ------
    UserError
        Where columns are missing, or there are fewer than three shapes.
    """
    absent = [column for column in (*PART_TIMES.values(), "T_total") if column not in entries]
    if absent:
        raise UserError(f"no columns {', '.join(absent)} found, which a calibration needs")
    entries = entries.dropna(subset=[*PART_TIMES.values(), "T_total", *SHAPE])
    groups = shapes(entries)
    if len(set(groups)) < 3:
        raise UserError(
            f"{len(set(groups))} shapes with the times of all parts found; a calibration needs 3: "
            'run "kedro run --pipeline phase2" with measurement.method=timeline'
        )
    name = "roofline_calibrated"
    looked_at = predictors(entries, hardware, dtype)
    if name not in looked_at:
        roofline_terms(entries, hardware, dtype)  # says what is missing
    X, fit = looked_at[name]
    y = _floats(entries, "T_total")
    held_out = cross_validate(groups, {name: (X, fit)}, y)
    runs = [
        own if np.size(own) and np.ndim(own) == 1 else [mean]
        for own, mean in zip(entries.get("runs_ms", pd.Series([()] * len(y))), y, strict=True)
    ]
    unit = held_out.interval(name, 1.0, runs=runs)
    error = held_out.median_error[name].value, held_out.mape[name].value
    coefficients = dict(zip(TERMS, map(float, fit(X, y).coefficients), strict=True))
    return Predictor(
        coefficients,
        hardware,
        dtype,
        interval=unit,
        median_error=error[0],
        mape=error[1],
        n=len(entries),
        num_shapes=held_out.n_groups,
        measured={
            name: (float(_floats(entries, name).min()), float(_floats(entries, name).max()))
            for name in SHAPE[1:]
        },
    )


class _PartwiseFit:
    """Non-negative least squares of each part's time, in shares of the request's whole time."""

    def __init__(self, X: np.ndarray, y: np.ndarray) -> None:
        from scipy.optimize import nnls

        self.coefficients = np.zeros(len(TERMS))
        for i, part in enumerate(PART_TIMES):
            own = [j for j, key in enumerate(TERMS) if key[0] == part]
            design = X[:, own] / y[:, None]
            scale = np.abs(design).max(axis=0)
            scale[scale == 0] = 1
            self.coefficients[own] = nnls(design / scale, X[:, len(TERMS) + i] / y)[0] / scale

    def predict(self, X: np.ndarray) -> np.ndarray:
        return X[:, : len(TERMS)] @ self.coefficients


def _floats(table: pd.DataFrame, column: str) -> np.ndarray:
    return pd.to_numeric(table[column]).to_numpy(dtype=float, na_value=np.nan)
