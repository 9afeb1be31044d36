"""Benchmarks of whole models, in the same form as those of operators."""
