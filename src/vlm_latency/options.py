"""Every parameter a user can set, one frozen pydantic model per group.

``Options.from_parameters`` validates the whole parameter tree at once (all errors are listed by
path, with the nearest right name for a mistyped one); ``Options.experiment("exp3")`` gives the
*effective* options of one experiment: built-in default < ``protocol`` preset < shared group <
the experiment's own override. A value of ``None`` in a field that the preset knows means "as the
protocol says".
"""

from __future__ import annotations

import difflib
import re
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    model_validator,
)

from vlm_latency.errors import UserError

EXPERIMENTS = ("exp1", "exp2", "exp3", "exp4", "exp5")
MEASURED = EXPERIMENTS[:4]

Method = Literal["timeline", "subtraction", "hook"]
Estimator = Literal["analytic", "counted", "parameter_rule"]


def _words(value: Any) -> Any:
    """Lists do not parse on Kedro's command line: take ``"8 16 32"`` as well, and one number."""
    if isinstance(value, str):
        return value.replace(",", " ").split()
    return [value] if isinstance(value, int | float) else value


def _output_length(value: Any) -> str:
    text = str(value)
    if text in {"natural", "answer", "none"} or (text.isdigit() and int(text) > 0):
        return text
    raise ValueError("expected natural, answer, none or a positive number")


def _tiling(value: Any) -> Any:
    """Read "2x3" once, as (rows, columns)."""
    if not isinstance(value, str):
        return value
    match = re.fullmatch(r"([1-9]\d*)[x×]([1-9]\d*)", value)
    if not match:
        raise ValueError("expected rows x columns, such as 2x3")
    return int(match[1]), int(match[2])


def _tiling_or_none(value: Any) -> Any:
    try:
        return None if value == "none" else _tiling(value)
    except ValueError as error:
        raise ValueError(f"{error}, or none") from None


Lengths = Annotated[tuple[Annotated[int, Field(gt=0)], ...], BeforeValidator(_words)]
Sizes = Annotated[tuple[str, ...], BeforeValidator(_words)]
Folders = Annotated[tuple[str, ...], BeforeValidator(_words)]
OutputLength = Annotated[str, BeforeValidator(_output_length)]
_Tiles = Annotated[int, Field(gt=0)]
Tiling = Annotated[
    tuple[_Tiles, _Tiles],
    BeforeValidator(_tiling),
    PlainSerializer(lambda grid: f"{grid[0]}x{grid[1]}", when_used="json"),
]


