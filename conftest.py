"""Where there is no GPU, Triton's interpreter runs the GPU kernels on tensors of the CPU.

It has to be on before anything imports triton, as transformers does in `tests/conftest.py`.
"""

import os
import sys

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# There is no triton for other systems.
collect_ignore_glob = [] if sys.platform == "linux" else ["tests/kernels/test_triton_*.py"]
