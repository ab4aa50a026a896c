"""The project as Kedro runs it, without its command line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from kedro.framework.session import KedroSession
from kedro.framework.startup import bootstrap_project

PROJECT = Path(__file__).parents[2]


def pytest_itemcollected(item: pytest.Item) -> None:
    # Kedro's loader and ours speak to every omegaconf; its advice is not ours to follow.
    item.add_marker(pytest.mark.filterwarnings("ignore:register_new_resolver"))


def nested(parameters: dict[str, Any]) -> dict[str, Any]:
    """``{"exp1.sampling.num_samples": 4}`` as the command line makes a tree of it."""
    tree: dict[str, Any] = {}
    for path, value in parameters.items():
        *parents, name = path.split(".")
        branch = tree
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[name] = value
    return tree


@pytest.fixture(scope="session")
def kedro_run() -> Callable[..., dict[str, Any]]:
    """Run a pipeline: ``kedro_run("exp1", folder, {"model.name": "null"})``."""
    bootstrap_project(PROJECT)

    def run(
        pipeline: str,
        folder: Path,
        parameters: dict[str, Any] | None = None,
        env: str = "smoke",
        **options: Any,
    ) -> dict[str, Any]:
        given = nested({"output_dir": str(folder), **(parameters or {})})
        with KedroSession.create(project_path=PROJECT, env=env, runtime_params=given) as session:
            return session.run(pipeline_names=[pipeline], **options)

    return run
