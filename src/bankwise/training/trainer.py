"""The training loop of one stage: Hugging Face `Trainer` with bankwise's losses, parameter groups and record.

Everything else (accumulation, mixed precision, checkpoints, resume, processes) is the Trainer's own.
"""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from bankwise.config import Stage
from bankwise.errors import ConfigError, RoutingError, TrainingError
from bankwise.ffn import RoutingRecord, record_routing, sparse_layers
from bankwise.ffn.precision import bf16_router_products


class TokenWindows(Dataset):
    """Windows [n, length] of token ids in a fixed order; labels are the tokens themselves."""

    def __init__(self, windows: Tensor) -> None:
        self.windows = windows

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.windows[index], "labels": self.windows[index]}


class UpcyclingTrainer(Trainer):
    """Trains a sparse model, or the dense companion, on one stage.

    Loss = ce_weight * CE + kd_weight * KL(teacher || student) + aux_weight * mean over layers of the routing loss.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        stage: Stage,
        windows: Tensor,
        output: Path,
        *,
        name: str = "sparse",
        teacher: PreTrainedModel | None = None,
        seed: int = 0,
        metrics_file: Path | None = None,
        quiet: bool = False,
    ) -> None:
        if stage.kd_weight and teacher is None and name != "companion":
            raise ConfigError(f"kd_weight={stage.kd_weight} needs a teacher; pass the dense model as teacher=")
        select_trained(model, stage.trains)
        if stage.gradient_checkpointing:
            model.gradient_checkpointing_enable()
        self.stage = stage
        self.teacher = None if teacher is None else teacher.eval().requires_grad_(False)
        self.name = name
        self.metrics_file = metrics_file
        self.parts: list[dict[str, float]] = []
        self.routing: dict[str, list[float]] = {}
        self.record: RoutingRecord | None = None
        arguments = TrainingArguments(
            output_dir=str(output),
            per_device_train_batch_size=stage.micro_batch,
            gradient_accumulation_steps=stage.accumulation,
            max_steps=stage.steps,
            learning_rate=stage.lr,
            lr_scheduler_type="cosine_with_min_lr",
            lr_scheduler_kwargs={"min_lr_rate": stage.min_lr_ratio},
            warmup_steps=round(stage.warmup * stage.steps),
            max_grad_norm=stage.max_grad_norm,
            bf16=stage.bf16,
            save_strategy="steps" if stage.save_steps else "no",
            save_steps=stage.save_steps or 500,
            logging_steps=stage.log_steps,
            logging_nan_inf_filter=False,
            report_to=[],
            seed=seed,
            use_cpu=not torch.cuda.is_available(),
            disable_tqdm=True,
            remove_unused_columns=False,
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        self.windows = TokenWindows(windows)
        super().__init__(model=model, args=arguments, train_dataset=self.windows)
        # The loss is a mean over each pass's own tokens; the Trainer divides by the number of accumulated passes.
        self.model_accepts_loss_kwargs = False
        self.remove_callback(PrinterCallback)
        self.add_callback(_LogAtCheckpoints(stage))
        if not quiet:
            self.add_callback(_PrintProgress(name))

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler:
        # The data module has shuffled already; a fixed order is what the companion and a resumed run share.
        return SequentialSampler(self.windows)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW with three groups: matrices (with decay), vectors, and predictors at their own learning rate."""
        if self.optimizer is None:
            trained = self.model if model is None else model
            assert trained is not None
            groups = list(parameter_groups(trained, self.stage))
            self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), eps=1e-8, fused=True)
        return self.optimizer

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """As in the Trainer, with the routing recorded where the step needs it.

        The record stays open until the backward pass is over: under gradient checkpointing the layers are run again
        there, and must save what they saved before.
        """
        self.record = None
        is_sparse, with_loss = self.name != "companion", self.stage.aux_weight > 0
        is_logged = _is_logged(self.stage, self.state.global_step + 1)
        if not is_sparse or not (with_loss or is_logged):
            return super().training_step(model, inputs, num_items_in_batch)
        with record_routing(
            model,
            with_loss=with_loss,
            with_statistics=is_logged,
            loss_kind=self.stage.aux_loss,
            scope=self.stage.aux_scope,
            token_fraction=self.stage.aux_token_fraction,
        ) as self.record:
            return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        stage, is_sparse = self.stage, self.name != "companion"
        distill: dict[str, Any] = {}
        if self.teacher is not None and stage.kd_weight and is_sparse:
            with torch.no_grad(), self.compute_loss_context_manager():
                hidden = self.teacher.model(inputs["input_ids"], use_cache=False).last_hidden_state
            distill = {
                "teacher_hidden": hidden, "teacher_head": self.teacher.lm_head.weight, "kd_weight": stage.kd_weight
            }  # fmt: skip
        try:
            outputs = self._forward(model, inputs, distill)
        except RoutingError as error:
            raise TrainingError(f"{self._where()}: {error}. {self._last_good()}") from error
        ce, kd = self.accelerator.unwrap_model(model).last_loss_parts
        loss, aux, record = outputs.loss, None, self.record
        if record is not None and record.losses:
            aux = torch.stack(record.losses).mean()
            loss = loss + stage.aux_weight * aux
        if not loss.isfinite():
            raise TrainingError(f"{self._where()}: the loss is {loss.item()}. {self._last_good()}")
        self.parts.append({"ce": ce.item(), "kd": kd.item(), **({} if aux is None else {"aux": aux.item()})})
        if record is not None and record.recalls:
            self.routing = {
                "recall": torch.stack(record.recalls).tolist(), "retained": torch.stack(record.retained).tolist()
            }  # fmt: skip
        return (loss, outputs) if return_outputs else loss

    def _forward(self, model: nn.Module, inputs: dict[str, Tensor], distill: dict[str, Any]) -> Any:
        # The companion has no teacher, so a stage of distillation alone trains it by cross entropy.
        ce_weight = self.stage.ce_weight if self.name != "companion" else self.stage.ce_weight or 1.0
        with self.compute_loss_context_manager():
            return model(**inputs, ce_weight=ce_weight, loss_chunk=self.stage.loss_chunk, use_cache=False, **distill)

    def _where(self) -> str:
        return (
            f"training of the {self.name} model stopped at step {self.state.global_step + 1} of {self.state.max_steps}"
        )

    def _last_good(self) -> str:
        folder = Path(str(self.args.output_dir))
        saved = sorted(int(path.name.removeprefix("checkpoint-")) for path in folder.glob("checkpoint-*"))
        # A checkpoint of the step that has just ended holds the very weights that gave this loss.
        good = [step for step in saved if step < self.state.global_step]
        if not good:
            return "No checkpoint was saved yet (set save_steps); lower lr or predictor_lr and start again"
        return (
            f"The last good checkpoint is {folder / f'checkpoint-{good[-1]}'}; "
            "start again with a lower lr or predictor_lr"
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in the Trainer; training lines also go to metrics.jsonl with the parts of the loss and the routing."""
        if "loss" in logs and self.parts:
            means = {key: _mean([part[key] for part in self.parts if key in part]) for key in ("ce", "kd", "aux")}
            self.parts = []
            logs |= {key: value for key, value in means.items() if value is not None}
            if self.metrics_file is not None and self.is_world_process_zero():
                step = self.state.global_step
                row = {
                    "model": self.name,
                    "step": step,
                    "tokens": step * int(self.stage.batch_tokens) * self.args.world_size,
                    "loss": logs["loss"],
                    **means,
                    "grad_norm": logs.get("grad_norm"),
                    "lr": logs.get("learning_rate"),
                    "seconds": time.time() - self.started,
                    "recall": self.routing.get("recall"),
                    "retained": self.routing.get("retained"),
                }
                with self.metrics_file.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(row) + "\n")
        super().log(logs, start_time)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in the Trainer, with the router's float32 products at bfloat16 input precision where autocast is on."""
        self.started = time.time()
        if not self.stage.bf16:
            return super().train(*args, **kwargs)
        with bf16_router_products():
            return super().train(*args, **kwargs)


def select_trained(model: nn.Module, trains: str) -> None:
    """Freeze everything that the stage does not train. A dense model has no predictor to train alone."""
    if trains == "predictor" and not sparse_layers(model):
        raise ConfigError("trains='predictor' was asked of a dense model; use trains='all'")
    for name, parameter in model.named_parameters():
        is_ffn, is_predictor = ".mlp." in name, ".mlp.predictor." in name
        parameter.requires_grad_(trains == "all" or (trains == "ffn" and is_ffn) or is_predictor)


def parameter_groups(model: nn.Module, stage: Stage) -> Iterator[dict[str, Any]]:
    """AdamW groups: matrices of the model, its vectors, and the predictors."""
    trained = [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
    predictor = [parameter for name, parameter in trained if ".mlp.predictor." in name]
    matrices = [p for name, p in trained if ".mlp.predictor." not in name and p.ndim >= 2]
    vectors = [p for name, p in trained if ".mlp.predictor." not in name and p.ndim < 2]
    for parameters, lr, decay in (
        (matrices, stage.lr, stage.weight_decay),
        (vectors, stage.lr, 0.0),
        (predictor, stage.predictor_lr, 0.0),
    ):
        if parameters:
            yield {"params": parameters, "lr": lr, "weight_decay": decay}


def _is_logged(stage: Stage, step: int) -> bool:
    """Whether `step` ends with a line in the record: every log_steps, at the end, and at each checkpoint.

    A line covers the steps since the one before; without one at a checkpoint, a resumed run's first line would differ.
    """
    is_saved = stage.save_steps > 0 and step % stage.save_steps == 0
    return step % stage.log_steps == 0 or step == stage.steps or is_saved


class _LogAtCheckpoints(TrainerCallback):
    def __init__(self, stage: Stage) -> None:
        self.stage = stage

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if _is_logged(self.stage, state.global_step):
            control.should_log = True


class _PrintProgress(TrainerCallback):
    """One plain line per log step: step, losses, rate, time left."""

    def __init__(self, name: str) -> None:
        self.name = name

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.start, self.first_step = time.time(), state.global_step

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
        parts = "  ".join(f"{key} {logs[key]:.3f}" for key in ("ce", "kd", "aux") if key in logs)
        left = per_step * (state.max_steps - state.global_step)
        print(
            f"{self.name}  step {state.global_step}/{state.max_steps}  {parts}  {per_step:.2f} s/step  "
            f"{left / 60:.1f} min left",
            flush=True,
        )


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
