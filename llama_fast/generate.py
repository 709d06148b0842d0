"""Generation with a preallocated key/value cache: the prompt in one pass, then a token at a time.

Legend: L layers, B batch, S tokens so far, G key/value heads, D head dim, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from llama_fast.block import Cache
from llama_fast.config import LlamaConfig

if TYPE_CHECKING:
    from llama_fast.model import Llama


class KVCache:
    """Room for the keys and values of every layer, filled from the front.

    Args:
        config: gives the sizes.
        batch: B.
        room: the most tokens that it will hold.
        device, dtype: of keys and values.
    """

    def __init__(
        self, config: LlamaConfig, batch: int, room: int, device: torch.device | str, dtype: torch.dtype
    ) -> None:
        shape = (config.n_layers, batch, room, config.n_kv_heads, config.head_dim)
        self.k_LBSGD = torch.empty(shape, device=device, dtype=dtype)
        self.v_LBSGD = torch.empty(shape, device=device, dtype=dtype)
        self.used = 0
        self._layers = list(zip(self.k_LBSGD, self.v_LBSGD, strict=True))

    @property
    def room(self) -> int:
        """Tokens that still fit."""
        return self.k_LBSGD.shape[2] - self.used

    def layer(self, i: int) -> Cache:
        """Keys and values of layer i, as the block takes them."""
        return Cache(*self._layers[i], self.used)


class Sampler:
    """Chooses a token from each row of logits.

    Args:
        temperature: 0 takes the likeliest; else divides the logits.
        top_k: keep the k likeliest; None for all.
        top_p: keep the likeliest whose probabilities reach p together; None for all.
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
        seed: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        if not 0.0 <= temperature < float("inf"):
            raise ValueError(f"temperature = {temperature}: expected a finite number of 0 or more")
        if top_k is not None and top_k < 1:
            raise ValueError(f"top_k = {top_k}: expected 1 or more")
        if top_p is not None and not 0.0 < top_p <= 1.0:
            raise ValueError(f"top_p = {top_p}: expected a number above 0 and at most 1")
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p
        self.generator = None if seed is None else torch.Generator(device).manual_seed(seed)

    def __call__(self, logits_BV: Tensor) -> Tensor:
        """[B, V] -> [B] int64."""
        logits = logits_BV.float()
        if self.temperature == 0.0:
            return logits.argmax(-1)
        logits = logits / self.temperature
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k, dim=-1).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        if self.top_p is not None and self.top_p < 1.0:
            ordered, order = logits.sort(dim=-1, descending=True)
            before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
            drop = (before >= self.top_p).scatter(-1, order, before >= self.top_p)
            logits = logits.masked_fill(drop, -torch.inf)
        return torch.multinomial(logits.softmax(-1), 1, generator=self.generator).squeeze(-1)


def generate(
    model: Llama,
    tokens: Tensor,
    max_new_tokens: int,
    sampler: Sampler,
    eos_id: int | None = None,
    on_token: Callable[[Tensor], object] | None = None,
) -> Tensor:
    """See `Llama.generate`."""
    if tokens.ndim != 2 or tokens.shape[1] < 1:
        raise ValueError(f"tokens is {tuple(tokens.shape)}: expected [B, T] with T of 1 or more")
    if max_new_tokens < 0:
        raise ValueError(f"max_new_tokens = {max_new_tokens}: expected 0 or more")
    total = tokens.shape[1] + max_new_tokens
    if total > model.config.max_seq_len:
        raise ValueError(
            f"max_new_tokens = {max_new_tokens}: with a prompt of {tokens.shape[1]} tokens, expected at most "
            f"{model.config.max_seq_len - tokens.shape[1]} (max_seq_len is {model.config.max_seq_len})"
        )
    weight = model.lm_head.weight
    cache = KVCache(model.config, tokens.shape[0], total, weight.device, weight.dtype)
    columns, step = [tokens], tokens
    done = torch.zeros(tokens.shape[0], dtype=torch.bool, device=tokens.device)
    for _ in range(max_new_tokens):
        logits_BV = model.lm_head(model.hidden(step, cache)[:, -1])
        chosen = sampler(logits_BV)
        if eos_id is not None:
            chosen = torch.where(done, eos_id, chosen)
            done |= chosen == eos_id
        if on_token is not None:
            on_token(chosen)
        step = chosen.unsqueeze(1)
        columns.append(step)
        if eos_id is not None and bool(done.all()):
            break
    return torch.cat(columns, dim=1)
