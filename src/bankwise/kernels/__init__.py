"""Fast implementations of what `bankwise.ffn` defines, and the choice between them (`dispatch`).

Importing the package lets every `SparseSwiGLU` use them in evaluation mode without gradients. They change neither
training nor checkpoints.
"""

from bankwise.ffn.layer import SparseSwiGLU
from bankwise.kernels import dispatch

SparseSwiGLU.fast_forward = dispatch.fast_forward

__all__ = ["dispatch"]
