"""Amounts of tokens as people write them."""

import re

from bankwise.errors import ConfigError

_SUFFIXES = {"": 1, "k": 10**3, "M": 10**6, "B": 10**9}


def parse_tokens(value: int | str) -> int:
    """Token count from `100000`, `"100k"`, `"2M"`, `"1.5B"`; anything else raises `ConfigError`."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kMB]?)\s*", str(value))
    if match is None or isinstance(value, bool):
        raise ConfigError(f"{value!r} is not a token count; write for example 100000, 100k, 2M or 1.5B")
    return round(float(match[1]) * _SUFFIXES[match[2]])
