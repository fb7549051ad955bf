"""Outside programs (pip, apt-get, npm): run them, and tell in one line why one failed."""

import subprocess
from collections.abc import Sequence
from pathlib import Path

from bankwise.errors import DataError


def run_program(command: Sequence[str], folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The finished program with its output, whatever its exit code; runs in `folder`."""
    try:
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except OSError as error:
        raise DataError(f"{command[0]} cannot be run ({error.strerror}); check that it is installed") from error


def last_error(done: subprocess.CompletedProcess[str]) -> str:
    """The line of a failed program's output that says most: its last error, else its last line."""
    lines = [line.strip() for line in (done.stdout + done.stderr).splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith(("error", "e: ", "npm err"))]
    return (errors or lines or ["no output"])[-1]
