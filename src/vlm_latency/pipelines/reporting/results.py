"""The top level of a result, and the statistics that the reports of several experiments give."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd

from vlm_latency.errors import DataError
from vlm_latency.experiments import EXPERIMENTS
from vlm_latency.options import COMPILED, ExperimentOptions
from vlm_latency.pipelines.reporting.entries import clusters
from vlm_latency.records import COMPONENTS, COST_PARTS, SCHEMA_VERSION

if TYPE_CHECKING:
    from vlm_latency.plots.style import FigureContext
    from vlm_latency.statistics import BandedFit, ChosenLine, Claim, Estimate

COMPILED_STEP = (
    "the decode step is compiled into one graph: its time is measured as a whole, the modules "
    "inside it cannot be told apart"
)
MEANS = ("T_preprocess", "T_total", "T_first_token", "T_vision_total", *COMPONENTS)
# What disturbs a run and holds no time of the run itself.
DISTURBANCES = ("first visit of a length", "clock drop or throttling", "slow host")
# A part that is this much faster than the machine can compute was not computed.
MFU_LIMIT = 1.2


def frame(
    options: ExperimentOptions,
    environment: dict[str, Any],
    coverage: dict[str, Any],
    statistics: Mapping[str, Any],
    claims: Sequence[Claim],
    finding: str = "",
) -> dict[str, Any]:
    """Give the top level that every result has beside the seed's own keys.

    Statistics and claims are handed on as the objects they are: the dataset that writes the
    result makes JSON of them.

    Parameters
    ----------
    finding
        What was found, in a sentence that the claims' verdicts allow.
    """
    judged = judged_on(environment)
    if environment["model"].get("engine") in COMPILED:
        statistics = {**statistics, "notes": [*(statistics.get("notes") or ()), COMPILED_STEP]}
    return {
        "schema_version": SCHEMA_VERSION,
        "experiment": options.experiment,
        "protocol": options.protocol,
        "model": environment["model"],
        "environment": environment,
        "options": options.model_dump(mode="json"),
        "statistics": statistics,
        "coverage": coverage,
        "finding": finding,
        "claims": [
            replace(claim, note="; ".join(filter(None, (claim.note, judged)))) for claim in claims
        ],
    }


def with_cost_notes(coverage: dict[str, Any], records: pd.DataFrame) -> dict[str, Any]:
    """Add to what is said of the runs why costs are null or not to be trusted."""
    notes = records["costs_note"].dropna().unique().tolist() if "costs_note" in records else []
    return {**coverage, "costs": notes} if notes else coverage


def context(
    options: ExperimentOptions,
    environment: dict[str, Any],
    coverage: dict[str, Any],
    finding: str = "",
) -> FigureContext:
    """Say in a figure's footer where its numbers come from, and what is to be known of them."""
    from vlm_latency.plots.style import FigureContext

    return FigureContext(
        environment_line=environment["line"],
        marks=marks(
            {"environment": environment, "coverage": coverage, "protocol": options.protocol}
        ),
        model=str(environment["model"]["name"]),
        finding=finding,
    )


def marks(result: dict[str, Any]) -> tuple[str, ...]:
    """Say what is to be known of a result's runs before one believes a number."""
    environment, coverage = result.get("environment") or {}, result.get("coverage") or {}
    found = []
    if (environment.get("dataset") or {}).get("synthetic"):
        found.append("synthetic requests")
    if (environment.get("model") or {}).get("weights") == "random":
        found.append("random weights")
    if coverage.get("partial"):
        found.append(f"partial: {coverage['measured']} of {coverage['planned']} runs")
    differing = (coverage.get("workers") or {}).get("differing") or ()
    found += [f"worker {index} differs from the others" for index in differing]
    if coverage.get("failed"):
        found.append(f"{coverage['failed']} runs failed")
    found += [f"costs: {note}" for note in coverage.get("costs") or ()]
    if result.get("protocol", "exact") != "exact":
        found.append(f"protocol: {result['protocol']}")
    method = (environment.get("measurement") or {}).get("method", "timeline")
    if method != "timeline":
        found.append(f"method: {method}")
    return tuple(found)


def judged_on(environment: dict[str, Any]) -> str:
    """Say of a claim that it was judged on weights that were never trained."""
    model = environment["model"]
    if model.get("weights") != "random":
        return ""
    toy = "a toy" if str(model["name"]).startswith("tiny-") else "a model"
    return f"judged on {model['name']}, {toy} with random weights"


