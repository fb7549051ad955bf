"""The CPU operators: one C++ library, compiled on first use, with a copy of its inner loops per instruction set."""
