"""The zoo: models by name, with hub id and whole architecture, from YAML."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from vlm_latency.errors import ModelError, blaming

if TYPE_CHECKING:
    from vlm_latency.options import ModelOptions

_FILE = Path(__file__).with_name("zoo.yml")
NULL = "null-model"  # the model that takes no time; see null.py


@dataclass(frozen=True)
class Family:
    """What the models of one ``model_type`` share; the fields are explained in ``zoo.yml``."""

    native: bool = False
    processor: str | None = None
    image_processor: str | None = None
    prompt: str | None = "{image}\n{prompt}"
    image: str | None = None
    tokens: Mapping[str, Any] = field(default_factory=dict)
    more: tuple[Any, ...] = ()
    components: Mapping[str, Any] = field(default_factory=dict)
    processor_settings: Mapping[str, Any] = field(default_factory=dict)
    image_settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Entry:
    """One model of the zoo; the fields are explained in ``zoo.yml``."""

    config: Mapping[str, Any]
    hub_id: str | None = None
    parameters: int | None = None
    source: str | None = None
    components: Mapping[str, Any] = field(default_factory=dict)
    processor_settings: Mapping[str, Any] = field(default_factory=dict)
    image_settings: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Zoo:
    """All families and models."""

    families: Mapping[str, Family]
    models: Mapping[str, Entry]

    def find(self, name: str) -> Entry:
        """Find the entry of this name.

        Raises
        ------
        ModelError
            With the nearest and all known names.
        """
        if name in self.models:
            return self.models[name]
        near = difflib.get_close_matches(name, self.models, n=1, cutoff=0.5)
        raise ModelError(
            f"no model is called {name!r}"
            + (f"; did you mean {near[0]!r}?" if near else ".")
            + f" Known: {', '.join(sorted(self.models))}. A hub id (owner/name) or a local folder "
            "with a config.json will do as well"
        )


def is_path(name: str) -> bool:
    """Say whether a model's name is a hub id or a local folder rather than a name of the zoo."""
    return "/" in name or "\\" in name or name in {".", ".."} or Path(name, "config.json").is_file()


def own_file(name: str | None) -> tuple[Path, str] | None:
    """Read file and function of a name like ``mine.py:make_model``; None for any other name."""
    path, _, function = (name or "").rpartition(":")
    return (Path(path).expanduser(), function) if path.endswith(".py") else None


def weights_kind(options: ModelOptions) -> str:
    """Say ``"pretrained"``, ``"random"`` (`auto` is random for names of the zoo) or ``"own"``."""
    if own_file(options.name):
        return "own"
    if options.weights != "auto":
        return options.weights
    return "pretrained" if is_path(options.name or "") else "random"


def load_zoo(zoo_file: str | None = None) -> Zoo:
    """Read the zoo, with the user's own file laid over it, name by name."""
    if zoo_file is None:
        return _built_in()
    path = Path(zoo_file)
    if not path.is_file():
        raise ModelError(f"model.zoo_file: there is no file {str(path)!r}")
    own = _read(path)
    ours = _built_in()
    return Zoo({**ours.families, **own.families}, {**ours.models, **own.models})


@cache
def _built_in() -> Zoo:
    return _read(_FILE)


def _read(path: Path) -> Zoo:
    with blaming(f"the zoo file {str(path)!r}", "a file of the form of models/zoo.yml", ModelError):
        content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        families = {
            name: Family(**{**values, "more": tuple(values.get("more", ()))})
            for name, values in content.pop("families", {}).items()
        }
        models = {name: Entry(**values) for name, values in content.pop("models", {}).items()}
        if content:
            raise ModelError(
                f"the zoo file {str(path)!r} has {', '.join(map(str, content))} at its top; expected "
                "`families` and `models`"
            )
        for name, part in (*families.items(), *models.items()):
            _check(name, part, path)
    return Zoo(families, models)


def _check(name: Any, part: Any, path: Path) -> None:
    """Refuse a field that is of another kind than the zoo's own."""
    for each in fields(part):
        value = getattr(part, each.name)
        if "Mapping" in str(each.type) and not isinstance(value, Mapping):
            raise ModelError(
                f"{name!r} in the zoo file {str(path)!r} has {each.name} {str(value)[:50]!r}; "
                "expected names and values"
            )
    if not isinstance(name, str) or (
        isinstance(part, Entry) and not isinstance(part.config.get("model_type"), str)
    ):
        raise ModelError(f"{name!r} in the zoo file {str(path)!r} has no config.model_type")
