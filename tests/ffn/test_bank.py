"""Bank top-k: the fast selection equals the stable sort bit for bit, ties and odd inputs included."""

import pytest
import torch

from bankwise.errors import BankwiseError, ConfigError, RoutingError
from bankwise.ffn import bank_topk_mask, bank_topk_mask_reference

# (bank_size, active_per_bank)
CUTS = [(64, 16), (64, 1), (64, 63), (64, 64), (8, 2), (4, 1), (1, 1), (24, 7), (192, 48)]
F = 192
FEW_VALUES = torch.tensor([-2.0, -1.0, -0.0, 0.0, 1.0, 2.0])
EXTREMES = torch.tensor([3.4e38, -3.4e38, 1e-45, -1e-45, 1.2e-38, 0.0, -0.0, 1.0, 1.0000001])


def logits_like(kind: str, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(kind))
    if kind == "normal":
        return torch.randn(*shape, generator=generator)
    if kind == "rounded":
        return torch.randn(*shape, generator=generator).bfloat16().float()
    values = FEW_VALUES if kind == "few values" else EXTREMES
    return values[torch.randint(len(values), shape, generator=generator)]


def sorted_mask(logits: torch.Tensor, bank_size: int, active_per_bank: int) -> torch.Tensor:
    """The rule in plain Python: the k largest, the lower channel first among equals."""
    mask = torch.zeros(logits.shape, dtype=torch.bool)
    for row, kept in zip(logits.flatten(0, -2).tolist(), mask.flatten(0, -2), strict=True):
        for start in range(0, len(row), bank_size):
            order = sorted(range(start, start + bank_size), key=lambda channel: (-row[channel], channel))
            kept[order[:active_per_bank]] = True
    return mask


def key_mask(logits: torch.Tensor, bank_size: int, active_per_bank: int) -> torch.Tensor:
    """Unique int64 keys, so that any top-k agrees: what a kernel does (`method.md` section 2.3)."""
    banks = (logits.float() + 0.0).unflatten(-1, (-1, bank_size))
    s = banks.contiguous().view(torch.int32).long()
    s = torch.where(s >= 0, s, s ^ 0x7FFFFFFF)
    key = s * bank_size + (bank_size - 1 - torch.arange(bank_size))
    kept = key.topk(active_per_bank, dim=-1).indices
    return torch.zeros(banks.shape, dtype=torch.bool).scatter(-1, kept, True).flatten(-2)


@pytest.mark.parametrize(("bank_size", "active_per_bank"), CUTS)
@pytest.mark.parametrize("kind", ["normal", "rounded", "few values", "extremes"])
def test_the_mask_is_that_of_the_stable_sort(kind, bank_size, active_per_bank):
    logits = logits_like(kind, 40, F)
    settings = {"bank_size": bank_size, "active_per_bank": active_per_bank}
    mask = bank_topk_mask(logits, **settings)
    assert mask.dtype == torch.bool
    assert torch.equal(mask, bank_topk_mask_reference(logits, **settings))
    assert torch.equal(mask, key_mask(logits, bank_size, active_per_bank))
    assert (mask.unflatten(-1, (-1, bank_size)).sum(-1) == active_per_bank).all()
    assert torch.equal(mask[:8], sorted_mask(logits[:8], bank_size, active_per_bank))


def test_many_tied_banks_are_cut_like_the_stable_sort():
    logits = logits_like("rounded", 1500, F)
    at_cut = logits.unflatten(-1, (-1, 64)).sort(dim=-1, descending=True).values
    assert (at_cut[..., 15] == at_cut[..., 16]).sum() > 50, "these logits do not tie at the cut"
    assert torch.equal(bank_topk_mask(logits), bank_topk_mask_reference(logits))


@pytest.mark.parametrize("value", [0.0, -0.0, 1.5, -3e38, 1e-45])
def test_equal_logits_keep_the_first_channels_of_each_bank(value):
    mask = bank_topk_mask(torch.full((3, 24), value), bank_size=8, active_per_bank=3)
    assert torch.equal(mask, (torch.arange(24) % 8 < 3).expand(3, 24))


def test_zeros_of_both_signs_tie():
    logits = torch.tensor([-0.0, 0.0, -0.0, 0.0])
    assert bank_topk_mask(logits, bank_size=4, active_per_bank=2).tolist() == [True, True, False, False]
    assert bank_topk_mask(logits.flip(0), bank_size=4, active_per_bank=2).tolist() == [True, True, False, False]


