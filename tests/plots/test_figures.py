"""What each figure shows: the input's numbers in its words, a mark for every run, nothing else."""

import io
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.collections import PathCollection
from matplotlib.colors import to_hex
from matplotlib.text import Text

from vlm_latency.option_groups import PANELS, FigureOptions
from vlm_latency.plots import (
    calibration,
    comparison,
    composition,
    distribution,
    explanation,
    first_and_next,
    flops,
    language_sweep,
    prediction,
    reduction,
    vision_sweep,
)
from vlm_latency.plots.notation import interval
from vlm_latency.plots.style import COLOURS, FigureContext, Style
from vlm_latency.records import COMPONENTS
from vlm_latency.statistics import TableComparison, floor_and_line


def words(figure):
    """All text of a figure, header, ticks and legends included."""
    found = list(figure.texts)
    for axes in figure.axes:
        found += [axes.title, axes._left_title, axes.xaxis.label, axes.yaxis.label, *axes.texts]
        found += [*axes.get_xticklabels(), *axes.get_yticklabels()]
        if legend := axes.get_legend():
            found += [legend.get_title(), *legend.get_texts()]
    return "\n".join(text.get_text() for text in found).replace("\N{NO-BREAK SPACE}", " ")


def panel(figure, heading):
    """The axes under a heading."""
    return next(axes for axes in figure.axes if heading in axes._left_title.get_text())


def points(axes):
    """Number of points scattered in a panel."""
    return sum(
        len(dots.get_offsets()) for dots in axes.collections if isinstance(dots, PathCollection)
    )


SPEEDS = ["T_first_token", "T_LLM_prefill_reduced", "T_LLM_decode", "T_total"]
REDUCED = [
    {
        "method": method,
        "keep": keep,
        "claimed": {"speed_up": claimed},
        "measured": {
            name: {"speed_up": {"value": won, "low": 0.8 * won, "high": 90.0}} for name in SPEEDS
        },
        "means": {"T_total": {"value": 50.0, "low": 40.0, "high": 60.0}},
        "accuracy": {"value": None},
    }
    for method, keep, claimed, won in (
        ("identity", 1.0, 1.0, 1.0),
        ("pixels", 0.5, 2.0, 5.5),
        ("random", 0.25, 6.0, 1.2),
        ("uniform", 0.25, 6.0, 1.3),
    )
]


def every_figure(made, context, style):
    one, two, three, four, five = made.exp1(), made.exp2(), made.exp3(), made.exp4(), made.exp5()
    proof, forecast = made.calibrated(), made.predicted()
    yield distribution.latency_distribution(one.records, one.statistics, context, style)
    yield composition.parameters_pie(made.PARAMETERS, context, style)
    yield composition.parameters_pie(made.EXPERTS, context, style)
    yield composition.latency_components(two.records, two.statistics, context, style)
    yield composition.latency_pie(two.statistics, context, style)
    yield composition.stacks({"a": two.statistics["means"]}, context, style)
    yield first_and_next.first_and_next({"a": two.statistics["means"]}, context, style)
    yield vision_sweep.vision_tokens_vs_latency(three.records, three.statistics, context, style)
    yield language_sweep.language_tokens_vs_latency(four.records, four.statistics, context, style)
    yield flops.flops_vs_latency(five.points, five.statistics, context, style)
    yield calibration.calibration(proof.injections, proof.cases, proof.statistics, context, style)
    finding = {"finding": "76 % of 166 ms is bound by launches", "work": "kernels"}
    shapes = [made.explained(0.5), made.explained(1.1)]
    yield explanation.explanation(shapes, finding, context, style)
    yield reduction.claimed_and_measured(REDUCED, SPEEDS, context, style)
    yield comparison.ratios({"new": made.compared()}, "old", 0.02, context, style)
    yield prediction.predicted_latency(
        forecast.grid, forecast.pruning, forecast.statistics, context, style
    )


def test_every_figure_draws_and_fits_its_page(made, context, style):
    for figure in every_figure(made, context, style):
        figure.savefig(io.BytesIO(), format="png", dpi=60)  # the layout settles while saving
        box = figure.get_tightbbox()
        assert box.x0 >= -0.02 and box.x1 <= figure.get_figwidth() + 0.02
        assert box.y0 >= -0.02 and box.y1 <= figure.get_figheight() + 0.02
        shown = words(figure)
        assert "synthetic · random weights" in shown
        assert "nan" not in shown
        assert (context.environment_line in shown.replace("\n", " ")) is not style.paper


