"""Which requests an experiment makes: samples of a dataset, sweeps over images and lengths.

The table of requests holds raw texts, images by path and hash or by recipe, and the *rule* of the
output's length: no tokens, so that one table serves any model on any machine.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import numpy as np
import pandas as pd

from vlm_latency.errors import DataError
from vlm_latency.option_types import output_length
from vlm_latency.records import REQUEST_COLUMNS, typed
from vlm_latency.vqa.images import MAX_SIDE, at_size, image_size, noise_recipe, read_file, sha256
from vlm_latency.vqa.source import QuestionSource

SWEEP_QUESTION = "What is in the image?"
# Grids with as many crops as a 1×k one but other token counts (7 crops: 704 or 768 tokens;
# 13: 1152, 1184 or 1344), which tell the encoder's cost from the decoder's.
_EQUAL_CROPS = {6: [(2, 3)], 12: [(3, 4), (2, 6)]}


class Tiles(Protocol):
    """How a model cuts images: ``vlm_latency.models``' ``architecture.nominal_tiles``."""

    @property
    def max_crops(self) -> int: ...

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """Give rows and columns for an image of this size."""

    def image_size(self, rows: int, cols: int) -> tuple[int, int]:
        """Give (width, height) of an image that fills a grid."""


@dataclass(frozen=True)
class Sampling:
    """How questions are drawn: without replacement, and so that a larger sample holds a smaller.

    Attributes
    ----------
    num_samples
        How many; None takes all.
    order
        ``random`` by ``seed``, or ``first``: the table's own order (grouped by image in VQA v2).
    one_question_per_image
        At most one question of each image, so that requests are independent.
    stratify_by_tiling
        Each tiling's share of the sample is its share of the data; reads every image's header.
    tiles
        How the model cuts images, where that matters.
    """

    num_samples: int | None = None
    order: str = "random"
    seed: int = 0
    one_question_per_image: bool = False
    stratify_by_tiling: bool = False
    tiles: Tiles | None = None


def draw_requests(
    source: QuestionSource,
    sampling: Sampling,
    output_length: str | int,
    experiment: str,
    hash_images: bool = True,
) -> pd.DataFrame:
    """Draw questions as requests (exp1, exp2): a table with ``records.REQUEST_COLUMNS``.

    ``hash_images`` records each file's SHA-256, so that a changed image is noticed when it is
    measured; each file is read once (all of VQA v2 validation: 6.5 GB). An image that is missing
    or unreadable stays in the table, without size and hash: its request fails when measured.

    Raises
    ------
    DataError
        When there are fewer questions (or images) than asked for, or ``output_length`` is
        ``answer`` and a drawn question has none.
    """
    rule = _output_length(output_length)
    rows = source.with_images(_sample(source, sampling, experiment))
    if rule == "answer" and rows["answer"].isna().any():
        raise DataError(
            f"{rows['answer'].isna().sum()} of {len(rows)} drawn questions have no answer, which "
            "output_length=answer needs; add the annotations, or set output_length to natural or "
            "a number"
        )
    sizes = _headers(source, rows, hash_images)
    return _request_table(
        rows.assign(
            **sizes,
            request_id=experiment + "-" + rows["question_id"].astype("string"),
            experiment=experiment,
            dataset=source.name,
            synthetic=source.synthetic,
            resolution=_resolutions(sizes),
            output_length=rule,
            seed=sampling.seed,
        )
    )


