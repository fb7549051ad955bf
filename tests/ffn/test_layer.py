"""`SparseSwiGLU` as a whole: exactness, centring, who trains the predictor, compilation, checkpointing."""

import copy

import pytest
import torch
import torch.nn.functional as functional
from torch.utils.checkpoint import checkpoint

from bankwise.config import SparsityConfig
from bankwise.ffn import SparseSwiGLU, bank_topk_mask_reference, record_routing, sparse_layers

D, F, B, K, RANK = 12, 32, 8, 3, 6
FORMS = ["linear", "gated_product"]
UNIT_MODES = ["ste_unit", "detached", "default_ema", "hard"]
ALL_MODES = [*UNIT_MODES, "sigmoid", "affine", "relu_rms", "stat_topk"]


def make_layer(dtype=torch.float64, *, layer=0, bias=False, **settings):
    torch.manual_seed(11)
    sparsity = SparsityConfig(**({"bank_size": B, "active_per_bank": K, "predictor_rank": RANK} | settings))
    made = SparseSwiGLU(D, F, sparsity, layer, bias=bias).to(dtype)
    with torch.no_grad():
        for value in (*made.parameters(), *made.buffers()):
            if value.is_floating_point():
                value.normal_(std=0.5)
    return made.eval()


def make_input(dtype=torch.float64, shape=(2, 7)):
    return torch.randn(*shape, D, generator=torch.Generator().manual_seed(12), dtype=torch.float64).to(dtype)


def dense_h(layer, x):
    gate = x @ layer.gate_proj.weight.T + (0 if layer.gate_proj.bias is None else layer.gate_proj.bias)
    up = x @ layer.up_proj.weight.T + (0 if layer.up_proj.bias is None else layer.up_proj.bias)
    return gate * torch.sigmoid(gate) * up


def masked_ffn(layer, x, gate=1.0, center=0.0):
    """y = Wd (gate * (h - c) + c), one line of the definition per line."""
    y = (gate * (dense_h(layer, x) - center) + center) @ layer.down_proj.weight.T
    return y if layer.down_proj.bias is None else y + layer.down_proj.bias


def mask_of(layer, x):
    return bank_topk_mask_reference(layer.logits(x), bank_size=B, active_per_bank=layer.active_per_bank)


def energy_of(layer, x, center=0.0):
    return ((dense_h(layer, x) - center).abs() * layer.down_proj.weight.norm(dim=0)).detach()


def gradients_of(layer, loss):
    layer.zero_grad()
    loss.backward()
    return {name: p.grad for name, p in layer.named_parameters()}


def assert_near(actual, expected, tolerance=1e-10):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def assert_same_gradients(actual, expected, tolerance=1e-10):
    assert actual.keys() == expected.keys()
    for name, gradient in expected.items():
        assert (gradient is None) == (actual[name] is None), name
        if gradient is not None:
            torch.testing.assert_close(
                actual[name], gradient, rtol=tolerance, atol=tolerance, msg=lambda text, name=name: f"{name}: {text}"
            )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mode", UNIT_MODES)
@pytest.mark.parametrize("bias", [False, True])
def test_keeping_every_channel_is_the_dense_ffn(form, mode, bias):
    layer = make_layer(torch.float32, predictor_form=form, gate_mode=mode, active_per_bank=B, bias=bias)
    x = make_input(torch.float32)
    dense = layer.down_proj(functional.silu(layer.gate_proj(x)) * layer.up_proj(x))
    assert (layer(x) - dense).abs().max() <= 1e-6
    assert layer.active_mask(x).all()


def test_affine_starts_as_the_dense_ffn():
    fresh = SparseSwiGLU(D, F, SparsityConfig(bank_size=B, active_per_bank=B, gate_mode="affine"), 0)
    x = make_input(torch.float32)
    assert (fresh(x) - masked_ffn(fresh, x)).abs().max() <= 1e-6


def test_setting_active_per_bank_makes_a_layer_dense_again():
    layer, x = make_layer(), make_input()
    assert (layer(x) - masked_ffn(layer, x)).abs().max() > 1e-2
    layer.active_per_bank = B
    assert_near(layer(x), masked_ffn(layer, x))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mode", [mode for mode in ALL_MODES if mode != "stat_topk"])
def test_exactly_k_channels_of_each_bank_are_active(form, mode):
    layer, x = make_layer(torch.float32, predictor_form=form, gate_mode=mode), make_input(torch.float32, (3, 11))
    mask = layer.active_mask(x)
    assert mask.shape == (3, 11, F)
    assert (mask.unflatten(-1, (-1, B)).sum(-1) == K).all()
    assert torch.equal(mask, mask_of(layer, x))


