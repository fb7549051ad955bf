"""The main job from one recipe: upcycle -> train -> eval -> report.

Everything that a step hands to the next one is a file in the run's folder, so an interrupted run resumes at the step
where it stopped.

Under a launch of several processes (`bankwise.processes`) every function here is called by all of them: the main one
converts, measures and writes, all train.
"""

import functools
import gc
import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bankwise.config import Recipe, Stage, dump_recipe, load_recipe
from bankwise.data import (
    TokenizedDocuments,
    TrainingRows,
    held_out_windows,
    mixed_windows,
    probe_windows,
    training_rows,
)
from bankwise.errors import ConfigError, TrainingError
from bankwise.evaluation.perplexity import active_fraction, perplexity_and_recall
from bankwise.evaluation_report import report_models, run_models
from bankwise.ffn.allocator import keep_freed_memory
from bankwise.files import remove_leftovers, write_json, write_text
from bankwise.inference import generate_text
from bankwise.manifest import identity
from bankwise.models.checkpoint import load_checkpoint, save_checkpoint
from bankwise.models.cost import token_cost
from bankwise.models.modeling import use_chunked_loss
from bankwise.processes import (
    from_main,
    is_main,
    join_processes,
    main_first,
    on_own_device,
    own_device,
    wait_for_all,
)
from bankwise.provenance import environment
from bankwise.report import write_report
from bankwise.run_checks import (
    STARTED_FROM,
    check_checkpoint,
    check_folder,
    check_model,
    check_processes,
    check_run,
    check_saved_models,
    check_sources,
    check_start,
    check_train,
    evaluation_plan,
)
from bankwise.training import COMPANION, train_stages, trained_tokens
from bankwise.training.checkpointing import write_failure
from bankwise.training.controls import DENSE_NARROW, control_model, control_stages
from bankwise.training.rope import change_rope, check_teacher
from bankwise.training.stages import clear_finished
from bankwise.training.telemetry import TelemetryPlan, probe_size
from bankwise.upcycle import convert, load_dense
from bankwise.upcycle.loading import LoadedDense, load_shape


@dataclass
class RunResult:
    """Where a run's files are, and its final table."""

    folder: Path
    summary: dict[str, Any]

    @property
    def checkpoint(self) -> Path:
        """The sparse model: trained, or as converted where the recipe has no stage."""
        return self.folder / "checkpoint"

    @property
    def report(self) -> Path:
        return self.folder / "report.html"


@dataclass
class RunData:
    """Text of a run: windows for calibration and measurement, and training rows."""

    calibration: Tensor | None
    held_out: dict[str, Tensor]
    rows: Callable[[int], TrainingRows]
    """Training rows of a stage, by its number."""


def run(
    recipe: Recipe | str | Path | dict[str, Any],
    overrides: Sequence[str] = (),
    *,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
) -> RunResult:
    """Upcycle, train, measure and report as the recipe says; results go to `recipe.output`.

    `overrides` are `key=value` with dotted keys (`stages.0.tokens=100k`). A folder that holds a run is refused unless
    `resume` continues it or `overwrite` deletes it.
    """
    if isinstance(recipe, Recipe):
        if overrides:
            raise ConfigError("overrides go with a recipe file or dict; set the fields of the Recipe object instead")
    else:
        recipe = load_recipe(recipe, overrides)
    check_run(recipe)
    check_processes(recipe)
    check_sources(recipe)
    folder = Path(recipe.output)
    plan = evaluation_plan(recipe)
    check_folder(folder, recipe, resume=resume, overwrite=overwrite)
    wait_for_all()  # before the main process writes to the folder that the others look at
    if resume:
        check_saved_models(folder)
    keep_freed_memory()
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    quiet = quiet or not is_main()
    say = _Speaker(quiet)
    summary = _upcycle_and_train(recipe, folder, say, resume=resume, overwrite=overwrite, quiet=quiet)
    if is_main():
        with _told_where_full(folder / "summary.json"):
            write_json(folder / "summary.json", summary)
        if plan is None:
            write_report(folder)
        else:
            report_models(run_models(folder), plan, folder, say=say)
    return RunResult(folder, summary)


