"""The calibration pipeline: the instrument proves itself on the model and device at hand."""

from vlm_latency.pipelines.calibration.pipeline import ceilings, create_pipeline

__all__ = ["ceilings", "create_pipeline"]
