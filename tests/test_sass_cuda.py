"""What nvcc made of the CUDA kernels is within benchmarks/sass_cuda.toml; and the check sees each kind of breach."""

from __future__ import annotations

from dataclasses import replace

import pytest

from benchmarks import sass_cuda
from benchmarks.sass_cuda import Usage

pytestmark = pytest.mark.skipif(sass_cuda.unavailable() is not None, reason=f"sass_cuda: {sass_cuda.unavailable()}")


@pytest.fixture(scope="module")
def usages() -> list[Usage]:
    path = sass_cuda.library()
    assert path is not None
    return sass_cuda.read(path)


def test_budget(usages: list[Usage]) -> None:
    assert not (broken := sass_cuda.problems(usages, sass_cuda.budget())), "\n".join(broken)


def test_budget_is_tight(usages: list[Usage]) -> None:
    """No looser than a quarter above what is used, so that it says something."""
    for kernel, limit in sass_cuda.budget().items():
        used = [u.registers for u in usages if u.kernel == kernel]
        assert not used or max(limit["registers"].values()) <= 1.25 * max(used) + 2, kernel


def test_breaches_are_seen(usages: list[Usage]) -> None:
    limits = sass_cuda.budget()
    one = next(u for u in usages if u.kernel == "norm_fwd_kernel" and not sass_cuda.ELEMENTWISE.search(u.name))
    rest = [u for u in usages if u is not one]
    wide = frozenset(op for op in one.instructions if not op.startswith("LDG.E.128"))
    for bad, text in (
        (replace(one, registers=255), "255 registers"),
        (replace(one, stack=8), "spills"),
        (replace(one, instructions=one.instructions | {"STL"}), "spills"),
        (replace(one, shared=1 << 20), "static shared memory"),
        (replace(one, instructions=wide), "no LDG.E.128"),
        (replace(one, kernel="new_kernel"), "not in sass_cuda.toml"),
    ):
        (found,) = sass_cuda.problems([bad, *rest], limits)
        assert text in found
    gone = [u for u in usages if u.kernel != "rope_kernel"]
    assert sass_cuda.problems(gone, limits) == ["rope_kernel: in sass_cuda.toml, and not in the library"]
