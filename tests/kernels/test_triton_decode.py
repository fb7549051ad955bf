"""The decode kernels: the routing rule bit for bit, and outputs against float64 with the same mask."""

import subprocess
import sys

import pytest
import torch
from kernels.kernel_cases import Case, exact_logits, make_layer
from kernels.triton_cases import (
    DEVICE,
    DTYPES,
    KINDS,
    draws,
    errors,
    packed_case,
    poison,  # noqa: F401
    reference_mask,
    relative_rms,
    select,
)

from bankwise.errors import KernelError, RoutingError
from bankwise.kernels import dispatch
from bankwise.kernels.cpu.packing import pack
from bankwise.kernels.triton import decode

# numpy, in which the interpreter computes, warns of what a GPU does in silence.
pytestmark = [
    pytest.mark.usefixtures("poison"),
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning"),
]


def check(case):
    error, plain = errors(case)
    # A single column may cancel, hence the floor.
    assert error <= max(2 * plain, 2e-6 if case.dtype == torch.float32 else 2e-3), case


@pytest.mark.parametrize("form", ["linear", "gated_product"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 5, 8])
def test_error_is_at_most_twice_that_of_pytorch(tokens, dtype, form):
    check(Case(hidden=100, banks=3, rank=40, tokens=tokens, dtype=dtype, form=form, bias=tokens > 1))


@pytest.mark.parametrize("active", [1, 8, 16, 63, 64])
def test_any_number_of_active_channels(active):
    check(Case(hidden=40, banks=5, active=active, tokens=2))


@pytest.mark.parametrize(("bank_size", "active"), [(1, 1), (3, 2), (16, 4), (40, 10), (48, 48)])
def test_bank_sizes_beside_powers_of_two(bank_size, active):
    check(Case(hidden=33, banks=7, bank_size=bank_size, active=active))


@pytest.mark.parametrize("hidden", [1, 15, 257, 1030, 3584])
def test_hidden_sizes_beside_whole_blocks(hidden):
    check(Case(hidden=hidden, banks=3, dtype=torch.bfloat16))


@pytest.mark.parametrize("rank", [2, 64, 130, 512])
def test_ranks(rank):
    check(Case(rank=rank, predictor_dtype=torch.float32, dtype=torch.bfloat16))


def test_the_widest_layer():
    check(Case(hidden=16, banks=296, rank=64, form="linear", dtype=torch.bfloat16))


def test_large_offset():
    check(Case(hidden=96, offset=50.0, tokens=3))


