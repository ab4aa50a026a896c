"""Every wrong parameter is named by its path; presets and overrides settle in the right order."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from vlm_latency import listing
from vlm_latency.errors import UserError
from vlm_latency.experiments import EXPERIMENTS
from vlm_latency.option_types import BY_PROTOCOL
from vlm_latency.options import MeasurementOptions, Options


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        (
            {"exp1": {"measurment": {}}},
            "unknown parameter 'exp1.measurment'; did you mean 'exp1.measurement'?",
        ),
        (
            {"exp1": {"num_samples": 3}},
            "unknown parameter 'exp1.num_samples'; did you mean 'exp1.sampling.num_samples'?",
        ),
        ({"max_crops": 3}, "unknown parameter 'max_crops'; did you mean 'model.max_crops'?"),
        (
            {"model": "tiny-molmo"},
            "parameter 'model': found 'tiny-molmo'; it is a group: set one of it, such as model.name",
        ),
        ({"exp1": 3}, "found 3; it is a group: set one of it, such as exp1.sampling."),
        ({"modle": {}}, "unknown parameter 'modle'; did you mean 'model'?"),
        (
            {"exp1": {"measurement": {"num_run": 3}}},
            "unknown parameter 'exp1.measurement.num_run'; did you mean 'exp1.measurement.num_runs'?",
        ),
        (
            {"exp2": {"sampling": {"zzz": 3}}},
            "unknown parameter 'exp2.sampling.zzz'; known there: ",
        ),
        ({"model": {"device": 3}}, "parameter 'model.device': found 3: "),
        (
            {"exp3": {"measurement": {"num_runs": 0}}},
            "parameter 'exp3.measurement.num_runs': found 0: ",
        ),
        ({"prompt": {"template": "vqa2:"}}, "template 'vqa2:' has no {question} in it"),
        (
            {"measurement": {"output_length": "long"}},
            "expected natural, answer, none or a positive number",
        ),
        (
            {
                "measurement": {"method": "hook", "use_hook_for_llm_prefill": False},
                "exp3": {"measurement": {"method": "timeline", "use_hook_for_llm_prefill": True}},
            },
            "another name for method=hook",
        ),
    ],
)
def test_a_wrong_parameter_is_named(parameters: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as error:
        Options.from_parameters(parameters)
    assert message in str(error.value)


def test_all_errors_are_told_at_once() -> None:
    wrong = {"model": {"devise": "cpu"}, "exp4": {"sampling": {"num_samples": "many"}}}
    with pytest.raises(UserError) as error:
        Options.from_parameters(wrong)
    assert "model.devise" in str(error.value)
    assert "exp4.sampling.num_samples" in str(error.value)


@pytest.mark.parametrize("given", ["8 16 32", "8,16,32", [8, 16, 32], (8, 16, 32)])
def test_lists_are_taken_as_words(given: Any) -> None:
    options = Options.from_parameters({"exp4": {"sampling": {"max_new_tokens_list": given}}})
    assert options.exp4.sampling.max_new_tokens_list == (8, 16, 32)


def test_tilings_are_read_once() -> None:
    asked = {"calibration": {"tiling": "2×3"}, "exp4": {"sampling": {"tiling": "none"}}}
    options = Options.from_parameters(asked)
    assert options.calibration.tiling == (2, 3)
    assert options.calibration.model_dump(mode="json")["tiling"] == "2x3"
    assert options.exp4.sampling.tiling is None
    for group in ({"calibration": {"tiling": "none"}}, {"exp4": {"sampling": {"tiling": "0x3"}}}):
        with pytest.raises(UserError, match="expected rows x columns, such as 2x3"):
            Options.from_parameters(group)


def test_an_experiment_overrides_the_shared_group_and_that_the_protocol() -> None:
    options = Options.from_parameters(
        {
            "protocol": "seed",
            "measurement": {"num_runs": 3, "order": "blocks"},
            "exp3": {"measurement": {"num_runs": 10}},
        }
    )
    exp3, exp1 = options.experiment("exp3"), options.experiment("exp1")
    assert (exp3.measurement.num_runs, exp1.measurement.num_runs) == (10, 3)
    assert exp3.measurement.order == "blocks"  # said by the user
    assert exp3.measurement.method == "subtraction"  # left to the protocol
    assert exp1.measurement.output_length == "none"
    assert exp1.sampling.order == "first"
    assert exp3.flops.estimator == "parameter_rule"


@pytest.mark.parametrize("protocol", ["exact", "seed"])
@pytest.mark.parametrize("name", [*EXPERIMENTS, "calibration", "measure"])
def test_nothing_is_left_undecided(protocol: str, name: str) -> None:
    settled = Options.from_parameters({"protocol": protocol}).experiment(name)
    for group in (settled.sampling, settled.measurement, settled.flops, settled.figures):
        for field, about in type(group).model_fields.items():
            if BY_PROTOCOL in about.metadata:
                assert getattr(group, field) is not None, field


def test_a_settled_group_holds_no_none() -> None:
    with pytest.raises(ValidationError):
        MeasurementOptions(method=None)


def test_only_our_exp1_keeps_questions_apart_and_repeats_some() -> None:
    given = {name: {"sampling": {"num_samples": 80}} for name in ("exp1", "exp2")}
    exact = Options.from_parameters(given)
    settled = exact.experiment("exp1")
    assert settled.sampling.one_question_per_image is True
    assert settled.measurement.noise_repeats == 16
    seed = Options.from_parameters({**given, "protocol": "seed"})
    for other in (exact.experiment("exp2"), seed.experiment("exp1")):
        assert other.sampling.one_question_per_image is False
        assert other.measurement.noise_repeats == 0


def test_what_would_change_nothing_is_refused() -> None:
    given = {
        "exp3": {"sampling": {"num_samples": 3, "max_grid_size": 2, "seed": 1}},
        "exp4": {"measurement": {"output_length": 8}},
    }
    with pytest.raises(UserError) as error:
        Options.from_parameters(given)
    first, second = str(error.value).splitlines()
    assert first.startswith("parameter 'exp3.sampling.num_samples' has no effect; exp3 listens to")
    assert second.startswith("parameter 'exp4.measurement.output_length' has no effect: exp4 has")


def test_random_weights_write_answers_of_the_true_length() -> None:
    options = Options.from_parameters({})
    assert options.experiment("exp1", "random").measurement.output_length == "answer"
    assert options.experiment("exp1", "pretrained").measurement.output_length == "natural"
    assert options.experiment("exp3", "pretrained").measurement.output_length == "none"


def test_the_hook_flag_of_the_seed_selects_the_method() -> None:
    given = {"exp3": {"measurement": {"use_hook_for_llm_prefill": True}}}
    assert Options.from_parameters(given).experiment("exp3").measurement.method == "hook"
    both = {"exp3": {"measurement": {"use_hook_for_llm_prefill": True, "method": "hook"}}}
    assert Options.from_parameters(both).experiment("exp3").measurement.method == "hook"


def test_every_parameter_says_what_it_is() -> None:
    listed = list(listing.options(Options()))
    assert len(listed) > 100
    assert [name for name, _, _, meaning in listed if not meaning.strip()] == []
    assert [name for name, _, _, meaning in listed if "\n" in meaning or len(meaning) > 160] == []


def test_a_size_of_one_number_is_told_how_sizes_are_written() -> None:
    with pytest.raises(UserError, match="found 336: expected width x height, such as 640x480"):
        Options.from_parameters({"exp3": {"sampling": {"sizes": 336}}})


@pytest.mark.parametrize("engine", ["compiled-all", "loop"])
@pytest.mark.parametrize(
    "given",
    [{"protocol": "seed"}, {"measurement": {"method": "hook"}}],
    ids=["protocol", "method"],
)
def test_methods_that_part_the_model_are_refused_where_it_is_captured_whole(
    given: dict[str, Any], engine: str
) -> None:
    with pytest.raises(UserError, match=rf"measurement.method=.* model.engine={engine} has"):
        Options.from_parameters({**given, "model": {"engine": engine}})
