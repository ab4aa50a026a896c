"""Kedro datasets: thin adapters of the library's rooms, and atomic writing."""

from vlm_latency.datasets.atomic import AtomicJSON, AtomicParquet
from vlm_latency.datasets.inputs import (
    EarlierResult,
    ModelDataset,
    OptionalJSON,
    ResultsFolder,
    RunFolders,
    VQADataset,
)
from vlm_latency.datasets.outputs import FigureFile, HTMLPage, TableFolder
from vlm_latency.datasets.record_log import RecordLog

__all__ = [
    "AtomicJSON",
    "AtomicParquet",
    "EarlierResult",
    "FigureFile",
    "HTMLPage",
    "ModelDataset",
    "OptionalJSON",
    "RecordLog",
    "ResultsFolder",
    "RunFolders",
    "TableFolder",
    "VQADataset",
]
