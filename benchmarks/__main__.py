"""`python -m benchmarks [OP ...]`: all cases of these ops, or of every op. `--help` lists the options."""

from __future__ import annotations

import sys

from . import suite
from .harness import pin_threads

pin_threads()
sys.exit(suite.main(sys.argv[1:]))
