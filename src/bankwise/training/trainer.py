"""The training loop of one stage: Hugging Face `Trainer` with bankwise's losses, parameter groups and record.

Everything else (accumulation, mixed precision, resume, processes) is the Trainer's own.
"""

import copy
import dataclasses
import signal
import time
from collections.abc import Callable, Sized
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import Dataset, Sampler, SequentialSampler
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from bankwise.config import Stage
from bankwise.errors import ConfigError, Interrupted, RoutingError, TrainingError
from bankwise.ffn import RoutingRecord, record_routing, sparse_layers
from bankwise.ffn.precision import bf16_router_products
from bankwise.files import remove_leftovers, sync
from bankwise.models.document_attention import check_document_attention, document_attention
from bankwise.models.lm_loss import IGNORED_LABEL
from bankwise.precision import multiplies_bf16
from bankwise.processes import join_processes, own_device
from bankwise.training.checkpointing import (
    CheckpointingTrainer,
    SaveInTime,
    append_line,
    checkpoint_step,
    last_whole_checkpoint,
    later_checkpoints,
    read_own_state,
    trim_record,
)
from bankwise.training.controls import COMPANION
from bankwise.training.optimizer import has_trainable_predictors, parameter_groups, select_trained
from bankwise.training.progress import PrintProgress
from bankwise.training.schedules import ChannelSchedule, aux_weight, scheduler_arguments
from bankwise.training.sharding import check_sharding, keep_sums_in_float32
from bankwise.training.state_distillation import state_distance
from bankwise.training.stopping import StopAtSignal
from bankwise.training.telemetry import Telemetry, TelemetryPlan

_WITHOUT_EFFECT = {
    "optim", "optim_args", "adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay", "num_train_epochs",
    "label_smoothing_factor", "gradient_checkpointing", "activation_checkpointing",
}  # fmt: skip
"""Arguments of transformers in whose place the trainer has its own optimiser, loss and fields of a stage."""

_AGAINST_THE_RECIPE = {
    "save_only_model", "average_tokens_across_devices", "auto_find_batch_size", "ignore_data_skip", "eval_strategy",
    "load_best_model_at_end",
}  # fmt: skip
"""Arguments that would change the tokens of a step, their order, the loss's scale, or what a resumed run gives; and
those that need evaluations during training, where the telemetry reads the held-out loss."""


