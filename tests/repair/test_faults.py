"""Planted damage does what it says to its layer, and nothing to any other."""

import copy
import hashlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from bankwise.ffn import sparse_layers
from bankwise.repair import faults
from bankwise.repair.counting_model import CountingRows, train_dense

Untrained = Callable[..., PreTrainedModel]
LAYER = 1


def windows() -> torch.Tensor:
    return torch.randint(2, 200, (2, 40), generator=torch.Generator().manual_seed(0))


FAULTS: dict[str, Any] = {
    "scrambled": faults.scramble_predictor,
    "noise": faults.add_predictor_noise,
    "few": faults.keep_few,
    "sorted": lambda model, layer, seed: faults.sort_banks(windows())(model, layer, seed),
    "permuted": faults.permute_banks,
    "down": faults.add_down_noise,
    "late": faults.scramble_late(20),
}


def masks(model: PreTrainedModel) -> dict[int, torch.Tensor]:
    """The channels that each layer's tokens keep, seen from outside."""
    seen: dict[int, torch.Tensor] = {}
    hooks = [
        layer.down_proj.register_forward_pre_hook(
            lambda _, inputs, number=layer.layer: seen.__setitem__(number, inputs[0] != 0)
        )
        for layer in sparse_layers(model)
    ]
    with torch.no_grad():
        model.model(windows(), use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


@pytest.mark.parametrize("name", FAULTS)
def test_damage_stays_in_its_layer(untrained: Untrained, name: str) -> None:
    healthy = untrained()
    model = copy.deepcopy(healthy)
    FAULTS[name](model, LAYER, 3)
    own = f"model.layers.{LAYER}.mlp."
    changed = {
        key
        for key, value in model.state_dict().items()
        if hashlib.sha256(value.numpy().tobytes()).digest()
        != hashlib.sha256(healthy.state_dict()[key].numpy().tobytes()).digest()
    }
    assert all(key.startswith(own) for key in changed)
    assert torch.equal(masks(model)[0], masks(healthy)[0])
    with torch.no_grad():
        assert not torch.allclose(model(windows()).logits, healthy(windows()).logits, atol=1e-3)
    assert bool(changed) == (name not in ("few", "late"))


def test_sorted_banks_leave_the_dense_function_alone(untrained: Untrained) -> None:
    model, layer = untrained(), LAYER
    sparse = sparse_layers(model)[layer]
    x = torch.randn(30, 64, generator=torch.Generator().manual_seed(0))
    dense, logits = sparse.down_proj(sparse.dense_activation(x)), sparse.logits(x)
    faults.sort_banks(windows())(model, layer, 0)
    assert torch.allclose(sparse.down_proj(sparse.dense_activation(x)), dense, atol=1e-5)
    # Each channel takes its logit along.
    assert torch.allclose(sparse.logits(x)[:, sparse.predictor.bank_layout.argsort()], logits, atol=1e-5)


def test_permuted_banks_leave_the_dense_function_and_the_logits_alone(untrained: Untrained) -> None:
    model = untrained()
    sparse = sparse_layers(model)[LAYER]
    x = torch.randn(30, 64, generator=torch.Generator().manual_seed(0))
    dense, logits = sparse.down_proj(sparse.dense_activation(x)), sparse.logits(x)
    faults.permute_banks(model, LAYER, 0)
    assert torch.allclose(sparse.down_proj(sparse.dense_activation(x)), dense, rtol=1e-4, atol=1e-3)
    assert torch.equal(sparse.logits(x), logits)


def test_late_damage_spares_the_early_positions(untrained: Untrained) -> None:
    healthy, model = untrained(), untrained()
    faults.scramble_late(20)(model, LAYER, 3)
    same = masks(model)[LAYER] == masks(healthy)[LAYER]
    assert same[:, :20].all()
    assert not same[:, 20:].all()


def test_counting_model_learns(words: PreTrainedTokenizerFast) -> None:
    said: list[str] = []
    train_dense(words, layers=1, hidden=32, ffn=64, steps=100, seed=0, say=said.append)
    assert float(said[-1].split(": ")[1].split()[0]) < 5.5  # 7.8 is a guess over the vocabulary


def test_training_rows_are_official_prompts(words: PreTrainedTokenizerFast) -> None:
    tokens, is_answer = CountingRows(words, 0).row(30)
    text = words.decode(tokens)
    assert text.count("most common") == 0  # words are written by their first and last letters
    answer = [token for token, marked in zip(tokens, is_answer, strict=True) if marked]
    assert words.decode(answer).split()[::2][:10] == [f"{number}." for number in range(1, 11)]
    assert len(answer) >= 40
