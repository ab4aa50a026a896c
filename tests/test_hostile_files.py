"""Whatever is in a user's file, its reader gives what is right or one sentence: no other error."""

from __future__ import annotations

import io
import json
import random
import warnings
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from kedro.io import DatasetError
from PIL import Image
from safetensors.torch import save_file

from vlm_latency import load_model, measure
from vlm_latency.contents import Memory
from vlm_latency.datasets import GivenRequests
from vlm_latency.errors import UserError
from vlm_latency.journal import Journal, _lines, _table
from vlm_latency.models.own import _call
from vlm_latency.models.weights import check_weights
from vlm_latency.models.zoo import load_zoo
from vlm_latency.page import build_page, collect_results
from vlm_latency.records import MEASURED_COLUMNS, REQUEST_COLUMNS, SCHEMA_VERSION, typed
from vlm_latency.results import entry_table, read_earlier, read_run, result_path
from vlm_latency.vqa import open_source
from vlm_latency.vqa.folder import open_folder
from vlm_latency.vqa.official import open_official

WEIRD: tuple[Any, ...] = (
    *(None, True, -1, 0, 2**70, 1e308, -1e308, float("nan"), float("inf"), "", "x", "\ud800", "$"),
    *([], [[[]]], {}, {"value": None}, [1, "a"], "9" * 5000, {"a": {"b": [1e308]}}),
)
BYTES = (
    b"\xff\xfe",
    b"\x00" * 9,
    b"[" * 100_000,
    b'{"a":' * 5000,
    b"1e308",
    b"9" * 5000,
    b"\n",
    b"'",
)


# ---- the mutations


def mutated(content: bytes, draw: random.Random) -> bytes:
    """Change a file as accidents and strangers do."""
    for _ in range(draw.choice((1, 1, 2, 4))):
        place = draw.randrange(len(content) + 1)
        kind = draw.choice(("bits", "cut", "put", "drop", "swap", "swap", "swap"))
        if kind == "bits" and content:
            place = min(place, len(content) - 1)
            flipped = bytes([content[place] ^ (1 << draw.randrange(8))])
            content = content[:place] + flipped + content[place + 1 :]
        elif kind == "cut":
            content = content[:place]
        elif kind == "put":
            content = content[:place] + draw.choice(BYTES) + content[place:]
        elif kind == "drop":
            content = content[:place] + content[place + draw.randrange(1, 50) :]
        else:
            content = swapped(content, draw)
    return content


def swapped(content: bytes, draw: random.Random) -> bytes:
    """Put something else in place of a value of a JSON file or of one of its lines."""
    lines = content.split(b"\n")
    number = draw.randrange(len(lines))
    whole, part = parsed(content), parsed(lines[number])
    if whole is not None:
        return json.dumps(changed(whole, draw)).encode()
    if part is not None:
        lines[number] = json.dumps(changed(part, draw)).encode()
        return b"\n".join(lines)
    return content


def parsed(content: bytes) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def changed(tree: Any, draw: random.Random) -> Any:
    if isinstance(tree, dict | list) and tree and draw.random() < 0.85:
        keys = list(tree) if isinstance(tree, dict) else range(len(tree))
        key = draw.choice(keys)
        tree[key] = changed(tree[key], draw)
        return tree
    return draw.choice(WEIRD)


# ---- the readers: each makes its files whole, and says which are changed and how they are read


def official(folder: Path) -> tuple[list[str], Callable[[], Any]]:
    questions = [{"question_id": n, "image_id": 42, "question": "What?"} for n in range(3)]
    answers = [{"answer": "a", "answer_confidence": "yes", "answer_id": 1}]
    told = {"question_type": "what", "answer_type": "other", "multiple_choice_answer": "a"}
    notes = [{"question_id": n, "image_id": 42, "answers": answers, **told} for n in range(3)]
    files = {
        "v2_OpenEnded_mscoco_val2014_questions.json": {"questions": questions},
        "v2_mscoco_val2014_annotations.json": {"annotations": notes},
    }
    (folder / "val2014").mkdir()
    (folder / "val2014" / "COCO_val2014_000000000042.jpg").touch()
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    return list(files), lambda: open_official("vqa", "validation", folder).describe()


