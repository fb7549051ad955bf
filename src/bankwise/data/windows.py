"""Token windows: documents, tokenised and cut into rows of equal length.

Deterministic: the same documents, tokenizer and seed give the same rows. No document is tokenised further than the
windows asked for need.
"""

import logging
import random
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from bankwise.config import DataSource
from bankwise.data.sources import Document, load_split, load_training_documents
from bankwise.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

_CHARS_PER_TOKEN = 8  # generous, so that one prefix of a text nearly always suffices
_BATCH = 64  # documents that are tokenised together


def token_windows(
    documents: Sequence[Document],
    tokenizer: PreTrainedTokenizerBase,
    *,
    seq_len: int,
    max_windows: int | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Windows [n, seq_len] of token ids that do not overlap, in a seeded order.

    Each document is tokenised on its own by the tokenizer's rule (its bos, if it adds one), and ends with eos where
    the tokenizer has one (not where it is left off early). The documents are joined in a seeded order and cut; a rest
    below `seq_len` is dropped.

    With `max_windows`, every document gives only its first few windows, evenly, until there are enough; the rest of
    the documents is read when that was too little. Fewer windows come back when the text ends. `progress` is called
    with the tokens collected and the tokens wanted (0: all).
    """
    if seq_len < 1:
        raise ConfigError(f"seq_len={seq_len} must be at least 1")
    if max_windows is not None and max_windows < 1:
        raise ConfigError(f"max_windows={max_windows} must be at least 1, or None for all")
    order = list(documents)
    generator = random.Random(seed)
    generator.shuffle(order)
    wanted = 0 if max_windows is None else max_windows * seq_len

    def report(collected: int) -> None:
        if progress is not None:
            progress(collected, wanted)

    pieces = (
        _all_tokens(order, tokenizer, report)
        if max_windows is None
        else _spread_tokens(order, tokenizer, seq_len, max_windows, report)
    )
    tokens = torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.long)
    num_windows = len(tokens) // seq_len
    if num_windows == 0:
        raise DataError(
            f"{len(order)} documents have {len(tokens)} tokens, which is less than one window of seq_len={seq_len}; "
            "add text or shorten seq_len"
        )
    if max_windows is not None:
        num_windows = min(num_windows, max_windows)
    shuffled = list(range(num_windows))
    generator.shuffle(shuffled)
    return tokens[: num_windows * seq_len].view(num_windows, seq_len)[shuffled]


def document_starts(
    documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, *, seq_len: int, max_windows: int, seed: int = 0
) -> Tensor:
    """Windows [n, seq_len], n <= max_windows: the first tokens of documents that are that long, in a seeded order."""
    order = list(documents)
    random.Random(seed).shuffle(order)
    starts: list[Tensor] = []
    for document in order:
        if len(starts) == max_windows:
            break
        ids, _ = _encode_start(document.text, seq_len, tokenizer)
        if len(ids) == seq_len:
            starts.append(ids)
    return torch.stack(starts) if starts else torch.empty(0, seq_len, dtype=torch.long)


def mixed_windows(
    sources: Sequence[DataSource],
    tokenizer: PreTrainedTokenizerBase,
    *,
    seq_len: int,
    num_windows: int,
    split: Literal["train", "held_out"],
    held_out_fraction: float,
    seed: int = 0,
) -> Tensor:
    """Windows [num_windows, seq_len] of one split, shared among the sources by weight and interleaved by the seed.

    Every source gives at least one window where there are enough windows for that. A training source that is too
    small repeats its windows, with a warning; a held-out one raises, since a repeated window would count twice.
    """
    if not sources:
        raise ConfigError("no data source is given; name at least one, for example package:pydoc")
    if num_windows < 1:
        raise ConfigError(f"num_windows={num_windows} must be at least 1")
    if split not in ("train", "held_out"):
        raise ConfigError(f"split={split!r} is not known; use train or held_out")
    parts: list[Tensor] = []
    for source, share in zip(
        sources, shares_by_weight([source.weight for source in sources], num_windows), strict=True
    ):
        if share == 0:
            continue
        if split == "train":
            documents = load_training_documents(source, held_out_fraction)
        else:
            _, documents = load_split(source, held_out_fraction)
        try:
            windows = token_windows(documents, tokenizer, seq_len=seq_len, max_windows=share, seed=seed)
        except DataError as error:
            raise DataError(f"{source.path} ({split} split): {error}") from error
        if len(windows) < share:
            windows = _repeated(windows, share, source, split)
        parts.append(windows)
    rows = torch.cat(parts)
    shuffled = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    return rows[shuffled]


def shares_by_weight(weights: Sequence[float], total: int) -> list[int]:
    """Integers that add up to `total`, in proportion to the weights (largest remainder), none 0 if that can be."""
    quotas = [weight / sum(weights) * total for weight in weights]
    shares = [int(quota) for quota in quotas]
    by_remainder = sorted(range(len(shares)), key=lambda index: (shares[index] - quotas[index], index))
    for index in by_remainder[: total - sum(shares)]:
        shares[index] += 1
    if total >= len(shares):
        while 0 in shares:
            shares[shares.index(max(shares))] -= 1
            shares[shares.index(0)] += 1
    return shares


def _repeated(windows: Tensor, share: int, source: DataSource, split: str) -> Tensor:
    available, seq_len = windows.shape
    if split == "held_out":
        raise DataError(
            f"{source.path} has only {available} held-out windows of seq_len={seq_len}, but {share} are asked for; "
            "ask for fewer, raise held_out_fraction or shorten seq_len"
        )
    logger.warning(
        "%s has %d training windows of %d tokens; they are repeated for %.1f epochs to give %d",
        source.path,
        available,
        seq_len,
        share / available,
        share,
    )
    return windows.repeat(-(-share // available), 1)[:share]


def _all_tokens(
    documents: list[Document], tokenizer: PreTrainedTokenizerBase, report: Callable[[int], None]
) -> list[Tensor]:
    pieces: list[Tensor] = []
    collected = 0
    for start in range(0, len(documents), _BATCH):
        pieces += encode([document.text for document in documents[start : start + _BATCH]], tokenizer)
        collected += sum(map(len, pieces[start:]))
        report(collected)
    return pieces


def _spread_tokens(
    documents: list[Document],
    tokenizer: PreTrainedTokenizerBase,
    seq_len: int,
    max_windows: int,
    report: Callable[[int], None],
) -> list[Tensor]:
    """At least `max_windows * seq_len` tokens, or all: an even share of each document, then the rest."""
    pieces: list[Tensor] = []
    missing = max_windows * seq_len
    share = (-(-max_windows // max(1, len(documents))) + 1) * seq_len
    unfinished = []
    for document in documents:
        start, is_whole = _encode_start(document.text, share, tokenizer)
        pieces.append(start)
        if not is_whole:
            unfinished.append((document, len(start)))
        missing -= len(start)
        report(max_windows * seq_len - missing)
        if missing <= 0:
            return pieces
    for document, taken in unfinished:
        pieces += [ids[taken:] for ids in encode([document.text], tokenizer)]
        missing -= len(pieces[-1])
        report(max_windows * seq_len - missing)
        if missing <= 0:
            break
    return pieces


def _encode_start(text: str, num_tokens: int, tokenizer: PreTrainedTokenizerBase) -> tuple[Tensor, bool]:
    """The first `num_tokens` tokens of a text and whether these are all; reads no more of the text than that takes.

    The prefix ends before white space, where tokenizers start a new token anyway, so its tokens are the text's own.
    """
    num_chars = num_tokens * _CHARS_PER_TOKEN
    while num_chars < len(text):
        end = max(text.rfind(" ", 0, num_chars), text.rfind("\n", 0, num_chars))
        (ids,) = encode([text[:end].rstrip() if end > 0 else text[:num_chars]], tokenizer)
        if len(ids) > num_tokens:  # more, so that the eos which ends the prefix is never taken
            return ids[:num_tokens], False
        num_chars *= 2
    (ids,) = encode([text], tokenizer)
    return ids[:num_tokens], len(ids) <= num_tokens


def encode(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[Tensor]:
    """Token ids of each text, each closed by eos where the tokenizer has one."""
    pieces = []
    for ids in tokenizer(texts, verbose=False)["input_ids"]:
        if tokenizer.eos_token_id is not None and (not ids or ids[-1] != tokenizer.eos_token_id):
            ids = [*ids, tokenizer.eos_token_id]
        pieces.append(torch.tensor(ids, dtype=torch.long))
    return pieces
