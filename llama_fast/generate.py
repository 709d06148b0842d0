"""Generation with a preallocated key/value cache: the prompts in chunks, then a token at a time.

Prompts of different lengths are aligned at their ends: row b of the cache holds its keys from `starts[b]` on, and
nothing attends to what lies before. Rotary depends on distances alone, so each row is what it is alone.

Legend: L layers, B batch, T tokens of a call, S tokens so far, G key/value heads, D head dim, V vocabulary.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, SupportsIndex

import torch
from torch import Tensor

from llama_fast import decode
from llama_fast.block import Cache
from llama_fast.config import LlamaConfig
from llama_fast.ops.dispatch import autocast_dtype
from llama_fast.plain import check_tokens
from llama_fast.sampling import Sampler

if TYPE_CHECKING:
    from llama_fast.model import Llama

PREFILL_CHUNK = 1024  # tokens of a prompt in one pass: bounds the memory of its activations


class KVCache:
    """Room for the keys and values of every layer, filled from the front.

    Args:
        config: gives the sizes.
        batch: B.
        room: the most tokens that it will hold.
        device, dtype: of keys and values.
        starts: B numbers, where the tokens of each row begin; None for 0.
    """

    def __init__(
        self,
        config: LlamaConfig,
        batch: int,
        room: int,
        device: torch.device | str,
        dtype: torch.dtype,
        starts: Sequence[int] | None = None,
    ) -> None:
        shape = (config.n_layers, batch, room, config.n_kv_heads, config.head_dim)
        with torch.inference_mode(False):  # later steps may be outside it
            self.k_LBSGD = torch.empty(shape, device=device, dtype=dtype)
            self.v_LBSGD = torch.empty(shape, device=device, dtype=dtype)
        self.used = 0
        self.starts = tuple(starts) if starts is not None and any(starts) else None
        self._layers = list(zip(self.k_LBSGD, self.v_LBSGD, strict=True))
        self.plan: decode.Plan | None = None

    def __getstate__(self) -> dict[str, Any]:
        # a plan holds addresses: a copy makes its own; so it does its layers, which pickle would give other memory
        return {name: value for name, value in vars(self).items() if name not in ("plan", "_layers")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, plan=None)
        self._layers = list(zip(self.k_LBSGD, self.v_LBSGD, strict=True))

    @property
    def room(self) -> int:
        """Tokens that still fit."""
        return self.k_LBSGD.shape[2] - self.used

    def grow(self, room: int) -> None:
        """Makes room for `room` tokens in all, keeping what is there; never shrinks."""
        old_k, old_v = self.k_LBSGD, self.v_LBSGD
        L, B, S, G, D = old_k.shape
        if room > S:
            with torch.inference_mode(False):
                self.k_LBSGD, self.v_LBSGD = (t.new_empty(L, B, room, G, D) for t in (old_k, old_v))
            self.k_LBSGD[:, :, : self.used] = old_k[:, :, : self.used]
            self.v_LBSGD[:, :, : self.used] = old_v[:, :, : self.used]
            self._layers = list(zip(self.k_LBSGD, self.v_LBSGD, strict=True))

    def layer(self, i: int) -> Cache:
        """Keys and values of layer i, as the block takes them."""
        return Cache(*self._layers[i], self.used, self.starts)


class Step(NamedTuple):
    """One new token of each row.

    Args:
        tokens: [B] int64, on the device of the model.
        logprobs: [B] float32, the natural logarithm of each one's probability under the model, before any filter; or
            None where they were not asked for.
    """

    tokens: Tensor
    logprobs: Tensor | None


@torch.no_grad()
def stream(
    model: Llama,
    tokens: Tensor | Sequence[Sequence[int]],
    max_new_tokens: int,
    sampler: Sampler,
    eos_ids: Sequence[int] = (),
    *,
    logprobs: bool = False,
    prefill_chunk: int = PREFILL_CHUNK,
    cache: KVCache | None = None,
    before: Sequence[int] = (),
) -> Iterator[Step]:
    """The new tokens, one step after the other; see `Llama.stream`.

    Args:
        model: the model.
        tokens: prompts, [B, T] int64 or B lists.
        max_new_tokens: how many to add at most.
        sampler: chooses.
        eos_ids: a row that gives one of them is filled with the first from there on; all rows done ends it.
        logprobs: give them in each step.
        prefill_chunk: tokens of the prompt in one pass.
        cache: of the tokens that stand before the prompt (B = 1); it is left with those of all but the last new token.
        before: these tokens, for the repetition penalty.

    Raises:
        ValueError: an argument is out of its range, or the prompt and the new tokens exceed max_seq_len.
    """
    weight = model.lm_head.weight
    prompts, starts = _aligned(tokens, weight.device)
    B, T = prompts.shape
    used = 0 if cache is None else cache.used
    _check(model.config, T, used, max_new_tokens, prefill_chunk)
    check_tokens(model.config, prompts)
    if cache is None:
        cache = KVCache(model.config, B, T + max_new_tokens, weight.device, cache_dtype(weight), starts)
    elif B != 1:
        raise ValueError(f"tokens has {B} rows: expected one beside a cache")
    else:
        cache.grow(used + T + max_new_tokens)
    if sampler.penalises and len(before) != used:
        raise ValueError(f"before has {len(before)} ids: expected the {used} of the cache, for the repetition penalty")
    if max_new_tokens == 0:
        return
    V = model.config.vocab_size
    with torch.inference_mode(False):  # each step writes into them, and may be outside it
        seen_BV = _seen(prompts, starts, V) if sampler.penalises else None
        done = torch.zeros(B, dtype=torch.bool, device=prompts.device)
    if seen_BV is not None:
        seen_BV[:, list(before)] = True
    stops = torch.tensor(list(eos_ids), device=prompts.device)
    for at in range(0, T - prefill_chunk, prefill_chunk):
        model.hidden(prompts[:, at : at + prefill_chunk], cache)
    step = prompts[:, (T - 1) // prefill_chunk * prefill_chunk :]
    for _ in range(max_new_tokens):
        logits_BV = decode.step(model, step, cache)
        if logits_BV is None:
            logits_BV = model.lm_head(model.hidden(step, cache)[:, -1])
        chosen = given = sampler(logits_BV, seen_BV)
        if len(stops):
            given = torch.where(done, stops[0], chosen)
            chosen = given.clamp(0, V - 1)  # the model takes no id that it has not, as an end may be
        if seen_BV is not None:
            seen_BV.scatter_(1, chosen[:, None], True)
        yield Step(given, _logprobs(logits_BV, chosen) if logprobs else None)
        if len(stops):
            done |= (given[:, None] == stops).any(1)
            if bool(done.all()):
                return
        step = chosen.unsqueeze(1)


def generate(
    model: Llama,
    tokens: Tensor | Sequence[Sequence[int]],
    max_new_tokens: int,
    sampler: Sampler,
    eos_ids: Sequence[int] = (),
    prefill_chunk: int = PREFILL_CHUNK,
) -> Any:
    """See `Llama.generate`."""
    steps = stream(model, tokens, max_new_tokens, sampler, eos_ids, prefill_chunk=prefill_chunk)
    columns = [step.tokens for step in steps]
    if isinstance(tokens, Tensor):
        return torch.cat([tokens, *(c.unsqueeze(1) for c in columns)], dim=1)
    added = torch.stack(columns, dim=1).tolist() if columns else [[] for _ in tokens]
    return [[*map(operator.index, prompt), *until(new, eos_ids)] for prompt, new in zip(tokens, added, strict=True)]


def until(ids: Sequence[int], stops: Sequence[int]) -> list[int]:
    """`ids` up to and with the first of `stops`."""
    for i, token in enumerate(ids):
        if token in stops:
            return list(ids[: i + 1])
    return list(ids)


def _aligned(tokens: Tensor | Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, list[int] | None]:
    """Prompts [B, T] that end together, and where each begins; None where all begin at 0."""
    if isinstance(tokens, Tensor):
        if tokens.ndim != 2 or tokens.shape[1] < 1:
            raise ValueError(f"tokens is {tuple(tokens.shape)}: expected [B, T] with T of 1 or more")
        return tokens, None
    try:
        rows = [[operator.index(i) for i in row] for row in tokens]
    except TypeError:
        raise ValueError(f"tokens is {tokens!r}: expected [B, T] int64, or lists of ids") from None
    lengths = [len(row) for row in rows]
    if not lengths or min(lengths) < 1:
        raise ValueError(f"tokens has rows of {lengths} ids: expected one row or more, each of 1 id or more")
    T = max(lengths)
    prompts = torch.tensor([[0] * (T - len(row)) + row for row in rows], dtype=torch.int64, device=device)
    return prompts, [T - n for n in lengths]


def cache_dtype(weight: Tensor) -> torch.dtype:
    """The dtype of keys and values, by a weight of the model: autocast's, where that is on."""
    return weight.dtype if weight.dtype == torch.float64 else autocast_dtype(weight) or weight.dtype


