"""Before and after a change, two models, two devices: what is faster, and how surely."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pandas as pd

from vlm_latency.errors import DataError, MeasurementError, blaming
from vlm_latency.option_groups import CompareOptions
from vlm_latency.options import Options
from vlm_latency.pipelines.reporting import results
from vlm_latency.pipelines.reporting.results import marks
from vlm_latency.records import COMPONENTS, SCHEMA_VERSION
from vlm_latency.results import Run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from vlm_latency.datasets.variants import Variants
    from vlm_latency.pipelines.compare.variants import Compared
    from vlm_latency.plots.style import FigureContext, Style
    from vlm_latency.statistics import BandedFit, FloorAndLine, TableComparison

COLUMNS = ("T_total", "T_first_token", *COMPONENTS)


@blaming("what was measured", "as 'kedro run' writes it")
def compare_runs(
    settings: Options,
    runs: Compared,
    measured: pd.DataFrame,
    coverage: dict[str, Any],
    environments: dict[str, dict[str, Any]],
) -> tuple[dict[str, Any], dict[str, pd.DataFrame], Figure, dict[str, Figure]]:
    """Compare each run with the first one, experiment by experiment; or variants, pair by pair.

    Parameters
    ----------
    runs
        Results folders, or variants.
    measured, coverage, environments
        The runs of the variants, how many there are, and where each variant was measured.

    Returns
    -------
    result, tables, figure, side_by_side
        Verdicts per experiment and component, the baseline's environment and what differs from it,
        what could not be compared and why; a forest plot of the ratios; and where runs share them,
        the components of exp2 side by side and the vision tokens of exp3 in one panel.

    Raises
    ------
    DataError
        When two runs share no experiment, or none of theirs a request or a shape.
    """
    if not isinstance(runs, list):
        return _compare_variants(settings, runs, measured, coverage, environments)
    from vlm_latency.plots.style import FigureContext, Style

    runs = _named_apart(runs)
    baseline, *candidates = runs
    comparisons, not_compared = {}, {}
    for run in candidates:
        for name in _shared(baseline, run):
            try:
                with blaming(
                    f"{name} of {run.name} or {baseline.name}", "as 'kedro run' writes it"
                ):
                    found = _compare(runs, run, name, settings.compare)
            except DataError as error:  # such as the grids of a model that has no tiles
                not_compared[f"{run.name}: {name}"] = str(error)
            else:
                comparisons[f"{run.name}: {name}"] = found
    if not comparisons:
        raise DataError("\n".join(f"{name}: {why}" for name, why in not_compared.items()))
    differences = {run.name: environment_differences(baseline, run) for run in candidates}
    said = [mark for run in runs for result in run.results.values() for mark in marks(result)]
    said += [
        f"{name}: another {', '.join(differing)}"
        for name, differing in differences.items()
        if differing
    ]
    recorded = [
        result["environment"] for result in baseline.results.values() if "environment" in result
    ]
    about: dict[str, Any] = recorded[0] if recorded else {}
    context = FigureContext(
        environment_line=f"baseline {baseline.name}: {about.get('line', 'environment not recorded')}",
        marks=tuple(dict.fromkeys(said)),
        model="",
    )
    style = Style.of(settings.experiment("compare").figures)
    names = [run.name for run in runs]
    result = _result(settings, about, names, comparisons, differences)
    result["not_compared"] = not_compared
    figure = _ratios(settings, comparisons, baseline.name, context, style)
    return result, {"compare": _table(comparisons)}, figure, side_by_side(runs, context, style)


def _compare_variants(
    settings: Options,
    variants: Variants,
    measured: pd.DataFrame,
    coverage: dict[str, Any],
    about: dict[str, dict[str, Any]],
) -> tuple[dict[str, Any], dict[str, pd.DataFrame], Figure, dict[str, Figure]]:
    """Judge variants that were measured in turn: nothing is widened, differences are in ms too."""
    from vlm_latency.pipelines.compare.variants import judge
    from vlm_latency.plots.composition import stacks
    from vlm_latency.plots.style import FigureContext, Style

    found = judge(settings, variants, measured)
    first, *others = about
    differences = {name: _differing(about[first], about[name]) for name in others}
    result = _result(settings, about[first], list(about), found.comparisons, differences)
    result |= {
        "interleaved": True,
        "differences": found.differences,
        "variants": {
            name: handle.options.model_dump(mode="json", exclude_defaults=True)
            for name, handle in variants.models.items()
        },
        "coverage": coverage,
    }
    said = [
        mark
        for each in about.values()
        for mark in marks({"environment": each, "coverage": coverage})
    ]
    context = FigureContext(
        environment_line=f"baseline {first}: {about[first]['line']}; measured in turn",
        marks=tuple(dict.fromkeys(said)),
        model="",
    )
    style = Style.of(settings.experiment("compare").figures)
    means = {name: results.means(rows) for name, rows in found.records.items()}
    told = replace(context, finding="Mean latency of a request by component")
    return (
        result,
        {"compare": found.table()},
        _ratios(settings, found.comparisons, first, context, style),
        {"compare_components": stacks(means, told, style)},
    )


def _ratios(
    settings: Options,
    comparisons: dict[str, TableComparison],
    baseline: str,
    context: FigureContext,
    style: Style,
) -> Figure:
    from vlm_latency.plots.comparison import ratios

    return ratios(comparisons, baseline, settings.compare.margin, context, style)


def _result(
    settings: Options,
    environment: dict[str, Any],
    names: list[str],
    comparisons: dict[str, TableComparison],
    differences: dict[str, dict[str, list[Any]]],
) -> dict[str, Any]:
    """Give what is said of any comparison; the first of the names is the baseline."""
    from vlm_latency.plots.comparison import told

    matter = {"output_dir", "compare"}
    if settings.compare.variants:
        matter |= {"model", "dataset", "prompt"}
    return {
        "schema_version": SCHEMA_VERSION,
        "experiment": "compare",
        "model": environment.get("model"),
        "environment": environment,
        "baseline": names[0],
        "runs": names[1:],
        "margin": settings.compare.margin,
        "options": settings.model_dump(mode="json", include=matter),
        "comparisons": comparisons,
        "environment_differences": differences,
        "finding": told(comparisons, names[0]),
        "verdicts": {name: comparison.verdict for name, comparison in comparisons.items()},
    }


def side_by_side(runs: list[Run], context: FigureContext, style: Style) -> dict[str, Figure]:
    """Draw what several runs share in one figure each: models, devices, engines."""
    from vlm_latency.plots.composition import stacks
    from vlm_latency.plots.vision_sweep import overlaid

    drawn = {}
    shared = {
        name: [run for run in runs if name in run.tables] for name in ("exp2", "exp3", "exp4")
    }
    if len(shared["exp2"]) > 1:
        about = {run.name: results.means(run.tables["exp2"]) for run in shared["exp2"]}
        told = replace(context, finding="Mean latency of a request (exp2) by component")
        drawn["compare_components"] = stacks(about, told, style)
    sweeps = (
        ("exp3", f"num_vision_{style.vision_axis}", "T_total", "compare_vision_tokens"),
        ("exp4", "num_output_tokens", "T_LLM_decode", "compare_output_tokens"),
    )
    for experiment, axis, response, name in sweeps:
        swept = {
            run.name: run.tables[experiment] for run in shared[experiment]
            if {axis, response} <= set(run.tables[experiment])
        }  # fmt: skip
        if len(swept) > 1:
            lines = {
                label: (rows, _line(rows[rows[axis].notna()], axis, response))
                for label, rows in swept.items()
            }
            counted = axis.removeprefix("num_").replace("_", " ")
            told = replace(context, finding=f"Latency against {counted} ({experiment})")
            drawn[name] = overlaid(lines, response, told, style, axis)
    return drawn


def _line(rows: pd.DataFrame, axis: str, response: str) -> BandedFit | FloorAndLine | None:
    """Fit what the experiment's own figure shows; of exp3 a floor and a line where they hold."""
    from vlm_latency.pipelines.reporting import entries
    from vlm_latency.statistics import FloorAndLine, floor_and_line

    known = rows[rows[response].notna()]
    if axis == "num_output_tokens":
        lines = results.fits(known, axis, [response], entries.clusters(known), [])
        return results.banded(lines, known[axis]).get(response)
    floor = results.unless_impossible(
        [], "floor", floor_and_line, known[axis], known[response], known["request_id"]
    )
    if isinstance(floor, FloorAndLine) and floor.holds == "floor and line":
        return floor
    lines = results.fits(rows, axis, [response], rows["request_id"], [])
    return results.banded(lines, rows[axis]).get(response)


