"""The predict pipeline: a workload's latency without running the model."""

from vlm_latency.pipelines.predict.pipeline import create_pipeline

__all__ = ["create_pipeline"]