class Group(BaseModel):
    """A group of parameters: unknown names are errors, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class ModelOptions(Group):
    """``model.*``: which model, with which weights, where and how it runs."""

    name: str | None = None  # zoo name, hub id, local folder or file.py:function
    weights: Literal["auto", "pretrained", "random"] = "auto"
    revision: str | None = None
    zoo_file: str | None = None  # a user's own zoo, laid over the built-in one
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    attn_implementation: str = "sdpa"
    float32_attention: bool | None = None  # Molmo only; None = as the reference
    engine: Literal["eager", "static", "compiled"] = "eager"
    max_crops: Annotated[int, Field(ge=1)] | None = None  # tiles; None = the model's own
    seed: int = 0
    trust_remote_code: bool = False
    num_threads: Annotated[int, Field(ge=1)] = 1  # CPU threads while measuring
    null_sleep_ms: Annotated[float, Field(ge=0)] = 0.0  # null-model only: how long a run takes


class ColumnNames(Group):
    """``dataset.columns.*``: what a hub dataset calls its columns."""

    question: str = "question"
    question_id: str | None = "question_id"
    image_id: str | None = "image_id"
    image: str = "image"
    answers: str | None = "answers"
    answer: str | None = "multiple_choice_answer"
    question_type: str | None = "question_type"
    answer_type: str | None = "answer_type"


class DatasetOptions(Group):
    """``dataset.*``: where the questions and images come from."""

    name: str | None = "coco_2014_vqa"
    source: Literal["synthetic", "official", "hub", "folder"] | None = None
    path: str | None = None
    split: Literal["validation", "val", "train"] = "validation"
    hub_id: str = "lmms-lab/VQAv2"
    revision: str | None = None
    columns: ColumnNames = ColumnNames()
    questions_file: str | None = None  # source=folder: the CSV or JSONL
    seed: int = 0
    size: Annotated[int, Field(ge=1)] | None = None  # source=synthetic: number of images
    image_cache: str = "data/02_intermediate/hub_images"  # source=hub: where drawn images are kept


class PromptOptions(Group):
    """``prompt.*``: what is written around the question."""

    template: str = "vqa2: {question}"

    @model_validator(mode="after")
    def _has_question(self) -> PromptOptions:
        if "{question}" not in self.template:
            raise ValueError(f"template {self.template!r} has no {{question}} in it")
        return self


class SamplingOptions(Group):
    """``expN.sampling.*``: which requests an experiment makes."""

    requests: str | None = None  # a table of requests made before (parquet), instead of drawing
    num_samples: Annotated[int, Field(ge=1)] | None = None
    order: Literal["random", "first"] | None = None  # None = as the protocol says
    seed: int = 0
    one_question_per_image: bool | None = None  # None = as the protocol says
    stratify_by_tiling: bool = False
    # exp3
    max_grid_size: Annotated[int, Field(ge=1)] | None = None
    equal_crop_pairs: bool | None = None  # None = as the protocol says
    sizes: Sizes | None = None  # "336x336 672x336": for models without tiles
    # exp4
    max_new_tokens_list: Lengths | None = None
    # "2x3": one prompt size for every image; none: as they are
    tiling: Annotated[Tiling | None, BeforeValidator(_tiling_or_none)] = None
    on_too_long: Literal["refuse", "drop"] = "refuse"
    use_eos_token: bool = False  # may stop before the length; false: exactly so many tokens


class MeasurementOptions(Group):
    """``measurement.*``: how a request is timed."""

    method: Method | None = None  # None = as the protocol says
    use_hook_for_llm_prefill: bool = False
    num_runs: Annotated[int, Field(ge=1)] = 1
    output_length: OutputLength | None = None  # None = as the protocol says
    max_new_tokens: Annotated[int, Field(ge=1)] = 16  # cap when output_length=natural
    order: Literal["blocks", "ascending"] | None = None  # None = as the protocol says
    seed: int = 0
    warmup: Literal["plateau", "fixed"] | None = None  # None = as the protocol says
    warmup_runs: Annotated[int, Field(ge=0)] = 3  # fixed: this many; plateau: at least this many
    warmup_max_runs: Annotated[int, Field(ge=1)] = 20
    # requests measured once more, to know the noise; None = as the protocol says
    noise_repeats: Annotated[int, Field(ge=0)] | None = None
    resume: bool = True
    allow_partial: bool = False
    max_failures: Annotated[float, Field(ge=0, le=1)] = 0.01  # share of the runs
    chunk_size: Annotated[int, Field(ge=1, le=64)] = 16


class FlopsOptions(Group):
    """``flops.*``: which estimator fills the seed's ``flops_*`` columns."""

    estimator: Estimator | None = None  # None = as the protocol says
    counted: bool = True  # count on the meta device too (once per shape)


class FigureOptions(Group):
    """``figures.*``: how figures look."""

    style: Literal["default", "paper"] = "default"
    dpi: Annotated[int, Field(ge=50)] = 300
    vision_axis: Literal["tokens", "patches"] | None = None  # None = as the protocol says


class ExperimentOverrides(Group):
    """``expN.*``: sampling of its own, and overrides of the shared groups."""

    sampling: SamplingOptions = SamplingOptions()
    measurement: MeasurementOptions = MeasurementOptions()
    flops: FlopsOptions = FlopsOptions()


class Exp5Options(Group):
    """``exp5.*``: the two results to read (default: those under ``output_dir``)."""

    vision_results: str | None = None
    language_results: str | None = None
    flops: FlopsOptions = FlopsOptions()


class CalibrationOptions(Group):
    """``calibration.*``: how much the instrument is made to prove."""

    pairs: Annotated[int, Field(ge=2)] = 40  # at least; more until half_width is reached
    half_width: Annotated[float, Field(gt=0)] = 0.003  # of the ratios' intervals, a share
    aa_comparisons: Annotated[int, Field(ge=1)] = 200
    aa_pairs: Annotated[int, Field(ge=2)] = 20
    delays_ms: Annotated[tuple[Annotated[float, Field(gt=0)], ...], BeforeValidator(_words)] = (
        2.0,
        10.0,
        50.0,
    )
    injections: Annotated[int, Field(ge=1)] = 12  # of each delay at least
    method_requests: Annotated[int, Field(ge=1)] = 12
    output_tokens: Annotated[int, Field(ge=2)] = 8
    tiling: Tiling = (1, 1)
    proof_seconds: Annotated[float, Field(gt=0)] = 120.0  # of each proof; then it is undecided
    aa_seconds: Annotated[float, Field(gt=0)] = 300.0  # of the comparisons of equals
    ceiling_seconds: Annotated[float, Field(gt=0)] = 8.0


