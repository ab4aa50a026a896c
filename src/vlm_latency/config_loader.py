"""Kedro's configuration loader and catalog: what users write is text, whatever marks it holds.

``${…}`` in parameters given on the command line, and braces in parameters that the catalog refers
to, mean nothing to OmegaConf and to Kedro's patterns of datasets.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from kedro.config import OmegaConfigLoader
from kedro.io import CatalogConfigResolver, DataCatalog
from omegaconf import OmegaConf

from vlm_latency.errors import UserError
from vlm_latency.experiments import measured
from vlm_latency.options import Options

# Stand for the marks of a parameter while they would mean something to others.
_STAND_INS = ("\ue000", "\ue001", "\ue002")
_HIDDEN = str.maketrans(dict(zip("{}$", _STAND_INS, strict=True)))
_SHOWN = str.maketrans(dict(zip(_STAND_INS, "{}$", strict=True)))


class Catalog(DataCatalog):
    """Kedro's catalog, with the marks of parameters back in place once a pattern is filled in."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        resolver: Any = self.config_resolver
        resolve = resolver.resolve_pattern
        resolver.resolve_pattern = lambda ds_name: shown(resolve(ds_name))


class ConfigLoader(OmegaConfigLoader):
    """Lend the parameters, checked and complete, to the catalog.

    ``${params:model}`` is one of them, ``${experiments:sampling.requests}`` those of all experiments
    that measure, by name.
    """

    def __init__(
        self,
        conf_source: str | Path,
        env: str | None = None,
        runtime_params: dict[str, Any] | None = None,
        **kwargs: Any,
    ):
        super().__init__(conf_source, env, without_references(runtime_params or {}), **kwargs)
        OmegaConf.register_new_resolver("params", self._parameter, replace=True)
        OmegaConf.register_new_resolver("experiments", self._by_experiment, replace=True)

    def __getitem__(self, key: str) -> dict[str, Any]:
        try:
            found: dict[str, Any] = super().__getitem__(key)
        except TypeError as error:  # of OmegaConf, where a list meets a group
            raise UserError(
                "a parameter is given as a group of parameters and elsewhere as a list, such as "
                f"exp6.keep.a=1 for exp6.keep='0.5 0.25' ({error}); kedro options lists them all"
            ) from None
        if key == "parameters":
            return dict(shown(found))
        if key != "catalog":
            return found
        return {
            name: config if CatalogConfigResolver.is_pattern(name) else shown(config)
            for name, config in found.items()
        }

    @cached_property
    def options(self) -> Options:
        """All parameters, validated once."""
        return Options.from_parameters(self["parameters"])

    @cached_property
    def _parameters(self) -> dict[str, Any]:
        values = self.options.model_dump()
        values["output_dir"] = str(self.options.folder)
        return values

    def _parameter(self, path: str) -> Any:
        value: Any = self._parameters
        for name in path.split("."):
            value = value[name]
        # A tuple is not a YAML value; Kedro expects plain ones.
        value = list(value) if isinstance(value, tuple) else value
        return _each_text(value, lambda text: text.translate(_HIDDEN))

    def _by_experiment(self, path: str) -> dict[str, Any]:
        return {name: self._parameter(f"{name}.{path}") for name in measured()}


def without_references(tree: Any) -> Any:
    """Put stand-ins for the dollars of ``${`` into every text of a tree."""
    return _each_text(tree, lambda text: text.replace("${", _STAND_INS[2] + "{"))


def shown(tree: Any) -> Any:
    """Put the marks back in place of their stand-ins."""
    return _each_text(tree, lambda text: text.translate(_SHOWN))


def _each_text(tree: Any, change: Callable[[str], str]) -> Any:
    """Change every text of a tree of dicts and lists, keys excepted."""
    if isinstance(tree, str):
        return change(tree)
    if isinstance(tree, dict):
        return {key: _each_text(value, change) for key, value in tree.items()}
    return [_each_text(value, change) for value in tree] if isinstance(tree, list) else tree
