"""Reading and writing recipes: YAML plus dotted overrides, checked as a whole before anything is loaded."""

import copy
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from bankwise.config.recipe import Recipe
from bankwise.config.settings import build, fields_help, override_values, read_yaml
from bankwise.config.stage import Stage


def recipe_help() -> str:
    """The fields of a recipe with their doc strings, for the command line's help."""
    return fields_help(Recipe, "recipe")


def load_recipe(source: str | Path | dict[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """Recipe from a YAML file or a dict, with overrides such as `stages.0.tokens=2M`. Raises `ConfigError`."""
    values = copy.deepcopy(source) if isinstance(source, dict) else read_yaml(Path(source), "recipe")
    override_values(values, overrides)
    if isinstance(values.get("stages"), list):
        # The parser takes `{}` for no value at all; a stage of defaults is a stage.
        values["stages"] = [stage or {"tokens": Stage().tokens} for stage in values["stages"]]
    return build(Recipe, values, "recipe")


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML; `load_recipe` reads it back to an equal one."""
    return yaml.safe_dump(dataclasses.asdict(recipe), sort_keys=False, width=120)
