"""Fast implementations of what `bankwise.ffn` defines, and the choice between them (`dispatch`).

Importing the package lets every `SparseSwiGLU` use them: in evaluation mode without gradients, in the bank selection of
training and prompts, and for the default gate in training on a GPU. They change neither results of training (beyond
rounding, on a GPU) nor checkpoints.
"""

from bankwise.ffn import bank
from bankwise.ffn.layer import SparseSwiGLU
from bankwise.kernels import dispatch

SparseSwiGLU.fast_forward = dispatch.fast_forward
SparseSwiGLU.unit_gate = dispatch.unit_gate
bank.fast_cut = dispatch.fast_cut

__all__ = ["dispatch"]
