"""The fused CPU operators of a training step against their definitions in PyTorch, and where they run."""

import pytest
import torch
from kernels.kernel_cases import check_energy, check_logit_loss, check_unit_gate
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint

from bankwise import SparsityConfig
from bankwise.errors import RoutingError
from bankwise.ffn import SparseSwiGLU, record_routing
from bankwise.ffn.precision import bf16_router_products
from bankwise.kernels import dispatch
from bankwise.kernels.cpu import library
from bankwise.models.lm_loss import IGNORED_LABEL, chunked_lm_loss

HIDDEN, CHANNELS, TOKENS = 48, 320, 200


@pytest.fixture(params=library.available_isas())
def isa(request):
    with library.forced_isa(request.param):
        yield request.param


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer_and_input(**settings):
    torch.manual_seed(0)
    layer = SparseSwiGLU(HIDDEN, CHANNELS, SparsityConfig(predictor_rank=16, **settings), 0)
    with torch.no_grad():
        for value in layer.predictor.parameters():
            value.copy_(torch.randn(value.shape) * value.shape[-1] ** -0.5)
    return layer, random(2, TOKENS // 2, HIDDEN, seed=1)


def gradients(layer, x, *, autocast=False, run=None):
    """Output and gradients of one step, by name; the auxiliary loss is part of it."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    with record_routing(layer, with_statistics=False, token_fraction=1 / 4) as record:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = layer(x) if run is None else run(layer, x)
        loss = (y.float() * random(*y.shape, seed=2)).sum()
        if record.losses:
            loss = loss + record.losses[0]
        loss.backward()
    found = {name: value.grad.clone() for name, value in layer.named_parameters() if value.grad is not None}
    return {"y": y.detach(), "x": x.grad, **found}


def relative_errors(actual, expected):
    assert actual.keys() == expected.keys()
    return {name: float((actual[name] - expected[name]).norm() / expected[name].norm()) for name in expected}


def test_logits_and_their_gradients_agree_with_float64(isa):
    for seed in range(40):
        check_energy(seed)


def test_the_gate_selects_the_same_channels_and_its_gradients_agree_with_float64(isa):
    for seed in range(60):
        check_unit_gate(seed)


def test_the_loss_of_logits_and_its_gradient_agree_with_float64(isa):
    for seed in range(60):
        check_logit_loss(seed)


def test_rounded_gradients_are_the_same_numbers_in_bfloat16(isa):
    gate, up, dz = (random(130, 77, seed=seed) for seed in range(3))
    gate[3, 5] = float("nan")
    vectors = [random(77, seed=seed) for seed in range(4)]
    exact = torch.ops.bankwise.energy_logits_backward(dz, gate, up, *vectors, False)
    rounded = torch.ops.bankwise.energy_logits_backward(dz, gate, up, *vectors, True)
    for actual, expected in zip(rounded[:2], exact[:2], strict=True):
        assert torch.equal(actual.nan_to_num(7.0), expected.bfloat16().nan_to_num(7.0))
    for actual, expected in zip(rounded[2:], exact[2:], strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_what_is_not_finite_stays_so(isa, bad):
    zeros = torch.zeros(64)
    for which in (0, 1):
        values = torch.zeros(2, 2, 64)
        values[which, 1, 9] = bad
        logits = torch.ops.bankwise.energy_logits(values[0], values[1], *[zeros] * 5)
        assert int((~logits.isfinite()).sum()) == 1
        assert not logits[1, 9].isfinite()
    with pytest.raises(RoutingError, match="1 of 128 router logits are not finite"):
        dispatch.unit_gate(torch.ones(2, 64), values[1], 64, 16, 1.0, 1.0)


def test_energies_at_the_ends_of_float32(isa):
    gate = torch.tensor([[1e12, -80.0, 0.0, 1e-20, 0.0]])
    up = torch.tensor([[1e12, 1e-12, 1e9, 0.0, 0.0]])
    log_noise = torch.tensor([-60.0, -40.0, -60.0, 60.0, -200.0])
    zeros = torch.zeros(5)
    actual = torch.ops.bankwise.energy_logits(gate, up, zeros, zeros, log_noise, log_noise, zeros)
    noise = log_noise.double().exp()
    exact = (gate.double().square() + noise).log() + 2 * torch.nn.functional.logsigmoid(gate.double())
    exact += (up.double().square() + noise).log()
    torch.testing.assert_close(actual[:, :4].double(), exact[:, :4], rtol=1e-6, atol=1e-6)
    assert actual[0, 4] == float("-inf")


def test_results_do_not_depend_on_the_number_of_threads(two_threads):
    gate, up, dz = (random(700, 192, seed=seed) for seed in range(3))
    vectors = [random(192, seed=seed) for seed in range(5)]
    labels = torch.arange(700) % 192

    def all_results():
        logits = torch.ops.bankwise.energy_logits(gate, up, *vectors)
        cut = torch.ops.bankwise.unit_gate_cpu(gate, logits, 64, 16, 1.0)
        back = torch.ops.bankwise.unit_gate_cpu_backward(dz, gate, logits, *cut[1:], 64, 1.0, True, True)
        results = [logits, *cut, *back, *torch.ops.bankwise.energy_logits_backward(dz, gate, up, *vectors[:4], False)]
        losses = torch.ops.bankwise.logit_loss(gate.clone(), up, labels, 0.1, 1.0, True)
        return [*results, losses]

    many = all_results()
    torch.set_num_threads(1)
    assert all(torch.equal(one, two) for one, two in zip(all_results(), many, strict=True))


@pytest.mark.parametrize("form", ["gated_product", "linear"])
@pytest.mark.parametrize("predictor_grad", ["both", "aux", "lm"])
def test_a_training_step_is_that_of_the_reference(form, predictor_grad, monkeypatch):
    layer, x = layer_and_input(predictor_form=form, predictor_grad=predictor_grad)
    actual = gradients(layer, x)
    monkeypatch.setenv("BANKWISE_KERNEL", "reference")
    errors = relative_errors(actual, gradients(layer, x))
    assert max(errors.values()) < 2e-6, errors
    assert errors.keys() >= {"predictor.expand.weight", "predictor.expand.bias", "x"}


def test_a_training_step_under_autocast_is_that_of_the_reference(monkeypatch):
    # The router's products round their inputs to bfloat16 (2^-9) in both; the operators round the results too.
    layer, x = layer_and_input()
    with bf16_router_products():
        actual = gradients(layer, x, autocast=True)
        monkeypatch.setenv("BANKWISE_KERNEL", "reference")
        errors = relative_errors(actual, gradients(layer, x, autocast=True))
    assert max(errors.values()) < 1e-2, errors


@pytest.mark.parametrize("frozen", ["reduce.weight", "expand.weight", "expand.bias", "gate_log_noise"])
def test_frozen_parts_get_no_gradient_and_change_no_other(frozen):
    layer, x = layer_and_input()
    expected = gradients(layer, x)
    layer.predictor.get_parameter(frozen).requires_grad_(False)
    del expected[f"predictor.{frozen}"]
    actual = gradients(layer, x)
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_checkpointing_gives_the_same_bits():
    layer, x = layer_and_input()
    expected = gradients(layer, x)
    actual = gradients(layer, x, run=lambda layer, x: checkpoint(layer, x, use_reentrant=False))
    assert all(torch.equal(actual[name], expected[name]) for name in expected)


def test_rows_that_are_not_contiguous():
    h, z, dy = (random(128, 30, seed=seed) for seed in range(3))
    results = []
    for values in ((h.T, z.T, dy.T), (h.T.contiguous(), z.T.contiguous(), dy.T.contiguous())):
        leaves = [value.detach().requires_grad_() for value in values[:2]]
        dispatch.unit_gate(*leaves, 64, 16, 1.0, 1.0).backward(values[2])
        results.append([leaf.grad for leaf in leaves])
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


def test_the_gate_saves_one_bit_of_mask_for_each_channel():
    saved = []

    def keep(value):
        saved.append(value)
        return value

    h, z = random(64, 640).bfloat16().requires_grad_(), random(64, 640).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        dispatch.unit_gate(h, z, 64, 16, 1.0, 1.0)
    own = [value for value in saved if value.shape != h.shape]
    assert sum(value.nbytes for value in own) == 64 * (640 // 8 + 2 * 4 * 10)


def gate_name(h, z, active=16):
    return dispatch.unit_gate(h.requires_grad_(), z, 64, active, 1.0, 1.0).grad_fn.name()


def test_where_the_operators_run(monkeypatch):
    h, z = random(3, 128), random(3, 128)
    assert gate_name(h, z) == "CpuSteUnitGateBackward"
    assert gate_name(h.bfloat16().detach(), z) == "CpuSteUnitGateBackward"
    for other in ((h.double().detach(), z.double()), (h.half().detach(), z), (h, z, 64)):
        assert gate_name(*other) == "SteUnitGateBackward"
    product = [random(3, 4), random(128, 4), *(random(128) for _ in range(5))]
    assert dispatch.product_logits(*product) is not None
    assert dispatch.product_logits(*(value.double() for value in product)) is None
    loss = random(3, 128), torch.tensor([0, 1, 2]), random(3, 128), 0.1, 1.0, True
    assert dispatch.logit_loss(*loss) is not None
    assert dispatch.logit_loss(loss[0].double(), *loss[1:]) is None
    assert dispatch.logit_loss(loss[0].bfloat16(), *loss[1:]) is None
    monkeypatch.setenv("BANKWISE_KERNEL", "reference")
    assert dispatch.logit_loss(*loss) is None
    assert dispatch.product_logits(*product) is None
    assert gate_name(h, z) == "SteUnitGateBackward"


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_of_logits_that_are_not_finite_is_not_finite(isa, bad):
    logits = random(3, 130)
    logits[1, 77] = bad
    losses = torch.ops.bankwise.logit_loss(logits, random(3, 130, seed=1), torch.tensor([4, 5, 6]), 0.1, 1.0, True)
    assert losses.isfinite().all(-1).tolist() == [True, False, True]
    assert logits.isfinite().all(-1).tolist() == [True, False, True]


def test_a_label_outside_the_vocabulary_is_named():
    with pytest.raises(RuntimeError, match="label 128 is outside the vocabulary of 128"):
        dispatch.logit_loss(random(3, 128), torch.tensor([0, 128, 2]), None, 1.0, 0.0, False)


def test_a_distillation_step_is_that_of_the_reference(monkeypatch):
    hidden, head, taught, teacher_head = (random(*shape, seed=seed) for seed, shape in enumerate(
        [(37, 16), (300, 16), (37, 16), (300, 16)]
    ))  # fmt: skip
    labels = torch.arange(37) * 8
    labels[[0, 9]] = IGNORED_LABEL

    def step():
        leaves = hidden.clone().requires_grad_(), head.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            loss = chunked_lm_loss(
                *leaves, labels, chunk_size=16, ce_weight=0.1, kd_weight=1.0, teacher_TD=taught,
                teacher_head_VD=teacher_head,
            )  # fmt: skip
        loss.total.backward()
        return {"loss": torch.stack(loss).detach(), "hidden": leaves[0].grad, "head": leaves[1].grad}

    actual = step()
    monkeypatch.setenv("BANKWISE_KERNEL", "reference")
    errors = relative_errors(actual, step())
    assert errors["loss"] < 1e-5
    assert max(errors.values()) < 3e-3, errors


def test_all_channels_kept_trains_as_the_dense_layer():
    layer, x = layer_and_input(predictor_grad="aux")
    layer.active_per_bank = layer.bank_size
    assert torch.equal(layer(x), layer.down_proj(layer.dense_activation(x)))


def test_shapes_without_data_are_those_of_the_operators():
    gate, z = random(5, 128), random(5, 128)
    vectors = [random(128) for _ in range(5)]
    cut = torch.ops.bankwise.unit_gate_cpu(gate, z, 64, 16, 1.0)
    calls = [
        (torch.ops.bankwise.energy_logits, (gate, z, *vectors)),
        (torch.ops.bankwise.energy_logits_backward, (z, gate, z, *vectors[:4], True)),
        (torch.ops.bankwise.unit_gate_cpu, (gate, z, 64, 16, 1.0)),
        (torch.ops.bankwise.unit_gate_cpu_backward, (z, gate, z, *cut[1:], 64, 1.0, False, True)),
        (torch.ops.bankwise.logit_loss, (gate, z, torch.arange(5), 0.1, 1.0, True)),
    ]
    for operator, arguments in calls:
        with FakeTensorMode() as mode:
            fake = operator(*(mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in arguments))
        real = operator(*arguments)
        pairs = zip(*((value,) if isinstance(value, torch.Tensor) else value for value in (fake, real)), strict=True)
        for one, other in pairs:
            assert (one.shape, one.dtype) == (other.shape, other.dtype)
