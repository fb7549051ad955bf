"""What a run would need, do and write, from configs alone: no weights are loaded, no text is read, nothing is written.

Everything that can be refused before loading is refused here with the same errors as in the run itself.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from bankwise.config import Recipe, SparsityConfig, Stage
from bankwise.errors import ConfigError
from bankwise.models import sparse_config
from bankwise.models.cost import sparsity_of
from bankwise.run_checks import (
    STARTED_FROM,
    check_checkpoint,
    check_folder,
    check_model,
    check_run,
    check_saved_models,
    check_sources,
    check_train,
    evaluation_plan,
)
from bankwise.training.budget import (
    TokenFlops,
    TrainedParameters,
    meta_model,
    parameter_count,
    teacher_flops,
    token_flops,
    trained_parameters,
)
from bankwise.training.controls import DENSE_NARROW, control_sparsity, control_stages
from bankwise.training.memory import Memory, Sharding, step_memory
from bankwise.training.rope import changed_rope, check_teacher
from bankwise.upcycle.loading import load_shape
from bankwise.upcycle.narrow import kept_channels

_FLOAT32 = 4


@dataclass(frozen=True, kw_only=True)
class StageBudget:
    """One stage, of the sparse model where nothing else is said."""

    stage: Stage
    steps: int
    rows: int
    tokens: int
    """Whole optimiser steps."""
    accumulation: int
    context: int
    """Tokens that the model can place in this stage, after its RoPE change."""
    trained: TrainedParameters
    memory: dict[Sharding, Memory]
    """Of one device, by how the model is shared out."""
    flops: TokenFlops
    """Of one token, without the teacher."""
    step_flops: dict[str, int]
    """Of one optimiser step on all devices, by model; the teacher's are with its student's."""

    @property
    def total_flops(self) -> dict[str, int]:
        return {name: flops * self.steps for name, flops in self.step_flops.items()}


@dataclass(frozen=True, kw_only=True)
class RunBudget:
    """What a run needs and writes."""

    model: str
    origin: str
    """Where the model's shape is from."""
    sparsity: SparsityConfig
    dense_parameters: int
    predictor_parameters: int
    """What the conversion adds."""
    processes: int
    stages: list[StageBudget]
    disk: dict[str, int]
    """Bytes by what is kept at the end, in the run's folder."""
    host_bytes: int
    """Weights that each process holds in the machine's memory: the dense model, the one that is trained, and with
    several processes a copy of it, which FSDP2 takes apart."""
    writes: list[str]
    device_flops: float
    """FLOPs that one device does in a second; 0: not stated."""

    @property
    def flops(self) -> dict[str, int]:
        """Of the whole training, by model."""
        names = {name: None for budget in self.stages for name in budget.step_flops}
        return {name: sum(budget.total_flops.get(name, 0) for budget in self.stages) for name in names}

    def seconds(self, flops: float) -> float | None:
        """Time that so many FLOPs take on all devices; None where the speed of a device is not stated."""
        return flops / (self.device_flops * self.processes) if self.device_flops else None


def plan_run(
    recipe: Recipe,
    *,
    checkpoint: str | Path | None = None,
    processes: int = 1,
    device_tflops: float = 0.0,
    resume: bool = False,
    overwrite: bool = False,
) -> RunBudget:
    """The budget of `bankwise run`, or of `bankwise train` on `checkpoint`. Raises what the run would raise.

    `processes` share a step (one device each). `device_tflops` is what one device really reaches, not its data sheet.
    """
    if processes < 1 or device_tflops < 0:
        raise ConfigError(f"processes={processes} must be at least 1 and device_tflops={device_tflops:g} at least 0")
    if checkpoint is None:
        check_run(recipe)
        evaluation_plan(recipe)
    else:
        check_train(recipe)
    inputs = [] if checkpoint is None else [checkpoint]
    check_folder(Path(recipe.output), recipe, resume=resume, overwrite=overwrite, inputs=inputs)
    check_sources(recipe)
    if resume:
        check_saved_models(Path(recipe.output))
    dense, origin = load_shape(recipe.model)
    if sparsity_of(dense) is not None:
        raise ConfigError(f"{recipe.model} is already sparse; give the dense model that it came from")
    if checkpoint is None:
        check_model(recipe, dense)
        sparse = sparse_config(dense, recipe.sparsity)
    else:
        sparse, origin = load_shape(checkpoint)
        if sparsity_of(sparse) is None:
            raise ConfigError(f"{checkpoint} is a dense model; `bankwise train` goes on from a sparse checkpoint")
        check_checkpoint(recipe, sparse)
        check_teacher(dense, recipe.stages)
    sparsity = sparsity_of(sparse)
    assert sparsity is not None
    students = {"sparse": sparse}
    if checkpoint is None:
        students |= _others(recipe, dense, sparse, sparsity)
    models = {name: meta_model(config) for name, config in students.items()}
    dense_parameters = parameter_count(meta_model(dense))
    stages = [
        _stage_budget(number, stage, students, models, dense, dense_parameters, processes)
        for number, stage in enumerate(recipe.stages)
    ]
    return RunBudget(
        model=recipe.model,
        origin=origin,
        sparsity=sparsity,
        dense_parameters=dense_parameters,
        predictor_parameters=parameter_count(models["sparse"]) - dense_parameters,
        processes=processes,
        stages=stages,
        disk=_disk(recipe, models, stages, with_untrained=checkpoint is None),
        host_bytes=_FLOAT32 * (dense_parameters + (1 if processes == 1 else 2) * parameter_count(models["sparse"])),
        writes=_writes(recipe, models, with_report=checkpoint is None),
        device_flops=device_tflops * 1e12,
    )


