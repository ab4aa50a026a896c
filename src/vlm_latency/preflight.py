"""What is refused before anything is loaded or measured, and what is said that will be done."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
from kedro.io import DatasetError

from vlm_latency.errors import DataError, MeasurementError, ModelError, UserError
from vlm_latency.experiments import EXPERIMENTS, QuestionSampling, measured
from vlm_latency.options import ExperimentOptions, Options
from vlm_latency.results import held, measured_on, questions_of
from vlm_latency.workers.asked import ask_for


def check(
    options: Options,
    root: Path,
    *,
    experiments: list[str],
    runs_model: bool = False,
    model: Any = None,
    questions: Any = None,
    earlier: Mapping[str, Any],
    given: Mapping[str, Any] | None = None,
    explains: bool = False,
    compared: Any = None,
) -> list[str]:
    """Refuse what cannot work, all of it at once.

    Parameters
    ----------
    options
        The whole parameter tree.
    root
        The output folder.
    experiments
        Those that will be measured.
    runs_model
        Whether the model is run at all: ``predict`` only looks at its architecture.
    model, questions
        The catalog's datasets, where the pipeline needs them.
    earlier
        Results that the pipeline reads, by the name of their dataset.
    given
        The datasets of requests made before, by experiment.
    explains
        Whether requests are looked at under a profiler.
    compared
        The dataset of results folders or variants, where the pipeline compares.

    Returns
    -------
    list of str
        One line per experiment: what will be measured, on what.

    Raises
    ------
    UserError
        Every reason, one line each.
    """
    problems: list[str] = []

    def attempt(step: Any, *args: Any) -> Any:
        try:
            return step(*args)
        except (UserError, DatasetError) as error:
            cause = error.__cause__ if isinstance(error, DatasetError) else error
            if not isinstance(cause, UserError):
                raise
            problems.append(str(cause))
            return None

    if model is not None and questions is not None:
        attempt(_named, options)
    attempt(_writable, root)
    for dataset in earlier.values():
        if not dataset.exists():
            attempt(dataset.load)
    if problems:
        raise UserError("\n".join(problems))
    handle = attempt(model.load) if model is not None else None
    lines: list[str] = []
    if compared is not None and (found := attempt(compared.load)) is not None:
        lines += attempt(_in_turn, options, found) or []
    if handle is not None and attempt(_ready, handle, runs_model) is not None:
        if runs_model:
            attempt(_alone, root, handle, compared)
            attempt(_alike, root, options, experiments, questions)
            attempt(_nvtx, options, experiments, handle)
            attempt(ask_for, options.measurement, options.ray, handle)
        for name in experiments:
            settled = options.experiment(name, handle.weights)
            known = len(problems)
            table = attempt(given[name].load) if given and name in given else None
            if len(problems) > known:
                continue
            attempt(_fits_positions, settled, handle, table)
            attempt(_has_ranges, settled, handle)
            requests = attempt(_drawable, settled, questions, handle, table)
            if requests is not None:
                lines.append(_line(settled, handle, requests))
        if explains:
            line = attempt(_explained, options, questions, handle)
            lines += [line] if line else []
    if problems:
        raise UserError("\n".join(dict.fromkeys(problems)))
    return lines


def _named(options: Options) -> None:
    """Ask for the model and the dataset where an environment leaves both to the user."""
    missing = []
    if options.model.name is None:
        missing.append("model.name (a zoo name, hub id or local folder)")
    if options.dataset.source is None:
        missing.append("dataset.source (official with dataset.path, hub, folder or synthetic)")
    if missing:
        raise UserError(f"not given: {' and '.join(missing)}; set with --params name=value,…")


def _writable(root: Path) -> None:
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=root):
            pass
    except OSError as error:
        file = isinstance(error, FileExistsError | NotADirectoryError)
        why = "it, or a folder above it, is a file" if file else error.strerror
        raise DataError(
            f"cannot write into output_dir {root}: {why}; choose another folder"
        ) from None


def _ready(handle: Any, runs_model: bool) -> bool:
    """Check name, device and memory, without loading the weights."""
    _ = handle.weights, handle.device
    if runs_model:
        handle.check_fits()
    return True


def _alone(root: Path, handle: Any, compared: Any) -> None:
    """Refuse a folder with results of another model, device, number type or engine."""
    from vlm_latency.instrument.environment import hardware

    if compared is not None:  # whose variants are several, and named as such
        return
    name, engine = handle.options.name, handle.options.engine
    about = {"name": name, "weights": handle.weights, "engine": engine, "dtype": handle.dtype}
    own = measured_on({"model": about, "hardware": hardware(handle.device)})
    found = {study: measured_on(result["environment"]) for study, result in held(root).items()}
    if told := _others(found, own):
        raise DataError(
            f"output_dir {root} has {told}, and this command measures {own}: give it a folder of its "
            f"own, output_dir={root.with_name(_folder_name(root.name, name, engine))}"
        )


def _alike(root: Path, options: Options, experiments: list[str], questions: Any) -> None:
    """Refuse a folder whose other experiments followed another protocol or asked another dataset."""
    if not experiments:
        return
    source = questions.load()
    about = {**source.details, "source": source.source, "split": source.split}
    asking = {
        n for n in EXPERIMENTS if issubclass(EXPERIMENTS[n].sampling or object, QuestionSampling)
    }
    others = {
        n: result for n, result in held(root).items() if n in measured() and n not in experiments
    }
    protocols = {n: str(result["protocol"] or "") for n, result in others.items()}
    asked = {n: questions_of(result["environment"]) for n, result in others.items() if n in asking}
    if not asking & {*experiments}:
        asked = {}
    for how, what, own, found in (
        ("by", "protocol", options.protocol, protocols),
        ("on", "dataset", questions_of({"dataset": about}), asked),
    ):
        if told := _others(found, own):
            raise DataError(
                f"output_dir {root} has results {how} another {what}: {told}; this command measures "
                f"{how} {own}: give it a folder of its own, output_dir="
                f"{root.with_name(_folder_name(root.name, own))}"
            )


def _others(found: Mapping[str, str], own: str) -> str:
    """Name the studies of something else than this command's."""
    others: dict[str, list[str]] = {}
    for study, other in found.items():
        if other not in ("", own):
            others.setdefault(other, []).append(study)
    return "; ".join(f"{', '.join(names)} of {other}" for other, names in others.items())


