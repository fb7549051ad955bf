"""Buckets of token positions, in which long-context figures are reported."""

K = 1024
POSITION_BUCKETS: dict[str, tuple[int, int]] = {
    "0-1K": (0, K),
    "1-4K": (K, 4 * K),
    "4-8K": (4 * K, 8 * K),
    "8-16K": (8 * K, 16 * K),
    "16-32K": (16 * K, 32 * K),
    "32K-": (32 * K, 1 << 62),
}
"""Name -> first position and the one behind the last."""


def buckets_below(length: int) -> dict[str, tuple[int, int]]:
    """The buckets that a window of `length` tokens reaches, the last one cut at its end."""
    return {name: (first, min(end, length)) for name, (first, end) in POSITION_BUCKETS.items() if first < length}


def bucket_of(position: int) -> str:
    """Name of the bucket that a position lies in."""
    return next(name for name, (_, end) in POSITION_BUCKETS.items() if position < end)
