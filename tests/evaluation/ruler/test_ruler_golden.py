"""Prompts equal NVIDIA's to the byte; the golden files were made by its own scripts (Apache-2.0)."""

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from bankwise.evaluation.ruler import TASKS, Generator, generate
from bankwise.evaluation.ruler.vt import VariableTracking
from bankwise.upcycle.loading import LoadedDense

GOLDEN = Path(__file__).parent / "golden"
CASES = sorted(path.stem for path in GOLDEN.glob("*-seed42.json"))
SEARCH_CASES = [case for case in CASES if not case.startswith("fwe")]


def golden(case: str) -> dict[str, Any]:
    return json.loads((GOLDEN / f"{case}.json").read_text(encoding="utf-8"))


def sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def generator(case: str, smollm2: LoadedDense) -> Generator:
    args = golden(case)["args"]
    return Generator(args["task"], smollm2.tokenizer, max_seq_length=args["max_seq_length"], seed=args["random_seed"])


def test_all_six_cases_are_there() -> None:
    assert len(CASES) == 6


def test_tokenizer_is_the_golden_one(smollm2: LoadedDense) -> None:
    probe = golden("tokenizer_probe")
    assert len(smollm2.tokenizer) == probe["vocab_size"]
    for one in probe["probes"]:
        assert smollm2.tokenizer(one["text"], add_special_tokens=False)["input_ids"] == one["ids"]


@pytest.mark.parametrize("case", CASES)
def test_rows_equal_the_golden_ones(case: str, smollm2: LoadedDense) -> None:
    wanted = golden(case)
    rows = list(generator(case, smollm2).rows(len(wanted["samples"])))
    assert rows[0]["input"] == wanted["row0_input"]
    for row, sample in zip(rows, wanted["samples"], strict=True):
        prompt = row["input"] + row["answer_prefix"]
        assert sha256(row["input"]) == sample["input_sha256"]
        assert sha256(prompt) == sample["prompt_sha256"]
        assert len(row["input"]) == sample["input_chars"]
        assert len(smollm2.tokenizer.tokenize(prompt)) == sample["prompt_tokens"]
        for key in ("index", "length", "answer_prefix", "outputs"):
            assert row[key] == sample[key]
        assert row.get("token_position_answer") == sample.get("token_position_answer")
        assert row["length_w_model_temp"] == row["length"]
        assert row["details"]["units"] == sample["units"]
        assert row["details"]["row"] == sample["row"]


@pytest.mark.parametrize("case", SEARCH_CASES)
def test_length_search_takes_the_golden_path(case: str, smollm2: LoadedDense) -> None:
    wanted = golden(case)["search"]
    search = generator(case, smollm2).search
    assert search.estimate == wanted["estimate"]
    assert search.bounds == tuple(wanted["bounds"])
    assert [list(step) for step in search.trace] == wanted["trace"]
    assert search.units == wanted["units"]


def test_demonstration_of_variable_tracking_takes_the_golden_path(smollm2: LoadedDense) -> None:
    wanted = golden("vt-4096-seed42")["search"]
    family = generator("vt-4096-seed42", smollm2).family
    assert isinstance(family, VariableTracking)
    assert [list(step) for step in family.demo_search.trace] == wanted["demo_trace"]
    assert family.demo_tokens == wanted["demo_tokens"]


def test_frequent_words_have_the_golden_sizes(smollm2: LoadedDense) -> None:
    wanted = golden("fwe-4096-seed42")["search"]
    run = generator("fwe-4096-seed42", smollm2)
    assert run.search.units == wanted["units"]
    assert run.family.increment == wanted["step"]
    assert run.family.vocabulary_size == wanted["vocab_size"]


@pytest.mark.parametrize("case", CASES)
def test_catalogue_has_the_golden_arguments(case: str) -> None:
    args = golden(case)["args"]
    task = TASKS[args["task"]]
    assert task.family == args["family"]
    assert task.tokens_to_generate == args["tokens_to_generate"]
    assert dict(task.arguments) == args["task_args"]


def test_generate_gives_the_same_rows_as_its_generator(smollm2: LoadedDense) -> None:
    rows = generate("niah_single_1", smollm2.tokenizer, max_seq_length=4096, num_samples=2)
    assert rows == list(generator("niah_single_1-4096-seed42", smollm2).rows(2))
