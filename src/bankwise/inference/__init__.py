"""Generation, and making a model ready for it."""

from bankwise.inference.decoding import prepare
from bankwise.inference.generation import generate_text
from bankwise.models.modeling import _SparseCausalLM

_SparseCausalLM.prepare_decoding = prepare

__all__ = ["generate_text", "prepare"]
