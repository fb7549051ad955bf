"""Matrix products of the router during training and calibration."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def bf16_router_products() -> Iterator[None]:
    """float32 products may use bfloat16 inputs with float32 accumulation and float32 results while this is active.

    That is what `method.md` section 2.2 asks of the logits, and on a CPU it is four times faster than float32 inputs.
    Evaluation and generation stay at full precision.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
