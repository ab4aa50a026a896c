"""Every parameter a user can set, one frozen pydantic model per group.

``Options.from_parameters`` validates the whole parameter tree at once (all errors are listed by
path, with the nearest right name for a mistyped one); ``Options.experiment("exp3")`` gives the
*effective* options of one experiment: built-in default < ``protocol`` preset < shared group <
the experiment's own override. A value of ``None`` in a field that the preset knows means "as the
protocol says".
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    SerializeAsAny,
    ValidationError,
    create_model,
    field_validator,
    model_validator,
)

from vlm_latency.errors import UserError
from vlm_latency.experiments import EXPERIMENTS, Experiment
from vlm_latency.option_types import (
    BY_PROTOCOL,
    Group,
    Lengths,
    Numbers,
    OutputLength,
    PartOfPlan,
    PositiveNumbers,
    SamplingOptions,
    Size,
    Sizes,
    Tiling,
    Words,
    Workers,
    asked,
)

COMPILED = ("compiled", "compiled-all", "loop")  # engines whose decode step is one graph
OF_THE_COMMAND = ("shard", "workers")  # of measurement.*: not to be set for one experiment alone
CAPTURED = COMPILED[1:]  # engines whose encoder, projector and prefill are graphs too


def _quoted(value: Any) -> Any:
    """Refuse a commit that was read as a number, which 12e4567 was: it is infinity."""
    if isinstance(value, int | float):
        raise ValueError(
            "a commit that reads as a number must be quoted: --params \"model.revision='12e4567'\""
        )
    return value


Revision = Annotated[str | None, BeforeValidator(_quoted)]
Method = Literal["timeline", "subtraction", "hook"]
Estimator = Literal["analytic", "counted", "parameter_rule"]


class ModelOptions(Group):
    """``model.*``: which model, with which weights, where and how it runs."""

    name: str | None = None  # zoo name, hub id, local folder or file.py:function
    weights: Literal["auto", "pretrained", "random"] = "auto"
    revision: Revision = None
    zoo_file: str | None = None  # a user's own zoo, laid over the built-in one
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    attn_implementation: str = "sdpa"
    # the decoder's kernel for attention; auto = PyTorch's choice
    sdpa_backend: Literal["auto", "flash", "efficient", "cudnn", "math"] = "auto"
    float32_attention: bool | None = None  # Molmo only; None = as the reference
    engine: Literal["eager", "static", "compiled", "compiled-all", "loop"] = "eager"
    max_crops: Annotated[int, Field(ge=1)] | None = None  # tiles; None = the model's own
    seed: int = 0
    trust_remote_code: bool = False
    # CPU threads while measuring; None = one on a CPU, torch's default beside a GPU
    num_threads: Annotated[int, Field(ge=1)] | None = None

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
    revision: Revision = None
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


class MeasurementOptions(Group):
    """``measurement.*``: how a request is timed."""

    method: Annotated[Method, BY_PROTOCOL] = "timeline"
    use_hook_for_llm_prefill: bool = False
    num_runs: Annotated[int, Field(ge=1)] = 1
    output_length: Annotated[OutputLength, BY_PROTOCOL] = "natural"
    max_new_tokens: Annotated[int, Field(ge=1)] = 16  # cap when output_length=natural
    order: Annotated[Literal["blocks", "ascending"], BY_PROTOCOL] = "blocks"
    seed: int = 0
    warmup: Annotated[Literal["plateau", "fixed"], BY_PROTOCOL] = "plateau"
    warmup_runs: Annotated[int, Field(ge=0)] = 3  # fixed: this many; plateau: at least this many
    warmup_max_runs: Annotated[int, Field(ge=1)] = 20
    # warm: lengths are visited before they are measured where new ones cost (unless warmup_runs
    # is 0); cold: first visits stay in
    lengths: Annotated[Literal["warm", "cold"], BY_PROTOCOL] = "warm"
    # wait so many seconds at most before a run for a host that is as quick as it has been
    quiet_seconds: Annotated[float, Field(ge=0)] = 0.0
    nvtx: bool = False  # NVTX ranges around the components (Nsight Systems)
    # requests measured once more, to know the noise
    noise_repeats: Annotated[int, Field(ge=0), BY_PROTOCOL] = 0
    resume: bool = True
    allow_partial: bool = False
    max_failures: Annotated[float, Field(ge=0, le=1)] = 0.01  # share of the runs
    chunk_size: Annotated[int, Field(ge=1, le=64)] = 16
    # 3/8: measure the third of eight parts, into output_dir/shard-3of8; without it the same command
    # gathers all parts
    shard: PartOfPlan | None = None
    workers: Workers = (
        1  # processes that measure, one per device; all: as many as there are devices
    )


class RayOptions(Group):
    """``ray.*``: devices of other machines."""

    address: str | None = (
        None  # of a Ray cluster that runs: host:port, auto, ray://…; None: this machine
    )


class FlopsOptions(Group):
    """``flops.*``: which estimator fills the seed's ``flops_*`` columns."""

    estimator: Annotated[Estimator, BY_PROTOCOL] = "analytic"
    counted: bool = True  # count on the meta device too (once per shape)


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

    style: Literal["default", "paper"] = "default"
    columns: Literal[1, 2] = 1  # style=paper: of the page that a figure fills
    panels: Words = ()  # names of the panels of exp1–exp5 to draw; none: all
    dpi: Annotated[int, Field(ge=50)] = 300
    vision_axis: Annotated[Literal["tokens", "patches"], BY_PROTOCOL] = "tokens"

    @field_validator("panels")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if unknown := [name for name in names if name not in PANELS]:
            raise ValueError(f"no panel {', '.join(unknown)}; expected of {' '.join(PANELS)}")
        return names


