from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vlm_latency.instrument import environment as module
from vlm_latency.instrument.environment import code_hash, environment, fingerprint
from vlm_latency.models import describe
from vlm_latency.options import MeasurementOptions, ModelOptions, Options

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


# Every option of model.* and measurement.*: what changes a number (value: another one), or why not.
CONDITIONS: dict[str, Any] = {
    "model.name": "tiny-llava",
    "model.dtype": "bfloat16",
    "model.attn_implementation": "eager",
    "model.sdpa_backend": "math",
    "model.float32_attention": False,
    "model.engine": "static",
    "model.max_crops": 4,
    "model.seed": 1,
    "model.trust_remote_code": True,
    "model.num_threads": 2,
    "measurement.method": "hook",
    "measurement.max_new_tokens": 5,
    "measurement.order": "ascending",
    "measurement.warmup": "fixed",
    "measurement.warmup_runs": 2,
    "measurement.warmup_max_runs": 9,
    "measurement.lengths": "cold",
    "measurement.quiet_seconds": 0.5,
    "measurement.nvtx": True,
}
NO_CONDITION: dict[str, tuple[Any, str]] = {
    "measurement.num_runs": (9, "more of the same"),
    "measurement.noise_repeats": (9, "more of the same"),
    "measurement.seed": (5, "the order of the runs, which every row tells"),
    "measurement.output_length": ("7", "in every request, and in its hash"),
    "measurement.resume": (False, "what is done with earlier runs"),
    "measurement.allow_partial": (True, "what is reported"),
    "measurement.max_failures": (0.5, "when a command gives up"),
    "measurement.chunk_size": (1, "how often runs are written, between them"),
    "measurement.shard": ("1/2", "which runs are made here"),
}
ELSEWHERE = {  # settled into others, or tested below
    "model.revision": "of a hub id alone, by the commit that it stands for",
    "model.weights": "pretrained needs a checkpoint: by its contents",
    "model.zoo_file": "by what it says of the model",
    "model.device": "by the device that it comes to",
    "model.null_sleep_ms": "of the null model alone",
    "measurement.use_hook_for_llm_prefill": "settled into the method",
    "measurement.workers": "described as conditions.workers where there are several",
}


def changed(option: str, value: Any) -> str:
    group, _, name = option.partition(".")
    return mark(**{group: {name: value}})


@pytest.mark.parametrize("option", CONDITIONS)
def test_what_could_change_a_number_changes_the_fingerprint(option: str) -> None:
    assert changed(option, CONDITIONS[option]) != mark()


@pytest.mark.parametrize("option", NO_CONDITION)
def test_more_of_the_same_has_the_same_fingerprint(option: str) -> None:
    value, _ = NO_CONDITION[option]
    assert changed(option, value) == mark()


def test_every_option_is_a_condition_or_it_is_said_why_not() -> None:
    fields = {"model": ModelOptions.model_fields, "measurement": MeasurementOptions.model_fields}
    every = [f"{group}.{name}" for group, names in fields.items() for name in names]
    assert sorted([*CONDITIONS, *NO_CONDITION, *ELSEWHERE]) == sorted(every)


def test_questions_and_prompt_are_conditions_but_not_how_many() -> None:
    assert mark(template="vqa2: {question}") != mark()
    assert mark(dataset={**DATASET, "source": "official"}) != mark()
    assert mark(dataset={**DATASET, "questions": 1000}) == mark()


def test_two_sleeps_of_the_null_model_never_share_a_journal() -> None:
    null = {"name": "null-model"}
    first = mark(model=null)
    assert mark(model={**null, "null_sleep_ms": 5}) != first
    assert mark(model={"null_sleep_ms": 5}) == mark()  # others do not sleep


def test_hook_by_its_other_name_is_the_method() -> None:
    given = {"model": {"name": "null-model"}, "measurement": {"use_hook_for_llm_prefill": True}}
    settled = Options.from_parameters(given).experiment("exp3", "random").measurement
    assert settled.method == "hook"


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
