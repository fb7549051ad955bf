"""Fast implementations of what `bankwise.ffn` defines, and the choice between them (`dispatch`).

Importing the package lets every `SparseSwiGLU` use them: in evaluation mode without gradients, and for the default gate
in training on a GPU. They never change checkpoints.
"""

from bankwise.ffn.layer import SparseSwiGLU
from bankwise.kernels import dispatch

SparseSwiGLU.fast_forward = dispatch.fast_forward
SparseSwiGLU.unit_gate = dispatch.unit_gate

__all__ = ["dispatch"]
