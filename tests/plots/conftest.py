"""Made-up records and statistics of the shapes that the experiments give."""

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from vlm_latency.plots.style import FigureContext, Style
from vlm_latency.records import measured_table
from vlm_latency.statistics import (
    Comparison,
    Estimate,
    TableComparison,
    VarianceBudget,
    linear_fit,
    summary,
)

PARAMETERS = {
    "params_vision_encoder": 289_000_000,
    "params_projector": 60_000_000,
    "params_image_projector": 50_000_000,
    "params_llm": 7_600_000_000,
    "params_llm_active": 7_600_000_000,
    "params_total": 7_949_000_000,
    "params_active": 7_949_000_000,
    "moe_num_experts": None,
    "moe_top_k": None,
}

EXPERTS = {
    **PARAMETERS,
    "params_llm_active": 1_200_000_000,
    "params_active": 1_549_000_000,
    "moe_num_experts": 64,
    "moe_top_k": 8,
}


def estimate(value, share=0.04, **more):
    """An estimate as statistics give it, `share` to both sides."""
    half = abs(share * value)
    return replace(Estimate(value, value - half, value + half, 0.95, 40, "made up"), **more)


def fit(x, y):
    """A straight line as statistics give it, with a band."""
    return linear_fit(np.asarray(x, float), np.asarray(y, float)).banded(x)


def records(tiles, lengths, runs=1, seed=0):
    """Runs of every (rows, columns) tiling with its output length; crops and tokens as Molmo's."""
    rng = np.random.default_rng(seed)
    rows = []
    for run in range(runs):
        for i, ((down, across), length) in enumerate(zip(tiles, lengths, strict=True)):
            crops = down * across + 1
            tokens = 144 + (8 * down + 4) * (8 * across + 4)
            noise = rng.lognormal(0, 0.03, 5)
            vision, projector, prefill = (
                20.0 * crops * noise[0],
                1.5 * crops * noise[1],
                (5 + 0.11 * tokens) * noise[2],
            )
            steps = (12 + 0.001 * np.arange(length - 1)) * rng.lognormal(0, 0.05, length - 1)
            other = 0.8 * noise[4]
            rows.append(
                {
                    "request_id": f"r{i}",
                    "run_index": run,
                    "order_index": len(rows),
                    "image_id": i,
                    "status": "ok",
                    "tiling_rows": down,
                    "tiling_cols": across,
                    "grid": f"{down}×{across}",
                    "pair": f"{crops} crops" if crops in (7, 13) else None,
                    "num_crops": crops,
                    "num_vision_tokens": tokens,
                    "num_vision_patches": 576 * crops,
                    "num_total_tokens": tokens + 30,
                    "num_output_tokens": length,
                    "T_preprocess": 14 * noise[3],
                    "T_vision_encoder": vision,
                    "T_projector": projector,
                    "T_vision_total": vision + projector,
                    "T_LLM_prefill": prefill,
                    "T_LLM_decode": steps.sum(),
                    "T_other": other,
                    "T_first_token": vision + projector + prefill + 0.5,
                    "T_total": vision + projector + prefill + steps.sum() + other,
                    "decode_step_ms": steps.tolist(),
                }
            )
    return measured_table(rows)


@pytest.fixture
def context():
    line = "tiny-molmo, CPU (1 thread), float32, sdpa, torch 2.13, commit 0123abc, 2025-01-01"
    return FigureContext(line, ("synthetic", "random weights"), "tiny-molmo", "what was found")


@pytest.fixture(params=["default", "paper"])
def style(request):
    return Style(paper=request.param == "paper")


def exp1(n=200):
    rng = np.random.default_rng(1)
    kinds = [(2, 3), (2, 2), (3, 3), (1, 2), (1, 3)]
    tiles = [kinds[i] for i in rng.choice(5, n, p=[0.72, 0.1, 0.06, 0.07, 0.05])]
    table = records(tiles, rng.choice([1, 2, 3, 4, 6, 9], n, p=[0.55, 0.25, 0.1, 0.05, 0.03, 0.02]))
    shares = {"tiling": 0.61, "output length": 0.33, "text length": -0.004, "noise": 0.05}
    return SimpleNamespace(
        records=table,
        statistics={
            "T_total": summary(table["T_total"]),
            "T_first_token": summary(table["T_first_token"]),
            "variance_budget": VarianceBudget(
                response="T_total",
                std=1.0,
                noise_std=0.1,
                shares={name: estimate(share, 0.15) for name, share in shares.items()},
                tail_content=estimate(0.9),
                verdict="content",
                sentence="",
                n_requests=n,
                n_repeated=0,
                method="made up",
            ),
        },
    )