class UpcyclingTrainer(CheckpointingTrainer):
    """Trains a sparse model, or the dense companion, on one stage.

    Loss = ce_weight * CE + kd_weight * KL(teacher || student) + state_weight * distance to the teacher's hidden states
    + aux_weight * mean over layers of the routing loss.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        stage: Stage,
        rows: Dataset,
        output: Path,
        *,
        name: str = "sparse",
        collate: Callable[[list[dict[str, Tensor]]], dict[str, Tensor]] | None = None,
        teacher: PreTrainedModel | None = None,
        seed: int = 0,
        metrics_file: Path | None = None,
        telemetry: TelemetryPlan | None = None,
        tokens_before: int = 0,
        arguments: dict[str, Any] | None = None,
        quiet: bool = False,
    ) -> None:
        if stage.has_teacher and teacher is None and name != COMPANION:
            raise ConfigError(
                f"kd_weight={stage.kd_weight} and state_weight={stage.state_weight} need a teacher; pass the dense "
                "model as teacher="
            )
        held = None if teacher is None else _frozen(teacher, getattr(torch, stage.teacher_dtype))
        self.attending = [model, *([] if held is None else [held])] if stage.packing.doc_mask else []
        for attending in self.attending:
            check_document_attention(attending)
        select_trained(model, stage)
        _recompute_activations(model, stage.gradient_checkpointing)
        self.stage = stage
        self.keep_checkpoints = stage.keep_checkpoints
        self.stop = StopAtSignal()
        self.teacher = held
        self.name = name
        self.is_sparse = bool(sparse_layers(model))
        self.has_predictors = has_trainable_predictors(model)
        self.metrics_file = metrics_file
        self.tokens_before = tokens_before
        self.parts: list[dict[str, float]] = []
        self.routing: dict[str, list[float]] = {}
        self.record: RoutingRecord | None = None
        check_arguments(arguments or {}, stage)
        # Whether a parameter gets a gradient changes from step to step: predictors, where a schedule switches a loss.
        defaults: dict[str, Any] = {"report_to": [], "ddp_find_unused_parameters": True}
        try:
            training_arguments = TrainingArguments(
                **_own_arguments(stage, output, seed), **defaults | (arguments or {})
            )
        except (TypeError, ValueError) as error:
            raise ConfigError(f"trainer={arguments} is not accepted by TrainingArguments: {error}") from error
        if training_arguments.run_name and stage.name:
            training_arguments.run_name += f"/{stage.name}"
        # With several GPUs and no launcher the Trainer would run DataParallel, and a step have more tokens than asked.
        training_arguments._n_gpu = min(1, training_arguments.n_gpu)
        self.rows: Sized = rows  # type: ignore[assignment]  # map-style: Dataset has no __len__ in its type
        super().__init__(model=model, args=training_arguments, train_dataset=rows, data_collator=collate)
        if stage.packing.doc_mask and max(self.get_cp_size(), self.get_sp_size()) > 1:
            raise ConfigError(
                "context and sequence parallelism drop the document mask; set packing.doc_mask: false, or leave "
                "cp_size and sp_size at 1"
            )
        check_sharding(self.accelerator, model)
        if self.is_fsdp_enabled:
            keep_sums_in_float32(self.accelerator.state.fsdp_plugin)
            # FSDP2 gathers a layer's weights again when a gradient reaches the layer's output. Where only predictors
            # learn none would, and the routing loss would find them freed.
            model.enable_input_require_grads()
        if self.teacher is not None:
            self.teacher.to(self.args.device)
        # Every loss is a sum over a step's target tokens, of all passes and processes, divided by their number.
        self.model_accepts_loss_kwargs = True
        self.add_callback(ChannelSchedule(stage, model))
        self.remove_callback(PrinterCallback)
        self.telemetry: Telemetry | None = None
        if telemetry is not None and self.has_predictors:
            self.telemetry = Telemetry(self, sparse_layers(model), telemetry)
            self.add_callback(self.telemetry)
        self.add_callback(_LogAtTheEnd(stage))
        if not stage.save_steps:
            self.add_callback(SaveInTime())
        self.add_callback(self.stop)
        if not quiet:
            place = f"{name}, stage {stage.name}" if stage.name else name
            self.add_callback(PrintProgress(place, is_bf16_refused=stage.bf16 and not self.args.bf16))

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler:
        # The data module has shuffled already; a fixed order is what the companion and a resumed run share.
        return SequentialSampler(self.rows)

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
        with_loss = self.has_predictors and aux_weight(self.stage, self.state.global_step) > 0
        step = self.state.global_step + 1
        is_logged = _is_logged(self.stage, step)
        is_read = self.telemetry is not None and self.telemetry.is_due(step)
        if not self.is_sparse or not (with_loss or is_logged or is_read):
            return super().training_step(model, inputs, num_items_in_batch)
        with record_routing(
            model,
            with_loss=with_loss,
            with_statistics=is_logged,
            with_gradients=is_read,
            loss_kind=self.stage.aux_loss,
            scope=self.stage.aux_scope,
            token_fraction=self.stage.aux_token_fraction,
        ) as self.record:
            loss = super().training_step(model, inputs, num_items_in_batch)
        if self.telemetry is not None and is_read:
            self.telemetry.add_gradients(self.record)
        return loss

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        stage = self.stage
        text_places = inputs.pop("text_places", None)
        if self.record is not None:
            self.record.text_places = text_places
        distill: dict[str, Any] = {}
        taught = None
        if self.teacher is not None and stage.has_teacher:
            read = {name: value for name, value in inputs.items() if name != "labels"}
            wants_states = bool(stage.state_weight)
            with torch.no_grad(), self.compute_loss_context_manager():
                taught = self.teacher.model(**read, use_cache=False, output_hidden_states=wants_states)
            distill = {
                "teacher_hidden": taught.last_hidden_state,
                "teacher_head": self.teacher.lm_head.weight,
                "kd_weight": stage.kd_weight,
                "output_hidden_states": wants_states,
            }
        try:
            outputs = self._forward(model, inputs, num_items_in_batch, distill)
        except RoutingError as error:
            raise TrainingError(f"{self._where()}: {error}. {self._last_good()}") from error
        ce, kd = self.accelerator.unwrap_model(model).last_loss_parts
        # Processes average their gradients, while the loss is divided by the tokens of all of them.
        loss, aux, record = outputs.loss * self.args.world_size, outputs.routing_loss, self.record
        if aux is not None:
            loss = loss + aux_weight(stage, self.state.global_step) * aux / self.args.gradient_accumulation_steps
        state = None
        if taught is not None and stage.state_weight:
            state = self._state_distance(outputs, taught, inputs["labels"], num_items_in_batch)
            loss = loss + stage.state_weight * state * self.args.world_size
        if not loss.isfinite():
            raise TrainingError(f"{self._where()}: the loss is {loss.item()}. {self._last_good()}")
        parts = {"loss": loss.item(), "ce": ce.item(), "kd": kd.item()}
        if state is not None:
            parts["state"] = state.item()
        self.parts.append(parts if aux is None else parts | {"aux": aux.item()})
        if record is not None and record.recalls:
            self.routing = {
                "recall": torch.stack(record.recalls).tolist(), "retained": torch.stack(record.retained).tolist()
            }  # fmt: skip
        return (loss, outputs) if return_outputs else loss

    def _forward(self, model: nn.Module, inputs: dict[str, Tensor], items: Any, distill: dict[str, Any]) -> Any:
        # The companion has no teacher, so a stage of distillation alone trains it by cross entropy.
        ce_weight = self.stage.ce_weight if self.name != COMPANION else self.stage.ce_weight or 1.0
        settings = {"ce_weight": ce_weight, "loss_chunk": self.stage.loss_chunk, "num_items_in_batch": items}
        with self.compute_loss_context_manager():
            return model(**inputs, **settings, use_cache=False, **distill)

    def _state_distance(self, outputs: Any, taught: Any, labels: Tensor, items: Any) -> Tensor:
        """Distance to the teacher's states of this pass, as a share of the step's target tokens."""
        # The first of the states is the embedding, which no layer has touched.
        is_target = labels != IGNORED_LABEL
        distance = state_distance(outputs.hidden_states[1:], taught.hidden_states[1:], is_target)
        return distance / (is_target.sum().clamp_min(1) if items is None else items)

    def _where(self) -> str:
        return f"training of the {self.name} model stopped at {self.place(self.state.global_step + 1)}"

    def tokens_at(self, step: int) -> int:
        """Tokens that the model has read when `step` of this stage ends, those of earlier stages with them."""
        return self.tokens_before + step * int(self.stage.batch_tokens)

    def place(self, step: int) -> str:
        """A step in words, with the stage where it has a name."""
        return f"step {step} of {self.stage.steps}" + (f" of stage {self.stage.name}" if self.stage.name else "")

    def _last_good(self) -> str:
        saved = self.own_checkpoints(Path(str(self.args.output_dir)))
        # A checkpoint of the step that has just ended holds the very weights that gave this loss.
        good = [checkpoint for checkpoint in saved if checkpoint_step(checkpoint) < self.state.global_step]
        if not good:
            return "No checkpoint was saved yet (set save_steps); lower lr or predictor_lr and start again"
        return f"The last good checkpoint is {good[-1]}; start again with a lower lr or predictor_lr"

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As in the Trainer; training lines also go to metrics.jsonl with the parts of the loss and the routing."""
        if "loss" in logs and self.parts:
            means = self._loss_parts()
            # The loss too: the Trainer's own mean leaves out the steps before a resume.
            logs |= {key: value for key, value in means.items() if value is not None}
            if self.metrics_file is not None and self.is_world_process_zero():
                step = self.state.global_step
                row = {
                    "model": self.name,
                    "stage": self.stage.name,
                    "step": step,
                    "tokens": self.tokens_at(step),
                    **means,
                    "grad_norm": logs.get("grad_norm"),
                    "lr": logs.get("learning_rate"),
                    "seconds": time.time() - self.started,
                    "recall": self.routing.get("recall"),
                    "retained": self.routing.get("retained"),
                }
                append_line(self.metrics_file, row)
        super().log(logs, start_time)

    def _loss_parts(self) -> dict[str, float | None]:
        """Means since the last line, over steps and processes: nats per token, and the mean auxiliary loss."""
        scales = self._scales()
        local = {key: _mean([part[key] for part in self.parts if key in part]) for key in scales}
        self.parts = []
        reduced = {
            key: self.accelerator.reduce(torch.tensor(value, device=self.args.device), "mean").item() * scales[key]
            for key, value in local.items()
            if value is not None
        }
        return {key: reduced.get(key) for key in scales}

    def _scales(self) -> dict[str, int]:
        """By what the mean over passes and processes of each part of the loss gives that of a step."""
        passes = self.args.gradient_accumulation_steps
        # A pass holds its share of the step's tokens, so the language-model parts of a step's passes add up. The loss
        # is the one that is differentiated, with the number of processes in it.
        share = passes * self.args.world_size
        return {"loss": passes, "ce": share, "kd": share, "state": share, "aux": 1}

    def own_state(self) -> dict[str, Any]:
        """The steps that the next line of metrics.jsonl covers already; the lines before it are on disk after this."""
        if self.metrics_file is not None and self.is_world_process_zero() and self.metrics_file.is_file():
            sync(self.metrics_file)
        passes, scales = self.args.gradient_accumulation_steps, self._scales()
        everywhere = gather_object([self.parts])
        steps = []
        for first in range(0, len(self.parts), passes):
            same = [part for parts in everywhere for part in parts[first : first + passes]]
            steps.append({key: sum(part[key] for part in same) / len(same) * scales[key] for key in same[0]})
        gaps = [] if self.telemetry is None else self.telemetry.gaps
        return {"open_line": steps, "companion_gaps": gaps}

    def load_own_state(self, state: dict[str, Any]) -> None:
        """Take up what `own_state` gave, also with another number of processes."""
        scales, passes = self._scales(), self.args.gradient_accumulation_steps
        shares = [{key: value / scales[key] for key, value in step.items()} for step in state["open_line"]]
        self.parts = [share for share in shares for _ in range(passes)]
        if self.telemetry is not None:
            self.telemetry.gaps = list(state.get("companion_gaps", []))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """As in the Trainer, with the attention of the document mask, and the router's precision.

        Where autocast is on, the router's float32 products have bfloat16 input precision. SIGTERM, SIGUSR1 or Ctrl-C
        lets the step end and saves a checkpoint; `Interrupted` is raised after that.
        """
        self.started = time.time()
        step, self.parts = 0, []
        if resume_from_checkpoint is True:
            last = last_whole_checkpoint(Path(str(self.args.output_dir)))
            resume_from_checkpoint = None if last is None else str(last)
        if isinstance(resume_from_checkpoint, str):
            step = checkpoint_step(Path(resume_from_checkpoint))
            self.load_own_state(read_own_state(Path(resume_from_checkpoint)))
        self.left_behind = later_checkpoints(Path(str(self.args.output_dir)), step)
        if self.args.should_save:
            remove_leftovers(Path(str(self.args.output_dir)))
        if self.metrics_file is not None and self.is_world_process_zero():
            trim_record(self.metrics_file, self.name, self.tokens_at(step))
        products = bf16_router_products() if self.args.bf16 else nullcontext()
        listening = self.stop.request.listening(processes=self.args.world_size, say=self.is_world_process_zero())
        with listening, products, document_attention(*self.attending):
            result = super().train(resume_from_checkpoint, *args, **kwargs)
            if not self.stop.signum and self.stop.agree(self.args):
                self._save_checkpoint(self.model_wrapped, None)
        if self.stop.signum:
            raise Interrupted(
                f"{signal.Signals(self.stop.signum).name} stopped the training of the {self.name} model after "
                f"{self.place(self.state.global_step)}; its checkpoint is in {self.args.output_dir}",
                self.stop.signum,
            )
        return result


