"""The explain pipeline: what bounds each component of a request."""

from vlm_latency.pipelines.explain.pipeline import create_pipeline

__all__ = ["create_pipeline"]