def test_a_model_without_parameters(made, context):
    none = {name: 0 if count else count for name, count in made.PARAMETERS.items()}
    figure = composition.parameters_pie(none, context, Style())
    assert "0.0 % of 0 parameters" in words(figure).replace("\n", " ")
    assert "not measured" in words(figure)


def test_paper_is_one_column_wide_without_title_and_embeds_truetype(made, context):
    figure = composition.parameters_pie(made.PARAMETERS, context, Style(paper=True))
    assert figure.get_figwidth() == pytest.approx(3.3)
    assert "95.6 % of 7.95 B" not in words(figure)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="pdf")
    assert b"/Type0" in buffer.getvalue() and b"/Type3" not in buffer.getvalue()


def test_png_has_the_asked_resolution(made, context):
    from PIL import Image

    figure = composition.parameters_pie(made.PARAMETERS, context, Style(dpi=120))
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    with Image.open(buffer) as image:
        assert image.info["dpi"][0] == pytest.approx(120, abs=0.1)
        assert image.width == pytest.approx(120 * figure.get_figwidth(), abs=1)


def test_settings_of_the_caller_are_left_alone(made, context):
    import matplotlib

    before = dict(matplotlib.rcParams)
    composition.parameters_pie(made.PARAMETERS, context, Style(paper=True)).canvas.draw()
    assert dict(matplotlib.rcParams) == before


class TestDistribution:
    def test_title_and_legend_tell_the_percentiles(self, made, context):
        one = made.exp1()
        shown = words(
            distribution.latency_distribution(one.records, one.statistics, context, Style())
        )
        summary = one.statistics["T_total"]
        assert "tiny-molmo: what was found" in shown
        assert f"P50 {interval(summary.P50)}" in shown
        assert f"P99 {interval(summary.P99)}" in shown
        assert "needs n ≥ 368" in shown
        assert "The tail lies in the content" in shown

    def test_histogram_counts_every_request_and_panels_show_each_once(self, made, context):
        one = made.exp1()
        figure = distribution.latency_distribution(one.records, one.statistics, context, Style())
        histogram = panel(figure, "Whole request")
        bands = 2  # P99 has no upper bound: no band, and a dotted line
        assert sum(bar.get_height() for bar in histogram.patches[:-bands]) == len(one.records)
        assert [line.get_linestyle() for line in histogram.lines] == ["-", "-", ":"]
        assert points(panel(figure, "By tiling")) == len(one.records)
        assert points(panel(figure, "By output length")) == len(one.records)

    def test_failed_runs_are_left_out(self, made, context):
        one = made.exp1()
        one.records.loc[:9, "status"] = "failed"
        figure = distribution.latency_distribution(one.records, one.statistics, context, Style())
        assert points(panel(figure, "By tiling")) == len(one.records) - 10

    @pytest.mark.parametrize("value", [0.0, 5.0])
    def test_constant_latencies(self, made, context, value):
        one = made.exp1(30)
        one.records["T_total"] = value
        statistics = {"T_total": made.summary(one.records["T_total"])}
        figure = distribution.latency_distribution(one.records, statistics, context, Style())
        figure.set_dpi(50)
        figure.canvas.draw()
        assert words(figure).count("not measured") == 1  # time to first token has no summary

    def test_a_wide_range_gets_a_logarithmic_axis(self, made, context):
        one = made.exp1(30)
        one.records["T_total"] = np.geomspace(1, 1e6, 30)
        one.statistics["T_total"] = made.summary(one.records["T_total"])
        figure = distribution.latency_distribution(one.records, one.statistics, context, Style())
        assert panel(figure, "Whole request").get_xscale() == "log"
        assert panel(figure, "By tiling").get_yscale() == "log"
        assert panel(figure, "Time to first token").get_xscale() == "linear"


