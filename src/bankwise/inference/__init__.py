"""Generation, and making a model ready for it."""

from bankwise.inference.decoding import prepare
from bankwise.inference.generation import generate_text

__all__ = ["generate_text", "prepare"]