def _upcycle_and_train(
    recipe: Recipe, folder: Path, say: "_Speaker", *, resume: bool, overwrite: bool, quiet: bool
) -> dict[str, Any]:
    """Convert, train and measure. Every model goes to disk; beside the dense one and the teacher, memory holds one."""
    started = time.time()
    say(f"loading {recipe.model}")
    with main_first():
        check_model(recipe, load_shape(recipe.model)[0])  # what it refuses, before weights are in memory
        dense = load_dense(recipe.model)
    assert dense.tokenizer is not None
    job = _Job(
        recipe=recipe, data=load_data(recipe, dense.tokenizer, progress=not quiet), folder=folder,
        tokenizer=dense.tokenizer, resume=resume, quiet=quiet,
    )  # fmt: skip
    prepare_folder(folder, recipe, resume=resume, overwrite=overwrite)
    summary: dict[str, Any] = {}

    conversion = _converted(recipe, dense, job.data, folder, say, quiet)
    summary["calibration"] = json.loads((folder / "upcycle.json").read_text(encoding="utf-8"))
    say("measuring the dense model and the untrained conversion")
    summary["dense"] = measure(recipe, dense.model, job.data, tokens=0)
    summary["untrained"] = measure(recipe, conversion, job.data, tokens=0)
    continuations = {"prompt": recipe.eval.prompt, "dense": job.continuation(dense.model)}
    fraction = summary["untrained"]["active_fraction"]
    if not recipe.stages:
        if is_main():
            with _told_where_full(folder / "checkpoint"):
                save_checkpoint(conversion, dense.tokenizer, folder / "checkpoint")
        summary["sparse"] = summary["untrained"]
        continuations["sparse"] = job.continuation(conversion)
    del conversion
    _free_memory()

    if recipe.stages:
        companion = None
        if recipe.companion:
            companion = load_dense(recipe.model, tokenizer=False).model
            summary[COMPANION] = job.row(COMPANION, companion)
        teacher = _teacher(recipe, dense.model, companion)
        del companion
        _free_memory()
        sparse, _ = load_checkpoint(folder / "untrained", dtype=torch.float32)
        summary["sparse"] = job.row("sparse", sparse, teacher)
        continuations["sparse"] = job.continuation(sparse)
        del sparse
        _free_memory()
        for name in recipe.controls:
            control = control_model(name, recipe, dense.model, folder / "untrained", job.data.calibration, fraction)
            summary[name] = job.row(name, control, teacher)
            if name == DENSE_NARROW:
                summary[name] |= {"active_fraction": fraction, "ffn_bytes_fraction": fraction}
            del control
            _free_memory()

    if recipe.eval.prompt:
        summary["continuations"] = continuations
    if COMPANION in summary:
        gap = summary["untrained"]["loss"] - summary[COMPANION]["loss"]
        summary["closed"] = (summary["untrained"]["loss"] - summary["sparse"]["loss"]) / gap if gap else None
    summary["provenance"] = provenance(recipe, dense, time.time() - started)
    return summary


def train(
    recipe: Recipe,
    checkpoint: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    quiet: bool = False,
) -> Path:
    """Train a sparse checkpoint on the recipe's stages; returns the folder, with the result under checkpoint/.

    The recipe's model is loaded only as a teacher (`kd_weight` or `state_weight`, and `teacher: dense`).
    """
    check_train(recipe)
    check_processes(recipe)
    check_sources(recipe)
    folder = Path(recipe.output)
    check_folder(folder, recipe, resume=resume, overwrite=overwrite, inputs=[checkpoint])
    wait_for_all()
    if resume:
        check_saved_models(folder)
        check_start(folder, checkpoint)
    quiet = quiet or not is_main()
    keep_freed_memory()
    if recipe.threads:
        torch.set_num_threads(recipe.threads)
    model, tokenizer = load_checkpoint(checkpoint, dtype=torch.float32)
    check_checkpoint(recipe, model.config)
    has_teacher = any(stage.has_teacher for stage in recipe.stages)
    with main_first():
        teacher = load_dense(recipe.model, tokenizer=False).model if has_teacher else None
    if teacher is not None:
        check_teacher(teacher.config, recipe.stages)
    data = load_data(recipe, tokenizer, progress=not quiet)
    prepare_folder(folder, recipe, resume=resume, overwrite=overwrite)
    if is_main():
        start = Path(checkpoint).expanduser().resolve()
        write_json(folder / STARTED_FROM, {"checkpoint": str(start), "identity": identity(start)})
    train_model(recipe, model, data, folder, "sparse", tokenizer, teacher=teacher, resume=resume, quiet=quiet)
    return folder


def prepare_folder(folder: Path, recipe: Recipe, *, resume: bool, overwrite: bool) -> None:
    """Create the run's folder with its resolved recipe, or keep the one that is continued."""
    if is_main():
        _write_folder(folder, recipe, resume=resume, overwrite=overwrite)
    wait_for_all()


