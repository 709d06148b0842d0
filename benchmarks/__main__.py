"""`python -m llama_fast.benchmarks [OP ...]`: all cases of these ops, or of every op."""

from __future__ import annotations

import sys

from llama_fast.ops.table import OPS

from .suite import main

main(sys.argv[1:] or list(OPS))
