"""Typed settings of a model (`SparsityConfig`), of a run (`Recipe`) and of a measurement (`EvaluationPlan`)."""

from bankwise.config.evaluation import (
    BenchmarksPlan,
    CwePlan,
    EvaluationPlan,
    PerplexityPlan,
    RoutingPlan,
    RulerPlan,
)
from bankwise.config.plan_file import PRESETS, dump_plan, load_plan
from bankwise.config.recipe import CalibrationConfig, DataSource, EvalConfig, Recipe, Stage
from bankwise.config.recipe_file import dump_recipe, load_recipe
from bankwise.config.sparsity import SparsityConfig

__all__ = [
    "PRESETS",
    "BenchmarksPlan",
    "CalibrationConfig",
    "CwePlan",
    "DataSource",
    "EvalConfig",
    "EvaluationPlan",
    "PerplexityPlan",
    "Recipe",
    "RoutingPlan",
    "RulerPlan",
    "SparsityConfig",
    "Stage",
    "dump_plan",
    "dump_recipe",
    "load_plan",
    "load_recipe",
]