class TestComposition:
    def test_pie_of_parameters(self, made, context):
        figure = composition.parameters_pie(made.PARAMETERS, context, Style())
        assert len(figure.axes) == 1
        assert len(figure.axes[0].patches) == 3
        assert "the LLM holds 95.6 % of 7.95 B parameters" in words(figure).replace("\n", " ")

    def test_mixture_of_experts_shows_active_parameters_too(self, made, context):
        figure = composition.parameters_pie(made.EXPERTS, context, Style())
        assert len(figure.axes) == 2
        assert "8 of 64 experts" in words(figure)
        assert "1.55 B are active" in words(figure)
        assert "LLM  1.2 B  (77.5 %)" in words(figure)

    def test_stack_adds_up_and_every_part_has_its_interval(self, made, context):
        two = made.exp2()
        figure = composition.latency_components(two.records, two.statistics, context, Style())
        axes = panel(figure, "Mean of n")
        stacked, single = axes.patches[:5], axes.patches[5:11]
        means = two.statistics["means"]
        assert sum(bar.get_width() for bar in stacked) == pytest.approx(means["T_total"].value)
        for first, second in zip(stacked, single, strict=False):
            assert second.get_x() == 0
            assert first.get_width() == pytest.approx(second.get_width())
        assert single[5].get_width() == pytest.approx(means["T_preprocess"].value)
        assert to_hex(single[2].get_facecolor()) == COLOURS["T_LLM_prefill"].lower()
        assert points(axes) == 6 * len(two.records)
        dots = next(c for c in axes.collections if isinstance(c, PathCollection))
        offsets = dots.get_offsets()[:, 0]  # runs lie where they were measured
        assert sorted(offsets) == pytest.approx(sorted(two.records["T_vision_encoder"]))

    def test_parts_that_were_not_separable(self, made, context):
        two = made.exp2(3)
        means = {"T_total": two.statistics["means"]["T_total"], "T_LLM_prefill": None}
        statistics = {"means": means, "n": 3}
        figure = composition.latency_components(two.records, statistics, context, Style())
        assert "whole request" in words(figure)
        pie = composition.latency_pie(statistics, context, Style())
        assert "components not separable" in words(pie)

    def test_a_part_below_zero_is_told_and_not_in_the_pie(self, made, context):
        two = made.exp2(3)
        two.statistics["means"]["T_other"] = made.estimate(-3.0)
        figure = composition.latency_pie(two.statistics, context, Style())
        assert "other  -3 ms  (below zero: not in the pie)" in words(figure)


class TestVisionSweep:
    def test_slopes_and_the_cost_of_crop_and_token(self, made, context):
        three = made.exp3()
        figure = vision_sweep.vision_tokens_vs_latency(
            three.records, three.statistics, context, Style()
        )
        shown = words(figure).replace("\n", " ")
        slope = interval(three.statistics["fits"]["T_LLM_prefill"].slope, "", 1000)
        assert f"LLM prefill: {slope} µs per token" in shown
        assert f"(n = {len(three.records)})" in shown
        for heading, times in (("Whole request", 1), ("Components", 3)):
            assert points(panel(figure, heading)) == times * len(three.records)

    def test_grids_of_equal_crops_are_joined(self, made, context):
        three = made.exp3()
        figure = vision_sweep.vision_tokens_vs_latency(
            three.records, three.statistics, context, Style()
        )
        axes = panel(figure, "LLM prefill")
        joined = [line for line in axes.lines if line.get_linestyle() == ":"]
        tokens = sorted(tuple(line.get_xdata()) for line in joined if len(line.get_xdata()))
        assert tokens == [(704, 768), (1152, 1184, 1344)]

    def test_axis_of_patches(self, made, context):
        three = made.exp3(1)
        figure = vision_sweep.vision_tokens_vs_latency(
            three.records, three.statistics, context, Style(vision_axis="patches")
        )
        dots = panel(figure, "Whole request").collections[0].get_offsets()
        assert dots[0, 0] == 2 * 576
        assert "µs per patch" in words(figure)

    def test_components_not_measured(self, made, context):
        three = made.exp3(1)
        parts = ["T_LLM_prefill", "T_vision_encoder", "T_projector"]
        three.records[parts] = np.nan
        figure = vision_sweep.vision_tokens_vs_latency(
            three.records, {"fits": {}}, context, Style()
        )
        assert words(figure).count("not measured") == 2


