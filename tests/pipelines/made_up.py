"""Results made up without a model: latencies from a formula, so that every answer is known."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from vlm_latency.options import Options
from vlm_latency.pipelines.reporting import exp1, exp3, exp4
from vlm_latency.records import REQUEST_COLUMNS, measured_table, typed, with_hashes
from vlm_latency.results import FILES
from vlm_latency.statistics import plain

ENVIRONMENT = {
    "line": "made up",
    "model": {"name": "made-up", "weights": "random", "dtype": "float32"},
    "dataset": {"synthetic": True},
    "conditions": {"hardware": {"cpu": "none"}, "model": {"name": "made-up"}},
    "fingerprint": "f0",
}
COVERAGE = {"planned": 1, "measured": 1, "failed": 0, "missing": 0, "partial": False}
# milliseconds per crop, per vision token and per decode step
CROP, TOKEN, STEP, OVERHEAD = 10.0, 0.05, 2.0, 1.5


def options(experiment: str) -> Any:
    return Options().experiment(experiment, "random")


def requests(experiment: str, rows: list[dict[str, Any]]) -> pd.DataFrame:
    table = pd.DataFrame(rows).assign(experiment=experiment, question="what?", output_length="none")
    return with_hashes(typed(table, REQUEST_COLUMNS))


def run(crops: int, tokens: int, output: int, noise: float = 0.0, **further: Any) -> dict[str, Any]:
    """One run whose parts follow the formula, times (1 + noise)."""
    encoder, prefill = crops * CROP, tokens * TOKEN
    decode = STEP * (output - 1)
    parts = {
        "T_vision_encoder": encoder,
        "T_projector": 0.0,
        "T_vision_total": encoder,
        "T_LLM_prefill": prefill,
        "T_LLM_decode": decode,
        "T_other": OVERHEAD,
        "T_total": encoder + prefill + decode + OVERHEAD,
        "T_first_token": encoder + prefill + OVERHEAD,
    }
    return {
        "status": "ok",
        "num_crops": crops,
        "num_vision_tokens": tokens,
        "num_vision_patches": 576 * crops,
        "num_language_tokens": 40,
        "num_total_tokens": tokens + 40,
        "num_output_tokens": output,
        "decode_step_ms": [STEP * (1 + noise)] * (output - 1),
        "T_preprocess": 5.0,
        **{name: value * (1 + noise) for name, value in parts.items()},
        **further,
    }


def records(rows: list[dict[str, Any]], asked: pd.DataFrame) -> pd.DataFrame:
    hashes = asked.set_index("request_id")["request_sha256"]
    numbered = [
        {"order_index": n, "run_index": 0, **row, "request_sha256": hashes[row["request_id"]]}
        for n, row in enumerate(rows)
    ]
    return measured_table(numbered).assign(outlier=False, outlier_cause=None)


def questions(
    n: int = 40, spread: float = 0.02, seed: int = 0
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """exp1: n questions on 2 to 7 crops."""
    generator = np.random.default_rng(seed)
    asked = requests(
        "exp1",
        [
            {"request_id": f"exp1-{i}", "question_id": i, "image_id": i, "answers": '["a"]'}
            for i in range(n)
        ],
    )
    rows = [
        run(
            2 + i % 6,
            100 * (2 + i % 6),
            1 + i % 3,
            spread * generator.standard_normal(),
            request_id=f"exp1-{i}",
            question_id=i,
            image_id=i,
        )
        for i in range(n)
    ]
    return records(rows, asked), asked


def vision_sweep(seed: int = 0) -> tuple[pd.DataFrame, pd.DataFrame]:
    """exp3: grids whose crops and tokens are not collinear, five runs each."""
    generator = np.random.default_rng(seed)
    grids = [(k + 1, 192 + 96 * k) for k in range(1, 9)] + [(7, 704), (5, 600)]
    ids = [f"exp3-{crops}-{tokens}" for crops, tokens in grids]
    asked = requests("exp3", [{"request_id": name} for name in ids])
    rows = [
        run(
            crops, tokens, 1, 0.005 * generator.standard_normal(), request_id=name, run_index=repeat
        )
        for repeat in range(5)
        for name, (crops, tokens) in zip(ids, grids, strict=True)
    ]
    return records(rows, asked), asked


def language_sweep(seed: int = 0, images: int = 3) -> tuple[pd.DataFrame, pd.DataFrame]:
    """exp4: some images at five lengths."""
    generator = np.random.default_rng(seed)
    cases = [(image, length) for image in range(images) for length in (8, 16, 32, 64, 128)]
    asked = requests(
        "exp4", [{"request_id": f"exp4-{image}-n{n}", "image_id": image} for image, n in cases]
    )
    rows = [
        run(
            7,
            704,
            n,
            0.005 * generator.standard_normal(),
            request_id=f"exp4-{image}-n{n}",
            image_id=image,
            max_new_tokens=n,
        )
        for image, n in cases
    ]
    return records(rows, asked), asked


def write_run(folder: Path, scale: float = 1.0, seed: int = 0) -> Path:
    """Put exp1 and exp3 of a made-up run on disk, every time multiplied by ``scale``."""
    for name, made in _reported(scale, seed).items():
        (folder / name).mkdir(parents=True)
        for file, content in made.items():
            (folder / name / file).write_bytes(content)
    return folder


@cache
def _reported(scale: float, seed: int) -> dict[str, dict[str, bytes]]:
    files = {}
    for name, (table, asked), report in (
        ("exp1", questions(seed=seed), exp1.report),
        ("exp3", vision_sweep(seed), exp3.report),
    ):
        times = [column for column in table if column.startswith("T_")]
        table[times] = table[times] * scale
        further = [{}] if name == "exp3" else []
        result, *_ = report(options(name), table, asked, COVERAGE, ENVIRONMENT, *further)
        files[name] = {
            f"{FILES[name]}.json": json.dumps(plain(result)).encode(),
            f"{name}_records.parquet": table.to_parquet(),
        }
    return files


__all__ = ["exp4", "language_sweep", "options", "questions", "vision_sweep", "write_run"]
