"""The numbers of the page, each from the published runs or the published results."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from gather import published
from omegaconf import OmegaConf

from vlm_latency.experiments import studies
from vlm_latency.options import Options
from vlm_latency.page.build import flat
from vlm_latency.results import read_json, read_run, result_path
from vlm_latency.statistics import Estimate, mean_estimate, percentile

SIZE = "640x480"  # the most frequent size of VQA v2
PARTS = {
    "T_preprocess": "preprocessing",
    "T_vision_encoder": "encoder",
    "T_projector": "projector",
    "T_LLM_prefill": "prefill",
    "T_first_token": "first token",
    "per_token": "per output token",
}
CLAMPED = ("T_projector", "T_LLM_prefill", "T_LLM_decode")


@dataclass(frozen=True, eq=False)  # told apart by identity, so that its numbers can be kept
class StudyRun:
    """One published folder: its runs by experiment, its results, and what it is called."""

    name: str
    tables: dict[str, pd.DataFrame]
    results: dict[str, dict[str, Any]]
    label: str

    @property
    def environment(self) -> dict[str, Any]:
        return next(iter(self.results.values()))["environment"]

    @property
    def hosts(self) -> dict[str, list[str]]:
        """What its results were measured beside, and which: processor's cores."""
        found: dict[str, list[str]] = {}
        for name, result in self.results.items():
            if line := result.get("environment", {}).get("line"):
                found.setdefault(line.split(",")[0].rpartition(" beside ")[2], []).append(name)
        return found

    @property
    def model(self) -> dict[str, Any]:
        return self.environment["model"]

    @property
    def seed(self) -> bool:
        return any(result.get("protocol") == "seed" for result in self.results.values())

    @property
    def again(self) -> bool:
        """Whether it repeats another one, perhaps at the sizes of the seed study."""
        return "-repeat" in self.name or self.large

    @property
    def large(self) -> bool:
        """Whether it has the sizes of the seed study: 5,000 questions instead of 300."""
        return "-paper" in self.name

    @property
    def kind(self) -> tuple[str, str, bool]:
        """What repeated runs share."""
        return self.model["name"], self.model["engine"], self.seed

    def claims(self) -> dict[str, dict[str, Any]]:
        found = [claim for result in self.results.values() for claim in result.get("claims") or []]
        return {claim["text"]: claim for claim in found}

    def statistics(self, name: str, *path: str) -> Any:
        """Follow the keys of one result's statistics; None where they lead nowhere."""
        value: Any = self.results.get(name, {}).get("statistics")
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        return value


def load(study: Path) -> list[StudyRun]:
    """Read all that is published."""
    found = []
    for folder in published(study):
        paths = {name: result_path(folder, name) for name in studies()}
        results = {name: read_json(path) for name, path in paths.items() if path.is_file()}
        run = StudyRun(folder.name, read_run(folder).tables, results, "")
        label = f"{(run.model['hub_id'] or run.model['name']).rpartition('/')[2]}, "
        label += run.model["engine"]
        label += (
            ", protocol=seed"
            if run.seed
            else ", seed's sizes"
            if run.large
            else ", again"
            if run.again
            else ""
        )
        found.append(replace(run, label=label))
    labels = [run.label for run in found]
    return [
        run if labels.count(run.label) == 1 else replace(run, label=f"{run.label} ({run.name})")
        for run in found
    ]


def leading(runs: list[StudyRun], large: bool = False) -> list[StudyRun]:
    """Leave out repeated runs, but for `large` ones where wanted, and those by the seed's method."""
    return [run for run in runs if not (run.seed or (run.again and not (large and run.large)))]


def photos(run: StudyRun) -> pd.DataFrame:
    """Give the runs of exp1 with images of the one size that models are compared at."""
    rows = run.tables.get("exp1", pd.DataFrame())
    return rows[rows["resolution"] == SIZE] if len(rows) else rows


def length(run: StudyRun) -> int | None:
    """Give the output length of exp4 at which tokens are compared: 512, or the longest."""
    lengths = set(run.tables["exp4"]["num_output_tokens"]) if "exp4" in run.tables else set()
    return 512 if 512 in lengths else max(lengths, default=None)


@cache
def headline(run: StudyRun) -> dict[str, Estimate | None]:
    """Medians of the components, and the decode step of a long answer.

    Steps of one answer are no independent values: each image counts once, with the median of its
    steps, and the interval is that of the mean over images.
    """
    rows, found = photos(run), dict.fromkeys(PARTS)
    for name in PARTS:
        known = rows[rows[name].notna()] if name in rows else rows
        if name in rows and len(known):
            found[name] = percentile(known[name], 50, clusters=known["image_id"])
    if (written := length(run)) is not None:
        answers = run.tables["exp4"]
        answers = answers[answers["num_output_tokens"] == written]
        answers = answers[answers["decode_step_ms"].map(np.size) > 0]
        if len(answers):
            medians = answers["decode_step_ms"].map(np.median)
            found["per_token"] = mean_estimate(medians, answers["image_id"])
    return found


