"""The compare pipeline: results folders side by side."""

from vlm_latency.pipelines.compare.pipeline import create_pipeline

__all__ = ["create_pipeline"]
