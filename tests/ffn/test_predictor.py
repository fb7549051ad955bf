"""The predictor: logits against their formulas, the hand-written backward against autograd, float32 throughout."""

import pytest
import torch

from bankwise.ffn import Predictor
from bankwise.ffn.predictor import ExpectedEnergy, expected_energy_reference

D, F, RANK = 10, 16, 6


def make_predictor(form, dtype=torch.float64):
    torch.manual_seed(3)
    predictor = Predictor(D, F, RANK, form)
    for parameter in predictor.parameters():
        torch.nn.init.normal_(parameter, std=0.7)
    return predictor.to(dtype)


def formula(predictor, x):
    """z written from the parameters alone."""
    reduce_RD, expand_FR, bias_F = predictor.reduce.weight, predictor.expand.weight, predictor.expand.bias
    if predictor.form == "linear":
        return torch.einsum("...d,rd,fr->...f", x, reduce_RD, expand_FR) + bias_F
    half = RANK // 2
    gate = torch.einsum("...d,rd,fr->...f", x, reduce_RD[:half], expand_FR[:, :half]) + predictor.gate_offset
    up = torch.einsum("...d,rd,fr->...f", x, reduce_RD[half:], expand_FR[:, half:]) + predictor.up_offset
    gate_energy = torch.sigmoid(gate) ** 2 * (gate**2 + predictor.gate_log_noise.exp())
    return torch.log(gate_energy * (up**2 + predictor.up_log_noise.exp())) + bias_F


def energy_inputs(tokens, dtype=torch.float64):
    generator = torch.Generator().manual_seed(5)
    shapes = [(tokens, F), (tokens, F), (F,), (F,)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("tokens", [0, 1, 7, 600])
def test_expected_energy_equals_its_definition_and_its_gradients(tokens):
    inputs = energy_inputs(tokens)
    fast, slow = ExpectedEnergy.apply(*inputs), expected_energy_reference(*inputs)
    torch.testing.assert_close(fast, slow)
    weight = torch.randn(tokens, F, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    actual = torch.autograd.grad((fast * weight).sum(), inputs)
    expected = torch.autograd.grad((slow * weight).sum(), inputs)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_expected_energy_passes_gradcheck():
    assert torch.autograd.gradcheck(ExpectedEnergy.apply, energy_inputs(3))


def test_expected_energy_is_the_log_of_the_expected_squares():
    gate, up, gate_log_noise, up_log_noise = (values.detach() for values in energy_inputs(4))
    gate_energy = torch.sigmoid(gate) ** 2 * (gate**2 + gate_log_noise.exp())
    expected = torch.log(gate_energy) + torch.log(up**2 + up_log_noise.exp())
    torch.testing.assert_close(expected_energy_reference(gate, up, gate_log_noise, up_log_noise), expected)


def test_without_noise_the_energy_is_that_of_the_rebuilt_activation():
    gate, up, *_ = (values.detach() for values in energy_inputs(4))
    silent = torch.full((F,), -60.0, dtype=torch.float64)
    activation = torch.nn.functional.silu(gate) * up
    torch.testing.assert_close(expected_energy_reference(gate, up, silent, silent), 2 * activation.abs().log())


def test_a_confidently_closed_gate_stays_finite_in_float32():
    gate, up, *noise = energy_inputs(2, torch.float32)
    logits = ExpectedEnergy.apply(gate - 200, up, *noise)
    assert logits.isfinite().all()
    assert (logits < -350).all()


@pytest.mark.parametrize("form", ["linear", "gated_product"])
@pytest.mark.parametrize("leading", [(), (4,), (2, 3), (2, 1, 3)], ids=str)
def test_logits_follow_the_formula_for_any_leading_shape(form, leading):
    predictor = make_predictor(form)
    x = torch.randn(*leading, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    if leading == () and form == "gated_product":
        x = x[None]
    torch.testing.assert_close(predictor(x), formula(predictor, x))


@pytest.mark.parametrize("form", ["linear", "gated_product"])
def test_every_gradient_is_that_of_the_formula(form):
    predictor = make_predictor(form)
    x = torch.randn(2, 3, D, generator=torch.Generator().manual_seed(2), dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 3, F, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    wanted = [x, *predictor.parameters()]
    actual = torch.autograd.grad((predictor(x) * weight).sum(), wanted)
    expected = torch.autograd.grad((formula(predictor, x) * weight).sum(), wanted)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("form", ["linear", "gated_product"])
@pytest.mark.parametrize("leading", [(0,), (2, 0)], ids=str)
def test_zero_tokens_give_zero_rows(form, leading):
    assert make_predictor(form)(torch.zeros(*leading, D, dtype=torch.float64)).shape == (*leading, F)


@pytest.mark.parametrize("form", ["linear", "gated_product"])
def test_a_bfloat16_model_is_routed_in_float32(form):
    predictor = make_predictor(form, torch.bfloat16)
    x = torch.randn(5, D, generator=torch.Generator().manual_seed(1)).bfloat16()
    logits = predictor(x)
    assert logits.dtype == torch.float32
    exact = formula(predictor.double(), x.double())
    torch.testing.assert_close(logits.double(), exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", ["linear", "gated_product"])
def test_autocast_does_not_reach_the_logits(form):
    predictor = make_predictor(form, torch.float32)
    x = torch.randn(5, D, generator=torch.Generator().manual_seed(1))
    plain = predictor(x)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = predictor(x)
    assert under_autocast.dtype == torch.float32
    assert torch.equal(under_autocast, plain)


def test_both_forms_hold_the_same_matrices():
    shapes = {"reduce.weight": (RANK, D), "expand.weight": (F, RANK), "expand.bias": (F,)}
    for form in ("linear", "gated_product"):
        state = {name: tuple(value.shape) for name, value in make_predictor(form).state_dict().items()}
        assert state.items() >= shapes.items()
