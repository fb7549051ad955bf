"""Every shipped recipe loads and plans, its figures are those of the dry run, and the demo's runs on a tiny model."""

import re
import shlex
from pathlib import Path

import huggingface_hub
import pytest
import yaml
from training.tiny_run import write_model, write_texts

import bankwise
from bankwise.cli import main
from bankwise.config import dump_recipe, load_recipe
from bankwise.dry_run import plan_run

FOLDER = Path(__file__).parent.parent / "recipes"
RECIPES = sorted(FOLDER.glob("*.yaml"))


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


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No hub and an empty hub cache, so that the built-in shapes answer."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_shipped_recipe_could_start(path, offline, tmp_path):
    budget = plan_run(load_recipe(path, [f"output={tmp_path / 'run'}"]))
    assert [stage.tokens for stage in budget.stages]
    assert list(tmp_path.iterdir()) == []


def stated(path: Path) -> list[tuple[list[str], re.Match[str]]]:
    """The dry runs in the comments of a recipe, each with the figures that stand below it."""
    text = re.sub(r"\\\n#\s+", "", path.read_text(encoding="utf-8"))
    found = re.findall(r"^# bankwise (run .*--dry-run.*)\n(# By formula: .*)$", text, flags=re.MULTILINE)
    figures = (
        r"# By formula: (\d+) GB per device(?: with (\w+))?, ([\d.]+ \w+) with the dense companion, at \d+ TFLOPS\b"
    )
    return [(shlex.split(command), re.match(figures, line)) for command, line in found]  # type: ignore[misc]


@pytest.mark.parametrize("path", [path for path in RECIPES if stated(path)], ids=lambda path: path.stem)
def test_the_figures_in_the_comments_are_those_of_the_dry_run(path, offline, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(FOLDER.parent)
    for command, figures in stated(path):
        gigabytes, sharding, time = figures.groups()
        assert main([*command, f"output={tmp_path / 'run'}"]) == 0
        out = capsys.readouterr().out
        assert f"  {time}\n" in out
        table = out.split(f"GB per device, {sharding or 'one process'}")[1]
        totals = [float(total) for total in re.search(r"^total +(.*)$", table, flags=re.MULTILINE)[1].split()]
        assert max(totals) == pytest.approx(float(gigabytes), abs=0.51)


def test_recipes_for_gpus_state_their_figures():
    planned = {path.stem: len(stated(path)) for path in RECIPES if not path.stem.endswith(("-cpu", "-recovery"))}
    assert set(planned) >= {"smollm2-135m-32k", "qwen2.5-0.5b", "qwen2.5-1.5b", "qwen2.5-7b", "qwen3-8b"}
    assert all(planned.values())
    assert planned["qwen3-8b"] == 2


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
