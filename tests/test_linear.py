"""The products of a linear layer: every path against float64, the frozen choice, when plain torch takes over, gemv."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from linear_products import ISAS, TRUTH, operands, problem, tiled
from numerics import DTYPES, target
from torch import Tensor
from torch.autograd import forward_ad

import llama_fast as lf
from llama_fast.ops import linear

SIZES = [(1, 1, 1), (1, 300, 70), (4, 33, 515), (5, 64, 32), (67, 129, 255), (300, 64, 1003), (0, 4, 5), (4, 5, 0)]


def problems(path: str | None, form: str, dtype: torch.dtype) -> list[str]:
    found = []
    for sizes in SIZES:
        for strided in (False, True):
            a, b = operands(form, *sizes, dtype, strided)
            truth, plain = TRUTH[form](a.double(), b.double()), TRUTH[form](a, b)
            with linear.force(path):
                result = getattr(linear, form)(a, b)
                out = getattr(linear, form)(a, b, out=torch.full_like(plain, torch.nan))
            found += [f"{sizes} {strided} {p}" for y in (result, out) if (p := problem(y, truth, plain, sizes[2]))]
    return found


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("path", [None, *linear.PATHS])
@pytest.mark.parametrize("form", linear.FORMS)
@pytest.mark.parametrize("slice_bytes", [linear._SLICE_BYTES, 1024])
def test_error(
    form: str, path: str | None, dtype: torch.dtype, slice_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(linear, "_SLICE_BYTES", slice_bytes)
    assert problems(path, form, dtype) == []


def test_a_planted_bug_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    turn = linear._turn
    monkeypatch.setattr(linear, "_turn", lambda x, out=None: turn(x * 1.001, out))
    assert problems("transposed", "nn", torch.float32)
    monkeypatch.undo()
    monkeypatch.setattr(linear, "_slices", lambda form, M, N, item: [(slice(0, M - 1), slice(None))])
    assert problems("transposed", "nn", torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("path", [None, *linear.PATHS])
def test_accumulate(path: str | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_SLICE_BYTES", 4096)
    for form in linear.FORMS:
        product = getattr(linear, form)
        for M, N, K in SIZES:
            a, b = operands(form, M, N, K, dtype)
            for kind in {dtype, torch.float32}:
                start = torch.randn(M, N, generator=torch.Generator().manual_seed(K)).to(kind)
                truth = start.double() + TRUTH[form](a.double(), b.double())
                out = start.clone()
                with linear.force(path):
                    assert product(a, b, out=out, accumulate=True) is out
                plain = start.to(dtype) + TRUTH[form](a, b)
                assert problem(out.to(dtype), truth, plain, K) == ""
        with pytest.raises(ValueError, match="out is None, expected a tensor to accumulate into"):
            product(a, b, accumulate=True)
    with pytest.raises(ValueError, match=r"bias has shape \(3,\), expected None with accumulate"):
        linear.nt(torch.ones(2, 4), torch.ones(3, 4), torch.ones(3), out=torch.ones(2, 3), accumulate=True)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("path", [None, *linear.PATHS])
def test_bias(path: str | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_SLICE_BYTES", 4096)
    for M, N, K in SIZES:
        x, w = operands("nt", M, N, K, dtype)
        bias = torch.randn(N, generator=torch.Generator().manual_seed(K)).to(dtype)
        truth, plain = (F.linear(*(t.to(kind) for t in (x, w, bias))) for kind in (torch.float64, dtype))
        out = torch.full((M, N), torch.nan, dtype=dtype)
        with linear.force(path):
            assert problem(linear.nt(x, w, bias), truth, plain, K) == ""
            assert linear.nt(x, w, bias, out=out) is out
        assert problem(out, truth, plain, K) == ""
        assert torch.equal(bias, torch.randn(N, generator=torch.Generator().manual_seed(K)).to(dtype))


@pytest.mark.parametrize("leaves", ["xwb", "xw", "b", ""])
def test_linear_with_a_bias_is_differentiable(leaves: str) -> None:
    drawn = torch.Generator().manual_seed(0)
    x, w, b = (torch.randn(size, generator=drawn) for size in ((2, 160, 96), (256, 96), (256,)))
    dy = torch.randn(2, 160, 256, generator=drawn)
    for name, t in zip("xwb", (x, w, b), strict=True):
        t.requires_grad_(name in leaves)
    found, want = linear.linear(x, w, b), F.linear(x.double(), w.double(), b.double())
    torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=1e-5)
    if leaves:
        inputs = [t for t in (x, w, b) if t.requires_grad]
        for got, exact in zip(
            torch.autograd.grad(found, inputs, dy), torch.autograd.grad(want, inputs, dy.double()), strict=True
        ):
            torch.testing.assert_close(got, exact, rtol=1e-5, atol=1e-4)
    assert found.requires_grad == bool(leaves)


@pytest.mark.parametrize("shape", [(7,), (2, 3, 7), (0, 7), (1, 1, 7)])
def test_leading_dimensions(shape: tuple[int, ...]) -> None:
    x, w = torch.randn(shape), torch.randn(5, 7)
    y = linear.nt(x, w)
    torch.testing.assert_close(y, F.linear(x, w))
    torch.testing.assert_close(linear.nn(y, w), y @ w)
    torch.testing.assert_close(linear.tn(y, x), y.reshape(-1, 5).T @ x.reshape(-1, 7))
    out = torch.full((*shape[:-1], 5), torch.nan)
    assert linear.nt(x, w, out=out) is out
    torch.testing.assert_close(out, y)


def test_an_out_of_another_shape_is_an_error() -> None:
    for path in linear.PATHS:
        with (
            linear.force(path),
            pytest.raises(ValueError, match=r"out has shape \(40, 71\) on cpu, expected \(40, 72\)"),
        ):
            linear.nt(
                torch.randn(40, 64).bfloat16(), torch.randn(72, 64).bfloat16(), out=torch.empty(40, 71).bfloat16()
            )


@pytest.mark.parametrize("path", ["brgemm", "upcast", "transposed", "gemv"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_out_on_another_device_is_an_error(dtype: torch.dtype, path: str) -> None:
    x, weight, out = torch.randn(3, 64), torch.randn(64, 64), torch.empty(3, 64, dtype=dtype, device="meta")
    with linear.force(path), pytest.raises((ValueError, RuntimeError), match=r"meta|device"):
        linear.nt(x.to(dtype), weight.to(dtype), out=out)


@pytest.mark.parametrize("path", ["torch", "brgemm", "gemv", "copied"])
@pytest.mark.parametrize("convert", [Tensor.to_sparse, Tensor.to_sparse_csr])
def test_sparse_operands_are_plain_torchs(convert: Callable[[Tensor], Tensor], path: str) -> None:
    # small whole numbers: every sum is exact
    x, weight = (torch.randint(-4, 5, (n, 256)).float() for n in (4, 300))
    for a, b in ((convert(x), weight), (x, convert(weight))):
        with linear.force(path):
            assert torch.equal(linear.linear(a, b), F.linear(x, weight))


@tiled(torch.float32)
@tiled(torch.bfloat16)
def test_the_frozen_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_amx", False)
    f32, bf16, f16, f64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
    monkeypatch.setattr(linear, "_amd_family", 0)  # another maker's
    for form in linear.FORMS:
        for dtype in (f32, bf16):
            assert linear.choose(form, dtype, 2048, 2048, 2048) == "torch"
    for family, path in ((25, "torch"), (26, "brgemm")):
        monkeypatch.setattr(linear, "_amd_family", family)
        for dtype in (f32, bf16):
            assert linear.choose("tn", dtype, 2048, 2048, 2048) == "brgemm"
        assert linear.choose("tn", f32, 2048, 2048, 64) == path
    for form in linear.FORMS:
        assert linear.choose(form, f32, 2048, 2048, 2048) == "brgemm"
        assert linear.choose(form, bf16, 2048, 2048, 2048) == "brgemm"
        assert linear.choose(form, f16, 2048, 2048, 2048) == "upcast"
        for dtype in (f32, bf16, f16, f64):
            assert linear.choose(form, dtype, 8, 8, 8) == "torch"
        assert linear.choose(form, f64, 2048, 2048, 2048) == "torch"
    for dtype in (f32, bf16):
        assert [linear.choose("nt", dtype, M, 2048, 2048) for M in (1, 4)] == ["gemv", "gemv"]
    for M in (5, 64):
        assert linear.choose("nt", f32, M, 2048, 2048) == "brgemm"
    for form, M, N, K in (
        ("nt", 256, 2048, 2048),
        ("nn", 128, 2048, 2048),
        ("nn", 512, 2048, 256),
        ("tn", 2048, 2048, 256),
    ):
        assert linear.choose(form, bf16, M, N, K) == "torch"
    assert linear.choose("tn", f32, 2048, 2048, 1) == "torch"
    for form in linear.FORMS:  # of low rank
        for dtype in (f32, bf16):
            assert linear.choose(form, dtype, 2048, 16, 2048) == "torch"
            assert linear.choose(form, dtype, 2048, 64, 2048) == "brgemm"
    for form in ("nt", "nn"):
        for dtype in (f32, bf16):
            assert linear.choose(form, dtype, 2048, 2048, 64) == "torch"
    assert linear.explain("nn", bf16, 512, 2048, 32000).startswith("nn bfloat16 [512, 2048] over 32000: brgemm (")
    monkeypatch.setattr(linear, "_amd_family", 0)
    assert linear.choose("nn", bf16, 512, 2048, 32000) == "transposed"


@pytest.mark.skipif(linear._native is None, reason="the native library is not built")
def test_the_rules_for_amd_are_for_avx512(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Zen 3 is of family 25 like a Zen 4, without AVX-512; oneDNN's kernel for float32 runs there too."""
    for isas, family in ((["avx2", "portable"], 0), (["avx512bf16", "avx512", "avx2", "portable"], 25)):
        native = SimpleNamespace(cpu=SimpleNamespace(isas=lambda found=isas: found, amd_family=lambda: 25))
        monkeypatch.setattr(linear, "_native", native)
        assert linear._probe_amd_family() == family


