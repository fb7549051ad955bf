"""The training guide (docs/training.md): its recipes load, its commands parse, and the fields that it names exist."""

import dataclasses
import re
import shlex
import textwrap
from pathlib import Path

import pytest
import yaml

from bankwise.cli import _parser
from bankwise.config import CalibrationConfig, EvalConfig, Packing, RopeChange, SparsityConfig, Stage, load_recipe

ROOT = Path(__file__).parent.parent
GUIDE = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```", GUIDE, flags=re.MULTILINE | re.DOTALL)
    return [textwrap.dedent(block) for _, block in found]


def test_every_recipe_in_the_guide_loads():
    recipes = [yaml.safe_load(block) for block in blocks("yaml")]
    assert recipes
    for values in recipes:
        assert load_recipe(values).stages


def test_every_run_and_train_command_parses():
    lines = [shlex.split(line) for block in blocks("bash") for line in block.splitlines()]
    shown = [words[words.index("run") if "run" in words else 1 :] for words in lines if "bankwise" in " ".join(words)]
    assert len(shown) >= 6
    for arguments in shown:
        options, rest = _parser(with_fields=False).parse_known_args(arguments)
        overrides = [*options.overrides, *rest]
        assert all("=" in word for word in overrides), arguments
        if (ROOT / options.recipe).is_file():
            load_recipe(ROOT / options.recipe, overrides)


def test_every_field_of_a_stage_is_explained():
    named = set(re.findall(r"`([a-z_0-9]+)`", GUIDE))
    fields = {field.name for field in dataclasses.fields(Stage)} - {"name"}
    assert not fields - named


def test_every_recipe_that_the_guide_lists_exists():
    listed = set(re.findall(r"^\| `(recipes/[\w.-]+)` \|", GUIDE, flags=re.MULTILINE))
    assert listed == {f"recipes/{path.name}" for path in (ROOT / "recipes").glob("*.yaml")}


SECTIONS = {
    "packing": Packing, "rope": RopeChange, "sparsity": SparsityConfig, "eval": EvalConfig,
    "calibration": CalibrationConfig,
}  # fmt: skip


@pytest.mark.parametrize("section", SECTIONS)
def test_dotted_settings_in_the_guide_exist(section):
    known = {field.name for field in dataclasses.fields(SECTIONS[section])}
    assert set(re.findall(rf"`{section}\.([a-z_]+)", GUIDE)) <= known
