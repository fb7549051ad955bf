"""Random cases for the CPU operators, each checked against float64; run as a script for the sanitizers.

Run alone (`python tests/kernels/kernel_cases.py`) it goes through every instruction set of this machine.
"""

import random
from dataclasses import dataclass

import torch
import torch.nn.functional as functional

from bankwise import SparsityConfig
from bankwise.ffn import SparseSwiGLU, bank_topk_mask_reference
from bankwise.ffn.gates import SteUnitGate
from bankwise.ffn.predictor import expected_energy_reference
from bankwise.kernels import dispatch
from bankwise.kernels.cpu import library
from bankwise.kernels.cpu.packing import pack, pack_int8, quantise_rows


@dataclass
class Case:
    hidden: int = 64
    banks: int = 3
    rank: int = 16
    form: str = "gated_product"
    bank_size: int = 64
    active: int = 16
    tokens: int = 1
    dtype: torch.dtype = torch.float32
    weights: str = "as_is"
    bias: bool = False
    predictor_dtype: torch.dtype | None = None
    offset: float = 0.0
    seed: int = 0


def make_layer(case: Case) -> SparseSwiGLU:
    sparsity = SparsityConfig(
        bank_size=case.bank_size,
        active_per_bank=case.active,
        predictor_rank=case.rank,
        predictor_form=case.form,
    )
    layer = SparseSwiGLU(case.hidden, case.banks * case.bank_size, sparsity, 0, bias=case.bias).eval()
    generator = torch.Generator().manual_seed(case.seed)
    with torch.no_grad():
        for value in layer.parameters():
            value.copy_(torch.randn(value.shape, generator=generator) * value.shape[-1] ** -0.5)
    layer.to(case.dtype)
    layer.predictor.to(case.predictor_dtype or case.dtype)
    return layer


def make_input(case: Case) -> torch.Tensor:
    generator = torch.Generator().manual_seed(case.seed + 1)
    return (torch.randn(case.tokens, case.hidden, generator=generator) + case.offset).to(case.dtype)


@torch.no_grad()
def expected(layer: SparseSwiGLU, x_TD: torch.Tensor) -> torch.Tensor:
    """The layer's function in float64, step by step, from the weights that it holds now."""
    x_TD = x_TD.double()
    if layer.packed is not None and layer.packed.scales_F3 is not None:
        packed, scales = layer.packed.weights_F3P.double(), layer.packed.scales_F3.double()
        gate_FD, up_FD, down_FD = (packed[:, i, : x_TD.shape[-1]] * scales[:, i, None] for i in range(3))
    else:
        gate_FD, up_FD, down_FD = (
            weight.double() for weight in (layer.gate_proj.weight, layer.up_proj.weight, layer.down_proj.weight.T)
        )
    mask_TF = bank_topk_mask_reference(
        exact_logits(layer, x_TD), bank_size=layer.bank_size, active_per_bank=layer.active_per_bank
    )
    linears = (layer.gate_proj, layer.up_proj, layer.down_proj)
    bias = [None if linear.bias is None else linear.bias.double() for linear in linears]
    h_TF = functional.silu(functional.linear(x_TD, gate_FD, bias[0])) * functional.linear(x_TD, up_FD, bias[1])
    return functional.linear(h_TF * mask_TF, down_FD.T, bias[2])


def exact_logits(layer: SparseSwiGLU, x_TD: torch.Tensor) -> torch.Tensor:
    """Routing logits in float64."""
    before = {value.dtype for value in layer.predictor.parameters()}.pop()
    logits_TF = layer.predictor.double()(x_TD.double())
    layer.predictor.to(before)
    return logits_TF


def relative_error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    if exact.numel() == 0:
        return 0.0
    return float((actual.double() - exact).square().mean().sqrt() / exact.square().mean().sqrt())


@torch.no_grad()
def run_case(case: Case) -> tuple[float, float]:
    """Relative error of the operator and of plain PyTorch in the same dtype, against float64."""
    layer, x_TD = make_layer(case), make_input(case)
    plain = layer.down_proj(layer._gate(layer.dense_activation(x_TD), layer.logits(x_TD)))
    packed = pack_int8(layer) if case.weights == "int8" else pack(layer)
    actual = dispatch.run_packed(layer, packed, x_TD)
    assert actual.shape == x_TD.shape
    assert actual.dtype == x_TD.dtype
    exact = expected(layer, x_TD)
    return relative_error(actual, exact), relative_error(plain, exact)


