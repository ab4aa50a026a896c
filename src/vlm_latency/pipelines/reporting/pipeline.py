"""reporting: records become a result with its statistics, figures, tables and the page."""

from kedro.pipeline import Pipeline, node

from vlm_latency.pipelines.reporting import nodes

# What each report reads beside its options.
EVIDENCE = {
    "exp1": ["records", "requests", "coverage", "environment"],
    "exp2": ["records", "requests", "coverage", "environment", "model"],
    "exp3": ["records", "requests", "coverage", "environment", "ceilings"],
    "exp4": ["records", "requests", "coverage", "environment", "ceilings", "model"],
    "exp5": ["vision", "language"],
}
# The figures of each experiment, under the seed study's names.
FIGURES = {
    "exp1": ["exp1_latency_distribution"],
    "exp2": ["exp2_parameters", "exp2_latency"],
    "exp3": ["exp3_vision_tokens_vs_latency"],
    "exp4": ["exp4_language_tokens_vs_latency"],
    "exp5": ["exp5_flops_vs_latency"],
}


def create_pipeline(experiment: str) -> Pipeline:
    """Report on one experiment."""
    figures = [f"figure_{name}" for name in FIGURES[experiment]]
    return Pipeline(
        [
            node(
                nodes.REPORTS[experiment],
                inputs=["options", *EVIDENCE[experiment]],
                outputs=["result", "tables", *figures],
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
