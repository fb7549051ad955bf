"""The suite `cwe`: its measures and details, the reading it shares with the suite `ruler`, and what it refuses."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bankwise.config import EvaluationPlan
from bankwise.evaluation.cwe import ANSWER_CLASSES, ITEM_CLASSES, lite, measure_rows
from bankwise.evaluation.engine import Engine
from bankwise.evaluation.reading_cache import ReadingCache
from bankwise.evaluation.ruler import generate
from bankwise.evaluation.suites import cwe, ruler

OFFICIAL_METRICS = ("nll", "auc", "nll_first_item", "top10_hits", "mass_common", "mass_uncommon")


def plan_of(
    suites: list[Any] | None = None, ruler_changes: dict[str, Any] | None = None, **changes: Any
) -> EvaluationPlan:
    plan = EvaluationPlan(suites=suites or ["cwe"])
    plan.ruler.tasks, plan.ruler.lengths, plan.ruler.samples = ["cwe"], [2048], 2
    plan.cwe.lengths, plan.cwe.samples = [2048], 2
    for name, value in (ruler_changes or {}).items():
        setattr(plan.ruler, name, value)
    for name, value in changes.items():
        setattr(plan.cwe, name, value)
    return plan


@pytest.fixture(scope="module")
def model(tiny_dense):
    return tiny_dense(scale=0.2, max_position_embeddings=2048)


@pytest.fixture
def engine(model, tokenizer) -> Engine:
    return Engine(model, tokenizer)


# run


def test_official_rows_give_every_measure_of_each_layout(engine, tokenizer):
    result = cwe.run(engine, plan_of(permutation=["upstream", "per_sample"]))
    assert [(one.variant, one.metric) for one in result.measures] == [
        (variant, metric) for variant in ("upstream", "per_sample") for metric in OFFICIAL_METRICS
    ]
    assert result.details == {"answers": {}}  # nothing was generated
    by_key = {(one.variant, one.metric): one for one in result.measures}
    for variant in ("upstream", "per_sample"):
        rows = generate("cwe", tokenizer, max_seq_length=2048, num_samples=2, permutation=variant)
        records = measure_rows(engine, rows)
        nll = by_key[variant, "nll"]
        assert (nll.section, nll.task, nll.length, nll.note) == ("cwe", "cwe", 2048, "")
        assert nll.items == (f"cwe/2048/{variant}/42/0", f"cwe/2048/{variant}/42/1")
        assert (nll.unit, nll.better, nll.is_headline, nll.recovery) == ("nats", "lower", True, "")
        assert nll.value == pytest.approx(
            sum(record.nll.total for record in records) / sum(record.nll.tokens for record in records)
        )
        first = by_key[variant, "nll_first_item"]
        assert first.weights == tuple(record.nll.first_tokens for record in records)
        assert first.amounts == pytest.approx([record.nll.first_total for record in records])
        auc = by_key[variant, "auc"]
        assert (auc.better, auc.chance, auc.recovery, auc.is_headline) == ("higher", 0.5, "", False)
        assert auc.value == 0.5  # every word starts with a space, a token of its own here
        assert by_key[variant, "mass_uncommon"].better == "lower"


def test_lite_presets_score_what_is_generated(engine, tokenizer, monkeypatch):
    rows = lite.generate("lite-20-3", tokenizer, num_samples=2)
    (first, second, third), (other, *_) = rows[0]["outputs"], rows[1]["outputs"]
    answers = iter([f" 1. {first} 2. {second}x 3. {third}", f" 1. {other} 2. {other} 3. {other}"])
    read = engine.read

    def answered(prompts, *, label=""):
        assert [prompt.max_new_tokens for prompt in prompts] == [36, 36]
        return [SimpleNamespace(**vars(reading) | {"generated": next(answers)}) for reading in read(prompts)]

    monkeypatch.setattr(engine, "read", answered)
    result = cwe.run(engine, plan_of(lengths=[], lite=["lite-20-3"]))
    score, strict, nll, auc = result.measures
    assert [one.metric for one in result.measures] == ["score", "exact", "nll", "auc"]
    for one in result.measures:
        assert (one.task, one.length, one.variant) == ("lite-20-3", None, "per_sample")
        assert one.note == "not RULER-compatible"
        assert one.items == ("lite-20-3/per_sample/42/0", "lite-20-3/per_sample/42/1")
    assert score.amounts == pytest.approx((1, 1 / 3))
    assert strict.amounts == pytest.approx((2 / 3, 1 / 3))
    assert (score.scale, score.unit, score.chance, score.is_headline) == (100, "%", 15, True)
    assert (nll.is_headline, auc.is_headline, strict.is_headline) == (False, False, False)
    (name,) = result.details["answers"]
    assert name == "lite-20-3/per_sample"
    shares = result.details["answers"][name]
    assert tuple(shares["item_classes"]) == ITEM_CLASSES
    assert tuple(shares["answer_classes"]) == ANSWER_CLASSES
    assert shares["item_classes"] == pytest.approx(
        {"correct": 3 / 6, "repeat": 2 / 6, "rare": 0, "demo": 0, "near": 1 / 6, "off_list": 0}
    )
    assert shares["answer_classes"]["loop"] == shares["answer_classes"]["ok"] == 0.5
    assert shares["substring_only"] == pytest.approx(1 / 6)
    assert shares["n"] == 2


def stored(engine: Engine) -> int:
    assert engine.cache is not None
    return len(engine.cache.path.read_bytes().splitlines()) if engine.cache.path.exists() else 0


def test_rows_of_the_ruler_suite_are_read_once_and_bring_their_answers(model, tokenizer, tmp_path: Path):
    engine = Engine(model, tokenizer, cache=ReadingCache(tmp_path, "f" * 64))
    plan = plan_of(["ruler", "cwe"], ruler_changes={"samples": 3})
    scores = ruler.run(engine, plan)
    assert stored(engine) == 3
    result = cwe.run(engine, plan)
    assert stored(engine) == 3
    answers = result.details["answers"]["2048/upstream"]
    assert answers["n"] == 2
    assert sum(answers["answer_classes"].values()) == pytest.approx(1)
    assert set(result.measures[0].items) < set(scores.measures[0].items)


@pytest.mark.parametrize(
    ("suites", "ruler_changes"),
    [
        (["cwe"], {}),
        (["ruler", "cwe"], {"tasks": ["vt"]}),
        (["ruler", "cwe"], {"lengths": [1024]}),
        (["ruler", "cwe"], {"seed": 7}),
        (["ruler", "cwe"], {"samples": 1}),
        (["ruler", "cwe"], {"permutation": ["per_sample"]}),
    ],
)
def test_rows_that_only_this_suite_reads_generate_nothing(engine, monkeypatch, suites, ruler_changes):
    asked = []
    read = engine.read
    monkeypatch.setattr(engine, "read", lambda prompts, **options: asked.extend(prompts) or read(prompts, **options))
    assert cwe.run(engine, plan_of(suites, ruler_changes)).details == {"answers": {}}
    assert [prompt.max_new_tokens for prompt in asked] == [0, 0]


def test_template_of_the_ruler_suite_holds_here_too(engine, monkeypatch):
    asked = []
    read = engine.read
    monkeypatch.setattr(engine, "read", lambda prompts, **options: asked.extend(prompts) or read(prompts, **options))
    cwe.run(engine, plan_of(ruler_changes={"template": "<{task_template}>"}, lite=["lite-20-3"], samples=1))
    assert len(asked) == 2
    assert all(prompt.text.startswith("<Below is") and "list?> Answer: The top" in prompt.text for prompt in asked)


def test_lists_that_were_cut_are_noted(tiny_dense, tokenizer):
    engine = Engine(tiny_dense(max_position_embeddings=1024), tokenizer)
    measure = cwe.run(engine, plan_of(lengths=[], lite=["lite-20-3"])).measures[0]
    assert measure.note == "not RULER-compatible; 2 of 2 lists cut to fit the context"


# check


def test_a_good_plan_has_no_problems(tokenizer, smollm2_tokenizer):
    assert cwe.check(plan_of(lite=list(lite.LITE_PRESETS)), smollm2_tokenizer, 8192) == []
    assert cwe.check(plan_of(), tokenizer, None) == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"lengths": [4096, 2048]},
            "cwe.lengths holds 4096, longer than the model's context of 2048; use 2048 or less",
        ),
        ({"lengths": [512]}, "cwe does not fit a window of 512 tokens"),
        ({"lengths": []}, "cwe has neither lengths nor lite presets; name a length, or one of lite-20-3"),
        ({"permutation": []}, "cwe.permutation is empty; use upstream or per_sample"),
        ({"lite": ["lite-3"]}, "there is no CWE-lite preset 'lite-3'"),
        ({"lite": ["lite-200-10"]}, "more than the model's context of 2048; use a smaller preset"),
        ({"ruler_changes": {"template": "task"}}, "ruler.template='task' has no {task_template}"),
    ],
)
def test_every_problem_is_one_clear_line(tokenizer, changes, expected):
    (problem,) = cwe.check(plan_of(**changes), tokenizer, 2048)
    assert expected in problem
    assert "\n" not in problem


def test_tokenizer_without_offsets_is_a_problem(tokenizer, monkeypatch):
    monkeypatch.setattr(type(tokenizer), "is_fast", False)
    (problem,) = cwe.check(plan_of(), tokenizer, None)
    assert "cwe needs a fast tokenizer" in problem
