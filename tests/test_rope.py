"""rope: error budget on every target and layout, transformers' own, streaming stores, bugs that must be seen."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from numerics import DTYPES, TARGETS, assert_bug_is_caught, assert_within_budget, target

import llama_fast as lf
from llama_fast.ops import native
from llama_fast.verify import Case

CPU_TARGETS = [t for t in TARGETS if t != "reference"]
LAYOUTS = pytest.mark.parametrize("interleaved", [False, True], ids=["halves", "interleaved"])


def _angles(T: int, D: int) -> tuple[torch.Tensor, torch.Tensor]:
    angle = torch.arange(T).unsqueeze(1) * 10000.0 ** (-torch.arange(D // 2) / max(D // 2, 1))
    return angle.cos(), angle.sin()


@LAYOUTS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("target_name", TARGETS)
def test_budget(target_name: str, dtype: torch.dtype, interleaved: bool) -> None:
    for D in (2, 6, 64, 80, 90, 128, 256):
        case = Case("rope", {"B": 2, "T": 9, "H": 3, "G": 2, "D": D}, {"interleaved": interleaved})
        assert_within_budget(case, target_name, dtype)
    sizes = {"B": 2, "T": 33, "H": 2, "G": 4, "D": 48}
    assert_within_budget(Case("rope", sizes, {"interleaved": interleaved}, strided=True), target_name, dtype)
    assert_within_budget(Case("rope", {**sizes, "N": 2}, {"interleaved": interleaved}), target_name, dtype)
    for empty in ("B", "T", "H", "G"):
        assert_within_budget(Case("rope", {**sizes, empty: 0}, {"interleaved": interleaved}), target_name, dtype)


@pytest.mark.parametrize("target_name", TARGETS)
def test_positions_that_differ_between_sequences(target_name: str) -> None:
    q, k = torch.randn(2, 5, 3, 16), torch.randn(2, 5, 1, 16)
    cos, sin = (t.view(2, 5, 8) for t in _angles(10, 16))
    with target(target_name):
        both = lf.rope(q, k, cos, sin)
        for b in range(2):
            alone = lf.rope(q[b : b + 1], k[b : b + 1], cos[b], sin[b])
            assert all(torch.equal(x[b : b + 1], y) for x, y in zip(both, alone, strict=True))


@pytest.mark.parametrize("target_name", TARGETS)
def test_equals_transformers(target_name: str) -> None:
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    q, k = torch.randn(2, 7, 4, 32), torch.randn(2, 7, 2, 32)
    cos, sin = (torch.cat((t, t), -1).expand(2, 7, 32) for t in _angles(7, 32))
    theirs = llama.apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    with target(target_name):
        ours = lf.rope(q, k, cos, sin)  # doubled tables, as theirs
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y.transpose(1, 2))


@LAYOUTS
@pytest.mark.parametrize("target_name", TARGETS)
def test_turns_the_pair_it_says(target_name: str, interleaved: bool) -> None:
    q = torch.zeros(1, 1, 1, 8)
    q[..., 2] = 1.0
    quarter = torch.zeros(1, 4), torch.ones(1, 4)
    with target(target_name):
        turned, _ = lf.rope(q, q, *quarter, interleaved=interleaved)
    assert turned.flatten().tolist() == [float(d == (3 if interleaved else 6)) for d in range(8)]


@LAYOUTS
@pytest.mark.parametrize("target_name", TARGETS)
def test_backward_undoes_forward(target_name: str, interleaved: bool) -> None:
    q, k = torch.randn(2, 11, 3, 48, requires_grad=True), torch.randn(2, 11, 1, 48, requires_grad=True)
    with target(target_name):
        turned = lf.rope(q, k, *_angles(11, 48), interleaved=interleaved)
        back = torch.autograd.grad(turned, (q, k), [x.detach() for x in turned])
    torch.testing.assert_close(back, (q.detach(), k.detach()))


@LAYOUTS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("target_name", CPU_TARGETS)
def test_streamed_outputs_equal_stored_ones(target_name: str, dtype: torch.dtype, interleaved: bool) -> None:
    T, H, D = 1100, 48, 128  # q and k: 27 MB of half precision, past the caches; five tokens are not
    q, k = torch.randn(1, T, H, D).to(dtype), torch.randn(1, T, H, D).to(dtype)
    angles = [t.unsqueeze(0) for t in _angles(T, D)]
    for offset in (0, 2):
        outs = [torch.full((q.numel() + offset,), math.nan, dtype=dtype)[offset:].view_as(q) for _ in range(2)]
        with target(target_name):
            native._native.cpu.rope_fwd(q, k, *angles, interleaved, *outs)
            for part in (slice(0, 5), slice(T - 5, T)):
                stored = native.rope_fwd(q[:, part], k[:, part], *(t[:, part] for t in angles), interleaved)
                assert all(torch.equal(a[:, part], b) for a, b in zip(outs, stored, strict=True))
        assert not any(out.isnan().any() for out in outs)


@LAYOUTS
def test_gradcheck(interleaved: bool) -> None:
    q, k = (torch.randn(2, 3, h, 6, dtype=torch.float64, requires_grad=True) for h in (2, 1))
    assert torch.autograd.gradcheck(lambda q, k: lf.rope(q, k, *_angles(3, 6), interleaved=interleaved), (q, k))


@pytest.mark.parametrize("target_name", TARGETS)
def test_heads_first_and_transposed_inputs(target_name: str) -> None:
    q = torch.randn(2, 4, 7, 16).transpose(1, 2)  # [B, H, T, D] seen as [B, T, H, D]
    k = torch.randn(2, 7, 16, 4).transpose(2, 3)
    cos, sin = _angles(7, 16)
    with target(target_name):
        found = lf.rope(q, k, cos, sin)
        expected = lf.rope(q.contiguous(), k.contiguous(), cos, sin)
    assert all(torch.equal(x, y) for x, y in zip(found, expected, strict=True))


@LAYOUTS
def test_repeats_bitwise_for_any_number_of_threads(interleaved: bool) -> None:
    q, k = torch.randn(2, 133, 4, 80, requires_grad=True), torch.randn(2, 133, 2, 80, requires_grad=True)
    threads, found = torch.get_num_threads(), []
    try:
        for n in (1, 2, 2, 3):
            torch.set_num_threads(n)
            turned = lf.rope(q, k, *_angles(133, 80), interleaved=interleaved)
            found.append([*turned, *torch.autograd.grad(turned, (q, k), [torch.ones_like(x) for x in turned])])
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_compiles_without_graph_break() -> None:
    q, k = torch.randn(1, 4, 2, 16, requires_grad=True), torch.randn(1, 4, 1, 16, requires_grad=True)
    angles = _angles(4, 16)

    def loss(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        turned = lf.rope(q, k, *angles)
        return turned[0].sin().sum() + turned[1].cos().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(q, k), (q, k)), torch.autograd.grad(loss(q, k), (q, k)))


def _last_pair_unturned(results: tuple[torch.Tensor, ...], args: Any) -> None:
    results[0][..., -1] = args["q"][..., -1]


def _k_turned_as_the_token_before(results: tuple[torch.Tensor, ...], args: Any) -> None:
    results[1].copy_(native.rope_fwd(args["k"], args["k"], args["cos"].roll(1, 1), args["sin"].roll(1, 1), False)[1])


def _backward_turns_forward(results: tuple[torch.Tensor, ...], args: Any) -> None:
    results[0].copy_(native.rope_fwd(args["dq_out"], args["dk_out"], args["cos"], args["sin"], False)[0])


@pytest.mark.parametrize(
    ("primitive", "bug"),
    [
        ("rope_fwd", _last_pair_unturned),
        ("rope_fwd", _k_turned_as_the_token_before),
        ("rope_bwd", _backward_turns_forward),
    ],
)
def test_planted_bugs_are_caught(monkeypatch: pytest.MonkeyPatch, primitive: str, bug: Callable[..., None]) -> None:
    assert_bug_is_caught(monkeypatch, Case("rope", {"B": 2, "T": 9, "H": 4, "G": 2, "D": 8}), primitive, bug)


def test_bad_input_names_argument_value_and_expectation() -> None:
    q, k = torch.randn(2, 5, 4, 16), torch.randn(2, 5, 2, 16)
    cos, sin = _angles(5, 16)
    with pytest.raises(ValueError, match=r"k has shape \(2, 4, 2, 16\)"):
        lf.rope(q, k[:, :4], cos, sin)
    with pytest.raises(ValueError, match=r"cos has shape \(4, 8\)"):
        lf.rope(q, k, cos[:4], sin)
    with pytest.raises(ValueError, match=r"sin has shape \(5, 7\)"):
        lf.rope(q, k, cos, sin[:, :7])
    with pytest.raises(ValueError, match=r"D = 15 is not a multiple of 2"):
        lf.rope(q[..., :15], k[..., :15], cos[:, :7], sin[:, :7])
    with pytest.raises(ValueError, match=r"N = 3 is neither 1 nor B = 2"):
        lf.rope(q, k, cos.expand(3, 5, 8), sin.expand(3, 5, 8))
