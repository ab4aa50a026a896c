"""exp6: what token reduction claims to win, and what it wins."""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import pandas as pd

from vlm_latency.errors import UserError
from vlm_latency.experiments import BASELINE
from vlm_latency.options import ExperimentOptions
from vlm_latency.pipelines.reporting import results
from vlm_latency.pipelines.reporting.entries import succeeded
from vlm_latency.plots.notation import interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from vlm_latency.models import ModelHandle
    from vlm_latency.statistics import Estimate, TableComparison

CONVENTION = "fastv"  # what papers on token reduction count
PAIR = ("request_id", "run_index")
# The prefill and the method, which papers time together.
REDUCED_PREFILL = "T_LLM_prefill_reduced"
SHOWN = ("T_first_token", REDUCED_PREFILL, "T_LLM_decode", "T_total")


def report(
    options: ExperimentOptions,
    records: pd.DataFrame,
    requests: pd.DataFrame,
    coverage: dict[str, Any],
    environment: dict[str, Any],
    model: ModelHandle,
) -> tuple[dict[str, Any], dict[str, pd.DataFrame], Figure]:
    """Report on every method and share against the model as it is.

    Returns
    -------
    result
        ``exp6_token_reduction.json``: one entry per method and share, with ``claimed`` and
        ``measured`` against the runs without a method.
    tables
        ``paper``: the columns that papers on token reduction print; ``components``.
    figure
        Claimed against measured speed-up, one panel per component.
    """
    from vlm_latency import statistics as st
    from vlm_latency.plots.reduction import claimed_and_measured
    from vlm_latency.plots.style import Style
    from vlm_latency.reduction import METHODS, method_of, refusal

    coverage = results.with_cost_notes(coverage, records)
    rows = succeeded(records)
    question = rows["request_id"].str.rpartition("/")[0]
    rows = rows.assign(
        asked=rows["request_id"],
        request_id=question,
        **{REDUCED_PREFILL: rows["T_LLM_prefill"] + rows["T_reduction"].fillna(0)},
    )
    notes: list[str] = []
    before = rows[rows["method"] == BASELINE]
    entries: list[dict[str, Any]] = []
    runs: dict[str, pd.DataFrame] = {}
    for (name, keep), own in rows.groupby(["method", "keep"], sort=False):
        if name == BASELINE:
            continue
        compared = results.unless_impossible(notes, f"{name}@{keep:g}", _compared, before, own)
        if compared is not None:
            entry = _entry(str(name), before, own, compared, model, notes)
            entry["accuracy"] = results.accuracy(
                own.assign(request_id=own["asked"]), requests, environment
            )
            entries.append(entry)
            runs[_way(entry)] = own
    entries.sort(key=lambda entry: (entry["method"] != "identity", entry["method"], -entry["keep"]))
    saving = [entry for entry in entries if entry["realised"] is not None]
    # As many as are judged at once, so that all intervals hold together (Bonferroni).
    level = 1 - 0.05 / max(1, len(saving))
    realised = {
        _way(entry): together
        for entry in saving
        if (together := _realised(_compared(before, runs[_way(entry)], level), entry["claimed"]))
    }
    claim = st.flops_become_time_claim(realised)
    identity = next((entry for entry in entries if entry["method"] == "identity"), None)
    engine = options.model.engine
    refused = [f"{name}: {why}" for name in METHODS if (why := refusal(method_of(name), engine))]
    shares = [each.value for each in realised.values() if each.value is not None]
    statistics: dict[str, Any] = {
        "finding": "",
        "baseline": results.means(before, [*results.MEANS, REDUCED_PREFILL]),
        "identity": identity and identity["measured"]["T_total"]["verdict"],
        "realised": sum(shares) / len(shares) if shares else None,
        "pays_from": {name: _pays_from(entries, name) for name in _names(entries)},
        "refused": "; ".join(refused),
        "attention": {
            key: environment["model"].get(key)
            for key in ("attn_implementation", "sdpa_backend", "sdpa_backend_encoder")
        },
        "notes": notes,
    }
    finding = statistics["finding"] = _finding(entries, statistics)
    context = results.context(options, environment, coverage, finding)
    figure = claimed_and_measured(entries, SHOWN, context, Style.of(options.figures))
    result = {
        "results": entries,
        **results.frame(options, environment, coverage, statistics, [claim], finding),
    }
    return result, {"paper": _paper(entries, before), "components": _components(entries)}, figure


