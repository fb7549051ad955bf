"""The held-out windows of a run, by source: one fixed set for every model that is compared."""

from collections.abc import Mapping, Sequence
from itertools import chain, zip_longest

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from bankwise.config import DataSource
from bankwise.data.sources import load_split, source_name
from bankwise.data.windows import document_starts, mixed_windows
from bankwise.errors import ConfigError, DataError


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
    return {
        name: mixed_windows(
            [source],
            tokenizer,
            seq_len=seq_len,
            num_windows=count,
            split="held_out",
            held_out_fraction=held_out_fraction,
            seed=seed,
        )
        for name, source, count in _shared_out(sources, num_windows)
    }


def document_windows(
    sources: Sequence[DataSource],
    tokenizer: PreTrainedTokenizerBase,
    *,
    seq_len: int,
    num_windows: int,
    held_out_fraction: float,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Windows [n, seq_len] by source, each the start of one held-out document of at least `seq_len` tokens."""
    windows: dict[str, Tensor] = {}
    for name, source, count in _shared_out(sources, num_windows):
        _, documents = load_split(source, held_out_fraction)
        windows[name] = document_starts(documents, tokenizer, seq_len=seq_len, max_windows=count, seed=seed)
        if len(windows[name]) < count:
            raise DataError(
                f"{source.path} has only {len(windows[name])} held-out documents of at least {seq_len} tokens, but "
                f"{count} are asked for; ask for fewer windows, shorten seq_len or raise held_out_fraction"
            )
    return windows


def probe_windows(held_out: Mapping[str, Tensor], *, seq_len: int, num_windows: int) -> Tensor:
    """At most `num_windows` windows [n, seq_len] of the tokens of held-out windows, from each source in turn.

    Longer windows than the held-out ones are joined from them; where all of them are too short for one, it ends early.
    """
    flat = [windows.flatten() for windows in held_out.values()]
    if all(len(tokens) < seq_len for tokens in flat):
        flat = [torch.cat(flat)]
    seq_len = min(seq_len, max(map(len, flat)))
    rows = [tokens[: len(tokens) // seq_len * seq_len].view(-1, seq_len) for tokens in flat]
    in_turn = [row for row in chain.from_iterable(zip_longest(*rows)) if row is not None]
    return torch.stack(in_turn[:num_windows])


def _shared_out(sources: Sequence[DataSource], num_windows: int) -> list[tuple[str, DataSource, int]]:
    """Name, source and number of windows of each source."""
    names = [source_name(source) for source in sources]
    if len(set(names)) < len(names):
        raise ConfigError(f"two data sources have the same name: {names}; results are reported by name, rename one")
    if num_windows < len(sources):
        raise ConfigError(
            f"{num_windows} held-out windows cannot cover {len(sources)} sources; ask for at least one each"
        )
    rest = num_windows % len(sources)
    return [
        (name, source, num_windows // len(sources) + (position < rest))
        for position, (name, source) in enumerate(zip(names, sources, strict=True))
    ]
