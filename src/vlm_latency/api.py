"""The library without Kedro: measure a model object of one's own, or several against each other.

A *model* is a name of the zoo, a hub id or a folder; a `VLM` (`load_model`, or
`VLM.from_objects`, which takes a prompt builder); or a pair of any image-text-to-text model of
transformers and its processor, as it is, fine-tuned, pruned or changed in any other way.

*Requests* are a list of pairs (image, question), the image a PIL image or a path, or a table as
`vlm_latency.vqa` draws it.

>>> from PIL import Image
>>> from vlm_latency import measure
>>> photo = Image.effect_noise((640, 480), 64)
>>> records = measure("null-model", [(photo, "What is it?")], num_runs=3, output_length=4)
>>> records[["run_index", "num_vision_tokens", "num_output_tokens", "status"]].values.tolist()
[[0, 704, 4, 'ok'], [1, 704, 4, 'ok'], [2, 704, 4, 'ok']]

What a record knows of a changed model is measured where it can be: ``num_vision_tokens`` is the
prompt's, less what did not go into the language model in its first forward. Tokens that a model
drops between two layers of its language model have gone in, and count.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from vlm_latency.errors import DataError, UserError
from vlm_latency.instrument.protocol import interleave
from vlm_latency.instrument.session import Fetch
from vlm_latency.models import check_threads, load
from vlm_latency.options import MeasurementOptions, Options
from vlm_latency.records import REQUEST_COLUMNS, measured_table, typed, with_hashes
from vlm_latency.statistics import Estimate, TableComparison, compare_tables
from vlm_latency.statistics.comparison import COMPARED, paired_difference
from vlm_latency.vqa.images import image_bytes, image_size, read_file

if TYPE_CHECKING:
    from PIL import Image

    from vlm_latency.models.loading import VLM

    Model = str | VLM | tuple[Any, Any]
    Requests = pd.DataFrame | Sequence[tuple[Image.Image | Path | str, str]]

OUTPUT_LENGTH = "8"  # tokens, where neither the call nor the table of requests says

# One run of one request, by all models in turn: a pair of what is compared.
PAIR = ("request_id", "run_index")
_NEEDED = ("request_id", "question", "image_width", "image_height")


def load_model(name: str, **options: Any) -> VLM:
    """Load a model by name, ready to be measured.

    Parameters
    ----------
    name
        A name of the zoo, a hub id or a local folder.
    **options
        Any of ``model.*``: `weights`, `device`, `dtype`, `engine`, `num_threads`, …

    Returns
    -------
    VLM
        Its `model` is the transformers model, its ``preparer.processor`` the processor.

    Raises
    ------
    UserError
        For an unknown name or option, a device that is not there, a model that does not fit.
    """
    loaded: Any = load(Options.from_parameters({"model": {"name": name, **options}}).model)
    return loaded


def measure(
    model: Model,
    requests: Requests,
    *,
    num_runs: int = 20,
    output_length: int | str | None = None,
    prompt: str = "{question}",
    folder: Path | str | None = None,
    num_threads: int | None = None,
    progress: bool = False,
    **measurement: Any,
) -> pd.DataFrame:
    """Measure a model on some requests, one request (batch 1) at a time.

    Parameters
    ----------
    model
        Name, `VLM`, or pair (model, processor); the model is put into evaluation mode.
    requests
        List of (image, question), or a table with `vlm_latency.records.REQUEST_COLUMNS`.
    num_runs
        Runs of each request, after the warm-up, in random blocks.
    output_length
        Tokens to generate, exactly; or ``natural``, ``none`` (the first only), ``answer``. By
        default what the table says, and 8.
    prompt
        What the question is written into, before the model's own chat template.
    folder
        Where the table's ``image_path`` lies.
    num_threads
        CPU threads while measuring; by default those a `VLM` was loaded with, and 1.
    progress
        Whether to show runs done and time left on stderr.
    **measurement
        Any other of ``measurement.*``: `method`, `seed`, `max_new_tokens`, `warmup_runs`, …

    Returns
    -------
    DataFrame
        One row per run, in the order of measurement; columns of
        `vlm_latency.records.MEASURED_COLUMNS`, times in milliseconds. A run that failed has
        ``status`` ``failed`` and its ``error``.

    Raises
    ------
    MeasurementError
        When more than ``max_failures`` (1 %, rounded up) of the runs fail.
    UserError
        For an unknown option, requests that are none, or a model that cannot be measured.
    """
    vlm = _vlm(model, None, num_threads)
    options = _options(num_runs, output_length, measurement)
    table, fetch = _requests(requests, output_length, folder)
    name = vlm.options.name
    return _run({name: vlm}, table, options, fetch=fetch, prompt=prompt, progress=progress)[name]


def compare(
    models: Mapping[str, Model],
    requests: Requests,
    *,
    num_runs: int = 20,
    output_length: int | str | None = None,
    prompt: str = "{question}",
    folder: Path | str | None = None,
    num_threads: int | None = None,
    margin: float = 0.02,
    progress: bool = False,
    **measurement: Any,
) -> ModelComparison:
    """Measure models interleaved in one process, run by run, and compare them with the first.

    Every run of every request is made by all models, one right after the other in a random order
    (seeded), so that whatever else the machine does hits all of them alike. Instruments are on a
    model only while it runs: models may share modules, or be the same object.

    Parameters
    ----------
    models
        By a name for tables; the first one is the baseline.
    margin
        A difference up to this share does not matter: see `vlm_latency.statistics.compare_paired`.
    requests, num_runs, output_length, prompt, folder, num_threads, progress, **measurement
        As in `measure`; fewer than 20 runs in all give intervals that are too short.

    Returns
    -------
    ModelComparison

    Raises
    ------
    MeasurementError, UserError
        As `measure`.

    Examples
    --------
    >>> from PIL import Image
    >>> photo = Image.effect_noise((640, 480), 64)
    >>> found = compare({"one": "null-model", "two": "null-model"}, [(photo, "What is it?")], num_runs=3)
    >>> found.comparisons["two"].n_matched
    3
    """
    if len(models) < 2:
        raise UserError(f"found {len(models)} models to compare; expected at least two, by name")
    vlms = {name: _vlm(model, name, num_threads) for name, model in models.items()}
    options = _options(num_runs, output_length, measurement)
    table, fetch = _requests(requests, output_length, folder)
    records = _run(vlms, table, options, fetch=fetch, prompt=prompt, progress=progress)
    return ModelComparison.of(records, margin)


@dataclass(frozen=True)
class ModelComparison:
    """What `compare` found; ``str()`` of it is the table in words.

    Attributes
    ----------
    baseline
        The name of the first model.
    records
        By model: its runs, as `measure` returns them; ``order_index`` counts over all models.
    comparisons
        By candidate: verdict and, by component, ratio candidate / baseline of the paired runs.
        They are about the requests that were measured, not about others like them.
    differences
        By candidate and component: candidate − baseline over the paired runs, in milliseconds,
        on the side on which the ratio is; see `vlm_latency.statistics.comparison.paired_difference`.
    """

    baseline: str
    records: dict[str, pd.DataFrame] = field(repr=False)
    comparisons: dict[str, TableComparison]
    differences: dict[str, dict[str, Estimate]]

    @classmethod
    def of(cls, records: dict[str, pd.DataFrame], margin: float = 0.02) -> ModelComparison:
        """Compare tables of runs that were made in turn, the baseline's first."""
        baseline, *candidates = records
        before = records[baseline]
        return cls(
            baseline,
            records,
            {
                # without image_id: the pairs are runs, and what is said is about these requests
                name: compare_tables(
                    before.drop(columns="image_id"), records[name], margin=margin, match_by=PAIR
                )
                for name in candidates
            },
            {name: _differences(before, records[name]) for name in candidates},
        )

    def table(self) -> pd.DataFrame:
        """List verdict, ratio and difference with their ends, a row per candidate and component."""
        return pd.DataFrame(
            {
                "model": name,
                "component": component,
                "verdict": each.verdict,
                "ratio": each.ratio.value,
                "ratio_low": each.ratio.low,
                "ratio_high": each.ratio.high,
                "difference_ms": self.differences[name][component].value,
                "difference_ms_low": self.differences[name][component].low,
                "difference_ms_high": self.differences[name][component].high,
                "n_pairs": each.n_pairs,
            }
            for name, comparison in self.comparisons.items()
            for component, each in comparison.components.items()
        )

    def __str__(self) -> str:
        lines = []
        for name, comparison in self.comparisons.items():
            lines.append(
                f"{name} against {self.baseline}: {comparison.verdict} "
                f"({comparison.n_matched} pairs of runs; vision tokens: {self._tokens(name)}, "
                f"were {self._tokens(self.baseline)})"
            )
            for component, each in comparison.components.items():
                difference = self.differences[name][component]
                lines.append(
                    f"  {component:18} {each.verdict:9} × {each.ratio:.3f}, {difference:.2f} ms"
                )
        return "\n".join(lines)

    def _tokens(self, name: str) -> str:
        tokens = self.records[name]["num_vision_tokens"].dropna()
        low, high = tokens.min(), tokens.max()
        return f"{low}" if low == high else f"{low} to {high}"