def sweep_vision_requests(
    tiles: Tiles,
    max_grid_size: int = 12,
    equal_crop_pairs: bool = True,
    resolution_rule: str = "exact",
    seed: int = 0,
    experiment: str = "exp3",
) -> pd.DataFrame:
    """Make one synthetic image per grid 1×1 … 1×max_grid_size (exp3).

    ``exact`` images are 224k + 112 pixels wide and hit grid 1×k exactly; ``seed`` images are 336k
    wide, as the seed's, and give the tilings 1×{1, 3, 4, 6, 7, 9, 10, 12, …}. With
    ``equal_crop_pairs`` the grids with as many crops as 1×6 and 1×12 are added where these are in
    the sweep; column ``pair`` names the group.

    Raises
    ------
    DataError
        When a grid has more tiles than ``tiles.max_crops``.
    """
    if not 1 <= max_grid_size <= tiles.max_crops:
        raise DataError(
            f"max_grid_size={max_grid_size} is out of range: a grid 1×k has k tiles, and at most "
            f"{tiles.max_crops} are cut (max_crops)"
        )
    if resolution_rule not in ("exact", "seed"):
        raise DataError(f"resolution rule {resolution_rule!r} is not known; expected exact or seed")
    grids = [(1, k) for k in range(1, max_grid_size + 1)]
    paired = {
        k: rest for k, rest in _EQUAL_CROPS.items() if equal_crop_pairs and k <= max_grid_size
    }
    pairs = {grid: k for k, rest in paired.items() for grid in [(1, k), *rest]}
    grids += [grid for grid in pairs if grid not in grids]
    prefix = experiment if resolution_rule == "exact" else f"{experiment}-seed"
    rows = []
    for n, (r, c) in enumerate(grids):
        if resolution_rule == "exact":
            width, height = tiles.image_size(r, c)
        else:
            width, height = 336 * c, 336 * r
        row = _sweep_row(experiment, f"{prefix}-{r}x{c}", width, height, seed, n)
        pair = f"{pairs[r, c] + 1} crops" if (r, c) in pairs else None
        rows.append(row | {"tiling_rows": r, "tiling_cols": c, "grid": f"{r}×{c}", "pair": pair})
    return _request_table(pd.DataFrame(rows))


def sweep_sizes_requests(
    sizes: Iterable[tuple[int, int]], seed: int = 0, experiment: str = "exp3"
) -> pd.DataFrame:
    """Make one synthetic image per (width, height) in pixels: exp3 for models without tiles."""
    sizes = list(dict.fromkeys(sizes))
    if not sizes or not all(1 <= side <= MAX_SIDE for size in sizes for side in size):
        raise DataError(
            f"found sizes {sizes}; expected at least one width and height of 1 to {MAX_SIDE} pixels"
        )
    return _request_table(
        pd.DataFrame(
            _sweep_row(experiment, f"{experiment}-{w}x{h}", w, h, seed, n)
            for n, (w, h) in enumerate(sizes)
        )
    )


def sweep_language_requests(
    source: QuestionSource,
    sampling: Sampling,
    lengths: Sequence[int],
    tiling: tuple[int, int] | None = (2, 3),
    until_eos: bool = False,
    experiment: str = "exp4",
) -> pd.DataFrame:
    """Ask the same drawn images and questions at every output length (exp4).

    Exactly so many tokens are forced; with ``until_eos`` the end-of-sequence token may stop earlier.

    With ``tiling`` (rows, columns) each image is brought to exactly that tiling's size, so that
    every prompt has the same number of vision tokens; None leaves them as they are.

    Raises
    ------
    DataError
        As ``draw_requests``; when there is no length, or ``tiling`` has too many tiles.
    """
    lengths = list(dict.fromkeys(lengths))
    if not lengths:
        raise DataError("found no output lengths; expected at least one, such as 8 16 32")
    requests = draw_requests(source, sampling, "none", experiment)
    if tiling is not None:
        r, c = tiling
        tiles = _tiles(sampling)
        if r * c > tiles.max_crops:
            raise DataError(
                f"tiling {r}x{c} has {r * c} tiles, and at most {tiles.max_crops} are cut"
            )
        width, height = tiles.image_size(r, c)
        requests = requests.assign(
            image_recipe=[at_size(recipe, width, height) for recipe in requests["image_recipe"]],
            image_width=width,
            image_height=height,
            tiling_rows=r,
            tiling_cols=c,
            grid=f"{r}×{c}",
            resolution=f"{width}x{height}",
        )
    return _request_table(
        pd.concat(
            requests.assign(
                request_id=requests["request_id"] + f"-n{length}",
                output_length=("≤" if until_eos else "") + _output_length(length),
            )
            for length in lengths
        )
    )


def _request_table(rows: pd.DataFrame) -> pd.DataFrame:
    return typed(rows, REQUEST_COLUMNS).reset_index(drop=True)


