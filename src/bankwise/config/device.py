"""On what a run or an evaluation works."""

from typing import Literal

Device = Literal["auto", "cpu", "cuda"]
"""`auto`: a CUDA device (NVIDIA, or AMD under ROCm) where there is one, otherwise the CPU."""