def random_case(seed: int) -> Case:
    draw = random.Random(seed)
    bank_size = draw.choice([64, 64, 64, 1, 3, 16, 40, 65, 128, 192])
    dtype = draw.choice([torch.float32, torch.bfloat16])
    return Case(
        hidden=draw.choice([1, 7, 16, 31, 32, 33, 64, 65, 100, 160, 257]),
        banks=draw.randint(1, 7),
        rank=2 * draw.choice([1, 2, 5, 16, 17, 32, 40, 64, 65]),
        form=draw.choice(["linear", "gated_product"]),
        bank_size=bank_size,
        active=draw.randint(1, min(bank_size, 64)),
        tokens=draw.randint(1, 8),
        dtype=dtype,
        weights=draw.choice(["as_is", "as_is", "int8"]),
        bias=draw.random() < 0.3,
        predictor_dtype=draw.choice([None, None, torch.float32]),
        seed=seed,
    )


def check_case(case: Case) -> None:
    error, plain = run_case(case)
    # Twice the error of PyTorch (tests/kernels); a single output column may cancel, hence the floor.
    floor = 2e-6 if case.dtype == torch.float32 else 8e-3
    bound = floor if case.weights == "int8" else max(2 * plain, floor)
    assert error <= bound, f"{case}: error {error:.2e} above {bound:.2e}"


def check_route(seed: int) -> None:
    draw = random.Random(seed)
    size = draw.choice([1, 3, 16, 20, 48, 64, 64, 65, 100, 128, 1000])
    active = draw.randint(1, size)
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(draw.randint(1, 5), size * draw.randint(1, 6), generator=generator)
    logits = draw.choice([
        values, values.bfloat16().float(), values.round(), values.round() * -0.0, torch.zeros_like(values),
        values * 6e37, values * 1e-42, values.exp() ** 9,
    ])  # fmt: skip
    mask, _ = torch.ops.bankwise.route(logits, size, active)
    assert torch.equal(mask, bank_topk_mask_reference(logits, bank_size=size, active_per_bank=active)), (seed, size)


def check_energy(seed: int) -> None:
    """Logits of the product form and their gradients against float64.

    Each result is a sum of terms with either sign, each good to a few units in the last place of float32 (6e-8), so the
    bound is 1e-6 of the sum of the terms' sizes, not of the result.
    """
    draw = random.Random(seed)
    shape = draw.choice([0, 1, 3, 4, 127, 128, 130, 300]), draw.choice([1, 7, 16, 33, 64, 77, 192])
    generator = torch.Generator().manual_seed(seed)
    spread = draw.choice([0.1, 1.0, 4.0, 30.0])
    gate_TF, up_TF, dz_TF = (torch.randn(shape, generator=generator) * scale for scale in (spread, spread, 1))
    vectors = [torch.randn(shape[1], generator=generator) * scale for scale in (1, 1, 3, 3, 1)]
    # The offsets are added in float32 by the definition too. A copy of the vectors for every token keeps their
    # gradients apart, so that the size of a sum's terms is known.
    inputs = gate_TF + vectors[0], up_TF + vectors[1], *(vector.expand(shape) for vector in vectors[2:])
    exact = [value.double().requires_grad_() for value in inputs]
    logits_TF = expected_energy_reference(*exact[:4]) + exact[4]
    logits_TF.backward(dz_TF.double())
    with torch.no_grad():
        sizes_TF = functional.logsigmoid(exact[0]).abs() * 2 + exact[4].abs()
        for value, noise in ((exact[0], exact[2]), (exact[1], exact[3])):
            sizes_TF += (value.square() + noise.exp()).log().abs()
        actual_TF = torch.ops.bankwise.energy_logits(gate_TF, up_TF, *vectors)
        assert ((actual_TF - logits_TF).abs() <= 1e-6 * (1 + sizes_TF)).all(), (seed, shape)
        found = torch.ops.bankwise.energy_logits_backward(dz_TF, gate_TF, up_TF, *vectors[:4], False)
        gradients = [value.grad for value in exact]
        for actual_TF, exact_TF in zip(found[:2], gradients, strict=False):
            assert ((actual_TF - exact_TF).abs() <= 1e-6 * (exact_TF.abs() + 4 * dz_TF.abs())).all(), (seed, shape)
        for actual_F, exact_TF in zip(found[2:], gradients, strict=True):
            size_F = (exact_TF.abs() + 4 * dz_TF.abs()).sum(dim=0)
            assert ((actual_F - exact_TF.sum(dim=0)).abs() <= 1e-6 * size_F).all(), (seed, shape)


