"""The figures show the numbers that they are given, and can be read with few rows and with many."""

import itertools

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.text import Text

from distill_lightning.plots import learning_curves, reliability_diagram, score_bars
from distill_lightning.plots.style import row_styles

NAMES = [
    "alone", "kd", "kd_one_teacher", "feed", "feed_1", "feed_2", "feed_3", "factor_transfer", "hint", "attention",
    "meal_v2", "meal_v2_without_its_discriminator_0.1", "self_kd", "extracurricular", "xcl", "label_smoothing",
    "cutmix", "born_again", "kd_with_hard_labels_0.1", "x",
]  # fmt: skip


def test_score_bars_show_every_run_the_mean_and_the_interval_best_first():
    intervals = {"alone": (0.86, 0.7, 0.95)}
    figure = score_bars({"kd": [0.5], "alone": [0.8, 0.9]}, {"ensemble": 0.95}, intervals=intervals)
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["alone", "kd"]
    ensemble, dots, *_ = axes.lines
    assert ensemble.get_xdata() == pytest.approx([95, 95])
    assert dots.get_xdata() == pytest.approx([80, 90])
    (bar,) = axes.containers
    low, high = bar.lines[1]
    assert (low.get_xdata()[0], high.get_xdata()[0]) == pytest.approx((70, 95))
    assert [text.get_text() for text in axes.texts] == ["86.0", "50.0"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["ensemble"]
    top, bottom = (label.get_window_extent().y0 for label in axes.get_yticklabels())
    assert top > bottom


def test_score_bars_put_the_smallest_error_first():
    figure = score_bars({"kd": [2.0], "alone": [1.0], "feed": [3.0]}, {}, mode="min", scale=1)
    assert [label.get_text() for label in figure.axes[0].get_yticklabels()] == ["alone", "kd", "feed"]


def test_an_interval_of_two_runs_does_not_squash_the_others():
    scores = {"alone": [0.80, 0.81], "kd": [0.82, 0.84]}
    figure = score_bars(scores, {}, intervals={"alone": (0.805, 0.74, 0.87), "kd": (0.83, 0.70, 0.96)})
    left, right = figure.axes[0].get_xlim()
    assert (left, right) == pytest.approx((77, 87))


def test_learning_curves_are_means_over_runs_with_the_others_in_grey():
    curves = {
        name: np.array([[0.1, 0.5], [0.3, 0.7]]) + shift for name, shift in zip("abc", (0, 0.1, 0.2), strict=True)
    }
    figure = learning_curves(curves, reference="a")
    assert [axes.get_title() for axes in figure.axes] == ["a", "b", "c"]
    own, first, other = figure.axes[1].lines[0], *figure.axes[1].lines[1:]
    assert own.get_xdata().tolist() == [1, 2]
    assert own.get_ydata() == pytest.approx([30, 70])
    assert (first.get_linestyle(), first.get_ydata()) == ("--", pytest.approx([20, 60]))
    assert other.get_color() == "0.85"


def test_an_epoch_whose_score_is_no_number_is_a_gap():
    values = np.linspace(0.5, 0.8, 8)[None].repeat(2, axis=0)
    values[0, 5] = np.nan
    for curves in ({"a": values, "b": np.full((2, 8), np.nan)}, {"b": np.full((2, 8), np.nan)}):
        FigureCanvasAgg(learning_curves(curves)).draw()
    FigureCanvasAgg(score_bars({"a": [0.7, np.nan], "b": [np.nan, np.nan]}, {})).draw()


def test_a_figure_shows_itself_in_a_notebook():
    figure = score_bars({"alone": [0.8]}, {})
    assert figure._repr_png_()[:8] == b"\x89PNG\r\n\x1a\n"


def drawn(kind, count):
    """A figure of so many rows, each with five runs."""
    generator = np.random.default_rng(count)
    names = NAMES[:count]
    if kind == "bars":
        scores = {name: generator.normal(0.9, 0.01, 5) for name in names}
        intervals = {name: (each.mean(), each.mean() - 0.01, each.mean() + 0.01) for name, each in scores.items()}
        references = {"ensemble": 0.93, "teachers' mean": 0.929, "alone": scores["alone"].mean()}
        return score_bars(scores, references, intervals=intervals)
    if kind == "curves":
        return learning_curves({name: generator.uniform(0.1, 0.9, (5, 12)) for name in names})
    bins = {name: (np.full(15, 20.0), np.arange(15) + 0.5, np.arange(15.0)) for name in [*names, "ensemble"]}
    return reliability_diagram(bins, {"ensemble": bins.pop("ensemble")})


def texts_of(figure):
    """What is written in a figure, and where."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    found = [text for text in figure.findobj(Text) if text.get_visible() and text.get_text()]
    hidden = {id(label) for axes in figure.axes for label in unlabelled(axes)}
    return [(text.get_text(), text.get_window_extent(renderer)) for text in found if id(text) not in hidden]


def unlabelled(axes):
    """Texts that are there and not drawn: of panels that are not, and of ticks outside of the axis."""
    if not axes.get_visible():
        return axes.findobj(Text)
    labels = []
    for axis in (axes.xaxis, axes.yaxis):
        low, high = sorted(axis.get_view_interval())
        inside = [tick for tick in axis.get_major_ticks() if low <= tick.get_loc() <= high]
        drawn_labels = {id(tick.label1) for tick in inside if tick.label1.get_visible()}
        ticks = [*axis.get_major_ticks(), *axis.get_minor_ticks()]
        labels += [label for tick in ticks for label in (tick.label1, tick.label2) if id(label) not in drawn_labels]
    return labels


@pytest.mark.parametrize("count", [1, 3, 8, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["bars", "curves", "reliability"])
def test_nothing_that_is_written_covers_other_words_or_leaves_the_figure(kind, count):
    figure = drawn(kind, count)
    found = texts_of(figure)
    assert {name for name in NAMES[:count] if len(name) <= 30} <= {text for text, _ in found}
    for text, box in found:
        assert figure.bbox.x0 <= box.x0 < box.x1 <= figure.bbox.x1, text
        assert figure.bbox.y0 <= box.y0 < box.y1 <= figure.bbox.y1, text
    for (one, first), (other, second) in itertools.combinations(found, 2):
        width = min(first.x1, second.x1) - max(first.x0, second.x0)
        height = min(first.y1, second.y1) - max(first.y0, second.y0)
        assert width <= 0 or height <= 0, f"{one!r} and {other!r}"
    # 20 rows still fit a page.
    assert max(figure.get_size_inches()) < 12


def test_rows_look_unlike_one_another_to_the_colour_blind_too():
    styles = row_styles(NAMES)
    assert len(set(styles.values())) == len(NAMES)
    # Without green or red cones, as Machado, Oliveira and Fernandes (2009) have it, in linear light.
    without_green = np.array([[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]])
    without_red = np.array([[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]])
    colors = np.array([to_rgb(color) for color in dict.fromkeys(style.color for style in styles.values())]) ** 2.2
    for seen in (np.eye(3), without_green, without_red):
        shown = np.clip(colors @ seen.T, 0, 1) ** (1 / 2.2)
        distances = [np.linalg.norm(a - b) for a, b in itertools.combinations(shown, 2)]
        assert min(distances) > 0.15


def test_a_row_has_its_colour_in_every_figure():
    styles = row_styles(NAMES)
    shown = {name: styles[name] for name in ("feed", "kd")}
    bars = score_bars({name: [0.9] for name in shown}, {}, styles=styles)
    curves = learning_curves({name: np.ones((1, 2)) for name in shown}, styles=styles)
    bins = (np.full(15, 20.0), np.arange(15) + 0.5, np.arange(15.0))
    reliable = reliability_diagram(dict.fromkeys(shown, bins), styles=styles)
    wanted = [style.color for style in shown.values()]
    assert [axes.title.get_color() for axes in curves.axes] == wanted
    assert [axes.title.get_color() for axes in reliable.axes] == wanted
    assert [line.get_color() for line in bars.axes[0].lines if line.get_marker() == "o"] == wanted
