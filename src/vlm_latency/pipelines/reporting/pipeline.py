"""reporting: records become a result with its statistics, figures, tables and the page."""

from kedro.pipeline import Pipeline, node

from vlm_latency.experiments import EXPERIMENTS
from vlm_latency.pipelines.reporting import nodes


def create_pipeline(experiment: str) -> Pipeline:
    """Report on one experiment."""
    row = EXPERIMENTS[experiment]
    return Pipeline(
        [
            node(
                nodes.report_of(experiment),
                inputs=["options", *row.reads],
                outputs=["result", "tables", *(f"figure_{name}" for name in row.figures)],
                name="report",
            )
        ]
    )


def create_page(results: list[str]) -> Pipeline:
    """Write the page anew from whatever results lie under the output folder.

    Parameters
    ----------
    results
        Datasets that must be on disk first.
    """
    made = {name.replace(".", "_"): name for name in results}
    publish = node(nodes.publish, inputs=["results_folder", *made], outputs="page", name="publish")
    return Pipeline([publish], inputs=made)
