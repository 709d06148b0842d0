"""Choosing the next token: the filters of the logits, in transformers' order and by its formulas, and the draw.

    repetition penalty, temperature, top-k, top-p, min-p, softmax, one draw

so that the same seed and logits give the token that `transformers` gives.

Legend: B batch, V vocabulary.
"""

from __future__ import annotations

import math
import operator
from numbers import Real
from typing import SupportsIndex

import torch
from torch import Tensor

from llama_fast.ops import native

_COLD = 1e-30  # below this temperature the likeliest token has all the probability, or those that tie with it


class Sampler:
    """Chooses a token from each row of logits.

    Args:
        temperature: 0 takes the likeliest; else divides the logits.
        top_k: keep the k likeliest, and those that tie with the last; None for all.
        top_p: keep the likeliest whose probabilities reach p together; None for all.
        min_p: keep those whose probability is at least min_p times the largest; None for all.
        repetition_penalty: above 1 makes tokens that stand in the text already less likely: a positive logit is divided
            by it, a negative one multiplied (Keskar et al. 2019, arXiv:1909.05858).
        seed: of the draws; None for torch's generator.
        device: where the logits are.

    Raises:
        ValueError: names the argument, its value and what was expected.
    """

    def __init__(
        self,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        given = {"temperature": temperature, "top_p": top_p, "min_p": min_p, "repetition_penalty": repetition_penalty}
        for name, value in given.items():
            if not (isinstance(value, Real) or (value is None and name in ("top_p", "min_p"))):
                raise ValueError(f"{name} = {value!r}: expected a number")
        if not 0.0 <= temperature < math.inf:
            raise ValueError(f"temperature = {temperature}: expected a finite number of 0 or more")
        if top_k is not None and not (isinstance(top_k, SupportsIndex) and top_k >= 1):
            raise ValueError(f"top_k = {top_k!r}: expected an integer of 1 or more")
        if top_p is not None and not 0.0 < top_p <= 1.0:
            raise ValueError(f"top_p = {top_p}: expected a number above 0 and at most 1")
        if min_p is not None and not 0.0 <= min_p <= 1.0:
            raise ValueError(f"min_p = {min_p}: expected a number from 0 to 1")
        if not 0.0 < repetition_penalty < math.inf:
            raise ValueError(f"repetition_penalty = {repetition_penalty}: expected a finite number above 0")
        if seed is not None and not (isinstance(seed, SupportsIndex) and -(2**63) <= seed < 2**64):
            raise ValueError(f"seed = {seed!r}: expected an integer from -2**63 to 2**64 - 1")
        self.temperature, self.top_k, self.top_p, self.min_p = temperature, top_k, top_p, min_p
        self.repetition_penalty = repetition_penalty
        self.generator = None if seed is None else torch.Generator(device).manual_seed(operator.index(seed))

    @property
    def penalises(self) -> bool:
        """Whether a call needs to know the tokens so far."""
        return self.repetition_penalty != 1.0

    def __call__(self, logits_BV: Tensor, seen_BV: Tensor | None = None) -> Tensor:
        """The chosen tokens [B] int64.

        Args:
            logits_BV: [B, V].
            seen_BV: [B, V] bool, the tokens that the penalty is for; None for none.

        Raises:
            FloatingPointError: on the CPU, where the draw fails: the logits are not finite.
        """
        if self.temperature == 0.0 and (seen_BV is None or not self.penalises):
            return native.argmax(logits_BV)
        logits = logits_BV.float()
        if seen_BV is not None and self.penalises:
            p = self.repetition_penalty
            logits = torch.where(seen_BV, torch.where(logits < 0, logits * p, logits / p), logits)
        if self.temperature == 0.0:
            return logits.argmax(-1)
        if self.temperature < _COLD:  # they would be infinite
            logits = logits - logits.amax(-1, keepdim=True)
        logits = self._filter(logits / max(self.temperature, torch.finfo(logits.dtype).tiny))
        try:
            return torch.multinomial(logits.softmax(-1), 1, generator=self.generator).squeeze(-1)
        except RuntimeError:
            if logits_BV.isfinite().all():
                raise
            raise FloatingPointError(
                "the model's logits hold NaN or infinity: expected finite numbers; float16 overflows before bfloat16"
            ) from None

    def _filter(self, logits: Tensor) -> Tensor:
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k, dim=-1).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        if self.top_p is not None and self.top_p < 1.0:
            ascending, order = logits.sort(dim=-1)
            drop = ascending.softmax(-1).cumsum(-1) <= 1.0 - self.top_p
            drop[:, -1] = False
            logits = logits.masked_fill(drop.scatter(-1, order, drop), -torch.inf)
        if self.min_p:
            p = logits.softmax(-1)
            logits = logits.masked_fill(p < self.min_p * p.amax(-1, keepdim=True), -torch.inf)
        return logits
