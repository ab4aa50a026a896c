"""The table of experiments, and of the analyses beside them.

One row says all that the rest of the project must know of an experiment: the registry, the
catalog, the page, the preflight, `vlm_latency.results` and the parameters are derived from it. What
a row does not hold is how its requests are made (``pipelines/data_sampling/rules.py``, by the type
of its sampling options) and what is reported (``pipelines/reporting/<name>.py``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from vlm_latency.option_types import (
    BY_PROTOCOL,
    Group,
    Lengths,
    SamplingOptions,
    Shares,
    Sizes,
    TilingOrNone,
    Words,
)


class QuestionSampling(SamplingOptions):
    """``expN.sampling.*``: questions of the dataset."""

    num_samples: Annotated[int, Field(ge=1)] | None = Field(
        None, description="questions to draw; null: all"
    )
    order: Annotated[Literal["random", "first"], BY_PROTOCOL] = Field(
        "random", description="random by seed, or the dataset's own order"
    )
    one_question_per_image: Annotated[bool, BY_PROTOCOL] = Field(
        False, description="at most one question of each image, so that requests are independent"
    )
    stratify_by_tiling: bool = Field(
        False, description="each tiling's share of the sample is its share of the dataset"
    )


class VisionSampling(SamplingOptions):
    """``expN.sampling.*``: one image per size."""

    # Why measurement.output_length has no effect on the experiment.
    fixed_length: ClassVar[str] = "is a prefill"

    max_grid_size: Annotated[int, Field(ge=1), BY_PROTOCOL] = Field(
        12, description="grids 1×1 … 1×this; for models without tiles, as many sizes"
    )
    equal_crop_pairs: Annotated[bool, BY_PROTOCOL] = Field(
        True, description="add grids of equal crops, which tell crops from tokens"
    )
    sizes: Sizes | None = Field(
        None, description="image sizes in place of grids, such as '336x336 672x336'"
    )


class LanguageSampling(QuestionSampling):
    """``expN.sampling.*``: the same questions at every output length."""

    fixed_length: ClassVar[str] = "has its sampling.max_new_tokens_list"

    max_new_tokens_list: Annotated[Lengths, BY_PROTOCOL] = Field(
        (), description="output lengths, such as '8 16 32'"
    )
    tiling: TilingOrNone = Field(
        None, description="one prompt size for every image, such as 2x3; none: as they are"
    )
    on_too_long: Literal["refuse", "drop"] = Field(
        "refuse", description="what becomes of lengths that exceed the model's positions"
    )
    use_eos_token: bool = Field(
        False, description="whether the end of sequence may stop earlier than the length"
    )


class EarlierResults(Group):
    """``exp5.*``: the two results to read."""

    vision_results: str | None = Field(
        None, description="a result of exp3; null: the one under output_dir"
    )
    language_results: str | None = Field(
        None, description="a result of exp4; null: the one under output_dir"
    )


class ReductionSampling(QuestionSampling):
    """``expN.sampling.*``: the same questions with every method and share."""


# What a request's ``method`` says where its tokens are not reduced.
BASELINE = "baseline"


class Reductions(Group):
    """``exp6.*``: what is done to vision tokens."""

    methods: Words = Field(
        (),
        description="names of vlm_latency.reduction.METHODS, or file.py:Class; none: all that the "
        "engine can run",
    )
    keep: Shares = Field((0.5, 0.25, 0.11), description="shares of vision tokens to keep")


@dataclass(frozen=True)
class Fact:
    """One number of a result's ``statistics`` that the page shows first."""

    label: str
    path: tuple[str, ...]
    unit: str = ""
    scale: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """A study beside the experiments: a pipeline, a result and a place on the page.

    Attributes
    ----------
    name
        Of the pipeline, of its folder below ``output_dir`` and of its package in ``pipelines``.
    title, question
        How the page introduces it.
    file
        Stem of the result's JSON file; by default the name.
    figures
        Stems of its figures' files.
    facts
        The numbers that the page shows first.
    """

    name: str
    title: str
    question: str
    file: str = ""
    figures: tuple[str, ...] = ()
    facts: tuple[Fact, ...] = ()

    @property
    def stem(self) -> str:
        """Stem of the result's JSON file."""
        return self.file or self.name