def _entry(
    name: str,
    before: pd.DataFrame,
    own: pd.DataFrame,
    compared: TableComparison,
    model: ModelHandle,
    notes: list[str],
) -> dict[str, Any]:
    """Put together what one method at one share claims and wins."""
    from vlm_latency.reduction import method_of
    from vlm_latency.statistics import mean_estimate

    method = method_of(name)
    paired = before[list(PAIR)].merge(own[list(PAIR)])
    claimed = _claimed(paired.merge(before), paired.merge(own), model, method, notes)
    return {
        "method": name,
        "keep": float(own["keep"].iloc[0]),
        "source": method.source,
        "deviations": method.deviations,
        "tokens": mean_estimate(own["num_vision_tokens_kept"].astype(float)),
        "tokens_before": mean_estimate(before["num_vision_tokens_kept"].astype(float)),
        "kv_cache_bytes": float(own["kv_cache_bytes"].mean()),
        "T_reduction": results.means(own, ["T_reduction"]).get("T_reduction"),
        "means": results.means(own, [*results.MEANS, REDUCED_PREFILL]),
        "claimed": claimed,
        "measured": {
            component: {"speed_up": _inverse(each.ratio), "verdict": each.verdict}
            for component, each in compared.components.items()
        },
        "realised": _realised(compared, claimed),
    }


def _way(entry: dict[str, Any]) -> str:
    return f"{entry['method']}@{entry['keep']:g}"


def _compared(before: pd.DataFrame, own: pd.DataFrame, level: float = 0.95) -> TableComparison:
    """Compare runs of the same question and number; about these requests, as `api.compare`."""
    from vlm_latency.statistics import compare_tables
    from vlm_latency.statistics.comparison import COMPARED

    columns = (*COMPARED, REDUCED_PREFILL)
    return compare_tables(before.drop(columns="image_id"), own, columns, level=level, match_by=PAIR)


def _claimed(
    before: pd.DataFrame, own: pd.DataFrame, model: ModelHandle, method: Any, notes: list[str]
) -> dict[str, Any]:
    """FLOPs with and without a method, exact and as papers count them, and their ratios."""
    from vlm_latency.costs.conventions import (
        count,
        lengths_by_layer,
        shortened_decode,
        shortened_prefill,
    )
    from vlm_latency.costs.model import CostModel
    from vlm_latency.costs.shapes import RequestShape

    costs = CostModel(model.architecture)
    claimed: dict[str, Any] = {"convention": CONVENTION, "speed_up": None, "flops_ratio": None}
    totals = {"formula": [0.0, 0.0], "prefill": [0.0, 0.0], "total": [0.0, 0.0]}
    try:
        layers = len(costs.census.layers)
        for side, table in enumerate((before, own)):
            for shape, kept in zip(
                RequestShape.of_table(table), table["num_vision_tokens_kept"], strict=True
            ):
                total = shape.num_total_tokens
                short = total - shape.num_vision_tokens + int(kept)
                at = method.layer if side and method.where == "layer" else 0
                lengths = lengths_by_layer(total, short, at, layers)
                flops = costs.flops(shape)
                prefill = shortened_prefill(costs.census, lengths)
                decode = shortened_decode(costs.census, lengths, int(shape.decode_steps))
                totals["formula"][side] += count(costs, shape, CONVENTION, lengths)
                totals["prefill"][side] += prefill
                totals["total"][side] += (
                    int(flops["vision"]) + int(flops["projector"]) + prefill + decode
                )
    except UserError as error:
        if (note := f"FLOPs: {error}") not in notes:
            notes.append(note)
        return claimed
    for name, (full, reduced) in totals.items():
        claimed[name] = {"before": full / len(own), "after": reduced / len(own)}
    formula, exact = totals["formula"], totals["total"]
    claimed["speed_up"] = formula[0] / formula[1]
    claimed["flops_ratio"] = exact[1] / exact[0]
    return claimed


def _inverse(ratio: Estimate) -> Estimate:
    """From a ratio of times to a speed-up."""

    def over(value: float | None) -> float | None:
        return 1 / value if value else None

    return replace(ratio, value=over(ratio.value), low=over(ratio.high), high=over(ratio.low))