class TestLanguageSweep:
    def test_line_baseline_stack_and_lengths_left_out(self, made, context):
        four = made.exp4()
        figure = language_sweep.language_tokens_vs_latency(
            four.records, four.statistics, context, Style()
        )
        shown = words(figure).replace("\n", " ")
        slope = interval(four.statistics["fits"]["T_LLM_decode"].slope, "ms")
        assert f"line: {slope} per token" in shown
        first = interval(four.statistics["prefill"], "ms")
        assert f"time to first token: {first}" in shown
        for row in four.statistics["lengths"]:
            share = row["T_LLM_decode"].value / row["T_total"].value
            assert f"{100 * share:.0f} %" in shown
        assert len(panel(figure, "Composition").patches) == 4 * 7

    def test_every_step_is_a_point_and_hidden_ones_are_counted(self, made, context):
        four = made.exp4((8, 512))
        four.records.at[0, "decode_step_ms"] = [5000.0] * 7
        figure = language_sweep.language_tokens_vs_latency(
            four.records, four.statistics, context, Style()
        )
        steps = sum(len(run) for run in four.records["decode_step_ms"])
        assert points(panel(figure, "step get slower")) == steps
        assert f"7 of {steps:,} steps lie outside this view" in words(figure)

    def test_single_tokens_have_no_steps(self, made, context):
        four = made.exp4((1,))
        statistics = {"fits": {}, "lengths": four.statistics["lengths"]}
        figure = language_sweep.language_tokens_vs_latency(
            four.records, statistics, context, Style()
        )
        assert "steps not measured" in words(figure)


class TestFlops:
    def test_correlations_regimes_and_errors(self, made, context):
        five = made.exp5()
        shown = words(flops.flops_vs_latency(five.points, five.statistics, context, Style()))
        assert "860" in shown and "ms per TFLOP" in shown
        assert shown.count("R² 0.31") == 3
        assert shown.count("Spearman 0.70 [0.63, 0.77]") == 3
        assert "64 % [51, 77]" in shown
        assert "TFLOP (analytic)" in shown

    def test_sweeps_in_their_panels(self, made, context):
        five = made.exp5()
        figure = flops.flops_vs_latency(five.points, five.statistics, context, Style())
        assert points(panel(figure, "Vision sweep")) == 36
        assert points(panel(figure, "Language sweep")) == 28
        assert points(panel(figure, "Both sweeps")) == 64
        line = panel(figure, "Vision sweep").lines[0]
        rise = np.ptp(line.get_ydata()) / np.ptp(line.get_xdata())
        assert rise == pytest.approx(five.statistics["exp3"]["fit"].slope.value * 1e12)

    def test_small_models_count_in_smaller_units(self, made, context):
        five = made.exp5()
        five.points["flops"] /= 1000
        figure = flops.flops_vs_latency(five.points, five.statistics, context, Style())
        assert panel(figure, "Vision sweep").get_xlabel() == "GFLOP (analytic)"
        assert panel(figure, "Vision sweep").collections[0].get_offsets()[0, 0] == pytest.approx(
            0.94
        )

    def test_one_sweep_without_predictors(self, made, context):
        five = made.exp5()
        points = five.points[["sweep", "flops", "latency_ms"]].iloc[:36]
        statistics = {"exp3": five.statistics["exp3"], "exp4": None, "estimator": "counted"}
        shown = words(flops.flops_vs_latency(points, statistics, context, Style()))
        assert shown.count("not measured") == 4


class TestTrust:
    def test_calibration(self, made, context):
        proof = made.calibrated()
        figure = calibration.calibration(
            proof.injections, proof.cases, proof.statistics, context, Style()
        )
        shown = words(figure).replace("\n", " ")
        assert "11 of 12 known delays surely come back" in shown
        assert "1.0020 [0.9980, 1.0060]" in shown
        assert "nominal 5 %" in shown
        assert "subtraction (n = 40) 2.20 × wall time" in shown
        assert "within the tolerance" in shown and f"n = {len(proof.injections)}" in shown
        (nominal,) = panel(figure, "False alarms").lines[-1:]  # judges no other row
        assert np.ptp(nominal.get_ydata()) < 1 and set(nominal.get_xdata()) == {5.0}
        assert points(panel(figure, "Delays injected")) == len(proof.injections)
        rows = [label.get_text() for label in panel(figure, "Error of each").get_yticklabels()]
        assert len(rows) == 12 and rows[0] == "vision encoder 2 ms, device"

    def test_calibration_of_nothing(self, made, context):
        nothing = made.calibrated().injections.iloc[:0]
        shown = words(calibration.calibration(nothing, [], {}, context, Style()))
        assert shown.count("not measured") == 6


