from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vlm_latency.molmo import tiling

GRIDS = [(r, c) for r in range(1, 13) for c in range(1, 13) if r * c <= 12]
REFERENCE = json.loads((Path(__file__).parent / "golden" / "preprocess.json").read_text())


def test_needs_neither_torch_nor_transformers():
    code = (
        "import sys, vlm_latency.molmo.tiling; "
        "print([m for m in ('torch', 'transformers', 'PIL') if m in sys.modules])"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert loaded.stdout.strip() == "[]"


@pytest.mark.parametrize(("rows", "cols"), GRIDS)
def test_closed_forms(rows, cols):
    width, height = tiling.image_size_for_tiling(rows, cols)
    assert (width, height) == (224 * cols + 112, 224 * rows + 112)
    vision = 144 + (8 * rows + 4) * (8 * cols + 4)
    special = 160 + (8 * rows + 4) * (8 * cols + 5) - vision
    assert tiling.image_token_counts(width, height) == (
        (rows * cols + 1, rows, cols, vision, special, 576 * (rows * cols + 1))
    )


def test_vision_tokens_of_a_strip_and_of_coco_sizes():
    strips = [tiling.image_size_for_tiling(1, n) for n in range(1, 13)]
    assert [tiling.image_token_counts(*size).num_vision_tokens for size in strips] == (
        [288, 384, 480, 576, 672, 768, 864, 960, 1056, 1152, 1248, 1344]
    )
    coco = {(640, 480): (2, 3), (640, 512): (2, 3), (500, 375): (2, 2), (612, 612): (3, 3)}
    assert {(w, h): tiling.select_tiling(h, w) for w, h in coco} == coco


def test_equals_the_reference_in_all_sizes():
    ids = REFERENCE["special_token_ids"]
    of_kind = np.array([ids[f"im_{k}"] for k in ("start", "end", "patch", "col")], np.int32)
    for case in REFERENCE["sizes"]:
        counts = tiling.image_token_counts(*case["size"])
        rows, cols = counts.tiling_rows, counts.tiling_cols
        assert [rows, cols] == case["tiling"], case["size"]
        assert counts.num_vision_tokens == case["vision"]
        assert counts.num_vision_tokens + counts.num_image_special_tokens == case["tokens"]
        kinds, idx = tiling.image_token_layout(rows, cols)
        digests = [hashlib.sha256(a.tobytes()).hexdigest()[:12] for a in (of_kind[kinds], idx)]
        assert digests == case["sha"][:2], case["size"]


@given(
    width=st.integers(1, 5000),
    height=st.integers(1, 5000),
    max_crops=st.integers(1, 16),
    margin=st.sampled_from([1, 2, 3, 4]),
    window=st.sampled_from([2, 4, 8, 16]),
)
def test_every_place_of_the_canvas_is_one_token(width, height, max_crops, margin, window):
    geometry = {
        "patch_size": 14,
        "crop": 14 * (window + 2 * margin),
        "margins": (margin, margin),
    }
    # The reference itself is only defined where margins fall between 2 × 2 windows.
    if margin % 2:
        geometry |= {"crop": 14 * (window + 4 * margin), "margins": (2 * margin, 2 * margin)}
    counts = tiling.image_token_counts(width, height, max_crops, **geometry)
    rows, cols = counts.tiling_rows, counts.tiling_cols
    assert 1 <= rows * cols <= max_crops
    assert counts.num_crops == rows * cols + 1
    kinds, idx = tiling.image_token_layout(rows, cols, **geometry)
    assert len(idx) == counts.num_crops
    assert len(kinds) == counts.num_vision_tokens + counts.num_image_special_tokens
    used = idx[idx >= 0]
    assert sorted(used) == np.flatnonzero(kinds == tiling.PATCH).tolist()


@given(width=st.integers(113, 6000), height=st.integers(113, 6000))
def test_the_chosen_grid_is_the_best_scale(width, height):
    def scale(grid):
        return min(224 * grid[0] / (height - 112), 224 * grid[1] / (width - 112))

    chosen = scale(tiling.select_tiling(height, width))
    scales = [scale(grid) for grid in GRIDS]
    enlarging = [value for value in scales if value >= 1]
    assert chosen == pytest.approx(min(enlarging) if enlarging else max(scales), rel=1e-6)