def _realised(found: TableComparison, claimed: dict[str, Any]) -> Estimate | None:
    """Share of the time saved over the share of FLOPs saved; None where none are."""
    left = claimed["flops_ratio"]
    if left is None or left >= 1:
        return None
    ratio = found.components["T_total"].ratio

    def share(value: float | None) -> float | None:
        return None if value is None else (1 - value) / (1 - left)

    return replace(ratio, value=share(ratio.value), low=share(ratio.high), high=share(ratio.low))


def _names(entries: list[dict[str, Any]]) -> list[str]:
    return [n for n in dict.fromkeys(entry["method"] for entry in entries) if n != "identity"]


def _pays_from(entries: list[dict[str, Any]], name: str) -> float | None:
    """The largest share kept from which on down T_total is FASTER; None: at no share measured."""
    found = None
    for entry in sorted((e for e in entries if e["method"] == name), key=lambda e: e["keep"]):
        if entry["measured"]["T_total"]["verdict"] != "FASTER":
            break
        found = float(entry["keep"])
    return found


def _finding(entries: list[dict[str, Any]], statistics: dict[str, Any]) -> str:
    reducing = [entry for entry in entries if entry["method"] != "identity"]
    if not reducing:
        return f"identity is {statistics['identity']}"
    best = max(reducing, key=lambda entry: entry["measured"]["T_total"]["speed_up"].value or 0)
    faster = sum(e["measured"]["T_total"]["verdict"] == "FASTER" for e in reducing)
    claimed = best["claimed"]["speed_up"]
    against = f", {claimed:.2f}× claimed" if claimed else ""
    return results.sentence(
        f"{faster} of {len(reducing)} reductions are FASTER in T_total",
        f"the most, {best['method']} at {best['keep']:g}, is "
        f"{interval(best['measured']['T_total']['speed_up'])}× as fast "
        f"({best['measured']['T_total']['verdict']}){against}",
        f"identity is {statistics['identity']}",
    )


def _paper(entries: list[dict[str, Any]], before: pd.DataFrame) -> pd.DataFrame:
    """The columns that papers on token reduction print."""
    means = before[["T_total", REDUCED_PREFILL, "T_first_token", "T_LLM_decode"]].mean()
    first = {
        "method": BASELINE,
        "keep": 1.0,
        "tokens": float(before["num_vision_tokens_kept"].mean()),
        "total ms": means["T_total"],
        "prefill ms": means[REDUCED_PREFILL],
        "first token ms": means["T_first_token"],
        "decode ms": means["T_LLM_decode"],
        "KV MB": float(before["kv_cache_bytes"].mean()) / 1e6,
    }
    rows = [first]
    for entry in entries:
        mean = {name: each.value for name, each in entry["means"].items()}
        claimed, measured = entry["claimed"], entry["measured"]
        score = entry["accuracy"]
        score = score["value"] if isinstance(score, dict) else score.value
        rows.append(
            {
                "method": entry["method"],
                "keep": entry["keep"],
                "tokens": entry["tokens"].value,
                "total ms": mean.get("T_total"),
                "prefill ms": mean.get(REDUCED_PREFILL),
                "first token ms": mean.get("T_first_token"),
                "decode ms": mean.get("T_LLM_decode"),
                "method ms": entry["T_reduction"].value if entry["T_reduction"] else None,
                "KV MB": entry["kv_cache_bytes"] / 1e6,
                "TMAC (FastV's formula)": _tera(claimed.get("formula")),
                "TFLOP (as run)": _tera(claimed.get("total")),
                "claimed speed-up": claimed["speed_up"],
                "prefill speed-up": interval(measured[REDUCED_PREFILL]["speed_up"]),
                "total speed-up": interval(measured["T_total"]["speed_up"]),
                "verdict": measured["T_total"]["verdict"],
                "VQA accuracy": score,
            }
        )
    return pd.DataFrame(rows).dropna(axis=1, how="all")


def _tera(flops: dict[str, float] | None) -> float | None:
    return flops["after"] / 1e12 if flops else None


def _components(entries: list[dict[str, Any]]) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "method": entry["method"],
            "keep": entry["keep"],
            "component": component,
            "verdict": each["verdict"],
            **{key: asdict(each["speed_up"])[key] for key in ("value", "low", "high", "n")},
        }
        for entry in entries
        for component, each in entry["measured"].items()
    )
