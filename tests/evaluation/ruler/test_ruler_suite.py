"""The suite turns answers into measures and summaries, and refuses what cannot be run before any work."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from bankwise.config.evaluation import EvaluationPlan, RulerPlan
from bankwise.evaluation.cwe.prompts import cwe_prompt
from bankwise.evaluation.engine import Engine, Prompt, Reading
from bankwise.evaluation.ruler import generate
from bankwise.evaluation.suites import ruler
from bankwise.upcycle.loading import LoadedDense


@dataclass
class Scripted:
    """An engine whose answers are given by the prompt's text."""

    tokenizer: Any
    answer: Callable[[str], str]
    prompts: list[Prompt] = field(default_factory=list)
    lead_ids: tuple[int, ...] = ()

    def read(self, prompts: Sequence[Prompt], *, label: str = "") -> list[Reading]:
        self.prompts += prompts
        return [
            Reading(
                prompt_tokens=1, truncated=False, continuations=(), probes=(), generated=self.answer(prompt.text),
                new_tokens=1,
            )
            for prompt in prompts
        ]  # fmt: skip


def plan(**settings: Any) -> EvaluationPlan:
    return EvaluationPlan(suites=["ruler"], ruler=RulerPlan(**settings))


def answers_of(tokenizer: Any, settings: RulerPlan) -> dict[str, list[str]]:
    """The references of every prompt of a plan."""
    return {
        row["input"] + row["answer_prefix"]: row["outputs"]
        for name in settings.tasks
        for length in settings.lengths
        for permutation in settings.permutation
        for row in generate(
            name, tokenizer, max_seq_length=length, num_samples=settings.samples, seed=settings.seed,
            permutation=permutation,
        )
    }  # fmt: skip


def test_perfect_and_partial_answers_are_scored(smollm2: LoadedDense) -> None:
    job = plan(tasks=["fwe", "vt"], lengths=[2048, 1024], samples=3, seed=7)
    references = answers_of(smollm2.tokenizer, job.ruler)
    perfect = Scripted(smollm2.tokenizer, lambda text: ", ".join(references[text]))
    result = ruler.run(perfect, job)  # type: ignore[arg-type]
    assert {(one.task, one.length, one.metric) for one in result.measures} == {
        (task, length, metric)
        for task in ("fwe", "vt")
        for length in (1024, 2048)
        for metric in ("score", "exact", "nulls")
    }  # fmt: skip
    for one in result.measures:
        assert one.value == (0 if one.metric == "nulls" else 100)
        assert (one.section, one.variant, one.unit, one.n) == ("ruler", "upstream", "%", 3)
        assert one.is_headline == (one.metric == "score")
        assert one.note == ""
        assert one.items == tuple(f"{one.task}/{one.length}/upstream/7/{row}" for row in range(3))
    partial = ruler.run(Scripted(smollm2.tokenizer, lambda text: "x" + references[text][0]), job)  # type: ignore[arg-type]
    values = {(one.task, one.length, one.metric): one.value for one in partial.measures}
    assert values["vt", 1024, "score"] == pytest.approx(20)
    assert values["fwe", 1024, "score"] == pytest.approx(100 / 3)
    assert values["fwe", 1024, "exact"] == 0


def test_lengths_are_summed_up(smollm2: LoadedDense) -> None:
    job = plan(tasks=["fwe", "niah_single_1"], lengths=[1024, 2048], samples=2, permutation=["upstream", "per_sample"])
    references = answers_of(smollm2.tokenizer, job.ruler)

    def answer(text: str) -> str:
        """Everything right at 1024; at 2048 only the needles, and nothing elsewhere."""
        is_short = len(smollm2.tokenizer.tokenize(text)) < 1024
        return " ".join(references[text]) if is_short or "magic" in text else ""

    details = ruler.run(Scripted(smollm2.tokenizer, answer), job).details  # type: ignore[arg-type]
    assert [(one["length"], one["permutation"]) for one in details["summary"]] == [
        (1024, "upstream"), (2048, "upstream"), (1024, "per_sample"), (2048, "per_sample")
    ]  # fmt: skip
    for one in details["summary"]:
        assert one["mean"] == (100 if one["length"] == 1024 else 50)
        assert one["nulls"] == ("0/4" if one["length"] == 1024 else "2/4")
        assert one["tasks"] == ["fwe", "niah_single_1"]
        assert one["label"] == "mean of 2 tasks"
        assert one["compatible"] is True
    assert details["effective_length"] == {"upstream": 1024, "per_sample": 1024}
    assert details["weighted"]["upstream"]["increasing"] == pytest.approx((100 + 2 * 50) / 3)
    assert details["weighted"]["per_sample"]["decreasing"] == pytest.approx((2 * 100 + 50) / 3)
    assert details["generator"]["template"] == "{task_template}"


