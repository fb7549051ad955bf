"""CWE-lite: word counts, sizes, wording, and rows that depend on nothing but preset, seed and number."""

import re
from collections import Counter
from typing import Any

import pytest

from bankwise.errors import ConfigError
from bankwise.evaluation.cwe import LITE_PRESETS, lite
from bankwise.evaluation.cwe.likelihood import answer_text
from bankwise.evaluation.ruler import generate

PROMPT_TOKENS = {"lite-20-3": 540, "lite-40-3": 640, "lite-52-10": 920, "lite-200-10": 1870}
QUESTION = "Question: What are the {k} most common words in the above list?"
PREFIX = " Answer: The top {k} words that appear most often in the list are:"


def lists_of(row: dict[str, Any]) -> list[list[str]]:
    """The entries of the demonstration's list and of the main one."""
    lines = [line for line in row["input"].splitlines() if line.startswith("1. ")]
    return [re.split(r" ?\d+\. ", line)[1:] for line in lines]


@pytest.mark.parametrize("preset", LITE_PRESETS)
def test_counts_wording_and_answer_of_a_preset(preset, smollm2_tokenizer):
    sizes = LITE_PRESETS[preset]
    for row in lite.generate(preset, smollm2_tokenizer, num_samples=4):
        words = row["details"]
        demo, main = lists_of(row)
        assert row["outputs"] == words["common"]
        assert len(words["common"]) == len(words["demo_answer"]) == sizes.common
        assert Counter(main) == Counter(
            dict.fromkeys(words["common"], sizes.repeats[0]) | dict.fromkeys(words["rest"], sizes.repeats[1])
        )
        assert len(set(main)) == sizes.words
        others = set(words["demo_words"]) - set(words["demo_answer"])
        assert Counter(demo) == Counter(
            dict.fromkeys(words["demo_answer"], sizes.demo_repeats[0]) | dict.fromkeys(others, sizes.demo_repeats[1])
        )
        assert len(set(demo)) == 20
        question, prefix = QUESTION.format(k=sizes.common), PREFIX.format(k=sizes.common)
        assert row["answer_prefix"] == prefix
        assert f"{question}{prefix}{answer_text(words['demo_answer'])}\nBelow is a numbered list" in row["input"]
        assert row["input"].endswith(question)


@pytest.mark.parametrize("preset", LITE_PRESETS)
def test_lengths_are_those_of_the_documentation(preset, smollm2_tokenizer):
    rows = lite.generate(preset, smollm2_tokenizer, num_samples=5)
    room = 12 * LITE_PRESETS[preset].common
    lengths = [len(smollm2_tokenizer(row["input"] + row["answer_prefix"])["input_ids"]) for row in rows]
    assert [row["length"] for row in rows] == [length + room for length in lengths]
    assert sum(lengths) / len(lengths) == pytest.approx(PROMPT_TOKENS[preset], rel=0.04)


def test_rows_look_like_those_of_ruler(tokenizer):
    (official,) = generate("cwe", tokenizer, max_seq_length=2048, num_samples=1, permutation="per_sample")
    (row,) = lite.generate("lite-52-10", tokenizer, num_samples=1)
    assert row.keys() == official.keys()
    assert row["details"].keys() == official["details"].keys()
    assert row["answer_prefix"] == official["answer_prefix"]  # ten words, so the wording is RULER's
    assert official["details"]["ruler_compatible"]
    assert not row["details"]["ruler_compatible"]
    assert row["details"]["permutation"] == "per_sample"


def test_rows_depend_on_preset_seed_and_number_alone(tokenizer):
    three = lite.generate("lite-20-3", tokenizer, num_samples=3, seed=1)
    assert lite.generate("lite-20-3", tokenizer, num_samples=2, seed=1) == three[:2]
    other_seed = lite.generate("lite-20-3", tokenizer, num_samples=3, seed=2)
    other_preset = lite.generate("lite-40-3", tokenizer, num_samples=3, seed=1)
    texts = [row["input"] for rows in (three, other_seed, other_preset) for row in rows]
    assert len(set(texts)) == 9
    demonstrations = {tuple(rows[0]["details"]["demo_words"]) for rows in (three, other_seed, other_preset)}
    assert len(demonstrations) == 3  # drawn first and of one size, so another stream alone tells them apart


def test_each_row_has_its_own_layout(tokenizer):
    """In a shared layout the first common word would stand at the same places of every row."""
    places = set()
    for row in lite.generate("lite-20-3", tokenizer, num_samples=6):
        _, main = lists_of(row)
        places.add(tuple(place for place, word in enumerate(main) if word == row["outputs"][0]))
    assert len(places) == 6


def test_model_template_wraps_the_task_and_not_the_answer(tokenizer):
    (row,) = lite.generate("lite-20-3", tokenizer, num_samples=1, model_template="<10 {task_template} 10 >")
    assert row["input"].startswith("<10 Below is a numbered list")
    assert row["input"].endswith(QUESTION.format(k=3) + " 10 >")
    assert row["answer_prefix"] == PREFIX.format(k=3)
    with pytest.raises(ConfigError, match=r"no \{task_template\}"):
        lite.generate("lite-20-3", tokenizer, num_samples=1, model_template="task")


def test_unknown_preset_is_refused_with_the_list(tokenizer):
    with pytest.raises(ConfigError, match="no CWE-lite preset 'lite-9'; the presets are lite-20-3, lite-40-3"):
        lite.generate("lite-9", tokenizer, num_samples=1)
