"""Recipes from YAML and dicts: overrides, resolved form, and one clear message for what is not valid."""

import copy

import pytest
import yaml

from bankwise.config import DataSource, Recipe, SparsityConfig, Stage, dump_recipe, load_recipe
from bankwise.config.recipe_file import recipe_help
from bankwise.errors import ConfigError

FULL = {
    "model": "m",
    "output": "runs/x",
    "sparsity": {"active_per_bank": [16, 32], "predictor_rank": 64, "dense_layers": [1]},
    "data": [{"path": "a.txt", "weight": 3}, {"path": "b.jsonl", "text_field": "body"}],
    "stages": [{"tokens": "2k", "seq_len": 128, "batch_tokens": 256, "trains": "ffn", "lr": 1e-3}],
    "eval": {"windows": 3},
    "companion": False,
}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(FULL))
    return path


def test_a_file_gives_the_recipe_that_it_spells_out(file):
    recipe = load_recipe(file)
    assert recipe == Recipe(
        model="m",
        output="runs/x",
        sparsity=SparsityConfig(active_per_bank=[16, 32], predictor_rank=64, dense_layers=[1]),
        data=[DataSource(path="a.txt", weight=3), DataSource(path="b.jsonl", text_field="body")],
        stages=[Stage(tokens=2000, seq_len=128, batch_tokens=256, trains="ffn", lr=1e-3)],
        eval=recipe.eval,
        companion=False,
    )
    assert recipe.eval.windows == 3
    assert load_recipe(str(file)) == load_recipe(FULL) == recipe


def test_only_the_model_is_required():
    assert load_recipe({"model": "m"}) == Recipe(model="m")
    with pytest.raises(ConfigError, match="model"):
        load_recipe({})


@pytest.mark.parametrize("stages", [[], [{}], [{"trains": "predictor"}]])
def test_the_resolved_recipe_loads_back_to_an_equal_one(stages):
    recipe = load_recipe(FULL | {"stages": stages})
    assert len(recipe.stages) == len(stages)
    again = load_recipe(yaml.safe_load(dump_recipe(recipe)))
    assert again == recipe
    assert dump_recipe(again) == dump_recipe(recipe)


def test_a_stage_of_defaults_is_a_stage():
    assert load_recipe({"model": "m", "stages": [{}]}).stages == [Stage()]


def test_a_section_that_is_left_empty_has_its_defaults(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("model: m\nsparsity:\ncalibration:\neval:\n")
    assert load_recipe(path) == Recipe(model="m")


def test_numbers_written_with_an_exponent_are_numbers(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("model: m\nstages:\n- lr: 1e-4\n  predictor_lr: 2.0e-3\n")
    stage = load_recipe(path, ["stages.0.min_lr_ratio=5e-2"]).stages[0]
    assert (stage.lr, stage.predictor_lr, stage.min_lr_ratio) == (1e-4, 2e-3, 5e-2)


def test_overrides_replace_values_at_any_depth(file):
    recipe = load_recipe(
        file,
        [
            "seed=5",
            "sparsity.active_per_bank=8",
            "stages.0.tokens=2M",
            "stages.0.batch_tokens=512",
            "data.1.weight=0.5",
            "calibration.init=zero",
            "eval.prompt=a = b",
            "companion=true",
        ],
    )
    assert recipe.seed == 5
    assert recipe.sparsity == SparsityConfig(active_per_bank=8, predictor_rank=64, dense_layers=[1])
    assert (recipe.stages[0].tokens, recipe.stages[0].batch_tokens, recipe.stages[0].seq_len) == (2_000_000, 512, 128)
    assert [source.weight for source in recipe.data] == [3, 0.5]
    assert recipe.calibration.init == "zero"
    assert recipe.eval.prompt == "a = b"
    assert recipe.companion is True


def test_overrides_replace_whole_parts(file):
    recipe = load_recipe(file, ["data=[{path: c.txt}]", "stages=[]", "sparsity={bank_size: 32}"])
    assert recipe.data == [DataSource(path="c.txt")]
    assert recipe.stages == []
    assert recipe.sparsity == SparsityConfig(bank_size=32)


def test_the_last_of_two_overrides_wins(file):
    assert load_recipe(file, ["seed=1", "seed=2"]).seed == 2


def test_a_dict_is_not_changed():
    given = copy.deepcopy(FULL)
    load_recipe(given, ["seed=5", "stages.0.tokens=1k", "eval.windows=9"])
    assert given == FULL


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("seed", ["'seed'", "key=value"]),
        ("=5", ["'=5'", "key=value"]),
        ("seed=[1", ["'seed=[1'", "not valid YAML"]),
        ("stages.1.tokens=5", ["'1' is not an index of this list of 1"]),
        ("stages.first.tokens=5", ["'first' is not an index"]),
        ("model.name=x", ["model has no fields"]),
        ("sparsity.bank=64", ["bank"]),
        ("speed=1", ["speed"]),
        ("stages.0.trains=head", ["trains", "head"]),
        ("companion=maybe", ["companion", "maybe"]),
        ("eval.windows=2.5", ["windows", "2.5"]),
        ("stages.0.batch_tokens=100", ["batch_tokens=100", "seq_len * micro_batch = 256", "use 256"]),
        ("sparsity.active_per_bank=65", ["active_per_bank=65"]),
        ("data=[]", ["data is empty"]),
    ],
)
def test_an_override_that_cannot_work_says_why_in_one_line(file, override, words):
    with pytest.raises(ConfigError) as caught:
        load_recipe(file, [override])
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, f"{missing} not in {caught.value}"
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"model: [", "is not valid YAML"),
        (b"model: \xff", "is not valid YAML"),
        (b"", "holds no settings"),
        (b"just text", "holds no settings"),
        (b"model: m\nstages: none\n", "stages"),
        (b"model: m\nsparsity: 64\n", "sparsity=64 is not a mapping"),
        (b"model: m\neval: [windows]\n", "eval"),
        (b"model: m\nstages: [5]\n", "stages"),
        (b"model: m\ndata: a.txt\n", "data"),
        (b"model:\n", "model"),
        (b"model: m\nsparsity:\n  active_per_bank: few\n", "active_per_bank"),
        (b"model: m\n1: 2\n", "1"),
        (b"model: m\ndata:\n- weight: 1\n", "path"),
    ],
)
def test_a_file_that_is_no_recipe_is_one_clear_error(tmp_path, content, words):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=words) as caught:
        load_recipe(path)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml' does not exist"):
        load_recipe(tmp_path / "none.yaml")


def test_help_has_the_doc_strings():
    text = " ".join(recipe_help().split())
    assert "--sparsity.bank_size" in text
    assert "channels per bank; must divide the FFN width of the model" in text