def test_the_default_is_16_of_64():
    assert bank_topk_mask(logits_like("normal", 2, 128)).sum(-1).tolist() == [32, 32]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_compared_as_float32(dtype):
    logits = logits_like("normal", 50, F).to(dtype)
    assert torch.equal(bank_topk_mask(logits), bank_topk_mask(logits.float()))


def test_float64_logits_are_not_rounded():
    logits = torch.tensor([1.0, 1.0 + 1e-12, 1.0 + 2e-12, 1.0], dtype=torch.float64)
    assert bank_topk_mask(logits, bank_size=4, active_per_bank=2).tolist() == [False, True, True, False]


@pytest.mark.parametrize("leading", [(), (1,), (0,), (5,), (2, 3), (2, 0, 3), (1, 2, 3, 2)], ids=str)
def test_any_leading_shape(leading):
    logits = logits_like("few values", *leading, 32)
    mask = bank_topk_mask(logits, bank_size=8, active_per_bank=2)
    assert mask.shape == logits.shape
    assert torch.equal(mask, bank_topk_mask_reference(logits, bank_size=8, active_per_bank=2))


def test_strided_logits():
    logits = logits_like("few values", 32, 10).T
    assert not logits.is_contiguous()
    expected = bank_topk_mask(logits.contiguous(), bank_size=8, active_per_bank=3)
    assert torch.equal(bank_topk_mask(logits, bank_size=8, active_per_bank=3), expected)


def test_logits_that_carry_a_gradient_are_accepted_and_left_alone():
    logits = logits_like("normal", 4, 64).requires_grad_()
    before = logits.detach().clone()
    mask = bank_topk_mask(logits)
    assert not mask.requires_grad
    assert torch.equal(logits.detach(), before)


def test_a_token_is_routed_alone_as_in_a_batch():
    logits = logits_like("rounded", 60, F)
    batch = bank_topk_mask(logits)
    alone = torch.stack([bank_topk_mask(row) for row in logits])
    assert torch.equal(alone, batch)
    # A tie elsewhere in the batch switches the tie rule on; it must not reach this token.
    tied = torch.cat([logits[:1], torch.zeros(1, F)])
    assert torch.equal(bank_topk_mask(tied)[:1], batch[:1])


@pytest.mark.parametrize("active_per_bank", [16, 64])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_not_finite_raise(bad, active_per_bank):
    logits = logits_like("normal", 5, 128)
    logits[3, 70] = bad
    with pytest.raises(RoutingError, match="1 of 640 router logits are not finite"):
        bank_topk_mask(logits, active_per_bank=active_per_bank)


def test_infinities_that_cancel_are_found():
    logits = logits_like("normal", 2, 64)
    logits[0, 1], logits[1, 5] = float("inf"), float("-inf")
    with pytest.raises(RoutingError, match="2 of 128"):
        bank_topk_mask(logits)


def test_a_finite_batch_whose_sum_overflows_is_accepted():
    logits = torch.full((2, 64), 3e38)
    logits[:, 40:56] = 3.3e38
    assert bank_topk_mask(logits).nonzero()[:, 1].tolist() == list(range(40, 56)) * 2


def test_a_routing_error_is_a_user_error():
    assert issubclass(RoutingError, BankwiseError)


@pytest.mark.parametrize(
    ("channels", "bank_size", "active_per_bank"), [(96, 64, 16), (64, 64, 0), (64, 64, 65), (64, 64, -1), (64, 0, 0)]
)
def test_shapes_that_do_not_fit_raise(channels, bank_size, active_per_bank):
    with pytest.raises(ConfigError, match=f"keep {active_per_bank} of every {bank_size} in {channels} channels"):
        bank_topk_mask(torch.zeros(2, channels), bank_size=bank_size, active_per_bank=active_per_bank)


@pytest.mark.parametrize("kind", ["normal", "few values"])
def test_the_compiled_mask_is_the_same(kind):
    def route(logits):
        return bank_topk_mask(logits, bank_size=16, active_per_bank=5)

    torch._dynamo.reset()
    logits = logits_like(kind, 30, 96)
    assert torch.equal(torch.compile(route, fullgraph=True, backend="eager")(logits), route(logits))
