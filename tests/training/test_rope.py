"""The position embedding that a stage starts with: its angles, the config that is saved, and what is refused."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from bankwise.config import RopeChange
from bankwise.errors import ConfigError
from bankwise.training.rope import change_rope


def angles(model, length=8):
    """Cosines [length, head] of the model's position embedding."""
    return model.model.rotary_emb(torch.zeros(1, length, 64), torch.arange(length)[None])[0][0]


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_another_base_is_what_a_model_made_with_it_has(tiny_dense, family):
    model = tiny_dense(family)
    parameters = dict(model.config.rope_parameters)
    change_rope(model, RopeChange(kind="theta", theta=5e5), seq_len=512)
    assert model.config.max_position_embeddings == 512
    made = tiny_dense(family, rope_parameters=parameters | {"rope_theta": 5e5}, max_position_embeddings=512)
    assert torch.equal(angles(model), angles(made))
    assert not torch.equal(angles(model), angles(tiny_dense(family)))


def test_linear_scaling_divides_positions(tiny_dense):
    model, plain = tiny_dense(), tiny_dense()
    change_rope(model, RopeChange(kind="linear", factor=4), seq_len=512)
    torch.testing.assert_close(angles(model, 32)[::4], angles(plain, 8))
    assert model.config.max_position_embeddings == 512


def test_yarn_leaves_fast_dimensions_and_divides_slow_ones(tiny_dense):
    model, plain = tiny_dense(head_dim=64, hidden_size=64), tiny_dense(head_dim=64, hidden_size=64)
    change_rope(model, RopeChange(kind="yarn", factor=4), seq_len=512)
    ratio = plain.model.rotary_emb.inv_freq / model.model.rotary_emb.inv_freq
    assert ratio[0] == pytest.approx(1)
    assert ratio[-1] == pytest.approx(4)
    assert model.config.rope_parameters["original_max_position_embeddings"] == 128


@pytest.mark.parametrize("kind", ["linear", "yarn"])
def test_a_second_change_goes_on_from_the_first(tiny_dense, kind):
    twice, once = (tiny_dense(head_dim=64, hidden_size=64) for _ in range(2))
    change_rope(twice, RopeChange(kind=kind, factor=2), seq_len=256)
    change_rope(twice, RopeChange(kind=kind, factor=2), seq_len=512)
    change_rope(once, RopeChange(kind=kind, factor=4), seq_len=512)
    assert torch.equal(angles(twice), angles(once))
    assert twice.config.max_position_embeddings == once.config.max_position_embeddings == 512
    other = {"linear": "yarn", "yarn": "linear"}[kind]
    with pytest.raises(ConfigError, match=f"extended by '{kind}' already"):
        change_rope(twice, RopeChange(kind=other, factor=2), seq_len=1024)


def test_the_checkpoint_carries_the_change(tiny_dense, sparse, tmp_path, tokens):
    for number, model in enumerate((tiny_dense(), sparse())):
        change_rope(model, RopeChange(kind="yarn", factor=2), seq_len=256)
        model.save_pretrained(tmp_path / str(number))
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / str(number))
        assert torch.equal(loaded(tokens()).logits, model.eval()(tokens()).logits)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, r"seq_len=256 is longer than the model's context of 128.*theta or yarn"),
        ({"kind": "yarn", "factor": 1.5}, r"seq_len=256.*rope.factor=1.5 times.*use rope.factor=2"),
    ],
)
def test_rows_longer_than_the_context_are_refused(tiny_dense, change, words):
    model = tiny_dense()
    with pytest.raises(ConfigError, match=words):
        change_rope(model, RopeChange(**change), seq_len=256)
    assert torch.equal(angles(model), angles(tiny_dense()))


def test_a_change_that_changes_nothing_is_refused():
    for settings, words in (({"kind": "theta"}, "rope.theta > 0"), ({"kind": "yarn"}, "rope.factor > 1")):
        with pytest.raises(ConfigError, match=words):
            RopeChange(**settings)
