"""Rows keep RULER's rules at other lengths, seeds and tasks than the golden ones, in both layouts."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from bankwise.evaluation.ruler import OFFICIAL_TASKS, TASKS, Generator, generate, write_jsonl
from bankwise.upcycle.loading import LoadedDense

OFFLINE = [name for name in OFFICIAL_TASKS if not TASKS[name].source]
UPSTREAM_KEYS = ["index", "input", "outputs", "length", "length_w_model_temp", "answer_prefix"]
NUMBER = re.compile(r"\d{7}")
UUID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")


def prompt(row: dict[str, Any]) -> str:
    return row["input"] + row["answer_prefix"]


def entries(row: dict[str, Any]) -> list[str]:
    """Words of the main list of a CWE row, in their order."""
    context = row["input"].split("appear most often.\n")[-1].split("\nQuestion:")[0]
    return [word.strip() for word in re.split(r"(?:^| )\d+\. ", context)[1:]]


def check_row(row: dict[str, Any], name: str, window: int, smollm2: LoadedDense) -> None:
    task = TASKS[name]
    keys = [*UPSTREAM_KEYS, *(["token_position_answer"] if task.family == "niah" else []), "details"]
    assert list(row) == keys
    assert row["length"] == len(smollm2.tokenizer.tokenize(prompt(row))) + task.tokens_to_generate <= window
    assert row["outputs"]
    assert all(reference in row["input"] for reference in row["outputs"])
    assert row["details"] | {"row": 0, "units": 0} == row["details"] | {
        "task": name, "row": 0, "units": 0, "ruler_compatible": True
    }  # fmt: skip


@pytest.mark.parametrize("name", OFFLINE)
@pytest.mark.parametrize(("window", "seed"), [(1024, 7), (5000, 43), (12000, 2**31)])
def test_rows_fit_the_window_and_hold_their_references(name: str, window: int, seed: int, smollm2: LoadedDense) -> None:
    for row in generate(name, smollm2.tokenizer, max_seq_length=window, num_samples=3, seed=seed):
        check_row(row, name, window, smollm2)


def test_the_smallest_windows_that_hold_a_task(smollm2: LoadedDense) -> None:
    for name, window in {"fwe": 256, "niah_single_1": 400, "niah_multikey_2": 400, "vt": 900, "cwe": 900}.items():
        for row in generate(name, smollm2.tokenizer, max_seq_length=window, num_samples=4, seed=3):
            check_row(row, name, window, smollm2)


@pytest.mark.parametrize(("window", "common", "rest"), [(4095, 6, 1), (4096, 30, 3), (9000, 30, 3)])
def test_common_words_stand_exactly_as_often_as_ruler_says(
    window: int, common: int, rest: int, smollm2: LoadedDense
) -> None:
    for row in generate("cwe", smollm2.tokenizer, max_seq_length=window, num_samples=2, seed=5):
        details = row["details"]
        wanted = dict.fromkeys(details["common"], common) | dict.fromkeys(details["rest"], rest)
        assert Counter(entries(row)) == wanted
        assert row["outputs"] == details["common"]
        assert len(wanted) == details["units"] == len(details["common"] + details["rest"])
        assert len(details["demo_words"]) == (20 if window < 4096 else 40)
        assert details["demo_answer"] == details["demo_words"][:10]
        answer = " ".join(f"{number}. {word}" for number, word in enumerate(details["demo_answer"], start=1))
        assert f"{row['answer_prefix']} {answer}\nBelow is" in row["input"]


def test_frequent_words_are_ranks_two_to_four(smollm2: LoadedDense) -> None:
    for row in generate("fwe", smollm2.tokenizer, max_seq_length=2048, num_samples=3, seed=9):
        text = row["input"].split("coded words. ")[1].split("\nQuestion")[0]
        ranked = [word for word, _ in Counter(text.split(" ")).most_common(4)]
        assert ranked == ["...", *row["outputs"]]


def test_chain_is_in_order_and_the_demonstration_is_solved(smollm2: LoadedDense) -> None:
    for row in generate("vt", smollm2.tokenizer, max_seq_length=2048, num_samples=5, seed=9):
        demo, _, main = row["input"].partition("\n\nMemorize")
        assert re.search(r"they are:  [A-Z]{3} [A-Z]{3} [A-Z]{3} [A-Z]{3} [A-Z]{3}$", demo)
        assert "12345" not in row["input"]
        places = [main.index(f"VAR {name} = ") for name in row["outputs"]]
        assert places == sorted(places)
        value = re.search(rf"VAR {row['outputs'][0]} = (\d{{5}})\n", main)
        assert value is not None
        assert f"assigned the value {value[1]}, they are: " in row["answer_prefix"]


@pytest.mark.parametrize(
    ("name", "pattern", "count"),
    [
        ("niah_single_1", NUMBER, 1),
        ("niah_single_2", NUMBER, 1),
        ("niah_single_3", UUID, 1),
        ("niah_multikey_1", NUMBER, 4),
        ("niah_multivalue", NUMBER, 4),
        ("niah_multiquery", NUMBER, 4),
    ],
)
def test_needles_are_as_many_as_the_task_says(
    name: str, pattern: re.Pattern[str], count: int, data_dir: Path, smollm2: LoadedDense
) -> None:
    for row in generate(name, smollm2.tokenizer, max_seq_length=2048, num_samples=2, data_dir=data_dir):
        check_row(row, name, 2048, smollm2)
        assert row["input"].count("One of the special magic") == count == len(pattern.findall(row["input"]))
        assert set(row["outputs"]) <= set(pattern.findall(row["input"]))


@pytest.mark.parametrize(
    ("name", "keys", "values"), [("niah_multikey_2", None, NUMBER), ("niah_multikey_3", UUID, UUID)]
)
def test_needle_haystack_is_made_of_other_needles(
    name: str, keys: re.Pattern[str] | None, values: re.Pattern[str], smollm2: LoadedDense
) -> None:
    (row,) = generate(name, smollm2.tokenizer, max_seq_length=2048, num_samples=1, seed=1)
    lines = row["input"].split("\n")[1:-1]
    assert len(lines) == len(set(lines)) == row["details"]["units"] + 1
    for line in lines:
        key, value = re.fullmatch(r"One of the special magic \w+ for (.*) is: (.*)\.", line).groups()  # type: ignore[union-attr]
        assert values.fullmatch(value)
        assert keys is None or keys.fullmatch(key)


def test_one_asked_value_is_asked_in_the_singular(data_dir: Path, smollm2: LoadedDense) -> None:
    def first(name: str) -> dict[str, Any]:
        return generate(name, smollm2.tokenizer, max_seq_length=2048, num_samples=1, data_dir=data_dir)[0]

    single, uuid, many, asked = map(first, ("niah_single_1", "niah_single_3", "niah_multivalue", "niah_multiquery"))
    assert single["input"].startswith("A special magic number is hidden within")
    assert "What is the special magic number for " in single["input"]
    assert single["answer_prefix"].endswith("mentioned in the provided text is")
    assert uuid["input"].startswith("A special magic uuid is hidden")
    assert "One of the special magic uuids for " in uuid["input"]
    assert many["input"].startswith("Some special magic numbers are hidden")
    assert many["answer_prefix"].endswith("mentioned in the provided text are")
    assert re.search(r"numbers for (\S+, ){3}and \S+ mentioned", asked["answer_prefix"])
    assert len(asked["outputs"]) == 4


def test_index_of_a_needle_row_is_where_its_first_answer_stands(smollm2: LoadedDense) -> None:
    for row in generate("niah_multikey_2", smollm2.tokenizer, max_seq_length=1024, num_samples=3, seed=6):
        before = row["input"][: row["index"]]
        assert row["input"].startswith(row["outputs"][0], row["index"])
        assert row["outputs"][0] not in before
        assert row["token_position_answer"] == len(smollm2.tokenizer.tokenize(before))


def test_seeds_differ_and_repeat(smollm2: LoadedDense) -> None:
    def made(seed: int) -> list[dict[str, Any]]:
        return generate("niah_multikey_2", smollm2.tokenizer, max_seq_length=1024, num_samples=2, seed=seed)

    assert made(1) == made(1)
    assert made(1) != made(2)


def test_template_tokens_are_kept_free_and_counted(smollm2: LoadedDense) -> None:
    window = {"max_seq_length": 4096, "num_samples": 3}
    for name in OFFLINE:
        rows = generate(name, smollm2.tokenizer, **window, model_template_token=90)  # type: ignore[arg-type]
        assert max(row["length"] for row in rows) <= 4006
        assert all(row["length_w_model_temp"] == row["length"] + 90 for row in rows)


@pytest.mark.parametrize("name", OFFLINE)
def test_rows_of_their_own_do_not_depend_on_other_rows(name: str, smollm2: LoadedDense) -> None:
    def rows_of(permutation: Any) -> tuple[list[Any], list[Any]]:
        run = Generator(name, smollm2.tokenizer, max_seq_length=4096, seed=3, permutation=permutation)
        return list(run.rows(3)), list(run.rows(3))

    first, again = rows_of("per_sample")
    assert first == again
    assert len({row["input"] for row in first}) == 3
    assert {row["details"]["permutation"] for row in first} == {"per_sample"}
    for row in first:
        check_row(row, name, 4096, smollm2)
    shared, other = rows_of("upstream")
    assert shared != other


def test_only_rows_of_their_own_have_layouts_of_their_own(smollm2: LoadedDense) -> None:
    layouts: dict[str, list[tuple[int, set[tuple[int, ...]]]]] = {}
    for permutation in ("upstream", "per_sample"):
        places: dict[int, list[tuple[int, ...]]] = {}
        for row in generate(
            "cwe", smollm2.tokenizer, max_seq_length=1500, num_samples=12, seed=3, permutation=permutation
        ):
            words = entries(row)
            first = row["outputs"][0]
            places.setdefault(len(words), []).append(tuple(i for i, word in enumerate(words) if word == first))
        layouts[permutation] = [(len(rows), set(rows)) for rows in places.values()]
    assert max(count for count, _ in layouts["upstream"]) > 1
    assert all(len(distinct) == 1 for _, distinct in layouts["upstream"])
    assert max(count for count, _ in layouts["per_sample"]) > 1
    assert all(len(distinct) == count for count, distinct in layouts["per_sample"])


def test_both_layouts_start_from_the_same_size(smollm2: LoadedDense) -> None:
    searches = [
        Generator("cwe", smollm2.tokenizer, max_seq_length=2048, permutation=permutation).search
        for permutation in ("upstream", "per_sample")
    ]
    assert searches[0] == searches[1]


def test_file_has_upstreams_keys_alone(smollm2: LoadedDense, tmp_path: Path) -> None:
    rows = generate("cwe", smollm2.tokenizer, max_seq_length=1024, num_samples=2)
    write_jsonl(rows, tmp_path / "validation.jsonl")
    lines = (tmp_path / "validation.jsonl").read_text(encoding="utf-8").split("\n")
    assert lines.pop() == ""
    read = [json.loads(line) for line in lines]
    assert [list(row) for row in read] == [UPSTREAM_KEYS] * 2
    assert read == [{key: row[key] for key in UPSTREAM_KEYS} for row in rows]
