"""`SparsityConfig`: what it refuses, what it says when it does, and how it survives `config.json`."""

import dataclasses
import json

import pytest

from bankwise.config import SparsityConfig
from bankwise.errors import BankwiseError, ConfigError

# settings -> words that the message must hold: the value that was given, and a way out.
REJECTED = [
    ({"gate_mode": "soft"}, ["gate_mode='soft'", "ste_unit", "hard"]),
    ({"gate_norm": "l2"}, ["gate_norm='l2'", "2sigma"]),
    ({"h_grad": "straight", "center": "learnable"}, ["h_grad='straight'", "center='learnable'", "h_grad='masked'"]),
    ({"h_grad": "all"}, ["h_grad='all'", "masked", "straight"]),
    ({"predictor_form": "mlp"}, ["predictor_form='mlp'", "linear", "gated_product"]),
    ({"predictor_grad": "none"}, ["predictor_grad='none'", "lm", "aux", "both"]),
    ({"center": "median"}, ["center='median'", "off", "learnable"]),
    ({"bank_layout": "sorted"}, ["bank_layout='sorted'", "snake", "coact"]),
    ({"bank_size": 0}, ["bank_size=0", "64"]),
    ({"bank_size": -8}, ["bank_size=-8", "64"]),
    ({"bank_size": 64.0}, ["bank_size=64.0", "64"]),
    ({"bank_size": True}, ["bank_size=True", "64"]),
    ({"active_per_bank": 0}, ["active_per_bank=0", "1..bank_size=64", "active_per_bank=64"]),
    ({"active_per_bank": 65}, ["active_per_bank=65", "1..bank_size=64", "active_per_bank=64"]),
    ({"active_per_bank": 16.0}, ["active_per_bank=16.0", "active_per_bank=64"]),
    ({"active_per_bank": True}, ["active_per_bank=True", "active_per_bank=64"]),
    ({"active_per_bank": [16, 99]}, ["active_per_bank=99", "active_per_bank=64"]),
    ({"bank_size": 8}, ["active_per_bank=16", "1..bank_size=8", "active_per_bank=8"]),
    ({"predictor_rank": 0}, ["predictor_rank=0", "'auto'"]),
    ({"predictor_rank": "big"}, ["predictor_rank='big'", "'auto'"]),
    ({"predictor_rank": 32.0, "predictor_form": "linear"}, ["predictor_rank=32.0", "'auto'"]),
    ({"predictor_rank": 33, "predictor_form": "gated_product"}, ["predictor_rank=33", "use 34"]),
    ({"ste_tau": 0.0}, ["ste_tau=0.0", "1.0"]),
    ({"ste_tau": float("nan")}, ["ste_tau=nan", "1.0"]),
    ({"gate_mode": "default_ema", "center": "mean"}, ["'default_ema'", "center='mean'", "center='off'", "'ste_unit'"]),
    ({"gate_mode": "detached", "predictor_grad": "lm"}, ["'detached'", "predictor_grad='lm'", "predictor_grad='aux'"]),
    ({"gate_mode": "hard", "predictor_grad": "lm"}, ["'hard'", "predictor_grad='lm'", "predictor_grad='aux'"]),
    ({"selection": "oracle"}, ["selection='oracle'", "oracle_bank", "random_per_token"]),
    ({"selection": "oracle_global", "gate_mode": "stat_topk"}, ["'oracle_global'", "'stat_topk'", "'hard'"]),
    ({"selection": "oracle_bank", "gate_mode": "relu_rms"}, ["'oracle_bank'", "'relu_rms'", "'hard'"]),
    ({"selection": "random_fixed", "gate_mode": "default_ema"}, ["'random_fixed'", "'default_ema'", "'hard'"]),
    ({"selection": "oracle_bank", "center": "ema"}, ["'oracle_bank'", "center='ema'", "center='mean'"]),
    ({"selection_seed": 0.5}, ["selection_seed=0.5", "integer"]),
]


@pytest.mark.parametrize(("settings", "words"), REJECTED, ids=[str(settings) for settings, _ in REJECTED])
def test_a_contradiction_names_the_value_and_the_way_out(settings, words):
    with pytest.raises(ConfigError) as caught:
        SparsityConfig(**settings)
    missing = [word for word in words if word not in str(caught.value)]
    assert not missing, f"{missing} not in {caught.value}"


def test_a_config_error_is_a_user_error_and_a_value_error():
    assert issubclass(ConfigError, BankwiseError)
    assert issubclass(ConfigError, ValueError)


@pytest.mark.parametrize(
    "settings",
    [
        {"active_per_bank": 1},
        {"active_per_bank": 64},
        {"bank_size": 1, "active_per_bank": 1},
        {"predictor_rank": 33, "predictor_form": "linear"},
        {"gate_mode": "detached", "predictor_grad": "aux"},
        {"gate_mode": "hard", "predictor_grad": "both"},
        {"gate_mode": "default_ema", "center": "off"},
        {"gate_mode": "affine", "center": "ema"},
        {"selection": "oracle_global"},
        {"selection": "random_fixed", "gate_mode": "detached", "center": "ema"},
        {"predictor_grad": "frozen", "gate_mode": "sigmoid"},
    ],
    ids=str,
)
def test_extremes_and_sound_combinations_are_accepted(settings):
    assert SparsityConfig(**settings).to_dict().items() >= settings.items()


