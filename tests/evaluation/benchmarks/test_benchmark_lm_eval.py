"""For a dense model our scores equal lm-eval's own on the same items, and any lm-eval task runs on a model of ours."""

import json
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lm_eval
import pytest
import yaml
from exported_tasks import PREFIX, export
from lm_eval.models.huggingface import HFLM
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from bankwise.config import CalibrationConfig, SparsityConfig
from bankwise.errors import ConfigError, DataError
from bankwise.evaluation.benchmarks.catalogue import find_task
from bankwise.evaluation.benchmarks.documents import Document
from bankwise.evaluation.benchmarks.lm_eval_tasks import _manager, find_problems, run_lm_eval
from bankwise.evaluation.benchmarks.scoring import measure_task, read_answers
from bankwise.evaluation.engine import Engine
from bankwise.upcycle import convert
from bankwise.upcycle.loading import LoadedDense

TASKS = ["piqa", "arc_easy", "hellaswag", "openbookqa", "boolq", "sciq", "csqa", "winogrande", "lambada"]
SHORT_ANSWERS = ["arc_easy", "openbookqa", "boolq", "sciq", "csqa", "winogrande", "lambada"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all tests, since lm-eval reads its whole index for each."""
    return tmp_path_factory.mktemp("exported_tasks")


@pytest.fixture(scope="module")
def exported(folder: Path) -> dict[str, list[Document]]:
    documents = export(folder, TASKS, 20)
    _write_further_tasks(folder)
    return documents


def _write_further_tasks(folder: Path) -> None:
    """Texts for perplexity, a group of two tasks of unequal size, and a task whose data is nowhere."""
    texts = [{"text": text} for text in ("A hen sat on a wall.", "It rained.", "Every bank keeps its best channels.")]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in texts))
    (folder / "few.jsonl").write_text("".join((folder / "arc_easy.jsonl").read_text().splitlines(True)[:7]))
    rolling = {
        "task": "own_texts",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "texts.jsonl")}},
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "text",
        "metric_list": [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")],
    }
    missing = rolling | {"task": "own_missing", "dataset_kwargs": {"data_files": {"test": str(folder / "none.jsonl")}}}
    few = yaml.safe_load((folder / "arc_easy.yaml").read_text())
    few |= {"task": "own_few", "dataset_kwargs": {"data_files": {"test": str(folder / "few.jsonl")}}}
    group = {
        "group": "own_group",
        "task": ["own_few", PREFIX + "csqa"],
        "aggregate_metric_list": [{"metric": "acc", "weight_by_size": False}],
    }
    for name, config in {"texts": rolling, "missing": missing, "few": few, "group": group}.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(config))


def lm_eval_results(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, names: Sequence[str], folder: Path, limit: int
) -> dict[str, Any]:
    """lm-eval's own scores, without any code of ours."""
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8)  # type: ignore[arg-type]
    tasks: list[Any] = [PREFIX + name for name in names]
    results = lm_eval.simple_evaluate(
        lm, tasks=tasks, limit=limit, task_manager=_manager(str(folder)), bootstrap_iters=0
    )
    assert results is not None
    return dict(results)


def assert_equal_to_lm_eval(
    engine: Engine, documents: dict[str, list[Document]], results: dict[str, Any], tolerance: float
) -> None:
    for name, chosen in documents.items():
        task = find_task(name)
        answers = read_answers(engine, chosen, with_pmi=False, label=name)
        rows = sorted(results["samples"][PREFIX + name], key=lambda row: row["doc_id"])
        for answer, row in zip(answers, rows, strict=True):
            theirs = row["filtered_resps"]
            for score, (logprob, is_greedy) in zip(answer.scores, theirs, strict=True):
                assert score.logprob == pytest.approx(logprob, abs=tolerance, rel=1e-6), name
                assert score.is_greedy == is_greedy
        measures = {measure.metric: measure for measure in measure_task(task, task.read(), answers, engine.context)}
        own = results["results"][PREFIX + name]
        assert measures["acc"].value / 100 == pytest.approx(own["acc,none"], abs=1e-12), name
        if "acc_norm,none" in own:
            assert measures["acc_norm"].value / 100 == pytest.approx(own["acc_norm,none"], abs=1e-12), name
        if "perplexity,none" in own:
            assert measures["perplexity"].value == pytest.approx(own["perplexity,none"], rel=10 * tolerance)


def test_scores_of_a_tiny_model_equal_those_of_lm_eval(
    tiny_dense: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    exported: dict[str, list[Document]],
) -> None:
    model = tiny_dense(max_position_embeddings=4096)
    results = lm_eval_results(model, tokenizer, TASKS, folder, 20)
    assert len(exported) == 9
    assert all(len(documents) == 20 for documents in exported.values())
    assert_equal_to_lm_eval(Engine(model, tokenizer), exported, results, 1e-4)


def test_contexts_that_do_not_fit_are_cut_as_lm_eval_cuts_them(
    tiny_dense: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    exported: dict[str, list[Document]],
) -> None:
    model = tiny_dense(max_position_embeddings=200)
    documents = {name: exported[name][:10] for name in SHORT_ANSWERS}
    results = lm_eval_results(model, tokenizer, SHORT_ANSWERS, folder, 10)
    engine = Engine(model, tokenizer)
    answers = read_answers(engine, documents["boolq"], with_pmi=False, label="")
    assert all(answer.truncated for answer in answers)
    assert_equal_to_lm_eval(engine, documents, results, 1e-4)