@dataclass(frozen=True, kw_only=True)
class Experiment(Analysis):
    """One experiment.

    Attributes
    ----------
    phase
        The pipeline that runs it together with others.
    sampling
        Its sampling options, which determine how its requests are made; None: it measures nothing.
    reads
        The datasets that its report reads beside the options.
    earlier
        Results of other experiments that it reads: dataset → experiment. The user may name another
        file for each with ``<name>.<dataset>_results``.
    own
        Its parameters beside ``sampling``, ``measurement`` and ``flops``.
    independent
        Whether the exact protocol draws one question per image and measures a fifth of the requests
        once more: for a distribution.
    seed_length
        The output length that the seed protocol sets, if any.
    """

    phase: str
    sampling: type[SamplingOptions] | None = None
    reads: tuple[str, ...] = ("records", "requests", "coverage", "environment")
    earlier: Mapping[str, str] = field(default_factory=dict)
    own: type[Group] = Group
    independent: bool = False
    seed_length: str | None = None

    @property
    def measures(self) -> bool:
        """Whether it runs the model."""
        return self.sampling is not None

    @property
    def fixed_length(self) -> str | None:
        """Why ``measurement.output_length`` has no effect on it, if so."""
        return getattr(self.sampling, "fixed_length", None)


_EVIDENCE = ("records", "requests", "coverage", "environment")
_ROWS = (
    Experiment(
        name="exp1",
        title="Latency distribution",
        question="How is the latency of a request distributed, and what makes its tail?",
        file="exp1_latency_distribution",
        figures=("exp1_latency_distribution",),
        phase="phase1",
        sampling=QuestionSampling,
        independent=True,
        seed_length="none",
        facts=(
            Fact("median of T_total (P50)", ("T_total", "P50"), "ms"),
            Fact("P95 of T_total", ("T_total", "P95"), "ms"),
            Fact("P99 of T_total", ("T_total", "P99"), "ms"),
            Fact("P99 / P50", ("T_total", "tail_ratio")),
            Fact("mean of T_total", ("T_total", "mean"), "ms"),
            Fact("median of the time to first token", ("T_first_token", "P50"), "ms"),
            Fact("where the tail comes from", ("variance_budget", "sentence")),
            Fact("VQA accuracy", ("accuracy",), "%", 100),
        ),
    ),
    Experiment(
        name="exp2",
        title="Components",
        question="Which component holds the parameters, and which takes the time?",
        file="exp2_component_profiling",
        figures=("exp2_parameters", "exp2_latency", "exp2_components"),
        phase="phase1",
        sampling=QuestionSampling,
        reads=(*_EVIDENCE, "model"),
        facts=(
            Fact("T_total, mean", ("means", "T_total"), "ms"),
            Fact("vision encoder, share of T_total", ("shares", "T_vision_encoder"), "%", 100),
            Fact("projector, share", ("shares", "T_projector"), "%", 100),
            Fact("LLM prefill, share", ("shares", "T_LLM_prefill"), "%", 100),
            Fact("LLM decode, share", ("shares", "T_LLM_decode"), "%", 100),
            Fact("LLM, prefill and decode, share", ("llm_share",), "%", 100),
            Fact("preprocessing, before T_total", ("means", "T_preprocess"), "ms"),
        ),
    ),
    Experiment(
        name="exp3",
        title="Vision tokens",
        question="How does latency grow with the number of vision tokens?",
        file="exp3_vision_tokens_vs_latency",
        figures=("exp3_vision_tokens_vs_latency",),
        phase="phase2",
        sampling=VisionSampling,
        reads=(*_EVIDENCE, "ceilings"),
        facts=(
            Fact("T_total per vision token", ("fits", "T_total", "slope"), "µs", 1000),
            Fact("prefill per vision token", ("fits", "T_LLM_prefill", "slope"), "µs", 1000),
            Fact("encoder per crop, told apart", ("encoder_per_crop",), "ms"),
            Fact("prefill per vision token, told apart", ("prefill_per_token",), "µs", 1000),
            Fact("exponent of T_total (1 is linear)", ("exponent",)),
            Fact("T_total over vision tokens", ("linearity",)),
            Fact("T_vision_total over vision tokens", ("staircase",)),
        ),
    ),
    Experiment(
        name="exp4",
        title="Language tokens",
        question="How does latency grow with the number of output tokens?",
        file="exp4_language_tokens_vs_latency",
        figures=("exp4_language_tokens_vs_latency",),
        phase="phase2",
        sampling=LanguageSampling,
        reads=(*_EVIDENCE, "ceilings", "given_requests"),
        facts=(
            Fact("decode per output token", ("fits", "T_LLM_decode", "slope"), "ms"),
            Fact("time to first token", ("prefill",), "ms"),
            Fact("last decode step / second", ("step_growth",)),
            Fact("exponent of T_LLM_decode (1 is linear)", ("exponent",)),
            Fact("lengths that do not fit the model", ("dropped_lengths",)),
        ),
    ),
    Experiment(
        name="exp5",
        title="FLOPs",
        question="Do FLOPs predict latency?",
        file="exp5_flops_vs_latency",
        figures=("exp5_flops_vs_latency",),
        phase="phase2",
        reads=("vision", "language"),
        earlier={"vision": "exp3", "language": "exp4"},
        own=EarlierResults,
        facts=(
            Fact("R², vision sweep (affine in its tokens)", ("exp3", "r_squared")),
            Fact("R², language sweep (affine in its tokens)", ("exp4", "r_squared")),
            Fact("R², both together", ("combined", "r_squared")),
            Fact("error of FLOPs alone, held out", ("held_out_error", "flops"), "%", 100),
            Fact("error of tokens", ("held_out_error", "tokens"), "%", 100),
            Fact("error of the nominal roofline", ("held_out_error", "roofline_nominal"), "%", 100),
            Fact(
                "error of the calibrated roofline",
                ("held_out_error", "roofline_calibrated"),
                "%",
                100,
            ),
            Fact("verdict", ("verdict",)),
        ),
    ),
    Experiment(
        name="exp6",
        title="Token reduction",
        question="Do the FLOPs that dropped vision tokens save become time saved?",
        file="exp6_token_reduction",
        figures=("exp6_token_reduction",),
        phase="phase3",
        sampling=ReductionSampling,
        reads=(*_EVIDENCE, "model"),
        own=Reductions,
        facts=(
            Fact("finding", ("finding",)),
            Fact("identity / baseline", ("identity",)),
            Fact("time saved over FLOPs saved, mean over methods", ("realised",), "%", 100),
            Fact("methods that an engine cannot run", ("refused",)),
        ),
    ),
)
EXPERIMENTS: dict[str, Experiment] = {row.name: row for row in _ROWS}
ALL = ("phase1", "phase2")  # what the pipeline ``all`` runs, the default