def _vlm(model: Model, name: str | None, num_threads: int | None) -> Any:
    vlm: Any = model
    if isinstance(model, str):
        vlm = load_model(model)
    elif isinstance(model, tuple) and len(model) == 2:
        from vlm_latency.models.loading import VLM

        vlm = VLM.from_objects(*model, name=name)
    elif not (hasattr(model, "prepare") and hasattr(model, "architecture")):
        raise UserError(
            f"found {type(model).__name__} in place of a model; expected a name, a VLM, or the "
            "pair (model, processor)"
        )
    if num_threads is not None:
        vlm = copy.copy(vlm)  # the caller's keeps its own
        asked = {**vlm.options.model_dump(), "num_threads": num_threads}
        vlm.options = Options.from_parameters({"model": asked}).model
    return vlm


def _options(
    num_runs: int, output_length: int | str | None, measurement: dict[str, Any]
) -> MeasurementOptions:
    group = {**measurement, "num_runs": num_runs, "output_length": output_length}
    return Options.from_parameters({"measurement": group}).experiment("measure").measurement


def _requests(
    requests: Requests, output_length: int | str | None, folder: Path | str | None
) -> tuple[pd.DataFrame, Fetch]:
    """The table of requests, and where their images come from."""
    if isinstance(requests, pd.DataFrame):
        if absent := [name for name in _NEEDED if name not in requests]:
            raise DataError(f"the table of requests has no column {', '.join(absent)}")
        table = typed(requests, REQUEST_COLUMNS)
        images: dict[str, bytes] = {}
    else:
        table, images = _listed(requests)
    if table.empty:
        raise DataError("no requests; expected a list of (image, question) or a table of them")
    lengths = (
        table["output_length"].fillna(OUTPUT_LENGTH)
        if output_length is None
        else str(output_length)
    )
    table = with_hashes(table.assign(output_length=lengths))

    def fetch(row: Mapping[str, Any]) -> bytes:
        if row["request_id"] in images:
            return images[row["request_id"]]
        if isinstance(requests, pd.DataFrame):
            return image_bytes(row, folder)
        path = Path(row["image_path"])
        return read_file(path.parent, path.name)

    return table, fetch


