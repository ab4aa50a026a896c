"""The flops_estimation pipeline."""

from vlm_latency.pipelines.flops_estimation.pipeline import create_pipeline

__all__ = ["create_pipeline"]
