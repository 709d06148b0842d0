"""attention: error budget on every target, masks, edge cases, gradients, memory, and bugs that must be seen."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from numerics import DTYPES, TARGETS, assert_bug_is_caught, assert_within_budget, target
from torch import Tensor

import llama_fast as lf
from llama_fast.ops import reference
from llama_fast.ops.dispatch import primitives
from llama_fast.verify import Case


def _case(
    T: int, S: int, H: int = 4, G: int = 2, D: int = 64, B: int = 1, options: dict[str, Any] | None = None, **kw: Any
) -> Case:
    return Case("attention", {"B": B, "T": T, "S": S, "H": H, "G": G, "D": D}, options or {}, **kw)


def _packed(*bounds: int, H: int = 4, G: int = 2, D: int = 64, options: dict[str, Any] | None = None) -> Case:
    dims = {"R": bounds[-1], "N": len(bounds), "H": H, "G": G, "D": D}
    return Case(
        "attention", dims, options or {}, tensors={"cu_seqlens": lambda _: torch.tensor(bounds, dtype=torch.int32)}
    )


def _rising(dtype: torch.dtype) -> Tensor:
    """Keys that grow: the largest score of half of the rows is again and again passed by a later one."""
    k = torch.randn(1, 290, 2, 64, generator=torch.Generator().manual_seed(5))
    return (k.abs() * torch.linspace(0.1, 4.0, 290).reshape(1, -1, 1, 1)).to(dtype)


def _of_one_sign(dtype: torch.dtype) -> Tensor:
    q = torch.randn(1, 290, 4, 64, generator=torch.Generator().manual_seed(6)).abs()
    return (q * torch.tensor([1.0, -1.0]).repeat(145).reshape(1, -1, 1, 1)).to(dtype)


# Tiles are 32 to 128 rows, blocks 128 keys: sizes on both sides of each, and of a vector.
CASES = [
    _case(300, 300),
    _case(67, 67, B=2, options={"causal": False}),
    _case(128, 128, G=4, D=16),
    _case(70, 131, G=1, D=24, options={"causal": False}),
    _case(65, 65, G=4, D=40, strided=True),
    _case(37, 200, D=80, B=2),  # chunked prefill
    _case(200, 70, D=96, G=1),  # the first 130 rows see nothing
    _case(129, 257, D=128),
    _case(40, 133, D=256, H=2, G=1),
    _case(1, 700, H=8, G=2, D=128),  # decode: few rows take a path of their own
    _case(4, 300, D=40, B=4, options={"window": 140}),
    _case(3, 150, H=2, D=88, B=4, options={"causal": False}),
    _case(4, 9, H=2, D=16, B=8),
    _case(300, 300, H=6, G=2, options={"window": 50}),
    _case(50, 300, options={"window": 1}),
    _case(150, 20, options={"window": 9, "causal": False}),
    _case(140, 140, options={"scale": 0.3}),
    _case(140, 140, scale=4.0),
    _case(290, 290, tensors={"q": _of_one_sign, "k": _rising}),
    _case(290, 290, options={"causal": False}, tensors={"q": _of_one_sign, "k": _rising}),
    _case(140, 140, scale=0.01),
    _packed(0, 0, 130, 130, 131, 250, 250, G=4, D=96),
    _packed(0, 100, 163, 200, G=1, options={"causal": False}),
    _packed(0, 100, 164, 200, D=24, options={"window": 20}),
    _packed(0, 1, 3, 6, 6, 40),
    _case(0, 30),
    _case(30, 0),
    _case(20, 20, B=0),
]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("target_name", [name for name in TARGETS if name != "reference"])
def test_budget(target_name: str, dtype: torch.dtype) -> None:
    for case in CASES:
        assert_within_budget(case, target_name, dtype)


def _all(inputs: dict[str, Tensor], options: dict[str, Any], f: Callable[..., Tensor]) -> list[Tensor]:
    leaves = {name: x.requires_grad_() if x.is_floating_point() else x for name, x in inputs.items()}
    out = f(**leaves, **options)
    return [out, *torch.autograd.grad(out.sum(), [x for x in leaves.values() if x.requires_grad])]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)], ids=str)
@pytest.mark.parametrize("scale", [-0.3, 0.0])
@pytest.mark.parametrize("target_name", TARGETS)
def test_negative_and_zero_scale(target_name: str, scale: float, dtype: torch.dtype, tolerance: float) -> None:
    """Without a budget: scaled_dot_product_attention gives NaN here, for its hidden scores are scale * -inf."""
    inputs = _case(140, 140).inputs(dtype)
    with target(target_name):
        ours = _all(inputs, {"scale": scale}, lf.attention)
    truth = _all({n: x.detach().double() for n, x in inputs.items()}, {"scale": scale}, reference.attention)
    for a, b in zip(ours, truth, strict=True):
        assert (a.double() - b).norm() <= tolerance * b.norm()


@pytest.mark.parametrize("target_name", TARGETS)
def test_the_longest_window_hides_nothing(target_name: str) -> None:
    inputs = _case(150, 200).inputs(torch.float32)
    with target(target_name):
        without, longest = (_all(inputs, {"window": window}, lf.attention) for window in (None, 2**63 - 1))
    for a, b in zip(without, longest, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("target_name", TARGETS)
def test_packed_without_rows(target_name: str) -> None:
    q, k = torch.empty(0, 4, 16, requires_grad=True), torch.empty(0, 2, 16, requires_grad=True)
    for bounds in ([0], [0, 0, 0]):
        with target(target_name):
            out = lf.attention(q, k, k, cu_seqlens=torch.tensor(bounds, dtype=torch.int32))
            dq, dk = torch.autograd.grad(out.sum(), (q, k))
        assert out.shape == dq.shape == (0, 4, 16)
        assert dk.shape == (0, 2, 16)


@pytest.mark.parametrize("options", [{}, {"causal": False}, {"window": 2}])
def test_gradcheck(options: dict[str, Any]) -> None:
    for T, S in ((3, 3), (2, 5), (5, 2)):
        inputs = [x.requires_grad_() for x in _case(T, S, D=3).inputs(torch.float64).values()]
        assert torch.autograd.gradcheck(lambda q, k, v: lf.attention(q, k, v, **options), inputs)


@pytest.mark.parametrize("target_name", TARGETS)
def test_transposed_views_equal_contiguous_inputs(target_name: str) -> None:
    q, k, v = (torch.randn(2, 4, 70, 32).bfloat16().transpose(1, 2).requires_grad_() for _ in range(3))
    fused = torch.cat((q, k, v), dim=-1).detach()
    with target(target_name):
        out = lf.attention(q, k, v)
        plain = lf.attention(*(x.contiguous() for x in (q, k, v)))
        sliced = lf.attention(*fused.split(32, dim=-1))
        dout = torch.randn(2, 4, 70, 32).bfloat16().transpose(1, 2)
        grads = torch.autograd.grad(out, (q, k, v), dout)
        plain_grads = torch.autograd.grad(plain, (q, k, v), dout.contiguous())
    assert torch.equal(out, plain)
    assert torch.equal(out, sliced)
    assert all(torch.equal(a, b) for a, b in zip(grads, plain_grads, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("target_name", TARGETS)
def test_huge_scores_stay_finite(target_name: str, dtype: torch.dtype) -> None:
    """Scores of -1e4 to 1e4, one key ahead of all others: the weights are 0 and 1, and nothing overflows."""
    T = 150
    torch.manual_seed(0)
    q, v = torch.ones(1, T, 2, 16, dtype=dtype), torch.randn(1, T, 2, 16).to(dtype)
    k = torch.full((1, T, 2, 16), -625.0, dtype=dtype)
    k[:, 3] = 625.0
    leaves = [x.requires_grad_() for x in (q, k, v)]
    with target(target_name):
        out = lf.attention(*leaves, scale=1.0)
        dq, dk, dv = torch.autograd.grad(out.float().sum(), leaves)
    # v w / w with a weight w next to 1: at most a rounding each
    torch.testing.assert_close(out[:, 3:], v[:, 3:4].expand(1, T - 3, 2, 16), rtol=2 * torch.finfo(dtype).eps, atol=0.0)
    for x in (dq, dk, dv):
        assert torch.isfinite(x).all()
    # a weight is recomputed from the float32 lse of 1e4, which is exact to 1e-3 of a unit of the exponent
    torch.testing.assert_close(dv[0, 3].float(), torch.full((2, 16), float(T - 3)), rtol=4e-3, atol=0)


@pytest.mark.parametrize("target_name", TARGETS)
def test_windows_wider_than_any_sequence_hide_nothing(target_name: str) -> None:
    """Sums of a window and a position would leave 32 or 64 bits."""
    leaves = [x.requires_grad_() for x in _case(70, 70, H=2, G=1, D=16).inputs(torch.float32).values()]
    with target(target_name):
        found = [lf.attention(*leaves, window=w) for w in (2**31 - 1, 2**31, 2**63 - 1, None)]
        gradients = [torch.autograd.grad(out.square().sum(), leaves) for out in found]
    for out, grads in zip(found[:-1], gradients[:-1], strict=True):
        torch.testing.assert_close([out, *grads], [found[-1], *gradients[-1]])


@pytest.mark.parametrize("target_name", TARGETS)
def test_equal_scores_average(target_name: str) -> None:
    q, k, v = torch.zeros(1, 200, 2, 32), torch.randn(1, 200, 2, 32), torch.randn(1, 200, 2, 32)
    with target(target_name):
        out = lf.attention(q, k, v)
    mean = v.double().cumsum(1) / torch.arange(1, 201).view(1, -1, 1, 1)
    torch.testing.assert_close(out.double(), mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("target_name", TARGETS)
def test_nan_and_inf_reach_what_they_should(target_name: str, dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in _case(140, 140, G=4).inputs(torch.float32).values())
    q[0, 7, 1, 3] = math.nan
    q[0, 9, 2, 5] = math.inf
    k[0, 0, 3, 0] = math.nan
    v[0, 0, 0, 2] = math.inf
    with target(target_name):
        out = lf.attention(q, k, v)
    truth = reference.attention(q.double(), k.double(), v.double())
    assert torch.equal(torch.isnan(out), torch.isnan(truth))
    assert torch.equal(torch.isinf(out), torch.isinf(truth))


@pytest.mark.parametrize("name", ["q", "k", "v", "dout"])
@pytest.mark.parametrize("target_name", TARGETS)
def test_one_number_near_the_largest_float32(target_name: str, name: str) -> None:
    """Rounded to bfloat16 it would be infinite, and no sum of parts."""
    B, T, H, D = 1, 70, 2, 32
    generator = torch.Generator().manual_seed(0)
    x = {n: 0.01 * torch.randn(B, T, H, D, generator=generator) for n in ("q", "k", "v", "dout")}
    x[name][0, 60, 1, 5] = 3.4e38
    q, k, v = (x[n].requires_grad_() for n in ("q", "k", "v"))
    with target(target_name):
        out = lf.attention(q, k, v)
        gradients = torch.autograd.grad(out, (q, k, v), x["dout"])
    # with scores of 10^34 the gradients of q and k overflow in any float32 arithmetic
    for found in (out, *gradients) if name in ("v", "dout") else (out,):
        assert found.isfinite().all()


@pytest.mark.parametrize("target_name", TARGETS)
def test_rows_that_see_nothing_give_zeros_and_minus_inf(target_name: str) -> None:
    q, k, v = _case(100, 30).inputs(torch.float32).values()
    with target(target_name) as backend:
        out, lse = primitives["attention_fwd"](q, k, v, None, 0.125, True, 0, backend=backend)
    assert torch.equal(out[:, :70], torch.zeros(1, 70, 4, 64))
    assert torch.isneginf(lse[..., :70]).all()
    assert torch.isfinite(lse[..., 70:]).all()


@pytest.mark.parametrize("target_name", TARGETS)
def test_lse(target_name: str) -> None:
    q, k, v = _case(150, 200, D=40).inputs(torch.float32).values()
    exact = reference.attention_fwd(q.double(), k.double(), v.double(), None, 0.2, True, 60)[1]
    with target(target_name) as backend:
        lse = primitives["attention_fwd"](q, k, v, None, 0.2, True, 60, backend=backend)[1]
    torch.testing.assert_close(lse.double(), exact, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_repeats_bitwise(dtype: torch.dtype) -> None:
    """The forward for any number of threads; the backward for the same number, and beyond that up to rounding."""
    leaves = [x.requires_grad_() for x in _case(300, 300, G=1).inputs(dtype).values()]
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 2, 2, 3):
            torch.set_num_threads(n)
            out = lf.attention(*leaves)
            found.append((out, *torch.autograd.grad(out, leaves, torch.ones_like(out))))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(found[0][0], other[0]) for other in found[1:])
    assert all(torch.equal(a, b) for a, b in zip(found[1], found[2], strict=True))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            torch.testing.assert_close(a, b)


def test_scratch_is_far_below_the_scores() -> None:
    """T x S float32 would be 1 GB for this call; the peak of the process may grow by the scratch and the results."""
    T = 16384
    q, k, v = (torch.randn(1, T, 1, 16, requires_grad=True) for _ in range(3))
    small = [x[:, :256].detach().requires_grad_() for x in (q, k, v)]
    torch.autograd.grad(lf.attention(*small).sum(), small)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _status("VmRSS")
    torch.autograd.grad(lf.attention(q, k, v).sum(), (q, k, v))
    assert _status("VmHWM") - before < 100 << 20, "peak memory grew by more than a tenth of T x S float32"


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(key))


def test_compiles_without_graph_break() -> None:
    q, k, v = (x.requires_grad_() for x in _case(33, 33).inputs(torch.float32).values())
    compiled = torch.compile(lambda q, k, v: lf.attention(q, k, v).sin(), fullgraph=True, backend="aot_eager")
    for a, b in zip(
        torch.autograd.grad(compiled(q, k, v).sum(), (q, k, v)),
        torch.autograd.grad(lf.attention(q, k, v).sin().sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_compiles_for_any_sizes() -> None:
    compiled = torch.compile(lambda q, k: lf.attention(q, k, k), fullgraph=True, dynamic=True, backend="aot_eager")
    for T, S in ((3, 7), (11, 13)):
        q, k, _ = _case(T, S).inputs(torch.float32).values()
        assert torch.equal(compiled(q, k), lf.attention(q, k, k))


def test_compile_with_options_that_vary() -> None:
    q, k, v = _case(20, 20).inputs(torch.float32).values()
    compiled = torch.compile(lf.attention, fullgraph=True, dynamic=True, backend="aot_eager")
    for window, scale in ((3, 0.1), (7, 0.2), (5, -0.3)):
        assert torch.equal(
            compiled(q, k, v, window=window, scale=scale), lf.attention(q, k, v, window=window, scale=scale)
        )


def test_autocast_casts_as_sdpa() -> None:
    q, k, v = _case(33, 33).inputs(torch.float32).values()
    with torch.autocast("cpu", torch.bfloat16):
        out = lf.attention(q, k, v.bfloat16())
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, lf.attention(q.bfloat16(), k.bfloat16(), v.bfloat16()))


def _one_key_too_few(results: tuple[Tensor, ...], args: Any) -> None:
    q, k, v = args["q"], args["k"][:, 1:], args["v"][:, 1:]
    results[0][:, -1:] = reference.attention(q[:, -1:], k, v)


def _lse_in_base_two(results: tuple[Tensor, ...], args: Any) -> None:
    results[1].mul_(1.0 / math.log(2.0))


def _wrong_head_of_the_group(results: tuple[Tensor, ...], args: Any) -> None:
    results[0][:, :, 1] = results[0][:, :, 0]


def _gradient_of_one_head_only(results: tuple[Tensor, ...], args: Any) -> None:
    results[1].mul_(0.5)


def _delta_forgotten_in_a_row(results: tuple[Tensor, ...], args: Any) -> None:
    delta = (args["dout"][:, -1:] * args["out"][:, -1:]).sum(-1, keepdim=True)
    mean_k = reference.attention(args["q"][:, -1:], args["k"], args["k"])
    results[0][:, -1:].add_(args["scale"] * delta * mean_k)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("primitive", "bug"),
    [
        ("attention_fwd", _one_key_too_few),
        ("attention_fwd", _lse_in_base_two),
        ("attention_fwd", _wrong_head_of_the_group),
        ("attention_bwd", _gradient_of_one_head_only),
        ("attention_bwd", _delta_forgotten_in_a_row),
    ],
)
def test_planted_bugs_are_caught(
    monkeypatch: pytest.MonkeyPatch, primitive: str, bug: Callable[..., None], dtype: torch.dtype
) -> None:
    assert_bug_is_caught(monkeypatch, _case(40, 40), primitive, bug, dtype)


def test_bad_input_names_argument_value_and_expectation() -> None:
    q, k, v = _case(8, 8).inputs(torch.float32).values()
    packed = [x[0] for x in (q, k, v)]

    def cu(*bounds: int) -> Tensor:
        return torch.tensor(bounds, dtype=torch.int32)

    for expected, call in (
        (r"G = 3 does not divide H = 4", lambda: lf.attention(q, *(x.repeat(1, 1, 2, 1)[:, :, :3] for x in (k, v)))),
        (r"k has shape \(1, 8, 2, 63\), expected \[B, S, G, D\] with D = 64", lambda: lf.attention(q, k[..., 1:], v)),
        (r"v has shape \(1, 7, 2, 64\)", lambda: lf.attention(q, k, v[:, 1:])),
        (r"v has dtype torch.bfloat16, expected torch.float32", lambda: lf.attention(q, k, v.bfloat16())),
        (r"q, k, v have 4, 3, 3 dimensions", lambda: lf.attention(q, k[0], v[0])),
        (r"window is 0, expected None or a number of keys >= 1", lambda: lf.attention(q, k, v, window=0)),
        (r"scale is nan", lambda: lf.attention(q, k, v, scale=math.nan)),
        (r"cu_seqlens is missing", lambda: lf.attention(*packed)),
        (r"cu_seqlens is given and q has shape", lambda: lf.attention(q, k, v, cu_seqlens=cu(0, 8))),
        (r"cu_seqlens has dtype torch.int64", lambda: lf.attention(*packed, cu_seqlens=cu(0, 8).long())),
        (r"cu_seqlens runs from 0 to 7, expected 0 to 8", lambda: lf.attention(*packed, cu_seqlens=cu(0, 7))),
        (r"cu_seqlens\[2\] = 3 is below", lambda: lf.attention(*packed, cu_seqlens=cu(0, 5, 3, 8))),
        (r"cu_seqlens is empty", lambda: lf.attention(*packed, cu_seqlens=cu())),
        (r"max_seqlen is 4", lambda: lf.attention(*packed, cu_seqlens=cu(0, 5, 8), max_seqlen=4)),
    ):
        with pytest.raises(ValueError, match=expected):
            call()
    for expected, bounds in (  # what stands between torch.compile and a crash, or rows that nobody has written
        (r"cu_seqlens\[0\] = 0 and the next, 900", cu(0, 900, 8)),
        (r"cu_seqlens runs from 0 to 7, expected 0 to 8", cu(0, 7)),
        (r"cu_seqlens runs from 1 to 8, expected 0 to 8", cu(1, 8)),
    ):
        with pytest.raises(ValueError, match=expected):
            primitives["attention_fwd"](q[:1], q[:1], q[:1], bounds, 1.0, True, 0, backend="cpu")
    with pytest.raises(lf.NotSupported, match=r"D = 12 is not a multiple of 8"), lf.backend("cpu"):
        lf.attention(*(x[..., :12] for x in (q, k, v)))