class CalibrationOptions(Group):
    """``calibration.*``: how much the instrument is made to prove."""

    pairs: Annotated[int, Field(ge=2)] = 40  # at least; more until half_width is reached
    half_width: Annotated[float, Field(gt=0)] = 0.003  # of the ratios' intervals, a share
    aa_comparisons: Annotated[int, Field(ge=1)] = 200
    aa_pairs: Annotated[int, Field(ge=2)] = 20
    delays_ms: PositiveNumbers = (2.0, 10.0, 50.0)
    injections: Annotated[int, Field(ge=1)] = 12  # of each delay at least
    method_requests: Annotated[int, Field(ge=1)] = 12
    output_tokens: Annotated[int, Field(ge=2)] = 8
    tiling: Tiling = (1, 1)
    proof_seconds: Annotated[float, Field(gt=0)] = 120.0  # of each proof; then it is undecided
    aa_seconds: Annotated[float, Field(gt=0)] = 300.0  # of the comparisons of equals
    ceiling_seconds: Annotated[float, Field(gt=0)] = 8.0


class ExplainOptions(Group):
    """``explain.*``: which requests are looked at under a profiler."""

    sizes: Sizes | None = None  # images of these sizes, "640x480 336x336"; None: exp2's shapes
    max_shapes: Annotated[int, Field(ge=1)] = 4  # of exp2's, the most frequent ones
    output_tokens: Annotated[int, Field(ge=2)] = 8
    num_runs: Annotated[int, Field(ge=1)] = 10  # of each, without the profiler


class PredictOptions(Group):
    """``predict.*``: a workload whose latency is asked for without running the model."""

    image: Size = (640, 480)
    prompt_tokens: Annotated[int, Field(ge=1)] = 16
    output_tokens: Annotated[int, Field(ge=1)] = 16
    vision_token_grid: Lengths = (144, 288, 576, 1152, 2304)
    output_token_grid: Lengths = (1, 16, 64, 256, 1024)
    keep: Numbers = (1.0, 0.75, 0.5, 0.25)
    drop_layer: Annotated[int, Field(ge=1)] = 2
    hardware: str | None = None  # a row of the hardware table; None = this machine's ceilings


class CompareOptions(Group):
    """``compare.*``: two results folders, or several."""

    baseline: str | None = None
    candidate: str | None = None
    runs: Words | None = None
    margin: Annotated[float, Field(gt=0, lt=1)] = 0.02
    # What a machine may drift between two sessions: a smaller difference is undecided.
    drift: Annotated[float, Field(ge=0, lt=1)] = 0.1
    fail_if_slower: Annotated[float, Field(ge=0)] | None = None  # percent
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


# What each protocol sets where the user has not: {group: {field: value}}.
PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    "exact": {
        "sampling": {"order": "random", "equal_crop_pairs": True},
        "measurement": {
            "method": "timeline",
            "order": "blocks",
            "warmup": "plateau",
            "lengths": "warm",
        },
        "flops": {"estimator": "analytic"},
        "figures": {"vision_axis": "tokens"},
    },
    "seed": {
        "sampling": {"order": "first", "equal_crop_pairs": False},
        "measurement": {
            "method": "subtraction",
            "order": "ascending",
            "warmup": "fixed",
            "lengths": "cold",
        },
        "flops": {"estimator": "parameter_rule"},
        "figures": {"vision_axis": "patches"},
    },
}


