"""The groups of parameters beside model, measurement and FLOPs: data, figures, analyses."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from vlm_latency.option_types import (
    BY_PROTOCOL,
    Group,
    Lengths,
    Numbers,
    PositiveNumbers,
    Size,
    Sizes,
    Tiling,
    Words,
)


def _quoted(value: Any) -> Any:
    """Refuse a commit that was read as a number, which 12e4567 was: it is infinity."""
    if isinstance(value, int | float):
        raise ValueError(
            "a commit that reads as a number must be quoted: --params \"model.revision='12e4567'\""
        )
    return value


Revision = Annotated[str | None, BeforeValidator(_quoted)]


class ColumnNames(Group):
    """``dataset.columns.*``: what a hub dataset calls its columns."""

    question: str = Field(default="question", description="column of the question's text")
    question_id: str | None = Field(
        default="question_id", description="column of the question's id; null: there is none"
    )
    image_id: str | None = Field(
        default="image_id", description="column of the image's id; null: there is none"
    )
    image: str = Field(default="image", description="column of the image")
    answers: str | None = Field(
        default="answers", description="column of all annotators' answers; null: there is none"
    )
    answer: str | None = Field(
        default="multiple_choice_answer",
        description="column of the most frequent answer; null: there is none",
    )
    question_type: str | None = Field(
        default="question_type", description="column of the question's type; null: there is none"
    )
    answer_type: str | None = Field(
        default="answer_type", description="column of the answer's type; null: there is none"
    )


class DatasetOptions(Group):
    """``dataset.*``: where the questions and images come from."""

    name: str | None = Field(
        default="coco_2014_vqa", description="what the data set is called in results"
    )
    source: Literal["synthetic", "official", "hub", "folder"] | None = Field(
        default=None, description="where questions and images come from; null: no data set"
    )
    path: str | None = Field(
        default=None, description="folder of the data; source=official or folder"
    )
    split: Literal["validation", "val", "train"] = Field(
        default="validation", description="part of the data set; val is another name for validation"
    )
    hub_id: str = Field(default="lmms-lab/VQAv2", description="data set of the hub; source=hub")
    revision: Revision = Field(
        default=None, description="commit, branch or tag of hub_id; null: its main branch"
    )
    columns: ColumnNames = ColumnNames()
    questions_file: str | None = Field(
        default=None, description="CSV or JSONL file of questions; source=folder"
    )
    seed: int = Field(
        default=0, description="of the images and questions that are made; source=synthetic"
    )
    size: Annotated[int, Field(ge=1)] | None = Field(
        default=None,
        description="number of images to make; source=synthetic; null: as many as VQA v2 has",
    )
    image_cache: str = Field(
        default="data/02_intermediate/hub_images",
        description="folder that keeps the images drawn; source=hub",
    )


class PromptOptions(Group):
    """``prompt.*``: what is written around the question."""

    template: str = Field(
        default="vqa2: {question}",
        description="text around the question, which stands at {question}",
    )

    @model_validator(mode="after")
    def _has_question(self) -> PromptOptions:
        if "{question}" not in self.template:
            raise ValueError(f"template {self.template!r} has no {{question}} in it")
        return self


class RayOptions(Group):
    """``ray.*``: devices of other machines."""

    address: str | None = Field(
        default=None,
        description="a Ray cluster that runs: host:port, auto, ray://…; null: this machine",
    )


# Panels by the figures of exp1 … exp5; no figure of an analysis has one of these names.
PANELS = (
    *("histogram", "cdf", "first", "tiling", "length", "variance"),
    *("active", "pie", "bars"),
    *("total", "prefill", "components"),
    *("decode", "stack", "steps"),
    *("exp3", "exp4", "combined", "regime", "held_out", "predicted"),
)


class FigureOptions(Group):
    """``figures.*``: how figures look."""

    style: Literal["default", "paper"] = Field(
        default="default", description="paper: sized and lettered for print"
    )
    columns: Literal[1, 2] = Field(
        default=1, description="columns of the page that a figure fills; style=paper"
    )
    panels: Words = Field(
        default=(), description="panels of exp1 … exp5 to draw, such as 'prefill steps'; none: all"
    )
    dpi: Annotated[int, Field(ge=50)] = Field(
        default=300, description="resolution of PNG files, dots per inch"
    )
    vision_axis: Annotated[Literal["tokens", "patches"], BY_PROTOCOL] = Field(
        default="tokens", description="what the axis of exp3 counts"
    )

    @field_validator("panels")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if unknown := [name for name in names if name not in PANELS]:
            raise ValueError(f"no panel {', '.join(unknown)}; expected of {' '.join(PANELS)}")
        return names


class CalibrationOptions(Group):
    """``calibration.*``: how much the instrument is made to prove."""

    pairs: Annotated[int, Field(ge=2)] = Field(
        default=40, description="pairs of runs at least; more until half_width is reached"
    )
    half_width: Annotated[float, Field(gt=0)] = Field(
        default=0.003, description="wanted half-width of the ratios' intervals, a share"
    )
    aa_comparisons: Annotated[int, Field(ge=1)] = Field(
        default=200, description="comparisons of the configuration with itself"
    )
    aa_pairs: Annotated[int, Field(ge=2)] = Field(
        default=20, description="pairs of runs in each of these comparisons"
    )
    delays_ms: PositiveNumbers = Field(
        default=(2.0, 10.0, 50.0), description="delays to inject, milliseconds"
    )
    injections: Annotated[int, Field(ge=1)] = Field(
        default=12, description="injections of each delay, at least"
    )
    method_requests: Annotated[int, Field(ge=1)] = Field(
        default=12, description="requests on which the timing methods are compared"
    )
    output_tokens: Annotated[int, Field(ge=2)] = Field(
        default=8, description="tokens that a run writes"
    )
    tiling: Tiling = Field(
        default=(1, 1), description="rows x columns of the image's tiles, such as 2x3"
    )
    proof_seconds: Annotated[float, Field(gt=0)] = Field(
        default=120.0,
        description="most seconds of each proof; what is not settled then is undecided",
    )
    aa_seconds: Annotated[float, Field(gt=0)] = Field(
        default=300.0,
        description="most seconds of the comparisons of the configuration with itself",
    )
    ceiling_seconds: Annotated[float, Field(gt=0)] = Field(
        default=4.0, description="seconds for measuring the machine's ceilings"
    )


class ExplainOptions(Group):
    """``explain.*``: which requests are looked at under a profiler."""

    sizes: Sizes | None = Field(
        default=None, description="image sizes, such as '640x480 336x336'; null: the shapes of exp2"
    )
    max_shapes: Annotated[int, Field(ge=1)] = Field(
        default=4, description="most shapes of exp2 to explain, the most frequent ones"
    )
    output_tokens: Annotated[int, Field(ge=2)] = Field(
        default=8, description="tokens that a run writes"
    )
    num_runs: Annotated[int, Field(ge=1)] = Field(
        default=10, description="runs of each shape without the profiler"
    )


class PredictOptions(Group):
    """``predict.*``: a workload whose latency is asked for without running the model."""

    image: Size = Field(default=(640, 480), description="width x height of the image, pixels")
    prompt_tokens: Annotated[int, Field(ge=1)] = Field(
        default=16, description="tokens of the prompt's text"
    )
    output_tokens: Annotated[int, Field(ge=1)] = Field(
        default=16, description="tokens of the answer"
    )
    vision_token_grid: Lengths = Field(
        default=(144, 288, 576, 1152, 2304), description="vision tokens of the grid of predictions"
    )
    output_token_grid: Lengths = Field(
        default=(1, 16, 64, 256, 1024), description="output tokens of the grid of predictions"
    )
    keep: Numbers = Field(
        default=(1.0, 0.75, 0.5, 0.25),
        description="shares of vision tokens kept, to predict what token reduction saves",
    )
    drop_layer: Annotated[int, Field(ge=1)] = Field(
        default=2, description="decoder layer at which the other tokens are dropped"
    )
    hardware: str | None = Field(
        default=None,
        description="a row of the hardware table; null: this machine's measured ceilings",
    )


class CompareOptions(Group):
    """``compare.*``: two results folders, or several."""

    baseline: str | None = Field(default=None, description="results folder to compare with")
    candidate: str | None = Field(default=None, description="results folder that is compared")
    runs: Words | None = Field(
        default=None, description="several results folders, the first one the baseline"
    )
    margin: Annotated[float, Field(gt=0, lt=1)] = Field(
        default=0.02, description="largest difference that counts as the same, a share"
    )
    drift: Annotated[float, Field(ge=0, lt=1)] = Field(
        default=0.1,
        description="difference between two sessions that the machine alone may make, a share",
    )
    fail_if_slower: Annotated[float, Field(ge=0)] | None = Field(
        default=None,
        description="fail where the candidate is certainly slower by this much, percent",
    )
    variants: str | None = Field(
        default=None, description="a YAML file of variants of the model, measured in turn"
    )
    num_samples: Annotated[int, Field(ge=1)] = Field(
        default=4, description="questions that every variant is asked"
    )
    num_runs: Annotated[int, Field(ge=1)] = Field(
        default=20, description="runs of each question by each variant"
    )
    output_tokens: Annotated[int, Field(ge=1)] = Field(
        default=8, description="tokens of each answer"
    )
