"""The dry run of a recipe: what it says of a tiny run, and what it refuses before anything is loaded."""

import copy
import json
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from training.tiny_run import tiny_recipe, write_model, write_texts

from bankwise.config import load_recipe
from bankwise.dry_run import RunBudget, plan_run
from bankwise.errors import BankwiseError
from bankwise.report.dry_run import dry_run_text, dry_run_values
from bankwise.upcycle import upcycle
from bankwise.upcycle.loading import load_shape

SECOND = {"name": "second", "seq_len": 64, "batch_tokens": 256, "tokens": "1k", "kd_weight": 1.0, "save_steps": 2}


@pytest.fixture(scope="module")
def places(tiny_dense, tokenizer, tmp_path_factory) -> tuple[Path, Path]:
    """A dense model on disk without its weights, and texts."""
    model = write_model(tmp_path_factory.mktemp("model") / "dense", tiny_dense(), tokenizer)
    (model / "model.safetensors").unlink()
    return model, write_texts(tmp_path_factory.mktemp("data") / "texts")


@pytest.fixture
def recipe(places, tmp_path) -> dict[str, Any]:
    values = tiny_recipe(*places, tmp_path / "run")
    first = {"name": "first", "trains": "predictor", "k_schedule": "dense", "aux_weight": 1.0}
    values["stages"] = [values["stages"][0] | first, values["stages"][0] | SECOND]
    return values


def planned(recipe: dict[str, Any], *overrides: str, **settings: Any) -> RunBudget:
    return plan_run(load_recipe(recipe, overrides), **settings)


def test_a_plan_of_a_tiny_run(recipe, tiny_dense, tmp_path):
    budget = planned(recipe, "controls=[dense_narrow,detached]", processes=2, device_tflops=1.0)
    dense = sum(value.numel() for value in tiny_dense().parameters())
    predictors = 2 * (32 * (64 + 256) + 5 * 256)
    assert (budget.dense_parameters, budget.predictor_parameters) == (dense, predictors)
    first, second = budget.stages
    assert (first.steps, first.rows, first.tokens, first.accumulation) == (4, 8, 256, 1)
    assert (second.steps, second.rows, second.tokens, second.accumulation) == (4, 16, 1024, 2)
    assert (first.trained.model, first.trained.predictor) == (0, predictors)
    assert (second.trained.model, second.trained.predictor) == (dense, predictors)
    assert set(first.step_flops) == {"sparse", "detached"}  # dense models have no predictor to train alone
    assert set(second.step_flops) == {"sparse", "companion", "dense_narrow", "detached"}
    assert second.step_flops["dense_narrow"] < second.step_flops["sparse"]
    assert first.memory.keys() == {"ddp", "fsdp2"}
    assert first.memory["ddp"].teacher == 0
    assert second.memory["ddp"].teacher == 4 * dense
    total = sum(budget.flops.values())
    assert budget.flops["companion"] == 4 * second.step_flops["companion"]
    assert budget.seconds(total) == total / 2e12
    assert not (tmp_path / "run").exists()


def test_a_teacher_counts_with_its_student_and_not_with_the_companion(recipe):
    with_teacher = planned(recipe).stages[1].step_flops
    without = planned(recipe, "stages.1.kd_weight=0").stages[1].step_flops
    assert with_teacher["companion"] == without["companion"]
    assert with_teacher["sparse"] > without["sparse"]


def test_disk_holds_the_kept_checkpoints_and_every_model(recipe):
    budget = planned(recipe)
    sparse = budget.dense_parameters + budget.predictor_parameters
    assert budget.disk["checkpoint/"] == budget.disk["untrained/"] == 4 * sparse
    assert budget.disk["companion/"] == 4 * budget.dense_parameters
    # Two of four steps leave a checkpoint: weights and both moments of all that is trained.
    assert budget.disk["training/sparse/stage-1/"] == 2 * 12 * sparse
    assert budget.disk["training/sparse/stage-0/"] == 4 * sparse + 8 * budget.predictor_parameters


def test_a_rope_change_stays_for_the_stages_after_it(recipe):
    long = ["stages.0.seq_len=256", "stages.0.batch_tokens=256", "stages.0.rope={kind: theta, theta: 1.0e6}"]
    budget = planned(recipe, *long, "stages.1.seq_len=256", "stages.1.teacher=companion")
    assert [stage.context for stage in budget.stages] == [256, 256]
    with pytest.raises(BankwiseError, match=r"stages.1: seq_len=256 .* context of the dense teacher, 128"):
        planned(recipe, *long, "stages.1.seq_len=256")


