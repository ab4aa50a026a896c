"""The data_sampling pipeline."""

from vlm_latency.pipelines.data_sampling.pipeline import create_pipeline

__all__ = ["create_pipeline"]
