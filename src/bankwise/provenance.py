"""Where numbers come from: revision, versions, device."""

import platform
import resource
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import transformers

from bankwise import __version__
from bankwise.precision import multiplies_bf16
from bankwise.processes import own_device


def environment(seconds: float) -> dict[str, Any]:
    """Command, revision, device, versions, wall time and peak memory of this process, for a report's last section."""
    device = own_device()
    return {
        "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "git_revision": _git_revision(),
        "device": platform.processor() or "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device),
        "threads": torch.get_num_threads(),
        "bfloat16_products": multiplies_bf16(device.type),
        "versions": {
            "bankwise": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "seconds": round(seconds, 1),
        "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }


def _git_revision() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "not a git checkout"
