"""Evaluation plans: the presets `ci`, `smoke` and `full`, YAML files, and dotted overrides."""

import copy
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import yaml

from bankwise.config.evaluation import SUITES, EvaluationPlan
from bankwise.config.settings import build, fields_help, override_values, read_yaml
from bankwise.errors import ConfigError

Preset = Literal["ci", "smoke", "full"]
PRESETS: tuple[str, ...] = get_args(Preset)

_BENCHMARKS = [
    "piqa", "socialiqa", "hellaswag", "winogrande", "copa", "arc_easy", "arc_challenge", "openbookqa", "sciq", "csqa",
    "boolq", "lambada", "squad_bpb", "mmlu", "gsm8k_bpb", "minerva_math_500_bpb", "humaneval_bpb", "mbpp_bpb",
]  # fmt: skip
_VALUES: dict[str, dict[str, Any]] = {
    # Every section once, in less than a minute on a small model.
    "ci": {
        "suites": list(SUITES),
        "perplexity": {"windows": 2, "seq_len": 256},
        "benchmarks": {"tasks": ["piqa", "arc_easy", "lambada", "humaneval_bpb"], "limit": 2},
        "ruler": {"tasks": ["vt", "fwe", "niah_single_1"], "lengths": [1024], "samples": 2},
        "cwe": {"lengths": [], "lite": ["lite-20-3"], "samples": 2},
        "routing": {"windows": 1},
        "bf16": True,
    },
    # Minutes on two cores with a model of 135M parameters.
    "smoke": {
        "suites": list(SUITES),
        "perplexity": {"windows": 32, "seq_len": 512},
        "benchmarks": {"tasks": ["piqa", "arc_easy", "lambada", "humaneval_bpb"], "limit": 100},
        "ruler": {"tasks": ["cwe", "vt", "fwe", "niah_single_1"], "lengths": [1024, 2048], "samples": 4},
        "cwe": {"lengths": [1024, 2048], "samples": 4},
        "routing": {"windows": 4},
        "bf16": True,
    },
    # GPU hours: whole sets, and RULER with 500 rows of every task that needs no data file, from 4K to 32K.
    "full": {
        "suites": list(SUITES),
        "perplexity": {"windows": 128, "seq_len": 4096},
        "benchmarks": {"tasks": _BENCHMARKS},
        "ruler": {
            "tasks": ["niah_single_1", "niah_multikey_2", "niah_multikey_3", "vt", "cwe", "fwe"],
            "lengths": [4096, 8192, 16384, 32768],
            "samples": 500,
            "permutation": ["upstream", "per_sample"],
        },
        "cwe": {"lengths": [4096, 8192, 16384, 32768], "samples": 500, "permutation": ["upstream", "per_sample"]},
        "routing": {"windows": 32},
        "batch_tokens": 65536,
    },
}


def load_plan(source: str | Path | dict[str, Any] | None = None, overrides: Sequence[str] = ()) -> EvaluationPlan:
    """Plan of a preset, a YAML file or a dict (None: the defaults), with overrides such as `ruler.samples=25`.

    A file or dict may start from a preset: `preset: smoke`. Raises `ConfigError`.
    """
    if source is None:
        values: dict[str, Any] = {}
    elif isinstance(source, dict):
        values = copy.deepcopy(source)
    elif str(source) in PRESETS:
        values = {"preset": str(source)}
    elif Path(source).suffix in (".yaml", ".yml"):
        values = read_yaml(Path(source), "evaluation plan")
    else:
        raise ConfigError(f"preset {str(source)!r} is not known; use {', '.join(PRESETS)}, or a YAML file of a plan")
    preset = values.pop("preset", None)
    if preset is not None:
        if preset not in PRESETS:
            raise ConfigError(f"preset={preset!r} is not known; use one of {', '.join(PRESETS)}")
        base = copy.deepcopy(_VALUES[preset])
        for section, own in values.items():
            base[section] = base.get(section, {}) | own if isinstance(own, dict) else own
        values = base
    override_values(values, overrides)
    return build(EvaluationPlan, values, "plan")


def dump_plan(plan: EvaluationPlan) -> str:
    """The resolved plan as YAML; `load_plan` reads it back to an equal one."""
    return yaml.safe_dump(dataclasses.asdict(plan), sort_keys=False, width=120)


def plan_help() -> str:
    """The fields of a plan with their doc strings, for the command line's help."""
    return fields_help(EvaluationPlan, "plan")
