"""bfloat16 autocast where the device multiplies bfloat16 matrices in hardware.

A CPU without such instructions falls back to a plain loop: a product of [1024, 576] and [576, 1536] takes 32 ms in
float32 and 1.46 s in bfloat16 on an AVX2 core (docs/research-log.md, 2026-11-28). So `bf16` in a recipe means "where
it pays", and elsewhere the same computation runs in float32.
"""

from functools import cache

import torch


@cache
def multiplies_bf16(device_type: str) -> bool:
    """Whether matrix products in bfloat16 are fast on this kind of device."""
    if device_type == "cpu":
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if device_type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return True


def bf16_autocast(device: torch.device | str, *, enabled: bool = True, cache_enabled: bool = True) -> torch.autocast:
    """`torch.autocast` to bfloat16; on a device whose bfloat16 products are slow it does nothing."""
    kind = torch.device(device).type
    return torch.autocast(kind, torch.bfloat16, enabled=enabled and multiplies_bf16(kind), cache_enabled=cache_enabled)
