"""The README's commands parse, its paths exist, and its Python imports what it says."""

import ast
import importlib
import inspect
import re
import shlex
from pathlib import Path

import pytest

import bankwise
from bankwise.cli import _parser
from bankwise.config import load_recipe

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"


def blocks(*languages: str) -> list[str]:
    text = README.read_text(encoding="utf-8")
    return re.findall(rf"^```(?:{'|'.join(languages)})[^\n]*\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def commands() -> list[list[str]]:
    """Words of every command in the bash blocks, without comments, prompts and line continuations."""
    lines = "\n".join(blocks("bash", "sh", "console")).replace("\\\n", " ").splitlines()
    split = [shlex.split(line.removeprefix("$ "), comments=True) for line in lines]
    return [words for words in split if words]


def test_the_readme_shows_the_command_line_and_the_library():
    assert any("bankwise" in Path(words[0]).name or words[0] == "make" for words in commands())
    assert any("import bankwise" in block for block in blocks("python"))


def test_every_bankwise_command_parses():
    shown = [words[1:] for words in commands() if Path(words[0]).name == "bankwise"]
    assert shown
    for arguments in shown:
        arguments = arguments[: next((i for i, word in enumerate(arguments) if word in (">", "|", "&&")), None)]
        try:
            options, rest = _parser(with_fields=False).parse_known_args(arguments)
        except SystemExit as stop:
            pytest.fail(f"`bankwise {shlex.join(arguments)}` does not parse (exit code {stop.code})")
        assert not [word for word in rest if word.startswith("-")], arguments
        overrides = [*getattr(options, "overrides", []), *rest]
        recipe = getattr(options, "recipe", None)
        if recipe is not None and (ROOT / recipe).is_file():
            load_recipe(ROOT / recipe, overrides)
        assert all("=" in override for override in overrides), arguments


def test_every_make_target_exists():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z]+):", makefile, flags=re.MULTILINE))
    asked = {word for words in commands() if words[0] == "make" for word in words[1:] if "=" not in word}
    assert asked <= targets


def test_every_path_exists():
    text = README.read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:|mailto:|#)([^)\s#]+)", text)
    links += re.findall(r'(?:src|href)="(?!https?:|mailto:|#|data:)([^"#]+)"', text)
    folders = "recipes|docs|tests|src|benchmarks"
    links += re.findall(rf"(?<![\w/.-])((?:{folders})/[\w./-]*[\w/])", text)
    missing = sorted({link for link in links if not (ROOT / link).exists()})
    assert not missing


def test_every_python_block_compiles_and_uses_names_that_exist():
    for block in blocks("python"):
        tree = ast.parse(block)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "bankwise":
                module = importlib.import_module(node.module)
                missing = [name.name for name in node.names if not hasattr(module, name.name)]
                assert not missing, f"{node.module} has no {missing}"
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "bankwise":
                assert hasattr(bankwise, node.attr), f"bankwise has no {node.attr}"


def test_every_keyword_of_a_bankwise_call_exists():
    for block in blocks("python"):
        for node in ast.walk(ast.parse(block)):
            if not isinstance(node, ast.Call) or not ast.unparse(node.func).startswith("bankwise."):
                continue
            called = bankwise
            for name in ast.unparse(node.func).split(".")[1:]:
                called = getattr(called, name)
            parameters = inspect.signature(called).parameters
            unknown = {word.arg for word in node.keywords if word.arg} - set(parameters)
            if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
                assert not unknown, f"{ast.unparse(node.func)} takes no {unknown}"