def gate_of(layer, x):
    """The gate that each mode multiplies a kept channel with, from the formulas of `method.md` section 2.4."""
    z, mask, mode = layer.logits(x), layer.active_mask(x), layer.sparsity.gate_mode
    if mode == "sigmoid":
        return 2 * torch.sigmoid(z) * mask
    if mode == "affine":
        return (1 + layer.gate_weight * (torch.sigmoid(z) - 0.5)) * mask
    if mode == "relu_rms":
        kept = z.relu() * mask
        return layer.gate_weight * kept / ((kept**2).mean(-1, keepdim=True) + 1e-6).sqrt()
    if mode == "stat_topk":
        banks = z.unflatten(-1, (-1, B))
        normal = torch.distributions.Normal(torch.tensor(0.0).double(), 1.0)
        quantile = normal.icdf(torch.tensor(1 - K / B).double())
        cut = banks.mean(-1, keepdim=True) + quantile * banks.std(-1, correction=0, keepdim=True)
        return (banks - cut).relu().flatten(-2)
    return mask.to(z.dtype)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mode", ALL_MODES)
@pytest.mark.parametrize("center", ["off", "mean"])
def test_the_output_is_the_definition_with_the_active_mask(form, mode, center):
    if mode == "default_ema":
        center = "off"
    layer, x = make_layer(predictor_form=form, gate_mode=mode, center=center), make_input()
    c = 0.0 if center == "off" else layer.center
    assert_near(layer(x), masked_ffn(layer, x, gate_of(layer, x), c))


@pytest.mark.parametrize("mode", ALL_MODES)
def test_the_active_mask_names_the_channels_whose_weights_the_output_reads(mode):
    layer, x = make_layer(gate_mode=mode), make_input()
    if mode == "relu_rms":
        layer.predictor.expand.bias.data += 20  # a kept channel with a negative logit has gate 0
    read = torch.autograd.functional.jacobian(
        lambda h: layer.down_proj(layer._gate(h, layer.logits(x))).sum(-1), h_of(layer, x)
    )
    rows = x.shape[0] * x.shape[1]
    own_token = read.reshape(rows, rows, F).diagonal(dim1=0, dim2=1).T
    assert torch.equal(own_token != 0, layer.active_mask(x).reshape(rows, F))


def h_of(layer, x):
    return layer.dense_activation(x).detach()


def test_stat_topk_keeps_what_lies_above_its_threshold():
    layer, x = make_layer(gate_mode="stat_topk"), make_input(shape=(5, 9))
    mask = layer.active_mask(x)
    assert torch.equal(mask, gate_of(layer, x) > 0)
    assert len(mask.unflatten(-1, (-1, B)).sum(-1).unique()) > 1, "the count should vary"


def test_each_layer_takes_its_own_k_from_the_list():
    x = make_input()
    for layer_index, active in enumerate([1, 5, B]):
        layer = make_layer(active_per_bank=[1, 5, B], layer=layer_index)
        assert (layer.active_mask(x).unflatten(-1, (-1, B)).sum(-1) == active).all()
        assert_near(layer(x), masked_ffn(layer, x, mask_of(layer, x)))


def test_a_dense_checkpoint_lacks_only_predictor_keys():
    state = {f"{name}_proj.weight": torch.zeros(F, D) for name in ("gate", "up")}
    state["down_proj.weight"] = torch.zeros(D, F)
    found = make_layer(torch.float32).load_state_dict(state, strict=False)
    assert not found.unexpected_keys
    assert found.missing_keys
    assert all(key.startswith("predictor.") for key in found.missing_keys)


