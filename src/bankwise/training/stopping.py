"""The end of a training that a signal asked for: after a whole step, with a checkpoint, on all processes at once."""

from typing import Any

import torch
from accelerate.utils import gather
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from bankwise.signals import StopRequest


class StopAtSignal(TrainerCallback):
    """Lets the training save and stop after the step in which any of the processes got a signal."""

    def __init__(self) -> None:
        self.request = StopRequest()
        self.signum = 0
        """The signal that all processes stop at; 0: none."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.agree(args):
            control.should_save = control.should_training_stop = True

    def agree(self, args: TrainingArguments) -> bool:
        """Whether one of the processes got a signal; all of them call this together."""
        self.signum = self.request.signum
        if args.world_size > 1:
            self.signum = int(gather(torch.tensor([self.signum], device=args.device)).max())
        return bool(self.signum)
