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
    Field,
    SerializeAsAny,
    ValidationError,
    create_model,
)

from vlm_latency.errors import UserError
from vlm_latency.experiments import EXPERIMENTS, Experiment
from vlm_latency.option_groups import (
    CalibrationOptions,
    CompareOptions,
    DatasetOptions,
    ExplainOptions,
    FigureOptions,
    PredictOptions,
    PromptOptions,
    RayOptions,
    Revision,
)
from vlm_latency.option_types import (
    BY_PROTOCOL,
    Group,
    OutputLength,
    PartOfPlan,
    SamplingOptions,
    Workers,
    asked,
)

COMPILED = ("compiled", "compiled-all", "loop")  # engines whose decode step is one graph
OF_THE_COMMAND = ("shard", "workers")  # of measurement.*: not to be set for one experiment alone
CAPTURED = COMPILED[1:]  # engines whose encoder, projector and prefill are graphs too


Method = Literal["timeline", "subtraction", "hook"]
Estimator = Literal["analytic", "counted", "parameter_rule"]


class ModelOptions(Group):
    """``model.*``: which model, with which weights, where and how it runs."""

    name: str | None = Field(
        default=None,
        description="a zoo name ('kedro models'), a hub id, a local folder, or file.py:function",
    )
    weights: Literal["auto", "pretrained", "random"] = Field(
        default="auto", description="auto: random for a zoo name, pretrained for a hub id or folder"
    )
    revision: Revision = Field(
        default=None, description="commit, branch or tag of a hub id; null: its main branch"
    )
    zoo_file: str | None = Field(
        default=None, description="a YAML file of one's own models, laid over the built-in zoo"
    )
    device: str = Field(
        default="auto", description="auto (a GPU where there is one), cpu, cuda or cuda:N"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="of weights and activations; auto: bfloat16 on a GPU, float32 on a CPU",
    )
    attn_implementation: str = Field(
        default="sdpa", description="of transformers, such as sdpa, eager or flash_attention_2"
    )
    sdpa_backend: Literal["auto", "flash", "efficient", "cudnn", "math"] = Field(
        default="auto",
        description="PyTorch's attention kernel in the decoder; auto: PyTorch's own choice",
    )
    float32_attention: bool | None = Field(
        default=None,
        description="Molmo only: the encoder's attention in float32; null: as the reference",
    )
    engine: Literal["eager", "static", "compiled", "compiled-all", "loop"] = Field(
        default="eager",
        description="how generate() is run: what is static, compiled or replayed as a CUDA graph",
    )
    max_crops: Annotated[int, Field(ge=1, le=1000)] | None = Field(
        default=None, description="most tiles of an image; null: the model's own limit"
    )
    seed: int = Field(default=0, description="of random weights")
    trust_remote_code: bool = Field(
        default=False, description="allow a checkpoint to run its own Python code"
    )
    num_threads: Annotated[int, Field(ge=1)] | None = Field(
        default=None,
        description="CPU threads while measuring; null: one on a CPU, torch's default beside a GPU",
    )

    null_sleep_ms: Annotated[float, Field(ge=0)] = Field(
        default=0.0, description="null-model only: how long a run takes, milliseconds"
    )


class MeasurementOptions(Group):
    """``measurement.*``: how a request is timed."""

    method: Annotated[Method, BY_PROTOCOL] = Field(
        default="timeline",
        description="how components are timed: timeline marks one generate(), the others subtract",
    )
    use_hook_for_llm_prefill: bool = Field(
        default=False, description="another name for method=hook, as the seed study has it"
    )
    num_runs: Annotated[int, Field(ge=1)] = Field(default=1, description="runs of every request")
    output_length: Annotated[OutputLength, BY_PROTOCOL] = Field(
        default="natural",
        description="tokens to write: until the model stops, as many as the answer has, none, or N",
    )
    max_new_tokens: Annotated[int, Field(ge=1)] = Field(
        default=16, description="most tokens of an answer with output_length=natural"
    )
    order: Annotated[Literal["blocks", "ascending"], BY_PROTOCOL] = Field(
        default="blocks",
        description="blocks: shuffled, every request once per block; ascending: by prompt length",
    )
    seed: int = Field(default=0, description="of the order of the runs")
    warmup: Annotated[Literal["plateau", "fixed"], BY_PROTOCOL] = Field(
        default="plateau", description="plateau: until times are steady; fixed: warmup_runs"
    )
    warmup_runs: Annotated[int, Field(ge=0)] = Field(
        default=3, description="warm-up runs: exactly with warmup=fixed, at least with plateau"
    )
    warmup_max_runs: Annotated[int, Field(ge=1)] = Field(
        default=20, description="most warm-up runs with warmup=plateau"
    )
    lengths: Annotated[Literal["warm", "cold"], BY_PROTOCOL] = Field(
        default="warm",
        description="warm: new lengths are visited before they are measured, where they cost (not with warmup_runs=0); cold: first visits are measured",
    )
    quiet_seconds: Annotated[float, Field(ge=0)] = Field(
        default=0.0,
        description="longest wait before a run for a host as quick as it has been, seconds",
    )
    nvtx: bool = Field(
        default=False, description="NVTX ranges around the components, for Nsight Systems"
    )
    noise_repeats: Annotated[int, Field(ge=0), BY_PROTOCOL] = Field(
        default=0, description="requests measured once more, to estimate the noise"
    )
    resume: bool = Field(
        default=True,
        description="continue the runs in output_dir; false: set them aside and measure afresh",
    )
    allow_partial: bool = Field(
        default=False, description="report on the runs there are, and measure nothing more"
    )
    max_failures: Annotated[float, Field(ge=0, le=1)] = Field(
        default=0.01, description="share of the runs that may fail"
    )
    chunk_size: Annotated[int, Field(ge=1, le=64)] = Field(
        default=16, description="most runs that a crash may lose"
    )
    shard: PartOfPlan | None = Field(
        default=None,
        description="3/8: measure the third of eight parts; null: everything, or gather all parts",
    )
    workers: Workers = Field(
        default=1,
        description="processes that measure, one per device; all: as many as there are devices",
    )