def _listed(requests: Sequence[Any]) -> tuple[pd.DataFrame, dict[str, bytes]]:
    """Requests from pairs; images that are no files are encoded, without loss, once."""
    rows: list[dict[str, Any]] = []
    images: dict[str, bytes] = {}
    for index, pair in enumerate(requests):
        try:
            image, question = pair
        except (TypeError, ValueError):
            raise DataError(f"request {index} is not a pair (image, question)") from None
        row: dict[str, Any] = {"request_id": f"request-{index}", "question": str(question)}
        if isinstance(image, str | Path):
            row["image_path"] = str(image)
            size = image_size(Path(image))
        elif hasattr(image, "convert"):
            buffer = io.BytesIO()
            image.convert("RGB").save(buffer, "PNG")
            images[row["request_id"]] = buffer.getvalue()
            size = image.size
        else:
            raise DataError(
                f"the image of request {index} is a {type(image).__name__}; expected a PIL image "
                "or the path of a file"
            )
        row["image_width"], row["image_height"] = size
        rows.append(row)
    return typed(pd.DataFrame(rows), REQUEST_COLUMNS), images


def _run(
    vlms: Mapping[str, Any],
    requests: pd.DataFrame,
    options: MeasurementOptions,
    *,
    fetch: Fetch,
    prompt: str,
    progress: bool,
) -> dict[str, pd.DataFrame]:
    """The records of each model."""
    template = Options.from_parameters({"prompt": {"template": prompt}}).prompt.template
    check_threads(vlms.values())
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in vlms}
    for made in interleave(
        vlms, requests, options, fetch=fetch, template=template, progress=progress
    ):
        for row in made:
            rows[row["model"]].append(row)
    return {name: measured_table(own) for name, own in rows.items()}


def _differences(before: pd.DataFrame, after: pd.DataFrame) -> dict[str, Estimate]:
    """Give the paired differences of what both measured."""
    pairs = before.merge(after, on=list(PAIR), suffixes=("_before", "_after"))
    found = {}
    for name in COMPARED:
        pair = pairs[[f"{name}_before", f"{name}_after"]].astype(float).dropna()
        if len(pair):
            found[name] = paired_difference(pair.iloc[:, 0], pair.iloc[:, 1])
    return found
