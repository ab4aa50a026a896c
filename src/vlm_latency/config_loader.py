"""Kedro's configuration loader, whose catalog may refer to parameters."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from kedro.config import OmegaConfigLoader
from omegaconf import OmegaConf

from vlm_latency.experiments import measured
from vlm_latency.options import Options


class ConfigLoader(OmegaConfigLoader):
    """Lend the parameters, checked and complete, to the catalog.

    ``${params:model}`` is one of them, ``${experiments:sampling.requests}`` those of all experiments
    that measure, by name.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        OmegaConf.register_new_resolver("params", self._parameter, replace=True)
        OmegaConf.register_new_resolver("experiments", self._by_experiment, replace=True)

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
        return list(value) if isinstance(value, tuple) else value

    def _by_experiment(self, path: str) -> dict[str, Any]:
        return {name: self._parameter(f"{name}.{path}") for name in measured()}
