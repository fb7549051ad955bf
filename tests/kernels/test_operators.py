"""The CPU operators against float64 and the routing rule, for every instruction set that this machine can run."""

import subprocess
import sys
import threading

import pytest
import torch
from kernels.kernel_cases import (
    AttentionCase,
    Case,
    attention_input_arguments,
    attention_output_arguments,
    check_attention,
    check_case,
    check_route,
    expected,
    make_input,
    make_layer,
    random_attention_case,
    random_case,
    relative_error,
    run_case,
)

from bankwise.errors import KernelError, RoutingError
from bankwise.ffn import bank
from bankwise.ffn.bank import bank_topk_mask_reference, cut_banks
from bankwise.kernels import dispatch
from bankwise.kernels.cpu import library
from bankwise.kernels.cpu.packing import pack, pack_int8, quantise_rows

ISAS = library.available_isas()
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(params=ISAS)
def isa(request):
    with library.forced_isa(request.param):
        assert library.current_isa() == request.param
        yield request.param


@pytest.mark.parametrize("form", ["linear", "gated_product"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 3, 8])
def test_error_is_at_most_twice_that_of_pytorch(isa, tokens, dtype, form):
    error, plain = run_case(Case(hidden=160, banks=5, rank=40, tokens=tokens, dtype=dtype, form=form, bias=True))
    assert error <= 2 * plain


@pytest.mark.parametrize("hidden", [1, 31, 32, 33, 576, 577])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hidden_sizes_beside_whole_vectors(isa, hidden, dtype):
    check_case(Case(hidden=hidden, banks=3, tokens=2, dtype=dtype))


@pytest.mark.parametrize("active", [1, 16, 63, 64])
def test_any_number_of_active_channels(isa, active):
    check_case(Case(hidden=96, active=active, tokens=3))


def test_large_offset(isa):
    check_case(Case(hidden=96, offset=50.0, tokens=3))


@pytest.mark.parametrize("weights", ["as_is", "int8"])
def test_widths_of_real_models(weights):
    check_case(Case(hidden=3584, banks=4, rank=512, dtype=torch.bfloat16, weights=weights, tokens=2))


def test_random_cases(isa):
    for seed in range(100, 125):
        check_case(random_case(seed))


def test_int8_rows_are_rounded_to_half_a_step():
    weight = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    weight[3] = 0
    codes, scales = quantise_rows(weight)
    assert codes.dtype == torch.int8
    assert ((codes * scales[:, None] - weight).abs() <= scales[:, None] * 0.501).all()
    layer = make_layer(Case(hidden=96, dtype=torch.bfloat16))
    before = {name: value.clone() for name, value in layer.named_parameters()}
    pack_int8(layer)
    x = make_input(Case(hidden=96, dtype=torch.bfloat16))
    exact = expected(layer, x)
    layer.packed = None
    for name, value in before.items():
        layer.get_parameter(name)  # still there, whatever it holds
        owner, leaf = name.rsplit(".", 1)
        setattr(layer.get_submodule(owner), leaf, torch.nn.Parameter(value))
    assert 0 < relative_error(exact, expected(layer, x)) < 0.03


def test_routing_is_the_reference_bit_for_bit(isa):
    for seed in range(60):
        check_route(seed)


@pytest.mark.parametrize("active", [1, 16, 63, 64])
def test_routing_thresholds(isa, active, monkeypatch):
    monkeypatch.setattr(bank, "fast_cut", None)
    logits = torch.randn(3, 7, 128, generator=torch.Generator().manual_seed(0))
    mask, threshold = torch.ops.bankwise.route(logits, 64, active)
    cut = cut_banks(logits, bank_size=64, active_per_bank=active)
    assert torch.equal(mask, cut.mask_TF)
    if active < 64:
        assert torch.equal(threshold, cut.threshold_TN1)
    else:
        assert threshold.numel() == 0


def test_equal_logits_keep_the_lower_channels(isa):
    case = Case(hidden=64, form="linear")
    layer, x = make_layer(case), make_input(case)
    with torch.no_grad():
        layer.predictor.expand.weight.zero_()
        layer.predictor.expand.bias.copy_(torch.arange(192) % 3 == 0)
        packed = pack(layer)
        actual = dispatch.run_packed(layer, packed, x)
    assert relative_error(actual, expected(layer, x)) < 1e-6


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_not_finite(isa, bad):
    layer, x = make_layer(Case(tokens=2)), make_input(Case(tokens=2))
    with torch.no_grad():
        layer.predictor.expand.bias[70] = bad
        with pytest.raises(RoutingError, match="2 of 384 router logits are not finite"):
            dispatch.fast_forward(layer, x)
    logits = torch.zeros(2, 64)
    logits[1, 5] = bad
    with pytest.raises(RuntimeError, match="1 of 128 router logits are not finite"):
        torch.ops.bankwise.route(logits, 64, 16)


