"""The emulator against PTX that it had no part in.

What Triton generates, which needs no GPU, runs on the emulator's fibers through its PTX interpreter, over the same
instructions that csrc/cuda/ptx.cuh calls, and has to give the right products.
"""

from __future__ import annotations

import os
import struct

import emulated
import pytest
import torch

triton = pytest.importorskip("triton", reason="emulator: PTX of Triton's: triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("emulator: PTX of Triton's: TRITON_INTERPRET=1 compiles nothing", allow_module_level=True)

import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

pytestmark = pytest.mark.skipif(emulated.unavailable() is not None, reason=f"emulator: {emulated.unavailable()}")
BM = BN = BK = 64
CONSTANTS = {"BM": BM, "BN": BN, "BK": BK}


@triton.jit
def product(a, b, c, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    m, n, k = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    acc = tl.zeros((BM, BN), tl.float32)
    for i in tl.range(0, K, BK, num_stages=3):
        x = tl.load(a + m[:, None] * K + (i + k)[None, :])
        y = tl.load(b + n[None, :] * K + (i + k)[:, None])
        acc = tl.dot(x, y, acc)
    tl.store(c + m[:, None] * BN + n[None, :], acc)


@triton.jit
def product_transposed(a, b, c, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    m, n, k = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    acc = tl.zeros((BM, BN), tl.float32)
    for i in tl.range(0, K, BK, num_stages=2):
        x = tl.load(a + (i + k)[None, :] * BM + m[:, None])
        y = tl.load(b + (i + k)[:, None] * BN + n[None, :])
        acc = tl.dot(x, y, acc)
    tl.store(c + m[:, None] * BN + n[None, :], acc)


@triton.jit
def product_tma(a, b, c, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    m, n = tl.arange(0, BM), tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    for i in tl.range(0, K, BK, num_stages=3):
        acc = tl.dot(a.load([0, i]), b.load([0, i]).T, acc)
    tl.store(c + m[:, None] * BN + n[None, :], acc)


def _compile(kernel: object, operand: str, capability: int) -> tuple[str, int]:
    signature = {"a": operand, "b": operand, "c": "*fp32", "K": "i32", **dict.fromkeys(CONSTANTS, "constexpr")}
    attributes = {(i,): [["tt.divisibility", 16]] for i in range(4) if i > 1 or operand.startswith("*")}
    source = ASTSource(fn=kernel, signature=signature, constexprs=CONSTANTS, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4})
    return compiled.asm["ptx"], compiled.metadata.shared


def _operands(K: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(rows, K, generator=generator).to(dtype) for rows in (BM, BN))
    return a, b, torch.full((BM, BN), torch.nan)


@pytest.mark.parametrize("transposed", [False, True], ids=["", "transposed"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("capability", "instruction"), [(80, "mma.sync"), (90, "wgmma.mma_async")])
def test_tritons_product(capability: int, instruction: str, dtype: torch.dtype, transposed: bool) -> None:
    kernel = product_transposed if transposed else product
    text, shared = _compile(kernel, "*bf16" if dtype == torch.bfloat16 else "*fp16", capability)
    assert instruction in text
    assert "cp.async.cg" in text
    a, b, c = _operands(K := 256, dtype)
    x, y = (a.T.contiguous(), b.T.contiguous()) if transposed else (a, b)
    device = emulated.Device()
    emulated.configure(proxy_fences=False)  # before 3.9 Triton had none between cp.async and wgmma
    pointers = [device.pointer(t, name) for t, name in ((x, "a"), (y, "b"), (c, "c"))]
    parameters = struct.pack("<QQQiiQQ", *pointers, K, 0, 0, 0)
    assert device.run_ptx(text, kernel.__name__, (1,), 128, shared, parameters) == ""
    torch.testing.assert_close(c, (a.double() @ b.double().T).float(), atol=1e-3, rtol=1e-4)


def test_tritons_product_with_tma() -> None:
    text, shared = _compile(product_tma, "tensordesc<bf16[64, 64]>", 90)
    for instruction in ("cp.async.bulk.tensor.2d", "mbarrier.try_wait", "wgmma.mma_async"):
        assert instruction in text
    a, b, c = _operands(K := 320, torch.bfloat16)
    device = emulated.Device()
    parameters = b""
    for t, name in ((a, "a"), (b, "b")):  # the map, then the tensor's sizes and strides
        parameters += device.tensor_map(t, (64, 64), name) + struct.pack("<iiqq", *t.shape, *t.stride())
        parameters += bytes(-len(parameters) % 64) if name == "a" else b""
    emulated.configure(proxy_fences=False)  # Triton has none behind mbarrier.init, which CUDA's guide has
    parameters += struct.pack("<QiiQQ", device.pointer(c, "c"), K, 0, 0, 0)
    assert device.run_ptx(text, "product_tma", (1,), 128, shared, parameters) == ""
    torch.testing.assert_close(c, (a.double() @ b.double().T).float(), atol=1e-3, rtol=1e-4)
