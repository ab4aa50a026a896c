"""Kedro datasets: thin adapters of the library's rooms, and atomic writing."""

from vlm_latency.datasets.atomic import AtomicJSON, AtomicParquet, CompressedJSON, ResultFile
from vlm_latency.datasets.inputs import (
    EarlierResult,
    GivenRequests,
    ModelDataset,
    OptionalJSON,
    ResultsFolder,
    RunFolders,
    VQADataset,
)
from vlm_latency.datasets.outputs import FigureFile, FigureFolder, HTMLPage, TableFolder
from vlm_latency.datasets.record_log import RecordLog
from vlm_latency.datasets.variants import VariantRuns

__all__ = [
    "AtomicJSON",
    "AtomicParquet",
    "CompressedJSON",
    "EarlierResult",
    "FigureFile",
    "FigureFolder",
    "GivenRequests",
    "HTMLPage",
    "ModelDataset",
    "OptionalJSON",
    "RecordLog",
    "ResultFile",
    "ResultsFolder",
    "RunFolders",
    "TableFolder",
    "VQADataset",
    "VariantRuns",
]
