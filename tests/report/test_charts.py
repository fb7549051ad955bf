"""Charts are legible in both themes, keep their shapes apart, and draw only what exists."""

from __future__ import annotations

import re

import pytest
from html_page import parse

from bankwise.report.heat_map import Colours, Panel, heat_maps
from bankwise.report.point_charts import ErrorSeries, Level, PlacedPoint, error_chart, scatter_chart
from bankwise.report.style import DARK, LIGHT, STEPS, STRONG_STEPS
from bankwise.report.svg import STYLES


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = (part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_text_is_legible_on_every_colour(theme: dict[str, str]) -> None:
    for step in (f"{hue}{i}" for hue in "hd" for i in range(STEPS)):
        assert contrast(theme["page" if step in STRONG_STEPS else "ink"], theme[step]) >= 4.5, step
    for name in ("quiet", "ink", "link", "alarm"):
        assert contrast(theme["page"], theme[name]) >= 4.5, name
    for name in STYLES:
        assert contrast(theme["page"], theme[name]) >= 3, name


@pytest.mark.parametrize("theme", [LIGHT, DARK])
def test_steps_of_one_hue_run_from_the_page_to_its_opposite(theme: dict[str, str]) -> None:
    distances = [contrast(theme["page"], theme[f"h{i}"]) for i in range(STEPS)]
    assert distances == sorted(distances)


def test_columns_differ_without_colour() -> None:
    assert len({style.shape for style in STYLES.values()}) == len(STYLES)
    assert len({style.dash for style in STYLES.values()}) == len(STYLES)


def drawn(values: list[list[float | None]], *, has_text: bool = True, is_diverging: bool = False) -> str:
    chart = heat_maps(
        "Title",
        [Panel(name="model", values=values)],
        "Caption.",
        rows=[f"row {i}" for i in range(len(values))],
        columns=[str(j) for j in range(len(values[0]))],
        colours=Colours(low=-1.0 if is_diverging else 0.0, high=1.0, is_diverging=is_diverging),
        x_axis="x",
        y_axis="y",
        show=lambda value: f"{value:.2f}",
        has_text=has_text,
    )
    parse(chart)
    return chart[chart.index('role="img"') :]


def test_cells_take_the_step_of_their_value_and_legible_text() -> None:
    chart = drawn([[0.0, 0.5, 1.0, None]])
    assert re.findall(r'<rect class="(\w+)"', chart) == ["h0", "h4", "h8", "gap"]
    assert re.findall(r'<text(?: class="([\w-]+)")?[^>]*>(0\.00|0\.50|1\.00|n/a)<', chart) == [
        ("", "0.00"), ("", "0.50"), ("on-strong", "1.00"), ("quiet", "n/a"),
    ]  # fmt: skip
    assert re.findall(r'<rect class="(\w+)"', drawn([[-1.0, 0.0, 1.0]], is_diverging=True)) == ["d0", "d4", "d8"]


def test_equal_neighbours_of_a_map_without_text_are_one_rectangle() -> None:
    chart = drawn([[0.9, 0.91, 0.92, 0.1, 0.1, None, None]], has_text=False)
    assert re.findall(r'<rect class="(\w+)"', chart) == ["h8", "h0", "gap"]
    widths = [float(width) for width in re.findall(r'<rect [^>]*width="([\d.]+)"', chart)]
    assert widths[0] == pytest.approx(1.5 * widths[1], abs=0.4)


def test_labels_that_do_not_fit_are_cut_or_turned() -> None:
    names = ["a_task_with_a_name_that_is_far_too_long", "short"]
    chart = heat_maps(
        "Title", [Panel(name="model", values=[[0.1] * 6, [0.2] * 6])], "Caption.", rows=names,
        columns=["first_class"] * 6, colours=Colours(low=0.0, high=1.0), x_axis="x", y_axis="y", show=str,
        has_text=True,
    )  # fmt: skip
    assert f"<title>{names[0]}</title>" in chart
    assert ">a_task_with_a_nam…</text>" in chart
    assert chart.count("rotate(-35") == 6


def test_error_chart_draws_known_values_with_their_whiskers() -> None:
    series = [
        ErrorSeries(name="one", values=[(1.0, 0.5), None, (2.0, 0.0)], style=STYLES["sparse"]),
        ErrorSeries(name="two", values=[None, None, None], style=STYLES["repaired"]),
    ]
    chart = error_chart(
        "Title", ["a", "b", "c"], series, "Caption.", x_axis="x", y_label="y", show=str,
        level=Level(name="chance", value=0.5),
    )  # fmt: skip
    parse(chart)
    assert "two: not run" in chart
    assert re.findall(r"<title>([^<]*)</title>", chart) == ["one, a: 1.0 ± 0.5", "one, c: 2.0"]
    assert "one 1.0 ± 0.5, 2.0" in chart
    assert len(re.findall(r'<path class="line thin" d="M[\d.]+ [\d.]+V', chart)) == 1


def test_categories_that_would_touch_stand_on_two_lines() -> None:
    def labels(*categories: str) -> list[tuple[str, str]]:
        series = [ErrorSeries(name="one", values=[(1.0, 0.1)] * len(categories), style=STYLES["sparse"])]
        chart = error_chart("Title", categories, series, "Caption.", x_axis="x", y_label="y", show=str)
        return re.findall(r'y2="254"/><text [^>]*y="([\d.]+)"[^>]*>([^<]*)<', chart)

    assert labels("a", "b", "c") == [("270.0", "a"), ("270.0", "b"), ("270.0", "c")]
    names = ("commonsense", "reading", "knowledge", "maths and code")
    assert labels(*names) == [("270.0", names[0]), ("288.0", names[1]), ("270.0", names[2]), ("288.0", names[3])]


def test_scatter_names_what_was_not_run() -> None:
    points = [
        PlacedPoint(name="fast", place=(40.0, 17.0), style=STYLES["sparse"]),
        PlacedPoint(name="rule", place=(20.0, 18.0), style=STYLES["dense"], is_labelled=True),
        PlacedPoint(name="absent", place=None, style=STYLES["repaired"]),
    ]
    chart = scatter_chart("Title", points, "Caption.", x_axis="tokens per second", y_label="y", show=str)
    parse(chart)
    assert "absent: not run" in chart
    assert ">rule</text>" in chart
    assert "<title>fast: 17.0 at 40 tokens per second</title>" in chart