@pytest.mark.parametrize("form", ["linear", "gated_product"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_and_selection(form, dtype):
    layer, x = packed_case(Case(hidden=96, banks=5, rank=48, tokens=3, form=form, dtype=dtype))
    logits, mask = select(layer, x)
    assert relative_rms(logits, exact_logits(layer, x)) < 1e-6
    assert torch.equal(mask, reference_mask(logits, layer))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_planted_logits_are_selected_by_the_rule(kind):
    for active in (1, 16, 63):
        layer, x = packed_case(Case(banks=3, form="linear", active=active))
        layer.predictor.expand.weight.zero_()
        layer.predictor.expand.bias.copy_(draws(1, 192, kind)[0])
        logits, mask = select(layer, x)
        assert torch.equal(logits[0], layer.predictor.expand.bias)
        assert torch.equal(mask, reference_mask(logits, layer))


@torch.no_grad()
def test_confident_gates_keep_finite_logits():
    layer, x = packed_case(Case(banks=2, tokens=2))
    layer.predictor.gate_offset.copy_(torch.linspace(-200, 200, 128))
    logits, _ = select(layer, x)
    assert relative_rms(logits, exact_logits(layer, x)) < 1e-6


@torch.no_grad()
def test_a_token_is_the_same_alone_and_among_others():
    layer, x = packed_case(Case(hidden=96, banks=4, tokens=8, dtype=torch.bfloat16))
    together = dispatch.run_packed(layer, layer.packed, x)
    assert torch.equal(dispatch.run_packed(layer, layer.packed, x), together)
    for token in (0, 7):
        alone = dispatch.run_packed(layer, layer.packed, x[token : token + 1])
        assert torch.equal(together[token : token + 1], alone)


@torch.no_grad()
def test_no_tokens_and_leading_dimensions_and_strided_input():
    layer, rows = packed_case(Case(tokens=6))
    assert dispatch.run_packed(layer, layer.packed, rows[:0].view(2, 0, 64)).shape == (2, 0, 64)
    together = dispatch.run_packed(layer, layer.packed, rows)
    assert torch.equal(dispatch.run_packed(layer, layer.packed, rows.view(2, 3, 64)), together.view(2, 3, 64))
    strided = rows.repeat_interleave(2, dim=1)[:, ::2]
    assert torch.equal(dispatch.run_packed(layer, layer.packed, strided), together)


NOT_FINITE = """
import torch
from kernels.kernel_cases import Case
from kernels.triton_cases import packed_case
from bankwise.kernels import dispatch
with torch.no_grad():
    layer, x = packed_case(Case())
    layer.predictor.expand.bias[70] = float("nan")
    dispatch.run_packed(layer, layer.packed, x)
    torch.cuda.synchronize()
"""


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@torch.no_grad()
def test_logits_that_are_not_finite(bad, request):
    if DEVICE == "cuda":
        # A device assertion ends the process's use of the GPU.
        command = [sys.executable, "-c", NOT_FINITE]
        folder = request.config.rootpath / "tests"
        finished = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=folder)
        assert finished.returncode != 0
        assert "router logits are not finite" in finished.stdout + finished.stderr
        return
    layer, x = packed_case(Case(tokens=2))
    layer.predictor.expand.bias[70] = bad
    select(layer, x)
    with pytest.raises(RoutingError, match="2 of 384 router logits are not finite"):
        dispatch.run_packed(layer, layer.packed, x)


@torch.no_grad()
def test_limits_raise():
    layer, x = packed_case(Case(tokens=8))
    with pytest.raises(KernelError, match="9 tokens at once; the decode kernels take at most 8"):
        dispatch.run_packed(layer, layer.packed, torch.cat([x, x[:1]]))
    with pytest.raises(KernelError, match="x ends in 65 columns, for a predictor of 64 columns"):
        dispatch.run_packed(layer, layer.packed, torch.zeros(1, 65, device=DEVICE))
    layer.bank_size = 63
    with pytest.raises(KernelError, match="cannot keep 16 of every 63 in 192 channels"):
        dispatch.run_packed(layer, layer.packed, x)
    layer.bank_size = 64
    layer.packed.scales_F3 = torch.ones(192, 3, device=DEVICE)
    with pytest.raises(KernelError, match="take no int8 weights"):
        dispatch.run_packed(layer, layer.packed, x)


def test_shares_cover_the_channels_for_any_size():
    for num_active in (1, 15, 16, 17, 384, 4736):
        for num_blocks in (1, 14, 64, 600):
            shares, per_share = decode.split_channels(num_active, num_blocks)
            assert 1 <= shares <= decode.MAX_SHARES
            assert per_share % 16 == 0
            assert (shares - 1) * per_share < num_active <= shares * per_share


@torch.no_grad()
def test_the_operator_is_well_formed_for_torch_and_compiles_whole():
    layer, x = packed_case(Case(tokens=2, dtype=torch.bfloat16))
    expected = dispatch.run_packed(layer, layer.packed, x)
    program = torch.compile(lambda x: dispatch.run_packed(layer, layer.packed, x), backend="aot_eager", fullgraph=True)
    assert torch.equal(program(x), expected)
    own = decode.Predictor.of(layer.predictor)
    torch.library.opcheck(
        torch.ops.bankwise.ffn_decode_gpu.default,
        (x, layer.packed.weights_F3P, None, *own, None, None, None, 64, 16),
        test_utils=("test_schema", "test_faketensor"),
    )


def test_inference_mode():
    layer, x = packed_case(Case(tokens=2))
    with torch.no_grad():
        expected = dispatch.run_packed(layer, layer.packed, x)
    with torch.inference_mode():
        assert torch.equal(dispatch.run_packed(layer, layer.packed, x), expected)


@torch.no_grad()
def test_weights_are_read_from_the_packed_layout_alone():
    case = Case(hidden=50, banks=2)
    layer = make_layer(case).to(DEVICE)
    packed = pack(layer, kernel="triton")
    _, x = packed_case(case)
    before = dispatch.run_packed(layer, packed, x)
    packed.weights_F3P[:, :, 50:] = float("nan")
    assert torch.equal(dispatch.run_packed(layer, packed, x), before)


if DEVICE == "cuda":

    @torch.no_grad()
    def test_a_cuda_graph_replays_new_inputs():
        layer, x = packed_case(Case(hidden=96, banks=4, tokens=2, dtype=torch.bfloat16))
        _, other = packed_case(Case(hidden=96, banks=4, tokens=2, dtype=torch.bfloat16, seed=9))
        expected = dispatch.run_packed(layer, layer.packed, other)
        dispatch.run_packed(layer, layer.packed, x)
        torch.use_deterministic_algorithms(False)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = dispatch.run_packed(layer, layer.packed, x)
        x.copy_(other)
        graph.replay()
        assert torch.equal(y, expected)
