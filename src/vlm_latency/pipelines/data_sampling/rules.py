"""How the requests of an experiment are made: one rule per kind of sampling options."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from vlm_latency.errors import DataError
from vlm_latency.experiments import (
    BASELINE,
    LanguageSampling,
    QuestionSampling,
    Reductions,
    ReductionSampling,
    VisionSampling,
)
from vlm_latency.option_types import SamplingOptions
from vlm_latency.options import ExperimentOptions

if TYPE_CHECKING:
    from vlm_latency.models import ModelHandle
    from vlm_latency.models.interface import ModelArchitecture
    from vlm_latency.vqa import QuestionSource, Sampling


class Questions:
    """Questions drawn from the dataset; other rules say what they do otherwise."""

    # Whose the output lengths are, and what to do about one that is too long.
    LENGTHS = "measurement.output_length"
    MEND = "ask for fewer"
    PREFILL = False  # whether one token is asked for, which always fits behind the prompt

    def draw(
        self, options: ExperimentOptions[Any], questions: QuestionSource, model: ModelHandle
    ) -> pd.DataFrame:
        """Draw the requests: columns ``records.REQUEST_COLUMNS``, one row each."""
        from vlm_latency import vqa

        length = options.measurement.output_length
        return vqa.draw_requests(questions, sampling(options, model), length, options.experiment)

    def lengths(self, options: ExperimentOptions[Any]) -> list[str]:
        """Give the rules of the output's length that drawn requests follow."""
        return [options.measurement.output_length]

    def image_sizes(
        self, options: ExperimentOptions[Any], architecture: ModelArchitecture
    ) -> list[tuple[int, int]]:
        """Give image sizes (width, height in pixels) that make the longest prompts."""
        return [(640, 480), (480, 640), (640, 640), (2800, 448)]

    def drops(self, options: ExperimentOptions[Any]) -> bool:
        """Say whether lengths that do not fit the model are left out rather than refused."""
        return False

    def words(self, requests: pd.DataFrame) -> str:
        """Say what will be measured."""
        return f"{len(requests)} questions"


class VisionSweep(Questions):
    """One image per grid or size; of the model only its tiling matters."""

    PREFILL = True

    def draw(
        self,
        options: ExperimentOptions[VisionSampling],
        questions: QuestionSource,
        model: ModelHandle,
    ) -> pd.DataFrame:
        """Draw one request per grid, or per image size where the model has no grids."""
        from vlm_latency import vqa

        asked = options.sampling
        if asked.sizes:
            return vqa.sweep_sizes_requests(asked.sizes, asked.seed, options.experiment)
        tiles = model.architecture.tiles
        if tiles is None:
            ladder = model.architecture.image_sizes_for_ladder(asked.max_grid_size)
            return vqa.sweep_sizes_requests(ladder, asked.seed, options.experiment)
        return vqa.sweep_vision_requests(
            tiles,
            asked.max_grid_size,
            asked.equal_crop_pairs,
            options.protocol,
            asked.seed,
            options.experiment,
        )

    def words(self, requests: pd.DataFrame) -> str:
        """Name the grids, or count the sizes."""
        grids = requests["grid"]
        row = grids[grids.str.startswith("1×").fillna(False)]
        if len(requests) == 1:
            return "one image size, beside which no other makes more or fewer vision tokens,"
        if row.empty:
            return f"{len(requests)} image sizes"
        more = f" and {len(grids) - len(row)} of equal crops" if len(row) < len(grids) else ""
        return f"grids {row.iloc[0]} … {row.iloc[-1]}{more}"


class LanguageSweep(Questions):
    """The same questions at every output length."""

    LENGTHS = "sampling.max_new_tokens_list"
    MEND = "leave them out, or set {experiment}.sampling.on_too_long=drop"

    def draw(
        self,
        options: ExperimentOptions[LanguageSampling],
        questions: QuestionSource,
        model: ModelHandle,
    ) -> pd.DataFrame:
        """Draw the questions and give each every length."""
        from vlm_latency import vqa

        asked = options.sampling
        if not asked.max_new_tokens_list:
            raise DataError(
                f"{options.experiment}.sampling.max_new_tokens_list is empty; give lengths: "
                "'8 16 32'"
            )
        return vqa.sweep_language_requests(
            questions,
            sampling(options, model, cuts=True),
            asked.max_new_tokens_list,
            asked.tiling,
            asked.use_eos_token,
            options.experiment,
        )

    def lengths(self, options: ExperimentOptions[LanguageSampling]) -> list[str]:
        """Give every length."""
        return [str(n) for n in options.sampling.max_new_tokens_list]

    def image_sizes(
        self, options: ExperimentOptions[LanguageSampling], architecture: ModelArchitecture
    ) -> list[tuple[int, int]]:
        """Give the one size that the tiling fixes, if it does."""
        if options.sampling.tiling is None:
            return super().image_sizes(options, architecture)
        return [architecture.image_size_for(*options.sampling.tiling)]

    def drops(self, options: ExperimentOptions[LanguageSampling]) -> bool:
        """Follow the user's ``on_too_long``."""
        return options.sampling.on_too_long == "drop"

    def words(self, requests: pd.DataFrame) -> str:
        """Count images and lengths."""
        lengths = requests["output_length"].nunique()
        return f"{len(requests) // lengths} images × {lengths} lengths"


