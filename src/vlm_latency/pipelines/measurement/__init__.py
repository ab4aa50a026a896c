"""The measurement pipeline."""

from vlm_latency.pipelines.measurement.pipeline import create_pipeline

__all__ = ["create_pipeline"]
