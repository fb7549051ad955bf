"""Where bfloat16 autocast is switched on."""

import pytest
import torch

from bankwise import precision
from bankwise.precision import bf16_autocast


@pytest.fixture
def products(monkeypatch):
    """Set whether the CPU has bfloat16 products, whatever this one has."""

    def decide(are_fast: bool) -> None:
        monkeypatch.setattr(precision, "multiplies_bf16", lambda kind: are_fast)

    return decide


@pytest.mark.parametrize(("are_fast", "enabled"), [(True, True), (True, False), (False, True)])
def test_autocast_acts_where_it_is_asked_for_and_pays(products, are_fast, enabled):
    products(are_fast)
    with bf16_autocast("cpu", enabled=enabled):
        product = torch.ones(2, 2) @ torch.ones(2, 2)
    assert product.dtype == (torch.bfloat16 if are_fast and enabled else torch.float32)
