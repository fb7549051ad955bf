"""The word lists are wonderwords 3.0.1's, and the list that is never built equals the one that upstream builds."""

import hashlib
import json
import random
import shutil
from collections.abc import Iterator
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from itertools import islice
from pathlib import Path

import pytest

from bankwise.errors import DataError
from bankwise.evaluation.ruler import words
from bankwise.evaluation.ruler.words import AdjectiveNouns, adjective_nouns, check_words, common_words

WORDLISTS = json.loads((Path(__file__).parent / "golden" / "wordlists.json").read_text(encoding="utf-8"))


def sha256_of_lines(lines: Iterator[str]) -> str:
    digest, separator = hashlib.sha256(), ""
    while part := list(islice(lines, 20_000)):
        digest.update((separator + "\n".join(part)).encode())
        separator = "\n"
    return digest.hexdigest()


@pytest.fixture
def uncached() -> Iterator[None]:
    """Reads the files anew, and again after the test."""
    for cached in (words._read, common_words, adjective_nouns):
        cached.cache_clear()
    yield
    for cached in (words._read, common_words, adjective_nouns):
        cached.cache_clear()


def test_common_words_are_the_golden_ones() -> None:
    wanted = WORDLISTS["cwe_words_sorted"]
    assert len(common_words()) == wanted["count"] == 8166
    assert sha256_of_lines(iter(common_words())) == wanted["sha256_of_newline_join"]
    shuffled = list(common_words())
    random.Random(42).shuffle(shuffled)
    assert sha256_of_lines(iter(shuffled)) == WORDLISTS["cwe_words_shuffled_seed_42"]["sha256_of_newline_join"]


def test_adjective_nouns_are_the_golden_ones_in_the_golden_order() -> None:
    wanted = WORDLISTS["niah_words_sorted"]
    assert len(adjective_nouns()) == wanted["count"]
    assert (adjective_nouns()[0], adjective_nouns()[-1]) == (wanted["first"], wanted["last"])
    assert sha256_of_lines(iter(adjective_nouns())) == wanted["sha256_of_newline_join"]


def test_adjectives_that_begin_each_other_are_mixed() -> None:
    adjectives, nouns = ["far", "far-flung", "fa", "fat", "far"], ["zoo", "a", "flung-b", "flung"]
    wanted = sorted({f"{adjective}-{noun}" for adjective in adjectives for noun in nouns})
    lazy = AdjectiveNouns(adjectives, nouns)
    assert list(lazy) == wanted
    assert lazy[2:9:3] == wanted[2:9:3]
    with pytest.raises(IndexError):
        lazy[len(wanted)]


@pytest.mark.parametrize("name", list(words.WORD_FILES))
def test_hashes_are_the_golden_ones(name: str) -> None:
    assert words.WORD_FILES[name] == WORDLISTS["files"][f"assets/{name}"]["sha256"]


@pytest.mark.usefixtures("uncached")
def test_missing_package_is_named_with_the_way_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(words.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"wonderwords is not installed.*pip install wonderwords==3\.0\.1"):
        check_words()


@pytest.mark.usefixtures("uncached")
@pytest.mark.parametrize(("change", "message"), [("one more", "has sha256"), ("gone", "does not exist")])
def test_other_version_is_refused(change: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    spec = find_spec("wonderwords")
    assert spec is not None
    assert spec.submodule_search_locations is not None
    shutil.copytree(Path(spec.submodule_search_locations[0]) / "assets", tmp_path / "assets")
    verbs = tmp_path / "assets" / "verblist.txt"
    if change == "gone":
        verbs.unlink()
    else:
        verbs.write_text(verbs.read_text(encoding="utf-8") + "yodel\n", encoding="utf-8")
    other = ModuleSpec("wonderwords", None, is_package=True)
    other.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(words.importlib.util, "find_spec", lambda name: other)
    with pytest.raises(DataError, match=rf"verblist\.txt {message}.*pip install wonderwords==3\.0\.1"):
        check_words()