@pytest.mark.parametrize("shape", [(0,), (1,), (2, 0), (3, 2, 1)], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_any_leading_shape(form, shape):
    layer, x = make_layer(predictor_form=form), make_input(shape=shape)
    assert layer(x).shape == x.shape
    assert_near(layer(x), masked_ffn(layer, x, mask_of(layer, x)))


def test_a_token_has_the_same_output_alone_and_in_a_batch():
    layer, x = make_layer(), make_input()
    alone = torch.stack([layer(x[i, j][None])[0] for i in range(2) for j in range(7)])
    assert_near(alone.view_as(x), layer(x), 1e-12)


# Centring


@pytest.mark.parametrize("center", ["off", "mean", "learnable", "ema"])
def test_centring_is_exact_when_every_channel_is_kept(center):
    layer, x = make_layer(center=center, active_per_bank=B), make_input()
    for training in (False, True):
        assert_near(layer.train(training)(x), masked_ffn(layer, x))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("center", ["off", "mean", "learnable", "ema"])
def test_a_dropped_channel_contributes_its_centre_and_a_kept_one_itself(center, training):
    layer, x = make_layer(center=center).train(training), make_input()
    y = layer(x)
    c = torch.zeros(F, dtype=x.dtype) if center == "off" else layer.center
    assert_near(y, torch.where(mask_of(layer, x), dense_h(layer, x), c) @ layer.down_proj.weight.T)


def test_a_learnable_centre_collects_the_gradient_of_the_tokens_that_dropped_the_channel():
    layer, x = make_layer(center="learnable"), make_input()
    y = layer(x)
    delta = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    y.backward(delta)
    dropped = ~mask_of(layer, x)
    assert_near(layer.center.grad, ((delta @ layer.down_proj.weight) * dropped).sum((0, 1)))


@pytest.mark.parametrize(("center", "trained"), [("mean", False), ("ema", False), ("learnable", True)])
def test_only_the_learnable_centre_is_a_parameter_and_all_are_saved(center, trained):
    layer = make_layer(center=center)
    assert ("center" in dict(layer.named_parameters())) == trained
    assert "center" in layer.state_dict()


@pytest.mark.parametrize(
    ("settings", "name", "counts_kept"),
    [({"gate_mode": "default_ema"}, "activation_mean", True), ({"center": "ema"}, "center", False)],
)
def test_running_means_follow_their_definition(settings, name, counts_kept):
    layer, x = make_layer(**settings), make_input(shape=(2, 2))
    before = getattr(layer, name).clone()
    layer(x)
    assert torch.equal(getattr(layer, name), before), "an evaluation moved the running mean"
    layer.train()(x)
    h, kept = dense_h(layer, x).reshape(-1, F), mask_of(layer, x).reshape(-1, F)
    counted = kept if counts_kept else ~kept
    assert (counted.sum(0) == 0).any(), "no channel is without tokens, so that case is not tested"
    for channel in range(F):
        values = h[counted[:, channel], channel]
        expected = before[channel] if len(values) == 0 else 0.99 * before[channel] + 0.01 * values.mean()
        assert_near(getattr(layer, name)[channel], expected, 1e-7)


def test_the_default_activation_reaches_the_router_gradient_only():
    layer, x = make_layer(gate_mode="default_ema"), make_input()
    value, grads = layer(x), gradients_of(layer, layer(x).square().sum())
    layer.activation_mean.fill_(30.0)
    assert torch.equal(layer(x), value)
    moved = gradients_of(layer, layer(x).square().sum())
    for name, gradient in grads.items():
        assert torch.equal(gradient, moved[name]) == (not name.startswith("predictor.")), name


# Who trains the predictor


def predictor_gradients(layer):
    return [p.grad for p in layer.predictor.parameters()]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("predictor_grad", "by_lm", "by_aux"), [("lm", True, False), ("aux", False, True), ("both", True, True)]
)
def test_predictor_grad_says_which_loss_trains_the_predictor(form, predictor_grad, by_lm, by_aux):
    layer = make_layer(predictor_form=form, predictor_grad=predictor_grad)
    x = make_input()
    with record_routing(layer) as record:
        y = layer(x)
    layer.zero_grad()
    y.square().sum().backward()
    assert all((g is not None and g.abs().max() > 0) == by_lm for g in predictor_gradients(layer))
    assert len(record.losses) == int(by_aux)
    layer.zero_grad()
    if by_aux:
        record.losses[0].backward()
    assert all((g is not None and g.abs().max() > 0) == by_aux for g in predictor_gradients(layer))


@pytest.mark.parametrize("mode", ["detached", "hard"])
def test_modes_without_a_language_model_gradient_still_have_the_auxiliary_one(mode):
    layer = make_layer(gate_mode=mode)
    with record_routing(layer) as record:
        layer(make_input()).square().sum().backward()
    assert all(g is None or not g.any() for g in predictor_gradients(layer))
    record.losses[0].backward()
    assert all(g.abs().max() > 0 for g in predictor_gradients(layer))


@pytest.mark.parametrize("center", ["off", "learnable"])
@pytest.mark.parametrize("kind", ["kl", "bce"])
def test_the_auxiliary_loss_reaches_the_predictor_and_nothing_else(kind, center):
    layer, x = make_layer(center=center), make_input().requires_grad_()
    with record_routing(layer, loss_kind=kind) as record:
        layer(x)
    gradients = gradients_of(layer, record.losses[0])
    assert x.grad is None
    for name, gradient in gradients.items():
        assert (gradient is not None) == name.startswith("predictor."), name