def own_questions(suffix: str) -> Callable[[Path], tuple[list[str], Callable[[], Any]]]:
    def make(folder: Path) -> tuple[list[str], Callable[[], Any]]:
        Image.new("RGB", (8, 8)).save(folder / "a.png")
        rows = [{"image": "a.png", "question": f"What {n}?", "answers": '["a"]'} for n in range(3)]
        if suffix == "csv":
            pd.DataFrame(rows).to_csv(folder / "questions.csv", index=False)
        else:
            (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, rows)))
        return [f"questions.{suffix}"], lambda: open_folder("own", "validation", folder).describe()

    return make


def zoo(folder: Path) -> tuple[list[str], Callable[[], Any]]:
    config = {"model_type": "llava", "text_config": {"num_hidden_layers": 2}}
    family = {"tokens": {"image": "<image>"}, "image_settings": {"size": 3}, "more": []}
    content = {"models": {"mine": {"config": config}}, "families": {"llava": family}}
    (folder / "zoo.yml").write_text(json.dumps(content))
    return ["zoo.yml"], lambda: load_zoo(str(folder / "zoo.yml"))


ENTRY = {"request_id": "exp3-1x1", "grid": "1x1", "T_total": 3.5, "num_crops": 2, "flops_total": 7}


def results(folder: Path) -> tuple[list[str], Callable[[], Any]]:
    about = {"model": {"name": "m"}, "conditions": {"model": {}}, "dataset": {}, "line": "a cpu"}
    content = {"experiment": "exp3", "results": [ENTRY, ENTRY], "environment": about}
    path = result_path(folder, "exp3")
    path.parent.mkdir()
    path.write_text(json.dumps({**content, "coverage": {"planned": 2}, "claims": []}))

    def read() -> None:
        assert (
            b"<html" in build_page(collect_results(folder)).encode()
        )  # a line on it, never an error
        entry_table(read_earlier(path, "exp3"), "exp3")
        read_run(folder)

    return [path.relative_to(folder).as_posix()], read


def records(folder: Path) -> tuple[list[str], Callable[[], Any]]:
    results(folder)
    rows = pd.DataFrame({**ENTRY, "status": ["ok", "failed"], "run_index": [0, 1]})
    rows.to_parquet(folder / "exp3" / "exp3_records.parquet", compression=None)
    return ["exp3/exp3_records.parquet"], lambda: read_run(folder)


def given_requests(folder: Path) -> tuple[list[str], Callable[[], Any]]:
    asked = {"request_id": ["exp1-1"], "experiment": "exp1", "output_length": "answer"}
    typed(pd.DataFrame(asked), REQUEST_COLUMNS).to_parquet(folder / "r.parquet", compression=None)
    files = {"exp1": str(folder / "r.parquet")}
    return ["r.parquet"], GivenRequests(experiment="exp1", files=files).load