class PredictOptions(Group):
    """``predict.*``: a workload whose latency is asked for without running the model."""

    image: str = "640x480"
    prompt_tokens: Annotated[int, Field(ge=1)] = 16
    output_tokens: Annotated[int, Field(ge=1)] = 16
    vision_token_grid: Lengths = (144, 288, 576, 1152, 2304)
    output_token_grid: Lengths = (1, 16, 64, 256, 1024)
    keep: Annotated[tuple[float, ...], BeforeValidator(_words)] = (1.0, 0.75, 0.5, 0.25)
    drop_layer: Annotated[int, Field(ge=1)] = 2
    hardware: str | None = None  # a row of the hardware table; None = this machine's ceilings


class CompareOptions(Group):
    """``compare.*``: two results folders, or several."""

    baseline: str | None = None
    candidate: str | None = None
    runs: Folders | None = None
    margin: Annotated[float, Field(gt=0, lt=1)] = 0.02
    fail_if_slower: Annotated[float, Field(ge=0)] | None = None  # percent


# What an experiment's sampling listens to; the rest of the group is other experiments' matter.
_QUESTIONS = {"num_samples", "order", "one_question_per_image", "stratify_by_tiling"}
_HEARD = {
    "exp1": _QUESTIONS,
    "exp2": _QUESTIONS,
    "exp3": {"max_grid_size", "equal_crop_pairs", "sizes"},
    "exp4": _QUESTIONS | {"max_new_tokens_list", "tiling", "on_too_long", "use_eos_token"},
}

# What each protocol sets where the user has not: {group: {field: value}}.
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "exact": {
        "sampling": {"order": "random", "equal_crop_pairs": True},
        "measurement": {"method": "timeline", "order": "blocks", "warmup": "plateau"},
        "flops": {"estimator": "analytic"},
        "figures": {"vision_axis": "tokens"},
    },
    "seed": {
        "sampling": {"order": "first", "equal_crop_pairs": False},
        "measurement": {"method": "subtraction", "order": "ascending", "warmup": "fixed"},
        "flops": {"estimator": "parameter_rule"},
        "figures": {"vision_axis": "patches"},
    },
}


class ExperimentOptions(Group):
    """The effective options of one experiment: nothing left to be decided."""

    experiment: str
    protocol: Literal["exact", "seed"]
    output_dir: str
    model: ModelOptions
    dataset: DatasetOptions
    prompt: PromptOptions
    sampling: SamplingOptions
    measurement: MeasurementOptions
    flops: FlopsOptions
    figures: FigureOptions


