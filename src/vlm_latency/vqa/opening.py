"""Open a dataset of questions with the reader of its kind."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from vlm_latency.errors import DataError
from vlm_latency.vqa import folder, hub, official, synthetic
from vlm_latency.vqa.source import QuestionSource

VQA_V2, VQA_V2_ON_HUB = "coco_2014_vqa", "lmms-lab/VQAv2"


def open_source(
    name: str = VQA_V2,
    source: str = "synthetic",
    path: Path | str | None = None,
    split: str = "validation",
    *,
    hub_id: str = VQA_V2_ON_HUB,
    revision: str | None = None,
    columns: Mapping[str, str | None] | None = None,
    questions_file: str | None = None,
    seed: int = 0,
    size: int | None = None,
    image_cache: Path | str | None = None,
) -> QuestionSource:
    """Index the questions of a dataset.

    Parameters
    ----------
    name
        What results call the dataset; the default stands for VQA v2 only: other data are called by
        their folder or hub id.
    source
        ``official``: a folder in VQA v2's own layout at ``path``; ``hub``: a Hugging Face dataset
        in parquet; ``folder``: a folder of images at ``path`` and a table of questions in it;
        ``synthetic``: made from ``seed``, no files needed.
    split
        ``validation`` (or ``val``) or ``train``.
    hub_id, revision, columns
        Hub datasets: which, at which commit, and what it calls its columns.
    questions_file
        Folder datasets: the CSV or JSONL, relative to ``path`` (needed only where there are
        several).
    size
        Synthetic: the number of images; by default VQA v2 validation's 40,504.
    image_cache
        Hub datasets: the folder that drawn images are kept in; it becomes the source's ``root``.

    Raises
    ------
    DataError
        When something is missing, malformed or contradictory; one sentence says what and where.
    """
    if path is not None and source in ("synthetic", "hub"):
        raise DataError(
            f"dataset.path={path} is not read by dataset.source={source}; set dataset.source=official "
            "or folder for it, dataset.hub_id for a folder of parquet files, or leave it out"
        )
    split = "validation" if split == "val" else split
    if split not in ("validation", "train"):
        raise DataError(f"split {split!r} is not known; expected validation (or val) or train")
    if source == "synthetic":
        return synthetic.make_source(name, split, seed, size)
    if source == "hub":
        if name == VQA_V2 and hub_id != VQA_V2_ON_HUB:
            name = hub_id
        return hub.open_hub(
            name,
            split,
            hub_id,
            revision=revision,
            columns=columns,
            image_cache=None if image_cache is None else Path(image_cache),
        )
    if source not in ("official", "folder"):
        raise DataError(
            f"dataset source {source!r} is not known; expected official, hub, folder or synthetic"
        )
    if path is None:
        raise DataError(
            f"dataset.source={source} needs dataset.path: the folder that the dataset is in"
        )
    root = Path(path).expanduser()
    if source == "official":
        return official.open_official(name, split, root)
    name = root.resolve().name if name == VQA_V2 else name
    return folder.open_folder(name, split, root, questions_file)
