"""The word lists of wonderwords 3.0.1, which RULER draws from.

Another version of the package holds other words and so gives other prompts: the files' hashes are checked. The package
is read where it is installed, never imported.
"""

import hashlib
import importlib.util
from bisect import bisect_right
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import overload

from bankwise.errors import DataError

WONDERWORDS_VERSION = "3.0.1"
WORD_FILES = {
    "nounlist.txt": "8d88b3ebc2e2969ed92ebe49cdb0c8a87c2ad3b27493d7afdff608f2e51c5bc9",
    "adjectivelist.txt": "66814d46b7e292c83e839d12fe2fa083c8f66779b14b294e1be4e1342c5d4131",
    "verblist.txt": "9fbf5e4e69b8869aebd88e6d545312ff9f878a747327ede5f6dbbba5c27b08ad",
}
"""sha256 of each file."""


class AdjectiveNouns(Sequence[str]):
    """All strings `adjective-noun` in sorted order, 6,171,620 of them, made one by one when asked for.

    The strings that begin with one `adjective-` stand together in sorted order, and the nouns sort them. Where an
    `adjective-` begins another one ("far-", "far-flung-") their strings mix: such adjectives form a group whose
    strings are sorted outright.
    """

    def __init__(self, adjectives: Sequence[str], nouns: Sequence[str]) -> None:
        self._nouns = sorted(set(nouns))
        self._groups: list[list[str]] = []
        for start in sorted({f"{adjective}-" for adjective in adjectives}):
            if self._groups and start.startswith(self._groups[-1][0]):
                self._groups[-1].append(start)
            else:
                self._groups.append([start])
        self._mixed = {
            index: sorted({start + noun for start in group for noun in self._nouns})
            for index, group in enumerate(self._groups)
            if len(group) > 1
        }
        sizes = [len(self._mixed.get(index, self._nouns)) for index in range(len(self._groups))]
        self._ends = list(accumulate(sizes))

    def __len__(self) -> int:
        return self._ends[-1]

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        place = index + len(self) if index < 0 else index
        if not 0 <= place < len(self):
            raise IndexError(index)
        group = bisect_right(self._ends, place)
        within = place - (self._ends[group - 1] if group else 0)
        if group in self._mixed:
            return self._mixed[group][within]
        return self._groups[group][0] + self._nouns[within]


@lru_cache
def common_words() -> tuple[str, ...]:
    """The 8166 nouns, adjectives and verbs of the common-words task, sorted."""
    return tuple(sorted({word for name in WORD_FILES for word in _read(name)}))


@lru_cache
def adjective_nouns() -> AdjectiveNouns:
    """The words of the needle tasks."""
    return AdjectiveNouns(_read("adjectivelist.txt"), _read("nounlist.txt"))


def check_words() -> None:
    """Raises where the word lists are missing or are not those of the pinned version."""
    for name in WORD_FILES:
        _read(name)


@lru_cache
def _read(name: str) -> tuple[str, ...]:
    remedy = (
        f"RULER's words are those of wonderwords {WONDERWORDS_VERSION}: pip install wonderwords=={WONDERWORDS_VERSION}"
    )
    spec = importlib.util.find_spec("wonderwords")
    if spec is None or not spec.submodule_search_locations:
        raise DataError(f"wonderwords is not installed; {remedy}")
    path = Path(next(iter(spec.submodule_search_locations))) / "assets" / name
    content = path.read_bytes() if path.is_file() else b""
    digest = hashlib.sha256(content).hexdigest()
    if digest != WORD_FILES[name]:
        found = f"has sha256 {digest[:12]}..., not {WORD_FILES[name][:12]}..." if content else "does not exist"
        raise DataError(f"{path} {found}; {remedy}")
    return tuple(line.rstrip() for line in content.decode("utf-8").splitlines())
