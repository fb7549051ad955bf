"""Typed settings of a model (`SparsityConfig`), of a run (`Recipe`) and of a measurement (`EvaluationPlan`)."""

from bankwise.config.data import DataSource, Packing
from bankwise.config.device import Device
from bankwise.config.evaluation import (
    BenchmarksPlan,
    CwePlan,
    EvaluationPlan,
    PerplexityPlan,
    RoutingPlan,
    RulerPlan,
)
from bankwise.config.plan_file import PRESETS, dump_plan, load_plan
from bankwise.config.recipe import CalibrationConfig, Control, EvalConfig, Recipe
from bankwise.config.recipe_file import dump_recipe, load_recipe
from bankwise.config.sparsity import SparsityConfig
from bankwise.config.stage import RopeChange, Stage

__all__ = [
    "PRESETS",
    "BenchmarksPlan",
    "CalibrationConfig",
    "Control",
    "CwePlan",
    "DataSource",
    "Device",
    "EvalConfig",
    "EvaluationPlan",
    "Packing",
    "PerplexityPlan",
    "Recipe",
    "RopeChange",
    "RoutingPlan",
    "RulerPlan",
    "SparsityConfig",
    "Stage",
    "dump_plan",
    "dump_recipe",
    "load_plan",
    "load_recipe",
]
