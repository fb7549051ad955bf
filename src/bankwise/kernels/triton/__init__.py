"""The GPU kernels, in Triton: fused routing for training, and decoding of a few tokens from the packed weights.

`triton` is imported by the modules that hold kernels alone, and those only where the kernels can run (`support`).
"""
