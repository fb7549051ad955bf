"""Official scores credit substrings, strict ones whole items; lengths add up as RULER's table does."""

import pytest

from bankwise.evaluation.ruler.score import (
    effective_length,
    exact,
    is_null,
    length_score,
    occurs,
    official,
    parse_items,
    postprocess,
    string_match_all,
    string_match_part,
    weighted_average,
)


@pytest.mark.parametrize(
    ("prediction", "wanted"),
    [(" shoe\n", "shoe"), ("a\tb\x00c\x1fd", "a\nb\nc\nd"), ("\x00 x \x1f", "x"), ("\x07", ""), ("a\x7fb", "a\x7fb")],
)
def test_postprocessing_turns_control_characters_into_newlines(prediction: str, wanted: str) -> None:
    assert postprocess(prediction) == wanted


def test_a_reference_occurs_in_any_case_and_inside_other_words() -> None:
    assert occurs("art", "The Party")
    assert occurs("ATM", "atm")
    assert not occurs("art", "tra")


def test_all_is_the_share_of_references_and_part_is_any() -> None:
    references = ["shoe", "gum", "hut", "zoo"]
    assert string_match_all("1. Shoe 2. gum 3. x", references) == 0.5
    assert string_match_all("", references) == 0
    assert string_match_part("I think it is the HUT.", references) == 1
    assert string_match_part("none", references) == 0


def test_a_reference_over_a_control_character_counts_only_after_postprocessing() -> None:
    assert string_match_all("ad\x00hoc", ["ad\nhoc"]) == 1


def test_official_score_is_a_percentage_of_two_digits() -> None:
    assert official([1.0, 0.1, 0.0]) == 36.67
    assert official([1.0]) == 100.0


@pytest.mark.parametrize(
    ("prediction", "wanted"),
    [
        ("1. Shoe 2. ad hoc 3. ATM", ["shoe", "ad hoc", "atm"]),
        ("shoe 2. gum\n3. hut", ["shoe", "gum", "hut"]),
        ("shoe, gum,hut\nzoo", ["shoe", "gum", "hut", "zoo"]),
        ("1.2.3. ,", [","]),
        ("", []),
        ("12.", []),
    ],
)
def test_items_stand_between_numbers_else_between_commas_and_newlines(prediction: str, wanted: list[str]) -> None:
    assert parse_items(prediction) == wanted


def test_exact_gives_no_credit_for_a_word_inside_another() -> None:
    references = ["art", "shoe"]
    assert string_match_all("1. party 2. shoe", references) == 1
    assert exact("1. party 2. SHOE", references) == 0.5


def test_nulls_are_answers_with_nothing_in_them() -> None:
    assert is_null(" \n\x00")
    assert not is_null(".")


def test_length_score_names_the_number_of_tasks() -> None:
    assert length_score({"vt": 50.0, "cwe": 100.0}) == (75.0, "mean of 2 tasks")
    assert length_score({"vt": 50.0})[1] == "mean of 1 task"


def test_effective_length_is_the_largest_that_reaches_the_threshold() -> None:
    assert effective_length({4096: 95.0, 8192: 85.6, 16384: 85.5}) == 8192
    assert effective_length({4096: 80.0}) is None
    assert effective_length({}) is None


def test_weighted_averages_are_those_of_the_ruler_table() -> None:
    # Jamba-1.5-large in RULER's README: wAvg (inc) 95.7, wAvg (dec) 96.3.
    scores = dict(zip([4096, 8192, 16384, 32768, 65536, 131072], [96.7, 96.6, 96.4, 96.0, 95.4, 95.1], strict=True))
    assert weighted_average(scores, increasing=True) == pytest.approx(95.75, abs=0.01)
    assert weighted_average(scores, increasing=False) == pytest.approx(96.32, abs=0.01)
