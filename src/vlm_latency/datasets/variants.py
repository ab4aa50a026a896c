"""Variants of a model from a YAML file, to be measured in turn; and their runs on disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import yaml

from vlm_latency.datasets.atomic import AtomicParquet
from vlm_latency.errors import DataError, ModelError, UserError
from vlm_latency.models import ModelHandle
from vlm_latency.options import Options

if TYPE_CHECKING:
    from vlm_latency.vqa import QuestionSource

FORM = "names, each with what it changes, such as 'compiled: {model.engine: compiled}'"


@dataclass(frozen=True)
class Variants:
    """Models by name, the baseline first, and the questions that all of them are asked."""

    models: dict[str, ModelHandle]
    questions: QuestionSource


def read_variants(path: Path, model: Mapping[str, Any]) -> dict[str, ModelHandle]:
    """Read what each variant changes of the ``model.*`` parameters of the command.

    Parameters
    ----------
    path
        A YAML file: at least two names; each a mapping of parameters, empty for no change.
    model
        The command's own ``model.*``.

    Raises
    ------
    UserError
        Naming the file, the variant, what was found and what was expected.
    """
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"compare.variants: cannot read {path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise DataError(f"{path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(found, dict) or len(found) < 2:
        count = f"{len(found)} variant(s)" if isinstance(found, dict) else type(found).__name__
        raise DataError(f"{path} holds {count}; expected two or more {FORM}")
    return {str(name): _handle(path, str(name), said, model) for name, said in found.items()}


def _handle(path: Path, name: str, said: Any, model: Mapping[str, Any]) -> ModelHandle:
    if not isinstance(said, dict | None):
        raise DataError(f"{path}: {name} is {said!r}; expected {FORM}")
    changed: dict[str, Any] = {}
    for key, value in (said or {}).items():
        if key == "model" and isinstance(value, dict):
            changed |= value
        elif str(key).startswith("model."):
            changed[str(key).removeprefix("model.")] = value
        else:
            raise DataError(
                f"{path}: {name} changes '{key}'; variants differ in model.* only, such as "
                "model.name, model.engine, model.dtype, model.max_crops"
            )
    try:
        options = Options.from_parameters({"model": {**model, **changed}})
    except UserError as error:
        raise type(error)(f"{path}: {name}: {error}") from None
    if options.model.name is None:
        raise ModelError(f"{path}: {name} has no model.name; give it here or with --params")
    return ModelHandle(options.model)


class VariantRuns(AtomicParquet):
    """Every run of every variant; where none was measured, no file and an empty table."""

    def load(self) -> pd.DataFrame:
        return super().load() if Path(self._filepath).is_file() else pd.DataFrame()

    def save(self, data: pd.DataFrame) -> None:
        if data.empty:
            Path(self._filepath).unlink(missing_ok=True)
        else:
            super().save(data)