def check_unit_gate(seed: int) -> None:
    """The gate against `SteUnitGate` in float64: the same mask and dh, and dz up to the rounding of float32.

    dz = slope * h * dy, where the slope is at most alpha / (4 width) and moves by 1e-7 of alpha / width when the
    logit's distance from the cut is rounded: the bound is 1e-6 alpha / width * |h * dy|.
    """
    draw = random.Random(seed)
    size = draw.choice([2, 3, 16, 20, 40, 64, 64, 64, 65, 100, 128, 1000])
    active = draw.randint(1, size - 1)
    shape = draw.choice([0, 1, 3, 9]), size * draw.randint(1, 6)
    dtype = draw.choice([torch.float32, torch.bfloat16])
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator)
    z_TF = draw.choice([values, values, values * 40, values.bfloat16().float(), values.round(), torch.zeros(shape)])
    h_TF, dy_TF = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
    alpha, tau = draw.choice([0.5, 1.0]), draw.choice([0.7, 1.0, 2.0])

    gated_TF, *per_bank = torch.ops.bankwise.unit_gate_cpu(h_TF, z_TF, size, active, tau)
    dh_TF, dz_TF = torch.ops.bankwise.unit_gate_cpu_backward(
        dy_TF, h_TF, z_TF, *per_bank, size, alpha, True, True
    )  # fmt: skip
    exact = [value.double().requires_grad_() for value in (h_TF, z_TF)]
    expected_TF = SteUnitGate.apply(*exact, size, active, alpha, tau)
    expected_TF.backward(dy_TF.double())
    assert torch.equal(gated_TF.double(), expected_TF), (seed, shape)
    assert torch.equal(dh_TF.double(), exact[0].grad), (seed, shape)
    z_TNB = z_TF.double().unflatten(-1, (-1, size))
    deviation = (z_TNB - z_TNB.mean(dim=-1, keepdim=True)).square().mean(dim=-1, keepdim=True).sqrt().clamp_min(1e-6)
    bound = 1e-6 * alpha / (tau * deviation) * (h_TF.double() * dy_TF.double()).abs().unflatten(-1, (-1, size))
    assert ((dz_TF.double() - exact[1].grad).abs() <= bound.flatten(-2)).all(), (seed, shape)


def check_logit_loss(seed: int) -> None:
    """Cross entropy, KL and their gradient against float64; with and without a teacher, and without the gradient.

    Logarithms of sums are good to a few units in the last place of their size, and a gradient is at most
    ce_weight + kd_weight; in bfloat16 it is rounded to 8 bits once more.
    """
    draw = random.Random(seed)
    rows, vocabulary = draw.choice([0, 1, 3, 17]), draw.choice([1, 2, 15, 16, 33, 500, 2048, 2049, 7001])
    dtype, spread = draw.choice([torch.float32, torch.bfloat16]), draw.choice([0.1, 3.0, 40.0])
    ce_weight, kd_weight = draw.choice([(1.0, 0.0), (0.1, 1.0), (0.0, 0.7)])
    generator = torch.Generator().manual_seed(seed)
    student_CV, teacher_CV = (
        (torch.randn(rows, vocabulary, generator=generator) * spread).to(dtype) for _ in range(2)
    )  # fmt: skip
    labels_C = torch.randint(vocabulary, (rows,), generator=generator)
    if vocabulary > 2:
        student_CV[:, 1] = float("-inf")  # a token that is ruled out
        labels_C[labels_C == 1] = 0
        teacher_CV[:, 1] = -1e4
        if kd_weight:
            student_CV[:, 1] = -1e4
    taught_CV = teacher_CV if kd_weight else None

    log_p_CV = student_CV.double().log_softmax(-1)
    exact = [-log_p_CV.gather(-1, labels_C[:, None]).squeeze(-1), torch.zeros(rows, dtype=torch.double)]
    exact_gradient = (ce_weight + kd_weight) * log_p_CV.exp() - ce_weight * functional.one_hot(labels_C, vocabulary)
    if taught_CV is not None:
        log_q_CV = taught_CV.double().log_softmax(-1)
        exact[1] = (log_q_CV.exp() * (log_q_CV - log_p_CV)).sum(-1)
        exact_gradient -= kd_weight * log_q_CV.exp()
    before = student_CV.clone()
    settings = taught_CV, labels_C, ce_weight, kd_weight
    losses_C2 = torch.ops.bankwise.logit_loss(student_CV, *settings, False)
    assert torch.equal(student_CV, before), (seed, "the logits were changed")
    assert torch.equal(torch.ops.bankwise.logit_loss(student_CV, *settings, True), losses_C2), seed
    bound = 2e-6 * (1 + 4 * spread)
    for losses_C, exact_C in zip(losses_C2.unbind(-1), exact, strict=True):
        assert ((losses_C - exact_C).abs() <= bound + 2e-6 * exact_C.abs()).all(), (seed, losses_C, exact_C)
    rounding = 0.0 if dtype == torch.float32 else 2**-8
    error_CV = (student_CV.double() - exact_gradient).abs()
    assert (error_CV <= 4 * bound + rounding * exact_gradient.abs()).all(), (seed, float(error_CV.max()))


