"""pytest in a process of its own, for tests that need an environment of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]


def start(files: Sequence[Path], **environment: str) -> subprocess.Popen[str]:
    """On one thread, as the arrays are small and other such processes run beside it; no backend asked for."""
    values = os.environ | {"OMP_NUM_THREADS": "1", "LLAMA_FAST_BACKEND": ""} | environment
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *map(str, files)]
    return subprocess.Popen(command, cwd=ROOT, env=values, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
