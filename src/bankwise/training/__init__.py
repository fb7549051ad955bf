"""Training stages: the `Trainer` subclass, its losses, parameter groups and record."""

from bankwise.training.trainer import TokenWindows, UpcyclingTrainer, parameter_groups, select_trained

__all__ = ["TokenWindows", "UpcyclingTrainer", "parameter_groups", "select_trained"]
