from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fitloop._format import Table, format_number, html_block, metrics_table


def test_text_when_cells_differ_in_length_then_columns_are_aligned() -> None:
    table = Table(("phase", "loss", "t"), [("train", "0.5", "12 ms"), ("v", "10.25", "")])
    assert table.text().splitlines() == [
        "phase   loss      t",
        "train    0.5  12 ms",
        "v      10.25",
    ]


def test_text_when_characters_are_wide_then_are_counted_as_two_columns() -> None:
    assert Table(("名前", "x"), [("a", "1")]).text() == "名前  x\na     1"


def test_text_when_there_are_no_rows_then_is_the_head() -> None:
    assert Table(("a", "b"), []).text() == "a  b"


def test_html_when_cells_have_markup_then_it_is_escaped() -> None:
    html = Table(("<a>",), [("<script>&",)]).html()
    assert "&lt;a&gt;" in html
    assert "&lt;script&gt;&amp;" in html
    assert "<script" not in html


def test_html_when_a_row_is_strong_then_its_cells_are_and_empty_ones_stay_empty() -> None:
    html = Table(("a", "b"), [("1", "2"), ("3", "")], strong={1}).html()
    assert html.count("<strong>") == 1
    assert "<strong>3</strong>" in html


def test_html_when_shown_on_any_theme_then_names_no_colour() -> None:
    html = Table(("a", "b"), [("1", "2")], strong={0}).html()
    assert "color" not in html
    assert "background" not in html


def test_by_metric_when_a_row_lacks_a_name_then_its_cell_is_empty() -> None:
    table = metrics_table("phase", {"train": {"loss": 1.0, "lr": 0.1}, "valid": {"loss": 2.0}})
    assert table.heads == ["phase", "loss", "lr"]
    assert table.rows == [["train", "1.0000", "0.1000"], ["valid", "2.0000", ""]]


def test_html_block_when_parts_are_empty_then_are_left_out() -> None:
    assert html_block("a", "", "b") == "<div><div>a</div><div>b</div></div>"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.528, "0.5280"),
        (0.0, "0.0000"),
        (0.0714285, "0.0714"),
        (12.34567, "12.3457"),
        (0.0005, "0.0005"),
        (0.00025, "0.00025"),
        (0.0012345, "0.001234"),
        (1e-5, "1e-05"),
        (12345.6, "12346"),
        (28526673921983411525016092672.0, "2.853e+28"),
        (math.nan, "nan"),
        (-math.inf, "-inf"),
    ],
)
def test_number_when_formatted_then_is_as_in_the_seed_or_has_four_digits(
    value: float, text: str
) -> None:
    assert format_number(value) == text


@given(st.floats(-1e300, 1e300))
def test_number_when_formatted_then_is_short_and_near(value: float) -> None:
    text = format_number(value)
    assert len(text) <= 11
    assert math.isclose(float(text), value, rel_tol=5.1e-3)
