"""What cannot be made is refused in one line that says why, where upstream would never return."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from bankwise.errors import BankwiseError, ConfigError, DataError
from bankwise.evaluation.ruler import check_task, generate
from bankwise.upcycle.loading import LoadedDense


@pytest.mark.parametrize(
    ("name", "window", "message"),
    [
        (
            "cwe",
            512,
            r"cwe does not fit a window of 512 tokens: the smallest size, \d+ words, takes 6\d\d tokens and 120",
        ),
        (
            "vt",
            512,
            r"vt does not fit a window of 512 tokens: the smallest size, 5 sentences, takes 7\d\d tokens and 30",
        ),
        ("niah_single_1", 256, r"the smallest size, 5 sentences, takes 2\d\d tokens and 128 for the answer"),
        ("niah_multikey_3", 512, r"the smallest size, 5 sentences, takes [56]\d\d tokens"),
        ("fwe", 100, r"fwe does not fit a window of 100 tokens: it has room for 1 coded words"),
        ("niah_single_2@sotu", 512, r"the smallest size, 500 words"),
        ("qa_1@squad1k", 512, r"the smallest size, 10 documents"),
    ],
)
def test_window_below_the_smallest_prompt_is_refused(
    name: str, window: int, message: str, smollm2: LoadedDense
) -> None:
    with pytest.raises(ConfigError, match=message):
        generate(name, smollm2.tokenizer, max_seq_length=window, num_samples=1)
    with pytest.raises(ConfigError, match=message):
        check_task(name, smollm2.tokenizer, max_seq_length=window)


def test_template_that_fills_the_window_is_refused(smollm2: LoadedDense) -> None:
    with pytest.raises(
        ConfigError, match=r"fwe does not fit a window of 256 tokens: the smallest size, \d+ words, takes"
    ):
        generate("fwe", smollm2.tokenizer, max_seq_length=256, model_template="Do it. " * 80 + "{task_template}")


@pytest.mark.parametrize("name", ["cwe", "vt", "fwe", "niah_multikey_3", "niah_single_2@sotu", "qa_1@squad1k"])
def test_check_passes_what_can_be_made(name: str, smollm2: LoadedDense) -> None:
    check_task(name, smollm2.tokenizer, max_seq_length=2048)


def test_demonstration_that_cannot_fit_is_blamed_on_the_tokenizer(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError, match=r"the demonstration of vt .* 500 tokens.*cannot be made with this tokenizer"):
        check_task("vt", tokenizer, max_seq_length=100_000)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "cwf"}, r"RULER has no task 'cwf'; the tasks are niah_single_1, .*qa_1@squad1k"),
        ({"seed": -1}, r"seed=-1 is outside \[0, 2\*\*32\)"),
        ({"seed": 2**32}, "seed=4294967296"),
        ({"permutation": "own"}, "permutation='own' is not known; use upstream or per_sample"),
        ({"model_template": "no place"}, "has no {task_template} in it"),
        ({"model_template": "{task_template} {role}"}, r"cannot be filled in \(KeyError: 'role'\)"),
        ({"model_template": "{{role}} {task_template}"}, r"cannot be filled in \(KeyError: 'role'\)"),
        ({"model_template": "{task_template} }"}, r"cannot be filled in \(ValueError"),
    ],
)
def test_arguments_out_of_range_are_refused(change: dict[str, Any], message: str, smollm2: LoadedDense) -> None:
    arguments: dict[str, Any] = {"task": "fwe", "max_seq_length": 1024, "num_samples": 1} | change
    with pytest.raises(ConfigError, match=message):
        generate(tokenizer=smollm2.tokenizer, **arguments)


def test_words_beyond_the_list_need_the_second_list(word_tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    window: dict[str, Any] = {"max_seq_length": 56_000, "num_samples": 1}
    with pytest.raises(
        DataError, match=r"needs \d+ distinct words, and wonderwords has 8166; put RULER's english_words"
    ):
        generate("cwe", word_tokenizer, **window)
    file = tmp_path / "english_words.json"
    file.write_text(json.dumps({str(i): f"word{i}" for i in range(9000)}), encoding="utf-8")
    with pytest.raises(DataError, match=r"needs \d+ distinct words, and english_words\.json has 9000"):
        generate("cwe", word_tokenizer, **window, data_dir=tmp_path)
    file.write_text(json.dumps({str(i): f"word{i}" for i in range(25_000)}), encoding="utf-8")
    (row,) = generate("cwe", word_tokenizer, **window, data_dir=tmp_path)
    assert row["details"]["units"] > 8166
    assert all(word.startswith("word") for word in row["outputs"])
    assert not any(word.startswith("word1") for word in row["details"]["demo_words"])
    file.write_text("[]", encoding="utf-8")
    with pytest.raises(DataError, match=r"english_words\.json is not a JSON object of words"):
        generate("cwe", word_tokenizer, **window, data_dir=tmp_path)


def test_errors_are_one_line(smollm2: LoadedDense) -> None:
    for name, window in (("cwe", 512), ("qa_2", 512), ("nothing", 512)):
        with pytest.raises(BankwiseError) as caught:
            check_task(name, smollm2.tokenizer, max_seq_length=window)
        assert "\n" not in str(caught.value)
