"""Where bankwise keeps what can be made again: converted models, readings, compiled kernels."""

import os
from pathlib import Path


def cache_folder(kind: str) -> Path:
    """`$BANKWISE_CACHE/<kind>`, by default below `~/.cache/bankwise`; it need not exist."""
    return Path(os.environ.get("BANKWISE_CACHE") or Path.home() / ".cache" / "bankwise").expanduser() / kind