def test_settings_are_keyword_only():
    with pytest.raises(TypeError):
        SparsityConfig(32)


def fit(config=None, **changes):
    shape = {"ffn_size": 1536, "num_layers": 30, "hidden_act": "silu"} | changes
    (config or SparsityConfig()).validate_for(**shape)


@pytest.mark.parametrize("hidden_act", ["silu", "swish"])
def test_a_fitting_model_is_accepted(hidden_act):
    fit(hidden_act=hidden_act)
    fit(SparsityConfig(active_per_bank=[16] * 30, dense_layers=[0, 29]))


@pytest.mark.parametrize("hidden_act", ["gelu", "relu", "gelu_pytorch_tanh"])
def test_an_ffn_without_silu_is_refused(hidden_act):
    with pytest.raises(ConfigError, match=f"hidden_act='{hidden_act}'.*llama, mistral, qwen2, qwen3"):
        fit(hidden_act=hidden_act)


def test_a_width_that_the_bank_does_not_divide_is_refused_with_a_bank_size_that_does():
    with pytest.raises(
        ConfigError, match=r"bank_size=64 does not divide the FFN width 11000 \(remainder 56\)"
    ) as caught:
        fit(ffn_size=11000)
    suggested = int(str(caught.value).rsplit("bank_size=", 1)[1])
    assert 11000 % suggested == 0
    fit(SparsityConfig(bank_size=suggested), ffn_size=11000)


def test_a_prime_width_is_refused_and_no_bank_size_is_suggested():
    with pytest.raises(ConfigError, match="no bank size from 8 to 256 divides it"):
        fit(ffn_size=1543)


@pytest.mark.parametrize("listed", [0, 29, 31])
def test_a_per_layer_list_must_cover_every_layer(listed):
    with pytest.raises(ConfigError, match=f"lists {listed} layers, but the model has 30; give one integer"):
        fit(SparsityConfig(active_per_bank=[16] * listed))


@pytest.mark.parametrize("layer", [-1, 30])
def test_a_dense_layer_outside_the_model_is_refused(layer):
    with pytest.raises(ConfigError, match=rf"dense_layers=\[{layer}\] do not exist: .* 0\.\.29"):
        fit(SparsityConfig(dense_layers=[3, layer]))


def test_k_of_a_layer_comes_from_the_integer_or_from_the_list():
    assert [SparsityConfig(active_per_bank=12).active_in_layer(layer) for layer in (0, 7)] == [12, 12]
    assert [SparsityConfig(active_per_bank=[4, 64]).active_in_layer(layer) for layer in (0, 1)] == [4, 64]


@pytest.mark.parametrize(
    ("hidden_size", "ffn_size", "rank"),
    [
        (576, 1536, 128),
        (2047, 18944, 128),
        (2048, 14336, 256),
        (4096, 14336, 256),
        (4096, 14337, 512),
        (3584, 18944, 512),
    ],
)
def test_rank_auto_follows_the_widths(hidden_size, ffn_size, rank):
    assert SparsityConfig().resolve_rank(hidden_size, ffn_size) == rank
    assert SparsityConfig(predictor_rank=6).resolve_rank(hidden_size, ffn_size) == 6


def test_a_config_survives_json():
    config = SparsityConfig(
        bank_size=32,
        active_per_bank=[8, 4, 32],
        predictor_rank=20,
        predictor_form="linear",
        gate_mode="hard",
        gate_norm="bank_mean_1",
        ste_alpha=0.5,
        ste_tau=2.0,
        h_grad="straight",
        predictor_grad="aux",
        center="mean",
        bank_layout="coact",
        dense_layers=[1],
        selection="random_fixed",
        selection_seed=3,
    )
    default = SparsityConfig()
    for name in (f.name for f in dataclasses.fields(SparsityConfig)):
        assert getattr(config, name) != getattr(default, name), f"{name} is left at its default, so nothing is tested"
    for each in (config, default):
        assert SparsityConfig.from_dict(json.loads(json.dumps(each.to_dict()))) == each


def test_the_dict_of_a_config_is_a_copy():
    config = SparsityConfig(active_per_bank=[16, 16])
    config.to_dict()["active_per_bank"][0] = 3
    assert config.active_per_bank == [16, 16]


def test_unknown_keys_are_named_together_with_the_known_ones():
    with pytest.raises(ConfigError, match=r"\['banksize', 'topk'\].*'active_per_bank'.*'bank_size'"):
        SparsityConfig.from_dict({"topk": 3, "bank_size": 64, "banksize": 64})


def test_a_loaded_dict_is_checked_like_any_other_config():
    with pytest.raises(ConfigError, match="active_per_bank=65"):
        SparsityConfig.from_dict(SparsityConfig().to_dict() | {"active_per_bank": 65})
