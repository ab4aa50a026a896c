"""Statistics with intervals: thin layers over scipy for the questions that latencies raise.

Every number comes as an `Estimate` (value, interval, level, n, method, note); every result is a
frozen dataclass whose ``to_dict()`` is plain data for JSON. Values that are NaN are refused:
drop what was not measured. Nothing is trimmed.
"""

from vlm_latency.statistics.association import (
    Correlations,
    IsoPairs,
    correlations,
    iso_pairs,
    rank_inversions,
)
from vlm_latency.statistics.claims import (
    Claim,
    flops_become_time_claim,
    flops_imperfect_claim,
    language_linear_claim,
    llm_bottleneck_claim,
    prefill_grows_claim,
    tail_claim,
    vision_sublinear_claim,
)
from vlm_latency.statistics.comparison import (
    Comparison,
    FalseAlarms,
    TableComparison,
    a_a_false_alarms,
    between_sessions,
    compare_paired,
    compare_tables,
)
from vlm_latency.statistics.fits import (
    BandedFit,
    LinearFit,
    MultiLinearFit,
    PowerLawFit,
    linear_fit,
    marginal_change,
    multi_linear_fit,
    power_law_fit,
)
from vlm_latency.statistics.floors import FloorAndLine, floor_and_line
from vlm_latency.statistics.linearity import (
    BreakPoint,
    LinearityTest,
    Staircase,
    linearity_test,
    staircase,
)
from vlm_latency.statistics.means import mean_estimate, ratio_estimate
from vlm_latency.statistics.outliers import mark_outliers
from vlm_latency.statistics.prediction import (
    AsGiven,
    CrossValidation,
    NonNegativeFit,
    cross_validate,
    nnls_relative_fit,
    transfer_error,
)
from vlm_latency.statistics.quantiles import (
    Summary,
    needed_n,
    percentile,
    summary,
    tail_ratio,
)
from vlm_latency.statistics.results import Estimate, plain
from vlm_latency.statistics.robust import ChosenLine, headline_line, robust_line
from vlm_latency.statistics.variance import VarianceBudget, variance_budget

__all__ = [
    "AsGiven",
    "BandedFit",
    "BreakPoint",
    "ChosenLine",
    "Claim",
    "Comparison",
    "Correlations",
    "CrossValidation",
    "Estimate",
    "FalseAlarms",
    "FloorAndLine",
    "IsoPairs",
    "LinearFit",
    "LinearityTest",
    "MultiLinearFit",
    "NonNegativeFit",
    "PowerLawFit",
    "Staircase",
    "Summary",
    "TableComparison",
    "VarianceBudget",
    "a_a_false_alarms",
    "between_sessions",
    "compare_paired",
    "compare_tables",
    "correlations",
    "cross_validate",
    "floor_and_line",
    "flops_become_time_claim",
    "flops_imperfect_claim",
    "headline_line",
    "iso_pairs",
    "language_linear_claim",
    "linear_fit",
    "linearity_test",
    "llm_bottleneck_claim",
    "marginal_change",
    "mark_outliers",
    "mean_estimate",
    "multi_linear_fit",
    "needed_n",
    "nnls_relative_fit",
    "percentile",
    "plain",
    "power_law_fit",
    "prefill_grows_claim",
    "rank_inversions",
    "ratio_estimate",
    "robust_line",
    "staircase",
    "summary",
    "tail_claim",
    "tail_ratio",
    "transfer_error",
    "variance_budget",
    "vision_sublinear_claim",
]