def typical(line: ChosenLine) -> str:
    """Say beside a slope that it is of the typical run, where extreme runs rule the mean."""
    return " in the typical run" if line.chosen == "robust" else ""


def sentence(*parts: str | None) -> str:
    """Join what was found."""
    return "; ".join(part for part in parts if part)


def means(rows: pd.DataFrame, names: Sequence[str] = MEANS) -> dict[str, Estimate]:
    """Give the mean of each measured column with its interval, clustered by image."""
    from vlm_latency.statistics import mean_estimate

    return {
        name: mean_estimate(known[name], clusters(known))
        for name in names
        if name in rows and not (known := rows[rows[name].notna()]).empty
    }


def shares(rows: pd.DataFrame, names: Sequence[str] = COMPONENTS) -> dict[str, Estimate]:
    """Give each component's share of T_total, a ratio of means, with its interval."""
    from vlm_latency.statistics import ratio_estimate

    return {
        name: ratio_estimate(known[name], known["T_total"], clusters(known))
        for name in names
        if name in rows and not (known := rows[rows[name].notna()]).empty
    }


def fits(
    rows: pd.DataFrame, x: str, names: Sequence[str], alike: pd.Series, notes: list[str]
) -> dict[str, ChosenLine]:
    """Fit lines of several columns over one, by least squares and robustly.

    Parameters
    ----------
    alike
        Which runs are alike: of one request, or of one image.
    """
    from vlm_latency.statistics import headline_line

    found = {}
    for name in names:
        known = rows[rows[name].notna()]
        if known.empty:
            continue
        axis = known[x].astype(float)
        fit = unless_impossible(
            notes, f"line of {name}", headline_line, axis, known[name], alike[known.index]
        )
        if fit is not None:
            found[name] = fit
    return found


def banded(lines: Mapping[str, ChosenLine], x: pd.Series) -> dict[str, BandedFit]:
    """Give the line that is the headline of each column, with its band for the figures."""
    return {name: line.headline.banded(x.astype(float)) for name, line in lines.items()}