@torch.no_grad()
def test_extreme_inputs_agree_with_the_reference(isa):
    for scale in (0.0, 1e-12, 1e4, 1e12):
        layer, x = make_layer(Case(tokens=3)), make_input(Case(tokens=3)) * scale
        exact = expected(layer, x)
        actual = dispatch.run_packed(layer, pack(layer), x)
        assert torch.isfinite(actual).all()
        assert (actual.double() - exact).abs().max() <= 1e-5 * exact.abs().max()


@torch.no_grad()
def test_no_tokens_and_leading_dimensions_and_strided_input(isa):
    layer = make_layer(Case())
    packed = pack(layer)
    assert dispatch.run_packed(layer, packed, torch.empty(2, 0, 64)).shape == (2, 0, 64)
    rows = make_input(Case(tokens=6))
    together = dispatch.run_packed(layer, packed, rows)
    assert torch.equal(dispatch.run_packed(layer, packed, rows.view(2, 3, 64)), together.view(2, 3, 64))
    strided = rows.repeat_interleave(2, dim=1)[:, ::2]
    assert not strided.is_contiguous()
    assert torch.equal(dispatch.run_packed(layer, packed, strided), together)


@torch.no_grad()
def test_a_token_is_the_same_alone_and_among_others(isa):
    layer, x = make_layer(Case(tokens=8)), make_input(Case(tokens=8))
    packed = pack(layer)
    together = dispatch.run_packed(layer, packed, x)
    for token in range(8):
        alone = dispatch.run_packed(layer, packed, x[token : token + 1])
        torch.testing.assert_close(together[token : token + 1], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear(isa, dtype, with_bias):
    generator = torch.Generator().manual_seed(0)
    for rows, columns in [(1, 1), (5, 7), (33, 64), (130, 100), (7, 577)]:
        for tokens in (0, 1, 3, 8):
            x = torch.randn(tokens, columns, generator=generator).to(dtype)
            weight = torch.randn(rows, columns, generator=generator).to(dtype)
            bias = torch.randn(rows, generator=generator).to(dtype) if with_bias else None
            exact = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
            actual = torch.ops.bankwise.linear(x, weight, None, bias)
            assert actual.dtype == dtype
            assert relative_error(actual, exact) <= (1e-6 if dtype == torch.float32 else 4e-3)
            codes, scales = quantise_rows(weight)
            exact = torch.nn.functional.linear(
                x.double(), codes.double() * scales.double()[:, None], None if bias is None else bias.double()
            )
            actual = torch.ops.bankwise.linear(x, codes, scales, bias)
            assert relative_error(actual, exact) <= (1e-6 if dtype == torch.float32 else 4e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_int8_inputs_with_one_element_far_above_the_rest(isa, dtype):
    """Its weights are 0, so what counts is how well the small elements are resolved."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-127, 128, (40, 200), generator=generator, dtype=torch.int8)
    codes[:, 7] = 0
    scales = torch.rand(40, generator=generator) + 0.5
    x = torch.randn(3, 200, generator=generator).to(dtype)
    for size in (1.0, 30.0, 1e3, 1e4):
        x[1:, 7] = size
        exact = x.double() @ (codes.double() * scales.double()[:, None]).T
        actual = torch.ops.bankwise.linear(x, codes, scales, None)
        # float32: half a step of 24 bits is 6e-8 of the largest element.
        assert relative_error(actual, exact) <= (1e-6 + 6e-8 * size if dtype == torch.float32 else 3e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_int8_inputs_that_are_not_finite_stay_so(isa, bad, dtype):
    codes = torch.randint(-127, 128, (9, 100), generator=torch.Generator().manual_seed(0), dtype=torch.int8)
    codes[4] = 0
    scales = torch.full((9,), 0.1)
    x = torch.ones(3, 100, dtype=dtype)
    x[1, 50] = bad
    exact = x @ (codes * scales[:, None]).to(dtype).T
    actual = torch.ops.bankwise.linear(x, codes, scales, None)
    assert torch.equal(actual[1].isnan(), exact[1].isnan())
    assert torch.equal(actual[1].isinf(), exact[1].isinf())
    assert torch.isfinite(actual[[0, 2]]).all()


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tokens", [1, 3])
def test_int8_extremes(isa, tokens, dtype):
    for scale in (0.0, 1e-37, 1e-12, 1e10):
        case = Case(tokens=tokens, dtype=dtype)
        layer, x = make_layer(case), make_input(case) * scale
        packed = pack_int8(layer)
        actual = dispatch.run_packed(layer, packed, x)
        exact = expected(layer, x)
        bound = 1e-5 if dtype == torch.float32 else 8e-3
        assert (actual.double() - exact).abs().max() <= bound * exact.abs().max() + 1e-45
    case = Case(tokens=tokens, dtype=dtype, bias=True)
    layer = make_layer(case)
    layer.gate_proj.bias.fill_(1e30)
    layer.up_proj.bias.fill_(1e30)
    assert not torch.isfinite(dispatch.run_packed(layer, pack_int8(layer), make_input(case))).any()


@torch.no_grad()
def test_limits_raise():
    layer = make_layer(Case())
    packed = pack(layer)
    with pytest.raises(RuntimeError, match="at most 8 tokens"):
        dispatch.run_packed(layer, packed, torch.zeros(9, 64))
    with pytest.raises(RuntimeError, match="must end in 64 columns"):
        dispatch.run_packed(layer, packed, torch.zeros(1, 65))
    with pytest.raises(RuntimeError, match="must be float32"):
        dispatch.run_packed(layer, packed, torch.zeros(1, 64, dtype=torch.float64))
    with pytest.raises(RuntimeError, match="cannot keep 65 of every 64"):
        torch.ops.bankwise.route(torch.zeros(64), 64, 65)
    with pytest.raises(RuntimeError, match="in 100 channels"):
        torch.ops.bankwise.route(torch.zeros(100), 64, 16)
    with pytest.raises(RuntimeError, match="must be float32"):
        torch.ops.bankwise.route(torch.zeros(64, dtype=torch.float64), 64, 16)
    with pytest.raises(RuntimeError, match="int8 weights need 4"):
        torch.ops.bankwise.linear(torch.zeros(1, 8), torch.zeros(4, 8, dtype=torch.int8), None, None)
    with pytest.raises(KernelError, match="'mmx' cannot run here; choose one of"):
        library.choose_isa("mmx")


@torch.no_grad()
def test_two_threads_at_once_get_their_own_answers():
    layer = make_layer(Case(hidden=256, banks=8, rank=64))
    packed = pack(layer)
    inputs = [make_input(Case(hidden=256, tokens=tokens, seed=tokens)) for tokens in (1, 4)]
    alone = [dispatch.run_packed(layer, packed, x) for x in inputs]
    wrong = []

    def work(index):
        answers = [dispatch.run_packed(layer, packed, inputs[index]) for _ in range(50)]
        wrong.extend(answer for answer in answers if not torch.equal(answer, alone[index]))

    threads = [threading.Thread(target=work, args=(index,)) for index in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


FORK = """
import os, sys, torch
sys.path.insert(0, sys.argv[1])
from kernels.kernel_cases import Case, make_input, make_layer
from bankwise.kernels import dispatch
from bankwise.kernels.cpu.packing import pack
torch.set_num_threads(2)
case = Case(hidden=512, banks=8, rank=64)
layer, x = make_layer(case), make_input(case)
with torch.no_grad():
    packed = pack(layer)
    before = dispatch.run_packed(layer, packed, x)
    child = os.fork()
    after = dispatch.run_packed(layer, packed, x)
    torch.testing.assert_close(after, before)
if child == 0:
    os._exit(0)
assert os.waitpid(child, 0)[1] == 0
"""


def test_a_forked_process_can_go_on(request):
    command = [sys.executable, "-c", FORK, str(request.config.rootpath / "tests")]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert finished.returncode == 0, finished.stderr


@torch.no_grad()
def test_operators_are_well_formed_for_torch():
    layer, x = make_layer(Case(tokens=2, dtype=torch.bfloat16)), make_input(Case(tokens=2, dtype=torch.bfloat16))
    packed = pack(layer)
    predictor = layer.predictor
    own = [getattr(predictor, name) for name in ("gate_offset", "up_offset", "gate_log_noise", "up_log_noise")]
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(
        torch.ops.bankwise.ffn_decode.default,
        (x, packed.weights_F3P, None, predictor.reduce.weight, predictor.expand.weight, predictor.expand.bias, *own,
         None, None, None, 64, 16),
        test_utils=checks,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.bankwise.route.default, (torch.randn(2, 128), 64, 16), test_utils=checks)
    torch.library.opcheck(torch.ops.bankwise.route.default, (torch.randn(2, 128), 64, 64), test_utils=checks)
    torch.library.opcheck(
        torch.ops.bankwise.linear.default, (x, torch.randn(5, 64).bfloat16(), None, None), test_utils=checks
    )


ATTENTION_CASES = [
    AttentionCase(),
    AttentionCase(dtype=torch.bfloat16, bias=True),
    AttentionCase(dtype=torch.bfloat16, head_norms=True, room=4),
    AttentionCase(head=64, groups=3, shared=3, hidden=576, length=130),
    AttentionCase(dtype=torch.bfloat16, bias=True, int8=True),
]


@pytest.mark.parametrize("case", ATTENTION_CASES, ids=["plain", "bias", "head norms, room", "smollm2", "int8"])
def test_attention_operators_are_well_formed_for_torch(case):
    operators, checks = torch.ops.bankwise, ("test_schema", "test_faketensor")
    with torch.no_grad():
        inputs, outputs = attention_input_arguments(case), attention_output_arguments(case)
        torch.library.opcheck(operators.attention_input.default, inputs, test_utils=checks)
        torch.library.opcheck(operators.attention_output.default, outputs, test_utils=checks)
    check_attention(case)


def test_random_attention(isa):
    for seed in range(200, 240):
        check_attention(random_attention_case(seed))


def test_scores_of_any_size_do_not_overflow_the_softmax(isa):
    case = AttentionCase(length=40)
    query, keys, values, *rest = attention_output_arguments(case)
    best = keys[:, :, 17] * 1e4
    keys = keys.clone()
    keys[:, :, 17] = best
    query = best.repeat_interleave(case.shared, dim=1)[:, :, None] * 1e4
    actual = torch.ops.bankwise.attention_output(query.contiguous(), keys, values, *rest)
    _scale, weight, bias, residual, _scales = rest
    taken = values[:, :, 17].repeat_interleave(case.shared, dim=1).flatten(1)
    torch.testing.assert_close(actual, residual + torch.nn.functional.linear(taken, weight, bias)[:, None])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.zeros(1, 2, 64)}, "one token at a time, not 2"),
        ({"cos": torch.zeros(1, 2, 16)}, "cos and sin must be those of one token"),
        ({"v": torch.zeros(16, 64)}, "end in whole heads of 16"),
        ({"k": torch.zeros(32, 64).bfloat16()}, "matrices of one type"),
        ({name: torch.zeros(32, 64, dtype=torch.int8) for name in "qkv"}, "scales"),
        ({"q": torch.zeros(40, 64)}, "end in whole heads of 16"),
    ],
)
def test_what_attention_input_refuses(change, words):
    names = (
        "x", "norm", "epsilon", "q", "k", "v", "q_bias", "k_bias", "v_bias", "q_norm", "k_norm", "cos", "sin",
        "q_scales", "k_scales", "v_scales",
    )  # fmt: skip
    arguments = dict(zip(names, attention_input_arguments(AttentionCase()), strict=True)) | change
    with pytest.raises(RuntimeError, match=words):
        torch.ops.bankwise.attention_input(*arguments.values())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"query": torch.zeros(1, 4, 2, 16)}, r"takes one query \[1, H, 1, head\]"),
        ({"query": torch.zeros(1, 3, 1, 16)}, "heads that divide its heads"),
        ({"keys": torch.zeros(1, 2, 0, 16), "values": torch.zeros(1, 2, 0, 16)}, "keys and values must have"),
        ({"values": torch.zeros(1, 2, 8, 16)}, "keys and values must have"),
        ({"keys": torch.zeros(1, 2, 9, 16).bfloat16()}, "keys and values must have the query's type"),
        ({"weight": torch.zeros(64, 60)}, "must take all heads and give one residual row"),
        ({"weight": torch.zeros(64, 64, dtype=torch.int8)}, "scales"),
        ({"residual": torch.zeros(1, 1, 63)}, "must take all heads and give one residual row"),
    ],
)
def test_what_attention_output_refuses(change, words):
    names = ("query", "keys", "values", "scale", "weight", "bias", "residual", "scales")
    arguments = dict(zip(names, attention_output_arguments(AttentionCase()), strict=True)) | change
    with pytest.raises(RuntimeError, match=words):
        torch.ops.bankwise.attention_output(*arguments.values())


def test_masks_of_the_decoder_are_those_of_the_layer(isa):
    """With one output column per channel, the output tells which channels were read."""
    case = Case(hidden=192, banks=3, tokens=4)
    layer, x = make_layer(case), make_input(case)
    with torch.no_grad():
        layer.gate_proj.weight.zero_()
        layer.up_proj.weight.zero_()
        layer.gate_proj.bias = torch.nn.Parameter(torch.full((192,), 4.0))
        layer.up_proj.bias = torch.nn.Parameter(torch.ones(192))
        layer.down_proj.weight.copy_(torch.eye(192))
        read = dispatch.run_packed(layer, pack(layer), x) != 0
        logits = layer.logits(x)
    assert torch.equal(read, bank_topk_mask_reference(logits))
