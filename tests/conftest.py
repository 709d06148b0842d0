"""Fixtures that all tests share."""

from __future__ import annotations

import functools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

# Before torch: threads that wait must not keep a core from the processes beside them (pytest -n, compilers, workers).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    import interpreter_rounding

    interpreter_rounding.install()


def pytest_configure(config: pytest.Config) -> None:
    """One folder for what the tests compile, which the processes of a run share (pytest -n) and its first removes."""
    if "LLAMA_FAST_TESTS_FOLDER" not in os.environ:
        folder = os.environ["LLAMA_FAST_TESTS_FOLDER"] = tempfile.mkdtemp(prefix="llama_fast_tests_")

        def remove() -> None:
            del os.environ["LLAMA_FAST_TESTS_FOLDER"]
            shutil.rmtree(folder, ignore_errors=True)

        config.add_cleanup(remove)


@pytest.fixture(autouse=True)
def nan_filled_memory() -> Iterator[None]:
    """Fills what torch.empty gives with NaN, so that a value which a kernel forgets to write is seen."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    """torch.distributed with this process alone."""
    if not torch.distributed.is_available():
        pytest.skip("this torch has no distributed package")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.fixture
def sides(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[Callable[..., dict[str, Any]]], None]:
    """Puts `ask(folder, **request)` in the place of both workers of a comparison; the old revision is in tmp_path."""
    from benchmarks import compare

    def put(ask: Callable[..., dict[str, Any]]) -> None:
        class Side(AbstractContextManager[Any]):
            def __init__(self, folder: Path) -> None:
                self.ask = functools.partial(ask, folder)

            def __exit__(self, *_: object) -> None:
                pass

        monkeypatch.setattr(compare, "Worker", Side)
        monkeypatch.setattr(compare, "checkout", lambda revision: (tmp_path, "c0ffee" + "0" * 34))

    return put
