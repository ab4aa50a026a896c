"""The page: what it says, and that it asks for nothing from outside."""

import base64
import html.parser
import io
import json
import re
import shlex
from pathlib import Path

import pytest
import yaml
from kedro.framework.cli.utils import _split_params
from PIL import Image

from vlm_latency.experiments import measured
from vlm_latency.options import Options
from vlm_latency.page import build_page, collect_results
from vlm_latency.page.collect import Study
from vlm_latency.results import result_path
from vlm_latency.statistics import compare_paired


class Reader(html.parser.HTMLParser):
    """Collects addresses, ids and text; complains about tags that do not close."""

    OPEN = ("meta", "link", "img", "br")

    def __init__(self, page):
        super().__init__()
        self.sources, self.links, self.ids, self.texts, self.stack = [], [], [], [], []
        self.feed(page)
        assert self.stack == []

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        self.sources += [found["src"]] if "src" in found else []
        self.links += [found["href"]] if "href" in found else []
        self.ids += [found["id"]] if "id" in found else []
        if tag not in self.OPEN:
            self.stack.append(tag)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        if not {"script", "style"} & set(self.stack):
            self.texts.append(data)

    @property
    def text(self):
        return re.sub(r"\s+", " ", " ".join(self.texts))


@pytest.fixture
def page(folder):
    return build_page(collect_results(folder))


def test_claims_with_verdict_rule_and_numbers(page):
    text = Reader(page).text
    assert re.search(
        r"P99 ≫ P50 exp1 contradicted P99 / P50: 1 \[1, 1\] P99 / P50 of T_total", text
    )
    assert re.search(
        r"Prefill grows with vision tokens exp3 supported judged on a toy end / start of the sweep: 1\.\d+ \[",
        text,
    )
    assert (
        "Vision tokens scale sub-linearly exp3 undecided change of the cost per token: not measured"
        in text
    )


def test_what_was_not_run_is_named_with_its_command(page):
    text = Reader(page).text
    absent = text.partition("Not run: ")[2].partition(" . ")[0]
    for name in ("exp2", "exp4", "exp5", "explain", "predict", "compare"):
        assert f"kedro run --pipeline {name} " in absent
    assert "exp1" not in absent and "calibration" not in absent


def test_marks_coverage_failures_outliers_and_notes(page):
    text = Reader(page).text
    assert "synthetic requests random weights exp3 has failed runs" in text
    assert "exp1 8 8 0 0 25 % 1.25 2 (first of shape: 2)" in text  # 2 of 8 s; 6 s for 4.8 s
    assert "exp3 12 11 1 0" in text and "1 × out of memory" in text
    assert "2 (first of shape: 2)" in text
    assert "line of T_projector: nothing to fit" in text


def test_results_of_several_models_or_devices_are_marked(page, folder):
    assert "do not belong together" not in page
    path = result_path(folder, "exp3")
    result = json.loads(path.read_text(encoding="utf-8"))
    result["environment"]["hardware"]["gpu"] = "H100"
    path.write_text(json.dumps(result), encoding="utf-8")
    text = Reader(build_page(collect_results(folder))).text
    assert "do not belong together: exp1, calibration of tiny-<b>molmo</b>" in text
    assert re.search(r"exp3 of tiny-<b>molmo</b> \([^)]*, H100\)", text)


def test_another_method_of_measuring_is_marked():
    result = {"environment": {"measurement": {"method": "hook"}}, "protocol": "exact"}
    text = Reader(build_page({"exp3": Study("exp3", result)})).text
    assert "exp3 by method=hook" in text


def test_numbers_come_with_interval_and_method(page):
    text = Reader(page).text
    assert (
        "T_total over vision tokens not a line F test for lack of fit (2, 8); p = 0.001; n = 12"
        in text
    )
    assert "median of T_total (P50) 12 ms [12, 12] order statistics; n = 8" in text
    assert "the upper bound of P99 needs n >= 368 (found 8)" in text
    assert "instrumented / bare generate() 1.0020 [0.9980, 1.0060] t; n = 40" in text


def test_a_comparison_tells_verdict_ratio_and_what_differs(folder):
    (folder / "compare").mkdir()
    total = compare_paired([10.0, 11.0, 10.5, 10.2], [11.0, 12.1, 11.6, 11.2])
    comparison = {
        "verdict": total.verdict,
        "n_matched": 4,
        "components": {"T_total": total.to_dict()},
    }
    result = {
        "schema_version": 1,
        "comparisons": {"new: exp1": comparison},
        "environment_differences": {"new": {"software.torch": ["2.12", "2.13"]}},
    }
    (folder / "compare" / "compare.json").write_text(json.dumps(result))
    text = Reader(build_page(collect_results(folder))).text
    assert re.search(
        r"new: exp1 SLOWER, T_total × 1\.\d+ \[.*?\] 4 requests matched; differences", text
    )
    assert "4 pairs; intervals hold from 20: repeat more" in text
    assert "new differs in software.torch: 2.12 → 2.13" in text
    assert "Delays come back within 1 %." in text


def test_names_are_escaped(page):
    assert "tiny-<b>molmo</b>" not in page
    assert "tiny-&lt;b&gt;molmo&lt;/b&gt;" in page


def test_everything_is_inside_and_every_link_leads_somewhere(page, folder):
    reader = Reader(page)
    assert reader.sources and all(source.startswith("data:image/png") for source in reader.sources)
    report = folder / "report"
    report.mkdir()
    for link in set(reader.links) - {"data:,"}:
        if link.startswith("#"):
            assert link[1:] in reader.ids
        else:
            assert link.startswith("../") and (report / link).is_file()
    assert not re.search(r"https?://|@import|url\(", page)
    assert "default-src 'none'" in page


