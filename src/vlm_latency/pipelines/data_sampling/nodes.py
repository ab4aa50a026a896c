"""Which requests an experiment makes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from vlm_latency.errors import DataError
from vlm_latency.options import ExperimentOptions
from vlm_latency.records import REQUEST_COLUMNS, typed, with_hashes

if TYPE_CHECKING:
    from vlm_latency.models import ModelHandle
    from vlm_latency.vqa import QuestionSource, Sampling


def draw_requests(
    options: ExperimentOptions, questions: QuestionSource, model: ModelHandle
) -> pd.DataFrame:
    """Draw the requests of one experiment, or read a table of them made before.

    Returns
    -------
    DataFrame
        Columns ``records.REQUEST_COLUMNS``, one row per request.
    """
    requests = _draw(options, questions, model)
    if options.experiment == "exp4":
        requests = _fitting(requests, too_long(options, model), model)
    return with_hashes(requests)


def _draw(
    options: ExperimentOptions, questions: QuestionSource, model: ModelHandle
) -> pd.DataFrame:
    """Draw them; of the model only its tiling matters: exp3 asks for grids where there are any."""
    from vlm_latency import vqa

    sampling = options.sampling
    if sampling.requests is not None:
        return _read_requests(Path(sampling.requests), options.experiment)
    if options.experiment == "exp3":
        return _vision_sweep(options, model)
    drawing = _sampling(options, model)
    if options.experiment == "exp4":
        lengths = sampling.max_new_tokens_list
        if not lengths:
            raise DataError("exp4.sampling.max_new_tokens_list is empty; give lengths: '8 16 32'")
        return vqa.sweep_language_requests(
            questions, drawing, lengths, sampling.tiling, sampling.use_eos_token
        )
    length = str(options.measurement.output_length)
    return vqa.draw_requests(questions, drawing, length, options.experiment)


def too_long(options: ExperimentOptions, model: ModelHandle) -> dict[int, int]:
    """Find the output lengths that do not fit behind the longest prompt the experiment may make.

    Returns
    -------
    dict
        ``{max_new_tokens: positions needed}`` of the lengths that exceed the model's positions.
    """
    positions = model.architecture.max_positions
    prompt = _longest_prompt(options, model)
    longest = {"natural": options.measurement.max_new_tokens, "answer": 0, "none": 1}
    lengths = [longest[rule] if rule in longest else _number(rule) for rule in _rules(options)]
    return {n: prompt + n for n in lengths if positions and prompt + n > positions}


def _rules(options: ExperimentOptions) -> list[str]:
    """The rules of the output's length that the requests follow."""
    sampling = options.sampling
    if sampling.requests is not None:
        table = _read_requests(Path(sampling.requests), options.experiment)
        return [str(rule) for rule in table["output_length"].unique()]
    if options.experiment == "exp4":
        return [str(n) for n in sampling.max_new_tokens_list or ()]
    return [str(options.measurement.output_length)]


def _number(rule: str) -> int:
    return int(rule.removeprefix("≤"))


def _fitting(requests: pd.DataFrame, long: dict[int, int], model: ModelHandle) -> pd.DataFrame:
    """Leave the lengths out that do not fit the model."""
    kept = requests[~requests["output_length"].map(_number).isin(long)].reset_index(drop=True)
    if kept.empty:
        raise DataError(
            f"exp4: none of the output lengths ({', '.join(map(str, sorted(long)))}) fits the "
            f"{model.architecture.max_positions} positions of {model.architecture.name}"
        )
    return kept


_TEXT_ALLOWANCE = 64  # tokens of question and template; VQA v2's longest questions have about 30


def _longest_prompt(options: ExperimentOptions, model: ModelHandle) -> int:
    """Tokens of the prompt: exact in its image where the tiling is fixed, else the largest."""
    architecture = model.architecture
    tiling = options.sampling.tiling
    if options.sampling.requests is not None:
        table = _read_requests(Path(options.sampling.requests), options.experiment)
        known = table[["image_width", "image_height"]].dropna().drop_duplicates()
        sizes = [(int(width), int(height)) for width, height in known.to_numpy()] or [(640, 480)]
    elif tiling:
        sizes = [architecture.image_size_for(*tiling)]
    else:
        sizes = [(640, 480), (480, 640), (640, 640), (2800, 448)]
    images = (architecture.image_tokens(*size) for size in sizes)
    most = max(image.num_vision_tokens + image.num_image_special_tokens for image in images)
    return most + _TEXT_ALLOWANCE + len(options.prompt.template) // 2


def _sampling(options: ExperimentOptions, model: ModelHandle) -> Sampling:
    from vlm_latency.vqa import Sampling

    asked = options.sampling
    cuts = asked.stratify_by_tiling or options.experiment == "exp4"
    return Sampling(
        num_samples=asked.num_samples,
        order=str(asked.order),
        seed=asked.seed,
        one_question_per_image=bool(asked.one_question_per_image),
        stratify_by_tiling=asked.stratify_by_tiling,
        tiles=model.architecture.nominal_tiles if cuts else None,
    )


def _vision_sweep(options: ExperimentOptions, model: ModelHandle) -> pd.DataFrame:
    from vlm_latency import vqa

    sampling = options.sampling
    largest = sampling.max_grid_size or 12
    if sampling.sizes:
        return vqa.sweep_sizes_requests([_size(text) for text in sampling.sizes], sampling.seed)
    tiles = model.architecture.tiles
    if tiles is None:
        ladder = model.architecture.image_sizes_for_ladder(largest)
        return vqa.sweep_sizes_requests(ladder, sampling.seed)
    return vqa.sweep_vision_requests(
        tiles, largest, bool(sampling.equal_crop_pairs), options.protocol, sampling.seed
    )


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if not match:
        raise DataError(f"exp3.sampling.sizes: found {text!r}; expected width x height: '672x336'")
    return int(match[1]), int(match[2])


def _read_requests(path: Path, experiment: str) -> pd.DataFrame:
    """Read a table of requests that was made before, on this machine or another."""
    if not path.is_file():
        raise DataError(f"{experiment}.sampling.requests: no file {path}")
    try:
        table = pd.read_parquet(path)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} is not a parquet table: {error}") from None
    missing = [name for name in REQUEST_COLUMNS if name not in table]
    if missing:
        raise DataError(f"{path} is not a table of requests: no column {', '.join(missing)}")
    try:
        table = typed(table, REQUEST_COLUMNS)
    except (TypeError, ValueError) as error:
        raise DataError(f"{path} is not a table of requests: {error}") from None
    found = sorted(table["experiment"].fillna("no experiment").unique())
    if found != [experiment]:
        raise DataError(
            f"{path} holds requests of {', '.join(found) or 'none'}; expected {experiment}"
        )
    numbers = "" if experiment == "exp4" else "natural|answer|none|"
    for rule in table["output_length"].fillna("nothing").unique():
        if not re.fullmatch(numbers + "≤?[1-9][0-9]*", rule):
            raise DataError(
                f"{path}: output_length {rule!r} is not a rule of {experiment}; expected "
                f"{numbers.replace('|', ', ')}a number, or ≤ and a number"
            )
    return table
