"""Kedro hooks: everything that can be refused is refused before anything is loaded or measured."""

from __future__ import annotations

import logging
import re
import sys
from contextlib import ExitStack
from typing import Any

from kedro.framework.hooks import hook_impl
from kedro.io import DataCatalog, MemoryDataset
from kedro.pipeline import Pipeline
from kedro.pipeline.node import Node

from vlm_latency.errors import MeasurementError, UserError
from vlm_latency.experiments import EXPERIMENTS, studies
from vlm_latency.locks import lock_folder
from vlm_latency.option_types import Shard
from vlm_latency.preflight import check, refuse_contradictions
from vlm_latency.results import read_json, result_path

log = logging.getLogger(__name__)


class ProjectHooks:
    """Validate parameters, check before a run, tell where the results are."""

    def __init__(self) -> None:
        self._held = ExitStack()  # of the folders that this process holds

    @hook_impl
    def after_context_created(self, context: Any) -> None:
        """Validate every parameter at once."""
        self._options = context.config_loader.options
        self._root = context.project_path / self._options.folder

    @hook_impl
    def after_catalog_created(self, catalog: DataCatalog) -> None:
        """Hand the validated parameters to the nodes."""
        catalog["settings"] = MemoryDataset(self._options, copy_mode="assign")
        if self._options.measurement.shard:  # which is nothing but journals, and waits for nobody
            for name in EXPERIMENTS:
                catalog[f"{name}.requests"] = MemoryDataset(copy_mode="assign")

    @hook_impl
    def before_pipeline_run(
        self, run_params: dict[str, Any], pipeline: Pipeline, catalog: DataCatalog
    ) -> None:
        """Refuse what cannot work, in one sentence each; say in a line what will be done."""
        measured = sorted(
            node.namespace.split(".")[0]
            for node in pipeline.nodes
            if node.namespace and node.short_name == "measure"
        )
        self._measuring = any(
            "owns_device" in node.tags
            and (node.short_name != "measure_variants" or self._options.compare.variants)
            for node in pipeline.nodes
        )
        runner = re.search(r"\w*Runner\b", run_params["runner"])  # None: Kedro's default
        if self._measuring and runner and runner[0] != "SequentialRunner":
            raise MeasurementError(
                f"found runner {runner[0]}; a measurement must have its device to itself: use the "
                "SequentialRunner (Kedro's default)"
            )
        if self._measuring and run_params["only_missing_outputs"]:
            raise MeasurementError(
                "found --only-missing-outputs; a file that exists need not be complete: leave it "
                "out, the same command measures only what is missing"
            )
        if shard := self._options.measurement.shard:
            _only_measure(pipeline, measured, shard)
        _take_turns(pipeline)
        refuse_contradictions(self._options, pipeline.all_outputs())
        inputs = pipeline.inputs()
        if unmade := sorted(name for name in inputs if name not in catalog):
            studied = list(dict.fromkeys(name.partition(".")[0] for name in unmade))
            raise UserError(
                f"this part of the pipeline needs {', '.join(unmade)}, which other nodes make and "
                f"nothing keeps; run 'kedro run --pipelines {','.join(studied)}': what was "
                "measured is not measured again"
            )
        for line in check(
            self._options,
            self._root,
            experiments=measured,
            runs_model=self._measuring,
            model=catalog["model"] if "model" in inputs else None,
            questions=catalog["questions"] if "questions" in inputs else None,
            earlier={
                name: catalog[name]
                for row in EXPERIMENTS.values()
                for dataset in row.earlier
                if (name := f"{row.name}.{dataset}") in inputs
            },
            given={
                name: catalog[table]
                for name in measured
                if (table := f"{name}.given_requests") in catalog
            },
            explains="explain.result" in pipeline.all_outputs(),
            compared=catalog["compare.runs"] if "compare.runs" in inputs else None,
        ):
            log.info(line)
        self._lock(pipeline)
        for name, row in EXPERIMENTS.items():
            if row.earlier and f"{name}.result" in pipeline.all_outputs():
                makers = " and ".join(row.earlier.values())
                log.info("%s: %s against latency, from the results of %s", name, row.title, makers)

    def _lock(self, pipeline: Pipeline) -> None:
        """Hold the folders that will be written, before anything is drawn or written."""
        self._held.close()  # an interrupted run in this process may have left some
        with ExitStack() as held:
            for name in sorted({output.partition(".")[0] for output in pipeline.all_outputs()}):
                if name in studies():
                    held.enter_context(lock_folder(self._root / name))
            self._held = held.pop_all()

    @hook_impl
    def before_node_run(self, is_async: bool) -> None:
        """Refuse what overlaps; Kedro tells the hooks before the first node, no earlier."""
        if is_async and self._measuring:
            raise MeasurementError(
                "found is_async (--async); it lets loading and saving overlap a measurement: "
                "leave it out"
            )

    @hook_impl
    def on_pipeline_error(self) -> None:
        """Release the locks of the output folders."""
        self._held.close()
        _end_workers()

    def _finding(self, name: str) -> str:
        """Give what a study found, in a sentence; empty where it says none."""
        result = read_json(result_path(self._root, name))
        return str(result.get("finding") or (result.get("statistics") or {}).get("finding") or "")

    @hook_impl
    def after_pipeline_run(self, pipeline: Pipeline, catalog: DataCatalog) -> None:
        """Release the locks; say what was found, and where the results are."""
        self._held.close()
        _end_workers()
        page = self._root / "report" / "index.html"
        made = f"; open {page}" if "page" in pipeline.all_outputs() else ""
        if self._options.measurement.shard:
            for journal in pipeline.outputs():  # nothing reads it, which would close it
                catalog.release(journal)
            log.info(
                "The journals are in %s; when all shards are measured, the same command without "
                "measurement.shard gathers them",
                self._root,
            )
            return
        for name in studies():
            if f"{name}.result" in pipeline.all_outputs() and (said := self._finding(name)):
                log.info("%s: %s", name, said)
        log.info("Results are in %s%s", self._root, made)


def _end_workers() -> None:
    if pool := sys.modules.get("vlm_latency.workers.pool"):
        pool.close()


def _take_turns(pipeline: Pipeline) -> None:
    """Let each study end, its results on disk, before the next one's first node runs.

    No data flow between most of them, so no edge could say it: the nodes are put in order, those of
    none as early as they can.
    """
    rank = {name: turn for turn, name in enumerate(studies())}
    left, done = list(pipeline.nodes), list[Node]()
    while left:
        ready = [node for node in left if pipeline.node_dependencies[node] <= set(done)]
        done.append(min(ready, key=lambda node: rank.get((node.namespace or "").split(".")[0], -1)))
        left.remove(done[-1])
    vars(pipeline).update(nodes=done, _toposorted_nodes=done)  # what the runner reads


def _only_measure(pipeline: Pipeline, experiments: list[str], shard: Shard) -> None:
    """Leave in a pipeline what a shard does: no report is made of a part.

    Kedro runs the object that it shows to the hooks, and asks none of them for another.
    """
    if not experiments:
        raise MeasurementError(
            f"found measurement.shard={shard} in a command that measures no experiment; leave it out"
        )
    measuring = [node.name for node in pipeline.nodes if "measures" in node.tags]
    vars(pipeline).update(vars(pipeline.only_nodes(*measuring)))
