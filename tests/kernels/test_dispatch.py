"""Which kernel runs and why; packing that leaves parameters, training and checkpoints as they are."""

import copy
import os
import subprocess
import sys
import warnings

import pytest
import torch
from kernels.kernel_cases import Case, make_input, make_layer

from bankwise import SparsityConfig
from bankwise.errors import KernelError, RoutingError
from bankwise.ffn import SparseSwiGLU, bank_topk_mask, record_routing
from bankwise.ffn.bank import cut_banks
from bankwise.kernels import dispatch
from bankwise.kernels.cpu import crossover

pytestmark = pytest.mark.usefixtures("no_grad")


@pytest.fixture
def no_grad():
    with torch.no_grad():
        yield


def reference(layer, x):
    return layer.down_proj(layer._gate(layer.dense_activation(x), layer.logits(x)))


def test_evaluation_without_gradients_uses_the_operator_and_nothing_else_does(monkeypatch):
    layer, x = make_layer(Case()), make_input(Case())
    expected = reference(layer, x)
    with torch.enable_grad():
        assert torch.equal(layer(x), expected)
    assert layer.packed is None
    layer.train()
    layer(x)
    assert layer.packed is None
    layer.eval()
    torch.testing.assert_close(layer(x), expected)
    assert layer.packed is not None
    monkeypatch.setenv("BANKWISE_KERNEL", "reference")
    torch.testing.assert_close(layer(x), expected)
    assert dispatch.choose(layer, x) == ("reference", "BANKWISE_KERNEL=reference")


@pytest.mark.parametrize("is_packed", [False, True])
def test_a_predictor_put_in_the_place_of_the_layers_own_is_asked(is_packed):
    layer, x = make_layer(Case()), make_input(Case())
    if is_packed:
        layer(x)
    own = layer.predictor

    class Opposite(torch.nn.Module):
        def forward(self, x):
            return -own(x)

    before = layer(x)
    layer.predictor = Opposite()
    assert torch.equal(layer(x), reference(layer, x))
    assert not torch.allclose(layer(x), before)
    assert "replaced by Opposite" in dispatch.choose(layer, x).reason
    layer.predictor = own
    torch.testing.assert_close(layer(x), before)


def test_packed_parameters_are_views_with_the_same_values():
    layer = make_layer(Case(hidden=50))
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    parameters = dict(layer.named_parameters())
    layer(make_input(Case(hidden=50)))
    assert all(parameters[name] is value for name, value in layer.named_parameters())
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name])
    start = layer.packed.weights_F3P.untyped_storage().data_ptr()
    for linear in (layer.gate_proj, layer.up_proj, layer.down_proj):
        assert linear.weight.untyped_storage().data_ptr() == start


def test_changed_weights_are_seen_however_they_change():
    layer, x = make_layer(Case()), make_input(Case())
    other = make_layer(Case(seed=5))
    layer(x)
    layer.down_proj.weight.data.mul_(2)
    layer.predictor.expand.weight.data.neg_()
    torch.testing.assert_close(layer(x), reference(layer, x))
    layer.load_state_dict(other.state_dict())
    torch.testing.assert_close(layer(x), reference(other, x))
    layer.up_proj.weight = torch.nn.Parameter(torch.randn(192, 64))
    torch.testing.assert_close(layer(x), reference(layer, x))
    layer.to(torch.bfloat16)
    layer(x.bfloat16())
    assert layer.packed.weights_F3P.dtype == torch.bfloat16


def test_a_copy_of_a_packed_layer_stands_alone():
    layer, x = make_layer(Case()), make_input(Case())
    before = layer(x)
    twin = copy.deepcopy(layer)
    layer.gate_proj.weight.zero_()
    assert torch.equal(twin(x), before)