def _others(recipe: Recipe, dense: Any, sparse: Any, sparsity: SparsityConfig) -> dict[str, Any]:
    """Configs of the models that are trained beside the sparse one."""
    others: dict[str, Any] = {}
    if recipe.companion:
        others["companion"] = dense
    for control in recipe.controls:
        if control == DENSE_NARROW:
            others[control] = copy.deepcopy(dense)
            share = sum(_active_shares(sparsity, dense.num_hidden_layers)) / dense.num_hidden_layers
            others[control].intermediate_size = kept_channels(dense.intermediate_size, share, "FFN channels")
        else:
            others[control] = copy.deepcopy(sparse)
            others[control].sparsity = control_sparsity(control, recipe).to_dict()
    return others


def _active_shares(sparsity: SparsityConfig, layers: int) -> list[float]:
    return [
        1.0 if layer in sparsity.dense_layers else sparsity.active_in_layer(layer) / sparsity.bank_size
        for layer in range(layers)
    ]


def _stage_budget(
    number: int,
    stage: Stage,
    students: dict[str, Any],
    models: dict[str, nn.Module],
    dense: Any,
    dense_parameters: int,
    processes: int,
) -> StageBudget:
    """Budget of a stage; its RoPE change stays in the configs, as it stays in the models."""
    try:
        for config in {id(config): config for config in (*students.values(), dense)}.values():
            for name, value in changed_rope(config, stage.rope, stage.seq_len).items():
                setattr(config, name, value)
        accumulation = stage.accumulation(processes)
        trained = trained_parameters(models["sparse"], stage)
    except ConfigError as error:
        raise ConfigError(f"stages.{number}: {error}") from error
    tokens = int(stage.batch_tokens)
    teacher = teacher_flops(dense, stage)
    step_flops = {}
    for name, config in students.items():
        (own,) = control_stages(name, [stage])
        own_sparsity = sparsity_of(config)
        if own.trains == "predictor" and (own_sparsity is None or not own_sparsity.trains_predictor):
            continue  # it has no predictor to train alone
        step_flops[name] = tokens * (token_flops(config, own).total + (0 if name == "companion" else teacher))
    shardings: Sequence[Sharding] = ("none",) if processes == 1 else ("ddp", "fsdp2")
    memory = {
        sharding: step_memory(
            students["sparse"],
            stage,
            parameters=parameter_count(models["sparse"]),
            trained=trained.total,
            teacher_parameters=dense_parameters if stage.has_teacher else 0,
            processes=processes,
            sharding=sharding,
        )
        for sharding in shardings
    }
    return StageBudget(
        stage=stage,
        steps=stage.steps,
        rows=stage.rows,
        tokens=stage.whole_tokens,
        accumulation=accumulation,
        context=int(students["sparse"].max_position_embeddings),
        trained=trained,
        memory=memory,
        flops=token_flops(students["sparse"], stage),
        step_flops=step_flops,
    )


def _disk(
    recipe: Recipe, models: dict[str, nn.Module], stages: list[StageBudget], *, with_untrained: bool
) -> dict[str, int]:
    """Bytes of the weights that are kept, and of the checkpoints from which a stage can resume."""
    sizes = {_folder_of(name): _FLOAT32 * parameter_count(model) for name, model in models.items()}
    if with_untrained:
        sizes["untrained/"] = sizes["checkpoint/"]
    for name, model in models.items():
        own = [budget for budget in stages if name in budget.step_flops]
        for budget in own:
            stage, is_last = budget.stage, budget is own[-1]
            saved = len(_saved_steps(stage, at_end=not is_last or not stage.keep_checkpoints))
            kept = min(saved, stage.keep_checkpoints or saved)
            if kept:
                moments = 2 * _FLOAT32 * trained_parameters(model, stage).total
                place = f"training/{name}/stage-{stages.index(budget)}/"
                sizes[place] = kept * (_FLOAT32 * parameter_count(model) + moments)
    return sizes


def _saved_steps(stage: Stage, *, at_end: bool) -> set[int]:
    """Steps after which the stage leaves a checkpoint; those that the clock asks for are not counted."""
    every = stage.save_steps or (stage.steps if at_end else 0)
    return set(range(every, stage.steps + 1, every)) | {stage.steps} if every else set()


def _writes(recipe: Recipe, models: dict[str, nn.Module], *, with_report: bool) -> list[str]:
    folder = Path(recipe.output)
    files = ["recipe.yaml", "metrics.jsonl", *(_folder_of(name) for name in models)]
    if recipe.stages:
        files += [*(["telemetry.jsonl"] if recipe.telemetry_steps else []), "training/"]
    if not with_report:
        files.append(STARTED_FROM)
    else:
        files += ["upcycle.json", "untrained/", "summary.json", "report.html", "report.md"]
        files += ["report.json", "report.csv"] if recipe.eval.preset else []
    return [f"{folder / name}{'/' if name.endswith('/') else ''}" for name in files]


def _folder_of(name: str) -> str:
    return "checkpoint/" if name == "sparse" else f"{name}/"
