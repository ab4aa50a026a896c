"""The library without Kedro: measuring a model object of one's own, and several in turn."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import vlm_latency
from vlm_latency import api, compare, load_model, measure
from vlm_latency.errors import DataError, MeasurementError, ModelError, UserError
from vlm_latency.models.null import NullMeter, NullVLM
from vlm_latency.options import ModelOptions
from vlm_latency.records import MEASURED_COLUMNS
from vlm_latency.statistics import compare_tables, percentile
from vlm_latency.vqa import Sampling, draw_requests, open_source

README = Path(__file__).parents[1] / "README.md"
HEADING = "## Measure your own model"


class Scripted(NullVLM):
    """A model that takes as long as it is told, and notes when it was its turn."""

    def __init__(self, name, milliseconds, turns=None, prefill_length=None):
        super().__init__(ModelOptions(name=name))
        self.milliseconds = milliseconds
        self.turns = [] if turns is None else turns
        self.prefill_length = prefill_length

    def meter(self, make):
        return ScriptedMeter(self)


class ScriptedMeter(NullMeter):
    def __init__(self, vlm):
        super().__init__()
        self.vlm = vlm

    def __call__(self, prepared, max_new_tokens, stop_at_eos=False):
        self.vlm.turns.append(self.vlm.options.name)
        reading = super().__call__(prepared, max_new_tokens, stop_at_eos)
        total = self.vlm.milliseconds(len(self.vlm.turns))
        reading.times.update(T_total=total, T_LLM_prefill=total)
        reading.prefill_length = self.vlm.prefill_length
        return reading


def drifting(turn):
    return 50.0 + 0.1 * turn


@pytest.fixture(scope="module")
def photo():
    return Image.effect_noise((96, 72), 64)


@pytest.fixture
def requests(photo):
    return [(photo, "What is it?"), (photo, "Where is it?")]


def test_records_have_the_columns_of_the_record(requests):
    records = measure("null-model", requests, num_runs=3, output_length=5)
    assert list(records.columns) == list(MEASURED_COLUMNS)
    assert len(records) == 6 and set(records["status"]) == {"ok"}
    assert records["order_index"].tolist() == list(range(6))
    assert set(records["num_output_tokens"]) == {5}
    assert set(records["model"]) == {"null-model"}
    assert sorted(records[["request_id", "run_index"]].itertuples(index=False, name=None)) == [
        (f"request-{request}", run) for request in range(2) for run in range(3)
    ]


def test_images_come_from_files_too(tmp_path, photo):
    photo.save(tmp_path / "photo.png")
    found = measure("null-model", [(tmp_path / "photo.png", "What is it?")], num_runs=1)
    assert found[["image_width", "image_height"]].to_numpy().tolist() == [[96, 72]]
    assert found["num_output_tokens"].tolist() == [int(api.OUTPUT_LENGTH)]


def test_a_drawn_table_keeps_its_output_lengths():
    source = open_source(source="synthetic", size=9)
    table = draw_requests(source, Sampling(num_samples=3), 4, "exp1")
    assert set(measure("null-model", table, num_runs=1)["num_output_tokens"]) == {4}
    assert set(measure("null-model", table, num_runs=1, output_length=2)["num_output_tokens"]) == {
        2
    }


def test_models_take_turns_run_by_run_in_a_random_order(requests):
    turns = []
    models = {name: Scripted(name, drifting, turns) for name in ("a", "b")}
    result = compare(models, requests, num_runs=15, warmup="fixed", warmup_runs=0, seed=3)
    pairs = {tuple(turns[at : at + 2]) for at in range(0, 60, 2)}
    assert len(turns) == 60 and pairs == {("a", "b"), ("b", "a")}
    first = result.records["a"].set_index(["request_id", "run_index"])["order_index"]
    second = result.records["b"].set_index(["request_id", "run_index"])["order_index"]
    assert set((first - second).abs()) == {1}

    again = []
    models = {name: Scripted(name, drifting, again) for name in ("a", "b")}
    compare(models, requests, num_runs=15, warmup="fixed", warmup_runs=0, seed=3)
    assert again == turns


def test_drift_that_both_feel_is_no_difference(requests):
    turns = []
    models = {name: Scripted(name, drifting, turns) for name in ("a", "b")}
    result = compare(models, requests, num_runs=20)
    assert result.comparisons["b"].verdict == "SAME"
    assert result.comparisons["b"].n_matched == 40
    assert "b against a: SAME (40 pairs" in str(result)


def test_what_is_slower_is_slower_by_so_much(requests):
    turns = []
    models = {
        "a": Scripted("a", drifting, turns),
        "b": Scripted("b", lambda turn: drifting(turn) + 20, turns),
    }
    result = compare(models, requests, num_runs=20)
    difference = result.differences["b"]["T_LLM_prefill"]
    assert result.comparisons["b"].verdict == "SLOWER"
    assert difference.value == pytest.approx(20, abs=0.1)  # of geometric means, under drift
    assert difference.high - difference.low < 0.5
    line = result.table().set_index(["model", "component"]).loc[("b", "T_total")]
    assert line["verdict"] == "SLOWER" and line["n_pairs"] == 40
    assert line["difference_ms"] == result.differences["b"]["T_total"].value
    assert line["ratio_low"] < line["ratio"] < line["ratio_high"]


@pytest.mark.parametrize(
    ("missing", "vision", "language"), [(0, 288, 31), (100, 188, 31), (300, 0, 19)]
)
def test_vision_tokens_are_those_that_went_in(missing, vision, language):
    """Of the prompt's tokens, a model drops the image's first."""
    requests = [(Image.new("RGB", (336, 336)), "What is it?")]
    prompt = measure("null-model", requests, num_runs=1)["num_total_tokens"].item()
    model = Scripted("dropping", drifting, prefill_length=prompt - missing)
    found = measure(model, requests, num_runs=1).iloc[0]
    assert found["num_total_tokens"] == prompt - missing
    assert (found["num_vision_tokens"], found["num_language_tokens"]) == (vision, language)


@pytest.mark.parametrize("name", ["tiny-molmo", "tiny-qwen2.5-vl"])
def test_tokens_that_a_model_drops_are_counted_whatever_the_family(name):
    vlm = load_model(name)
    requests = [(Image.effect_noise((224, 224), 64), "What is it?")]
    pair = (vlm.model, vlm.preparer.processor)
    plain = measure(pair, requests, num_runs=1, warmup_runs=0, output_length=3)

    def drop(decoder, args, inputs):
        if inputs["inputs_embeds"].shape[1] > 1:
            inputs["inputs_embeds"] = inputs["inputs_embeds"][:, 10:]
            inputs["position_ids"] = inputs["position_ids"][..., 10:]
        inputs["attention_mask"] = None
        return args, inputs

    hook = vlm.components.language_model.register_forward_pre_hook(drop, with_kwargs=True)
    found = measure(pair, requests, num_runs=1, warmup_runs=0, output_length=3)
    hook.remove()
    assert found["status"].tolist() == plain["status"].tolist() == ["ok"], found["error"].item()
    assert found["num_vision_tokens"].item() == plain["num_vision_tokens"].item() - 10
    assert found["num_total_tokens"].item() == plain["num_total_tokens"].item() - 10
    assert found["num_language_tokens"].item() == plain["num_language_tokens"].item()
    assert found["kv_cache_bytes"].item() < plain["kv_cache_bytes"].item()
    left = [
        module
        for module in vlm.model.modules()
        if module._forward_hooks or module._forward_pre_hooks
    ]
    assert not left


def test_the_section_of_the_readme_does_what_it_says(monkeypatch, capsys):
    """Half the tokens and 20 ms of thinking come out, and the variant that does nothing is SAME.

    The machine may be busy: what the thinking really took is clocked around it, call by call, and
    a model against itself, in the same turns, shows how much comparisons scatter here and now.
    """
    if not README.is_file():
        pytest.skip("no README.md in this checkout")
    section = README.read_text(encoding="utf-8").partition(HEADING + "\n")[2].partition("\n## ")[0]
    blocks = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert blocks, f"README.md has no Python under {HEADING!r}"
    thinking: list[float] = []

    def clocked(models, requests, **options):
        projector = models["half"][0].model.multi_modal_projector
        start = lambda *_: thinking.append(-time.perf_counter())  # noqa: E731
        projector.register_forward_hook(start, prepend=True)
        projector.register_forward_hook(lambda *_: thinking.append(time.perf_counter()))
        return compare({**models, "itself": models["baseline"]}, requests, **options)

    monkeypatch.setattr(api, "compare", clocked)
    names: dict = {}
    exec("\n".join(blocks), names)
    result, records = names["result"], names["result"].records
    assert str(result) in capsys.readouterr().out
    assert all((table["status"] == "ok").all() for table in records.values())

    before, after = records["baseline"], records["half"]
    assert set(names["records"]["num_vision_tokens"]) == {576}
    assert set(before["num_vision_tokens"]) == {576} and set(after["num_vision_tokens"]) == {288}
    assert set(before["num_total_tokens"] - after["num_total_tokens"]) == {288}
    assert set(before["num_language_tokens"]) == set(after["num_language_tokens"])

    took = 1e3 * np.add(thinking[0::2], thinking[1::2])[-len(after) :]
    assert (took >= 20).all()
    pairs = [
        table.set_index(["request_id", "run_index"])["T_projector"]
        for table in (
            before,
            records["itself"],
            after.assign(T_projector=after["T_projector"] - took),
        )
    ]
    null = percentile(pairs[1] - pairs[0], 50)
    error = percentile(pairs[2] - pairs[0], 50)
    print(f"overhead less what it really was: {error} ms; nothing less nothing: {null} ms")
    assert abs(error.value) < 0.4 + null.high - null.low
    assert result.comparisons["half"].components["T_projector"].verdict == "SLOWER"
    assert result.differences["half"]["T_LLM_prefill"].high < 0

    scatter = result.comparisons["itself"].components["T_total"].smallest_visible
    margin = min(0.02 + 3 * scatter, 0.5)
    columns = ["T_total"]
    match = {"margin": margin, "match_by": ["request_id", "run_index"]}
    bare = before.drop(columns="image_id")
    print(f"margin {margin:.3f}", *(c.components["T_total"] for c in result.comparisons.values()))
    assert compare_tables(bare, records["same"], columns, **match).verdict == "SAME"


def test_threads_are_those_asked_for_while_it_runs(photo):
    vlm = load_model("tiny-llava", num_threads=2)
    seen: list[int] = []
    vlm.model.register_forward_pre_hook(lambda *_: seen.append(torch.get_num_threads()))
    options = {"num_runs": 1, "warmup_runs": 0, "output_length": 1}
    measure(vlm, [(photo, "What is it?")], **options)
    measure(vlm, [(photo, "What is it?")], num_threads=1, **options)
    measure((vlm.model, vlm.preparer.processor), [(photo, "What is it?")], **options)
    assert seen == [2, 1, 1]
    assert vlm.options.num_threads == 2


def test_a_model_that_always_fails_is_an_error_with_its_message(photo):
    def broken(turn):
        raise RuntimeError("the pruner found no tokens")

    with pytest.raises(MeasurementError, match="the pruner found no tokens"):
        measure(Scripted("broken", broken), [(photo, "What is it?")], num_runs=30)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda p: measure("tiny-mollmo", [(p, "?")]), ModelError, "tiny-molmo"),
        (lambda p: measure(object(), [(p, "?")]), UserError, "found object in place of a model"),
        (lambda p: measure("null-model", []), DataError, "no requests"),
        (lambda p: measure("null-model", [p]), DataError, "request 0 is not a pair"),
        (lambda p: measure("null-model", [(3, "?")]), DataError, "image of request 0 is a int"),
        (lambda p: measure("null-model", [("no.png", "?")]), DataError, "no.png"),
        (
            lambda p: measure("null-model", pd.DataFrame({"a": [1]})),
            DataError,
            "no column request_id",
        ),
        (
            lambda p: measure("null-model", [(p, "?")], num_runs=0),
            UserError,
            "measurement.num_runs",
        ),
        (lambda p: measure("null-model", [(p, "?")], warmup_run=1), UserError, "warmup_runs"),
        (lambda p: measure("null-model", [(p, "?")], prompt="hello"), UserError, "question"),
        (lambda p: compare({"a": "null"}, [(p, "?")]), UserError, "at least two"),
        (
            lambda p: compare(
                {"a": "null-model", "b": load_model("null-model", num_threads=2)}, [(p, "?")]
            ),
            UserError,
            "num_threads",
        ),
        (lambda p: load_model("tiny-molmo", dtyp="float32"), UserError, "dtype"),
    ],
)
def test_mistakes_are_answered_in_one_sentence(call, error, message, photo):
    with pytest.raises(error, match=re.escape(message)) as found:
        call(photo)
    assert "\n" not in str(found.value)


def test_what_the_package_offers_is_loaded_when_it_is_asked_for():
    code = (
        "import sys, vlm_latency; from vlm_latency import pipeline_registry;"
        "assert not {'torch', 'vlm_latency.api'} & set(sys.modules);"
        "[getattr(vlm_latency, name) for name in vlm_latency.__all__];"
        "assert 'torch' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    code = (
        "import sys; from vlm_latency import compare, load_model, measure;"
        "assert not {'kedro', 'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="mesure"):
        _ = vlm_latency.mesure
