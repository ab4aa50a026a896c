"""The registry reads like the table of experiments, and every part of it is wired up."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
from itertools import groupby
from pathlib import Path

import pytest
from kedro.framework.session import KedroSession
from kedro.framework.startup import bootstrap_project
from kedro.io import MemoryDataset
from kedro.pipeline import Pipeline

from vlm_latency.experiments import studies
from vlm_latency.hooks import _take_turns

PROJECT = Path(__file__).parents[2]
PIPELINES = PROJECT / "src" / "vlm_latency" / "pipelines"
REGISTERED = {
    *("exp1", "exp2", "exp3", "exp4", "exp5", "phase1", "phase2", "all", "__default__"),
    *("exp6", "phase3"),
    *("calibration", "explain", "predict", "compare"),
}


@pytest.fixture(scope="module")
def registry() -> dict:
    bootstrap_project(PROJECT)
    from vlm_latency.pipeline_registry import register_pipelines

    return register_pipelines()


@pytest.fixture(scope="module")
def catalog(registry: dict, tmp_path_factory: pytest.TempPathFactory):
    given = {"output_dir": str(tmp_path_factory.mktemp("out"))}
    with KedroSession.create(project_path=PROJECT, env="smoke", runtime_params=given) as session:
        yield session.load_context().catalog


def test_all_experiments_are_registered_and_all_is_the_default(registry: dict) -> None:
    assert set(registry) == REGISTERED
    assert registry["all"].nodes == registry["__default__"].nodes


@pytest.mark.parametrize("name", sorted(REGISTERED))
def test_what_a_pipeline_reads_is_in_the_catalog(name: str, registry: dict, catalog) -> None:
    for dataset in registry[name].inputs():
        assert dataset.startswith(("parameters", "params:")) or dataset in catalog


@pytest.mark.parametrize("name", sorted(REGISTERED))
def test_what_a_pipeline_leaves_behind_is_a_file(name: str, registry: dict, catalog) -> None:
    for dataset in registry[name].outputs() - {"passed"}:  # the gate leaves its verdict
        assert dataset in catalog, dataset
        assert not isinstance(catalog.get(dataset), MemoryDataset), dataset


def test_kedro_viz_finds_layers_and_what_each_node_does(registry: dict, catalog) -> None:
    layers = {
        name: catalog.get(name).metadata["kedro-viz"]["layer"]
        for name in ("model", "questions", "exp1.requests", "exp1.records", "exp1.result", "page")
    }
    assert list(dict.fromkeys(layers.values())) == [
        "raw",
        "primary",
        "model_output",
        "reporting",
    ]
    for name in REGISTERED:
        for node in registry[name].nodes:
            assert inspect.isfunction(node.func) and node.func.__doc__, node.name  # its source


def test_only_results_that_are_read_join_experiments(registry: dict) -> None:
    whole = registry["all"]
    made = {output: node.namespace for node in whole.nodes for output in node.outputs}
    joined = {
        (made[name].split(".")[0], node.namespace.split(".")[0])
        for node in whole.nodes
        for name in node.inputs
        if node.namespace and made.get(name)
    }
    assert {pair for pair in joined if pair[0] != pair[1]} == {("exp3", "exp5"), ("exp4", "exp5")}


@pytest.mark.parametrize("name", [*sorted(REGISTERED), "predict,exp3,phase1"])
def test_studies_run_one_after_the_other(name: str, registry: dict) -> None:
    pipeline = Pipeline(registry[name])
    _take_turns(pipeline)
    assert sorted(pipeline.nodes) == sorted(registry[name].nodes)
    place = {node: n for n, node in enumerate(pipeline.nodes)}
    for node, needed in pipeline.node_dependencies.items():
        assert all(place[other] < place[node] for other in needed)
    spaces = [node.namespace.split(".")[0] for node in pipeline.nodes if node.namespace]
    turns = [name for name, _ in groupby(spaces)]
    assert turns == [study for study in studies() if study in spaces]


@pytest.mark.parametrize(
    ("phase", "results"), [("phase1", {"exp1", "exp2"}), ("phase2", {"exp3", "exp4", "exp5"})]
)
def test_a_phase_makes_the_results_of_its_experiments(
    phase: str, results: set[str], registry: dict
) -> None:
    made = {name for name in registry[phase].all_outputs() if name.endswith(".result")}
    assert made == {f"{name}.result" for name in results}


def test_earlier_results_are_those_of_the_same_command_where_it_makes_them(registry: dict) -> None:
    assert {"exp5.vision", "exp5.language"} <= registry["exp5"].inputs()
    for name in ("phase2", "all"):
        assert not {"exp5.vision", "exp5.language"} & registry[name].inputs()
        assert {"exp3.result", "exp4.result"} <= registry[name].all_outputs()


def test_names_with_commas_are_one_pipeline(registry: dict) -> None:
    assert "exp1,nothing" not in registry
    with pytest.raises(KeyError):
        registry["exp1,nothing"]
    together = registry["predict,phase2"]
    made = {name for name in together.all_outputs() if name.endswith(".result")}
    assert made == {"exp3.result", "exp4.result", "exp5.result", "predict.result"}
    assert not {"exp5.vision", "exp5.language"} & together.inputs()
    assert [node.name for node in together.nodes].count("publish") == 1


def test_each_experiment_is_a_box_of_its_stages(registry: dict) -> None:
    stages = {"options", "data_sampling", "measurement", "flops_estimation", "reporting"}
    for name in ("exp1", "exp2", "exp3", "exp4"):
        spaces = {node.namespace for node in registry[name].nodes if node.namespace}
        assert {f"{name}.{stage}" for stage in stages} <= spaces


def test_listing_pipelines_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys; from vlm_latency.pipeline_registry import register_pipelines\n"
        "dict(register_pipelines())\n"
        "heavy = {'torch', 'transformers', 'datasets', 'scipy', 'matplotlib'} & set(sys.modules)\n"
        "print(*sorted(heavy))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


def test_wiring_stays_wiring() -> None:
    wirings = sorted(PIPELINES.rglob("pipeline.py"))
    assert len(wirings) >= 4
    for path in wirings:
        assert len(path.read_text().splitlines()) <= 60, path
        assert "import torch" not in path.read_text()
    for path in PIPELINES.rglob("nodes.py"):
        assert not re.search(r"^\s*(from|import) kedro", path.read_text(), re.M), path