class TokenReduction(Questions):
    """The same questions by the model as it is, unreduced, and by every method and share."""

    def draw(
        self, options: ExperimentOptions[Any], questions: QuestionSource, model: ModelHandle
    ) -> pd.DataFrame:
        """Draw the questions and give each to every method.

        Raises
        ------
        UserError
            For a method that does not exist, that the engine cannot run though it was asked for,
            or a model without vision tokens to drop.
        """
        asked = reductions(options, model)
        drawn = super().draw(options, questions, model)
        return pd.concat(
            [
                drawn.assign(request_id=drawn["request_id"] + f"/{label}", method=method, keep=keep)
                for label, method, keep in asked
            ],
            ignore_index=True,
        )

    def words(self, requests: pd.DataFrame) -> str:
        """Count questions and ways."""
        ways = requests[["method", "keep"]].drop_duplicates()
        return f"{len(requests) // len(ways)} questions × {len(ways)} ways to reduce tokens"


def reductions(options: ExperimentOptions[Any], model: ModelHandle) -> list[tuple[str, str, float]]:
    """List the ways to reduce tokens: label in a request's name, method, share kept."""
    from vlm_latency.reduction import METHODS, method_of, refusal

    own, engine = options.own, options.model.engine
    assert isinstance(own, Reductions)
    if model.architecture.simulated:
        raise DataError(
            f"found model.name={options.model.name}; {options.experiment} needs a model with vision "
            "tokens to drop, such as tiny-molmo"
        )
    if options.measurement.method != "timeline":
        raise DataError(
            f"found measurement.method={options.measurement.method}; {options.experiment} marks the "
            "method's own time on the timeline: leave it out"
        )
    found = [(BASELINE, BASELINE, 1.0), ("identity", "identity", 1.0)]
    for name in own.methods or METHODS:
        method = method_of(name)
        why = refusal(method, engine)
        if why and own.methods:
            raise DataError(
                f"model.engine={engine} cannot run the method {name}: {why}; use model.engine=eager"
            )
        if not why and name != "identity":
            version = file_version(name)
            found += [(f"{name}{version}@{keep:g}", name, keep) for keep in own.keep]
    return found


def file_version(name: str) -> str:
    """Hash a method's file, so that a changed one is measured afresh."""
    path, _, _ = name.rpartition(":")
    return f"#{hashlib.sha256(Path(path).read_bytes()).hexdigest()[:8]}" if path else ""


RULES: dict[type[SamplingOptions], Questions] = {
    QuestionSampling: Questions(),
    VisionSampling: VisionSweep(),
    LanguageSampling: LanguageSweep(),
    ReductionSampling: TokenReduction(),
}


def rule_of(options: ExperimentOptions[Any]) -> Questions:
    """Find the rule of an experiment by the kind of its sampling options."""
    return RULES[type(options.sampling)]


def sampling(
    options: ExperimentOptions[QuestionSampling], model: ModelHandle, cuts: bool = False
) -> Sampling:
    """Say to `vlm_latency.vqa` how questions are drawn, and tiles are cut where that matters."""
    from vlm_latency.vqa import Sampling

    asked = options.sampling
    return Sampling(
        num_samples=asked.num_samples,
        order=asked.order,
        seed=asked.seed,
        one_question_per_image=asked.one_question_per_image,
        stratify_by_tiling=asked.stratify_by_tiling,
        tiles=model.architecture.nominal_tiles if cuts or asked.stratify_by_tiling else None,
    )


def number(rule: str) -> int:
    """Give the number of tokens in a rule such as ``16`` or ``≤16``."""
    return int(rule.removeprefix("≤"))


_TEXT_ALLOWANCE = 64  # tokens of question and template; VQA v2's longest questions have about 30


def too_long(
    options: ExperimentOptions[Any], model: ModelHandle, given: pd.DataFrame | None
) -> dict[int, int]:
    """Find the output lengths that do not fit behind the longest prompt the experiment may make.

    Parameters
    ----------
    given
        The table of requests that was made before, if there is one.

    Returns
    -------
    dict
        ``{max_new_tokens: positions needed}`` of the lengths that exceed the model's positions.
    """
    rule, architecture = rule_of(options), model.architecture
    if given is None:
        lengths, sizes = rule.lengths(options), rule.image_sizes(options, architecture)
    else:
        lengths = [str(length) for length in given["output_length"].unique()]
        known = given[["image_width", "image_height"]].dropna().drop_duplicates()
        sizes = [(int(width), int(height)) for width, height in known.to_numpy()] or [(640, 480)]
    images = (architecture.image_tokens(*size) for size in sizes)
    most = max(image.num_vision_tokens + image.num_image_special_tokens for image in images)
    prompt = most + _TEXT_ALLOWANCE + len(options.prompt.template) // 2
    named = {"natural": options.measurement.max_new_tokens, "answer": 0, "none": 1}
    tokens = [named[length] if length in named else number(length) for length in lengths]
    positions = architecture.max_positions
    return {n: prompt + n for n in tokens if positions and prompt + n > positions}