def fail_if_slower(settings: Options, result: dict[str, Any], page: str) -> bool:
    """End the command with an error where a run is surely slower than the user allows.

    Parameters
    ----------
    page
        Written by then, so that the reason can be read.

    Raises
    ------
    MeasurementError
        Naming the comparison: the whole interval of T_total's ratio lies above
        1 + ``compare.fail_if_slower`` percent.
    """
    limit = settings.compare.fail_if_slower
    if limit is None:
        return True
    for name, comparison in result["comparisons"].items():
        ratio = (comparison["components"].get("T_total") or {}).get("ratio") or {}
        low = ratio.get("low")
        if low is not None and low > 1 + limit / 100:
            raise MeasurementError(
                f"{name} is slower than {result['baseline']}: T_total × {ratio['value']:.3f} "
                f"[{low:.3f}, {ratio['high']:.3f}], and compare.fail_if_slower={limit:g} allows "
                f"{1 + limit / 100:.3f}"
            )
    return True


def environment_differences(baseline: Run, run: Run) -> dict[str, list[Any]]:
    """List the conditions that differ between two runs, ``path: [baseline, run]``.

    Files of the seed's scripts name no conditions: that itself is a difference.
    """
    before, after = _conditions(baseline), _conditions(run)
    if not before or not after:
        return (
            {}
            if before == after
            else {
                "conditions": ["recorded" if side else "not recorded" for side in (before, after)]
            }
        )
    return _unequal(before, after)