def test_training_gets_ordinary_weights_back():
    layer, x = make_layer(Case()), make_input(Case())
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    layer(x)
    layer.train()
    assert layer.packed is None
    for name, value in layer.state_dict().items():
        assert value.is_contiguous()
        assert torch.equal(value, before[name])
    with torch.enable_grad():
        layer(x).sum().backward()
    assert layer.down_proj.weight.grad.is_contiguous()


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"gate_mode": "sigmoid"}, "gate_mode='sigmoid' scales the kept channels"),
        ({"gate_mode": "stat_topk"}, "gate_mode='stat_topk'"),
        ({"gate_mode": "affine"}, "gate_mode='affine'"),
        ({"gate_mode": "relu_rms"}, "gate_mode='relu_rms'"),
        ({"center": "mean"}, "center='mean' lets dropped channels contribute"),
    ],
)
def test_what_the_operator_cannot_do_runs_the_reference_or_raises(settings, reason, monkeypatch):
    layer = SparseSwiGLU(64, 192, SparsityConfig(predictor_rank=16, **settings), 3).eval()
    x = make_input(Case())
    choice = dispatch.choose(layer, x)
    assert choice.kernel == "reference"
    assert reason in choice.reason
    assert torch.equal(layer(x), reference(layer, x))
    monkeypatch.setenv("BANKWISE_KERNEL", "cpu")
    with pytest.raises(KernelError, match="BANKWISE_KERNEL=cpu, but the CPU operators cannot run layer 3"):
        layer(x)


@pytest.mark.parametrize("mode", ["ste_unit", "hard", "detached", "default_ema"])
def test_every_unit_gate_runs_in_the_operator(mode):
    layer = SparseSwiGLU(64, 192, SparsityConfig(predictor_rank=16, gate_mode=mode), 0).eval()
    x = make_input(Case())
    expected = reference(layer, x)
    torch.testing.assert_close(layer(x), expected)
    assert layer.packed is not None


def test_reasons_of_inputs_and_states(monkeypatch):
    layer = make_layer(Case())
    assert "9 tokens at once" in dispatch.choose(layer, torch.zeros(9, 64)).reason
    assert "torch.float64" in dispatch.choose(layer, torch.zeros(1, 64, dtype=torch.float64)).reason
    assert "on meta" in dispatch.choose(layer, torch.zeros(1, 64, device="meta")).reason
    with torch.autocast("cpu", torch.bfloat16):
        assert "autocast" in dispatch.choose(layer, torch.zeros(1, 64)).reason
    hook = layer.up_proj.register_forward_hook(lambda *_: None)
    assert "hooked" in dispatch.choose(layer, torch.zeros(1, 64)).reason
    hook.remove()
    assert dispatch.choose(layer, torch.zeros(1, 64)).kernel == "cpu"
    layer.active_per_bank = 64
    assert "equals the dense model" in dispatch.choose(layer, torch.zeros(1, 64)).reason
    monkeypatch.setenv("BANKWISE_KERNEL", "cpu")
    assert dispatch.choose(layer, torch.zeros(1, 64)).kernel == "cpu"
    monkeypatch.setenv("BANKWISE_KERNEL", "gpu")
    with pytest.raises(KernelError, match="BANKWISE_KERNEL=gpu is not known"):
        dispatch.choose(layer, torch.zeros(1, 64))


@pytest.fixture
def crossover_file(monkeypatch, tmp_path):
    monkeypatch.setenv("BANKWISE_CACHE", str(tmp_path))
    path = tmp_path / "kernels/crossover.json"
    path.parent.mkdir()
    yield path
    crossover._measured.cache_clear()


