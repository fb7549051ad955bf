"""How numbers and missing values are printed, in every table, figure and sentence of a report.

A column or value that was not run says so ("not run"); a value that cannot exist says "n/a". No cell is empty.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NOT_RUN = "not run"
NOT_APPLICABLE = "n/a"


def nats(value: float) -> str:
    return f"{value:.4f}"


def delta(value: float) -> str:
    return f"{value:+.4f}"


def fraction(value: float) -> str:
    return f"{value:.3f}"


def percent(value: float) -> str:
    """A share as a percentage: 0.25 -> 25 %."""
    return f"{100 * value:.1f}".removesuffix(".0") + " %"


def perplexity(value: float) -> str:
    return f"{value:.2f}" if value < 1e5 else f"{value:.3g}"


def count(value: float) -> str:
    return f"{value:,.0f}"


def short_count(value: float) -> str:
    """1500000 -> 1.5M."""
    for size, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{suffix}"
    return f"{value:g}"


def significant(value: float) -> str:
    """Five significant digits, without an exponent where the number is of everyday size."""
    return f"{value:,.0f}" if 1e5 <= abs(value) < 1e15 else f"{value:.5g}"


def share_or_gap(value: float | None) -> str:
    return NOT_APPLICABLE if value is None else percent(value)


def fraction_or_gap(value: float | None) -> str:
    return NOT_APPLICABLE if value is None else fraction(value)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """`{"versions": {"torch": "2.13"}}` -> `{"versions.torch": "2.13"}`; lists become comma-separated text."""
    flat: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = plain(value)
    return flat


def plain(value: Any) -> str:
    """One scalar as text: integers in full, floats to six digits, nothing as "n/a"."""
    if value is None or value == "" or value == []:
        return NOT_APPLICABLE
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, list | tuple):
        return ", ".join(plain(part) for part in value)
    return str(value)
