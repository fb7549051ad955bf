"""When the Triton kernels run, what they refuse, and whole models through them."""

import warnings

import pytest
import torch
from kernels.kernel_cases import Case, make_input, make_layer
from kernels.triton_cases import DEVICE

import bankwise
from bankwise import SparsityConfig
from bankwise.cli import main
from bankwise.errors import KernelError
from bankwise.ffn import SparseSwiGLU, record_routing, sparse_layers
from bankwise.inference import prepare
from bankwise.kernels import dispatch
from bankwise.kernels.triton import support

GREEDY = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None, "pad_token_id": 258}


@pytest.fixture
def forced(monkeypatch):
    monkeypatch.setenv("BANKWISE_KERNEL", "triton")


@pytest.fixture
def no_kernels(monkeypatch):
    monkeypatch.setattr(support, "unavailable", lambda: "no CUDA device is available")


def case_on_device(**changes):
    case = Case(**changes)
    return make_layer(case).to(DEVICE), make_input(case).to(DEVICE)


def reference(layer, x):
    return layer.down_proj(layer._gate(layer.dense_activation(x), layer.logits(x)))


@torch.no_grad()
def test_the_kernels_run_when_asked_for(forced):
    layer, x = case_on_device(tokens=3)
    assert dispatch.choose(layer, x) == ("triton", support.device_name())
    expected = reference(layer, x)
    torch.testing.assert_close(layer(x), expected)
    assert (layer.packed.kernel, layer.packed.max_tokens) == ("triton", 8)
    layer.gate_proj.weight.mul_(2)
    torch.testing.assert_close(layer(x), reference(layer, x))
    more = make_input(Case(tokens=9)).to(DEVICE)
    torch.testing.assert_close(layer(more), reference(layer, more))


@torch.no_grad()
def test_the_choice_without_a_wish():
    layer, x = case_on_device()
    layer(x)
    if DEVICE == "cuda":
        assert (layer.packed.kernel, layer.packed.max_tokens) == ("triton", support.DECODE_TOKENS)
        five = x.expand(5, -1)
        assert dispatch.choose(layer, five).reason == "5 tokens at once; the masked dense path is faster above 4"
    else:
        assert layer.packed.kernel == "cpu"
    assert support.decode_limits(forced=False).max_tokens == support.DECODE_TOKENS < support.MAX_TOKENS


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"gate_mode": "sigmoid"}, "gate_mode='sigmoid' scales the kept channels"),
        ({"center": "mean"}, "center='mean' lets dropped channels contribute"),
        ({"bank_size": 96}, "bank_size=96 is above 64"),
    ],
)
@torch.no_grad()
def test_what_the_kernels_cannot_do_raises(settings, reason, forced):
    layer = SparseSwiGLU(64, 192, SparsityConfig(predictor_rank=16, **settings), 3).eval().to(DEVICE)
    refusal = f"BANKWISE_KERNEL=triton, but the Triton kernels cannot run layer 3: {reason}"
    with pytest.raises(KernelError, match=refusal):
        layer(make_input(Case()).to(DEVICE))


@torch.no_grad()
def test_dtypes_and_states(forced):
    for dtype in support.DTYPES:
        layer, x = case_on_device(dtype=dtype)
        assert dispatch.choose(layer, x).kernel == "triton"
        with pytest.raises(KernelError, match="supported: all float32 or all bfloat16 or all float16"):
            dispatch.choose(layer, x.double())
    with torch.autocast(DEVICE, torch.bfloat16), pytest.raises(KernelError, match="autocast is on"):
        dispatch.choose(layer, x)
    with pytest.raises(KernelError, match="the input is on meta"):
        dispatch.choose(layer, x.to("meta"))
    with record_routing(layer):
        assert dispatch.choose(layer, x) == ("reference", "routing statistics are being recorded")
    for mode in dispatch.UNIT_GATES:
        layer = SparseSwiGLU(64, 192, SparsityConfig(predictor_rank=16, gate_mode=mode), 0).eval().to(DEVICE)
        assert dispatch.choose(layer, make_input(Case()).to(DEVICE)).kernel == "triton"


class OnCuda:
    """What the choice looks at in an input, on a device that need not be there."""

    device = torch.device("cuda")

    def __init__(self, tokens, dtype=torch.float32):
        self.shape, self.dtype = (tokens, 64), dtype

    def numel(self):
        return self.shape[0] * self.shape[1]


def test_the_choice_for_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(support, "unavailable", lambda: None)
    monkeypatch.setattr(support, "device_name", lambda: "some GPU")
    layer = make_layer(Case())
    assert dispatch.choose(layer, OnCuda(4)) == ("triton", "some GPU")
    assert dispatch.choose(layer, OnCuda(5)).reason == "5 tokens at once; the masked dense path is faster above 4"
    assert "torch.float32, torch.float64" in dispatch.choose(layer, OnCuda(1, torch.float64)).reason
    layer.active_per_bank = 64
    assert "equals the dense model" in dispatch.choose(layer, OnCuda(1)).reason
    layer.active_per_bank = 16
    monkeypatch.setenv("BANKWISE_KERNEL", "cpu")
    with pytest.raises(KernelError, match="the CPU operators cannot run layer 0: the input is on cuda"):
        dispatch.choose(layer, OnCuda(1))
    monkeypatch.setenv("BANKWISE_KERNEL", "triton")
    assert dispatch.choose(layer, OnCuda(8)).kernel == "triton"


