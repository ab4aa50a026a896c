"""calibration: remainder, known truth, overhead, A/A, methods, cost, ceilings, warm-up."""

from kedro.pipeline import Pipeline, node

from vlm_latency.pipelines import options
from vlm_latency.pipelines.calibration import nodes


def ceilings() -> Pipeline:
    """Measure what the machine can do at most, unless that is known already."""
    return Pipeline(
        [
            node(
                nodes.measure_ceilings,
                inputs=["settings", "model", "ceilings_so_far"],
                outputs="ceilings",
                name="measure_ceilings",
                tags="owns_device",
            )
        ]
    )


def create_pipeline() -> Pipeline:
    """Prove the instrument."""
    prove = Pipeline(
        [
            node(
                nodes.calibrate,
                inputs=["options", "settings", "model", "questions", "ceilings"],
                outputs=["result", "figure_calibration"],
                name="calibrate",
                tags="owns_device",
            )
        ]
    )
    return ceilings() + Pipeline(
        options.create_pipeline("calibration") + prove,
        namespace="calibration",
        inputs={"settings", "model", "questions", "ceilings"},
        tags="calibration",
    )
