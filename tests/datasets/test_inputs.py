"""What an experiment starts from is opened when it is first needed, and only read."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from kedro.io import DatasetError

from vlm_latency.datasets import (
    EarlierResult,
    ModelDataset,
    OptionalJSON,
    ResultsFolder,
    RunFolders,
    VQADataset,
)
from vlm_latency.errors import DataError

RESULT = {"results": [{"T_total": 1.0}]}

NOTHING: Any = {"model": {}, "dataset": {}}


@pytest.mark.parametrize(
    "dataset",
    [
        ModelDataset(options={"name": "null-model"}),
        VQADataset(options={"source": "synthetic"}),
        EarlierResult(root="a", made_by="exp3"),
        OptionalJSON(filepath="a.json"),
        ResultsFolder(filepath="a"),
        RunFolders(options={}, **NOTHING),
    ],
)
def test_inputs_are_only_read(dataset: Any) -> None:
    with pytest.raises(DatasetError, match=r"only read|dataset of its own"):
        dataset.save(RESULT)


def test_a_model_is_described_without_being_loaded() -> None:
    code = (
        "import sys\n"
        "from vlm_latency.datasets import ModelDataset\n"
        "model = ModelDataset(options={'name': 'tiny-molmo'}).load()\n"
        "print(model.options.name, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["tiny-molmo", "False"]


def test_the_null_model_needs_no_torch() -> None:
    code = (
        "import sys\n"
        "from vlm_latency.datasets import ModelDataset\n"
        "model = ModelDataset(options={'name': 'null-model'}).load()\n"
        "model.check_fits()\n"
        "print(model.device, model.dtype, model.weights, model.vlm.device, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["cpu", "float32", "random", "cpu", "False"]


def test_questions_need_a_source() -> None:
    with pytest.raises(DatasetError) as error:
        VQADataset(options={"source": None}).load()
    assert isinstance(error.value.__cause__, DataError)
    assert "set dataset.source" in str(error.value)


def test_an_earlier_result_lies_where_the_user_says(tmp_path: Path) -> None:
    chosen = tmp_path / "chosen.json"
    chosen.write_text(json.dumps(RESULT))
    dataset = EarlierResult(root=str(tmp_path), chosen=str(chosen), made_by="exp3")
    assert dataset.exists()
    assert dataset.load() == RESULT
    missing = EarlierResult(root=str(tmp_path), made_by="exp3")
    assert not missing.exists()
    with pytest.raises(DatasetError, match="run 'kedro run --pipeline exp3' first"):
        missing.load()


def test_a_file_that_need_not_be_there(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    assert OptionalJSON(filepath=str(path)).load() is None
    path.write_text("[1]")
    assert OptionalJSON(filepath=str(path)).load() == [1]


def test_two_folders_at_least_are_compared(tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match=r"found 1 results folder"):
        RunFolders(options={"baseline": str(tmp_path)}, **NOTHING).load()
    with pytest.raises(DatasetError, match=r"no results in .*expected files like exp1/"):
        RunFolders(options={"runs": f"{tmp_path} {tmp_path}"}, **NOTHING).load()
