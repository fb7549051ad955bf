"""Generation."""

from bankwise.inference.generation import generate_text

__all__ = ["generate_text"]
