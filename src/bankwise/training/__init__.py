"""Training stages: the `Trainer` subclass, its losses, parameter groups, schedules and record."""

from bankwise.training.controls import COMPANION
from bankwise.training.optimizer import parameter_groups, select_trained
from bankwise.training.stages import train_stages, trained_tokens
from bankwise.training.trainer import UpcyclingTrainer

__all__ = [
    "COMPANION",
    "UpcyclingTrainer",
    "parameter_groups",
    "select_trained",
    "train_stages",
    "trained_tokens",
]
