"""Fixtures that all tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    import interpreter_rounding

    interpreter_rounding.install()


@pytest.fixture(autouse=True)
def nan_filled_memory() -> Iterator[None]:
    """Fills what torch.empty gives with NaN, so that a value which a kernel forgets to write is seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