def journal(folder: Path) -> tuple[list[str], Callable[[], Any]]:
    row = {"request_id": "exp1-1", "request_sha256": "f", "run_index": 0, "fingerprint": "aa"}
    row |= {"status": "ok", "decode_step_ms": [0.5, 2], "first_of_shape": True}
    head = {"schema_version": SCHEMA_VERSION, "fingerprint": "aa", "conditions": {"model": {}}}
    ended, began = {"session": {"seconds": 1}}, {"session": {"began": {"code": {}}}}
    lines = [head, began, {**row, "T_total": 2.5}, ended, row, {**row, "run_index": 2}]
    (folder / "aa.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def read() -> None:
        log = Journal(folder)
        log.read("aa"), log.sessions("aa"), log.began("aa"), log.conditions(log.path("aa"))
        at_once = _table(log.path("aa"), "aa")
        if at_once is not None:
            runs = [run for run in _lines(log.path("aa"), "aa") if "session" not in run]
            pd.testing.assert_frame_equal(at_once, typed(pd.DataFrame(runs), MEASURED_COLUMNS))
        log.append("aa", {"model": {}}, [{**row, "run_index": 1}])
        log.close()
        log.read("aa")

    return ["aa.jsonl"], read


def weights(folder: Path) -> tuple[list[str], Callable[[], Any]]:
    save_file({"a": torch.zeros(2, 3), "b": torch.zeros(4)}, folder / "model-1.safetensors")
    names = {"weight_map": {"a": "model-1.safetensors", "b": "model-1.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(names))
    read = lambda: check_weights(folder)  # noqa: E731
    return ["model-1.safetensors", "model.safetensors.index.json"], read


def own_model(folder: Path) -> tuple[list[str], Callable[[], Any]]:
    (folder / "mine.py").write_text(
        "def make():\n    sizes = [1, 2]\n    return sizes[0], {'a': 3}\n"
    )
    return ["mine.py"], lambda: _call(folder / "mine.py", "make")


def hub(folder: Path) -> tuple[list[str], Callable[[], Any]]:
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "PNG")
    rows = {
        "question": ["What?", "Who?"],
        "question_id": [1, 2],
        "image_id": [1, 1],
        "answers": [[{"answer": "a", "answer_id": 1}]] * 2,
        "image": [{"bytes": picture.getvalue(), "path": "1.png"}] * 2,
    }
    (folder / "data").mkdir()
    name = "data/validation-00000-of-00001.parquet"
    pq.write_table(pa.table(rows), folder / name, compression="none")

    def read() -> None:
        cache = folder / "cache"
        source = open_source(source="hub", hub_id=str(folder / "data"), image_cache=cache)
        source.describe(), source.with_images(source.table)

    return [name], read


QUICK: dict[str, Any] = {
    "num_runs": 1,
    "output_length": 2,
    "warmup": "fixed",
    "warmup_runs": 0,
    "lengths": "cold",
}
TEMPLATE = """{% for message in messages %}USER: {% for part in message['content'] %}
{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}{% endfor %}
{% endfor %}{% if add_generation_prompt %}ASSISTANT:{% endif %}"""


tiny = cache(lambda name: load_model(name, device="cpu"))


def checkpoint(
    *names: str, model: str = "tiny-llava"
) -> Callable[[Path], tuple[list[str], Callable[[], Any]]]:
    def make(folder: Path) -> tuple[list[str], Callable[[], Any]]:
        processor = tiny(model).preparer.processor
        tiny(model).model.save_pretrained(folder)
        processor.save_pretrained(folder)
        if "preprocessor_config.json" in names:  # where older checkpoints have it
            processor.image_processor.save_pretrained(folder)
            (folder / "processor_config.json").unlink()
        if model == "tiny-llava":
            (folder / "chat_template.jinja").write_text(TEMPLATE)

        def read() -> None:
            with warnings.catch_warnings():  # advice of transformers on what it reads
                warnings.simplefilter("ignore")
                found = load_model(str(folder), device="cpu")
                measure(found, [(Image.new("RGB", (60, 40)), "What is it?")], **QUICK)

        return list(names), read

    return make


# Loading takes a second: these are tried less often, and with --slow only.
SETTINGS = ("config.json", "processor_config.json", "tokenizer_config.json", "tokenizer.json")
CHECKPOINTS = {
    "generation": checkpoint("generation_config.json"),
    "template": checkpoint("chat_template.jinja"),
    "llava": checkpoint(*SETTINGS),
    "molmo": checkpoint(*SETTINGS, model="tiny-molmo"),
    "images": checkpoint("preprocessor_config.json"),
    "loaded weights": checkpoint("model.safetensors"),
}
READERS = {
    "hub": hub,
    "official": official,
    "csv": own_questions("csv"),
    "jsonl": own_questions("jsonl"),
    "zoo": zoo,
    "results": results,
    "records": records,
    "requests": given_requests,
    "journal": journal,
    "weights": weights,
    "own model": own_model,
}


def attack(folder: Path, make: Callable[[Path], Any], times: int, seed: int) -> set[str]:
    """Read a folder with one file changed, so many times; what came out of it."""
    names, read = make(folder)
    read()  # whole, it is read
    whole = {name: (folder / name).read_bytes() for name in names}
    draw, seen = random.Random(seed), set()
    for number in range(times):
        for name, content in whole.items():
            (folder / name).write_bytes(content)
        name = draw.choice(names)
        (folder / name).write_bytes(mutated(whole[name], draw))
        try:
            read()
            seen.add("right")
        except UserError as error:
            assert str(error), number
            seen.add("refused")
        except DatasetError as error:  # Kedro's own, around it; the command line looks inside
            assert isinstance(error.__cause__, UserError), number
            seen.add("refused")
        except Exception as error:
            error.add_note(f"seed {seed}, number {number}, file {name}")
            raise
    return seen


@pytest.mark.filterwarnings("ignore::SyntaxWarning")
@pytest.mark.parametrize("reader", READERS)
def test_a_changed_file_is_read_right_or_refused(reader: str, tmp_path: Path) -> None:
    assert attack(tmp_path, READERS[reader], times=60, seed=0) == {"right", "refused"}


def test_a_changed_cache_is_right_or_forgotten(tmp_path: Path) -> None:
    path, kept = tmp_path / "a.json", {"facts": {"a": 1, "b": [2.5]}, "more": {}}
    memory = Memory(path, tuple(kept))
    memory["facts"].update(kept["facts"])
    memory.save()
    assert Memory(path, tuple(kept)).sections == kept
    whole, draw = path.read_bytes(), random.Random(0)
    for _ in range(300):
        path.write_bytes(mutated(whole, draw))
        assert Memory(path, tuple(kept)).sections in (kept, {"facts": {}, "more": {}})


@pytest.mark.slow
@pytest.mark.parametrize("reader", CHECKPOINTS)
def test_a_changed_checkpoint_is_loaded_right_or_refused(reader: str, tmp_path: Path) -> None:
    assert attack(tmp_path, CHECKPOINTS[reader], times=60, seed=0) == {"right", "refused"}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::SyntaxWarning")
@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("seed", range(1, 5))
def test_many_changed_files_are_read_right_or_refused(
    reader: str, seed: int, tmp_path: Path
) -> None:
    assert attack(tmp_path, READERS[reader], times=1000, seed=seed) == {"right", "refused"}


@pytest.mark.parametrize("value", WEIRD)
@pytest.mark.parametrize("key", ["T_total", "flops_total", "num_crops", "request_id", "grid"])
def test_a_value_of_any_kind_in_a_result_is_a_number_or_refused(
    key: str, value: Any, tmp_path: Path
) -> None:
    results(tmp_path)
    path = result_path(tmp_path, "exp3")
    content = json.loads(path.read_text())
    content["results"][0][key] = value
    path.write_text(json.dumps(content))
    try:
        table = entry_table(read_earlier(path, "exp3"), "exp3")
    except UserError:
        return
    if key.startswith(("T_", "flops_", "num_")):
        numbers = table[key].astype(float).dropna()
        assert (numbers.abs() <= 1e30).all()


def test_columns_of_other_types_in_records_are_refused(tmp_path: Path) -> None:
    records(tmp_path)
    path = tmp_path / "exp3" / "exp3_records.parquet"
    whole = pd.read_parquet(path)
    for name, value in (("T_total", "fast"), ("run_index", "x"), ("num_crops", np.nan)):
        whole.assign(**{name: [value, value]}).to_parquet(path)
        if isinstance(value, str):
            with pytest.raises(
                UserError, match=r"exp3_records.parquet is not the table of records"
            ):
                read_run(tmp_path)
    for name in ("status", "T_total"):
        whole.drop(columns=name).to_parquet(path)
        with pytest.raises(UserError, match=f"has no column {name}"):
            read_run(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"models: {mine: {config: null}}",
        b"models: {mine: null}",
        b"models: [1]",
        b"families: {llava: 3}",
        b"caf\xe9: 1",
        b"\xff\xfe",
        b"models: {mine: {config: {model_type: llava}, image_settings: 3}}",
    ],
)
def test_a_zoo_file_that_is_none_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "zoo.yml").write_bytes(content)
    with pytest.raises(UserError, match=r"zoo file .*zoo\.yml"):
        load_zoo(str(tmp_path / "zoo.yml"))


