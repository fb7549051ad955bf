"""The training documents of a source as token ids on disk, tokenised once.

A folder of the cache holds one file with the ids of all documents, one after the other, and their lengths. Its name is
a hash of the texts, the tokenizer's rules and the layout, so whatever changes one of them reads another folder. Rows
are read from the memory-mapped file: no process holds the tokens.
"""

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from bankwise.cache import cache_folder
from bankwise.config import DataSource
from bankwise.data.sources import Document, load_training_documents, source_name
from bankwise.data.windows import encode
from bankwise.errors import DataError
from bankwise.files import put_folder
from bankwise.processes import from_main

_LAYOUT = 1  # of the files; another number makes every cached folder unread
_CHARS_AT_ONCE = 1 << 23  # of text that is tokenised together: documents for all cores, some 300 MB for a moment


@dataclass(frozen=True)
class TokenizedDocuments:
    """Where the token ids of each document lie."""

    path: Path
    dtype: str
    starts: np.ndarray
    """int64: place of each document's first token in the file."""
    lengths: np.ndarray
    """int64: tokens of each document, at least 1."""

    def __len__(self) -> int:
        return len(self.lengths)

    def tokens(self) -> np.ndarray:
        """The token ids of all documents, memory-mapped."""
        return np.memmap(self.path, dtype=self.dtype, mode="r")


def tokenized_training_split(
    source: DataSource, tokenizer: PreTrainedTokenizerBase, held_out_fraction: float, *, progress: bool = False
) -> TokenizedDocuments:
    """The training documents of `source` that have min_tokens to max_tokens tokens, their eos included.

    The tokenizer's own threads use all cores, with no process to start. All processes of a launch call it: the main one
    reads the documents, the others only where their machine has a cache of its own. Launches that ask at the same
    time wait for the one that tokenises. Each document has its bos by the tokenizer's rule and ends with eos where
    there is one.
    """
    tokens = cache_folder("tokens")

    def tokenise() -> str:
        return _tokenise(tokens, source, tokenizer, held_out_fraction, progress)

    try:
        folder = tokens / from_main(tokenise)
        lengths = _lengths(folder)
        if lengths is None:
            tokenise()
            lengths = _lengths(folder)
        assert lengths is not None
    except OSError as error:
        raise DataError(
            f"the tokens of {source.path} cannot be kept in {tokens} ({error.strerror}); set BANKWISE_CACHE to a "
            "folder with space that can be written"
        ) from error
    starts = np.cumsum(lengths) - lengths
    lowest, highest = max(1, int(source.min_tokens)), int(source.max_tokens)
    kept = (lengths >= lowest) & ((lengths <= highest) if highest else True)
    if not kept.any():
        raise DataError(
            f"{source.path} has no training document of min_tokens={source.min_tokens} to "
            f"max_tokens={source.max_tokens or 'any'} tokens; its {len(lengths)} documents have {lengths.min()} to "
            f"{lengths.max()}"
        )
    return TokenizedDocuments(folder / "tokens.bin", _dtype(tokenizer), starts[kept], lengths[kept])


def _tokenise(
    tokens: Path, source: DataSource, tokenizer: PreTrainedTokenizerBase, held_out_fraction: float, progress: bool
) -> str:
    """Name of the source's folder in `tokens`, which is there and whole afterwards."""
    documents = load_training_documents(source, held_out_fraction)
    folder = tokens / _key(documents, tokenizer)
    if _lengths(folder) is None:
        tokens.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if _lengths(folder) is None:
                _write(folder, documents, tokenizer, source_name(source), progress)
    return folder.name


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """sha256 over the tokenizer's rules, or over its vocabulary where it has no serialised form."""
    backend: Any = getattr(tokenizer, "backend_tokenizer", None)
    rules = tokenizer.get_vocab() if backend is None else json.loads(backend.to_str())
    for state in ("padding", "truncation"):  # left behind by the last call, no part of the rules
        rules.pop(state, None)
    return hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest()


def _key(documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase) -> str:
    settings = [_LAYOUT, _dtype(tokenizer), tokenizer_fingerprint(tokenizer), tokenizer.eos_token_id]
    digest = hashlib.sha256(json.dumps(settings).encode())
    for document in documents:
        text = document.text.encode("utf-8", "surrogatepass")
        digest.update(len(text).to_bytes(8, "big") + text)
    return digest.hexdigest()[:32]


def _dtype(tokenizer: PreTrainedTokenizerBase) -> str:
    return "uint16" if len(tokenizer) <= 1 << 16 else "int32"


def _lengths(folder: Path) -> np.ndarray | None:
    """Lengths of the documents in a folder that is there and whole (a crash of the machine can leave a torn one)."""
    try:
        lengths = np.load(folder / "lengths.npy")
        dtype = (folder / "dtype.txt").read_text(encoding="utf-8")
        is_whole = (folder / "tokens.bin").stat().st_size == int(lengths.sum()) * np.dtype(dtype).itemsize
    except (FileNotFoundError, ValueError, EOFError, TypeError):
        return None
    return lengths if is_whole else None


def _write(
    folder: Path, documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, name: str, progress: bool
) -> None:
    """Tokenise into a folder beside `folder` and put that in its place.

    The caller holds the lock, so what lies there already is what a killed process left.
    """
    partial = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    dtype = _dtype(tokenizer)
    lengths: list[int] = []
    try:
        partial.mkdir()
        with (
            (partial / "tokens.bin").open("wb") as file,
            tqdm(
                total=sum(len(document.text) for document in documents), desc=f"tokenise {name}", unit="char",
                unit_scale=True, leave=False, disable=None if progress else True,
            ) as bar,
        ):  # fmt: skip
            for texts in _batches(documents):
                for ids in encode(texts, tokenizer):
                    ids.numpy().astype(dtype).tofile(file)
                    lengths.append(len(ids))
                bar.update(sum(map(len, texts)))
        np.save(partial / "lengths.npy", np.array(lengths, dtype=np.int64))
        (partial / "dtype.txt").write_text(dtype, encoding="utf-8")
        put_folder(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _batches(documents: Sequence[Document]) -> Iterator[list[str]]:
    batch: list[str] = []
    chars = 0
    for document in documents:
        batch.append(document.text)
        chars += len(document.text)
        if chars >= _CHARS_AT_ONCE:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch
