"""Measurement of dense and sparse models: suites of measures, baselines, and one report of all columns."""

from bankwise.evaluation import cwe, ruler
from bankwise.evaluation.evaluator import evaluate, evaluate_models
from bankwise.evaluation.measures import Measure
from bankwise.evaluation.perplexity import LossResult, active_fraction, perplexity, window_losses

__all__ = [
    "LossResult",
    "Measure",
    "active_fraction",
    "cwe",
    "evaluate",
    "evaluate_models",
    "perplexity",
    "ruler",
    "window_losses",
]