def test_the_language_model_reaches_x_through_the_router_unless_it_is_detached():
    x = make_input()
    grads = {}
    for predictor_grad in ("lm", "aux"):
        own = x.clone().requires_grad_()
        make_layer(predictor_grad=predictor_grad)(own).square().sum().backward()
        grads[predictor_grad] = own.grad
    frozen = make_layer()
    own = x.clone().requires_grad_()
    masked_ffn(frozen, own, mask_of(frozen, x)).square().sum().backward()
    assert_near(grads["aux"], own.grad)
    assert (grads["lm"] - own.grad).abs().max() > 1e-3


@pytest.mark.parametrize("mode", [mode for mode in ALL_MODES if mode != "hard"])
def test_recording_changes_neither_the_output_nor_the_gradients(mode):
    layer, x = make_layer(gate_mode=mode), make_input()
    y, plain = layer(x), gradients_of(layer, layer(x).square().sum())
    with record_routing(layer) as record:
        recorded_y = layer(x)
    assert torch.equal(recorded_y, y)
    assert_same_gradients(gradients_of(layer, recorded_y.square().sum()), plain)
    layer(x)
    assert record.layers == [0], "a layer reports after the context has ended"


# What is recorded


def test_every_sparse_layer_of_a_model_reports_once_in_order():
    model = torch.nn.Sequential(make_layer(layer=4), torch.nn.Identity(), make_layer(layer=7))
    assert [layer.layer for layer in sparse_layers(model)] == [4, 7]
    with record_routing(model) as record:
        model(make_input())
    assert record.layers == [4, 7]
    assert len(record.losses) == len(record.recalls) == len(record.retained) == len(record.retained_oracle) == 2


@pytest.mark.parametrize("center", ["off", "mean"])
@pytest.mark.parametrize("token_fraction", [1.0, 0.25])
def test_recall_and_retained_energy_are_those_of_a_naive_count(center, token_fraction):
    layer, x = make_layer(center=center), make_input()
    with record_routing(layer, token_fraction=token_fraction) as record:
        layer(x)
    step = round(1 / token_fraction)
    c = 0.0 if center == "off" else layer.center
    energy = energy_of(layer, x, c).reshape(-1, F)[::step]
    kept = mask_of(layer, x).reshape(-1, F)[::step]
    recalls, retained, retained_oracle = [], [], []
    for token_energy, token_kept in zip(energy.tolist(), kept.tolist(), strict=True):
        oracle = set()
        for start in range(0, F, B):
            oracle |= set(sorted(range(start, start + B), key=lambda i: -token_energy[i])[:K])
        chosen = {i for i in range(F) if token_kept[i]}
        total = sum(e**2 for e in token_energy)
        recalls.append(len(chosen & oracle) / len(oracle))
        retained.append(sum(token_energy[i] ** 2 for i in chosen) / total)
        retained_oracle.append(sum(token_energy[i] ** 2 for i in oracle) / total)
    for values, expected in (
        (record.recalls, recalls),
        (record.retained, retained),
        (record.retained_oracle, retained_oracle),
    ):
        assert float(values[0]) == pytest.approx(sum(expected) / len(expected), rel=1e-6)
    assert 0 < float(record.recalls[0]) < 1
    assert float(record.retained[0]) < float(record.retained_oracle[0]) < 1


def test_what_is_recorded_of_a_statistical_selection_is_what_the_layer_reads():
    layer, x = make_layer(gate_mode="stat_topk"), make_input()
    with record_routing(layer, with_loss=False) as record:
        layer(x)
    energy, kept = energy_of(layer, x, 0.0).square(), layer.active_mask(x)
    assert not torch.equal(kept, mask_of(layer, x))
    expected = ((energy * kept).sum(dim=-1) / energy.sum(dim=-1)).mean()
    torch.testing.assert_close(record.retained[0].double(), expected.double(), rtol=1e-5, atol=0)