def _check(config: LlamaConfig, T: int, used: int, max_new_tokens: int, prefill_chunk: int) -> None:
    for name, value, least in (("max_new_tokens", max_new_tokens, 0), ("prefill_chunk", prefill_chunk, 1)):
        if not isinstance(value, SupportsIndex) or value < least:
            raise ValueError(f"{name} = {value!r}: expected an integer of {least} or more")
    left = config.max_seq_len - used - T
    if left < 0:
        raise ValueError(f"the prompt has {used + T} tokens: expected at most max_seq_len = {config.max_seq_len}")
    if max_new_tokens > left:
        raise ValueError(
            f"max_new_tokens = {max_new_tokens}: with a prompt of {used + T} tokens, expected at most {left} "
            f"(max_seq_len is {config.max_seq_len})"
        )


def _seen(prompts: Tensor, starts: list[int] | None, vocab_size: int) -> Tensor:
    """[B, V] bool: the tokens of each prompt, without those that only fill it up."""
    seen = torch.zeros(prompts.shape[0], vocab_size, dtype=torch.bool, device=prompts.device)
    for b, row in enumerate(prompts):
        seen[b, row[0 if starts is None else starts[b] :]] = True
    return seen


def _logprobs(logits_BV: Tensor, chosen: Tensor) -> Tensor:
    return logits_BV.float().log_softmax(-1).gather(1, chosen[:, None]).squeeze(1)