class TestExplanation:
    def test_busy_idle_and_bound(self, made, context):
        finding = {"finding": "76 % of 166 ms is bound by launches", "work": "kernels"}
        shapes = [made.explained(0.5), made.explained(1.1)]
        figure = explanation.explanation(shapes, finding, context, Style())
        shown = words(figure)
        assert "76 % of 166 ms is bound by launches" in shown
        assert shown.count("launches, 350 kernels") == 5
        bars = [bar.get_width() for bar in panel(figure, "Busy and idle").patches]
        assert bars[:10] == pytest.approx([10.0] * 10)
        first, second = panel(figure, "Idle share").lines[:2]
        assert first.get_xdata() == pytest.approx([50] * 5)
        assert second.get_xdata() == pytest.approx([-10] * 5)  # a profiled run that was slower
        assert len(panel(figure, "Share of the measured").patches) == 8


class TestComparison:
    def test_ratio_interval_verdict_and_margin(self, made, context):
        figure = comparison.ratios({"new": made.compared()}, "old", 0.02, context, Style())
        shown = words(figure)
        assert "Against old, T_total, 40 matched: new × 1.100 [1.089, 1.111] SLOWER" in shown
        assert shown.count("SLOWER") == 6
        band = figure.axes[0].patches[0]
        assert band.get_x() == pytest.approx(0.98) and band.get_width() == pytest.approx(0.04)

    def test_several_candidates(self, made, context):
        runs = {"a": made.compared(), "b": made.compared(1)}
        figure = comparison.ratios(runs, "old", 0.02, context, Style())
        assert [t.get_text() for t in figure.axes[0].get_legend().get_texts()] == [
            "a",
            "b",
            "margin",
        ]
        assert words(figure).count("SAME") == 6

    def test_wide_intervals_get_a_logarithmic_axis(self, made, context):
        wide = made.compared()
        total = wide.components["T_total"]
        ratio = replace(total.ratio, low=0.1, high=40.0)
        wide.components["T_total"] = replace(total, ratio=ratio)
        figure = comparison.ratios({"new": wide}, "old", 0.02, context, Style())
        assert figure.axes[0].get_xscale() == "log"

    def test_many_candidates_are_counted_in_the_title(self, made, context):
        runs = {name: made.compared() for name in "abc"} | {"d": made.compared(1)}
        shown = words(comparison.ratios(runs, "old", 0.02, context, Style()))
        assert "4 comparisons with old: 3 SLOWER, 1 SAME" in shown

    def test_nothing_in_common(self, context):
        nothing = TableComparison(None, {}, (), (), 0, (), (), ())
        figure = comparison.ratios({"new": nothing}, "old", 0.02, context, Style())
        assert "nothing to compare" in words(figure)


class TestPrediction:
    def test_map_composition_and_pruning(self, made, context):
        made_up = made.predicted()
        figure = prediction.predicted_latency(
            made_up.grid, made_up.pruning, made_up.statistics, context, Style()
        )
        shown = words(figure)
        assert "430 ms [413, 447] predicted without running it" in shown.replace("\n", " ")
        cells = [text.get_text() for text in panel(figure, "Predicted latency").texts]
        assert len(cells) == 25 and cells[0] == "46.4"
        assert "190 ms\n44.2 %" in shown
        lines = panel(figure, "dropping").lines
        assert [line.get_label() for line in lines] == list(made_up.pruning["where"].unique())


def test_style_follows_the_options():
    assert Style.of(FigureOptions()) == Style(False, 300, "tokens")
    asked = FigureOptions(
        style="paper", dpi=150, vision_axis="patches", columns=2, panels="steps stack"
    )
    assert Style.of(asked) == Style(True, 150, "patches", 2, ("steps", "stack"))


