"""Typed settings of a model (`SparsityConfig`) and of a run (`Recipe`)."""

from bankwise.config.recipe import CalibrationConfig, DataSource, EvalConfig, Recipe, Stage
from bankwise.config.sparsity import SparsityConfig

__all__ = ["CalibrationConfig", "DataSource", "EvalConfig", "Recipe", "SparsityConfig", "Stage"]
