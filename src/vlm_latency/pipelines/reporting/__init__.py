"""The reporting pipeline."""

from vlm_latency.pipelines.reporting.pipeline import create_page, create_pipeline

__all__ = ["create_page", "create_pipeline"]