def _differing(baseline: dict[str, Any], variant: dict[str, Any]) -> dict[str, list[Any]]:
    return _unequal(_flat(baseline["conditions"]), _flat(variant["conditions"]))


def _unequal(before: dict[str, Any], after: dict[str, Any]) -> dict[str, list[Any]]:
    return {
        name: [before.get(name), after.get(name)]
        for name in sorted({*before, *after})
        if before.get(name) != after.get(name)
    }


def _conditions(run: Run) -> dict[str, Any]:
    """The conditions of a run's experiments, flat; the measuring method is the experiments' own."""
    flat: dict[str, Any] = {}
    for result in run.results.values():
        flat |= _flat((result.get("environment") or {}).get("conditions") or {})
    return flat


def _flat(conditions: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for group, values in conditions.items():
        if isinstance(values, dict):
            flat |= {f"{group}.{name}": value for name, value in values.items()}
        else:
            flat[group] = values
    return flat


def _shared(baseline: Run, run: Run) -> list[str]:
    names = [name for name in baseline.tables if name in run.tables]
    if not names:
        raise DataError(
            f"{baseline.name} holds {', '.join(baseline.tables)} and {run.name} holds "
            f"{', '.join(run.tables)}: no experiment in common"
        )
    return names


def _compare(
    runs: list[Run], run: Run, experiment: str, options: CompareOptions
) -> TableComparison:
    """Compare with the first run; its other sessions, where there are some, tell the drift."""
    from vlm_latency.statistics import between_sessions, compare_tables

    baseline = runs[0]

    def against_baseline(other: Run) -> TableComparison:
        return compare_tables(
            baseline.tables[experiment], other.tables[experiment], COLUMNS, margin=options.margin
        )

    def same(other: Run) -> bool:
        return bool(_conditions(baseline)) and not environment_differences(baseline, other)

    repeated = [
        against_baseline(other)
        for other in runs[1:]
        if other is not run and experiment in other.tables and same(other)
    ]
    return between_sessions(against_baseline(run), options.drift, same=same(run), repeated=repeated)


def _named_apart(runs: list[Run]) -> list[Run]:
    """Number folders of the same name."""
    names = [run.name for run in runs]
    return [
        Run(f"{run.name} ({i + 1})", run.tables, run.results) if names.count(run.name) > 1 else run
        for i, run in enumerate(runs)
    ]


def _table(comparisons: dict[str, TableComparison]) -> pd.DataFrame:
    return pd.DataFrame(
        [
            {
                "run": name,
                "component": component,
                "baseline ms": found.baseline_mean,
                "candidate ms": found.candidate_mean,
                "ratio": found.ratio.value,
                "low": found.ratio.low,
                "high": found.ratio.high,
                "verdict": found.verdict,
                "smallest visible": found.smallest_visible,
                "n": found.n_pairs,
            }
            for name, comparison in comparisons.items()
            for component, found in comparison.components.items()
        ]
    )