@dataclass
class AttentionCase:
    head: int = 16
    groups: int = 2
    shared: int = 2
    hidden: int = 64
    length: int = 9
    dtype: torch.dtype = torch.float32
    bias: bool = False
    head_norms: bool = False
    int8: bool = False
    room: int = 0
    """Tokens that the cache has room for beyond its length, as a static cache: strides then differ from sizes."""
    seed: int = 0

    def draw(self, *shape: int, scale: float = 1.0, shift: float = 0.0) -> torch.Tensor:
        self.seed += 1
        generator = torch.Generator().manual_seed(self.seed)
        return (torch.randn(shape, generator=generator) * scale + shift).to(self.dtype)

    def quantised(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The matrix and the scales of its rows as the operators take them."""
        return quantise_rows(weight) if self.int8 else (weight, None)


def attention_input_arguments(case: AttentionCase) -> tuple:
    heads = case.groups * case.shared
    rows = [heads * case.head, case.groups * case.head, case.groups * case.head]
    projections = [case.draw(count, case.hidden, scale=case.hidden**-0.5) for count in rows]
    biases = [case.draw(count) if case.bias else None for count in rows]
    norms = [case.draw(case.head, scale=0.1, shift=1.0) if case.head_norms else None for _ in range(2)]
    angles = torch.outer(torch.tensor([37.0]), 10000.0 ** -torch.linspace(0, 1, case.head // 2)).repeat(1, 2)
    cos, sin = (value.to(case.dtype)[None] for value in (angles.cos(), angles.sin()))
    x = case.draw(1, 1, case.hidden, scale=3.0)
    norm = case.draw(case.hidden, scale=0.1, shift=1.0)
    codes, scales = zip(*map(case.quantised, projections), strict=True)
    return (x, norm, 1e-5, *codes, *biases, *norms, cos, sin, *scales)


def attention_output_arguments(case: AttentionCase) -> tuple:
    heads = case.groups * case.shared
    query = case.draw(1, heads, 1, case.head, scale=2.0)
    keys, values = (case.draw(1, case.groups, case.length + case.room, case.head) for _ in range(2))
    keys, values = keys[:, :, : case.length], values[:, :, : case.length]
    weight = case.draw(case.hidden, heads * case.head, scale=(heads * case.head) ** -0.5)
    bias = case.draw(case.hidden) if case.bias else None
    codes, scales = case.quantised(weight)
    return query, keys, values, case.head**-0.5, codes, bias, case.draw(1, 1, case.hidden), scales


def attention_input_reference(dtype: torch.dtype, *arguments) -> tuple[torch.Tensor, ...]:
    """The definition in PyTorch, computed in `dtype`."""
    x, norm, epsilon, *rest = (value.to(dtype) if isinstance(value, torch.Tensor) else value for value in arguments)
    projections, biases, head_norms, (cos, sin) = rest[:3], rest[3:6], [*rest[6:8], None], rest[8:10]
    projections = [_dequantised(weight, scales) for weight, scales in zip(projections, rest[10:], strict=True)]

    def normalised(value: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        wide = value if dtype == torch.float64 else value.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)).to(dtype) * weight

    results = []
    for place, (weight, bias, head_norm) in enumerate(zip(projections, biases, head_norms, strict=True)):
        head = functional.linear(normalised(x, norm), weight, bias).unflatten(-1, (-1, cos.shape[-1])).transpose(1, 2)
        if head_norm is not None:
            head = normalised(head, head_norm)
        if place < 2:
            low, high = head.chunk(2, dim=-1)
            head = head * cos + torch.cat([-high, low], dim=-1) * sin
        results.append(head)
    return tuple(results)


def _dequantised(weight: torch.Tensor, scales: torch.Tensor | None) -> torch.Tensor:
    return weight if scales is None else weight * scales[:, None]


def attention_output_reference(dtype: torch.dtype, *arguments) -> torch.Tensor:
    """The definition in PyTorch, computed in `dtype`."""
    query, keys, values, scale, weight, bias, residual, scales = (
        value.to(dtype) if isinstance(value, torch.Tensor) else value for value in arguments
    )
    weight = _dequantised(weight, scales)
    shared = query.shape[1] // keys.shape[1]
    keys, values = (value.repeat_interleave(shared, dim=1) for value in (keys, values))
    scores = query @ keys.transpose(-1, -2) * scale
    heads = scores.softmax(dim=-1) @ values
    return residual + functional.linear(heads.transpose(1, 2).flatten(2), weight, bias)


def random_attention_case(seed: int) -> AttentionCase:
    draw = random.Random(seed)
    return AttentionCase(
        head=draw.choice([2, 4, 6, 16, 34, 64, 66, 96, 128]),
        groups=draw.randint(1, 4),
        shared=draw.randint(1, 7),
        hidden=draw.choice([1, 7, 16, 33, 64, 100, 257]),
        length=draw.choice([1, 2, 3, 15, 16, 17, 64, 65, 200]),
        dtype=draw.choice([torch.float32, torch.bfloat16]),
        bias=draw.random() < 0.5,
        head_norms=draw.random() < 0.5,
        int8=draw.random() < 0.3,
        room=draw.choice([0, 0, 5]),
        seed=1000 * seed,
    )


@torch.no_grad()
def check_attention(case: AttentionCase) -> None:
    """Both operators of a decoder layer's attention: at most twice the error of PyTorch in the same dtype."""
    # One column may cancel, as in check_case; bfloat16 results are rounded once more than their sums.
    floor = 2e-6 if case.dtype == torch.float32 else 8e-3
    arguments = attention_input_arguments(case)
    exact = attention_input_reference(torch.float64, *arguments)
    plain = attention_input_reference(case.dtype, *arguments)
    actual = torch.ops.bankwise.attention_input(*arguments)
    for name, one, other, truth in zip("qkv", actual, plain, exact, strict=True):
        assert (one.shape, one.dtype) == (truth.shape, case.dtype)
        error, bound = relative_error(one, truth), max(2 * relative_error(other, truth), floor)
        assert error <= bound, f"{name} of {case}: error {error:.2e} above {bound:.2e}"
    arguments = attention_output_arguments(case)
    truth = attention_output_reference(torch.float64, *arguments)
    one = torch.ops.bankwise.attention_output(*arguments)
    assert (one.shape, one.dtype) == (truth.shape, case.dtype)
    plain_error = relative_error(attention_output_reference(case.dtype, *arguments), truth)
    error, bound = relative_error(one, truth), max(2 * plain_error, floor)
    assert error <= bound, f"{case}: error {error:.2e} above {bound:.2e}"


def main() -> None:
    library.load()
    torch.set_num_threads(2)
    for isa in library.available_isas():
        with library.forced_isa(isa):
            for seed in range(40):
                check_case(random_case(seed))
                check_route(seed)
                check_energy(seed)
                check_unit_gate(seed)
                check_logit_loss(seed)
                check_attention(random_attention_case(seed))
        print(f"{isa}: 240 cases agree with the reference")


if __name__ == "__main__":
    main()
