"""The claims of the study this project grows from, each put to its test.

Every function takes statistics and returns a `Claim`. None for a statistic means that it was not
measured, and the claim is then undecided. A whole interval on one side of the limit decides;
an interval that holds the limit does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from vlm_latency.statistics.results import Estimate, Result

ClaimVerdict = Literal["supported", "contradicted", "undecided"]

# "P99 much larger than P50" begins here.
TAIL_LIMIT = 1.5
# More than half is a bottleneck.
BOTTLENECK_SHARE = 0.5
# An exponent within 5 % of 1 is linear; a step that grows by less than 10 % is flat.
LINEAR_EXPONENT = (0.95, 1.05)
FLAT_STEP = (0.9, 1.1)
# A predictor within 5 % on shapes it has not seen is as good as perfect.
PERFECT_ERROR = 0.05


@dataclass(frozen=True)
class Claim(Result):
    """A claim, its verdict, the rule that gave it and the numbers the rule looked at."""

    name: str
    text: str
    verdict: ClaimVerdict
    rule: str
    numbers: Mapping[str, Estimate | float | None]

    def __str__(self) -> str:
        return f"{self.name}: {self.verdict}"


def tail_claim(tail_ratio: Estimate | None) -> Claim:
    """Judge "P99 ≫ P50" by the ratio P99 / P50 of T_total (`tail_ratio`).

    >>> from vlm_latency.statistics import tail_ratio
    >>> print(tail_claim(tail_ratio([12.0] * 8)))
    tail: contradicted
    """
    return Claim(
        "tail",
        "P99 ≫ P50",
        _decide(
            tail_ratio is not None and tail_ratio.above(TAIL_LIMIT),
            tail_ratio is not None and tail_ratio.below(TAIL_LIMIT),
        ),
        f"P99 / P50 of T_total against {TAIL_LIMIT:g}: supported when its whole interval lies "
        "above, contradicted when below",
        {"P99 / P50": tail_ratio},
    )


def llm_bottleneck_claim(parameter_share: float | None, latency_share: Estimate | None) -> Claim:
    """Judge "the LLM is the bottleneck in parameters and in latency".

    Parameters
    ----------
    parameter_share : float or None
        Parameters of the LLM (embeddings and head included) / all parameters.
    latency_share : Estimate or None
        (T_LLM_prefill + T_LLM_decode) / T_total, a `bootstrap_ratio`.

    Examples
    --------
    >>> print(llm_bottleneck_claim(0.9, Estimate(0.4, 0.35, 0.45, 0.95, 50, "BCa bootstrap")))
    llm_bottleneck: contradicted
    """
    limit = BOTTLENECK_SHARE
    known = parameter_share is not None and latency_share is not None
    return Claim(
        "llm_bottleneck",
        "The LLM is the bottleneck in parameters and in latency",
        _decide(
            known and parameter_share > limit and latency_share.above(limit),  # type: ignore[operator, union-attr]
            (parameter_share is not None and parameter_share <= limit)
            or (latency_share is not None and latency_share.below(limit)),
        ),
        f"supported when the LLM has more than {limit:.0%} of the parameters and the whole "
        f"interval of its share of T_total lies above {limit:.0%}; contradicted when either lies "
        "below",
        {"parameter share": parameter_share, "latency share": latency_share},
    )


def vision_sublinear_claim(exponent: Estimate | None) -> Claim:
    """Judge "vision tokens scale sub-linearly" by the exponent of `power_law_fit`.

    >>> print(vision_sublinear_claim(Estimate(0.8, 0.7, 0.9, 0.95, 120, "HC3")))
    vision_sublinear: supported
    """
    return Claim(
        "vision_sublinear",
        "Vision tokens scale sub-linearly",
        _decide(
            exponent is not None and exponent.below(1 - 1e-9),
            exponent is not None and exponent.above(1 - 1e-9),
        ),
        "exponent of latency over vision tokens (y = a·x^b) against 1: supported when its whole "
        "interval lies below, contradicted when at or above",
        {"exponent": exponent},
    )


def prefill_grows_claim(slope: Estimate | None) -> Claim:
    """Judge "prefill grows with vision tokens" by the slope of T_LLM_prefill, ms per token.

    >>> print(prefill_grows_claim(Estimate(0.02, -0.01, 0.05, 0.95, 12, "HC3")))
    prefill_grows: undecided
    """
    return Claim(
        "prefill_grows",
        "Prefill grows with vision tokens",
        _decide(
            slope is not None and slope.above(0),
            slope is not None and slope.high is not None and slope.high <= 0,
        ),
        "slope of T_LLM_prefill over vision tokens against 0: supported when its whole interval "
        "lies above, contradicted when at or below",
        {"ms per vision token": slope},
    )


def language_linear_claim(exponent: Estimate | None, step_growth: Estimate | None) -> Claim:
    """Judge "language tokens scale linearly".

    Parameters
    ----------
    exponent : Estimate or None
        Of T_LLM_decode over decode steps (output tokens − 1), by `power_law_fit`.
    step_growth : Estimate or None
        The last decode step over the first, by `LinearFit.growth` of `decode_step_ms` over
        position.

    Examples
    --------
    >>> exponent = Estimate(1.01, 0.99, 1.02, 0.95, 100, "HC3")
    >>> print(language_linear_claim(exponent, Estimate(1.3, 1.2, 1.4, 0.95, 900, "HC3")))
    language_linear: contradicted
    """
    statistics = ((exponent, LINEAR_EXPONENT), (step_growth, FLAT_STEP))
    return Claim(
        "language_linear",
        "Language tokens scale linearly",
        _decide(
            all(found is not None and found.within(*limits) for found, limits in statistics),
            any(
                found is not None and (found.below(limits[0]) or found.above(limits[1]))
                for found, limits in statistics
            ),
        ),
        "supported when the exponent of T_LLM_decode over decode steps lies within "
        f"{LINEAR_EXPONENT[0]:g} to {LINEAR_EXPONENT[1]:g} and the last step costs "
        f"{FLAT_STEP[0]:g} to {FLAT_STEP[1]:g} times the first (whole intervals); contradicted "
        "when either lies outside",
        {"exponent": exponent, "last step / first step": step_growth},
    )


def flops_imperfect_claim(flops_error: Estimate | None, error_ratio: Estimate | None) -> Claim:
    """Judge "FLOPs are not a perfect predictor" on shapes the predictor has not seen.

    Parameters
    ----------
    flops_error : Estimate or None
        Mean absolute error of FLOPs alone, as a share of the latency (`CrossValidation.mape`).
    error_ratio : Estimate or None
        Its error over that of the alternative (`CrossValidation.error_ratio`).

    Examples
    --------
    >>> error = Estimate(0.3, 0.25, 0.35, 0.95, 40, "BCa bootstrap")
    >>> print(flops_imperfect_claim(error, Estimate(6.0, 4.0, 8.0, 0.95, 40, "BCa bootstrap")))
    flops_imperfect: supported
    """
    return Claim(
        "flops_imperfect",
        "FLOPs are not a perfect predictor",
        _decide(
            flops_error is not None
            and error_ratio is not None
            and flops_error.above(PERFECT_ERROR)
            and error_ratio.above(1),
            (flops_error is not None and flops_error.below(PERFECT_ERROR))
            or (error_ratio is not None and error_ratio.below(1)),
        ),
        f"supported when FLOPs alone err by more than {PERFECT_ERROR:.0%} on held-out shapes and "
        "by more than the alternative (whole intervals); contradicted when they err by less than "
        f"{PERFECT_ERROR:.0%} or by less than the alternative",
        {"error of FLOPs alone": flops_error, "over error of the alternative": error_ratio},
    )


def _decide(supported: bool, contradicted: bool) -> ClaimVerdict:
    if supported:
        return "supported"
    return "contradicted" if contradicted else "undecided"
