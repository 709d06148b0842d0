"""The CUDA attention kernels in the emulator (tests/test_cuda.py): the error budget for every head dim, mask and edge,
repeats under other schedules, no bank conflicts, and bugs that must be seen."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from numerics import assert_bug_is_caught, assert_within_budget
from torch import Tensor

import llama_fast as lf
from llama_fast.ops import cuda, reference
from llama_fast.ops.dispatch import primitives
from llama_fast.verify import Case

HALF = (torch.bfloat16, torch.float16)


@contextmanager
def architecture(sm: int) -> Iterator[None]:
    """Within the block the emulator is a device of that architecture."""
    cuda._library.set_architecture(sm)
    try:
        yield
    finally:
        cuda._library.set_architecture(80)


def _case(
    T: int, S: int, H: int = 2, G: int = 1, D: int = 64, B: int = 1, options: dict[str, Any] | None = None, **kw: Any
) -> Case:
    return Case("attention", {"B": B, "T": T, "S": S, "H": H, "G": G, "D": D}, options or {}, **kw)


def _packed(*bounds: int, H: int = 2, G: int = 1, D: int = 64, options: dict[str, Any] | None = None) -> Case:
    dims = {"R": bounds[-1], "N": len(bounds), "H": H, "G": G, "D": D}
    return Case(
        "attention", dims, options or {}, tensors={"cu_seqlens": lambda _: torch.tensor(bounds, dtype=torch.int32)}
    )


# Tiles are 16 to 128 rows: sizes on both sides of each.
CASES = [
    *(_case(70, 70, D=D) for D in (64, 96, 128, 256)),
    _case(130, 130, H=1),
    _case(67, 67, G=2, B=2, options={"causal": False}),
    _case(37, 200, D=128),  # chunked prefill
    _case(150, 40, D=96, H=1),  # the first 110 rows see nothing
    _case(65, 131, D=256, H=1, options={"causal": False}),
    _case(1, 200, H=4, G=2, D=128),  # decode
    _case(140, 140, H=3, options={"window": 50}),
    _case(40, 90, D=128, options={"window": 1}),
    _case(50, 20, H=1, options={"window": 9, "causal": False}),
    _case(70, 70, options={"scale": 0.3}),
    _case(70, 70, scale=4.0),
    _case(65, 65, strided=True),
    _packed(0, 0, 130, 130, 131, 200, D=96, G=2),
    _packed(0, 30, 163, 170, options={"causal": False}),
    _packed(0, 100, 164, H=1, D=128, options={"window": 20}),
    _packed(0, 1, 3, 6, 6, 40, D=256),
    _case(0, 30),
    _case(30, 0),
    _case(20, 20, B=0),
]


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_budget(dtype: torch.dtype) -> None:
    for case in CASES:
        assert_within_budget(case, "cuda", dtype)


def test_budget_on_sm_90() -> None:
    """Where the kernels on wgmma and TMA take the call, it comes to them; tests/test_attention_sm90.py tests them."""
    with architecture(90):
        for case, wgmma in (
            (_case(70, 70), True),
            (_packed(0, 30, 70, D=128), True),
            (_case(40, 40, D=256), False),
            (_case(0, 30), False),
            (_case(30, 0), False),
        ):
            before = cuda._library.counters()["wgmma"]
            assert_within_budget(case, "cuda", torch.bfloat16)
            assert (cuda._library.counters()["wgmma"] > before) == wgmma, case


def _run(inputs: list[Tensor], **options: Any) -> list[Tensor]:
    with lf.backend("cuda"):
        out = lf.attention(*inputs, **options)
    return [out, *torch.autograd.grad(out, inputs, torch.ones_like(out))]


@pytest.mark.parametrize("D", [64, 256])
def test_repeats_bitwise_under_any_schedule(D: int) -> None:
    inputs = [x.requires_grad_() for x in _case(70, 100, H=4, G=2, D=D).inputs(torch.bfloat16).values()]
    expected = _run(inputs)
    try:
        for seed in (1, 2):
            cuda._library.set_options(seed=seed)
            assert all(torch.equal(a, b) for a, b in zip(_run(inputs), expected, strict=True))
    finally:
        cuda._library.set_options()


@pytest.mark.parametrize("D", [64, 96, 128, 256])
def test_no_bank_conflicts(D: int) -> None:
    """Of ldmatrix: eight rows of 16 bytes at a time from eight different groups of banks."""
    inputs = [x.requires_grad_() for x in _case(70, 100, H=1, D=D).inputs(torch.bfloat16).values()]
    before = cuda._library.counters()
    _run(inputs)
    after = cuda._library.counters()
    assert after["ldmatrix"] > before["ldmatrix"]
    assert after["bank_conflicts"] == before["bank_conflicts"]


@pytest.mark.parametrize("sm", [80, 90])
@pytest.mark.parametrize("scale", [-0.3, 0.0, 1e-300])
def test_scales_that_are_not_above_zero(scale: float, sm: int) -> None:
    """1e-300 is 0 in float32."""
    inputs = [x.requires_grad_() for x in _case(70, 70).inputs(torch.float16).values()]
    with architecture(sm):
        found = _run(inputs, scale=scale)
    truth = [x.detach().double().requires_grad_() for x in inputs]
    out = reference.attention(*truth, scale=scale)
    for a, b in zip(found, [out, *torch.autograd.grad(out.sum(), truth)], strict=True):
        torch.testing.assert_close(a.double(), b, rtol=4e-3, atol=4e-3)


def test_one_key_gives_no_gradient_of_scores() -> None:
    """A row that sees one key has weight 1 whatever its score: dq and dk are 0, not the noise of two sums."""
    q, k, v = (x.requires_grad_() for x in _case(50, 90, D=128).inputs(torch.float16).values())
    with lf.backend("cuda"):
        out = lf.attention(q, k, v, window=1)
        dq, dk, _ = torch.autograd.grad(out, (q, k, v), torch.randn(out.shape).half())
    assert dq.abs().max() == 0
    assert dk.abs().max() == 0


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_nan_and_inf_reach_what_they_should(dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in _case(70, 70, H=4, G=4).inputs(torch.float32).values())
    q[0, 7, 1, 3] = math.nan
    q[0, 9, 2, 5] = math.inf
    k[0, 0, 3, 0] = math.nan
    v[0, 0, 0, 2] = math.inf
    with lf.backend("cuda"):
        out = lf.attention(q, k, v)
    truth = reference.attention(q.double(), k.double(), v.double())
    assert torch.equal(torch.isnan(out), torch.isnan(truth))
    assert torch.equal(torch.isinf(out), torch.isinf(truth))


def test_lse_and_rows_that_see_nothing() -> None:
    q, k, v = _case(100, 30).inputs(torch.bfloat16).values()
    exact = reference.attention_fwd(q.double(), k.double(), v.double(), None, 0.2, True, 20)[1]
    out, lse = primitives["attention_fwd"](q, k, v, None, 0.2, True, 20, backend="cuda")
    assert torch.equal(out[:, :70], torch.zeros(1, 70, 2, 64, dtype=torch.bfloat16))
    assert torch.isneginf(lse[..., :70]).all()
    torch.testing.assert_close(lse[..., 70:].double(), exact[..., 70:], rtol=1e-5, atol=1e-5)


def test_transposed_views_equal_contiguous_inputs() -> None:
    views = [torch.randn(1, 2, 40, 64).bfloat16().transpose(1, 2).requires_grad_() for _ in range(3)]
    plain = [x.detach().contiguous().requires_grad_() for x in views]
    assert all(torch.equal(a, b) for a, b in zip(_run(views), _run(plain), strict=True))


def _behind(x: Tensor) -> Tensor:
    """`x` without gaps, two bytes behind a 16-byte boundary."""
    return torch.nn.functional.pad(x.flatten(), (1, 0))[1:].view(x.shape)


@pytest.mark.parametrize("sm", [80, 90])
def test_inputs_off_the_16_byte_boundary(sm: int) -> None:
    plain = [torch.randn(1, 40, 2, 64).bfloat16() for _ in range(4)]
    found = []
    for q, k, v, dout in (plain, [_behind(x) for x in plain]):
        leaves = [x.requires_grad_() for x in (q, k, v)]
        with lf.backend("cuda"), architecture(sm):
            out = lf.attention(*leaves)
            grads = torch.autograd.grad(out, leaves, dout)
        found.append([out, *grads])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_bounds_of_sequences_may_be_strided() -> None:
    bounds = torch.tensor([[0, 9], [13, 9], [40, 9]], dtype=torch.int32)[:, 0]
    inputs = [torch.randn(40, 2, 64).half().requires_grad_() for _ in range(3)]
    found = [_run(inputs, cu_seqlens=cu) for cu in (bounds, bounds.contiguous())]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_objections_name_the_limit() -> None:
    q = torch.randn(1, 8, 2, 80).half()
    with pytest.raises(lf.NotSupported, match="D = 80 not in 64, 96, 128, 256"), lf.backend("cuda"):
        lf.attention(q, q, q)
    with pytest.raises(lf.NotSupported, match=r"dtype torch\.float32"), lf.backend("cuda"):
        lf.attention(*(x.float() for x in (q, q, q)))


def _one_key_too_few(results: tuple[Tensor, ...], args: Any) -> None:
    results[0][:, -1:] = reference.attention(args["q"][:, -1:], args["k"][:, 1:], args["v"][:, 1:])


def _lse_in_base_two(results: tuple[Tensor, ...], args: Any) -> None:
    results[1].mul_(1.0 / math.log(2.0))


def _gradient_of_one_head_only(results: tuple[Tensor, ...], args: Any) -> None:
    results[1].mul_(0.5)


@pytest.mark.parametrize(
    ("primitive", "bug"),
    [
        ("attention_fwd", _one_key_too_few),
        ("attention_fwd", _lse_in_base_two),
        ("attention_bwd", _gradient_of_one_head_only),
    ],
)
def test_planted_bugs_are_caught(monkeypatch: pytest.MonkeyPatch, primitive: str, bug: Callable[..., None]) -> None:
    assert_bug_is_caught(monkeypatch, _case(40, 40), primitive, bug, torch.bfloat16, target_name="cuda")
