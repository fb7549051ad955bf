"""One model by suite, and several beside each other: references, baselines, resuming, and mistakes before any work."""

import json
import math

import pytest
import torch
from transformers import PreTrainedModel

import bankwise
from bankwise import SparsityConfig
from bankwise.config import load_plan
from bankwise.errors import ConfigError
from bankwise.evaluation import Measure, evaluate, evaluate_models, evaluator
from bankwise.evaluation.comparison import ColumnScores, compare
from bankwise.evaluation.engine import Engine
from bankwise.models.checkpoint import save_checkpoint
from bankwise.upcycle import load_model

SMALL = [
    "suites=[perplexity, benchmarks, ruler, cwe, routing]", "perplexity.windows=3", "perplexity.seq_len=40",
    "perplexity.held_out_fraction=0.5", "benchmarks.tasks=[piqa]", "benchmarks.limit=2",
    "ruler.tasks=[niah_single_1]", "ruler.lengths=[2048]", "ruler.samples=2", "cwe.lengths=[]",
    "cwe.lite=[lite-20-3]", "cwe.samples=2", "routing.windows=2",
]  # fmt: skip


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts") / "prose"
    folder.mkdir()
    for index in range(8):
        (folder / f"{index}.txt").write_text(f"document {index}: the cat sat on a mat. " * 8)
    return load_plan(None, [*SMALL, f"perplexity.data=[{{path: {folder}}}]"])


