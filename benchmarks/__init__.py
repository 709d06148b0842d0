"""Benchmarks: one file an op, each a list of cases; harness.py measures them. Installed as llama_fast.benchmarks."""