def test_panels_can_be_drawn_by_name(made, context):
    four = made.exp4()
    style = Style(paper=True, chosen=("steps",))
    figure = language_sweep.language_tokens_vs_latency(
        four.records, four.statistics, context, style
    )
    assert [axes._left_title.get_text() for axes in figure.axes] == [
        "Does a step get slower as the cache grows?"
    ]
    other = composition.parameters_pie(made.PARAMETERS, context, style)
    assert len(other.axes) == 1  # has no panel of that name: drawn whole


def test_the_panels_that_can_be_asked_for_are_those_of_the_figures(made, context):
    one, three, four, five = made.exp1(), made.exp3(), made.exp4(), made.exp5()
    drawn = {
        "variance": lambda it: distribution.latency_distribution(
            one.records, one.statistics, context, it
        ),
        "active": lambda it: composition.parameters_pie(made.EXPERTS, context, it),
        "components": lambda it: vision_sweep.vision_tokens_vs_latency(
            three.records, three.statistics, context, it
        ),
        "stack": lambda it: language_sweep.language_tokens_vs_latency(
            four.records, four.statistics, context, it
        ),
        "held_out": lambda it: flops.flops_vs_latency(five.points, five.statistics, context, it),
    }
    for name, draw in drawn.items():
        assert name in PANELS
        assert len(draw(Style(chosen=(name,))).axes) == 1
        assert len(draw(Style(chosen=PANELS)).axes) == len(draw(Style()).axes)


def test_an_unknown_panel_is_refused():
    with pytest.raises(ValueError, match="no panel stepps; expected of histogram"):
        FigureOptions(panels="stepps")


def test_two_columns_stand_side_by_side(made, context):
    three = made.exp3()
    figure = vision_sweep.vision_tokens_vs_latency(
        three.records, three.statistics, context, Style(paper=True, columns=2)
    )
    assert figure.get_figwidth() == pytest.approx(6.9)
    rows = [axes.get_subplotspec().rowspan.start for axes in figure.axes]
    assert rows == [0, 0, 1]


def test_a_caption_says_what_the_figure_no_longer_does(made, context):
    three = made.exp3()
    caption = vision_sweep.vision_tokens_vs_latency(
        three.records, three.statistics, context, Style(paper=True)
    ).caption
    assert caption.startswith("tiny-molmo: what was found. (a) Whole request")
    for said in ("open diamonds", "75 runs of 15 images", "random weights", "torch 2.13"):
        assert said in caption


@pytest.mark.parametrize("columns", [1, 2])
@pytest.mark.parametrize("paper", [False, True])
def test_no_legend_lies_over_points(made, context, paper, columns):
    for figure in every_figure(made, context, Style(paper=paper, columns=columns, dpi=60)):
        figure.canvas.draw()
        for axes in figure.axes:
            if (shown := axes.get_legend()) is None or axes._left_title.get_text() == "":
                continue
            box = shown.get_window_extent()
            dots = [it.get_offsets() for it in axes.collections if isinstance(it, PathCollection)]
            dots += [line.get_xydata() for line in axes.lines if line.get_linestyle() == "None"]
            for each in dots:
                known = np.asarray(each, dtype=float)
                known = known[np.isfinite(known).all(axis=1)]
                if len(known):
                    at = axes.transData.transform(known)
                    inside = axes.bbox.contains(*at.mean(axis=0)) and [
                        point for point in at if box.contains(*point)
                    ]
                    assert not inside, axes._left_title.get_text()


