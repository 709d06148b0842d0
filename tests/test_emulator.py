"""csrc/emulator on small kernels of its own: the instructions, the schedule, and every check, each seen to catch."""

from __future__ import annotations

import emulated
import pytest
import torch

pytestmark = pytest.mark.skipif(emulated.unavailable() is not None, reason=f"emulator: {emulated.unavailable()}")


def test_shuffles_shared_memory_and_barriers() -> None:
    x, y = torch.rand(1000), torch.full((1000,), torch.nan)
    assert emulated.run(emulated.load("basics"), "block_sums", x, y, 1000, 1000) == ""
    sums = torch.nn.functional.pad(x, (0, 24)).view(4, 256).sum(1).repeat_interleave(256)[:1000]
    torch.testing.assert_close(y, sums)


def test_a_global_access_outside_the_tensor_names_thread_and_tensor() -> None:
    x, y = torch.rand(1000), torch.full((1000,), torch.nan)
    report = emulated.run(emulated.load("basics"), "block_sums", x, y, 1000, 1001)
    expected = "block (3,0,0) thread 232 (warp 7 lane 8): ld.global: 4 bytes at offset 4000 of x, which has 4000 bytes"
    assert report == f"block_sums: {expected}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cp_async_ldmatrix_and_mma(dtype: torch.dtype) -> None:
    a, b, d = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype), torch.full((16, 8), torch.nan)
    assert emulated.run(emulated.load("basics"), "product", a, b, d, dtype == torch.bfloat16) == ""
    torch.testing.assert_close(d, (a.double() @ b.double()).float())


@pytest.mark.parametrize(("dtype", "M", "N", "K"), [(torch.bfloat16, 100, 150, 328), (torch.float16, 64, 96, 8)])
def test_tma_mbarrier_and_wgmma(dtype: torch.dtype, M: int, N: int, K: int) -> None:
    a, b, c = torch.randn(M, K).to(dtype), torch.randn(N, K).to(dtype), torch.full((M, N), torch.nan)
    assert emulated.run(emulated.load("hopper"), "gemm", a, b, c, M, N, K, dtype == torch.bfloat16) == ""
    torch.testing.assert_close(c, (a.double() @ b.double().T).float(), atol=1e-4, rtol=1e-4)