def exp2(n=60):
    table = exp1(n).records
    names = [c for c in table if str(c).startswith("T_") and table[c].notna().any()]
    means = {name: estimate(float(table[name].mean())) for name in names}
    shares = {
        name: estimate(float(table[name].mean() / table["T_total"].mean()), 0.02) for name in names
    }
    return SimpleNamespace(
        records=table, statistics={"means": means, "shares": shares, "n": len(table)}
    )


def exp3(runs=5):
    grids = [(1, k) for k in range(1, 13)] + [(2, 3), (3, 4), (2, 6)]
    table = records(grids, [1] * len(grids), runs)
    names = ("T_total", "T_LLM_prefill", "T_vision_encoder", "T_projector")
    return SimpleNamespace(
        records=table,
        statistics={
            "fits": {name: fit(table["num_vision_tokens"], table[name]) for name in names},
        },
    )


def exp4(lengths=(8, 16, 32, 64, 128, 256, 512)):
    table = pd.concat([records([(2, 3)] * 4, [n] * 4, seed=n) for n in lengths], ignore_index=True)
    parts = ("T_total", "T_vision_total", "T_LLM_prefill", "T_LLM_decode", "T_other")
    means = table.groupby("num_output_tokens")[list(parts)].mean()
    longest = int(max(lengths)) - 1
    at = np.arange(1, longest + 1, max(1, longest // 40))
    return SimpleNamespace(
        records=table,
        statistics={
            "fits": {
                name: fit(table["num_output_tokens"], table[name])
                for name in ("T_LLM_decode", "T_total")
                if len(lengths) > 1
            },
            "lengths": [
                {"num_output_tokens": int(n), **{p: estimate(float(row[p])) for p in parts}}
                for n, row in means.iterrows()
            ],
            "prefill": estimate(float(table["T_first_token"].mean())),
            "steps": {
                "position": at.tolist(),
                "median": (12 + 0.001 * at).tolist(),
                "low": (11.8 + 0.001 * at).tolist(),
                "high": (12.2 + 0.001 * at).tolist(),
            },
            "first_step": estimate(14.0),
        },
    )


def exp5():
    rng = np.random.default_rng(2)
    crops, tokens = np.repeat(np.arange(2, 14), 3), np.repeat([8, 16, 32, 64, 128, 256, 512], 4)
    flops = np.concatenate([crops * 0.37e12 + 2e11, 2.6e12 + tokens * 14e9])
    latency = np.concatenate([crops * 30.0, 250 + tokens * 12.0])
    latency = latency * rng.lognormal(0, 0.04, latency.size)
    points = pd.DataFrame(
        {
            "sweep": ["exp3"] * crops.size + ["exp4"] * tokens.size,
            "flops": flops,
            "latency_ms": latency,
            "predicted_flops": 300 + 0 * latency + 1e-10 * flops,
            "predicted_roofline_calibrated": latency * rng.lognormal(0, 0.05, latency.size),
        }
    )

    def measures(rows):
        return {
            "r_squared": 0.31,
            "pearson": estimate(0.56, 0.1),
            "spearman": estimate(0.7, 0.1),
            "fit": fit(rows["flops"], rows["latency_ms"]),
        }

    return SimpleNamespace(
        points=points,
        statistics={
            "exp3": measures(points[points["sweep"] == "exp3"]),
            "exp4": measures(points[points["sweep"] == "exp4"]),
            "combined": measures(points),
            "ms_per_tflop": {
                "encoder": estimate(55.0),
                "prefill": estimate(80.0),
                "decode": estimate(860.0),
            },
            "held_out_error": {
                "flops": estimate(0.64, 0.2),
                "tokens": estimate(0.12, 0.2),
                "roofline_nominal": estimate(0.35, 0.2),
                "roofline_calibrated": estimate(0.04, 0.3),
            },
            "estimator": "analytic",
        },
    )


def calibrated():
    rng = np.random.default_rng(3)
    delays = np.repeat([2.0, 10.0, 50.0], 5)
    parts = ("T_vision_encoder", "T_projector", "T_LLM_prefill", "T_LLM_decode")
    injections = pd.concat(
        [
            pd.DataFrame(
                {
                    "component": part,
                    "injected_ms": delays,
                    "recovered_ms": delays * rng.normal(1.001, 0.003, delays.size),
                }
            )
            for part in parts
        ],
        ignore_index=True,
    )
    return SimpleNamespace(
        injections=injections,
        cases=[
            {
                "component": part,
                "kind": kind,
                "delay_ms": delay,
                "tolerance_ms": max(0.2, delay / 100),
                "state": "missed" if delay == 50 and kind == "device" else "recovered",
                "error_ms": estimate(0.1 if delay < 50 or kind == "host" else 0.9, 0.3),
            }
            for part, kind in zip(parts, ("device", "host", "host", "host"), strict=True)
            for delay in (2.0, 10.0, 50.0)
        ],
        statistics={
            "overhead": {"ratio": estimate(1.002, 0.004), "n_pairs": 40},
            "null": {"ratio": estimate(0.999, 0.004), "n_pairs": 40},
            "false_alarms": {
                "share": estimate(0.045, 0.4),
                "alarms": 9,
                "n_comparisons": 200,
                "nominal": 0.05,
            },
            "remainder": estimate(0.006, 0.1),
            "methods": {
                method: {
                    "below_zero": {"T_projector": a, "T_LLM_prefill": 0.0, "T_LLM_decode": b},
                    "closure_ms": estimate(c, 0.2),
                    "wall_ratio": estimate(d, 0.05),
                }
                for method, a, b, c, d in (
                    ("timeline", 0.0, 0.0, 0.0, 1.0),
                    ("hook", 0.3, 0.0, -1.9, 1.5),
                    ("subtraction", 0.46, 0.23, 21.7, 2.2),
                )
            },
        },
    )


def explained(busy=0.5):
    """One shape whose every component is busy for this share of 20 ms."""
    parts = ("T_vision_encoder", "T_projector", "T_LLM_prefill", "T_LLM_decode", "T_other")
    components = {
        part: {
            "wall": estimate(20.0),
            "busy": 20.0 * busy,
            "idle": 20.0 * (1 - busy),
            "idle_share": 1 - busy,
            "bound": "launches" if busy < 2 / 3 else "memory",
            "kernels": 350,
            "flops_share_of_ceiling": None if part == "T_other" else 0.2,
            "bytes_share_of_ceiling": None if part == "T_other" else 0.55,
        }
        for part in parts
    }
    return {"num_vision_tokens": 704, "num_output_tokens": 8, "components": components}


def compared(ratio=1.1):
    verdict = "SAME" if ratio == 1 else "SLOWER"
    parts = ("T_total", "T_vision_encoder", "T_projector", "T_LLM_prefill", "T_LLM_decode")
    components = {
        part: Comparison(estimate(ratio, 0.01 + 0.005 * i), verdict, True, 0.01, 0.02, 1.0, 1.0, 40)
        for i, part in enumerate(parts)
    }
    return TableComparison(verdict, components, (), (), 40, (), (), ())


def predicted():
    grid = pd.DataFrame(
        [
            {"num_vision_tokens": v, "num_output_tokens": n, "latency_ms": 20 + 0.1 * v + 12.0 * n}
            for v in (144, 288, 576, 1152, 2304)
            for n in (1, 16, 64, 256, 1024)
        ]
    )
    places = {"before the encoder": 250, "after the projector": 80, "at decoder layer 2": 60}
    pruning = pd.DataFrame(
        [
            {"where": where, "keep": keep, "latency_ms": 430 - gain * (1 - keep)}
            for where, gain in places.items()
            for keep in (1.0, 0.75, 0.5, 0.25)
        ]
    )
    pruning["low_ms"], pruning["high_ms"] = (
        0.95 * pruning["latency_ms"],
        1.05 * pruning["latency_ms"],
    )
    statistics = {
        "latency": estimate(430.0),
        "composition": {
            "T_vision_encoder": 140.0,
            "T_projector": 10.0,
            "T_LLM_prefill": 85.0,
            "T_LLM_decode": 190.0,
            "T_other": 5.0,
        },
        "workload": "640x480, 16 prompt tokens, 16 output tokens",
        "hardware": "this machine (measured)",
    }
    return SimpleNamespace(grid=grid, pruning=pruning, statistics=statistics)


@pytest.fixture
def made():
    """The functions above, for the tests."""
    functions = (estimate, fit, summary, records, exp1, exp2, exp3, exp4, exp5)
    return SimpleNamespace(
        PARAMETERS=PARAMETERS,
        EXPERTS=EXPERTS,
        **{f.__name__: f for f in (*functions, calibrated, compared, explained, predicted)},
    )
