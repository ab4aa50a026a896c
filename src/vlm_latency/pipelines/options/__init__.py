"""The effective options of one experiment, settled before anything else."""

from functools import partial, update_wrapper
from typing import TYPE_CHECKING, Any

from kedro.pipeline import Pipeline, node

from vlm_latency.options import ExperimentOptions, Options

if TYPE_CHECKING:
    from vlm_latency.datasets.inputs import Model


def settle_options(
    experiment: str, parameters: dict[str, Any], model: "Model"
) -> ExperimentOptions:
    """Settle what the protocol, the shared groups and the experiment's overrides leave open."""
    return Options.from_parameters(parameters).experiment(experiment, model.weights)


def create_pipeline(experiment: str) -> Pipeline:
    """Settle the options of one experiment."""
    settle = update_wrapper(partial(settle_options, experiment), settle_options)
    return Pipeline(
        [node(settle, inputs=["parameters", "model"], outputs="options", name="settle_options")]
    )
