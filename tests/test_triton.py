"""The Triton kernels under Triton's interpreter, against float64: tests/triton_<op>.py, each in a process of its own.

TRITON_INTERPRET must be set before Triton is imported and changes the whole process, so those files are not collected
with the others.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import subprocesses

HERE = Path(__file__).parent
FILES = sorted(HERE.glob("triton_*.py"))
GROUPS = {
    "attention": [f for f in FILES if f.stem.startswith("triton_attention")],
    "others": [f for f in FILES if not f.stem.startswith("triton_attention")],
}
GROUPS = {name: files for name, files in GROUPS.items() if files}

pytestmark = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.fixture(scope="module")
def processes() -> Iterator[dict[str, subprocess.Popen[str]]]:
    """The groups, at the same time."""
    started = {name: subprocesses.start(files, TRITON_INTERPRET="1") for name, files in GROUPS.items()}
    yield started
    for process in started.values():
        process.kill()


@pytest.mark.parametrize("group", GROUPS)
def test_under_the_interpreter(processes: dict[str, subprocess.Popen[str]], group: str) -> None:
    out, _ = processes[group].communicate()
    assert processes[group].returncode == 0, out[-20000:]
    assert re.search(r"[1-9]\d* passed", out)
