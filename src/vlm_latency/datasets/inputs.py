"""What an experiment starts from: a model, questions, and results made before.

Each is opened when a node first asks for it, not when the pipeline starts: a command that has
nothing left to measure loads no model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import pandas as pd
from kedro.io import AbstractDataset

from vlm_latency.datasets.atomic import FileDataset
from vlm_latency.datasets.variants import Variants, read_variants
from vlm_latency.errors import DataError, blaming
from vlm_latency.experiments import EXPERIMENTS, LanguageSampling
from vlm_latency.models import ModelHandle
from vlm_latency.option_groups import CompareOptions, DatasetOptions
from vlm_latency.option_types import OUTPUT_RULES
from vlm_latency.options import ModelOptions
from vlm_latency.records import REQUEST_COLUMNS, typed
from vlm_latency.results import Run, read_earlier, read_json, read_run, result_path

if TYPE_CHECKING:
    from vlm_latency.vqa import QuestionSource


class ReadOnly(AbstractDataset[NoReturn, Any]):
    """What is only read: saving is refused, whatever the pipeline."""

    def save(self, data: NoReturn) -> NoReturn:
        raise NotImplementedError(f"{type(self).__name__} is only read")


class FromOptions(ReadOnly):
    """What a group of parameters describes.

    Parameters
    ----------
    options
        The group.
    metadata
        Passed through to Kedro plugins.
    """

    def __init__(self, *, options: dict[str, Any], metadata: dict[str, Any] | None = None):
        self._options = dict(options)
        self.metadata = metadata

    def _describe(self) -> dict[str, Any]:
        return self._options


class FromPath(FileDataset, ReadOnly):
    """What lies in one place on disk."""


class ModelDataset(FromOptions):
    """A vision-language model, by the ``model.*`` parameters."""

    def load(self) -> ModelHandle:
        return ModelHandle(ModelOptions.model_validate(self._options))


class VQADataset(FromOptions):
    """VQA v2 questions and their images, by the ``dataset.*`` parameters.

    Official files, a hub dataset, a folder, or synthetic.
    """

    def load(self) -> QuestionSource:
        from vlm_latency.vqa import open_source

        options = DatasetOptions.model_validate(self._options)
        if options.source is None:
            raise DataError("no dataset: set dataset.source (and dataset.path)")
        return open_source(**options.model_dump())


class EarlierResult(FromPath):
    """A result that another command made.

    Parameters
    ----------
    root
        The output folder, where the command would have put it.
    chosen
        Where the user says it is, if so.
    made_by
        The experiment that makes it.
    metadata
        Passed through to Kedro plugins.
    """

    def __init__(
        self,
        *,
        root: str,
        made_by: str,
        chosen: str | None = None,
        metadata: dict[str, Any] | None = None,
    ):
        super().__init__(filepath=chosen or str(result_path(root, made_by)), metadata=metadata)
        self._made_by = made_by

    def load(self) -> dict[str, Any]:
        if not self._path.exists():
            raise DataError(
                f"no result {self._path}; run 'kedro run --pipeline {self._made_by}' first, with the "
                "same output_dir, or say where it lies with exp5.vision_results and "
                "exp5.language_results"
            )
        return read_earlier(self._path, self._made_by)


class GivenRequests(ReadOnly):
    """The table of requests that the user gives in place of drawing; ``None`` where there is none.

    Parameters
    ----------
    experiment
        The experiment whose requests they must be.
    files
        The parquet file of each experiment (``sampling.requests``), if any.
    metadata
        Passed through to Kedro plugins.
    """

    def __init__(
        self,
        *,
        experiment: str,
        files: Mapping[str, str | None],
        metadata: dict[str, Any] | None = None,
    ):
        self._experiment, self._file = experiment, files.get(experiment)
        self.metadata = metadata

    def load(self) -> pd.DataFrame | None:
        if self._file is None:
            return None
        path = Path(self._file)
        if not path.is_file():
            raise DataError(f"{self._experiment}.sampling.requests: no file {path}")
        with blaming(path, "a parquet table"):
            table = pd.read_parquet(path)
        missing = [name for name in REQUEST_COLUMNS if name not in table]
        if missing:
            raise DataError(f"{path} is not a table of requests: no column {', '.join(missing)}")
        with blaming(path, "a table of requests"):
            table = typed(table, REQUEST_COLUMNS)
            self._check(table, path)
        return table

    def _check(self, table: pd.DataFrame, path: Path) -> None:
        found = sorted(table["experiment"].fillna("no experiment").unique())
        if found != [self._experiment]:
            raise DataError(
                f"{path} holds requests of {', '.join(found) or 'none'}; expected "
                f"{self._experiment}"
            )
        lengths = issubclass(EXPERIMENTS[self._experiment].sampling or object, LanguageSampling)
        rules = () if lengths else OUTPUT_RULES
        for rule in table["output_length"].fillna("nothing").unique():
            if not re.fullmatch("|".join((*rules, "≤?[1-9][0-9]*")), rule):
                raise DataError(
                    f"{path}: output_length {rule!r} is not a rule of {self._experiment}; expected "
                    f"{', '.join((*rules, 'a number'))}, or ≤ and a number"
                )

    def _describe(self) -> dict[str, Any]:
        return {"experiment": self._experiment, "file": self._file}


class OptionalJSON(FromPath):
    """A JSON file that need not be there: ``None`` then."""

    def load(self) -> Any:
        return read_json(self._path) if self._path.is_file() else None


class ResultsFolder(FromPath):
    """Whatever results lie below the output folder, for the page."""

    def load(self) -> dict[str, Any]:
        from vlm_latency.page import collect_results

        return collect_results(self._path)


class RunFolders(FromOptions):
    """The results folders to compare, or variants to measure, the baseline first.

    Parameters
    ----------
    options
        The ``compare.*`` parameters.
    model, dataset
        The command's own ``model.*`` and ``dataset.*``, for variants.
    metadata
        Passed through to Kedro plugins.
    """

    def __init__(
        self,
        *,
        options: dict[str, Any],
        model: dict[str, Any],
        dataset: dict[str, Any],
        metadata: dict[str, Any] | None = None,
    ):
        super().__init__(options=options, metadata=metadata)
        self._model, self._dataset = model, dataset

    def load(self) -> list[Run] | Variants:
        options = CompareOptions.model_validate(self._options)
        if options.variants:
            if options.runs or options.baseline or options.candidate:
                raise DataError(
                    "found compare.variants beside results folders; give compare.variants alone, "
                    "or compare.baseline and compare.candidate"
                )
            path = Path(options.variants).expanduser()
            models = read_variants(path, self._model)
            return Variants(models, VQADataset(options=self._dataset).load())
        pair = [options.baseline, options.candidate]
        folders = list(options.runs or [folder for folder in pair if folder])
        if len(folders) < 2:
            raise DataError(
                f"found {len(folders)} results folder(s) to compare; give compare.baseline=<folder>,"
                "compare.candidate=<folder>, or compare.runs='a b c'; or compare.variants=<file> to "
                "measure variants in turn"
            )
        return [read_run(folder) for folder in folders]