class TestSeveralResults:
    def test_lines_are_overlaid(self, made, context):
        three = made.exp3()
        fit = three.statistics["fits"]["T_total"]
        results = {"eager": (three.records, fit), "compiled": (three.records, None)}
        figure = vision_sweep.overlaid(results, "T_total", context, Style())
        axes = panel(figure, "Total against")
        assert points(axes) == 2 * len(three.records)
        texts = [text.get_text() for text in axes.get_legend().get_texts()]
        assert texts[0] == f"eager (n = 75): {interval(fit.slope, 'µs', 1000)} per token"
        assert texts[1] == "compiled (n = 75)"

    def test_a_floor_is_drawn_as_one(self, made, context):
        records = made.exp3().records
        tokens = records["num_vision_tokens"].astype(float)
        free = tokens.median()
        noise = 1 + 0.01 * np.random.default_rng(0).normal(size=len(tokens))
        records["T_total"] = (100 + 0.1 * np.maximum(0, tokens - free)) * noise
        fit = floor_and_line(tokens, records["T_total"], records["request_id"])
        figure = vision_sweep.overlaid({"eager": (records, fit)}, "T_total", context, Style())
        axes = panel(figure, "Total against")
        (line,) = [line for line in axes.lines if len(line.get_xdata()) == 200]
        below = line.get_ydata()[line.get_xdata() < fit.free.low]
        assert np.ptp(below) == 0 and below[0] == pytest.approx(100, rel=0.02)
        assert line.get_ydata()[-1] > 1.1 * below[0]
        (text,) = axes.get_legend().get_texts()
        assert f"beyond {interval(fit.free)}, none before" in text.get_text()

    def test_the_first_token_and_the_next_stand_side_by_side(self, context):
        told = {"value": 12.0, "low": 11.0, "high": 13.5}
        parts = {"T_vision_encoder": 10.0, "T_projector": 1.0, "T_LLM_prefill": 7.0}
        eager = {**parts, "T_first_token": 20.0, "T_preprocess": 5.0, "per_token": told}
        results = {"eager": eager, "loop": {"T_first_token": 8.0, "per_token": None}}
        figure = first_and_next.first_and_next(results, context, Style())
        first, following = figure.axes
        widths = sorted(bar.get_width() for bar in first.patches)
        assert widths == [1, 2, 5, 7, 8, 10]  # what no part explains is the rest
        assert [bar.get_width() for bar in following.patches] == [12]
        assert interval(told) in words(figure)
        assert [label.get_text() for label in first.get_yticklabels()] == ["eager", "loop"]

    def test_stacks_stand_side_by_side(self, made, context):
        means = made.exp2().statistics["means"]
        whole = {"T_total": means["T_total"]}
        figure = composition.stacks({"eager": means, "compiled": whole}, context, Style())
        axes = panel(figure, "Mean latency")
        heights = [bar.get_height() for bar in axes.patches if bar.get_height() > 0]
        assert sum(heights[:5]) == pytest.approx(means["T_total"].value)
        assert heights[5] == pytest.approx(means["T_total"].value)  # not separable: one piece
        keys = {to_hex(bar.get_facecolor()) for bar in axes.get_legend().get_patches()}
        assert keys == {COLOURS[name].lower() for name in COMPONENTS}


def test_long_titles_wrap_between_words_and_not_before_units(made):
    context = FigureContext(
        model="a-long-organisation/a-very-long-model-name-of-many-parts-72B",
        finding="123 ms [119, 137] per request, 76.4 % [75.7, 77.0] of it in the vision encoder, and more",
    )
    figure = composition.latency_components(
        made.exp2().records, made.exp2().statistics, context, Style()
    )
    lines = [text.get_text() for text in figure.texts]
    assert len(lines) == 3
    assert not any(line.startswith(("ms", "%", "[")) for line in lines)


NASTY = r"a $b$ {c} ${d} \textbf{x} **m** <i>&amp; %_#~^\ $\frac{"


@pytest.mark.slow
def test_names_are_text_in_every_figure(made, style):
    context = FigureContext(NASTY, (NASTY,), NASTY, NASTY)
    for figure in every_figure(made, context, style):
        figure.draw_without_rendering()
        shown = words(figure)
        assert "mathdefault" not in shown
        marks = [text for text in figure.findobj(Text) if "$" in text.get_text()]
        assert marks
        assert not any(text.get_parse_math() for text in marks)


def test_axes_of_a_wide_distribution_are_labelled_in_plain_numbers(made, context, style):
    one = made.exp1()
    times = one.records.assign(T_total=np.geomspace(1, 5000, len(one.records)))
    figure = distribution.latency_distribution(times, one.statistics, context, style)
    figure.draw_without_rendering()
    assert "mathdefault" not in words(figure)
    assert {"10", "100", "1000"} <= set(words(figure).split("\n"))