def _sweep_row(
    experiment: str, request_id: str, width: int, height: int, seed: int, n: int
) -> dict[str, Any]:
    return {
        "request_id": request_id,
        "experiment": experiment,
        "dataset": "sweep",
        "synthetic": True,
        "question": SWEEP_QUESTION,
        "image_recipe": noise_recipe(seed + n, width, height),
        "image_width": width,
        "image_height": height,
        "resolution": f"{width}x{height}",
        "output_length": "none",
        "seed": seed,
    }


def _output_length(value: str | int) -> str:
    try:
        return output_length(value)
    except ValueError as error:
        raise DataError(f"output_length {value!r} is not a rule; {error}") from None


def _sample(source: QuestionSource, sampling: Sampling, experiment: str) -> pd.DataFrame:
    """The drawn rows, in the order of drawing: a larger sample only adds rows at the end."""
    table = source.table
    if sampling.order == "random":
        rows = table.iloc[np.random.default_rng(sampling.seed).permutation(len(table))]
    elif sampling.order == "first":
        rows = table
    else:
        raise DataError(f"sampling.order {sampling.order!r} is not known; expected random or first")
    if sampling.one_question_per_image:
        rows = rows.drop_duplicates("image_id")
    count = len(rows) if sampling.num_samples is None else sampling.num_samples
    if not 1 <= count <= len(rows):
        images = table["image_id"].nunique()
        why, more = "", ""
        if sampling.one_question_per_image:
            why = " and one question of each is drawn"
            more = f", or more with {experiment}.sampling.one_question_per_image=false"
        raise DataError(
            f"num_samples={count} cannot be drawn: {source.name} ({source.source}, {source.split}) "
            f"has {len(table)} questions on {images} images{why}; "
            f"ask for 1 to {len(rows)} by {experiment}.sampling.num_samples{more}"
        )
    if sampling.stratify_by_tiling:
        rows = _spread_strata(rows, _tilings(source, rows, _tiles(sampling)))
    return rows.head(count)


def _spread_strata(rows: pd.DataFrame, strata: pd.Series) -> pd.DataFrame:
    """Order the rows so that every beginning holds each stratum in its share of the whole.

    The j-th of a stratum's m rows comes at (j + 1/2) / m: Webster's proportional allocation.
    """
    within = strata.groupby(strata)
    place = (within.cumcount() + 0.5) / within.transform("size")
    return rows.loc[place.sort_values(kind="stable").index]


def _tiles(sampling: Sampling) -> Tiles:
    if sampling.tiles is None:
        raise DataError("tilings depend on the model; give Sampling(tiles=...) how it cuts images")
    return sampling.tiles


def _tilings(source: QuestionSource, rows: pd.DataFrame, tiles: Tiles) -> pd.Series:
    if source.fetch is not None:
        raise DataError(
            "stratify_by_tiling needs every image's size, and this hub dataset would have to be "
            "downloaded whole for it; turn it off, or use the official files"
        )
    sizes = _headers(source, rows, hash_images=False)

    @cache
    def tiling(width: int, height: int) -> str:
        rows, cols = tiles.grid(width, height)
        return f"{rows}x{cols}"

    pairs = zip(sizes["image_width"], sizes["image_height"], strict=True)
    names = ["unreadable" if pd.isna(w) else tiling(int(w), int(h)) for w, h in pairs]
    return pd.Series(names, rows.index)


def _headers(source: QuestionSource, rows: pd.DataFrame, hash_images: bool) -> pd.DataFrame:
    """Width, height and (if wanted) SHA-256 of the rows' images, each file read once."""
    columns = ["image_width", "image_height", "image_sha256"]
    if source.root is None:
        return rows.reindex(columns=columns)
    root = source.root

    @cache
    def header(path: str) -> tuple[int | None, int | None, str | None]:
        try:
            data = read_file(root, path) if hash_images else None
            width, height = image_size(root / path if data is None else data)
        except DataError:  # the request says so when it is measured
            return None, None, None
        return width, height, None if data is None else sha256(data)

    found = [header(path) for path in rows["image_path"]]
    return pd.DataFrame(found, index=rows.index, columns=columns)


def _resolutions(sizes: pd.DataFrame) -> pd.Series:
    width = sizes["image_width"].astype("Int64").astype("string")
    return width + "x" + sizes["image_height"].astype("Int64").astype("string")