def test_substitutes_stay_out_of_what_is_called_ruler(smollm2: LoadedDense) -> None:
    job = plan(tasks=["fwe", "niah_single_2@sotu", "qa_1@squad1k"], lengths=[2048], samples=1)
    references = answers_of(smollm2.tokenizer, job.ruler)
    result = ruler.run(
        Scripted(smollm2.tokenizer, lambda text: references[text][0] if "coded" not in text else ""),  # type: ignore[arg-type]
        job,
    )
    notes = {one.task: one.note for one in result.measures}
    assert notes == {"niah_single_2@sotu": ruler.NOT_COMPATIBLE, "qa_1@squad1k": ruler.NOT_COMPATIBLE, "fwe": ""}
    by_kind = {one["compatible"]: one for one in result.details["summary"]}
    assert (by_kind[True]["tasks"], by_kind[True]["mean"]) == (["fwe"], 0)
    assert (by_kind[False]["tasks"], by_kind[False]["mean"]) == (["niah_single_2@sotu", "qa_1@squad1k"], 100)
    assert result.details["effective_length"] == {"upstream": None}


def test_common_words_prompts_are_those_of_the_cwe_suite(smollm2: LoadedDense) -> None:
    job = plan(tasks=["cwe"], lengths=[1024], samples=2)
    engine = Scripted(smollm2.tokenizer, lambda text: "")
    ruler.run(engine, job)  # type: ignore[arg-type]
    rows = generate("cwe", smollm2.tokenizer, max_seq_length=1024, num_samples=2)
    assert engine.prompts == [cwe_prompt(row, smollm2.tokenizer, 120) for row in rows]


def test_a_model_is_read_and_its_answers_are_bounded(
    tiny_dense: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast
) -> None:
    job = plan(tasks=["fwe"], lengths=[640], samples=2)
    engine = Engine(tiny_dense(max_position_embeddings=1024), tokenizer)
    result = ruler.run(engine, job)
    score, _, nulls = result.measures
    assert 0 <= score.value <= 100
    assert score.n == 2
    assert result.details["truncated"] == 0
    assert nulls.better == "lower"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": ["cwe", "cwf"]}, "RULER has no task 'cwf'"),
        ({"tasks": []}, "ruler.tasks is empty"),
        ({"lengths": []}, "ruler.lengths is empty"),
        ({"permutation": []}, "ruler.permutation is empty"),
        ({"lengths": [1024, 16384]}, "ruler.lengths holds 16384, which is longer than the model's context of 8192"),
        ({"tasks": ["niah_single_2"]}, "reads PaulGrahamEssays.json"),
        ({"tasks": ["cwe"], "lengths": [512, 1024]}, "cwe does not fit a window of 512 tokens"),
        ({"tasks": ["qa_1@squad1k"], "lengths": [4096], "samples": 1001}, "sample 1001 is asked for"),
        ({"template": "chatty"}, "ruler.template='chatty' has no {task_template}"),
    ],
)
def test_wrong_plans_are_refused_in_one_line_each(settings: dict[str, Any], message: str, smollm2: LoadedDense) -> None:
    (problem,) = ruler.check(plan(**settings), smollm2.tokenizer, 8192)
    assert message in problem
    assert "\n" not in problem


def test_right_plans_pass(smollm2: LoadedDense) -> None:
    assert ruler.check(plan(), smollm2.tokenizer, 2048) == []
    every = plan(tasks=["niah_multikey_1@sotu", "qa_1@squad1k", "niah_multikey_3"], lengths=[2048], template="chat")
    assert ruler.check(every, smollm2.tokenizer, None) == []