def check_arguments(arguments: dict[str, Any], stage: Stage) -> None:
    """Refuse further `TrainingArguments` of a recipe that do not exist, or that the recipe and its stages decide."""
    unknown = sorted(arguments.keys() - {each.name for each in dataclasses.fields(TrainingArguments)})
    if unknown:
        raise ConfigError(f"trainer: transformers {transformers.__version__} has no training argument {unknown[0]!r}")
    own = _WITHOUT_EFFECT | _AGAINST_THE_RECIPE | _own_arguments(stage, Path(), 0).keys()
    refused = sorted(arguments.keys() & own)
    if refused:
        raise ConfigError(f"trainer sets {', '.join(refused)}, which the recipe and its stages set; remove it")
    accelerator = arguments.get("accelerator_config")
    if isinstance(accelerator, dict) and accelerator.get("split_batches"):
        raise ConfigError("trainer.accelerator_config sets split_batches, which would change the tokens of a step")


def _own_arguments(stage: Stage, output: Path, seed: int) -> dict[str, Any]:
    return {
        "output_dir": str(output),
        "per_device_train_batch_size": stage.micro_batch,
        "gradient_accumulation_steps": stage.accumulation(join_processes()),
        "max_steps": stage.steps,
        "learning_rate": stage.lr,
        "max_grad_norm": stage.max_grad_norm,
        "bf16": stage.bf16 and multiplies_bf16(own_device().type),
        "save_strategy": "steps",
        "save_steps": stage.save_steps or stage.steps,
        "save_total_limit": None,
        "logging_steps": stage.log_steps,
        "logging_nan_inf_filter": False,
        "seed": seed,
        "use_cpu": own_device().type == "cpu",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": own_device().type == "cuda",
    } | scheduler_arguments(stage)


def _frozen(teacher: PreTrainedModel, dtype: torch.dtype) -> Any:
    # What is given is also a column of the final table, so its weights must stay as they are.
    held: Any = teacher if teacher.dtype == dtype else copy.deepcopy(teacher)
    return held.to(dtype=dtype).eval().requires_grad_(False)


def _recompute_activations(model: PreTrainedModel, is_wanted: bool) -> None:
    # The stage before may have left it on, and hooks at the embedding, which would add up.
    if any(getattr(module, "gradient_checkpointing", False) for module in model.modules()):
        model.gradient_checkpointing_disable()
        model.disable_input_require_grads()
    if is_wanted:
        model.gradient_checkpointing_enable()


def _is_logged(stage: Stage, step: int) -> bool:
    """Whether `step` ends with a line in the record, which covers the steps since the one before."""
    return step % stage.log_steps == 0 or step == stage.steps


class _LogAtTheEnd(TrainerCallback):
    def __init__(self, stage: Stage) -> None:
        self.stage = stage

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if _is_logged(self.stage, state.global_step):
            control.should_log = True


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None
