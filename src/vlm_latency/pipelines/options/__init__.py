"""The effective options of one experiment, settled before anything else."""

from typing import TYPE_CHECKING

from kedro.pipeline import Pipeline, node

from vlm_latency.options import ExperimentOptions, Options

if TYPE_CHECKING:
    from vlm_latency.models import ModelHandle


def create_pipeline(experiment: str) -> Pipeline:
    """Settle the options of one experiment."""

    def settle_options(settings: Options, model: "ModelHandle") -> ExperimentOptions:
        """Settle what the protocol, the shared groups and the experiment's overrides leave open."""
        return settings.experiment(experiment, model.weights)

    return Pipeline(
        [
            node(
                settle_options,
                inputs=["settings", "model"],
                outputs="options",
                name="settle_options",
                tags="measures",
            )
        ]
    )