ANALYSES: dict[str, Analysis] = {
    row.name: row
    for row in (
        Analysis(
            name="calibration",
            title="Calibration",
            question="How far can these numbers be trusted?",
            figures=("calibration",),
            facts=(
                Fact("error on delays of known length", ("recovery_error",), "%", 100),
                Fact("instrumented / bare generate()", ("overhead", "ratio")),
                Fact("bare / bare, the null", ("null", "ratio")),
                Fact("false alarms between equal runs", ("false_alarms", "share"), "%", 100),
                Fact("remainder T_other / T_total", ("remainder",), "%", 100),
            ),
        ),
        Analysis(
            name="explain",
            title="Explanation",
            question="What bounds each component: launching work, memory, or arithmetic?",
            figures=("explain",),
            facts=(
                Fact("finding", ("finding",)),
                Fact("the device computes during", ("busy_share",), "% of T_total", 100),
                Fact("vision encoder is bound by", ("bound", "T_vision_encoder")),
                Fact("LLM prefill is bound by", ("bound", "T_LLM_prefill")),
                Fact("LLM decode is bound by", ("bound", "T_LLM_decode")),
                Fact("attention kernels", ("attention",)),
                Fact("kernel time attributed to components", ("attributed",), "%", 100),
                Fact("under the profiler, times as long", ("slowdown",)),
            ),
        ),
        Analysis(
            name="predict",
            title="Prediction",
            question="How long would a workload take that was not run, and what could pruning win?",
            figures=("predict",),
            facts=(
                Fact("workload", ("workload",)),
                Fact("hardware", ("hardware",)),
                Fact("predicted latency", ("latency",), "ms"),
            ),
        ),
        Analysis(
            name="compare",
            title="Comparison",
            question="Which run is faster, and is the difference certain?",
            figures=("compare",),
        ),
    )
}


def studies() -> dict[str, Analysis]:
    """Give all that can lie below an output folder, in the order in which the page shows it."""
    return {**EXPERIMENTS, **ANALYSES}


def measured() -> tuple[str, ...]:
    """Name the experiments that run the model."""
    return tuple(row.name for row in EXPERIMENTS.values() if row.measures)