class FlopsOptions(Group):
    """``flops.*``: which estimator fills the seed's ``flops_*`` columns."""

    estimator: Annotated[Estimator, BY_PROTOCOL] = Field(
        default="analytic", description="which estimator fills the columns flops_*"
    )
    counted: bool = Field(
        default=True, description="count operations on the meta device too, once per shape"
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
    output_dir: str = Field(
        default="data/08_reporting/motivation", description="folder of all results"
    )
    protocol: Literal["exact", "seed"] = Field(
        default="exact", description="exact, or the seed study's way of measuring"
    )
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
        if why := unable_to_part(measurement["method"], self.model.engine):
            raise UserError(f"{name}: {why}; use measurement.method=timeline, or another engine")
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


def unable_to_part(method: str, engine: str) -> str | None:
    """Say why the seed's methods cannot take an engine's parts one by one; None where they can."""
    if method == "timeline" or engine not in CAPTURED:
        return None
    return (
        f"measurement.method={method} runs parts of the model by themselves, and model.engine="
        f"{engine} has encoder, projector and prefill captured as they follow one another"
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
        elif item["type"] == "model_type":
            group = _group(item["loc"], root)
            leaves = (one for one in _paths(group) if not any(_paths(_group(one, group))))
            inner = ".".join([path, *next(leaves)])
            found = f"found {item['input']!r}"
            lines.append(
                f"parameter '{path}': {found}; it is a group: set one of it, such as {inner}"
            )
        else:
            message = item["msg"].removeprefix("Value error, ")
            message = message[:1].lower() + message[1:]
            found = "" if isinstance(item["input"], dict) else f"found {item['input']!r}: "
            lines.append(f"parameter '{path}': {found}{message}")
    return lines


def _unknown(loc: tuple[int | str, ...], root: type[BaseModel]) -> str:
    """Refuse a name that is another experiment's parameter, or mistyped: with the nearest right one."""
    group = _group(loc[:-1], root)
    *parents, name = map(str, loc)
    path, names = ".".join([*parents, name]), list(group.model_fields)
    if parents[1:] == ["sampling"] and any(
        name in row.sampling.model_fields for row in EXPERIMENTS.values() if row.sampling
    ):
        return (
            f"parameter '{path}' has no effect; {parents[0]} listens to {', '.join(sorted(names))}"
        )
    if inside := next((one for one in _paths(group) if one[-1] == name), None):
        return f"unknown parameter '{path}'; did you mean '{'.'.join([*parents, *inside])}'?"
    if near := difflib.get_close_matches(name, names, n=1, cutoff=0.5):
        return f"unknown parameter '{path}'; did you mean '{'.'.join([*parents, near[0]])}'?"
    return f"unknown parameter '{path}'; known there: {', '.join(names)}"


def _group(loc: tuple[int | str, ...], root: type[BaseModel]) -> Any:
    """The group of parameters at this place."""
    group: Any = root
    for part in loc:
        group = group.model_fields[str(part)].annotation
    return group


def _paths(group: Any) -> Iterator[tuple[str, ...]]:
    """Names of all that a group holds, and its groups."""
    for name, field in getattr(group, "model_fields", {}).items():
        yield (name,)
        yield from ((name, *inner) for inner in _paths(field.annotation))