@pytest.mark.parametrize("kind", ["kl", "bce"])
@pytest.mark.parametrize("scope", ["all", "selected"])
@pytest.mark.parametrize("center", ["off", "mean"])
def test_the_recorded_loss_compares_the_logits_with_the_true_energies(kind, scope, center):
    layer, x = make_layer(center=center), make_input()
    with record_routing(layer, loss_kind=kind, scope=scope) as record:
        layer(x)
    z = layer.logits(x).unflatten(-1, (-1, B))
    energy = energy_of(layer, x, 0.0 if center == "off" else layer.center).unflatten(-1, (-1, B))
    keep = mask_of(layer, x).unflatten(-1, (-1, B)) if scope == "selected" else torch.ones_like(z, dtype=torch.bool)
    if kind == "kl":
        q = energy.square() * keep / (energy.square() * keep).sum(-1, keepdim=True)
        log_p = z - torch.where(keep, z, torch.tensor(-1e30, dtype=z.dtype)).logsumexp(-1, keepdim=True)
        expected = torch.where(q > 0, q * (q.log() - log_p), 0).sum(-1).mean()
    else:
        oracle = bank_topk_mask_reference(energy.flatten(-2), bank_size=B, active_per_bank=K).unflatten(-1, (-1, B))
        p = torch.sigmoid(z - z.sort(-1, descending=True).values[..., K - 1 : K])
        expected = -(torch.where(oracle, p, 1 - p).log() * keep).mean()
    assert_near(record.losses[0], expected, 1e-7)


@pytest.mark.parametrize("part", ["loss", "statistics"])
def test_what_is_not_wanted_is_not_recorded(part):
    layer = make_layer()
    with record_routing(layer, **{f"with_{part}": False}) as record:
        layer(make_input())
    assert len(record.losses) == (part != "loss")
    for values in (record.recalls, record.retained, record.retained_oracle):
        assert len(values) == (part != "statistics")


# Compilation and checkpointing


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"predictor_form": "linear", "center": "learnable", "bias": True},
        {"gate_mode": "stat_topk"},
        {"gate_mode": "sigmoid", "gate_norm": "bank_mean_1", "h_grad": "straight"},
        {"gate_mode": "default_ema"},
        {"active_per_bank": B},
    ],
    ids=str,
)
def test_the_compiled_layer_equals_the_eager_one_forward_and_backward(settings):
    torch._dynamo.reset()
    eager = make_layer(torch.float32, **settings).train()
    compiled_layer = copy.deepcopy(eager)
    compiled = torch.compile(compiled_layer, fullgraph=True, backend="aot_eager")
    x, delta = make_input(torch.float32).requires_grad_(), make_input(torch.float32) + 1
    compiled_x = x.detach().clone().requires_grad_()
    y, compiled_y = eager(x), compiled(compiled_x)
    torch.testing.assert_close(compiled_y, y, rtol=1e-5, atol=1e-5)
    expected = gradients_of(eager, (y * delta).sum())
    assert_same_gradients(gradients_of(compiled_layer, (compiled_y * delta).sum()), expected, 1e-4)
    torch.testing.assert_close(compiled_x.grad, x.grad, rtol=1e-4, atol=1e-4)
    for name, buffer in eager.named_buffers():
        torch.testing.assert_close(dict(compiled_layer.named_buffers())[name], buffer)


@pytest.mark.parametrize("recording", [False, True])
@pytest.mark.parametrize(
    "settings", [{}, {"predictor_form": "linear"}, {"center": "ema"}, {"gate_mode": "default_ema"}], ids=str
)
def test_gradient_checkpointing_changes_no_gradient_and_no_running_mean(settings, recording):
    found = []
    for run in (lambda layer, x: layer(x), lambda layer, x: checkpoint(layer, x, use_reentrant=False)):
        layer, x = make_layer(**settings).train(), make_input().requires_grad_()
        with record_routing(layer) if recording else torch.enable_grad() as record:
            loss = run(layer, x).square().sum()
            if recording:
                loss = loss + sum(record.losses)
            gradients = gradients_of(layer, loss)
        found.append((gradients | {"x": x.grad}, dict(layer.named_buffers())))
    (plain, plain_buffers), (checkpointed, checkpointed_buffers) = found
    assert_same_gradients(checkpointed, plain, 1e-12)
    assert all(torch.equal(checkpointed_buffers[name], buffer) for name, buffer in plain_buffers.items())


@pytest.mark.parametrize("form", FORMS)
def test_a_bfloat16_layer_is_routed_like_its_float64_copy(form):
    layer, x = make_layer(torch.bfloat16, predictor_form=form), make_input(torch.bfloat16, (4, 8))
    exact = copy.deepcopy(layer).double()
    assert layer(x).dtype == torch.bfloat16
    assert torch.equal(layer.active_mask(x), exact.active_mask(x.double()))
    assert (layer(x).double() - exact(x.double())).norm() <= 0.02 * exact(x.double()).norm()


def test_autocast_changes_no_selection():
    layer, x = make_layer(torch.float32), make_input(torch.float32, (4, 8))
    plain = layer.active_mask(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.active_mask(x), plain)
        assert layer(x).dtype == torch.bfloat16
