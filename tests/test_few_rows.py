"""A block of few rows as two native calls: the bits of the ops, and only where nothing stands against it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from numerics import EveryResult, instruction_set
from torch import Tensor

import llama_fast as lf
from llama_fast import few_rows
from llama_fast.block import BlockOptions, Cache, Weights, transformer_block
from llama_fast.ops import linear, native

pytestmark = pytest.mark.skipif(not native.isas(), reason="the native library is not built")

C, H, G, D, F, ROOM = 520, 8, 4, 72, 1000, 40  # each product of a row is large enough for gemv


def weights(dtype: torch.dtype, head_dim: int = D, variant: str = "") -> Weights:
    """variant: "biases", "norms" (of heads), both words, or neither."""
    generator = torch.Generator().manual_seed(1)
    shapes = [(C,), *((n * head_dim, C) for n in (H, G, G)), (C, H * head_dim), (C,), (F, C), (F, C), (C, F)]
    shapes += [(n * head_dim,) for n in (H, G, G)] + [(head_dim,)] * 2
    drawn = [torch.randn(shape, generator=generator) for shape in shapes]
    w = Weights(*[(1 + 0.1 * w if w.ndim == 1 else w / w.shape[1] ** 0.5).to(dtype) for w in drawn])
    if "biases" not in variant:
        w = w._replace(bq_HD=None, bk_GD=None, bv_GD=None)
    return w if "norms" in variant else w._replace(normq_D=None, normk_D=None)


def tables(B: int, T: int, head_dim: int = D) -> tuple[Tensor, Tensor]:
    angles = torch.rand(B, T, head_dim // 2, generator=torch.Generator().manual_seed(2)) * 6
    return angles.cos(), angles.sin()


def hidden(B: int, T: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(B, T, C, generator=torch.Generator().manual_seed(3)).to(dtype)


def room(B: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(2, B, ROOM, G, D, generator=torch.Generator().manual_seed(4)).to(dtype)


class Seen(EveryResult):
    def saw(self, x: Tensor) -> None:
        pass


@contextlib.contextmanager
def counted(monkeypatch: pytest.MonkeyPatch, calls: list[bool]) -> Any:
    """Notes whether each block that is asked for is taken."""
    before = few_rows.before
    with monkeypatch.context() as patch:
        patch.setattr(few_rows, "before", lambda *args: (y := before(*args), calls.append(y is not None))[0])
        yield


@torch.no_grad()
def both(run: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> tuple[Any, Any, bool]:
    """What `run` gives by the native calls and by the ops, and whether the native calls ran."""
    calls: list[bool] = []
    with counted(monkeypatch, calls):
        one = run()
    with monkeypatch.context() as patch:
        patch.setattr(few_rows, "before", lambda *_: None)
        two = run()
    return one, two, any(calls)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("isa", native.isas())
@pytest.mark.parametrize("variant", ["", "biases", "norms", "biases, norms"])
def test_the_bits_of_the_ops(variant: str, isa: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    w = weights(dtype, variant=variant)
    for B, T, used, cached, per_row, more in (
        (1, 1, 17, True, False, {}),
        (1, 1, 0, True, False, {"window": 3}),
        (1, 4, 9, True, False, {"interleaved": True}),
        (2, 2, 30, True, True, {}),
        (4, 1, 33, True, True, {"window": 8}),
        (3, 1, 5, False, False, {}),
        (1, 3, 0, False, True, {"interleaved": True}),
    ):
        options = BlockOptions(D, **more)
        cos, sin = tables(B if per_row else 1, T)
        x, held = hidden(B, T, dtype), room(B, dtype)

        def run(
            x: Tensor = x,
            held: Tensor = held,
            used: int = used,
            cached: bool = cached,
            options: BlockOptions = options,
            angles: tuple[Tensor, Tensor] = (cos, sin),
        ) -> tuple[Tensor, Tensor]:
            kv = held.clone()
            return transformer_block(x, w, *angles, options, cache=Cache(*kv, used) if cached else None), kv

        with instruction_set(isa):
            (y, kv), (expected, expected_kv), taken = both(run, monkeypatch)
        assert taken
        assert y.shape == x.shape
        assert y.is_contiguous()
        assert torch.isfinite(y).all()
        assert torch.equal(y, expected), (B, T, used, more)
        assert torch.equal(kv, expected_kv)


def test_float16_is_as_near_to_float64_as_the_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which the ops multiply in float32, in another order."""
    w, x, angles = weights(torch.float16), hidden(1, 4, torch.float16), tables(1, 4)
    y, ops, taken = both(lambda: transformer_block(x, w, *angles, BlockOptions(D)), monkeypatch)
    exact = transformer_block(x.double(), Weights(*[t.double() for t in w.given()]), *angles, BlockOptions(D))
    ours, theirs = ((t.double() - exact).norm() / exact.norm() for t in (y, ops))
    assert taken
    assert ours <= 1.25 * theirs


