"""The self-contained modelling file that a checkpoint carries.

The reference path lives in several modules of this package; `trust_remote_code` wants one file. `modeling_source` joins
the modules in import order and leaves out the imports between them. Names must be unique across the modules
(tests/models/test_export.py).
"""

import ast
from pathlib import Path

_MODULES = (
    "errors",
    "config/sparsity",
    "ffn/bank",
    "ffn/gates",
    "ffn/predictor",
    "ffn/routing_loss",
    "ffn/selection",
    "ffn/layer",
    "models/lm_loss",
    "models/tensor_parallel",
    "models/modeling",
)
_HEADER = '''"""bankwise model classes, for `trust_remote_code=True` where the package bankwise is not installed.

Joined from the modules of bankwise {version}, Apache-2.0. The reference path only: same logits, no fast kernels.
"""
'''
_FOOTER = '''

def modeling_source() -> str:
    """This file, for a checkpoint saved from here."""
    return Path(__file__).read_text(encoding="utf-8")
'''


def modeling_source() -> str:
    """Python source of one module that defines every model class without importing bankwise."""
    from bankwise import __version__

    package = Path(__file__).parent.parent
    parts = [_HEADER.format(version=__version__)]
    for module in _MODULES:
        source = (package / f"{module}.py").read_text(encoding="utf-8")
        parts.append(f"# ---- bankwise/{module}.py\n{_without_package_imports(source)}")
    return "\n\n".join(parts) + _FOOTER


def _without_package_imports(source: str) -> str:
    tree = ast.parse(source)
    dropped: set[int] = set()
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "bankwise":
            dropped.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    # The module's docstring would be a stray string in the middle of the joined file.
    if isinstance(tree.body[0], ast.Expr):
        dropped.update(range(tree.body[0].lineno, (tree.body[0].end_lineno or 0) + 1))
    lines = source.splitlines()
    return "\n".join(line for number, line in enumerate(lines, start=1) if number not in dropped).strip()
