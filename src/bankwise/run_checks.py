"""What a run refuses before work starts: recipes that could not be gone through with, and folders that may not be used.

The dry run asks the same questions, so it refuses what the run would refuse.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from bankwise.config import DataSource, EvaluationPlan, Recipe, load_plan, load_recipe
from bankwise.errors import ConfigError, DataError
from bankwise.evaluation.evaluator import check_models
from bankwise.evaluation_report import plan_values
from bankwise.manifest import MANIFEST, damage, identity
from bankwise.models.cost import sparsity_of
from bankwise.processes import from_main, join_processes, use_device
from bankwise.training.controls import check_controls
from bankwise.training.optimizer import check_layers, check_predictors_learn
from bankwise.training.rope import check_rope, check_teacher
from bankwise.training.sharding import check_launch
from bankwise.training.trackers import check_trackers
from bankwise.training.trainer import check_arguments

STARTED_FROM = "started_from.json"
"""Names the checkpoint that `train` goes on from."""


def check_run(recipe: Recipe) -> None:
    """Refuse a recipe that `run` could not go through with, whatever the model."""
    check_controls(recipe)
    _check_trainer(recipe)


def check_train(recipe: Recipe) -> None:
    """Refuse a recipe that `train` could not go through with, whatever the checkpoint."""
    if not recipe.stages:
        raise ConfigError("the recipe has no stages, so there is nothing to train")
    if any(stage.has_teacher and stage.teacher == "companion" for stage in recipe.stages):
        raise ConfigError("teacher='companion' needs a companion: use `bankwise run`, or teacher='dense'")
    _check_trainer(recipe)


def check_sources(recipe: Recipe) -> None:
    """Raise `DataError` where a local file or folder of text is missing; packages and hub datasets are not asked."""
    for source in _sources(recipe):
        is_local = not source.path.startswith(("package:", "hf:", "synthetic:"))
        if is_local and not Path(source.path).expanduser().exists():
            raise DataError(f"{source.path} does not exist; give a file or a folder of text")


def _sources(recipe: Recipe) -> list[DataSource]:
    """The sources of the recipe and of its stages."""
    return [*recipe.data, *(source for stage in recipe.stages for source in stage.data or [])]


def _check_trainer(recipe: Recipe) -> None:
    check_trackers(recipe.trainer.get("report_to", recipe.report_to))
    for stage in recipe.stages[:1]:  # the names are those of every stage
        check_arguments(recipe.trainer, stage)


def evaluation_plan(recipe: Recipe) -> EvaluationPlan | None:
    """The evaluation at the end of the run, refused where the dense model could not go through it."""
    if not recipe.eval.preset:
        return None
    plan = load_plan(recipe.eval.preset, plan_values(recipe))
    check_models({"dense": recipe.model}, plan)
    return plan


def check_processes(recipe: Recipe) -> None:
    """Join the processes of this launch; refuse a launch, or a stage for it, that would not do what the recipe says."""
    check_launch()
    use_device(recipe.device)
    processes = join_processes()
    for stage in recipe.stages:
        stage.accumulation(processes)


def check_folder(
    folder: Path, recipe: Recipe, *, resume: bool, overwrite: bool, inputs: Sequence[str | Path] = ()
) -> None:
    """Refuse a folder that may not be written to. Changes nothing, so it stands before everything that may fail.

    `inputs` are further paths, beside those in the recipe, that the run reads and must not delete.
    """
    saved = folder / "recipe.yaml"
    if resume and overwrite:
        raise ConfigError("resume and overwrite exclude each other; choose one")
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"{folder} is a file; choose a folder with output=...")
    # A kill before the first file was in place leaves a hidden part of it.
    if folder.exists() and any(not path.name.endswith(".partial") for path in folder.iterdir()):
        if overwrite:
            if not saved.is_file():
                raise ConfigError(f"{folder} is not the folder of a run (no recipe.yaml), so it is not deleted")
            texts = (source.path.removeprefix("hf:") for source in _sources(recipe))
            for path in (Path.cwd(), recipe.model, *texts, *inputs):
                if Path(path).expanduser().resolve().is_relative_to(folder.resolve()):
                    raise ConfigError(
                        f"overwrite would delete {path}, which this run needs; choose another folder with output=..."
                    )
        elif not resume:
            raise ConfigError(
                f"{folder} already holds files; continue that run with --resume, replace it with --overwrite, "
                "or choose another folder with output=..."
            )
        elif not saved.is_file() or not _continues(recipe, load_recipe(saved)):
            raise ConfigError(
                f"{folder} was started with another recipe, so it cannot be resumed with this one; "
                f"use the recipe in {saved} (only its controls may grow), or choose another folder with output=..."
            )


def check_start(folder: Path, checkpoint: str | Path) -> None:
    """Refuse to go on with a training of `train` that began from another checkpoint than this one."""

    def another() -> str | None:
        if not (folder / STARTED_FROM).is_file():
            return None
        start = json.loads((folder / STARTED_FROM).read_text(encoding="utf-8"))
        return None if start["identity"] == identity(Path(checkpoint).expanduser()) else str(start["checkpoint"])

    if start := from_main(another):
        raise ConfigError(
            f"the training in {folder} began from {start}, and {checkpoint} is another checkpoint; resume it with "
            "that one, or choose another folder with output=..."
        )


def check_saved_models(folder: Path) -> None:
    """Refuse to go on from a model that a run saved in `folder` and whose files have changed since."""

    def first_damaged() -> str | None:
        for model in sorted(path for path in folder.glob("[!.]*") if (path / MANIFEST).is_file()):
            if reason := damage(model):
                return f"{model} is damaged ({reason})"
        return None

    if damaged := from_main(first_damaged):
        raise ConfigError(
            f"{damaged}; delete that folder and it is made again, or delete its {MANIFEST} to go on with it as it is"
        )


def _continues(recipe: Recipe, saved: Recipe) -> bool:
    """Whether `recipe` is the saved one, with more controls or without."""
    return set(saved.controls) <= set(recipe.controls) and replace(saved, controls=recipe.controls) == recipe


def check_model(recipe: Recipe, config: Any) -> None:
    """Refuse a recipe that does not fit the shape of the dense model."""
    recipe.sparsity.validate_for(
        ffn_size=config.intermediate_size, num_layers=config.num_hidden_layers, hidden_act=config.hidden_act
    )
    context = getattr(config, "max_position_embeddings", None)
    if context is not None and recipe.eval.seq_len > context:
        raise ConfigError(
            f"eval.seq_len={recipe.eval.seq_len} is longer than the model's context of {context}; use {context} or less"
        )
    check_rope(config, recipe.stages)
    check_teacher(config, recipe.stages)
    check_layers(recipe.stages, config.num_hidden_layers)


def check_checkpoint(recipe: Recipe, config: Any) -> None:
    """Refuse stages that do not fit the sparse checkpoint that `train` goes on from."""
    check_rope(config, recipe.stages)
    check_layers(recipe.stages, config.num_hidden_layers)
    sparsity = sparsity_of(config)
    if sparsity is not None:
        check_predictors_learn("sparse", sparsity, recipe.stages)