def test_the_gate_for_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(support, "unavailable", lambda: None)
    half, single, double = torch.bfloat16, torch.float32, torch.float64
    assert support.runs_gate(None, "cuda", half, single, 64)
    assert not support.runs_gate("reference", "cuda", half, single, 64)
    assert not support.runs_gate(None, "cpu", half, single, 64)
    for unsupported in ((double, double, 64), (half, half, 64), (half, single, 65)):
        assert not support.runs_gate(None, "cuda", *unsupported)
        with pytest.raises(KernelError, match="BANKWISE_KERNEL=triton, but the fused gate cannot run: "):
            support.runs_gate("triton", "cuda", *unsupported)


def test_a_gpu_without_kernels_warns_once(monkeypatch):
    monkeypatch.setattr(support, "unavailable", lambda: "triton is not installed")
    support._warn_once.cache_clear()
    dispatch._warn_once.cache_clear()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(2):
            assert dispatch.choose(make_layer(Case()), OnCuda(1)) == ("reference", "triton is not installed")
            assert not support.runs_gate(None, "cuda", torch.float32, torch.float32, 64)
    assert sorted(str(warning.message) for warning in seen) == [
        "bankwise decodes with the slower PyTorch reference: triton is not installed",
        "bankwise trains with the slower PyTorch gate: triton is not installed",
    ]


@torch.no_grad()
def test_without_a_gpu_the_reason_is_given(forced, no_kernels, capsys):
    layer, x = case_on_device()
    with pytest.raises(KernelError, match="cannot run layer 0: "):
        layer(x)
    assert dispatch.operators_for(torch.device(DEVICE)) == ("reference", "no CUDA device is available")
    assert main(["env"]) == 0
    assert "gpu kernel    none: no CUDA device is available" in capsys.readouterr().out
    layer.train()
    with pytest.raises(KernelError, match="the fused gate cannot run: no CUDA device is available"):
        layer(x)


def test_env_names_the_device(monkeypatch, capsys):
    lines = {}
    for kernel in ("auto", "triton", "cpu", "reference"):
        monkeypatch.setenv("BANKWISE_KERNEL", kernel)
        assert main(["env"]) == 0
        lines[kernel] = capsys.readouterr().out.splitlines()[-2:]
    assert f"triton: {support.device_name()}; up to 4 tokens at once" in lines["auto"][1]
    assert f"triton: {support.device_name()}; up to 8 tokens at once" in lines["triton"][1]
    assert lines["triton"][0] == "kernel        none: BANKWISE_KERNEL=triton"
    assert lines["cpu"][1] == "gpu kernel    none: BANKWISE_KERNEL=cpu"
    assert all("reference (PyTorch, masked dense)" in line for line in lines["reference"])


@pytest.fixture(params=["llama", "qwen3"])
def model(request, tiny_dense, tokens):
    form = "linear" if request.param == "qwen3" else "gated_product"
    sparsity = SparsityConfig(predictor_rank=32, predictor_form=form)
    dense = tiny_dense(request.param, scale=0.15)
    return bankwise.upcycle(dense, sparsity, calibration=tokens(4, 24), progress=False).to(DEVICE)


def test_a_whole_model_writes_the_text_of_the_reference(model, tokens, monkeypatch):
    ids = tokens(1, 12, seed=3).to(DEVICE)
    monkeypatch.setenv("BANKWISE_KERNEL", "reference")
    text = model.generate(ids, **GREEDY)
    monkeypatch.setenv("BANKWISE_KERNEL", "triton")
    assert prepare(model) == ["2 x sparse feed-forward, packed"]
    assert prepare(model) == ["2 x feed-forward packed already"]
    assert torch.equal(model.generate(ids, **GREEDY), text)
    assert torch.equal(model.generate(ids, cache_implementation="static", **GREEDY), text)
    assert all(layer.packed.kernel == "triton" for layer in sparse_layers(model))


def test_int8_weights_are_refused(model, forced):
    with pytest.raises(KernelError, match="weights='int8' needs the CPU operators"):
        prepare(model, weights="int8")


def test_a_whole_model_trains_as_with_the_reference(model, tokens, monkeypatch):
    ids = tokens(2, 12, seed=3).to(DEVICE)
    gradients = []
    for kernel in ("reference", "triton"):
        monkeypatch.setenv("BANKWISE_KERNEL", kernel)
        model.train().zero_grad()
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append({name: value.grad.clone() for name, value in model.named_parameters()})
    for name, exact in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], exact, rtol=1e-4, atol=1e-6)
