"""Fast implementations of what `bankwise.ffn` defines, and the choice between them (`dispatch`).

Importing the package lets every `SparseSwiGLU` use them in evaluation mode without gradients, and the bank selection of
training and prompts. They change neither results of training nor checkpoints.
"""

from bankwise.ffn import bank
from bankwise.ffn.layer import SparseSwiGLU
from bankwise.kernels import dispatch

SparseSwiGLU.fast_forward = dispatch.fast_forward
bank.fast_cut = dispatch.fast_cut

__all__ = ["dispatch"]