@pytest.mark.parametrize(
    ("file", "path", "value"),
    [
        ("config.json", ("text_config", "num_attention_heads"), 0),
        ("config.json", ("text_config", "hidden_size"), 0),
        ("config.json", ("text_config", "num_hidden_layers"), "two"),
        ("config.json", ("text_config", "rms_norm_eps"), "small"),
        ("config.json", ("vision_config", "patch_size"), 0),
        ("config.json", ("vision_config",), None),
        ("config.json", ("model_type",), 7),
        ("processor_config.json", ("image_processor", "size"), [0]),
        ("tokenizer.json", ("model",), {}),
    ],
)
def test_a_checkpoint_of_impossible_settings_is_refused(
    file: str, path: tuple[str, ...], value: Any, tmp_path: Path
) -> None:
    _, read = checkpoint(file)(tmp_path)
    content = json.loads((tmp_path / file).read_text())
    group = content
    for name in path[:-1]:
        group = group[name]
    assert path[-1] in group
    group[path[-1]] = value
    (tmp_path / file).write_text(json.dumps(content))
    with pytest.raises(UserError):
        read()


def test_records_that_are_no_parquet_are_named(tmp_path: Path) -> None:
    records(tmp_path)
    (tmp_path / "exp3" / "exp3_records.parquet").write_bytes(b"request_id,T_total\n1,2\n")
    with pytest.raises(UserError, match=r"exp3_records.parquet is not the table of records"):
        read_run(tmp_path)
