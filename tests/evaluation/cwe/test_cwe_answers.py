"""Every class of items and answers on answers made by hand, and the order of precedence between them."""

import itertools
from functools import cache

import pytest

from bankwise.evaluation.cwe import ANSWER_CLASSES, ITEM_CLASSES, read_answer
from bankwise.evaluation.cwe.answers import has_loop, within_one_edit

COMMON = ["shoe", "ATM", "ad hoc", "jalapeño", "well-being", "coyote", "art", "metal", "winter", "pencil"]
REST = ["gum", "Polish", "lantern", "party", "river"]
DEMO_ANSWER = ["apple", "bridge", "cactus", "donkey", "engine", "fabric", "guitar", "hammer", "island", "jungle"]
WORDS = {
    "common": COMMON,
    "rest": REST,
    "demo_words": [*DEMO_ANSWER, "kettle", "ladder", "gum", "coyote"],
    "demo_answer": DEMO_ANSWER,
}
LITE = {"common": COMMON[:3], "rest": REST, "demo_words": DEMO_ANSWER, "demo_answer": DEMO_ANSWER[:3]}


def numbered(*items: str) -> str:
    return "".join(f" {number}. {item}" for number, item in enumerate(items, start=1))


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        (["shoe"], ["correct"]),
        (["SHOE", "atm", "Ad Hoc", "Jalapeño"], ["correct"] * 4),  # case never matters, on either side
        (["shoe", "Shoe"], ["correct", "repeat"]),
        (["gum", "gum", "zzzz", "zzzz"], ["rare", "repeat", "off_list", "repeat"]),
        (["polish"], ["rare"]),
        (["coyote"], ["correct"]),  # also in the demonstration
        (["gum"], ["rare"]),  # also in the demonstration
        (["apple", "kettle"], ["demo", "demo"]),
        (["shoe laces"], ["near"]),  # contains a word
        (["pen"], ["near"]),  # lies in a word
        (["metel", "metl", "mettal"], ["near", "near", "near"]),  # changed, dropped, inserted
        (["katle", "the most common"], ["off_list", "off_list"]),  # two edits away, function words
    ],
)
def test_each_item_has_the_first_class_that_fits(items, expected):
    answer = read_answer(numbered(*items), WORDS)
    assert answer.items == tuple(item.lower() for item in items)
    assert list(answer.item_classes) == expected


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ("", "null"),
        (" \n\t ", "null"),
        ("1. 2. 3.", "unparsed"),
        (", ,\n,", "unparsed"),
        (numbered(*DEMO_ANSWER), "demo_copy"),
        (numbered(*DEMO_ANSWER[:5]), "demo_copy"),  # before short
        (numbered(*DEMO_ANSWER[:5] * 3), "demo_copy"),  # before loop
        (numbered(*DEMO_ANSWER[:4]), "short"),
        (numbered(*["apple"] * 5), "loop"),  # one word of the demonstration, again and again
        (numbered(*["shoe", "gum"] * 3), "loop"),  # before short
        (numbered(*["shoe", "gum"] * 2, "shoe"), "short"),
        (numbered(*COMMON[:9]), "short"),
        (numbered(*COMMON), "ok"),
        (numbered(*["dull", "grey", "stone"] * 2, *COMMON[:4]), "ok"),  # a cycle, but only twice
    ],
)
def test_each_answer_has_the_first_class_that_fits(prediction, expected):
    assert read_answer(prediction, WORDS).answer_class == expected


def test_words_of_the_demonstration_without_its_answers_are_no_copy():
    words = WORDS | {"demo_answer": ["x1", "x2", "x3", "x4", "x5", "x6", "x7", "x8", "x9", "x10"]}
    assert read_answer(numbered(*DEMO_ANSWER), words).answer_class == "ok"


def test_without_numbers_commas_and_lines_part_the_items():
    answer = read_answer("shoe, ATM\ngum ,zzzz", WORDS)
    assert answer.items == ("shoe", "atm", "gum", "zzzz")
    assert answer.item_classes == ("correct", "correct", "rare", "off_list")
    assert answer.answer_class == "short"


def test_with_numbers_commas_part_nothing():
    assert read_answer("1. shoe, ATM 2. gum", WORDS).items == ("shoe, atm", "gum")


def test_shorter_answers_are_judged_by_their_own_size():
    assert read_answer(numbered("shoe", "gum"), LITE).answer_class == "short"
    assert read_answer(numbered("shoe", "gum", "river"), LITE).answer_class == "ok"
    assert read_answer(numbered("apple", "shoe", "river"), LITE).answer_class == "ok"
    assert read_answer(numbered("apple", "bridge", "river"), LITE).answer_class == "demo_copy"


def test_words_that_only_the_substring_rule_credits_are_counted():
    assert read_answer(numbered("party", "shoes", "Metal"), WORDS).substring_only == 2  # art, shoe
    assert read_answer(numbered("party", "art"), WORDS).substring_only == 0
    assert read_answer("", WORDS).substring_only == 0


def test_loops_are_found_wherever_they_stand():
    assert has_loop(["x", "y", "a", "b", "c", "a", "b", "c", "a", "b", "c", "z"])
    assert has_loop(["x", "a", "a", "a"])
    assert not has_loop(["a", "b", "a", "b", "b", "a"])
    assert not has_loop(["a", "a", "b", "a", "a"])
    assert not has_loop([])


def test_loop_equals_its_definition_on_all_short_answers():
    for length in range(8):
        for items in itertools.product("ab", repeat=length):
            text = "".join(items)
            blocks = {text[i:j] for i in range(length) for j in range(i + 1, length + 1)}
            assert has_loop(items) == any(block * 3 in text for block in blocks)


def test_one_edit_equals_the_edit_distance():
    @cache
    def distance(a: str, b: str) -> int:
        if not a or not b:
            return len(a) + len(b)
        return min(distance(a[1:], b) + 1, distance(a, b[1:]) + 1, distance(a[1:], b[1:]) + (a[0] != b[0]))

    words = ["".join(letters) for length in range(5) for letters in itertools.product("ab", repeat=length)]
    for a, b in itertools.product(words, repeat=2):
        assert within_one_edit(a, b) == (distance(a, b) <= 1)


def test_names_of_the_classes():
    assert ITEM_CLASSES == ("correct", "repeat", "rare", "demo", "near", "off_list")
    assert ANSWER_CLASSES == ("null", "unparsed", "demo_copy", "loop", "short", "ok")
