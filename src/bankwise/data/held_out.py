"""The held-out windows of a run, by source: one fixed set for every model that is compared."""

from collections.abc import Sequence

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from bankwise.config import DataSource
from bankwise.data.sources import source_name
from bankwise.data.windows import mixed_windows
from bankwise.errors import ConfigError


def held_out_windows(
    sources: Sequence[DataSource],
    tokenizer: PreTrainedTokenizerBase,
    *,
    seq_len: int,
    num_windows: int,
    held_out_fraction: float,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Windows [n, seq_len] of the held-out split of each source, `num_windows` in all, equally many of each."""
    names = [source_name(source) for source in sources]
    if len(set(names)) < len(names):
        raise ConfigError(f"two data sources have the same name: {names}; results are reported by name, rename one")
    if num_windows < len(sources):
        raise ConfigError(
            f"{num_windows} held-out windows cannot cover {len(sources)} sources; ask for at least one each"
        )
    rest = num_windows % len(sources)
    return {
        name: mixed_windows(
            [source],
            tokenizer,
            seq_len=seq_len,
            num_windows=num_windows // len(sources) + (position < rest),
            split="held_out",
            held_out_fraction=held_out_fraction,
            seed=seed,
        )
        for position, (name, source) in enumerate(zip(names, sources, strict=True))
    }