Sampling_co = TypeVar("Sampling_co", bound=SamplingOptions, covariant=True)


class ExperimentOptions(Group, Generic[Sampling_co]):
    """The effective options of one experiment: nothing left to be decided."""

    experiment: str
    protocol: Literal["exact", "seed"]
    output_dir: str
    model: ModelOptions
    dataset: DatasetOptions
    prompt: PromptOptions
    sampling: SerializeAsAny[Sampling_co]
    own: SerializeAsAny[Group] = Group()  # the experiment's parameters beside the groups
    measurement: MeasurementOptions
    ray: RayOptions = RayOptions()
    flops: FlopsOptions
    figures: FigureOptions


def _own_group(row: Experiment) -> tuple[type[Group], Group]:
    """``expN.*``: sampling of its own, overrides of the shared groups, whatever else it has."""
    groups: dict[str, type[Group]] = {"flops": asked(FlopsOptions)}
    if row.sampling is not None:
        groups = {
            "sampling": asked(row.sampling),
            "measurement": asked(MeasurementOptions),
            **groups,
        }
    fields: dict[str, Any] = {name: (group, group()) for name, group in groups.items()}
    own = create_model(row.name, __base__=row.own, __doc__=f"``{row.name}.*``", **fields)
    return own, own()


class _Shared(Group):
    output_dir: str = "data/08_reporting/motivation"
    protocol: Literal["exact", "seed"] = "exact"
    model: ModelOptions = ModelOptions()
    dataset: DatasetOptions = DatasetOptions()
    prompt: PromptOptions = PromptOptions()
    ray: RayOptions = RayOptions()


# Parameters that the protocol settles, and those of the table's experiments: types made at run time.
_BY_PROTOCOL: dict[str, type[Group]] = {
    "measurement": MeasurementOptions,
    "flops": FlopsOptions,
    "figures": FigureOptions,
}
_fields: dict[str, Any] = {
    **{name: (asked(group), asked(group)()) for name, group in _BY_PROTOCOL.items()},
    **{name: _own_group(row) for name, row in EXPERIMENTS.items()},
}
_Tree: Any = create_model("_Tree", __base__=_Shared, **_fields)


