"""Evaluations that leave a report in a folder: of all models of a run, or of models named one by one."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from bankwise.bench.checkpoints import TIMED, checkpoint_speeds
from bankwise.config import EvaluationPlan, Recipe, load_recipe
from bankwise.errors import ConfigError
from bankwise.evaluation.evaluator import evaluate_models
from bankwise.files import write_json
from bankwise.report import write_report

_RUN_FOLDERS = {
    "companion": "companion",
    "dense_narrow": "dense_narrow",
    "untrained": "untrained",
    "sparse": "checkpoint",
    "repaired": "repaired",
}
"""Column -> folder of a run that holds its model."""


def is_run_folder(folder: str | Path) -> bool:
    """Whether `folder` is the output of `bankwise run`."""
    return (Path(folder) / "recipe.yaml").is_file()


def run_models(folder: Path) -> dict[str, str | Path]:
    """The models of a run by column: the recipe's dense model, and those whose folders are there."""
    found: dict[str, str | Path] = {"dense": load_recipe(folder / "recipe.yaml").model}
    for column, name in _RUN_FOLDERS.items():
        if (folder / name / "config.json").is_file():
            found[column] = folder / name
    return found


def plan_values(recipe: Recipe) -> list[str]:
    """Overrides that make a plan read the held-out text of a recipe (sources, split, seed) on the recipe's device."""
    sources = [
        {"path": source.path, "weight": source.weight, "text_field": source.text_field} for source in recipe.data
    ]
    return [
        f"perplexity.data={json.dumps(sources)}",
        f"perplexity.held_out_fraction={recipe.held_out_fraction}",
        f"seed={recipe.seed}",
        f"device={recipe.device}",
    ]


def report_models(
    models: Mapping[str, str | Path],
    plan: EvaluationPlan,
    output: Path,
    *,
    baselines: Sequence[str] = (),
    speed: bool = False,
    say: Callable[[str], None] = print,
    progress: bool = False,
) -> dict[str, Any]:
    """Evaluate `models`, write `report.json`, `.html`, `.md` and `.csv` into `output`, and return the report.

    `output` is a run's folder, an earlier evaluation's, or a new one; anything else is refused. `speed` also times the
    models beside the dense one.
    """
    if speed and not ("dense" in models and set(TIMED) & set(models)):
        raise ConfigError(f"speed is timed beside the dense model; name the column dense and one of {', '.join(TIMED)}")
    if output.exists() and (not output.is_dir() or (any(output.iterdir()) and not _is_ours(output))):
        raise ConfigError(f"{output} holds other files; choose a new folder, that of a run, or an earlier evaluation's")
    about = _trained_tokens(output / "summary.json")
    report = evaluate_models(models, plan, baselines=baselines, about=about, say=say, progress=progress)
    if speed:
        say("speed, in bfloat16, each model beside dense")
        for name, row in checkpoint_speeds(models).items():
            report["details"][name]["speed"] = row
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"{output} cannot be created ({error.strerror}); choose another folder") from error
    write_json(output / "report.json", report)
    write_report(output)
    return report


def _is_ours(folder: Path) -> bool:
    return is_run_folder(folder) or (folder / "report.json").is_file()


def _trained_tokens(summary: Path) -> dict[str, dict[str, Any]]:
    if not summary.is_file():
        return {}
    values = json.loads(summary.read_text(encoding="utf-8"))
    return {
        name: {"tokens": row["tokens"]} for name, row in values.items() if isinstance(row, dict) and "tokens" in row
    }
