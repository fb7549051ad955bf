"""What changes over the steps of a stage: channels, leak, weights and rates, on paper and in a model that trains."""

import pytest
import torch
from training.tiny_run import weights

from bankwise.config import Stage
from bankwise.errors import ConfigError
from bankwise.ffn import sparse_layers
from bankwise.training.schedules import active_channels, aux_weight, leak


def stage_of(**settings):
    return Stage(tokens=10 * 32, seq_len=16, batch_tokens=32, micro_batch=2, **settings)


def channels(stage):
    return [active_channels(stage, step, active_per_bank=16, bank_size=64) for step in range(stage.steps)]


def test_channels_fall_from_the_bank_or_k_start_to_the_model_s_own():
    assert channels(stage_of()) == [16] * 10
    assert channels(stage_of(k_schedule="leak")) == [16] * 10
    assert channels(stage_of(k_schedule="dense")) == [64] * 10
    assert channels(stage_of(k_schedule="linear")) == [64, 59, 53, 48, 43, 37, 32, 27, 21, 16]
    assert channels(stage_of(k_schedule="linear", k_start=32, k_share=0.5)) == [32, 28, 24, 20, 16, 16, 16, 16, 16, 16]
    cosine = channels(stage_of(k_schedule="cosine"))
    assert (cosine[0], cosine[-1]) == (64, 16)
    assert cosine == sorted(cosine, reverse=True)
    assert cosine[2] > channels(stage_of(k_schedule="linear"))[2]


def test_the_leak_falls_from_all_to_nothing():
    assert [leak(stage_of(k_schedule="leak"), step) for step in (0, 3, 9)] == pytest.approx([1.0, 2 / 3, 0.0])
    assert leak(stage_of(k_schedule="linear"), 0) == 0


def test_the_auxiliary_weight_falls_along_a_cosine():
    stage = stage_of(aux_weight=0.1, aux_weight_end=0.01)
    assert [aux_weight(stage, step) for step in (0, 4.5, 9)] == pytest.approx([0.1, 0.055, 0.01])
    assert aux_weight(stage_of(aux_weight=0.1), 9) == 0.1


@pytest.mark.parametrize(
    ("settings", "shares"),
    [
        ({"lr_schedule": "constant"}, [1, 1, 1, 1]),
        ({"lr_schedule": "linear", "min_lr_ratio": 0.0}, [1, 0.6, 0.2, 0.1]),
        ({"lr_schedule": "wsd", "decay": 0.4, "min_lr_ratio": 0.2}, [1, 1, 0.6, 0.4]),
        ({"lr_schedule": "cosine", "min_lr_ratio": 0.5}, [1, 0.827, 0.548, 0.512]),
    ],
)
def test_learning_rates_follow_the_schedule(sparse, windows, training, settings, shares):
    run = training(sparse(), windows(), tokens=10 * 32, lr=1e-3, **settings).run()
    rates = {row["step"]: row["lr"] / 1e-3 for row in run.rows}
    assert [rates[step] for step in (1, 5, 9, 10)] == pytest.approx(shares, abs=1e-3)


def test_a_model_trains_with_the_scheduled_channels_and_has_its_own_afterwards(sparse, windows, training):
    seen = []
    model = sparse()
    layer = sparse_layers(model)[0]
    layer.down_proj.register_forward_hook(
        lambda module, inputs, output: seen.append((inputs[0] != 0).sum(-1).unique().tolist())
    )
    training(model, windows(), tokens=3 * 32, k_schedule="linear", k_start=48).run()
    assert [counts for counts in seen if counts] == [[4 * 48], [4 * 32], [4 * 16]]
    seen.clear()
    model.eval()(windows()[:1])
    assert seen == [[4 * 16]]


def test_under_a_full_leak_a_step_is_that_of_the_dense_model(sparse, windows, training, tiny_dense):
    leaking = training(sparse(), windows(), tokens=32, k_schedule="leak", aux_weight=0).run()
    dense = training(tiny_dense(), windows(), tokens=32, name="companion").run()
    assert leaking.rows[0]["ce"] == pytest.approx(dense.rows[0]["ce"], rel=1e-6)
    for name, value in dense.model.state_dict().items():
        torch.testing.assert_close(leaking.model.state_dict()[name], value)


def test_predictors_warm_up_on_the_dense_model(sparse, windows, training, tiny_dense):
    model = sparse(init="zero")
    before = weights(model)
    run = training(
        model, windows(), tokens=9 * 32, trains="predictor", k_schedule="dense", aux_weight=1, aux_token_fraction=1,
        predictor_lr=3e-3,
    ).run()  # fmt: skip
    dense = training(tiny_dense(), windows(), tokens=32, name="companion").run()
    assert run.rows[0]["ce"] == pytest.approx(dense.rows[0]["ce"], rel=1e-6)
    assert run.rows[8]["aux"] < run.rows[0]["aux"], "the ninth step reads the rows of the first"
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all(".mlp.predictor." in name for name in changed)


def test_one_layer_trains_alone(sparse, windows, training):
    model = sparse()
    before = weights(model)
    training(model, windows(), tokens=64, trains="layer: 1", lr=1e-2, aux_token_fraction=1).run()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed
    assert all(name.startswith("model.layers.1.mlp.") for name in changed)
    with pytest.raises(ConfigError, match=r"trains='layer: 7'.*no layer 7"):
        training(sparse(), windows(), tokens=64, trains="layer: 7")