class Options(_Tree):
    """The whole parameter tree."""

    calibration: CalibrationOptions = CalibrationOptions()
    explain: ExplainOptions = ExplainOptions()
    predict: PredictOptions = PredictOptions()
    compare: CompareOptions = CompareOptions()

    @property
    def folder(self) -> Path:
        """Where results, or the journals of a shard, are written."""
        root, shard = Path(self.output_dir).expanduser(), self.measurement.shard
        return root / shard.folder if shard else root

    @classmethod
    def from_parameters(cls, parameters: dict[str, Any]) -> Options:
        """Validate a parameter tree.

        Raises
        ------
        UserError
            Naming every wrong parameter by its path, what was found and what was expected.
        """
        try:
            options: Options = cls.model_validate(parameters)
            wrong = []
        except ValidationError as error:
            wrong = _explain(error, cls)
        if wrong := [*wrong, *_unheard(parameters), *_of_the_command(parameters)]:
            raise UserError("\n".join(wrong))
        for name in EXPERIMENTS:
            options.experiment(name)  # refuses what contradicts itself
        return options

    def experiment(self, name: str, weights: str = "pretrained") -> ExperimentOptions:
        """Give the effective options of one experiment.

        Parameters
        ----------
        name
            A row of `vlm_latency.experiments`; whatever else measures has the shared options.
        weights
            ``pretrained`` or ``random``, as ``model.weights=auto`` came out: a model with random
            weights never says where its answer ends, so its default output length is ``answer``.
        """
        row, own = EXPERIMENTS.get(name), getattr(self, name, None)
        preset = PRESETS[self.protocol]
        kind = (row and row.sampling) or SamplingOptions
        drawn = getattr(own, "sampling", None) if row else None
        apart = row is not None and row.independent and self.protocol == "exact"
        given = self.measurement.model_dump() | _given(own, "measurement")
        measurement = {
            **preset["measurement"],
            "output_length": _default_length(row, self.protocol, weights),
            "noise_repeats": min(250, (drawn.num_samples or 0) // 5) if apart and drawn else 0,
        } | _said(given)
        if measurement["use_hook_for_llm_prefill"]:
            if given["method"] not in (None, "hook"):
                raise UserError(
                    f"{name}.measurement: use_hook_for_llm_prefill=true is another name for "
                    f"method=hook, but method={given['method']} was given too; give one of them"
                )
            measurement["method"] = "hook"
        by_protocol = {**preset["sampling"], "one_question_per_image": apart}
        known = {key: by_protocol[key] for key in by_protocol if key in kind.model_fields}
        flops = self.flops.model_dump() | _given(own, "flops")
        return ExperimentOptions(
            experiment=name,
            protocol=self.protocol,
            output_dir=self.output_dir,
            model=self.model,
            dataset=self.dataset,
            prompt=self.prompt,
            sampling=kind(**(known | _said(drawn.model_dump() if drawn else {}))),
            own=row.own(**{key: getattr(own, key) for key in row.own.model_fields})
            if row
            else Group(),
            measurement=MeasurementOptions(**measurement),
            ray=self.ray,
            flops=FlopsOptions(**(preset["flops"] | _said(flops))),
            figures=FigureOptions(**(preset["figures"] | _said(self.figures.model_dump()))),
        )


def _given(own: Group | None, group: str) -> dict[str, Any]:
    """What an experiment says about a shared group; a study beside them says nothing."""
    override = getattr(own, group, None)
    return override.model_dump(exclude_unset=True) if override else {}


def _said(values: dict[str, Any]) -> dict[str, Any]:
    """Leave out what is left open: to the protocol, else to the default."""
    return {key: value for key, value in values.items() if value is not None}


def _default_length(row: Experiment | None, protocol: str, weights: str) -> str:
    """What an experiment asks the model to write, where the user has not said."""
    if row and row.fixed_length:
        return "none"  # or its requests say their lengths themselves
    if row and row.seed_length and protocol == "seed":
        return row.seed_length
    return "answer" if weights == "random" else "natural"


def _unheard(parameters: dict[str, Any]) -> Iterator[str]:
    """Say which overrides of shared parameters would change nothing."""
    for name, row in EXPERIMENTS.items():
        given: Any = parameters.get(name)
        measurement = given.get("measurement") if isinstance(given, dict) else None
        if row.fixed_length and isinstance(measurement, dict) and "output_length" in measurement:
            yield (
                f"parameter '{name}.measurement.output_length' has no effect: {name} "
                f"{row.fixed_length}"
            )


def _of_the_command(parameters: dict[str, Any]) -> Iterator[str]:
    """Refuse an experiment's own value of what all experiments of a command share."""
    for name in EXPERIMENTS:
        given: Any = parameters.get(name)
        measurement = given.get("measurement") if isinstance(given, dict) else None
        for key in OF_THE_COMMAND:
            if isinstance(measurement, dict) and key in measurement:
                yield (
                    f"parameter '{name}.measurement.{key}' has no effect: it holds for the whole "
                    f"command, give measurement.{key}"
                )


def _explain(error: ValidationError, root: type[BaseModel]) -> list[str]:
    lines = []
    for item in error.errors():
        path = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            lines.append(_unknown(item["loc"], root))
        else:
            message = item["msg"].removeprefix("Value error, ")
            message = message[:1].lower() + message[1:]
            found = "" if isinstance(item["input"], dict) else f"found {item['input']!r}: "
            lines.append(f"parameter '{path}': {found}{message}")
    return lines


def _unknown(loc: tuple[int | str, ...], root: type[BaseModel]) -> str:
    """Refuse a name that is another experiment's parameter, or mistyped: with the nearest right one."""
    group: Any = root
    for part in loc[:-1]:
        group = group.model_fields[str(part)].annotation
    *parents, name = map(str, loc)
    path, names = ".".join([*parents, name]), list(group.model_fields)
    if parents[1:] == ["sampling"] and any(
        name in row.sampling.model_fields for row in EXPERIMENTS.values() if row.sampling
    ):
        return (
            f"parameter '{path}' has no effect; {parents[0]} listens to {', '.join(sorted(names))}"
        )
    if near := difflib.get_close_matches(name, names, n=1, cutoff=0.5):
        return f"unknown parameter '{path}'; did you mean '{'.'.join([*parents, near[0]])}'?"
    return f"unknown parameter '{path}'; known there: {', '.join(names)}"
