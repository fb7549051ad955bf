"""Fast implementations of what `bankwise.ffn` defines, and the choice between them (`dispatch`).

Importing the package lets every `SparseSwiGLU` use them: in evaluation mode without gradients, and for the router of
training and prompts - the bank selection, the default gate, on a CPU the product form's logits. On a CPU the loss over
the vocabulary is one of them too, for dense models as for sparse ones. They change neither results of training (beyond
rounding) nor checkpoints.
"""

from bankwise.ffn import bank
from bankwise.ffn.layer import SparseSwiGLU
from bankwise.ffn.predictor import Predictor
from bankwise.kernels import dispatch
from bankwise.models import lm_loss

SparseSwiGLU.fast_forward = dispatch.fast_forward
SparseSwiGLU.unit_gate = dispatch.unit_gate
Predictor.product_logits = dispatch.product_logits
bank.fast_cut = dispatch.fast_cut
lm_loss.fast_logit_loss = dispatch.logit_loss

__all__ = ["dispatch"]