def _write_folder(folder: Path, recipe: Recipe, *, resume: bool, overwrite: bool) -> None:
    try:
        if overwrite and folder.exists() and not resume:
            shutil.rmtree(folder.resolve())  # what a link leads to
        folder.resolve().mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{folder} cannot be created or replaced ({error.strerror}); choose another output=..."
        ) from error
    remove_leftovers(folder)
    write_text(folder / "recipe.yaml", dump_recipe(recipe))
    (folder / "metrics.jsonl").touch()


def load_data(recipe: Recipe, tokenizer: PreTrainedTokenizerBase, *, progress: bool = False) -> RunData:
    """Calibration windows and the rows of every stage, both from the training split, and held-out windows.

    A source that cannot be read, or a stage that finds no text in it, stops the run here, before it trains. The main
    process reads the texts; the others are given the windows, and read rows from the cache of tokens.
    """
    held_out = from_main(
        lambda: held_out_windows(
            recipe.data,
            tokenizer,
            seq_len=recipe.eval.seq_len,
            num_windows=recipe.eval.windows,
            held_out_fraction=recipe.held_out_fraction,
            seed=recipe.seed,
        )
    )

    known: dict[str, TokenizedDocuments] = {}

    @functools.cache  # every model of the run trains on the same rows
    def rows(number: int) -> TrainingRows:
        stage = recipe.stages[number]
        return training_rows(
            stage.data or recipe.data,
            tokenizer,
            seq_len=stage.seq_len,
            num_rows=stage.rows,
            packing=stage.packing,
            held_out_fraction=recipe.held_out_fraction,
            seed=recipe.seed + number,
            progress=progress,
            known=known,
        )

    settings = recipe.calibration
    calibration = None
    if settings.windows:
        calibration = from_main(
            lambda: mixed_windows(
                recipe.data,
                tokenizer,
                seq_len=settings.seq_len,
                num_windows=settings.windows,
                split="train",
                held_out_fraction=recipe.held_out_fraction,
                seed=settings.seed,
            )
        )
    for number in range(len(recipe.stages)):
        rows(number)
    return RunData(calibration, held_out, rows)


def measure(recipe: Recipe, model: PreTrainedModel, data: RunData, *, tokens: int) -> dict[str, Any]:
    """One row of the final table."""

    def measured() -> dict[str, Any]:
        with on_own_device(model):
            result, recall = perplexity_and_recall(
                model, data.held_out, batch_size=recipe.eval.batch_size, bf16=recipe.eval.bf16
            )
            active = active_fraction(model, next(iter(data.held_out.values()))[:1])
        cost = token_cost(model.config, dtype_bytes=model.dtype.itemsize, active_fraction=active)
        return result.to_dict() | {
            "tokens": tokens,
            "active_fraction": active,
            "ffn_bytes_fraction": cost.ffn_bytes_fraction,
            "recall": recall,
        }

    return from_main(measured)


def train_model(
    recipe: Recipe,
    model: PreTrainedModel,
    data: RunData,
    folder: Path,
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    teacher: PreTrainedModel | None = None,
    resume: bool = False,
    quiet: bool = False,
) -> int:
    """Train `model` in place on the recipe's stages, save it, and return the tokens it has seen.

    `name` is `sparse` (saved as checkpoint/), `companion` or a control's. With `resume`, a finished training is loaded
    instead, and an unfinished one goes on from its last checkpoint.
    """
    target = folder / ("checkpoint" if name == "sparse" else name)
    stages = control_stages(name, recipe.stages)
    is_dense = name in (COMPANION, DENSE_NARROW)
    work = folder / "training" / name
    if resume and (target / "config.json").is_file():
        finished = load_dense(target, tokenizer=False).model if is_dense else load_checkpoint(target)[0]
        model.load_state_dict(finished.state_dict())
        for stage in stages:
            change_rope(model, stage.rope, stage.seq_len)
        if is_main():  # a kill may have come right after the model was in place
            clear_finished(model, stages, work)
        return trained_tokens(model, stages)
    if is_dense:
        use_chunked_loss(model)
    tokens = train_stages(
        model,
        stages,
        data.rows,
        work,
        name=name,
        teacher=teacher,
        telemetry=(lambda stage: _telemetry(recipe, stage, data, folder)) if recipe.telemetry_steps else None,
        resume=resume,
        seed=recipe.seed,
        metrics_file=folder / "metrics.jsonl",
        arguments={
            "report_to": recipe.report_to,
            **recipe.trainer,
            "run_name": f"{recipe.trainer.get('run_name') or folder.resolve().name}/{name}",
        },
        quiet=quiet,
    )
    if is_main():
        with _told_where_full(target):
            save_checkpoint(model, tokenizer, target)
        clear_finished(model, stages, work)
    wait_for_all()
    return tokens


