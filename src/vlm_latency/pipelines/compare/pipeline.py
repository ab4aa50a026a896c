"""compare: two runs or more, matched by request and shape, or variants in turn, become verdicts."""

from kedro.pipeline import Pipeline, node

from vlm_latency.pipelines.compare import nodes, variants


def create_pipeline() -> Pipeline:
    """Compare results folders or variants; fail afterwards where the user asked for it."""
    stage = Pipeline(
        [
            node(
                variants.describe_variants,
                inputs=["settings", "runs"],
                outputs="environment_now",
                name="describe_variants",
            ),
            node(
                variants.measure_variants,
                inputs=["settings", "runs", "environment_now", "journal_so_far"],
                outputs="journal",
                name="measure_variants",
                tags="owns_device",
            ),
            node(
                variants.collect_variants,
                inputs=["settings", "runs", "environment_now", "journal"],
                outputs=["records", "coverage", "environments"],
                name="collect_variants",
            ),
            node(
                nodes.compare_runs,
                inputs=["settings", "runs", "records", "coverage", "environments"],
                outputs=["result", "tables", "figure_compare", "side_by_side"],
                name="compare_runs",
            ),
        ]
    )
    # Outside the namespace: it comes after the page, which is everybody's.
    gate = node(
        nodes.fail_if_slower,
        inputs=["settings", "compare.result", "page"],
        outputs="passed",
        name="fail_if_slower",
    )
    return Pipeline(stage, namespace="compare", inputs="settings", tags="compare") + Pipeline(
        [gate], tags="compare"
    )