def _folder_name(folder: str, model: str, engine: str = "eager") -> str:
    words = [folder, Path(model).name, *([engine] if engine != "eager" else [])]
    return "-".join(re.sub(r"[^\w.-]+", "-", word).strip("-") for word in words)


def _nvtx(options: Options, experiments: list[str], handle: Any) -> None:
    asked = [n for n in experiments if options.experiment(n, handle.weights).measurement.nvtx]
    if (asked or options.measurement.nvtx) and not str(handle.device).startswith("cuda"):
        raise MeasurementError(
            f"found measurement.nvtx=true on {handle.device}; NVTX ranges exist on CUDA only: leave "
            "it out"
        )


def _fits_positions(options: ExperimentOptions, handle: Any, given: pd.DataFrame | None) -> None:
    from vlm_latency.pipelines.data_sampling.rules import rule_of, too_long

    rule, name = rule_of(options), options.experiment
    long = {} if rule.PREFILL else too_long(options, handle, given)
    if long and not rule.drops(options):
        raise ModelError(
            f"{name}.{rule.LENGTHS}: {', '.join(map(str, sorted(long)))} new tokens need up to "
            f"{max(long.values())} positions, and {handle.architecture.name} has "
            f"{handle.architecture.max_positions}; {rule.MEND.format(experiment=name)}"
        )


def _has_ranges(options: ExperimentOptions, handle: Any) -> None:
    if options.measurement.nvtx and not str(handle.device).startswith("cuda"):
        raise MeasurementError(
            f"found measurement.nvtx=true on {handle.device}; NVTX ranges need a CUDA device: set "
            "model.device=cuda, or measurement.nvtx=false"
        )


def _drawable(
    options: ExperimentOptions, questions: Any, handle: Any, given: pd.DataFrame | None
) -> pd.DataFrame:
    """Draw the requests as the experiment will, but open no image."""
    from vlm_latency.pipelines.data_sampling.nodes import draw_requests

    return draw_requests(options, replace(questions.load(), root=None, fetch=None), handle, given)


def _in_turn(options: Options, compared: Any) -> list[str]:
    """Refuse variants that do not fit beside each other, and questions that are not there."""
    if isinstance(compared, list):
        return []
    from vlm_latency.models import check_fit_together, check_threads
    from vlm_latency.pipelines.compare.variants import draw

    for handle in compared.models.values():
        _ready(handle, runs_model=True)
    check_threads(compared.models.values())
    check_fit_together(list(compared.models.values()))
    offline = replace(compared.questions, root=None, fetch=None)
    requests = draw(options, replace(compared, questions=offline))
    runs = options.compare.num_runs
    return [
        f"compare: {' and '.join(compared.models)} in turn, {len(requests)} questions × {runs} runs "
        f"each, {options.compare.output_tokens} output tokens"
    ]


def _explained(options: Options, questions: Any, handle: Any) -> str:
    """Say what will be explained; refuse a model that takes no time, and what exp2 would refuse."""
    asked = options.explain
    if handle.architecture.simulated:
        raise MeasurementError(
            f"found model.name={handle.options.name}; expected a model that takes time: there is "
            "nothing to explain"
        )
    what = f"the shapes of exp2, at most {asked.max_shapes}"
    if asked.sizes:
        what = f"{len(asked.sizes)} image sizes"
    else:
        _drawable(options.experiment("exp2", handle.weights), questions, handle, None)
    return (
        f"explain: {what}, {asked.output_tokens} tokens each, × {asked.num_runs} runs and once under "
        f"a profiler, on {_model(handle)}"
    )


def _model(handle: Any) -> str:
    return f"{handle.architecture.name} ({handle.weights} weights, {handle.device}, {handle.dtype})"


def _line(options: ExperimentOptions, handle: Any, requests: pd.DataFrame) -> str:
    from vlm_latency.pipelines.data_sampling.rules import rule_of

    name, measurement = options.experiment, options.measurement
    times = f" × {measurement.num_runs} runs" if measurement.num_runs > 1 else ""
    length = ""
    if not EXPERIMENTS[name].fixed_length:
        length = f", output length {'/'.join(requests['output_length'].unique())}"
    return (
        f"{name}: {rule_of(options).words(requests)}{times} on {_model(handle)}, "
        f"method {measurement.method}{length}"
    )


def refuse_contradictions(options: Options, pipeline_outputs: set[str]) -> None:
    """Refuse an earlier result in a command that measures a new one.

    Raises
    ------
    MeasurementError
        Naming the parameter.
    """
    for reader in EXPERIMENTS.values():
        for dataset, maker in reader.earlier.items():
            own, name = getattr(options, reader.name), f"{dataset}_results"
            if f"{maker}.result" in pipeline_outputs and getattr(own, name):
                raise MeasurementError(
                    f"{reader.name}.{name} names an earlier result, and this command measures a new "
                    f"one; leave it out, or run 'kedro run --pipeline {reader.name}' alone"
                )