def unless_impossible(
    notes: list[str], what: str, compute: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """Compute a statistic, or note why these data do not allow it."""
    try:
        return compute(*args, **kwargs)
    except DataError as error:
        if (note := f"{what}: {error}") not in notes:
            notes.append(note)
        return None


def accuracy(
    rows: pd.DataFrame, requests: pd.DataFrame, environment: dict[str, Any]
) -> Estimate | dict[str, Any]:
    """Give the official VQA accuracy of the generated answers, where they mean something."""
    from vlm_latency.statistics import mean_estimate
    from vlm_latency.vqa import vqa_accuracy

    if environment["model"].get("weights") != "pretrained":
        return {"value": None, "refused": "the weights are random: the answers mean nothing"}
    natural = rows[(rows["output_length"] == "natural") & (rows["run_index"] == 0)]
    answers = requests.set_index("request_id")["answers"].dropna()
    judged = natural[natural["request_id"].isin(answers.index)]
    if judged.empty:
        return {"value": None, "refused": "needs output_length=natural and questions with answers"}
    scores = [
        vqa_accuracy(text or "", json.loads(answers[request]))
        for text, request in zip(
            judged["generated_text"].fillna(""), judged["request_id"], strict=True
        )
    ]
    return mean_estimate(scores, clusters(judged))


def outliers(rows: pd.DataFrame) -> dict[str, Any]:
    """Count the marked runs by their likely cause; they stay in every statistic."""
    marked = rows[rows["outlier"].fillna(False).astype(bool)]
    causes = marked["outlier_cause"].value_counts()
    return {
        "marked": len(marked),
        "of": len(rows),
        "causes": {str(cause): int(count) for cause, count in causes.items()},
    }


@dataclass(frozen=True)
class Disturbance:
    """A headline number over all runs, and over those that nothing known disturbed.

    `moved` says that the second lies outside of the first one's interval.
    """

    number: str
    with_all: Estimate
    undisturbed: Estimate
    disturbed_runs: int
    of: int
    causes: dict[str, int]
    moved: bool
    unit: Literal["ms", "µs"] = "ms"  # of the sentence; the numbers are milliseconds

    def __str__(self) -> str:
        from vlm_latency.plots.notation import interval

        without = interval(self.undisturbed, self.unit, {"ms": 1, "µs": 1000}[self.unit])
        return (
            f"without the {self.disturbed_runs} of {self.of} runs that were disturbed "
            f"({', '.join(self.causes)}) {self.number} is {without}"
        )


def disturbance(
    rows: pd.DataFrame,
    number: str,
    compute: Callable[[pd.DataFrame], Estimate | None],
    unit: Literal["ms", "µs"] = "ms",
) -> Disturbance | None:
    """Give a headline number with and without disturbed runs; None where no run was disturbed.

    Nothing is removed anywhere else: a title says where it would matter.
    """
    causes = rows["outlier_cause"].where(rows["outlier_cause"].isin(DISTURBANCES)).dropna()
    if causes.empty or len(causes) == len(rows):
        return None
    everything, rest = compute(rows), compute(rows.drop(index=causes.index))
    if everything is None or rest is None or rest.value is None:
        return None
    moved = everything.above(rest.value) or everything.below(rest.value)
    counts = {str(cause): int(count) for cause, count in causes.value_counts().items()}
    return Disturbance(number, everything, rest, len(causes), len(rows), counts, moved, unit)


def not_computed(rows: pd.DataFrame) -> list[str]:
    """Name the parts that took less time than their FLOPs can take on this machine.

    Such as an encoder whose features a model keeps from the run before.
    """
    said = []
    for part in COST_PARTS:
        reached = rows[f"mfu_{part}"].median() if f"mfu_{part}" in rows else None
        if pd.notna(reached) and reached > MFU_LIMIT:
            said.append(
                f"{part}: MFU {reached:.3g} is more than the machine can do: at least some of it "
                "was not computed in the timed runs (are features cached?)"
            )
    return said


def reached(rows: pd.DataFrame) -> dict[str, dict[str, Estimate]]:
    """Say which shares of the machine's peaks a part of a request reached, the median of the runs.

    Returns
    -------
    dict
        By part (``vision``, ``llm_decode``, …) ``compute`` (MFU) and ``bandwidth`` (MBU), where
        the machine's peaks and the part's costs are known.
    """
    from vlm_latency import statistics as st

    found: dict[str, dict[str, Estimate]] = {}
    for part in COST_PARTS:
        for kind, name in (("compute", f"mfu_{part}"), ("bandwidth", f"mbu_{part}")):
            known = rows[rows[name].notna()] if name in rows else rows.iloc[:0]
            if len(known):
                share = st.percentile(known[name].astype(float), 50, clusters=clusters(known))
                found.setdefault(part, {})[kind] = share
    return found


def reached_table(found: Mapping[str, Mapping[str, Estimate]]) -> pd.DataFrame:
    """Put `reached` into one row per part."""
    from vlm_latency.plots.notation import interval

    return pd.DataFrame(
        [
            {
                "part": part,
                **{f"{kind} (%)": interval(share, "", 100) for kind, share in of.items()},
            }
            for part, of in found.items()
        ]
    )


def paper_table(experiment: str, found: Mapping[str, Any]) -> pd.DataFrame:
    """Put what a paper prints into five columns: the experiment's facts that are estimates."""
    from vlm_latency.plots.notation import interval
    from vlm_latency.statistics import Estimate

    rows = []
    for fact in EXPERIMENTS[experiment].facts:
        value: Any = found
        for key in fact.path:
            value = value.get(key) if isinstance(value, Mapping) else getattr(value, key, None)
        if isinstance(value, Estimate) and value.value is not None:
            shown, _, ends = interval(value, "", fact.scale).partition(" ")
            rows.append((fact.label, fact.unit, shown, ends, value.n))
    return pd.DataFrame(rows, columns=["quantity", "unit", "value", "95 % interval", "n"])


def estimates_table(found: Mapping[str, Estimate], unit: str) -> pd.DataFrame:
    """Put estimates by name into a table for people."""
    return pd.DataFrame(
        [
            {
                "quantity": name,
                unit: value.value,
                "low": value.low,
                "high": value.high,
                "n": value.n,
                "method": value.method,
            }
            for name, value in found.items()
        ]
    )


def slopes_table(lines: Mapping[str, ChosenLine]) -> pd.DataFrame:
    """Put fitted lines side by side."""
    return pd.DataFrame(
        [
            {
                "quantity": name,
                "ms per token": line.headline.slope.value,
                "low": line.headline.slope.low,
                "high": line.headline.slope.high,
                "intercept ms": line.headline.intercept.value,
                "fit": line.chosen,
                "R²": line.least_squares.r_squared,
                "least squares": line.least_squares.slope.value,
                "robust": line.robust.slope.value,
            }
            for name, line in lines.items()
        ]
    )