def test_all_query_heads_on_one_key_head(monkeypatch: pytest.MonkeyPatch) -> None:
    """Thirty-six of them; the plan of a whole step takes eight."""
    w, x = weights(torch.float32), hidden(1, 2, torch.float32)
    wide = w._replace(wk_GDxC=w.wk_GDxC[:16], wv_GDxC=w.wv_GDxC[:16])
    y, expected, taken = both(lambda: transformer_block(x, wide, *tables(1, 2, 16), BlockOptions(16)), monkeypatch)
    assert taken
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seen", ["starts", "spans", "packed"])
def test_what_a_row_attends_to(seen: str, monkeypatch: pytest.MonkeyPatch) -> None:
    w, x, held = weights(torch.float32), hidden(2, 1, torch.float32), room(2, torch.float32)
    if seen == "packed":
        x = x.view(1, 2, C)
        packed = torch.tensor([0, 1, 2], dtype=torch.int32)
        run = lambda: transformer_block(x, w, *tables(1, 2), BlockOptions(D), cu_seqlens=packed)  # noqa: E731
    elif seen == "spans":
        run = lambda: transformer_block(x, w, *tables(1, 1), BlockOptions(D), spans=((0, 1), (1, 1)))  # noqa: E731
    else:
        cache = Cache(*held, 20, (3, 20))
        run = lambda: transformer_block(x, w, *tables(1, 1), BlockOptions(D), cache=cache)  # noqa: E731
    y, expected, taken = both(run, monkeypatch)
    assert taken
    assert torch.equal(y, expected)


def test_any_strides(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows with gaps are read where they lie; a weight or an x whose terms do not lie side by side, by the ops."""
    x, w, angles = hidden(1, 3, torch.float32), weights(torch.float32), tables(1, 3)
    gaps = Weights(*[torch.stack((t, t), dim=-2).flatten(0, -2)[::2] if t.ndim == 2 else t for t in w.given()])
    across = w._replace(wdown_CF=w.wdown_CF.t().contiguous().t())
    for case, given, native_calls in (("gaps", gaps, True), ("across", across, False), ("", w, True)):
        for some in (x, x.expand(1, 3, C).transpose(0, 1).contiguous().transpose(0, 1), x.mT.contiguous().mT):
            run = lambda some=some, given=given: transformer_block(some, given, *angles, BlockOptions(D))  # noqa: E731
            y, expected, taken = both(run, monkeypatch)
            assert taken == native_calls, case
            assert torch.equal(y, expected)


@pytest.mark.parametrize(
    "what",
    [
        *("float64", "five rows", "head dim", "reference", "a path", "autocast", "a mode", "compiled", "gradients"),
        *("keys", "a sparse weight"),
    ],
)
def test_what_the_ops_must_compute(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    head_dim = 12 if what == "head dim" else D
    dtype = torch.float64 if what == "float64" else torch.float32
    w, x = weights(dtype, head_dim), hidden(1, 5 if what == "five rows" else 2, dtype)
    if what == "gradients":
        x.requires_grad_()
    if what == "a sparse weight":
        w = w._replace(wup_FC=w.wup_FC.to_sparse())
    contexts: dict[str, Callable[[], Any]] = {
        "reference": lambda: lf.backend("reference"),
        "a path": lambda: linear.force("torch"),
        "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
        "a mode": Seen,
        "gradients": torch.enable_grad,
    }
    options = BlockOptions(head_dim, keep_residual=what == "autocast")
    angles, held = tables(1, x.shape[1], head_dim), room(1, dtype)
    block: Any = torch.compile(transformer_block, backend="eager") if what == "compiled" else transformer_block

    def run() -> Tensor:
        with contexts.get(what, contextlib.nullcontext)():
            cache = Cache(*held, 3) if what == "compiled" else None
            y = block(x, w, *angles, options, cache=cache, return_keys=what == "keys")
        return y[0] if what == "keys" else y

    y, expected, taken = both(run, monkeypatch)
    assert not taken
    assert torch.equal(y, expected)
    assert y.dtype == dtype


def test_a_cache_of_another_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    class Growing:
        def __init__(self) -> None:
            self.rows: tuple[Tensor, ...] = ()

        def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
            self.rows = tuple(
                torch.cat(pair, dim=1) for pair in zip(self.rows or (k[:, :0], v[:, :0]), (k, v), strict=True)
            )
            return self.rows  # type: ignore[return-value]

    w, x, angles = weights(torch.float32), hidden(1, 4, torch.float32), tables(1, 4)

    def run() -> Tensor:
        cache = Growing()
        steps = [(x[:, t : t + 1], *(a[:, t : t + 1] for a in angles)) for t in range(4)]
        return torch.cat([transformer_block(s, w, c, n, BlockOptions(D), cache=cache) for s, c, n in steps], dim=1)

    y, expected, taken = both(run, monkeypatch)
    assert taken
    assert torch.equal(y, expected)
    torch.testing.assert_close(y, transformer_block(x, w, *angles, BlockOptions(D)), rtol=1e-4, atol=1e-5)
