"""predict: the calibrated cost model answers for a workload that need not be run."""

from kedro.pipeline import Pipeline, node

from vlm_latency.pipelines.predict import nodes


def create_pipeline() -> Pipeline:
    """Predict a workload from the costs of its parts, calibrated on exp3 and exp4."""
    stage = Pipeline(
        [
            node(
                nodes.predict,
                inputs=["settings", "model", "vision", "language"],
                outputs=["result", "tables", "figure_predict"],
                name="predict",
            )
        ]
    )
    return Pipeline(
        stage,
        namespace="predict",
        inputs={
            "settings": "settings",
            "model": "model",
            "vision": "exp5.vision",
            "language": "exp5.language",
        },
        tags="predict",
    )
