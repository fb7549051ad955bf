"""The training rows of a stage: sources by weight, each packed epoch by epoch, interleaved by a seed.

Every row is a function of its number alone, so the order is the same after a resume and for any number of processes.
Held-out documents never enter. Only index arrays are held; a row is read from the memory-mapped tokens when it is asked
for.

Shapes: T tokens of a row.
"""

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from bankwise.config import DataSource, Packing
from bankwise.data.packing import PackedRows, join, pack
from bankwise.data.tokenized import TokenizedDocuments, tokenized_training_split
from bankwise.data.windows import shares_by_weight
from bankwise.errors import ConfigError

logger = logging.getLogger(__name__)

_ROWS_PACKED_TOGETHER = 32  # so that the padding at the end of an epoch is at most about 3%


@dataclass(frozen=True)
class _SourceRows:
    documents: TokenizedDocuments
    rows: PackedRows


class TrainingRows(Dataset):
    """Rows as `input_ids` [T] and `document_lengths`, whose sum is below T where the row ends in padding."""

    def __init__(self, sources: Sequence[_SourceRows], seed: int, pad_id: int) -> None:
        self.sources = list(sources)
        self.seq_len = self.sources[0].rows.seq_len
        self.pad_id = pad_id
        counts = [len(source.rows) for source in self.sources]
        generator = np.random.default_rng(seed)
        self._source = generator.permutation(np.repeat(np.arange(len(counts)), counts))
        self._row = np.empty(len(self._source), dtype=np.int64)
        for index, count in enumerate(counts):
            # A source's rows keep their order, so that its second epoch starts when its first is over.
            self._row[self._source == index] = np.arange(count)

    def __len__(self) -> int:
        return len(self._source)

    @property
    def real_tokens(self) -> int:
        """Tokens of text in all rows: all positions but the padding."""
        return sum(source.rows.tokens for source in self.sources)

    @property
    def padding(self) -> float:
        """Share of all positions that is padding."""
        return 1 - self.real_tokens / (len(self) * self.seq_len)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        source, rows = self.sources[self._source[index]].documents, self.sources[self._source[index]].rows
        pieces = slice(*rows.borders[self._row[index] :][:2])
        begins = source.starts[rows.documents[pieces]] + rows.starts[pieces]
        lengths = rows.lengths[pieces]
        row_T = np.full(self.seq_len, self.pad_id, dtype=np.int64)
        tokens, place = source.tokens(), 0
        for begin, length in zip(begins, lengths, strict=True):
            row_T[place : place + length] = tokens[begin : begin + length]
            place += length
        return {"input_ids": torch.from_numpy(row_T), "document_lengths": torch.from_numpy(lengths.copy())}


def training_rows(
    sources: Sequence[DataSource],
    tokenizer: PreTrainedTokenizerBase,
    *,
    seq_len: int,
    num_rows: int,
    packing: Packing,
    held_out_fraction: float,
    seed: int = 0,
    progress: bool = False,
    known: dict[str, TokenizedDocuments] | None = None,
) -> TrainingRows:
    """Exactly `num_rows` rows of `seq_len` positions, shared among the sources by weight.

    Every source gives at least one row where there are enough. Each epoch over a source is shuffled and packed anew
    (epochs of a few rows several at a time); a source that is too small is repeated, with a warning. `known` keeps what
    was read for later calls of the same run, which then do not read a stream again.
    """
    if not sources:
        raise ConfigError("no data source is given; name at least one, for example package:pydoc")
    if num_rows < 1 or seq_len < 2:
        raise ConfigError(f"num_rows={num_rows} must be at least 1 and seq_len={seq_len} at least 2")
    parts = []
    shares = shares_by_weight([source.weight for source in sources], num_rows)
    for index, (source, share) in enumerate(zip(sources, shares, strict=True)):
        if share == 0:
            continue
        key = repr(dataclasses.replace(source, weight=1.0))
        documents = None if known is None else known.get(key)
        if documents is None:
            documents = tokenized_training_split(source, tokenizer, held_out_fraction, progress=progress)
            if known is not None:
                known[key] = documents
        parts.append(_SourceRows(documents, _source_rows(source, documents, share, seq_len, packing, (seed, index))))
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    rows = TrainingRows(parts, seed % 2**32, pad or 0)
    logger.info("%d rows of %d tokens, %.2f%% padding", len(rows), seq_len, 100 * rows.padding)
    return rows


def _source_rows(
    source: DataSource, documents: TokenizedDocuments, share: int, seq_len: int, packing: Packing, seed: tuple[int, int]
) -> PackedRows:
    if packing.long_fraction and documents.lengths.max() < int(packing.long_threshold):
        logger.warning(
            "%s has no document of %s tokens or more, so long_fraction=%g changes nothing there",
            source.path,
            packing.long_threshold,
            packing.long_fraction,
        )

    def packed(first_epoch: int, epochs: int) -> PackedRows:
        generator = np.random.default_rng([seed[0] % 2**32, seed[1], first_epoch])
        drawn = np.concatenate([_epoch_documents(documents.lengths, packing, generator) for _ in range(epochs)])
        rows = pack(documents.lengths[drawn], seq_len, packing.mode).of_documents(drawn)
        return rows.take(generator.permutation(len(rows)))

    parts = [packed(0, 1)]
    size, tokens = len(parts[0]), parts[0].tokens
    # An epoch ends in a row that is mostly padding; where an epoch is a few rows, several are packed as one.
    together = 1 if packing.mode == "none" else -(-min(share, _ROWS_PACKED_TOGETHER) // size)
    if together > 1:
        parts = [packed(0, together)]
    made = len(parts[0])
    while made < share:
        parts.append(packed(len(parts) * together, together))
        made += len(parts[-1])
    rows = join(parts).take(np.arange(share))
    if rows.tokens > tokens:
        logger.warning(
            "%s has %d tokens for training in an epoch; they are read %.1f times to fill %d rows of %d",
            source.path,
            tokens,
            rows.tokens / tokens,
            share,
            seq_len,
        )
    return rows


def _epoch_documents(lengths: np.ndarray, packing: Packing, generator: np.random.Generator) -> np.ndarray:
    """The documents of one epoch in a random order: each once, and long ones again until they have their share."""
    is_long = lengths >= int(packing.long_threshold)
    long = generator.permutation(np.flatnonzero(is_long))
    long_tokens = int(lengths[long].sum())
    wanted = packing.long_fraction / (1 - packing.long_fraction) * int(lengths[~is_long].sum())
    if not long_tokens or long_tokens >= wanted:
        return generator.permutation(len(lengths))
    copies, rest = divmod(wanted, long_tokens)
    again = long[: int(np.searchsorted(np.cumsum(lengths[long]), rest))]
    return generator.permutation(np.concatenate([np.flatnonzero(~is_long), np.tile(long, int(copies)), again]))
