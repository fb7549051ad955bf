"""The lines that a training prints."""

import time
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class PrintProgress(TrainerCallback):
    """One plain line per log step: step, losses, rate, time left."""

    def __init__(self, name: str, *, is_bf16_refused: bool = False) -> None:
        self.name = name
        self.is_bf16_refused = is_bf16_refused

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.start, self.first_step = time.time(), state.global_step
        if self.is_bf16_refused and state.is_world_process_zero:
            print(f"{self.name}  float32: bfloat16 products are slow on this device", flush=True)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if not logs or "loss" not in logs or not state.is_world_process_zero:
            return
        per_step = (time.time() - self.start) / max(1, state.global_step - self.first_step)
        parts = "  ".join(f"{key} {logs[key]:.3f}" for key in ("ce", "kd", "state", "aux") if key in logs)
        left = per_step * (state.max_steps - state.global_step)
        print(
            f"{self.name}  step {state.global_step}/{state.max_steps}  {parts}  {per_step:.2f} s/step  "
            f"{left / 60:.1f} min left",
            flush=True,
        )
