from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vlm_latency.instrument import environment as module
from vlm_latency.instrument.environment import code_hash, environment, fingerprint
from vlm_latency.models import describe
from vlm_latency.options import MeasurementOptions, ModelOptions

DATASET = {"name": "coco", "source": "synthetic", "split": "validation", "questions": 7, "seed": 3}


def record(
    model: dict[str, Any] | None = None,
    measurement: dict[str, Any] | None = None,
    dataset: dict[str, Any] | None = None,
    template: str = "{question}",
) -> dict[str, Any]:
    options = ModelOptions(**{"name": "tiny-molmo", "device": "cpu", **(model or {})})
    return environment(
        options,
        MeasurementOptions(**(measurement or {})),
        architecture=describe(options),
        dataset=dataset or DATASET,
        template=template,
    )


def test_the_record_says_on_what_and_how() -> None:
    found = record()
    assert json.loads(json.dumps(found)) == found
    assert found["hardware"]["cpu"]
    assert found["hardware"]["logical_cores"] >= 1
    assert {"python", "torch", "transformers", "os"} <= set(found["software"])
    assert found["model"]["weights"] == "random"
    assert found["model"]["dtype"] == "float32"
    assert found["model"]["num_threads"] == 1
    assert found["seeds"] == {"model": 0, "measurement": 0, "dataset": 3}
    assert found["dataset"] == DATASET
    assert "float32, sdpa, eager" in found["line"]
    assert found["model"]["float32_attention"] is True  # as the reference, though nobody asked
    assert record({"float32_attention": False})["model"]["float32_attention"] is False
    assert record({"name": "tiny-llava"})["model"]["float32_attention"] is None
    assert len(found["code"]["sha256"]) == 16


def mark(**changes: Any) -> str:
    return fingerprint(record(**changes)["conditions"])


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"dtype": "bfloat16"}},
        {"model": {"engine": "static"}},
        {"model": {"attn_implementation": "eager"}},
        {"model": {"num_threads": 2}},
        {"model": {"seed": 1}},
        {"model": {"max_crops": 4}},
        {"measurement": {"method": "hook"}},
        {"measurement": {"max_new_tokens": 5}},
        {"template": "vqa2: {question}"},
        {"dataset": {**DATASET, "source": "official"}},
    ],
)
def test_what_could_change_a_number_changes_the_fingerprint(changes: dict[str, Any]) -> None:
    assert mark(**changes) != mark()


@pytest.mark.parametrize(
    "changes",
    [
        {"measurement": {"num_runs": 9}},
        {"measurement": {"noise_repeats": 9}},
        {"measurement": {"chunk_size": 1}},
        {"measurement": {"resume": False}},
        {"measurement": {"allow_partial": True}},
        {"measurement": {"seed": 5}},
        {"dataset": {**DATASET, "questions": 1000}},
    ],
)
def test_more_of_the_same_has_the_same_fingerprint(changes: dict[str, Any]) -> None:
    assert mark(**changes) == mark()


def test_the_null_model_needs_no_torch() -> None:
    options = ModelOptions(name="null-model")
    found = environment(
        options, MeasurementOptions(), architecture=describe(options), dataset={}, template="{question}"
    )  # fmt: skip
    assert found["model"]["device"] == "cpu"


@pytest.mark.parametrize(
    "name",
    [
        "model-00001-of-00002.safetensors",
        "config.json",
        "preprocessor_config.json",
        "tokenizer.json",
        "generation_config.json",
        "chat_template.jinja",
    ],
)
def test_a_checkpoint_in_a_folder_is_known_by_its_contents(tmp_path: Path, name: str) -> None:
    def revision() -> str | None:
        return module._revision(ModelOptions(name=str(tmp_path)))

    (tmp_path / name).write_bytes(b'{"max_crops": 12}')
    first = revision()
    assert first == revision()
    (tmp_path / "README.md").write_text("notes")
    assert revision() == first
    (tmp_path / name).write_bytes(b'{"max_crops": 22}')  # of the same size
    assert revision() != first


@pytest.mark.parametrize("settings", ["image_settings", "processor_settings"])
def test_settings_of_a_zoo_file_change_the_fingerprint(tmp_path: Path, settings: str) -> None:
    zoo = tmp_path / "zoo.yml"
    marks = set()
    for value in (1, 2):
        said = f"{settings}: {{some: {value}}}, config: {{model_type: molmo}}"
        zoo.write_text(f"models:\n  mine: {{{said}}}\n")
        options = ModelOptions(name="mine", zoo_file=str(zoo))
        marks.add(module._zoo(options, "molmo"))
    assert len(marks) == 2


def test_the_code_hash_covers_what_runs_while_the_clock_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    covered = [path for pattern in module.MEASURING_CODE for path in module.ROOT.glob(pattern)]
    names = {path.relative_to(module.ROOT).as_posix() for path in covered}
    assert {"models/loading.py", "molmo/modeling.py", "reduction/hooks.py"} <= names
    beside = {"__init__", "attribution", "ceilings", "environment", "explain", "injection"}
    instrument = {path.stem for path in (module.ROOT / "instrument").glob("*.py")}
    assert {f"instrument/{name}.py" for name in instrument - beside} == {
        name for name in names if name.startswith("instrument/")
    }
    assert not any("plots" in name or "calibration" in name for name in names)
    (tmp_path / "instrument").mkdir()
    source = tmp_path / "instrument" / "clock.py"
    monkeypatch.setattr(module, "ROOT", tmp_path)
    hashes = []
    for text in (b"a\n", b"a\r\n", b"b\n"):
        source.write_bytes(text)
        code_hash.cache_clear()
        hashes.append(code_hash())
    code_hash.cache_clear()
    assert hashes[0] == hashes[1] != hashes[2]
