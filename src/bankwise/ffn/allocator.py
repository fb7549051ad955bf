"""Memory of CPU tensors between two steps."""

import ctypes
import sys

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # <malloc.h>
_LARGEST_INT = 2**31 - 1


def keep_freed_memory() -> bool:
    """Let glibc keep the memory of freed CPU tensors for the next ones, in this process; True where it could be set.

    By default it returns megabytes to the system on every free and faults them in again, page by page: on two cores
    that is a third of the sparse training step, and 5 % of the dense one (docs/research-log.md, "Cost of a training
    step"). The price is that the process stays at its peak size. Does nothing where tensors live on a GPU, or without
    glibc.
    """
    if sys.platform != "linux" or torch.cuda.is_available():
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST_INT)) and bool(mallopt(_M_TRIM_THRESHOLD, _LARGEST_INT))