class Options(Group):
    """The whole parameter tree."""

    output_dir: str = "data/08_reporting/motivation"
    protocol: Literal["exact", "seed"] = "exact"
    model: ModelOptions = ModelOptions()
    dataset: DatasetOptions = DatasetOptions()
    prompt: PromptOptions = PromptOptions()
    measurement: MeasurementOptions = MeasurementOptions()
    flops: FlopsOptions = FlopsOptions()
    figures: FigureOptions = FigureOptions()
    exp1: ExperimentOverrides = ExperimentOverrides()
    exp2: ExperimentOverrides = ExperimentOverrides()
    exp3: ExperimentOverrides = ExperimentOverrides()
    exp4: ExperimentOverrides = ExperimentOverrides()
    exp5: Exp5Options = Exp5Options()
    calibration: CalibrationOptions = CalibrationOptions()
    predict: PredictOptions = PredictOptions()
    compare: CompareOptions = CompareOptions()

    @classmethod
    def from_parameters(cls, parameters: dict[str, Any]) -> Options:
        """Validate a parameter tree.

        Raises
        ------
        UserError
            Naming every wrong parameter by its path, what was found and what was expected.
        """
        try:
            options = cls.model_validate(parameters)
        except ValidationError as error:
            raise UserError(_explain(error, cls)) from None
        for name in EXPERIMENTS:
            options.experiment(name)  # refuses what contradicts itself
        if unheard := [path for name in MEASURED for path in options._unheard(name)]:
            raise UserError("\n".join(unheard))
        return options

    def _unheard(self, name: str) -> list[str]:
        """Say which of an experiment's own parameters would change nothing."""
        own: ExperimentOverrides = getattr(self, name)
        heard = _HEARD[name] | {"requests", "seed"}
        lines = [
            f"parameter '{name}.sampling.{field}' has no effect; {name} listens to "
            f"{', '.join(sorted(heard))}"
            for field in sorted(own.sampling.model_fields_set - heard)
        ]
        if name in ("exp3", "exp4") and "output_length" in own.measurement.model_fields_set:
            fixed = "is a prefill" if name == "exp3" else "has its sampling.max_new_tokens_list"
            lines.append(
                f"parameter '{name}.measurement.output_length' has no effect: {name} {fixed}"
            )
        return lines

    def experiment(self, name: str, weights: str = "pretrained") -> ExperimentOptions:
        """Give the effective options of one experiment.

        Parameters
        ----------
        name
            ``exp1`` … ``exp5``; a study beside them (``calibration``) has the shared options.
        weights
            ``pretrained`` or ``random``, as ``model.weights=auto`` came out: a model with random
            weights never says where its answer ends, so its default output length is ``answer``.
        """
        own: Any = getattr(self, name)
        preset = PRESETS[self.protocol]
        sampling = getattr(own, "sampling", SamplingOptions())
        apart = name == "exp1" and self.protocol == "exact"  # a distribution wants both
        asked = self.measurement.model_dump() | _given(own, "measurement")
        measurement = _settle(
            asked,
            {
                **preset["measurement"],
                "output_length": _default_length(name, self.protocol, weights),
                "noise_repeats": min(250, (sampling.num_samples or 0) // 5) if apart else 0,
            },
        )
        if measurement["use_hook_for_llm_prefill"]:
            if asked["method"] not in (None, "hook"):
                raise UserError(
                    f"{name}.measurement: use_hook_for_llm_prefill=true is another name for "
                    f"method=hook, but method={asked['method']} was given too; give one of them"
                )
            measurement["method"] = "hook"
        return ExperimentOptions.model_validate(
            {
                "experiment": name,
                "protocol": self.protocol,
                "output_dir": self.output_dir,
                "model": self.model.model_dump(),
                "dataset": self.dataset.model_dump(),
                "prompt": self.prompt.model_dump(),
                "sampling": _settle(
                    sampling.model_dump(), {**preset["sampling"], "one_question_per_image": apart}
                ),
                "measurement": measurement,
                "flops": _settle(self.flops.model_dump() | _given(own, "flops"), preset["flops"]),
                "figures": _settle(self.figures.model_dump(), preset["figures"]),
            }
        )


def _given(own: Group, group: str) -> dict[str, Any]:
    """What an experiment says about a shared group; a study beside them says nothing."""
    override = getattr(own, group, None)
    return override.model_dump(exclude_unset=True) if override else {}


def _settle(values: dict[str, Any], preset: dict[str, Any]) -> dict[str, Any]:
    """Fill what was left to the protocol."""
    return {key: preset.get(key) if value is None else value for key, value in values.items()}


def _default_length(name: str, protocol: str, weights: str) -> str:
    """What an experiment asks the model to write, where the user has not said."""
    if name in ("exp3", "exp4") or (name == "exp1" and protocol == "seed"):
        return "none"  # exp4's requests say their lengths themselves
    return "answer" if weights == "random" else "natural"


def _explain(error: ValidationError, root: type[BaseModel]) -> str:
    lines = []
    for item in error.errors():
        path = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            lines.append(f"unknown parameter '{path}'{_nearest(item['loc'], root)}")
        else:
            message = item["msg"].removeprefix("Value error, ")
            message = message[:1].lower() + message[1:]
            found = "" if isinstance(item["input"], dict) else f"found {item['input']!r}: "
            lines.append(f"parameter '{path}': {found}{message}")
    return "\n".join(lines)


def _nearest(loc: tuple[int | str, ...], root: type[BaseModel]) -> str:
    """Suggest the nearest right name beside a mistyped one."""
    known: Any = root
    for part in loc[:-1]:
        known = known.model_fields[str(part)].annotation
    names = list(known.model_fields)
    near = difflib.get_close_matches(str(loc[-1]), names, n=1, cutoff=0.5)
    parent = "".join(f"{part}." for part in loc[:-1])
    if near:
        return f"; did you mean '{parent}{near[0]}'?"
    return f"; known there: {', '.join(names)}"