@pytest.mark.skipif(linear._transpose is None, reason="the native library is not built")
def test_the_frozen_choice_with_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_amx", True)
    monkeypatch.setattr(linear, "_amd_family", 0)
    f32, bf16, f16 = torch.float32, torch.bfloat16, torch.float16
    for form in linear.FORMS:
        for dtype in (f32, f16):
            assert linear.choose(form, dtype, 2048, 2048, 2048) == "torch"
        assert linear.choose(form, bf16, 64, 64, 64) == "torch"
    for M, N in ((2048, 768), (768, 2048), (2048, 2048), (32000, 4096)):
        assert linear.choose("tn", bf16, M, N, 1024) == "copied"
    for M, N in ((768, 768), (256, 2048), (2048, 256)):
        assert linear.choose("tn", bf16, M, N, 1024) == "torch"
    for M, N, K in ((1, 32000, 4096), (4, 768, 768), (4, 32000, 4096)):
        assert linear.choose("nt", bf16, M, N, K) == "gemv"
    for M, N, K in ((5, 2048, 2048), (64, 2048, 768), (256, 2048, 2048), (512, 32000, 768)):
        assert linear.choose("nt", bf16, M, N, K) == "transposed"
    for M, N, K in ((64, 768, 768), (257, 2048, 2048), (513, 32000, 768)):
        assert linear.choose("nt", bf16, M, N, K) == "torch"
    assert linear.choose("nn", bf16, 512, 2048, 32000) == "torch"
    for form, K, path in (("nn", 32003, "copied"), ("nt", 515, "copied"), ("tn", 515, "torch")):
        assert linear.choose(form, bf16, 512, 64, K) == path
    assert linear.choose("nt", bf16, 8, 8, 33) == "torch"


