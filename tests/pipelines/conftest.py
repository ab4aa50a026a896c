"""The project as Kedro runs it, without its command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from kedro.framework.session import KedroSession
from kedro.framework.startup import bootstrap_project

from vlm_latency.vqa.images import image_bytes, noise_recipe

PROJECT = Path(__file__).parents[2]
collect_ignore = ["made_up_experiment"]  # importing it adds an experiment


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
    """Run a pipeline: ``kedro_run("exp1", folder, {"model.name": "null-model"})``."""
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


class Dataset:
    """One question about each of twelve small photos, in VQA v2's own layout."""

    def __init__(self, root: Path, count: int = 12):
        self.root, self.count = root, count
        (root / "val2014").mkdir(parents=True)
        for n in range(1, self.count + 1):
            self.write_image(n)
        self.ask("What is it?")

    def __len__(self) -> int:
        return self.count

    def image(self, n: int) -> Path:
        return self.root / "val2014" / f"COCO_val2014_{n:012d}.jpg"

    def write_image(self, n: int) -> None:
        data = image_bytes({"image_recipe": noise_recipe(n, 48, 40)}, None)
        self.image(n).write_bytes(data)

    def ask(self, question: str) -> None:
        questions = [
            {"image_id": n, "question_id": n, "question": question}
            for n in range(1, self.count + 1)
        ]
        path = self.root / "v2_OpenEnded_mscoco_val2014_questions.json"
        path.write_text(json.dumps({"questions": questions}))

    def break_image(self, n: int, how: str) -> None:
        data = self.image(n).read_bytes()
        if how == "missing":
            self.image(n).unlink()
        elif how == "corrupt":
            self.image(n).write_bytes(b"\xff\xd8 no photo")
        else:
            self.image(n).write_bytes(data[: len(data) // 2])


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return Dataset(tmp_path / "vqa")
