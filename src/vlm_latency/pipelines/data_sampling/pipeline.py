"""data_sampling: questions, or a sweep, become requests."""

from kedro.pipeline import Pipeline, node

from vlm_latency.pipelines.data_sampling import nodes


def create_pipeline() -> Pipeline:
    """Draw the table of requests that one experiment makes."""
    return Pipeline(
        [
            node(
                nodes.draw_requests,
                inputs=["options", "questions", "model", "given_requests"],
                outputs="requests",
                name="draw_requests",
                tags="measures",
            )
        ]
    )
