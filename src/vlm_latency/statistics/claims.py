"""The claims of the study this project grows from, each put to its test.

Every function takes statistics and returns a `Claim`. None for a statistic means that it was not
measured, and the claim is then undecided. A whole interval on one side of the limit decides;
an interval that holds the limit does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from vlm_latency.statistics.quantiles import needed_n
from vlm_latency.statistics.results import Estimate, Result

ClaimVerdict = Literal["supported", "contradicted", "undecided"]

# "P99 much larger than P50" begins here.
TAIL_LIMIT = 1.5
# More than half is a bottleneck.
BOTTLENECK_SHARE = 0.5
# Sub-linear is a stated effect: one more token costs less than three quarters at the end of the
# sweep of what it costs at its start. No sweep of 15 sizes tells less from a straight line.
CHEAPER = 0.75
FALLS = (CHEAPER - 1) / ((CHEAPER + 1) / 2)  # as a share of the mean cost
# Costs grow or stay by 10 %: with enough data a claim is decided, unless the truth is at a limit.
GROWS, FLAT_STEP = 1.1, (0.9, 1.1)
# A predictor within 5 % on shapes it has not seen is as good as perfect.
PERFECT_ERROR = 0.05

# FLOPs saved have become time saved when nine tenths of them have.
REALISED = 0.9


@dataclass(frozen=True)
class Claim(Result):
    """A claim, its verdict, the rule that gave it and the numbers the rule looked at."""

    name: str
    text: str
    verdict: ClaimVerdict
    rule: str
    numbers: Mapping[str, Estimate | float | None]
    note: str = ""

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
        f"above, contradicted when below, which takes {needed_n(99, 0.975)} runs: with fewer P99 has "
        "no upper bound",
        {"P99 / P50": tail_ratio},
    )


def llm_bottleneck_claim(parameter_share: float | None, latency_share: Estimate | None) -> Claim:
    """Judge "the LLM is the bottleneck in parameters and in latency".

    Parameters
    ----------
    parameter_share : float or None
        Parameters of the LLM (embeddings and head included) / all parameters.
    latency_share : Estimate or None
        (T_LLM_prefill + T_LLM_decode) / T_total, a `ratio_estimate`.

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


def vision_sublinear_claim(
    marginal_change: Estimate | None, exponent: Estimate | None = None
) -> Claim:
    """Judge "vision tokens scale sub-linearly" by what one more token costs.

    Parameters
    ----------
    marginal_change : Estimate or None
        Change of what one more token costs, from the start of the sweep to its end, as a share
        of its mean (`marginal_change`), which no fixed cost touches.
    exponent : Estimate or None
        Of `power_law_fit` without an offset, as the study took it; shown, not judged. It lies
        below 1 for a fixed cost alone.

    Examples
    --------
    >>> growth, exponent = Estimate(0.5, 0.2, 0.8, 0.95, 75, ""), Estimate(0.8, 0.7, 0.9, 0.95, 75, "")
    >>> claim = vision_sublinear_claim(growth, exponent)
    >>> print(claim, claim.note, sep="; ")
    vision_sublinear: contradicted; the exponent lies below 1 by the fixed cost alone
    """
    verdict = _decide(
        marginal_change is not None and marginal_change.below(FALLS),
        marginal_change is not None and marginal_change.above(FALLS),
    )
    alone = verdict == "contradicted" and exponent is not None and exponent.below(1)
    return Claim(
        "vision_sublinear",
        "Vision tokens scale sub-linearly",
        verdict,
        "sub-linear means that at the end of the sweep one more token costs less than "
        f"{CHEAPER:.0%} of what it costs at the start: a change of {FALLS:.3f} as a share of the "
        "mean cost (fit with offset, relative errors). Supported when the whole interval of the "
        "change lies below that, contradicted when above, as it does for a straight line, whose "
        "change is 0; the exponent without offset is shown and not judged",
        {"change of the cost per token": marginal_change, "exponent without offset": exponent},
        "the exponent lies below 1 by the fixed cost alone" if alone else "",
    )


def prefill_grows_claim(growth: Estimate | None, slope: Estimate | None = None) -> Claim:
    """Judge "prefill grows with vision tokens".

    Parameters
    ----------
    growth : Estimate or None
        T_LLM_prefill at the end of the sweep over that at its start (`LinearFit.growth`).
    slope : Estimate or None
        Milliseconds per vision token; shown beside it.

    Examples
    --------
    >>> print(prefill_grows_claim(Estimate(1.08, 0.95, 1.2, 0.95, 75, "HC3")))
    prefill_grows: undecided
    """
    return Claim(
        "prefill_grows",
        "Prefill grows with vision tokens",
        _decide(
            growth is not None and growth.above(GROWS), growth is not None and growth.below(GROWS)
        ),
        "the line of T_LLM_prefill at the end of the sweep over that at its start: supported when "
        f"its whole interval lies above {GROWS:g}, contradicted when below",
        {"end / start of the sweep": growth, "ms per vision token": slope},
    )


def language_linear_claim(step_growth: Estimate | None, exponent: Estimate | None = None) -> Claim:
    """Judge "language tokens scale linearly" by what one more token costs.

    Parameters
    ----------
    step_growth : Estimate or None
        The last decode step over the second, by `LinearFit.growth` of `decode_step_ms` over
        position; the first one after a prefill meets the device in another state.
    exponent : Estimate or None
        Of T_LLM_decode over decode steps (output tokens − 1), by `power_law_fit`; shown, not
        judged: a first step that is slow makes it small.

    Examples
    --------
    >>> print(language_linear_claim(Estimate(1.3, 1.2, 1.4, 0.95, 900, "HC3")))
    language_linear: contradicted
    """
    return Claim(
        "language_linear",
        "Language tokens scale linearly",
        _decide(
            step_growth is not None and step_growth.within(*FLAT_STEP),
            step_growth is not None
            and (step_growth.below(FLAT_STEP[0]) or step_growth.above(FLAT_STEP[1])),
        ),
        "the line of the decode steps at the last position over that at the second, where it "
        f"starts: supported when its whole interval lies within {FLAT_STEP[0]:g} to "
        f"{FLAT_STEP[1]:g}, contradicted when outside; the exponent of T_LLM_decode stands beside it and is not judged",
        {"last step / first step": step_growth, "exponent": exponent},
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


def flops_become_time_claim(realised: Mapping[str, Estimate]) -> Claim:
    """Judge "FLOPs saved become time saved" by what each method realised.

    Parameters
    ----------
    realised : mapping of method and share to Estimate
        Share of T_total saved over share of the request's FLOPs saved; of k intervals each at
        1 − 5 % / k, so that all hold together at 95 %.

    Examples
    --------
    >>> print(flops_become_time_claim({"random@0.5": Estimate(0.3, 0.2, 0.4, 0.95, 20, "t")}))
    flops_become_time: contradicted
    """
    return Claim(
        "flops_become_time",
        "FLOPs saved become time saved",
        _decide(
            bool(realised) and all(each.above(REALISED) for each in realised.values()),
            any(each.below(REALISED) for each in realised.values()),
        ),
        "share of T_total saved over share of the request's FLOPs saved, of every method and share "
        f"kept that saves FLOPs, in intervals that hold together at 95 % (Bonferroni): supported when "
        f"all lie above {REALISED:g}, contradicted when one lies below",
        realised,
    )


def _decide(supported: bool, contradicted: bool) -> ClaimVerdict:
    if supported:
        return "supported"
    return "contradicted" if contradicted else "undecided"