def test_scores_of_the_real_model_equal_those_of_lm_eval(
    smollm2: LoadedDense, folder: Path, exported: dict[str, list[Document]]
) -> None:
    names = ["piqa", "arc_easy", "openbookqa", "csqa", "winogrande", "lambada"]
    assert smollm2.tokenizer is not None
    results = lm_eval_results(smollm2.model, smollm2.tokenizer, names, folder, 4)
    hits = [row["acc"] for row in results["samples"][PREFIX + "lambada"]]
    assert 0 < sum(hits) < 4  # so that both ends of the greedy test are seen
    engine = Engine(smollm2.model, smollm2.tokenizer)
    assert_equal_to_lm_eval(engine, {name: exported[name][:4] for name in names}, results, 1e-3)


def test_adapter_gives_lm_evals_values_with_their_items(
    tiny_dense: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    exported: dict[str, list[Document]],
) -> None:
    model = tiny_dense(max_position_embeddings=4096)
    names = ["exported_lambada", "exported_piqa", "own_texts", "own_group"]
    measures, tables = run_lm_eval(model, tokenizer, names, limit=6, batch_size=4, include_path=str(folder))
    by_name = {(measure.task, measure.metric): measure for measure in measures}
    values = {
        (task, key.removesuffix(",none")): value
        for task in names
        for key, value in tables["results"][task].items()
        if "," in key and "_stderr" not in key
    }
    assert set(by_name) == set(values)
    for key, measure in by_name.items():
        assert measure.value == pytest.approx(measure.scale * values[key] if measure.unit else values[key], rel=1e-9)
        assert measure.n == {"own_texts": 3, "own_group": 12}.get(measure.task, 6)
        assert measure.variant == "lm-eval"
        assert measure.note == f"lm-eval {tables['version']}, 0-shot"
    accuracy = by_name["exported_piqa", "acc"]
    assert accuracy.items == tuple(f"exported_piqa/{number}" for number in range(6))
    assert (accuracy.unit, accuracy.chance, accuracy.recovery) == ("%", 50, "ratio")
    assert by_name["exported_piqa", "acc_norm"].is_headline
    assert not accuracy.is_headline
    perplexity = by_name["exported_lambada", "perplexity"]
    assert (perplexity.form, perplexity.better, perplexity.recovery) == ("exp", "lower", "inverse")
    assert by_name["own_texts", "bits_per_byte"].weights == (20.0, 10.0, 35.0)
    assert by_name["own_group", "acc"].chance == pytest.approx(100 * (1 / 4 + 1 / 5) / 2)
    assert tables["documents"]["exported_piqa"] == {"original": 20, "effective": 6}


def test_group_value_weighs_its_tasks_as_lm_eval_does(
    tiny_dense: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    exported: dict[str, list[Document]],
) -> None:
    model = tiny_dense(max_position_embeddings=4096)
    (group,), tables = run_lm_eval(model, tokenizer, ["own_group"], include_path=str(folder))
    parts = [tables["results"][name]["acc,none"] for name in ("own_few", PREFIX + "csqa")]
    assert group.n == 7 + 20
    assert group.value == pytest.approx(100 * sum(parts) / 2)
    assert group.value != pytest.approx(100 * (7 * parts[0] + 20 * parts[1]) / 27)
    assert math.isfinite(group.standard_error())


def test_sparse_model_runs_through_the_adapter(
    tiny_dense: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    exported: dict[str, list[Document]],
) -> None:
    dense = tiny_dense(max_position_embeddings=4096)
    settings = CalibrationConfig(tokens=0)
    sparse = convert(
        tiny_dense(max_position_embeddings=4096),
        SparsityConfig(active_per_bank=4, predictor_rank=16),
        None,
        settings,
        progress=False,
    ).model
    names = ["exported_arc_easy", "exported_winogrande"]
    before, _ = run_lm_eval(dense, tokenizer, names, limit=5, include_path=str(folder))
    after, _ = run_lm_eval(sparse, tokenizer, names, limit=5, include_path=str(folder))
    assert [measure.key for measure in before] == [measure.key for measure in after]
    assert [measure.items for measure in before] == [measure.items for measure in after]
    engine = Engine(sparse, tokenizer)
    answers = read_answers(engine, exported["arc_easy"][:5], with_pmi=False, label="")
    ours = measure_task(find_task("arc_easy"), find_task("arc_easy").read(), answers, engine.context)
    theirs = {measure.metric: measure for measure in after if measure.task == "exported_arc_easy"}
    assert {m.metric: m.amounts for m in ours if m.metric in theirs} == {m: v.amounts for m, v in theirs.items()}


def test_bad_names_and_folders_are_one_line_each(folder: Path, exported: dict[str, list[Document]]) -> None:
    assert find_problems(["exported_piqa", "hellaswag", "mmlu"], str(folder)) == []
    (problem,) = find_problems(["helaswag", "own_texts"], str(folder))
    assert problem.startswith("benchmarks.lm_eval: lm-eval has no task 'helaswag'; close to it: hellaswag")
    (problem,) = find_problems(["piqa"], str(folder / "nowhere"))
    assert "nowhere is no folder" in problem


def test_bad_name_is_refused_before_any_work(
    tiny_dense: Callable[..., PreTrainedModel], tokenizer: PreTrainedTokenizerFast, folder: Path
) -> None:
    with pytest.raises(ConfigError, match="no task 'helaswag'"):
        run_lm_eval(tiny_dense(), tokenizer, ["helaswag"], include_path=str(folder))


def test_data_that_is_not_there_is_one_clear_line(
    tiny_dense: Callable[..., PreTrainedModel],
    tokenizer: PreTrainedTokenizerFast,
    folder: Path,
    exported: dict[str, list[Document]],
) -> None:
    with pytest.raises(DataError, match=r"lm-eval task own_missing cannot be loaded: .*none\.jsonl") as caught:
        run_lm_eval(tiny_dense(), tokenizer, ["own_missing"], include_path=str(folder))
    assert "\n" not in str(caught.value)
