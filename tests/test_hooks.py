"""The hooks by themselves: what is refused, what is said, and where the results go."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from kedro.io import DataCatalog, MemoryDataset
from kedro.pipeline import Pipeline, node
from kedro.runner import SequentialRunner, ThreadRunner

from vlm_latency import hooks
from vlm_latency.config_loader import ConfigLoader
from vlm_latency.errors import MeasurementError, UserError
from vlm_latency.locks import lock_folder


def identity(value: Any) -> Any:
    return value


MEASURING = Pipeline(
    [node(identity, "a", "b", name="measure", tags="owns_device", namespace="exp1.measurement")]
)
REPORTING = Pipeline([node(identity, "a", "page", name="publish")])


@pytest.fixture
def hook(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> hooks.ProjectHooks:
    """Hooks of a project in ``tmp_path``, whose other checks all pass."""
    monkeypatch.setattr(hooks, "check", lambda *_, **asked: [f"will: {asked['experiments']}"])
    made = hooks.ProjectHooks()
    made.after_context_created(context(tmp_path, output_dir="results"))
    return made


def context(project: Path, **parameters: Any) -> Any:
    loader = ConfigLoader(
        str(Path(__file__).parents[1] / "conf"),
        base_env="base",
        default_run_env="smoke",
        runtime_params=parameters,
        merge_strategy={"parameters": "soft"},
    )
    return SimpleNamespace(config_loader=loader, project_path=project)


def before(hook: hooks.ProjectHooks, pipeline: Pipeline, **run_params: Any) -> None:
    asked = {"runner": "None", "only_missing_outputs": False, **run_params}
    hook.before_pipeline_run(
        run_params=asked, pipeline=pipeline, catalog=DataCatalog({"a": MemoryDataset(1)})
    )


def test_parameters_are_validated_with_the_context(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="did you mean 'output_dir'"):
        hooks.ProjectHooks().after_context_created(context(tmp_path, output_dri="x"))


@pytest.mark.parametrize("runner", [None, "SequentialRunner", SequentialRunner()])
def test_one_run_after_the_other_is_allowed(
    runner: Any, hook: hooks.ProjectHooks, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", "vlm_latency"):
        before(hook, MEASURING, runner=getattr(runner, "__name__", str(runner)))
    assert "will: ['exp1']" in caplog.text
    hook.before_node_run(is_async=False)


@pytest.mark.parametrize("runner", ["ThreadRunner", "kedro.runner.ParallelRunner", ThreadRunner()])
def test_other_runners_are_refused_where_something_is_measured(
    runner: Any, hook: hooks.ProjectHooks
) -> None:
    with pytest.raises(MeasurementError, match=r"found runner \w+Runner; a measurement must"):
        before(hook, MEASURING, runner=str(runner))
    before(hook, REPORTING, runner=str(runner))


def test_nothing_overlaps_where_something_is_measured(hook: hooks.ProjectHooks) -> None:
    before(hook, MEASURING)
    with pytest.raises(MeasurementError, match="is_async"):
        hook.before_node_run(is_async=True)
    before(hook, REPORTING)
    hook.before_node_run(is_async=True)


def test_outputs_that_exist_are_no_reason_to_skip_a_measurement(hook: hooks.ProjectHooks) -> None:
    with pytest.raises(MeasurementError, match="a file that exists need not be complete"):
        before(hook, MEASURING, only_missing_outputs=True)
    before(hook, REPORTING, only_missing_outputs=True)


@pytest.mark.parametrize(("pipeline", "page"), [(MEASURING, False), (REPORTING, True)])
def test_the_closing_line_says_where_the_results_are(
    pipeline: Pipeline,
    page: bool,
    hook: hooks.ProjectHooks,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level("INFO", "vlm_latency"):
        hook.after_pipeline_run(pipeline=pipeline, catalog=DataCatalog())
    (line,) = caplog.messages
    assert line.startswith(f"Results are in {tmp_path / 'results'}")
    assert ("index.html" in line) is page


def test_a_part_of_a_pipeline_that_lacks_what_nothing_keeps_is_refused(
    hook: hooks.ProjectHooks,
) -> None:
    report = Pipeline([node(identity, "coverage", "result", name="report")], namespace="exp1")
    with pytest.raises(UserError, match=r"needs exp1.coverage, .* 'kedro run --pipelines exp1'"):
        before(hook, report)


def test_a_second_command_is_refused_before_anything_is_written(
    hook: hooks.ProjectHooks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hooks, "check", lambda *_, **__: [])
    writing = Pipeline([node(identity, "a", "requests", name="draw")], namespace="exp1", inputs="a")
    second = hooks.ProjectHooks()
    second.after_context_created(context(tmp_path, output_dir="results"))
    before(hook, writing)
    with pytest.raises(MeasurementError, match=r"exp1 is in use by process \d+ on "):
        before(second, writing)
    before(
        second,
        Pipeline([node(identity, "a", "requests", name="draw")], namespace="exp2", inputs="a"),
    )
    hook.on_pipeline_error()
    before(second, writing)
    second.on_pipeline_error()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_lock_dies_with_its_holder(tmp_path: Path) -> None:
    ready, told = os.pipe()
    if not (child := os.fork()):
        held = lock_folder(tmp_path)
        os.write(told, b"x")
        signal.pause()
        held.close()
    os.read(ready, 1)
    with pytest.raises(MeasurementError, match=f"process {child} "):
        lock_folder(tmp_path)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    lock_folder(tmp_path).close()