@pytest.fixture(scope="module")
def models(tiny_dense, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    dense = tiny_dense(scale=0.2, max_position_embeddings=2048)
    other = tiny_dense(scale=0.2, max_position_embeddings=2048, seed=5)
    sparse = bankwise.upcycle(dense, SparsityConfig(predictor_rank=16), progress=False)
    found = {"dense": dense, "companion": other, "sparse": sparse}
    return {name: save_checkpoint(model, tokenizer, folder / name) for name, model in found.items()}


@pytest.fixture(scope="module")
def report(models, plan, tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    return evaluate_models(models, plan, baselines=["oracle_bank", "cats"], cache=cache, say=lambda text: None), cache


def test_one_model_is_scored_by_suite(models, plan):
    model, tokenizer = load_model(models["sparse"])
    scores = evaluate(model, tokenizer, plan=plan, progress=False)
    assert set(scores) == set(plan.suites)
    assert scores["perplexity"]["n"] == 3
    assert scores["perplexity"]["active_fraction"] == 0.25
    assert scores["ruler"]["niah_single_1/2048/upstream"]["score"]["n"] == 2
    assert scores["cwe"]["lite-20-3/per_sample"]["auc"]["n"] == 2
    assert scores["benchmarks"]["piqa"]["acc_per_char"]["n"] == 2
    assert scores["routing"]["details"]["active_per_bank"]["violations"] == 0
    only = evaluate(model, tokenizer, ["routing"], plan=plan, progress=False)
    assert only == {"routing": scores["routing"]}


def test_columns_stand_in_order_and_differences_are_taken_to_the_companion(report):
    report, _ = report
    names = [column["name"] for column in report["columns"]]
    assert names == ["dense", "companion", "sparse", "oracle_bank", "cats"]
    assert [column["is_baseline"] for column in report["columns"]] == [False, False, False, True, True]
    assert [column["active_fraction"] for column in report["columns"]][:4] == [1.0, 1.0, 0.25, 0.25]
    assert report["reference"] == "companion"
    for row in report["measures"]:
        if row["section"] == "routing":
            assert set(row["columns"]) == {"sparse"}
            continue
        assert set(row["columns"]) == set(names)
        assert row["columns"]["companion"]["delta"] is None
        values = {name: cell["value"] for name, cell in row["columns"].items()}
        if row["metric"] == "loss":
            delta = row["columns"]["sparse"]["delta"]
            assert delta["value"] == pytest.approx(values["sparse"] - values["companion"])
            assert delta["low"] <= delta["value"] <= delta["high"]
    kl = next(row for row in report["measures"] if row["metric"] == "kl_to_dense")["columns"]
    assert kl["dense"]["value"] == pytest.approx(0, abs=1e-6)
    assert 0 < kl["oracle_bank"]["value"] < kl["companion"]["value"]
    json.dumps(report, allow_nan=False)


def test_a_second_evaluation_reads_no_model_again(report, models, plan, monkeypatch):
    first, cache = report
    monkeypatch.setattr(Engine, "_read_batch", lambda *_: pytest.fail("a cached prompt was read again"))
    again = evaluate_models(models, plan, baselines=["oracle_bank", "cats"], cache=cache, say=lambda text: None)
    assert again["measures"] == first["measures"]


def test_without_a_companion_differences_are_taken_to_dense(models, plan):
    pair = {name: models[name] for name in ("sparse", "dense")}
    report = evaluate_models(pair, load_plan(None, [*SMALL, "suites=[perplexity]", *data(plan)]), say=lambda text: None)
    assert report["reference"] == "dense"
    assert [column["name"] for column in report["columns"]] == ["dense", "sparse"]


def test_every_model_and_baseline_works_on_the_own_device(models, plan, monkeypatch):
    own, moved, to = torch.device("cpu", 5), [], PreTrainedModel.to

    def recorded(model, device):
        moved.append((model.config.model_type, device))
        return to(model, "cpu")

    monkeypatch.setattr(PreTrainedModel, "to", recorded)
    monkeypatch.setattr(evaluator, "own_device", lambda: own)
    pair = {name: models[name] for name in ("sparse", "dense")}
    alone = load_plan(None, [*SMALL, "suites=[perplexity]", *data(plan)])
    evaluate_models(pair, alone, baselines=["cats"], say=lambda text: None)
    assert {name for name, _ in moved} == {"llama", "bankwise_llama"}
    assert {device for _, device in moved} == {own}


def data(plan):
    return [f"perplexity.data=[{{path: {plan.perplexity.data[0].path}}}]"]


@pytest.mark.parametrize(
    ("columns", "baselines", "overrides", "message"),
    [
        ({"best": "sparse"}, [], [], "columns ['best']"),
        ({}, [], [], "name models as dense, companion"),
        ({"dense": "dense"}, ["magic"], [], "baselines ['magic'] are not known; use cats"),
        ({"sparse": "sparse"}, ["cats"], [], "name it as the column dense"),
        ({"sparse": "sparse"}, [], ["ruler.lengths=[4096]"], "longer than the model's context of 2048"),
        ({"sparse": "sparse"}, [], ["ruler.tasks=[cew]"], "cew"),
        ({"sparse": "sparse"}, [], ["benchmarks.tasks=[pika]"], "pika"),
        ({"sparse": "sparse"}, [], ["cwe.lite=[lite-1]"], "lite-1"),
        ({"sparse": "sparse"}, [], ["perplexity.windows=500"], "ask for fewer"),
        ({"sparse": "sparse"}, [], ["ruler.tasks=[qa_2]", "ruler.lengths=[2048]"], "hotpotqa.json"),
    ],
)
def test_mistakes_are_found_before_a_weight_is_read(columns, baselines, overrides, message, models, plan, monkeypatch):
    monkeypatch.setattr(evaluator, "load_model", lambda source: pytest.fail("weights were read"))
    chosen = {name: models[source] for name, source in columns.items()}
    wrong = load_plan(None, [*SMALL, *data(plan), *overrides])
    with pytest.raises(Exception, match=r"^[^\n]*$") as caught:
        evaluate_models(chosen, wrong, baselines=baselines, say=lambda text: None)
    assert message in str(caught.value)


def test_models_of_different_tokenizers_are_not_compared(models, plan, tiny_dense, tmp_path):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"a": 0, "?": 1}, unk_token="?")))
    other = save_checkpoint(tiny_dense(), words, tmp_path / "other")
    with pytest.raises(ConfigError, match=r"the tokenizer of sparse .* is not that of dense"):
        evaluate_models({"dense": models["dense"], "sparse": other}, plan, say=lambda text: None)


def test_numbers_that_do_not_exist_are_null():
    measure = Measure(section="s", task="t", metric="m", items=("a",), amounts=(math.inf,), recovery="ratio")
    report = compare([ColumnScores(name="dense", about={"seconds": math.nan}, measures=[measure])], {})
    cell = report["measures"][0]["columns"]["dense"]
    assert (cell["value"], cell["standard_error"], report["columns"][0]["seconds"]) == (None, None, None)
