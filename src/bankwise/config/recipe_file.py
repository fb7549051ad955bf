"""Reading and writing recipes: YAML plus dotted overrides, checked as a whole before anything is loaded."""

import copy
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from bankwise.config.recipe import Recipe, Stage
from bankwise.errors import ConfigError

set_parsing_settings(docstring_parse_attribute_docstrings=True)


def recipe_help() -> str:
    """The fields of a recipe with their doc strings, for the command line's help."""
    parser = ArgumentParser(prog="recipe", usage="", add_help=False)
    parser.add_class_arguments(Recipe)
    return parser.format_help()


def load_recipe(source: str | Path | dict[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """Recipe from a YAML file or a dict, with overrides such as `stages.0.tokens=2M`. Raises `ConfigError`."""
    values = copy.deepcopy(source) if isinstance(source, dict) else _read_yaml(Path(source))
    for override in overrides:
        key, found, text = override.partition("=")
        if not found or not key:
            raise ConfigError(f"override {override!r} is not of the form key=value, for example stages.0.tokens=2M")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"override {override!r} is not valid YAML: {' '.join(str(error).split())}") from None
        _assign(values, key.split("."), value, override)
    for name in (field.name for field in dataclasses.fields(Recipe) if dataclasses.is_dataclass(field.default_factory)):
        # A section that is left empty has its defaults; the parser would end with a TypeError on anything else.
        if values.get(name) is None:
            values.pop(name, None)
        elif not isinstance(values[name], dict):
            raise ConfigError(f"the recipe is not valid: {name}={values[name]!r} is not a mapping of settings")
    if isinstance(values.get("stages"), list):
        # The parser takes `{}` for no value at all; a stage of defaults is a stage.
        values["stages"] = [stage or {"tokens": Stage().tokens} for stage in values["stages"]]
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--recipe", type=Recipe)
    try:
        return parser.instantiate(parser.parse_object({"recipe": values})).recipe
    except (ArgumentError, TypeError) as error:
        text = " ".join(str(error).split()).replace("recipe.", "").replace("Group 'recipe' does not accept", "unknown")
        raise ConfigError(f"the recipe is not valid: {text}") from None


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML; `load_recipe` reads it back to an equal one."""
    return yaml.safe_dump(dataclasses.asdict(recipe), sort_keys=False, width=120)


def _read_yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"recipe {str(path)!r} does not exist; recipes come with the project in recipes/")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"recipe {str(path)!r} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"recipe {str(path)!r} holds no settings; it must be a YAML mapping with at least `model`")
    return values


def _assign(values: Any, keys: list[str], value: Any, override: str) -> None:
    for position, key in enumerate(keys):
        is_last = position == len(keys) - 1
        if isinstance(values, list):
            if not key.isdigit() or int(key) >= len(values):
                raise ConfigError(f"override {override!r}: {key!r} is not an index of this list of {len(values)}")
            index: Any = int(key)
        elif isinstance(values, dict):
            index = key
            if not is_last:
                values.setdefault(key, {})
        else:
            raise ConfigError(f"override {override!r}: {'.'.join(keys[:position])} has no fields")
        if is_last:
            values[index] = value
        else:
            values = values[index]
