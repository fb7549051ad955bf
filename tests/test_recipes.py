"""Every shipped recipe loads, and the demo's recipe runs whole on a tiny model."""

from pathlib import Path

import pytest
import yaml
from training.tiny_run import write_model, write_texts

import bankwise
from bankwise.config import dump_recipe, load_recipe

FOLDER = Path(__file__).parent.parent / "recipes"
RECIPES = sorted(FOLDER.rglob("*.yaml"))


def test_recipes_are_shipped():
    assert FOLDER / "smollm2-135m-cpu.yaml" in RECIPES
    assert not list(FOLDER.rglob("*.yml")), "recipes end in .yaml, where this test finds them"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_shipped_recipe_loads_and_says_what_it_is(path):
    recipe = load_recipe(path)
    assert recipe.companion, "a shipped recipe trains the baseline of its claims"
    assert recipe.stages
    assert path.stem in recipe.output
    assert path.read_text(encoding="utf-8").startswith("# ")
    assert load_recipe(yaml.safe_load(dump_recipe(recipe))) == recipe


def test_the_demo_recipe_runs_on_a_tiny_model(tiny_dense, tokenizer, tmp_path):
    model = write_model(tmp_path / "dense", tiny_dense(max_position_embeddings=1024), tokenizer)
    texts = write_texts(tmp_path / "texts", num_documents=40, num_words=600)
    overrides = [
        f"model={model}",
        f"output={tmp_path / 'run'}",
        f"data=[{{path: {texts}}}]",
        "calibration.tokens=2k",
        "stages.0.tokens=2k",
        "eval.windows=4",
    ]
    result = bankwise.run(FOLDER / "smollm2-135m-cpu.yaml", overrides=overrides, quiet=True)
    assert result.summary["sparse"]["active_fraction"] == 0.25
    assert result.summary["sparse"]["tokens"] == result.summary["companion"]["tokens"] == 2048
    assert result.report.is_file()
