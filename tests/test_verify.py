"""The error budget: one draw of few numbers does not decide, and what errs more than it may is found all the same."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from llama_fast import verify
from llama_fast.ops import eager, reference
from llama_fast.verify import DRAWS, Case, Result, measure


class MadeUp:
    """An op of `numbers` results y and gradients dx: eager's errors normal, ours the same but `factor` times as large.

    `change(ours, draw)` may change the results in place; `draw` counts from 0.
    """

    def __init__(
        self, numbers: int, factor: float, seed: int, change: Callable[[Mapping[str, Tensor], int], None] | None = None
    ) -> None:
        self.numbers, self.factor, self.change = numbers, factor, change
        self.generator = torch.Generator().manual_seed(seed)
        self.draws = 0

    def __call__(self, function: Any, inputs: Any, options: Any, dtype: torch.dtype) -> dict[str, Tensor]:
        """In the place of verify._differentiate, which is called for the truth, for eager PyTorch and for ours."""
        if function is reference.swiglu:
            self.truth = {name: self._normal() for name in ("y", "dx")}
            return self.truth
        size = 1e-3 if function is eager.swiglu else 1e-3 * self.factor  # far above an ulp of float32
        found = {name: (exact + size * self._normal()).float() for name, exact in self.truth.items()}
        if function is not eager.swiglu:
            if self.change:
                self.change(found, self.draws)
            self.draws += 1
        return found

    def _normal(self) -> Tensor:
        return torch.randn(self.numbers, dtype=torch.float64, generator=self.generator)


def judged(monkeypatch: pytest.MonkeyPatch, *args: Any) -> list[Result]:
    monkeypatch.setattr(verify, "_differentiate", MadeUp(*args))
    return measure(Case("swiglu", {"...": (1,), "F": 1}), "reference", torch.float32)


@pytest.mark.parametrize("numbers", [1, 3, 20])
def test_luck_does_not_decide(monkeypatch: pytest.MonkeyPatch, numbers: int) -> None:
    again = 0
    for seed in range(200):
        y, dx = judged(monkeypatch, numbers, 0.5, seed)
        assert not y.problem
        assert not dx.problem
        assert y.draws == dx.draws
        again += y.draws == DRAWS
    assert again > {1: 60, 3: 20, 20: 0}[numbers]  # one draw alone would fail that many


@pytest.mark.parametrize(("numbers", "factor"), [(1, 5.0), (3, 3.0), (20, 2.2), (1000, 1.65)])
def test_larger_errors_are_found(monkeypatch: pytest.MonkeyPatch, numbers: int, factor: float) -> None:
    """By luck a draw of one number may be within the budget; one that is not never passes in the end."""
    found = [x for seed in range(100) for x in judged(monkeypatch, numbers, factor, seed)]
    assert all(f"means of {DRAWS} draws" in x.problem for x in found if x.draws > 1)
    assert sum(x.draws > 1 for x in found) > (80 if numbers == 1 else 190)


@pytest.mark.parametrize("draw", [0, 7])
def test_what_is_wrong_in_one_draw_is_wrong(monkeypatch: pytest.MonkeyPatch, draw: int) -> None:
    def one_nan(ours: Mapping[str, Tensor], n: int) -> None:
        ours["y"][1] += 0.1 if n == 0 else 0.0
        ours["y"][0] = math.nan if n == draw else ours["y"][0]

    y, dx = judged(monkeypatch, 20, 0.5, 0, one_nan)
    assert y.problem == "1 values are finite or not by mistake"
    assert y.draws == dx.draws == (1 if draw == 0 else DRAWS)


@pytest.mark.parametrize(("off", "draws"), [(0.1, DRAWS), (10.0, 1)])
def test_one_number_that_is_off_in_the_first_draw_alone(
    monkeypatch: pytest.MonkeyPatch, off: float, draws: int
) -> None:
    def one_number_off(ours: Mapping[str, Tensor], n: int) -> None:
        ours["dx"][0] += off if n == 0 else 0.0

    y, dx = judged(monkeypatch, 20, 0.5, 0, one_number_off)
    assert not y.problem
    assert dx.problem.startswith("largest error")
    assert dx.draws == draws


def test_the_draws_differ_and_the_first_is_the_seed_asked_for() -> None:
    case = Case("swiglu", {"...": (3,), "F": 40})
    seeds: list[int] = []
    inputs = Case.inputs

    def seen(self: Case, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> dict[str, Tensor]:
        seeds.append(seed)
        return inputs(self, dtype, device, seed)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Case, "inputs", seen)
        patch.setattr(verify, "ulp", lambda *_: 0.0)
        patch.setattr(verify, "FORWARD_FACTOR", 0.1)
        patch.setattr(verify, "BACKWARD_FACTOR", 0.1)
        results = measure(case, "reference", torch.float32, seed=5)
    assert seeds == list(range(5, 5 + DRAWS))
    assert all(r.problem for r in results)
