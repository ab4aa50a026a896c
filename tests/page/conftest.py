"""A results folder as the experiments leave it, with small made-up figures."""

import json

import pandas as pd
import pytest
from PIL import Image

from vlm_latency import statistics as st
from vlm_latency.options import Options

ENVIRONMENT = {
    "line": "Made-up CPU, 1 of 2 cores, float32, sdpa, eager, torch 2.13.0",
    "hardware": {"cpu": "Made-up CPU", "logical_cores": 2},
    "model": {"name": "tiny-<b>molmo</b>", "weights": "random", "seed": 0},
    "dataset": {"synthetic": True, "name": "coco_2014_vqa"},
    "code": {"git_commit": "0123abc"},
    "conditions": {"hardware": {"cpu": "Made-up CPU"}},
}
PARAMETERS = {
    "output_dir": "data/of its own",
    "model": {"num_threads": 2, "trust_remote_code": True},
    "prompt": {"template": "look, then answer: {question}"},
    "exp1": {"sampling": {"num_samples": 8}, "measurement": {"noise_repeats": 3}},
    "exp3": {"sampling": {"max_grid_size": 4}, "measurement": {"num_runs": 3}},
}


@pytest.fixture
def folder(tmp_path):
    """Results of exp1 (constant latencies), exp3 (with a failed run) and of the calibration."""
    options = Options.from_parameters(PARAMETERS)
    constant = st.summary([12.0] * 8)
    slope = st.linear_fit([1, 2, 3, 4, 5], [2.1, 3.9, 6.0, 8.1, 9.9]).to_dict()["slope"]
    exp1 = {
        "options": options.experiment("exp1").model_dump(mode="json"),
        "statistics": {
            "T_total": constant.to_dict(),
            "outliers": {"marked": 2, "of": 8, "causes": {"first of shape": 2}},
        },
        "coverage": {
            "planned": 8,
            "measured": 8,
            "failed": 0,
            "missing": 0,
            "partial": False,
            "sessions": [
                {"wall_s": 5.0, "warmup_s": 2.0, "measured_s": 2.0, "preprocess_s": 0.4},
                {"wall_s": 3.0, "warmup_s": 0.0, "measured_s": 2.0, "preprocess_s": 0.4},
            ],
        },
        "claims": [st.tail_claim(constant.tail_ratio).to_dict()],
    }
    exp3 = {
        "options": options.experiment("exp3").model_dump(mode="json"),
        "statistics": {
            "fits": {"T_total": {"slope": slope}},
            "linearity": {
                "verdict": "not a line",
                "p_value": 0.001,
                "n": 12,
                "method": "F test for lack of fit (2, 8)",
            },
            "notes": ["line of T_projector: nothing to fit"],
        },
        "coverage": {
            "planned": 12,
            "measured": 11,
            "failed": 1,
            "missing": 0,
            "partial": False,
            "failures": {"out of memory": 1},
        },
        "claims": [
            {**st.prefill_grows_claim(st.Estimate(**slope)).to_dict(), "note": "judged on a toy"},
            st.vision_sublinear_claim(None).to_dict(),
        ],
    }
    calibration = {"statistics": {"overhead": {"ratio": st.Estimate(
        1.002, 0.998, 1.006, 0.95, 40, "t").to_dict()}}}  # fmt: skip
    save(tmp_path, "exp1", "exp1_latency_distribution", exp1)
    save(tmp_path, "exp3", "exp3_vision_tokens_vs_latency", exp3)
    calibration["verdict"] = ["Delays come back within 1 %."]
    save(tmp_path, "calibration", "calibration", calibration)
    tables = tmp_path / "exp1" / "tables"
    tables.mkdir()
    rows = {"part": ["b", "a", "c"], "ms": [10.0, None, 9.0], "n": [3, 1000, 20]}
    pd.DataFrame(rows).to_csv(tables / "parts.csv", index=False)
    return tmp_path


def save(root, study, stem, result):
    """Write a result and a figure of its own colour."""
    figures = root / study / "figures"
    figures.mkdir(parents=True)
    Image.new("RGB", (2400, 900), "#0072B2").save(figures / f"{stem}.png", dpi=(300, 300))
    (figures / f"{stem}.pdf").write_bytes(b"%PDF-1.4")
    whole = {
        "results": [],
        "schema_version": 1,
        "experiment": study,
        "protocol": "exact",
        "model": ENVIRONMENT["model"],
        "environment": {**ENVIRONMENT, "process": {"load": study}},
        **result,
    }
    (root / study / f"{stem}.json").write_text(json.dumps(whole), encoding="utf-8")
