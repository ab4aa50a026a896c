"""measurement: requests become runs, one row each, through a journal that loses nothing."""

from kedro.pipeline import Pipeline, node

from vlm_latency.pipelines.measurement import nodes


def create_pipeline() -> Pipeline:
    """Measure the requests on the model."""
    return Pipeline(
        [
            node(
                nodes.describe_environment,
                inputs=["options", "model", "questions"],
                outputs="environment_now",
                name="describe_environment",
                tags="measures",
            ),
            node(
                nodes.plan_runs,
                inputs=["options", "requests"],
                outputs="plan",
                name="plan_runs",
                tags="measures",
            ),
            node(
                nodes.measure,
                inputs=[
                    "options",
                    "requests",
                    "plan",
                    "model",
                    "questions",
                    "environment_now",
                    "journal_so_far",
                ],
                outputs="journal",
                name="measure",
                tags=["measures", "owns_device"],
            ),
            node(
                nodes.collect,
                inputs=["options", "plan", "environment_now", "journal"],
                outputs=["measurements", "coverage", "environment"],
                name="collect",
            ),
        ]
    )
