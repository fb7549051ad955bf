"""Controls: what each one changes, what stays frozen in it, which stages it goes through, and what is refused."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from training.tiny_run import TokenWindows, weights
from transformers import AutoModelForCausalLM

from bankwise.config import Recipe, SparsityConfig, Stage
from bankwise.errors import ConfigError
from bankwise.evaluation.routing import routing_statistics
from bankwise.ffn import sparse_layers
from bankwise.models.checkpoint import save_checkpoint
from bankwise.repair.changes import check_sparse
from bankwise.training import parameter_groups, select_trained, train_stages, trained_tokens
from bankwise.training.controls import (
    check_controls,
    control_model,
    control_sparsity,
    control_stages,
    randomise_predictor,
    set_sparsity,
)

SELECTED = ["random_fixed", "random_per_token", "oracle_bank", "oracle_global"]
SPARSE = ["random_predictor", *SELECTED, "detached", "post_hoc"]
WARM_UP = {"trains": "predictor", "k_schedule": "dense", "aux_weight": 1}
WITHOUT_ROUTER = ["random_predictor", *SELECTED]


def stage(**changes):
    settings = {"tokens": 128, "seq_len": 16, "batch_tokens": 32, "micro_batch": 2, "lr": 1e-2, "predictor_lr": 1e-2}
    return Stage(**settings | {"bf16": False, "warmup": 0.0} | changes)


def recipe(*controls, sparsity=None, stages=None, **changes):
    return Recipe(
        model="dense", sparsity=SparsityConfig(predictor_rank=16, **sparsity or {}), controls=list(controls),
        stages=[stage()] if stages is None else stages, companion=False, **changes,
    )  # fmt: skip


@pytest.fixture
def derive(sparse, tiny_dense, tokenizer, tmp_path):
    """(untrained conversion, its control of a name)."""

    def make(name, sparsity=None, **changes):
        untrained = sparse(sparsity=sparsity)
        save_checkpoint(untrained, tokenizer, tmp_path / "untrained")
        settings = recipe(name, sparsity=sparsity, **changes)
        return untrained, control_model(name, settings, tiny_dense(), tmp_path / "untrained", None, 0.25)

    return make


def logits(model, ids):
    with torch.no_grad():
        return model.eval()(ids).logits


# What a control is


@pytest.mark.parametrize("name", [*SELECTED, "detached", "post_hoc"])
def test_a_control_has_the_weights_of_the_untrained_conversion(name, derive, tokens):
    untrained, control = derive(name)
    before, after = weights(untrained), weights(control)
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert torch.equal(logits(control, tokens()), logits(untrained, tokens())) == (name in ("detached", "post_hoc"))


@pytest.mark.parametrize(
    ("name", "expected"),
    [(name, {"selection": name, "gate_mode": "hard", "selection_seed": 7}) for name in SELECTED]
    + [
        ("random_predictor", {"selection": "predictor", "gate_mode": "hard", "predictor_grad": "frozen"}),
        ("detached", {"selection": "predictor", "gate_mode": "detached", "predictor_grad": "aux"}),
        ("post_hoc", {}),
    ],
)
def test_only_these_settings_differ_from_the_recipes(name, expected):
    settings = recipe(name, seed=7, sparsity={"active_per_bank": 8, "center": "mean"})
    own, base = control_sparsity(name, settings).to_dict(), settings.sparsity.to_dict()
    changed = {key for key, value in own.items() if value != base[key]}
    assert own.items() >= expected.items()
    assert changed <= expected.keys() | {"predictor_grad"}


def test_a_random_predictor_keeps_the_scale_and_nothing_about_channels(derive):
    untrained, control = derive("random_predictor")
    for fitted, drawn in zip(sparse_layers(untrained), sparse_layers(control), strict=True):
        for name, value in drawn.predictor.named_parameters():
            start = dict(fitted.predictor.named_parameters())[name]
            if value.ndim == 1:
                torch.testing.assert_close(value, start.mean().expand_as(value))
            else:
                torch.testing.assert_close(value.std(), start.std(), rtol=0.1, atol=0)
                overlap = torch.corrcoef(torch.stack([value.flatten(), start.flatten()]))[0, 1]
                assert overlap.abs() < 0.1
        x = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
        shared = (fitted.active_mask(x) & drawn.active_mask(x)).sum() / fitted.active_mask(x).sum()
        assert shared.item() == pytest.approx(0.25, abs=0.05)
    for key, value in weights(untrained).items():
        if key.endswith(("reduce.weight", "expand.weight")):
            assert not torch.equal(value, weights(control)[key])
        elif ".predictor." not in key or "bank_layout" in key:
            assert torch.equal(value, weights(control)[key])


def test_the_draw_follows_from_the_seed_and_a_start_of_zeros_is_drawn_too(sparse):
    def drawn(seed, init="auto"):
        layers = sparse_layers(sparse(init=init))
        generator = torch.Generator().manual_seed(seed)
        for layer in layers:
            randomise_predictor(layer.predictor, generator)
        return [layer.predictor.expand.weight for layer in layers]

    first, second = drawn(0)
    assert torch.equal(first, drawn(0)[0])
    assert not torch.equal(first, drawn(1)[0])
    assert (first - second).abs().min() > 0
    assert drawn(0, init="zero")[0].std() > 0.01


def test_vectors_of_a_gate_mode_that_a_control_has_not_are_gone(derive, tokens, tmp_path):
    untrained, control = derive("random_fixed", sparsity={"gate_mode": "affine"})
    gone = {name for name in weights(untrained) if name.endswith("gate_weight")}
    assert len(gone) == 2
    assert weights(untrained).keys() - weights(control).keys() == gone
    control.save_pretrained(tmp_path / "control")
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "control"), tokens()), logits(control, tokens())
    )


def test_dense_narrow_is_the_dense_model_with_a_quarter_of_its_channels(derive):
    _, control = derive("dense_narrow")
    assert (control.config.model_type, control.config.intermediate_size) == ("llama", 64)


# Checkpoints


@pytest.mark.parametrize("name", SPARSE)
def test_a_saved_control_opens_with_the_same_logits_with_and_without_bankwise(name, derive, tokens, tmp_path):
    _, control = derive(name, seed=3)
    control.save_pretrained(tmp_path / "control")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "control")
    assert opened.config.sparsity == control.config.sparsity == control_sparsity(name, recipe(name, seed=3)).to_dict()
    expected = logits(control, tokens())
    assert torch.equal(logits(opened, tokens()), expected)
    elsewhere = remote_class(tmp_path / "control").from_pretrained(tmp_path / "control")
    assert not type(elsewhere).__module__.startswith("bankwise")
    assert torch.equal(logits(elsewhere, tokens()), expected)


def remote_class(folder: Path):
    """The model class of the modelling file that a checkpoint carries."""
    spec = importlib.util.spec_from_file_location("modeling_elsewhere", folder / "modeling_bankwise.py")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.BankwiseLlamaForCausalLM


@pytest.mark.parametrize("name", SPARSE)
def test_a_cache_and_padding_change_no_token(name, derive, tokens):
    _, control = derive(name)
    ids = tokens(2, 16)
    whole = logits(control, ids)
    with torch.no_grad():
        first = control(ids[:, :10], use_cache=True)
        rest = control(ids[:, 10:], past_key_values=first.past_key_values, use_cache=True)
    torch.testing.assert_close(torch.cat([first.logits, rest.logits], dim=1), whole, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(logits(control, ids[1:]), whole[1:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SELECTED)
def test_routing_of_a_control_is_measured_as_it_is(name, derive, tokens):
    _, control = derive(name)
    found = routing_statistics(control, {"ids": tokens(4, 64)})
    by_bank = name != "oracle_global"
    assert found["active_per_bank"]["expected"] == (16 if by_bank else None)
    assert found["active_per_bank"]["violations"] == 0
    assert found["active_fraction"] == 0.25
    assert found["ffn_bytes_fraction"] == (1.0 if "oracle" in name else 0.25)
    for layer in found["layers"]:
        assert layer["margin"] is None
        kept = layer["retained_energy"]
        best = layer["retained_energy_oracle" if by_bank else "retained_energy_global"]
        assert kept == best if "oracle" in name else kept < 0.5 * best


def test_a_control_without_router_is_neither_scanned_nor_repaired(derive):
    with pytest.raises(ConfigError, match=r"selection='oracle_bank'.*no routing to scan"):
        check_sparse(derive("oracle_bank")[1])
    assert len(check_sparse(derive("random_predictor")[1])) == 2


# Training


@pytest.mark.parametrize("trains", ["all", "ffn", "layer: 1", "predictor"])
@pytest.mark.parametrize("name", WITHOUT_ROUTER)
def test_no_stage_trains_the_predictors_of_a_control_without_router(name, trains, derive):
    _, control = derive(name)
    if trains == "predictor":
        with pytest.raises(ConfigError, match="without trainable predictors"):
            select_trained(control, stage(trains=trains))
        return
    select_trained(control, stage(trains=trains))
    trained = {key for key, value in control.named_parameters() if value.requires_grad}
    assert trained
    assert not any(".predictor." in key for key in trained)
    in_groups = sum(len(group["params"]) for group in parameter_groups(control, stage(trains=trains)))
    assert in_groups == len(trained)


def test_a_predictor_that_learns_is_still_trained_by_every_stage(derive):
    _, control = derive("detached")
    for trains, layers in (("all", 2), ("ffn", 2), ("layer: 1", 1), ("predictor", 2)):
        select_trained(control, stage(trains=trains))
        trained = [key for key, value in control.named_parameters() if value.requires_grad]
        assert sum(key.endswith("predictor.reduce.weight") for key in trained) == layers


@pytest.mark.parametrize("name", SPARSE)
def test_training_moves_what_it_should_and_reads_the_same_rows(name, derive, windows, tmp_path):
    _, control = derive(name)
    before, seen = weights(control), []
    stages = control_stages(name, [stage(trains="predictor", aux_weight=1.0), stage(k_schedule="linear")])

    def rows(number):
        seen.append(number)
        return TokenWindows(windows(8, 16))

    tokens = train_stages(
        control, stages, rows, tmp_path / "work", name=name, metrics_file=tmp_path / "metrics.jsonl", quiet=True
    )
    assert tokens == trained_tokens(control, stages) == (128 if name in WITHOUT_ROUTER else 256)
    assert seen == ([1] if name in WITHOUT_ROUTER else [0, 1])
    after = weights(control)
    changed = {key for key, value in after.items() if not torch.equal(value, before[key])}
    of_predictors = {key for key in changed if ".predictor." in key}
    assert bool(of_predictors) == (name not in WITHOUT_ROUTER)
    assert bool(changed - of_predictors) == (name != "post_hoc")


def test_a_detached_predictor_learns_from_the_auxiliary_loss_alone(derive, windows, tmp_path):
    _, control = derive("detached")
    before = weights(control)
    train_stages(control, [stage(aux_weight=0.0)], lambda _: TokenWindows(windows(8, 16)), tmp_path / "w", quiet=True)
    after = weights(control)
    assert all(torch.equal(value, before[key]) for key, value in after.items() if ".predictor." in key)
    assert not torch.equal(after["lm_head.weight"], before["lm_head.weight"])


def test_activation_checkpointing_gives_a_random_control_the_same_gradients(derive, windows, tmp_path):
    ends = []
    for recompute in (False, True):
        _, control = derive("random_per_token")
        train_stages(
            control, [stage(gradient_checkpointing=recompute)], lambda _: TokenWindows(windows(8, 16)),
            tmp_path / str(recompute), quiet=True,
        )  # fmt: skip
        ends.append(weights(control))
    assert all(torch.equal(value, ends[1][key]) for key, value in ends[0].items())


def test_settings_can_be_taken_back(sparse, tokens):
    model = sparse()
    expected = logits(model, tokens())
    set_sparsity(model, SparsityConfig(predictor_rank=16, selection="random_fixed"))
    assert not torch.equal(logits(model, tokens()), expected)
    set_sparsity(model, SparsityConfig(predictor_rank=16))
    assert torch.equal(logits(model, tokens()), expected)


# Refusals


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"stages": []}, "no stages"),
        ({"stages": [{"trains": "predictor"}]}, "nothing to train.*oracle_bank"),
        ({"controls": ["post_hoc"], "sparsity": {"predictor_grad": "frozen"}}, "'post_hoc' trains the predictors"),
        ({"controls": ["detached"], "stages": [{"aux_weight": 0}]}, "'detached': no loss would train.*aux_weight"),
        ({"controls": ["post_hoc"], "sparsity": {"gate_mode": "hard"}, "stages": [{}, {"aux_weight": 0}]}, "no loss"),
        ({"controls": ["post_hoc"], "stages": [{"k_schedule": "dense", "aux_weight": 0}]}, "set aux_weight"),
        ({"sparsity": {"center": "ema"}}, "center='ema'"),
        ({"controls": [], "sparsity": {"predictor_grad": "lm"}, "stages": [WARM_UP, {}]}, "stages.0 trains only"),
        ({"controls": [], "stages": [WARM_UP | {"aux_weight_end": 0}, {}]}, "aux_weight_end=0"),
        ({"controls": ["detached"], "stages": [{"trains": "predictor", "aux_weight": 0}, {}]}, "of the detached model"),
    ],
    ids=str,
)
def test_a_control_that_cannot_be_is_refused(settings, words):
    settings = settings | {"stages": [stage(**changes) for changes in settings.get("stages", [{}])]}
    with pytest.raises(ConfigError, match=words):
        check_controls(recipe(*settings.pop("controls", ["oracle_bank"]), **settings))


def test_sound_recipes_are_accepted():
    check_controls(recipe(*SPARSE, "dense_narrow", stages=[stage(trains="predictor"), stage()]))
    check_controls(recipe("post_hoc", stages=[stage(aux_weight=0)]))
    check_controls(recipe("detached", stages=[stage(aux_weight=0), stage()]))
    check_controls(recipe(stages=[]))
    check_controls(recipe("random_predictor", stages=[stage(trains="predictor", aux_weight=0), stage()]))


@pytest.mark.parametrize("controls", [["oracle"], ["detached", "detached"]])
def test_controls_are_different_known_names(controls):
    with pytest.raises(ConfigError, match="different ones of dense_narrow, random_predictor"):
        recipe(*controls)
