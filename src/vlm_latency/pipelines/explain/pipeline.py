"""explain: some requests, run without a profiler and once under it; kernels by component."""

from kedro.pipeline import Pipeline, node

from vlm_latency.pipelines import calibration, options
from vlm_latency.pipelines.explain import nodes


def create_pipeline() -> Pipeline:
    """Choose requests, look at them, and report what bounds each component."""
    look = Pipeline(
        [
            node(
                nodes.choose_requests,
                inputs=["settings", "model", "questions", "given"],
                outputs="requests",
                name="choose_requests",
            ),
            node(
                nodes.profile,
                inputs=["options", "settings", "requests", "model", "questions", "ceilings"],
                outputs=["records", "profiles", "trace"],
                name="profile",
                tags="owns_device",
            ),
            node(
                nodes.report,
                inputs=[
                    *("options", "settings", "requests", "model", "questions", "ceilings"),
                    *("records", "profiles"),
                ],
                outputs=["result", "tables", "figure_explain"],
                name="report",
            ),
        ]
    )
    shared = ("settings", "model", "questions", "ceilings")
    return calibration.ceilings() + Pipeline(
        options.create_pipeline("explain") + look,
        namespace="explain",
        inputs={**{name: name for name in shared}, "given": f"{nodes.LIKE}.given_requests"},
        tags="explain",
    )