@pytest.mark.skipif(linear._transpose is None, reason="the native library is not built")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_transpose(isa: str, dtype: torch.dtype) -> None:
    for R, C in ((1, 1), (8, 8), (63, 65), (64, 64), (200, 333), (700, 1000), (704, 1003)):
        x = torch.randn(R, C + 3).to(dtype)[:, :C]
        for gap in (0, 5, 32):
            whole = torch.full((C, R + gap), torch.nan, dtype=dtype)
            y = whole[:, :R]
            with target(isa):
                linear._transpose(x, y)
            assert torch.equal(y, x.t())
            assert whole[:, R:].isnan().all()


@pytest.mark.skipif(linear._transpose is None, reason="the native library is not built")
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32], ids=str)
def test_copied_by_slices(kind: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_SLICE_BYTES", 1024)
    M, N, K = 2100, 40, 33  # slices of 1024 rows
    a, b = operands("tn", M, N, K, torch.bfloat16)
    start = torch.ones(M, N, dtype=kind)
    with linear.force("copied"):
        found = linear.tn(a, b, out=start.clone(), accumulate=True)
    plain = start.bfloat16() + TRUTH["tn"](a, b)
    assert problem(found.bfloat16(), start.double() + TRUTH["tn"](a.double(), b.double()), plain, K) == ""


@pytest.mark.skipif(linear._transpose is None, reason="the native library is not built")
def test_copied_keeps_a_nan_in_its_row() -> None:
    """oneDNN reads on behind a row whose length is no multiple of a register's."""
    a, b = operands("tn", 96, 64, 70, torch.bfloat16)
    a[:, 5] = torch.nan
    with linear.force("copied"):
        assert linear.tn(a, b).isnan().all(1).nonzero().flatten().tolist() == [5]


@pytest.mark.parametrize("K", [33, 48, 80])
@pytest.mark.parametrize("form", ["nt", "nn"])
def test_what_lies_behind_a_row_is_not_multiplied(form: str, K: int) -> None:
    """With matrix registers oneDNN 3.7 (torch 2.10) does for each of these K, 3.12 (torch 2.13) for 33 and 80."""
    a = torch.full((40, K + 16), torch.nan).bfloat16()[:, :K]
    a[:] = 1.0
    a[5] = torch.nan
    y = linear.nt(a, torch.ones(515, K).bfloat16()) if form == "nt" else linear.nn(a, torch.ones(K, 515).bfloat16())
    assert y.isnan().all(1).nonzero().flatten().tolist() == [5]
    assert torch.equal(y[y.isfinite()], torch.full((39 * 515,), float(K)).bfloat16())


@pytest.mark.parametrize("path", [None, "transposed"])
def test_what_lies_behind_the_rows_of_a_weight_is_not_multiplied(path: str | None) -> None:
    whole = torch.full((2048, 96), torch.nan).bfloat16()
    x = torch.randn(8, 70).bfloat16()
    whole[:, :70] = 1.0
    with linear.force(path):
        assert linear.nt(x, whole[:, :70]).isfinite().all()


@pytest.mark.skipif(linear._gemv is None, reason="the native library is not built")
def test_explain_shows_the_products() -> None:
    found = lf.explain("linear", torch.randn(1, 768).bfloat16(), torch.randn(2048, 768).bfloat16()).splitlines()
    assert found[0] == "linear bfloat16 on cpu"
    assert [line.split(":")[0] for line in found[1:]] == [
        "  nt bfloat16 [1, 2048] over 768",
        "  nn bfloat16 [1, 768] over 2048",
        "  tn bfloat16 [2048, 768] over 1",
    ]
    assert "gemv (" in found[1]
    with pytest.raises(ValueError, match=r"linear takes x \[..., C\] and W \[V, C\], found \(1, 768\)"):
        lf.explain("linear", torch.randn(1, 768))


def test_an_absent_path_gives_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_has_brgemm", set())
    monkeypatch.setattr(linear, "_gemv", None)
    assert linear.choose("nt", torch.float32, 2048, 2048, 2048) == "torch"
    assert linear.choose("nt", torch.float32, 1, 2048, 2048) == "torch"
    assert problems(None, "nt", torch.float32) == []
    with pytest.raises(ValueError, match="path: 'mkl' is not one of torch, brgemm"), linear.force("mkl"):
        pass


@tiled(torch.float32)
def test_plain_torch_where_something_watches(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a fast path ran")

    monkeypatch.setattr(linear, "_by_tiles", refuse)
    monkeypatch.setattr(linear, "_gemv", refuse)
    monkeypatch.setattr(linear, "_amd_family", 26)
    # small whole numbers: every sum is exact, in whatever order it is taken
    x, w = (torch.randint(-4, 5, (256, 256)).float() for _ in range(2))
    with pytest.raises(AssertionError, match="a fast path ran"):
        linear.nt(x, w)
    xg = x.clone().requires_grad_()
    linear.nt(xg, w).sum().backward()
    torch.testing.assert_close(xg.grad, w.sum(0).expand(256, 256))
    with torch.autocast("cpu", torch.bfloat16):
        assert linear.nt(x, w).dtype == torch.bfloat16
        assert linear.linear(xg, w).dtype == torch.bfloat16
    torch.testing.assert_close(
        torch.vmap(linear.nt, in_dims=(0, None))(x.view(4, 64, 256), w), F.linear(x, w).view(4, 64, 256)
    )
    torch.func.grad(lambda a: linear.nn(a, w).sum())(x)
    assert linear.nt(x.to("meta"), w.to("meta")).shape == (256, 256)
    compiled = torch.compile(linear.linear, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, w), F.linear(x, w))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_forward_mode_tangent_is_kept(dtype: torch.dtype) -> None:
    """Of frozen weights too, whose products take the fast paths elsewhere."""
    layer = lf.nn.Linear(1024, 512).to(dtype).requires_grad_(False)
    for rows in (1, 40):
        x, tangent = torch.randn(2, rows, 1024).to(dtype)
        with forward_ad.dual_level():
            y = layer(forward_ad.make_dual(x, tangent))
            found = forward_ad.unpack_dual(y).tangent
        assert torch.equal(found, F.linear(tangent, layer.weight))


def test_linear_is_differentiable() -> None:
    assert torch.autograd.gradcheck(
        linear.linear, (torch.randn(2, 3, 5).double().requires_grad_(), torch.randn(4, 5).double().requires_grad_())
    )
    x, w = torch.randn(2, 128, 256, requires_grad=True), torch.randn(128, 256, requires_grad=True)
    dy = torch.randn(2, 128, 128)
    ours, theirs = (torch.autograd.grad(f(x, w), (x, w), dy) for f in (linear.linear, F.linear))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
    (only,) = torch.autograd.grad(linear.linear(x.detach(), w), (w,), dy)
    assert torch.equal(only, ours[1])


@pytest.mark.parametrize("path", [None, *linear.PATHS])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sizes_that_do_not_fit_are_an_error_on_every_path(dtype: torch.dtype, path: str | None) -> None:
    """gemv would read beyond x or W, and give numbers."""
    w = torch.randn(512, 512).to(dtype)
    for R, K in ((1, 511), (1, 513), (3, 600), (9, 400)):
        with linear.force(path), pytest.raises(RuntimeError, match=rf"{R}x{K} and 512x512"):
            linear.nt(torch.randn(R, K).to(dtype), w)
    with torch.no_grad(), pytest.raises(RuntimeError, match="1x400 and 512x512"):
        lf.nn.Linear(512, 512, dtype=dtype)(torch.randn(1, 400).to(dtype))


@pytest.mark.skipif(linear._gemv is None, reason="the native library is not built")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ISAS)
def test_gemv(isa: str, dtype: torch.dtype) -> None:
    threads = torch.get_num_threads()
    try:
        for N, K in ((1, 1), (3, 5), (37, 100), (130, 1003), (1003, 2048)):
            w = torch.randn(N, K + 3).to(dtype)[:, :K]
            x = torch.randn(8, K + 1).to(dtype)[:, :K]
            truth, plain = x.double() @ w.double().T, F.linear(x, w)
            alone = []
            for R in (1, 2, 3, 4, 7, 8):
                found = []
                for n in (1, 2, 3):
                    torch.set_num_threads(n)
                    y = torch.full((R, N), torch.nan, dtype=dtype)
                    with target(isa):
                        linear._gemv(x[:R], w, y)
                    found.append(y)
                assert problem(found[0], truth[:R], plain[:R], K) == ""
                assert torch.equal(found[0], found[1])
                assert torch.equal(found[0], found[2])
                alone.append(found[0][0])
            assert all(torch.equal(alone[0], row) for row in alone)
    finally:
        torch.set_num_threads(threads)