def test_above_the_measured_crossover_the_reference_runs(crossover_file, monkeypatch):
    layer, x = make_layer(Case(tokens=5)), make_input(Case(tokens=5))
    assert crossover.crossover(layer) == (8, "default")
    crossover.save(layer, 4)
    assert crossover.crossover(layer) == (4, "measured")
    assert dispatch.choose(layer, x).reason == "5 tokens at once; the masked dense path is faster above 4"
    assert torch.equal(layer(x), reference(layer, x))
    assert layer.packed is None
    layer(x[:4])
    assert layer.packed.max_tokens == 4
    assert torch.equal(layer(x), reference(layer, x))
    # Another dtype or another shape was not measured, and a kernel that is asked for by name takes all it can.
    assert crossover.crossover(make_layer(Case(dtype=torch.bfloat16))).source == "default"
    assert crossover.crossover(make_layer(Case(hidden=65))).source == "default"
    monkeypatch.setenv("BANKWISE_KERNEL", "cpu")
    forced = make_layer(Case())
    forced(x)
    assert forced.packed.max_tokens == 8


def test_the_override_goes_before_the_measurement(crossover_file, monkeypatch):
    layer = make_layer(Case())
    crossover.save(layer, 4)
    monkeypatch.setenv("BANKWISE_MAX_TOKENS", "2")
    assert crossover.crossover(layer) == (2, "BANKWISE_MAX_TOKENS")
    assert dispatch.choose(layer, torch.zeros(2, 64)).kernel == "cpu"
    assert dispatch.choose(layer, torch.zeros(3, 64)).kernel == "reference"
    for wrong in ("0", "9", "two", "-1"):
        monkeypatch.setenv("BANKWISE_MAX_TOKENS", wrong)
        with pytest.raises(KernelError, match=f"BANKWISE_MAX_TOKENS={wrong} must be a number from 1 to 8"):
            layer(torch.zeros(1, 64))


@pytest.mark.parametrize("text", ["{", "[4]", '{"a layer": 9}', '{"a layer": "4"}'])
def test_a_damaged_file_of_crossovers_is_named(crossover_file, text):
    crossover_file.write_text(text)
    with pytest.raises(KernelError, match=r"crossover.json .*delete it, and measure again"):
        crossover.crossover(make_layer(Case()))


def test_recording_sees_a_packed_layer_as_before():
    layer, x = make_layer(Case(tokens=4)), make_input(Case(tokens=4))
    with record_routing(layer, with_loss=False) as before:
        layer(x)
    layer(x)
    assert layer.packed is not None
    with record_routing(layer, with_loss=False) as after:
        layer(x)
    torch.testing.assert_close(after.recalls, before.recalls)
    torch.testing.assert_close(after.retained, before.retained)


def test_training_routes_with_the_operator_and_keeps_its_bits(monkeypatch):
    layer, x = make_layer(Case(tokens=300)), make_input(Case(tokens=300))
    logits, cuts = layer.logits(x), []
    for kernel in ("reference", "cpu"):
        monkeypatch.setenv("BANKWISE_KERNEL", kernel)
        cuts.append(cut_banks(logits, bank_size=64, active_per_bank=16))
    assert torch.equal(cuts[0].mask_TF, cuts[1].mask_TF)
    assert torch.equal(cuts[0].threshold_TN1, cuts[1].threshold_TN1)
    logits = torch.full((2, 64), float("nan"))
    with pytest.raises(RoutingError, match="128 of 128 router logits are not finite"):
        bank_topk_mask(logits)


NO_COMPILER = """
import sys, warnings
import torch
sys.path.insert(0, sys.argv[1])
from kernels.kernel_cases import Case, make_input, make_layer
from bankwise.kernels import dispatch
layers, x = [make_layer(Case()) for _ in range(2)], make_input(Case())
with torch.no_grad(), warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    for layer in layers:
        layer(x), layer(x)
        assert layer.packed is None
print([str(warning.message) for warning in seen if "bankwise" in str(warning.message)])
"""


def test_without_a_compiler_the_reference_runs_and_says_so_once(request, tmp_path):
    finished = subprocess.run(
        [sys.executable, "-c", NO_COMPILER, str(request.config.rootpath / "tests")],
        env=os.environ | {"CXX": "no-such-compiler", "BANKWISE_CACHE": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("slower PyTorch reference: no C++ compiler (no-such-compiler)") == 1


def test_operators_that_run_give_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        make_layer(Case())(make_input(Case()))
