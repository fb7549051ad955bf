"""Training-free baselines and controls at an equal active fraction, on a dense model."""

from bankwise.evaluation.baselines.apply import BASELINES, AppliedBaseline, Baseline, apply_baseline

__all__ = ["BASELINES", "AppliedBaseline", "Baseline", "apply_baseline"]
