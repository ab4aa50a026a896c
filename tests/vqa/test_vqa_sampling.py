"""The tables of requests: drawn samples, sweeps over images, sweeps over lengths."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from vlm_latency.errors import DataError
from vlm_latency.molmo.tiling import Tiles, image_token_counts, select_tiling
from vlm_latency.records import REQUEST_COLUMNS
from vlm_latency.vqa import (
    QuestionSource,
    Sampling,
    decode_image,
    draw_requests,
    image_bytes,
    open_source,
    sweep_language_requests,
    sweep_sizes_requests,
    sweep_vision_requests,
)


@pytest.fixture(scope="module")
def synthetic() -> QuestionSource:
    return open_source(size=600, seed=3)


@pytest.fixture
def files(official: Any) -> QuestionSource:
    return open_source(source="official", path=official.root)


def test_request_table_and_its_parquet(files: QuestionSource, tmp_path: Path) -> None:
    tables = [
        draw_requests(files, Sampling(4), "answer", "exp1"),
        draw_requests(files, Sampling(4), 16, "exp2"),
        sweep_vision_requests(Tiles()),
        sweep_language_requests(files, Sampling(2, tiles=Tiles()), [8]),
    ]
    for table in tables:
        assert {name: str(dtype) for name, dtype in table.dtypes.items()} == REQUEST_COLUMNS
        assert table["request_id"].is_unique
        table.to_parquet(tmp_path / "requests.parquet")
        pd.testing.assert_frame_equal(pd.read_parquet(tmp_path / "requests.parquet"), table)


def test_drawn_rows(files: QuestionSource, official: Any) -> None:
    requests = draw_requests(files, Sampling(4, seed=5), "answer", "exp1")
    row = requests.iloc[0]
    assert row.request_id == f"exp1-{row.question_id}"
    assert (row.dataset, row.synthetic, row.output_length, row.seed) == (
        "coco_2014_vqa",
        False,
        "answer",
        5,
    )
    assert row.resolution == f"{row.image_width}x{row.image_height}"
    assert decode_image(image_bytes(row, files.root)).size == (row.image_width, row.image_height)
    assert len(row.image_sha256) == 64
    unhashed = draw_requests(files, Sampling(4, seed=5), 7, "exp1", hash_images=False)
    assert unhashed["image_sha256"].isna().all()
    assert unhashed["output_length"].tolist() == ["7"] * 4
    shared = ["question_id", "image_width", "image_height"]
    pd.testing.assert_frame_equal(unhashed[shared], requests[shared])


def test_first_and_random(files: QuestionSource) -> None:
    first = draw_requests(files, Sampling(3, order="first"), "none", "exp1")
    assert first["question_id"].tolist() == ["1000", "1001", "2000"]
    spread = Sampling(3, order="first", one_question_per_image=True)
    assert draw_requests(files, spread, "none", "exp1")["question_id"].tolist() == [
        "1000",
        "2000",
        "3000",
    ]
    drawn = [
        draw_requests(files, Sampling(10, seed=seed), "none", "exp1")["question_id"].tolist()
        for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2]
    assert sorted(drawn[0]) == files.table["question_id"].tolist()  # without replacement


@pytest.mark.parametrize("order", ["random", "first"])
@pytest.mark.parametrize("one_question_per_image", [False, True])
@pytest.mark.parametrize("stratify_by_tiling", [False, True])
def test_a_larger_sample_holds_the_smaller(
    synthetic: QuestionSource, order: str, one_question_per_image: bool, stratify_by_tiling: bool
) -> None:
    sampling = Sampling(50, order, 0, one_question_per_image, stratify_by_tiling, Tiles())
    small = draw_requests(synthetic, sampling, "answer", "exp1")
    large = draw_requests(
        synthetic, dataclasses.replace(sampling, num_samples=300), "answer", "exp1"
    )
    pd.testing.assert_frame_equal(large.head(50), small)
    assert large["image_id"].is_unique or not one_question_per_image
    assert large["question_id"].is_unique


def test_strata_have_their_share(synthetic: QuestionSource) -> None:
    def crops(table: pd.DataFrame) -> pd.Series:
        sizes = zip(table["image_width"], table["image_height"], strict=True)
        return pd.Series(["x".join(map(str, select_tiling(h, w))) for w, h in sizes])

    images = synthetic.table.drop_duplicates("image_id")
    population = crops(images).value_counts() / len(images)
    sampling = Sampling(100, one_question_per_image=True, stratify_by_tiling=True, tiles=Tiles())
    sample = crops(draw_requests(synthetic, sampling, "none", "exp1")).value_counts()
    for tiling, share in population.items():
        assert abs(sample.get(tiling, 0) - 100 * share) <= 1


def test_too_many_samples(files: QuestionSource) -> None:
    with pytest.raises(
        DataError, match=r"num_samples=11 .* has 10 questions on 5 images; ask for 1 to 10 by exp1"
    ):
        draw_requests(files, Sampling(11), "none", "exp1")
    with pytest.raises(DataError, match=r"num_samples=6 .* 5 images and one question of each"):
        draw_requests(files, Sampling(6, one_question_per_image=True), "none", "exp1")
    assert len(draw_requests(files, Sampling(10), "none", "exp1")) == 10
    with pytest.raises(DataError, match="num_samples=0"):
        draw_requests(files, Sampling(0), "none", "exp1")
    with pytest.raises(DataError, match="expected random or first"):
        draw_requests(files, Sampling(1, order="last"), "none", "exp1")


def test_answers_are_asked_for_only_where_needed(official: Any) -> None:
    official.annotations_path.unlink()
    source = open_source(source="official", path=official.root)
    assert len(draw_requests(source, Sampling(3), "natural", "exp1")) == 3
    with pytest.raises(DataError, match=r"3 of 3 drawn questions have no answer.*annotations"):
        draw_requests(source, Sampling(3), "answer", "exp1")


@pytest.mark.parametrize("rule", ["long", 0, -3, "1.5", ""])
def test_output_length_rules(files: QuestionSource, rule: Any) -> None:
    with pytest.raises(DataError, match="expected natural, answer, none or a positive number"):
        draw_requests(files, Sampling(1), rule, "exp1")


@pytest.mark.parametrize("stratify_by_tiling", [False, True])
def test_missing_and_corrupt_images_fail_alone(official: Any, stratify_by_tiling: bool) -> None:
    official.image(1).unlink()
    official.image(2).write_bytes(b"no image")
    official.image(3).write_bytes(official.image(3).read_bytes()[:-300])
    source = open_source(source="official", path=official.root)
    sampling = Sampling(stratify_by_tiling=stratify_by_tiling, tiles=Tiles())
    requests = draw_requests(source, sampling, "answer", "exp1").set_index("image_id").sort_index()
    unknown = requests["image_width"].isna().groupby(level=0).all()
    assert unknown.tolist() == [True, True, False, False, False]
    messages = {1: "missing", 2: "cannot be decoded", 3: "cannot be decoded"}
    for image_id, message in messages.items():
        with pytest.raises(DataError, match=message):
            decode_image(image_bytes(requests.loc[str(image_id)].iloc[0], source.root))
    assert decode_image(image_bytes(requests.loc["4"].iloc[0], source.root)).size == (80, 40)


def test_vision_sweep_hits_every_grid_once() -> None:
    requests = sweep_vision_requests(Tiles(), 12)
    counts = [
        image_token_counts(width, height)
        for width, height in zip(requests["image_width"], requests["image_height"], strict=True)
    ]
    assert [(each.tiling_rows, each.tiling_cols) for each in counts] == list(
        zip(requests["tiling_rows"], requests["tiling_cols"], strict=True)
    )
    ladder = [each.num_vision_tokens for each in counts[:12]]
    assert ladder == [288, 384, 480, 576, 672, 768, 864, 960, 1056, 1152, 1248, 1344]
    groups: dict[str, set[tuple[int, int]]] = {}
    for pair, each in zip(requests["pair"], counts, strict=True):
        if not pd.isna(pair):
            groups.setdefault(pair, set()).add((each.num_crops, each.num_vision_tokens))
    assert groups == {
        "7 crops": {(7, 704), (7, 768)},
        "13 crops": {(13, 1152), (13, 1184), (13, 1344)},
    }
    row = requests.iloc[3]
    assert (row.request_id, row.grid, row.resolution) == ("exp3-1x4", "1×4", "1008x336")
    assert (row.output_length, row.synthetic) == ("none", True)
    assert decode_image(image_bytes(row, None)).size == (1008, 336)


def test_vision_sweep_without_partners_or_pairs() -> None:
    ids = sweep_vision_requests(Tiles(), 4)["request_id"].tolist()
    assert ids == ["exp3-1x1", "exp3-1x2", "exp3-1x3", "exp3-1x4"]
    assert sweep_vision_requests(Tiles(), 11)["request_id"].tolist()[11:] == ["exp3-2x3"]
    assert len(sweep_vision_requests(Tiles(), 12, equal_crop_pairs=False)) == 12
    with pytest.raises(DataError, match=r"max_grid_size=13 .* at most 12"):
        sweep_vision_requests(Tiles(), 13)
    with pytest.raises(DataError, match=r"max_grid_size=5 .* at most 4"):
        sweep_vision_requests(Tiles(max_crops=4), 5)
    with pytest.raises(DataError, match="expected exact or seed"):
        sweep_vision_requests(Tiles(), 2, resolution_rule="sed")


def test_vision_sweep_of_the_seed() -> None:
    requests = sweep_vision_requests(Tiles(), 12, equal_crop_pairs=False, resolution_rule="seed")
    sizes = list(zip(requests["image_width"], requests["image_height"], strict=True))
    assert sizes == [(336 * k, 336) for k in range(1, 13)]
    tilings = [select_tiling(height, width) for width, height in sizes]
    assert tilings == [(1, k) for k in (1, 3, 4, 6, 7, 9, 10, 12, 12, 12, 12, 12)]
    assert not set(requests["request_id"]) & set(sweep_vision_requests(Tiles())["request_id"])


def test_sizes_sweep() -> None:
    requests = sweep_sizes_requests([(336, 336), (672, 336), (336, 336)])
    assert requests["request_id"].tolist() == ["exp3-336x336", "exp3-672x336"]
    assert requests["tiling_rows"].isna().all()
    assert decode_image(image_bytes(requests.iloc[1], None)).size == (672, 336)
    for sizes in ([], [(0, 5)], [(5, 20_000)]):
        with pytest.raises(DataError, match="expected at least one width and height"):
            sweep_sizes_requests(sizes)


@pytest.mark.parametrize("kind", ["files", "synthetic"])
def test_language_sweep(kind: str, request: pytest.FixtureRequest) -> None:
    source = request.getfixturevalue(kind)
    requests = sweep_language_requests(source, Sampling(3, seed=2, tiles=Tiles()), [8, 16, 8])
    assert len(requests) == 6
    by_length = requests.groupby("output_length")["question_id"].agg(list)
    assert by_length["8"] == by_length["16"]
    row = requests.iloc[0]
    assert row.request_id == f"exp4-{row.question_id}-n8"
    assert (row.grid, row.resolution) == ("2×3", "784x560")
    for _, each in requests.iterrows():
        assert decode_image(image_bytes(each, source.root)).size == (784, 560)
        tokens = image_token_counts(each.image_width, each.image_height)
        assert (tokens.tiling_rows, tokens.tiling_cols, tokens.num_vision_tokens) == (2, 3, 704)
    if kind == "files":  # the photo is the same one, brought to the size
        assert row.image_path.startswith("val2014/")
    assert image_bytes(row, source.root) == image_bytes(requests.iloc[3], source.root)


def test_language_sweep_as_they_are(files: QuestionSource) -> None:
    requests = sweep_language_requests(files, Sampling(2, tiles=Tiles()), [8], tiling=None)
    drawn = draw_requests(files, Sampling(2), "none", "exp4")
    assert requests["image_recipe"].isna().all()
    assert requests["resolution"].tolist() == drawn["resolution"].tolist()
    with pytest.raises(DataError, match="tiling 4x4 has 16 tiles"):
        sweep_language_requests(files, Sampling(2, tiles=Tiles()), [8], tiling=(4, 4))
    with pytest.raises(DataError, match="no output lengths"):
        sweep_language_requests(files, Sampling(2, tiles=Tiles()), [])
    with pytest.raises(DataError, match="output_length 0"):
        sweep_language_requests(files, Sampling(2, tiles=Tiles()), [0])


def test_real_photos(shared: Path) -> None:
    source = open_source(source="official", path=shared / "real" / "vqa_v2_mini")
    assert (len(source.table), source.describe()["images"]) == (120, 40)
    requests = draw_requests(
        source,
        Sampling(40, one_question_per_image=True, stratify_by_tiling=True, tiles=Tiles()),
        "answer",
        "exp1",
    )
    for _, row in requests.iterrows():
        assert decode_image(image_bytes(row, source.root)).size == (
            row.image_width,
            row.image_height,
        )
    sweep = sweep_language_requests(source, Sampling(2, tiles=Tiles()), [8])
    assert decode_image(image_bytes(sweep.iloc[0], source.root)).size == (784, 560)


def test_importing_it_is_light() -> None:
    code = (
        "import sys, vlm_latency.vqa as v; v.open_source(size=3); "
        "heavy = {'torch', 'transformers', 'datasets', 'kedro'} & set(sys.modules); "
        "sys.exit(str(heavy) if heavy else 0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