def test_the_text_names_the_stages_and_the_totals(recipe):
    budget = planned(recipe, processes=2, device_tflops=0.001)
    text = dry_run_text(budget)
    assert max(map(len, text.splitlines())) <= 120
    for words in ("0 first", "1 second", "DDP", "FSDP2", "all: companion", "checkpoint/", "Nothing was loaded"):
        assert words in text
    assert "state --device-tflops" in dry_run_text(planned(recipe))


def test_the_values_can_be_written_as_json(recipe):
    budget = planned(recipe, device_tflops=1.0)
    values = json.loads(json.dumps(dry_run_values(budget)))
    assert values["stages"][1]["memory"]["none"]["total"] == budget.stages[1].memory["none"].total
    assert values["seconds"] == pytest.approx(sum(values["flops"].values()) / 1e12)


@pytest.mark.parametrize(
    ("overrides", "settings", "words"),
    [
        (["sparsity.bank_size=48"], {}, "bank_size=48 does not divide the FFN width 256"),
        (["stages.1.seq_len=256"], {}, "stages.1: seq_len=256 is longer than the model's context of 128"),
        ([], {"processes": 3}, "stages.0: batch_tokens=64 cannot be shared by 3 processes"),
        (["data=[{path: /no/such.txt}]"], {}, "/no/such.txt does not exist"),
        (["stages.1.data=[{path: /no/such.txt}]"], {}, "/no/such.txt does not exist"),
        (["stages.0.trains='layer: 9'", "stages.0.k_schedule=fixed"], {}, "stages.0: trains='layer: 9'"),
        (["eval.seq_len=500"], {}, "eval.seq_len=500"),
        (["model=/no/model"], {}, "/no/model does not exist"),
        (["model=no/such-model"], {}, "Built in are the shapes of"),
        (["stages.1.trains=predictor"], {}, "trains='predictor' in every stage"),
        ([], {"checkpoint": "CHECKPOINT"}, "is a dense model"),
        ([], {"processes": 0}, "processes=0"),
    ],
)
def test_what_a_run_would_refuse_is_refused(overrides, settings, words, recipe, places, tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    settings = {name: places[0] if value == "CHECKPOINT" else value for name, value in settings.items()}
    with pytest.raises(BankwiseError, match=words.replace("(", r"\(")):
        planned(recipe, *overrides, **settings)
    assert not (tmp_path / "run").exists()


def test_an_output_folder_that_holds_files_is_refused(recipe, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "note.txt").write_text("mine")
    with pytest.raises(BankwiseError, match="already holds files"):
        planned(recipe)


def test_training_goes_on_from_a_checkpoint_of_another_sparsity(recipe, tiny_dense, tokenizer, tmp_path):
    sparse = upcycle(
        tiny_dense(), load_recipe({"model": "m", "sparsity": {"predictor_rank": 16}}).sparsity, progress=False
    )
    write_model(tmp_path / "sparse", sparse, tokenizer)
    budget = planned(recipe, checkpoint=tmp_path / "sparse")
    assert budget.predictor_parameters == 2 * (16 * (64 + 256) + 5 * 256)
    assert set(budget.flops) == {"sparse"}  # the companion belongs to `bankwise run`
    assert "untrained/" not in budget.disk


def test_the_shape_of_a_hub_model_is_its_config_where_the_cache_has_it(places, monkeypatch, tmp_path):
    snapshot = tmp_path / "models--Qwen--Qwen2.5-0.5B" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("abc")
    (snapshot / "config.json").write_text((places[0] / "config.json").read_text())
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert load_shape("Qwen/Qwen2.5-0.5B").config.hidden_size == 64
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    built_in = load_shape("Qwen/Qwen2.5-0.5B")
    assert built_in.config.hidden_size == 896
    assert "built-in" in built_in.origin


def test_a_plan_leaves_the_recipe_as_it_is(recipe):
    values = copy.deepcopy(recipe)
    loaded = load_recipe(recipe)
    plan_run(loaded)
    assert loaded == load_recipe(values)
