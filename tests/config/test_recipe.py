"""`Recipe` and its parts: token counts, doc strings for `--help`, and contradictions that stop a run at once."""

import ast
import dataclasses
import inspect
import itertools
import sys

import pytest

import bankwise.config
from bankwise.config import CalibrationConfig, DataSource, EvalConfig, Recipe, RopeChange, SparsityConfig, Stage
from bankwise.config.amounts import parse_tokens
from bankwise.errors import ConfigError


def documented_fields(cls) -> set[str]:
    """Fields of a dataclass that have a string literal right under them in the source."""
    tree = ast.parse(inspect.getsource(sys.modules[cls.__module__]))
    body = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == cls.__name__).body
    return {
        field.target.id
        for field, below in itertools.pairwise(body)
        if isinstance(field, ast.AnnAssign)
        and isinstance(below, ast.Expr)
        and isinstance(below.value, ast.Constant)
        and isinstance(below.value.value, str)
        and below.value.value.strip()
    }


def test_every_setting_has_a_doc_string_under_it():
    public = [getattr(bankwise.config, name) for name in bankwise.config.__all__]
    classes = [cls for cls in public if dataclasses.is_dataclass(cls)]
    assert {SparsityConfig, Recipe, Stage, DataSource, CalibrationConfig, EvalConfig} <= set(classes)
    for cls in classes:
        assert cls.__doc__
        missing = {f.name for f in dataclasses.fields(cls)} - documented_fields(cls)
        assert not missing, f"{cls.__name__}: no doc string under {sorted(missing)}"


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        (0, 0),
        (100_000, 100_000),
        ("100000", 100_000),
        ("100k", 100_000),
        ("2M", 2_000_000),
        ("1.5B", 1_500_000_000),
        ("0.5k", 500),
        (" 3 k ", 3_000),
    ],
)
def test_token_counts_are_read(text, tokens):
    assert parse_tokens(text) == tokens
    assert isinstance(parse_tokens(text), int)


@pytest.mark.parametrize(
    "text", ["", "k", "many", "2m", "1T", "-5", -5, "1e6", "1,000", "2M tokens", "nan", True, None]
)
def test_anything_else_is_no_token_count(text):
    with pytest.raises(
        ConfigError, match=r"is not a token count; write for example 100000, 100k, 2M or 1\.5B"
    ) as caught:
        parse_tokens(text)
    assert repr(text) in str(caught.value)


def test_suffixes_are_understood_wherever_a_recipe_counts_tokens():
    stage = Stage(tokens="10k", batch_tokens="4k", seq_len=500, micro_batch=2)
    assert (stage.tokens, stage.batch_tokens) == (10_000, 4_000)
    assert CalibrationConfig(tokens="2k").tokens == 2_000


def test_a_stage_counts_whole_steps_and_accumulated_passes():
    stage = Stage(tokens=10_001, batch_tokens=4_000, seq_len=500, micro_batch=2)
    assert stage.steps == 3
    assert stage.accumulation() == 4
    assert stage.accumulation(processes=2) == 2
    with pytest.raises(ConfigError, match=r"4000 cannot be shared by 3 processes.*multiple of 3000"):
        stage.accumulation(processes=3)
    assert Stage(tokens=8_000, batch_tokens=4_000, seq_len=500, micro_batch=2).steps == 2


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: DataSource(path="a.txt", weight=0), ["weight=0", "'a.txt'", "leave the source out"]),
        (lambda: CalibrationConfig(seq_len=1), ["seq_len=1", "at least 2"]),
        (lambda: CalibrationConfig(refine_epochs=-1), ["refine_epochs=-1", "0 switches it off"]),
        (lambda: Stage(seq_len=1), ["seq_len=1", "at least 2"]),
        (lambda: Stage(micro_batch=0), ["micro_batch=0", "at least 1"]),
        (lambda: Stage(batch_tokens=3000), ["batch_tokens=3000", "1024", "use 3072"]),
        (lambda: Stage(aux_token_fraction=0), ["aux_token_fraction=0", "(0, 1]"]),
        (lambda: Stage(aux_token_fraction=1.5), ["aux_token_fraction=1.5", "(0, 1]"]),
        (lambda: Stage(kd_weight=-1), ["kd_weight=-1", "0 switches it off"]),
        (lambda: Stage(predictor_lr=-1), ["predictor_lr=-1", "0 switches it off"]),
        (lambda: Stage(ce_weight=0), ["ce_weight", "kd_weight", "set one of them"]),
        (lambda: Stage(tokens=0), ["tokens=0", "at least 1"]),
        (lambda: Stage(batch_tokens=0), ["batch_tokens=0", "at least 1"]),
        (lambda: Stage(loss_chunk=0), ["loss_chunk=0", "at least 1"]),
        (lambda: Stage(lr=float("nan")), ["lr=nan", "not negative"]),
        (lambda: Stage(aux_weight_end=-1), ["aux_weight_end=-1", "not negative"]),
        (lambda: Stage(weight_decay=-1), ["weight_decay=-1", "not negative"]),
        (lambda: Stage(max_grad_norm=-1), ["max_grad_norm=-1", "not negative"]),
        (lambda: Stage(k_schedule="linear", k_start=-5), ["k_start=-5", "whole bank"]),
        (lambda: RopeChange(theta=1e6), ["rope.theta=1e+06", "kind is 'keep'"]),
        (lambda: RopeChange(kind="theta", theta=1e6, factor=2), ["rope.factor=2", "kind is 'theta'"]),
        (
            lambda: Recipe(
                model="m",
                data=[DataSource(path="a.jsonl")],
                stages=[Stage(data=[DataSource(path="a.jsonl", max_documents=8)])],
            ),
            ["stages.0.data", "max_documents=8", "held-out"],
        ),
        (lambda: Recipe(model="m", stages=[Stage(name="1"), Stage()]), ["stages are called 1, 1", "rename one"]),
        (lambda: Stage(log_steps=0), ["log_steps=0", "at least 1"]),
        (lambda: EvalConfig(windows=0), ["windows >= 1", "0"]),
        (lambda: Recipe(model="m", data=[]), ["data is empty", "package:pydoc"]),
        (lambda: Recipe(model="m", telemetry_steps=-1), ["telemetry_steps=-1", "0 switches"]),
        (lambda: Recipe(model="m", held_out_fraction=1), ["held_out_fraction=1", "(0, 1)"]),
        (
            lambda: Recipe(model="m", companion=False, stages=[Stage(teacher="companion", kd_weight=1)]),
            ["teacher='companion'", "companion: true"],
        ),
    ],
)
def test_a_recipe_that_cannot_work_says_why(make, words):
    with pytest.raises(ConfigError) as caught:
        make()
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, f"{missing} not in {caught.value}"


def test_recipes_do_not_share_their_defaults():
    one, other = Recipe(model="m"), Recipe(model="m")
    one.stages.append(Stage())
    one.sparsity.dense_layers.append(3)
    assert len(other.stages) == 1
    assert other.sparsity.dense_layers == []
