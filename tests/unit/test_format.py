from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fitloop._format import (
    Table,
    best_words,
    format_clock_parts,
    format_duration,
    format_number,
    format_rates,
    format_time_left,
    html_block,
    natural_key,
    run_summary,
)


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


def test_html_block_when_parts_are_empty_then_are_left_out() -> None:
    assert html_block("a", "", "b") == "<div><div>a</div><div>b</div></div>"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.528, "0.5280"),
        (0.0, "0.0000"),
        (0.0714285, "0.0714"),
        (12.34567, "12.35"),
        (645.411, "645.4"),
        (6454.11, "6454"),
        (0.0005, "0.0005"),
        (0.001, "0.001"),
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


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0 ms"),
        (0.7571, "757 ms"),
        (0.9996, "1 s"),
        (1.434, "1.4 s"),
        (59.94, "59.9 s"),
        (59.96, "1 min"),
        (125.4, "2 min 5 s"),
        (3600.0, "1 h"),
        (11_100.0, "3 h 5 min"),
        (97_300.0, "1 d 3 h"),
    ],
)
def test_duration_when_formatted_then_is_as_people_write_it(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "1 s"), (45.4, "45 s"), (100.0, "2 min"), (1830.0, "30 min"), (7500.0, "2 h 5 min")],
)
def test_time_left_when_formatted_then_is_a_round_figure(seconds: float, text: str) -> None:
    assert format_time_left(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.757, "757 ms"), (37.757, "37 s 757 ms"), (189.048, "03 m 09 s 048 ms")],
)
def test_clock_parts_when_formatted_then_are_as_in_the_seed(seconds: float, text: str) -> None:
    assert format_clock_parts(seconds) == text


def test_rates_when_groups_differ_then_are_the_lowest_and_the_highest() -> None:
    assert format_rates({"lr": 0.1}) == "0.1"
    assert format_rates({"head": 0.01, "body": 1e-5, "neck": 1e-3}) == "1e-05 to 0.01"


@pytest.mark.parametrize(
    ("epoch", "first", "where"),
    [
        (3, 1, "epoch 3"),
        (7, 6, "epoch 2 of this fit, 7 over all fits"),
        (3, 6, "epoch 3, of an earlier fit"),
    ],
)
def test_best_when_in_a_later_fit_then_has_both_numbers(epoch: int, first: int, where: str) -> None:
    assert best_words("f1", 0.5, epoch, first) == f"best f1 0.5000 in {where}"


def test_summary_when_a_run_ended_early_then_says_why_and_of_how_many_epochs() -> None:
    assert run_summary(3, 3, 1.4, "completed", "best") == "3 epochs in 1.4 s, best"
    assert run_summary(2, 3, 1.4, "prompt") == "2 of 3 epochs in 1.4 s, ended at the question"
    assert run_summary(1, 1, 0.5, "my_reason") == "1 epoch in 500 ms, my reason"


def test_natural_key_sorts_by_numbers_then_by_letters() -> None:
    names = ["lr=0.01_w=64", "lr=0.003_w=256", "lr=0.003_w=64", "lr=1e-4_w=8", "10", "9", "a", ""]
    assert sorted(names, key=natural_key) == [
        "",
        "9",
        "10",
        "a",
        "lr=1e-4_w=8",
        "lr=0.003_w=64",
        "lr=0.003_w=256",
        "lr=0.01_w=64",
    ]


@given(st.lists(st.text()))
def test_natural_key_of_any_text_can_be_compared(names: list[str]) -> None:
    ordered = sorted(names, key=natural_key)
    assert sorted(ordered, key=natural_key) == ordered
