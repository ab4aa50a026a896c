"""exp3: what a vision token costs, the encoder's share told apart from the decoder's."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, TypeGuard

import pandas as pd

from vlm_latency.options import ExperimentOptions
from vlm_latency.pipelines.reporting import entries, results
from vlm_latency.plots.notation import interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from vlm_latency.statistics import Claim, Estimate, FloorAndLine

FITTED = ("T_total", "T_first_token", "T_vision_encoder", "T_projector", "T_LLM_prefill")


def report(
    options: ExperimentOptions,
    records: pd.DataFrame,
    requests: pd.DataFrame,
    coverage: dict[str, Any],
    environment: dict[str, Any],
    ceilings: dict[str, Any],
) -> tuple[dict[str, Any], dict[str, pd.DataFrame], Figure]:
    """Report on vision tokens.

    Returns
    -------
    result, tables, figure
        ``exp3_vision_tokens_vs_latency`` as JSON, tables for people, and the figure.
    """
    from vlm_latency.plots.style import Style
    from vlm_latency.plots.vision_sweep import vision_tokens_vs_latency

    # Whatever the questions of the other experiments come from, a sweep's images are made for it.
    made = bool(requests["synthetic"].fillna(False).all())
    environment = {**environment, "dataset": {**environment["dataset"], "synthetic": made}}
    coverage = results.with_cost_notes(coverage, records)
    rows = entries.succeeded(records)
    found = _statistics(options, rows)
    claims = _claims(found)
    finding = _finding(found, options.figures.vision_axis)
    figure = vision_tokens_vs_latency(
        rows,
        found,
        results.context(options, environment, coverage, finding),
        Style.of(options.figures),
    )
    table = entries.averaged(records, requests, entries.COSTS)
    result = {
        "results": entries.entry_dicts(table),
        "ceilings": ceilings,
        **results.frame(options, environment, coverage, found, claims, finding),
    }
    tables = {
        "paper": results.paper_table("exp3", found),
        "grids": _grids(table),
        "slopes": results.slopes_table(found["lines"]),
    }
    return result, tables, figure


def _statistics(options: ExperimentOptions, rows: pd.DataFrame) -> dict[str, Any]:
    """Fit, test and count what the sweep tells."""
    from vlm_latency import statistics as st

    notes = results.not_computed(rows)
    axis = f"num_vision_{options.figures.vision_axis}"
    tokens, request = rows[axis].astype(float), rows["request_id"]
    lines = results.fits(rows, axis, FITTED, request, notes)
    floors = _floors(rows, tokens, notes)
    exponent = results.unless_impossible(
        notes, "exponent", st.power_law_fit, tokens, rows["T_total"], request
    )
    steps = results.unless_impossible(
        notes,
        "staircase",
        st.staircase,
        tokens,
        rows["T_vision_total"],
        rows["num_crops"].astype(float),
        request,
    )
    bend = results.unless_impossible(
        notes, "linearity", st.linearity_test, tokens, rows["T_total"], request
    )
    encoder = _crops_and_tokens(rows, "T_vision_encoder", notes)
    prefill = _crops_and_tokens(rows, "T_LLM_prefill", notes)
    return {
        "axis": axis,
        "sizes": sorted(tokens.unique()),
        "fits": results.banded(lines, tokens),
        "lines": lines,
        "floors": floors,
        "exponent": exponent.exponent if exponent else None,
        "marginal_change": results.unless_impossible(
            notes, "marginal cost", st.marginal_change, tokens, rows["T_total"], request
        ),
        "staircase": steps,
        "linearity": bend,
        "encoder_per_crop": encoder.get("num_crops"),
        "encoder_per_token": encoder.get("num_vision_tokens"),
        "prefill_per_crop": prefill.get("num_crops"),
        "prefill_per_token": prefill.get("num_vision_tokens"),
        "disturbed": results.disturbance(
            rows, "a vision token's cost", lambda runs: _slope(runs, axis), "µs"
        ),
        "reached": results.reached(rows),
        "outliers": results.outliers(rows),
        "notes": notes,
    }


def _claims(found: dict[str, Any]) -> list[Claim]:
    """Judge the claims on vision tokens."""
    from vlm_latency import statistics as st

    prefill = found["lines"].get("T_LLM_prefill")
    line = prefill.headline if prefill else None
    sizes = found["sizes"]
    growth = line.growth(sizes[0], sizes[-1]) if line else None
    claims = [
        st.vision_sublinear_claim(found["marginal_change"], found["exponent"]),
        st.prefill_grows_claim(growth, line.slope if line else None),
    ]
    if (floor := found["floors"].get("T_total")) and floor.holds == "floor and line":
        claims[0] = replace(claims[0], note=results.sentence(claims[0].note, floor.note))
    return claims


def _floors(rows: pd.DataFrame, tokens: pd.Series, notes: list[str]) -> dict[str, FloorAndLine]:
    """Ask of each column whether launches set a floor, below which a token costs nothing."""
    from vlm_latency.statistics import floor_and_line

    found = {}
    for name in ("T_total", "T_first_token", "T_LLM_prefill"):
        known = rows[rows[name].notna()]
        fit = results.unless_impossible(
            notes,
            f"floor of {name}",
            floor_and_line,
            tokens[known.index],
            known[name],
            known["request_id"],
        )
        if fit is not None:
            found[name] = fit
    return found


def _slope(rows: pd.DataFrame, axis: str) -> Estimate | None:
    fits = results.fits(rows, axis, ["T_total"], rows["request_id"], [])
    return fits["T_total"].headline.slope if fits else None


def _finding(found: dict[str, Any], axis: Literal["tokens", "patches"]) -> str:
    """Say what the tests allow: a cost per token only of what follows a line."""
    from vlm_latency.statistics.claims import FALLS

    unit = "patch" if axis == "patches" else "token"
    said, lines, floors, bend = [], found["lines"], found["floors"], found["linearity"]
    if len(found["sizes"]) == 1:
        return (
            f"every image was {found['sizes'][0]:g} vision {axis}: what one costs cannot be told from "
            "one number of them"
        )
    floor = floors.get("T_total")
    if _carries(floor, found["sizes"]):
        said.append(
            f"below {interval(floor.free)} vision {axis} one costs nothing, beyond each costs "
            f"{interval(floor.slope, 'µs', 1000)} of T_total"
        )
    elif "T_total" in lines:
        slope, change = lines["T_total"].headline.slope, found["marginal_change"]
        cost, typical = interval(slope, "µs", 1000), results.typical(lines["T_total"])
        if not slope.above(0):
            cost = cost.replace(" (no interval)", ", no interval")
            said.append(f"what a vision {unit} costs cannot be told from zero ({cost})")
        elif bend and bend.verdict == "not a line":
            said.append(
                f"T_total does not follow one line: {cost} per vision {unit} on average{typical}"
            )
        elif change is None or not change.within(FALLS, -FALLS):  # a line, for all that is known
            said.append(f"a vision {unit} costs {cost} of T_total on average of the sweep{typical}")
        else:
            said.append(f"each vision {unit} costs {cost} of T_total{typical}")
    prefill = floors.get("T_LLM_prefill")
    if _carries(prefill, found["sizes"]) and not _carries(floor, found["sizes"]):
        said.append(f"below {interval(prefill.free)} {axis} one costs the prefill nothing")
    crop, token = found["encoder_per_crop"], found["prefill_per_token"]
    apart = []
    if crop and crop.above(0):
        apart.append(f"a crop costs the encoder {interval(crop, 'ms')}")
    if token and token.above(0):
        apart.append(f"a token the prefill {interval(token, 'µs', 1000)}")
    if apart:
        said.append("told apart, " + " and ".join(apart))
    disturbed = found["disturbed"]
    return results.sentence(*said, str(disturbed) if disturbed and disturbed.moved else None)


def _carries(fit: FloorAndLine | None, sizes: list[float]) -> TypeGuard[FloorAndLine]:
    """Whether a floor is a headline: it holds, and at least two sizes surely lie on it."""
    return (
        fit is not None
        and fit.holds == "floor and line"
        and fit.free.low is not None
        and sum(size <= fit.free.low for size in sizes) > 1
    )


def _crops_and_tokens(rows: pd.DataFrame, column: str, notes: list[str]) -> dict[str, Estimate]:
    """Tell the cost of a crop from the cost of a token; needs grids of equal crops."""
    from vlm_latency.statistics import multi_linear_fit

    known = rows[rows[column].notna()]
    if known.empty:
        return {}
    names = ["num_crops", "num_vision_tokens"]
    fit = results.unless_impossible(
        notes,
        f"{column} over crops and tokens",
        multi_linear_fit,
        known[names].astype(float),
        known[column],
        names,
        known["request_id"],
    )
    return fit.coefficients if fit else {}


def _grids(table: pd.DataFrame) -> pd.DataFrame:
    shown = ["grid", "resolution", "num_crops", "num_vision_tokens", "num_total_tokens", "num_runs"]
    times = ["T_total", "T_vision_encoder", "T_projector", "T_LLM_prefill", "T_other"]
    return table[[*shown, *times]].reset_index(drop=True)
