"""Typed settings of a model (`SparsityConfig`) and of a run (`Recipe`)."""

from bankwise.config.recipe import CalibrationConfig, DataSource, EvalConfig, Recipe, Stage
from bankwise.config.recipe_file import dump_recipe, load_recipe
from bankwise.config.sparsity import SparsityConfig

__all__ = [
    "CalibrationConfig",
    "DataSource",
    "EvalConfig",
    "Recipe",
    "SparsityConfig",
    "Stage",
    "dump_recipe",
    "load_recipe",
]