@contextmanager
def _told_where_full(target: Path) -> Iterator[None]:
    """What could not be written inside, and what to do, as a `TrainingError`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise TrainingError(
            f"{target} could not be written ({write_failure(error) or error}); free some space there and go on with "
            "--resume (resume=True), which trains nothing again"
        ) from error


def _telemetry(recipe: Recipe, stage: Stage, data: RunData, folder: Path) -> TelemetryPlan:
    count = probe_size(stage, recipe.telemetry_steps, join_processes())
    return TelemetryPlan(
        windows_WS=probe_windows(data.held_out, seq_len=stage.seq_len, num_windows=count),
        every=recipe.telemetry_steps,
        file=folder / "telemetry.jsonl",
    )


def _teacher(recipe: Recipe, dense: PreTrainedModel, companion: PreTrainedModel | None) -> PreTrainedModel | None:
    kinds = {stage.teacher for stage in recipe.stages if stage.has_teacher}
    if not kinds:
        return None
    return companion if kinds == {"companion"} else dense


def provenance(recipe: Recipe, dense: LoadedDense, seconds: float) -> dict[str, Any]:
    """What another person needs to get the same numbers."""
    return {
        "model": recipe.model,
        "model_name": dense.name,
        "model_sha256": dense.revision,
        "seed": recipe.seed,
        **environment(seconds),
    }


def _converted(
    recipe: Recipe, dense: LoadedDense, data: RunData, folder: Path, say: "_Speaker", quiet: bool
) -> PreTrainedModel:
    target = folder / "untrained"
    if from_main(lambda: (target / "config.json").is_file() and (folder / "upcycle.json").is_file()):
        say(f"conversion found in {target}")
        return load_checkpoint(target, dtype=torch.float32)[0]
    if not is_main():
        wait_for_all()
        return load_checkpoint(target, dtype=torch.float32)[0]
    say(f"upcycling {dense.name} ({recipe.calibration.tokens} calibration tokens)")
    conversion = convert(
        dense.model, recipe.sparsity, data.calibration, recipe.calibration, device=own_device(), progress=not quiet
    )
    converted: Any = conversion.model
    converted.cpu()
    say(conversion_line(conversion.report))
    with _told_where_full(target):
        save_checkpoint(conversion.model, dense.tokenizer, target)
        write_json(folder / "upcycle.json", conversion.report)
    wait_for_all()
    return conversion.model


def conversion_line(report: dict[str, Any]) -> str:
    """What `convert` measured, for the terminal."""
    if "before" not in report:
        return f"converted from the weights alone in {report['seconds']:.0f} s"
    lines = [
        f"converted in {report['seconds']:.0f} s; on {len(report['layers'])} layers and windows that were not fitted:"
    ]
    lines += [f"  {name:36} {value:.3f} -> {report['after'][name]:.3f}" for name, value in report["before"].items()]
    lines.append("  (dense, original order, closed form -> converted, bank layout, refined)")
    return "\n".join(lines)


def _free_memory() -> None:
    """Take back what a dropped model held: a trainer and its callbacks, or a model and its forward, name each other."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@dataclass(kw_only=True)
class _Job:
    """What the trainings of a run share."""

    recipe: Recipe
    data: RunData
    folder: Path
    tokenizer: PreTrainedTokenizerBase
    resume: bool
    quiet: bool

    def row(self, name: str, model: PreTrainedModel, teacher: PreTrainedModel | None = None) -> dict[str, Any]:
        """Train and measure `model`: its row of the final table."""
        tokens = train_model(
            self.recipe, model, self.data, self.folder, name, self.tokenizer,
            teacher=teacher, resume=self.resume, quiet=self.quiet,
        )  # fmt: skip
        _free_memory()  # what the trainer held
        return measure(self.recipe, model, self.data, tokens=tokens)

    def continuation(self, model: PreTrainedModel) -> str:
        """Of the recipe's prompt, greedy; empty where it has none."""
        if not self.recipe.eval.prompt:
            return ""
        prompt, new_tokens = self.recipe.eval.prompt, self.recipe.eval.new_tokens

        def generated() -> str:
            with on_own_device(model):
                return generate_text(model.eval(), self.tokenizer, prompt, max_new_tokens=new_tokens)

        return from_main(generated)


class _Speaker:
    def __init__(self, quiet: bool) -> None:
        self.quiet = quiet

    def __call__(self, text: str) -> None:
        if not self.quiet:
            print(text, flush=True)