def bounds(run: StudyRun) -> str:
    """Say what bounds encoder, prefill and decode, as `explain` measured it."""
    found = run.statistics("explain", "bound") or {}
    names = {"T_vision_encoder": "encoder", "T_LLM_prefill": "prefill", "T_LLM_decode": "decode"}
    said = [f"{short} {found[name]}" for name, short in names.items() if found.get(name)]
    return "; ".join(said) or "not explained"


def preprocessing_ratio(run: StudyRun) -> Estimate | None:
    """Median of preprocessing over time to first token, over the images of one size."""
    rows = photos(run)
    rows = rows[rows["T_preprocess"].notna()] if len(rows) else rows
    if rows.empty:
        return None
    return percentile(rows["T_preprocess"] / rows["T_first_token"], 50, clusters=rows["image_id"])


def closure(run: StudyRun) -> dict[str, Any]:
    """Say in how many runs parts came out below zero, and what the parts lack to T_total."""
    rows = pd.concat(run.tables.values(), ignore_index=True)
    below = {}
    for name in CLAMPED:
        raw = rows[f"raw_{name}"].dropna() if f"raw_{name}" in rows else pd.Series(dtype=float)
        if len(raw):
            below[name] = (int((raw <= 0).sum()), len(raw))
    lacking = (rows["T_other"] / rows["T_total"]).dropna()
    return {
        "runs": len(rows),
        "below": below,
        "lacking": percentile(lacking, 50, clusters=rows["request_id"][lacking.index]),
        "exceed": int((lacking < 0).sum()),
        "worst": float(lacking.min()),
    }


def wall_seconds(run: StudyRun) -> float:
    """Sum up what measuring took, warm-up included."""
    sessions = [
        session
        for name, result in run.results.items()
        if name in run.tables
        for session in (result.get("coverage") or {}).get("sessions") or []
    ]
    proofs = (run.results.get("calibration", {}).get("seconds") or {}).values()
    return sum(session["wall_s"] for session in sessions) + sum(proofs)


def commands(run: StudyRun, conf: Path) -> str:
    """Give what measures it again, in the environment of ``conf`` that leaves the least to say."""
    return min((_commands(run, conf, name) for name in ("base", "study", "paper")), key=len)


def _commands(run: StudyRun, conf: Path, environment: str) -> str:
    files = [
        path for name in ("base", environment) for path in (conf / name).glob("parameters*.yml")
    ]
    written = OmegaConf.merge(*map(OmegaConf.load, files))
    first = {"model.name": run.model["name"]} | ({"protocol": "seed"} if run.seed else {})
    if written.dataset.source is None:
        first["dataset.source"] = "synthetic"
    groups: list[tuple[list[str], dict[str, Any]]] = []
    for name in sorted(run.results, key=lambda name: name == "calibration"):
        for names, said in groups:
            both = said | unlike(run, name, written, said)
            if not any(unlike(run, one, written, both) for one in [*names, name]):
                names.append(name)
                said.update(both)
                break
        else:
            groups.append(([name], first | unlike(run, name, written, first)))
    named = "" if environment == "base" else f"--env {environment} "
    return "\n".join(
        f"kedro run {named}--pipelines {','.join(names)} "
        f"--params '{','.join(_texts({'output_dir': f'results/{run.name}'} | said))}'"
        for names, said in groups
    )


def unlike(run: StudyRun, name: str, written: Any, said: dict[str, Any]) -> dict[str, Any]:
    """List the parameters that a command which says so much would give one result otherwise."""
    tree = OmegaConf.merge(written, OmegaConf.from_dotlist(_texts(said)))
    configured = Options.from_parameters(OmegaConf.to_container(tree))
    settled = flat(configured.experiment(name, run.model["weights"]).model_dump(mode="json"))
    settled |= flat(configured.model_dump(mode="json", include={name}))
    found = {}
    for path, value in flat(run.results[name]["options"]).items():
        if path != "output_dir" and path in settled and value != settled[path]:
            key = path.removeprefix("own.")
            apart = key.partition(".")[0] in type(getattr(configured, name)).model_fields
            found[f"{name}.{key}" if apart else key] = value
    return found


def _texts(said: dict[str, Any]) -> list[str]:
    """Write parameters as Kedro's command line takes them, lists with blanks."""
    return [
        f"{key}={' '.join(map(str, value)) if isinstance(value, list) else 'null' if value is None else value}"
        for key, value in said.items()
    ]
