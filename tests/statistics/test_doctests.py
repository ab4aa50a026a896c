"""The examples in the docstrings run and give what they say."""

import doctest
import importlib
import pkgutil

import pytest

import vlm_latency.statistics


@pytest.mark.parametrize(
    "module", [m.name for m in pkgutil.iter_modules(vlm_latency.statistics.__path__)]
)
def test_examples_run(module: str) -> None:
    found = importlib.import_module(f"vlm_latency.statistics.{module}")
    result = doctest.testmod(found)
    assert result.attempted > 0
    assert result.failed == 0