def test_figures_are_embedded_at_modest_size(page):
    data = Reader(page).sources[0].partition(",")[2]
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        assert image.size == (1800, 675)
    assert 'width="800"' in page  # 2400 pixels at 300 dpi are 8 inches


def test_environment_tells_what_differs(page):
    text = Reader(page).text
    assert (
        "Not everything was the same in all experiments: Condition exp1 exp3 calibration "
        "process.load" in text
    )
    assert "hardware.cpu Made-up CPU" in text
    assert "at commit 0123abc" in text


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("exp4", {"protocol": "seed", "exp4": {"sampling": {"max_new_tokens_list": [4, 8]}}}),
        ("exp5", {"measurement": {"num_runs": 3}, "exp5": {"flops": {"counted": False}}}),
        ("calibration", {"measurement": {"warmup_runs": 1}, "calibration": {"delays_ms": [5, 20]}}),
        ("predict", {"predict": {"keep": [1, 0.5], "hardware": "H100"}}),
        ("compare", {"compare": {"runs": ["a", "b", "c"], "fail_if_slower": 5}}),
    ],
)
def test_every_study_has_a_command_that_is_accepted_and_repeats_it(name, settings):
    asked = Options.from_parameters(settings)
    if name in {"predict", "compare"}:
        options = {name: getattr(asked, name).model_dump(mode="json")}
    else:
        options = asked.experiment(name).model_dump(mode="json")
    if name == "calibration":
        options["calibration"] = asked.calibration.model_dump(mode="json")
    page = build_page({name: Study(name, {"options": options})})
    command = html.unescape(re.findall(r"<pre[^>]*><code>(.*?)</code></pre>", page)[0])
    words = shlex.split(command)
    given = _split_params(None, None, words[5])
    repeated = Options.from_parameters(given)
    read = Options.experiment if name in measured() else getattr
    assert read(repeated, name) == read(asked, name)
    assert repeated.protocol == asked.protocol


@pytest.mark.parametrize("name", measured())
def test_the_command_repeats_what_conf_base_says_otherwise(name):
    """The library's own defaults, asked for on the command line of a project whose files differ."""
    options = Options().experiment(name).model_dump(mode="json")
    page = build_page({name: Study(name, {"options": options})})
    command = html.unescape(re.findall(r"<pre[^>]*><code>(.*?)</code></pre>", page)[0])
    given = _split_params(None, None, shlex.split(command)[5])
    base = {}
    for file in (Path(__file__).parents[2] / "conf/base").glob("parameters_exp*.yml"):
        base |= yaml.safe_load(file.read_text())
    for group, settings in base[name].items():
        if group in options["own"]:
            assert options["own"][group] == settings  # as the library has it: nothing to repeat
            continue
        for key, here in settings.items():
            asked = options[group][key]
            if asked not in (None, [], here):
                assert str(given[name][group][key]) == str(asked)


@pytest.mark.parametrize("name", ["exp1", "exp3"])
def test_the_command_repeats_the_study_in_its_folder(folder, name):
    study = collect_results(folder)[name]
    block = next(
        b
        for b in re.findall(r"<pre[^>]*><code>(.*?)</code></pre>", build_page({name: study}), re.S)
    )
    command, _, comment = html.unescape(block).partition("\n# and in conf/local/parameters.yml: ")
    words = shlex.split(command)
    assert words[:5] == ["kedro", "run", "--pipeline", name, "--params"]
    given = _split_params(None, None, words[5])
    assert comment == "prompt.template=look, then answer: {question}"  # a comma ends a parameter
    given["prompt"] = {"template": comment.partition("=")[2]}
    repeated = Options.from_parameters(given).experiment(name).model_dump(mode="json")
    assert repeated == study.result["options"]


def test_a_broken_file_is_told_and_hides_nothing(folder):
    (folder / "exp1" / "exp1_latency_distribution.json").write_text('{"results": [')
    text = Reader(build_page(collect_results(folder))).text
    assert "exp1_latency_distribution.json cannot be read" in text
    assert "Prefill grows with vision tokens" in text


def test_results_of_another_hand_are_shown_for_what_they_are(tmp_path):
    path = tmp_path / "exp4" / "exp4_language_tokens_vs_latency.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"results": [{"T_total": 1.0}], "use_eos_token": False}))
    text = Reader(build_page(collect_results(tmp_path))).text
    assert "exp4 was not written by this project" in text
    assert "No result here judges a claim." in text


def test_an_empty_folder_gives_a_page_that_says_so(tmp_path):
    text = Reader(build_page(collect_results(tmp_path))).text
    assert text.count("kedro run --pipeline") == 11  # ten studies and, once more, calibration


def test_what_a_killed_writer_left_and_broken_pictures_are_no_obstacle(folder: Path) -> None:
    figures = folder / "exp1" / "figures"
    (figures / ".x.png").touch()
    (figures / "broken.png").write_bytes(b"no picture")
    page = build_page(collect_results(folder))
    assert "broken.png cannot be read" in page
    assert ".x.png" not in page


@pytest.mark.parametrize(
    "fault",
    [
        {"statistics": [1]},
        {"claims": 3},
        {"coverage": {"sessions": [3]}},
        {"environment": "x"},
        {"environment": {"line": "half a \ud800 character"}},
    ],
)
def test_one_broken_result_hides_no_other(folder: Path, fault: dict) -> None:
    path = result_path(folder, "exp1")
    path.write_text(json.dumps({**json.loads(path.read_text()), **fault}))
    page = build_page(collect_results(folder))
    Reader(page.encode().decode())
    assert 'id="exp3"' in page
    assert 'id="exp1"' in page
