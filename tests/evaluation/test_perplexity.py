"""Held-out loss equals the model's own loss, and its summary the textbook formulas."""

import math

import pytest
import torch

import bankwise
from bankwise import DataSource, SparsityConfig
from bankwise.config import EvaluationPlan, PerplexityPlan
from bankwise.errors import ConfigError
from bankwise.evaluation import active_fraction, evaluate, perplexity, window_losses


def upcycled(dense, **settings):
    return bankwise.upcycle(dense, SparsityConfig(**{"predictor_rank": 16} | settings), progress=False)


@torch.no_grad()
def naive_losses(model, windows):
    return torch.stack([model.eval()(window[None], labels=window[None]).loss for window in windows]).double()


@pytest.fixture(params=["dense", "sparse"])
def model(request, tiny_dense):
    dense = tiny_dense(scale=0.2)
    return dense if request.param == "dense" else upcycled(dense)


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_window_losses_equal_the_models_own(model, batch_size, tokens):
    windows = tokens(7, 33)
    losses = window_losses(model, windows, batch_size=batch_size)
    assert losses.dtype == torch.float64
    torch.testing.assert_close(losses, naive_losses(model, windows), rtol=1e-5, atol=1e-5)
    assert losses.std() > 1e-2


@pytest.mark.usefixtures("bf16_products")
def test_bfloat16_losses_are_near_the_float32_ones(model, tokens):
    windows = tokens(4, 33)
    losses = window_losses(model, windows, bf16=True)
    assert not torch.equal(losses, window_losses(model, windows))
    torch.testing.assert_close(losses, window_losses(model, windows), rtol=0, atol=0.1)


def test_perplexity_over_all_windows_and_for_each_source(model, tokens):
    windows = {"a": tokens(3, 17, seed=1), "b": tokens(5, 17, seed=2)}
    losses = {source: naive_losses(model, part) for source, part in windows.items()}
    result = perplexity(model, windows)
    joined = torch.cat(list(losses.values()))
    for summary, expected in (
        (result.to_dict(), joined),
        (result.by_source["a"], losses["a"]),
        (result.by_source["b"], losses["b"]),
    ):
        mean = sum(expected.tolist()) / len(expected)
        spread = math.sqrt(sum((value - mean) ** 2 for value in expected.tolist()) / (len(expected) - 1))
        assert summary["n"] == len(expected)
        assert summary["loss"] == pytest.approx(mean, rel=1e-5)
        assert summary["perplexity"] == pytest.approx(math.exp(mean), rel=1e-4)
        assert summary["standard_error"] == pytest.approx(spread / math.sqrt(len(expected)), rel=1e-3)


def test_one_window_has_no_standard_error(model, tokens):
    assert math.isnan(perplexity(model, {"a": tokens(1, 17)}).standard_error)


@pytest.mark.parametrize(
    ("settings", "share"),
    [
        ({}, 0.25),
        ({"active_per_bank": 64}, 1.0),
        ({"active_per_bank": [8, 32, 64]}, (8 + 32 + 64) / 192),
        ({"dense_layers": [1]}, (16 + 64 + 16) / 192),
        ({"dense_layers": [0, 1, 2]}, 1.0),
    ],
    ids=str,
)
def test_active_fraction_is_the_share_of_channels_read(settings, share, tiny_dense, tokens):
    sparse = upcycled(tiny_dense(num_hidden_layers=3), **settings)
    assert active_fraction(sparse, tokens(2, 9)) == pytest.approx(share, abs=1e-12)


def test_active_fraction_of_a_dense_model_is_one_and_of_a_threshold_is_counted(tiny_dense, tokens):
    assert active_fraction(tiny_dense(), tokens()) == 1.0
    counted = active_fraction(upcycled(tiny_dense(), gate_mode="stat_topk"), tokens())
    assert 0.1 < counted < 0.5
    assert counted != 0.25


def test_windows_longer_than_the_context_are_refused(model, tokens):
    assert window_losses(model, tokens(1, 128)).isfinite().all()
    with pytest.raises(ConfigError, match="windows of 129 tokens are longer than the model's context of 128"):
        window_losses(model, tokens(1, 129))


@pytest.mark.parametrize("training", [False, True])
def test_measuring_leaves_the_model_as_it_was(training, tiny_dense, tokens):
    sparse = upcycled(tiny_dense(), center="ema").train(training)
    state = {name: value.clone() for name, value in sparse.state_dict().items()}
    perplexity(sparse, {"a": tokens(2, 9)})
    active_fraction(sparse, tokens(2, 9))
    assert sparse.training is training
    assert all(module.training is training for module in sparse.modules())
    assert all(torch.equal(value, state[name]) for name, value in sparse.state_dict().items())
    assert all(value.grad is None for value in sparse.parameters())


def test_mode_is_restored_after_a_failure(tiny_dense):
    dense = tiny_dense().train()
    with pytest.raises(IndexError):
        window_losses(dense, torch.full((1, 5), 10_000))
    assert dense.training


def test_evaluate_scores_held_out_text_by_source(model, tokenizer, tmp_path):
    for name, letter in (("a", "x"), ("b", "y")):
        for index in range(12):
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / f"{index}.txt").write_text(f"document {index} of {letter} " * 40)
    sources = [DataSource(path=str(tmp_path / name)) for name in ("a", "b")]
    plan = EvaluationPlan(
        perplexity=PerplexityPlan(data=sources, windows=4, seq_len=32, held_out_fraction=0.5), batch_tokens=64
    )
    scores = evaluate(model, tokenizer, plan=plan, progress=False)["perplexity"]
    assert scores["n"] == 4
    assert len(scores["by_source"]) == 2
    assert scores["perplexity"] == pytest.approx(math.exp(scores["loss"]))
    assert scores["active_fraction"] == (0.25 if "bankwise" in model.config.model_type else 1.0)
    again = evaluate(model, tokenizer, ["perplexity"], plan=plan, overrides=["perplexity.windows=2"], progress=False)
    assert again["perplexity"]["n"] == 2
    with pytest.raises(ConfigError, match="iq"):
        evaluate(model, tokenizer, suites=["perplexity", "iq"])
