"""Settings dataclasses from YAML and dotted overrides; errors name the key, the value and what is allowed."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from bankwise.errors import ConfigError

T = TypeVar("T")

set_parsing_settings(docstring_parse_attribute_docstrings=True)


def fields_help(kind: type, name: str) -> str:
    """The fields of a settings dataclass with their doc strings."""
    parser = ArgumentParser(prog=name, usage="", add_help=False)
    parser.add_class_arguments(kind)
    return parser.format_help()


def override_values(values: dict[str, Any], overrides: Sequence[str]) -> None:
    """Set dotted keys of nested settings in place. Raises `ConfigError` on a key that leads nowhere."""
    for override in overrides:
        key, found, text = override.partition("=")
        if not found or not key:
            raise ConfigError(f"override {override!r} is not of the form key=value, for example stages.0.tokens=2M")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"override {override!r} is not valid YAML: {' '.join(str(error).split())}") from None
        _assign(values, key.split("."), value, override)


def build(kind: type[T], values: dict[str, Any], name: str) -> T:
    """A settings dataclass from nested plain values; `name` is what a user calls it. Raises `ConfigError`."""
    # T is any type to mypy; the callers pass dataclasses.
    sections = [field.name for field in dataclasses.fields(kind) if dataclasses.is_dataclass(field.default_factory)]  # type: ignore[arg-type]
    for section in sections:
        # A section that is left empty has its defaults; the parser would end with a TypeError on anything else.
        if values.get(section) is None:
            values.pop(section, None)
        elif not isinstance(values[section], dict):
            raise ConfigError(f"the {name} is not valid: {section}={values[section]!r} is not a mapping of settings")
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument(f"--{name}", type=kind)
    try:
        return getattr(parser.instantiate(parser.parse_object({name: values})), name)
    except (ArgumentError, TypeError) as error:
        text = " ".join(str(error).split()).replace(f"{name}.", "")
        text = text.replace(f"Group '{name}' does not accept", "unknown")
        raise ConfigError(f"the {name} is not valid: {text}") from None


def read_yaml(path: Path, name: str) -> dict[str, Any]:
    """Settings from a YAML file. Raises `ConfigError` where it is missing or holds none."""
    if not path.is_file():
        raise ConfigError(f"{name} {str(path)!r} does not exist; recipes come with the project in recipes/")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{name} {str(path)!r} is not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{name} {str(path)!r} holds no settings; it must be a YAML mapping")
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
