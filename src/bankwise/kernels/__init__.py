"""Fast implementations of what `bankwise.ffn` defines, and the choice between them (`dispatch`).

Importing the package lets every `SparseSwiGLU` use them: in evaluation mode without gradients, and for the router of
training and prompts - the bank selection, the default gate, on a CPU the product form's logits. They change neither
results of training (beyond rounding) nor checkpoints.
"""

from bankwise.ffn import bank
from bankwise.ffn.layer import SparseSwiGLU
from bankwise.ffn.predictor import Predictor
from bankwise.kernels import dispatch

SparseSwiGLU.fast_forward = dispatch.fast_forward
SparseSwiGLU.unit_gate = dispatch.unit_gate
Predictor.product_logits = dispatch.product_logits
bank.fast_cut = dispatch.fast_cut

__all__ = ["dispatch"]
