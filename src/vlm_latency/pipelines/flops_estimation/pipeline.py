"""flops_estimation: measurements become records, with FLOPs, bytes and the roofline beside them."""

from kedro.pipeline import Pipeline, node

from vlm_latency.pipelines.flops_estimation import nodes


def create_pipeline() -> Pipeline:
    """Add what the runs should have cost to what they took."""
    return Pipeline(
        [
            node(
                nodes.estimate,
                inputs=["options", "measurements", "model", "ceilings"],
                outputs="records",
                name="estimate",
            )
        ]
    )
