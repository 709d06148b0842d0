"""`attn_implementation="llama_fast"`: transformers' attention and mask functions, on lf.attention.

What the mask function gives, and what it means; transformers hands on as it is whatever has four dimensions:

    None               each query sees the keys up to its own; the last query stands at the last key
    [1,1,1,1] int32    as None, in layers too whose `is_causal` is False: with no cache and no mask transformers 4.x
                       takes the rows for packed sequences, one each, and such a mask is causal
    [1,1,1,N+1] int32  sequences packed in the rows of the batch laid end to end, causal within each: where each begins
    [B,1,1,2] int64    as None, and row b sees only its keys from the first number up to the second: padding. It stays
                       on the CPU, since each layer reads the numbers
    [B,1,1,3] int64    the same within a sliding window, the third number; B = 1: each row sees all keys within it
    [1,1,2,N+1] int32  packed sequences within a sliding window, the number in the second row
    [B,1,T,S]          bool or float, anything else, as transformers makes it for scaled_dot_product_attention

Legend: B batch, T query tokens, S key tokens, H query heads, G key/value heads, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import causal_mask_function, sdpa_mask

from llama_fast.hf.layout import stock
from llama_fast.ops.attention import attention
from llama_fast.ops.dispatch import NotSupported

NAME = "llama_fast"
# arguments that change what attention computes: sdpa knows the first, and nothing here the others
_SDPA_ONLY = ("position_bias", "head_mask")
_UNKNOWN = ("softcap", "s_aux", "sinks", "indices", "block_indices")


def _hidden(x: Tensor | None = None) -> bool:
    """Whether the numbers of tensors, of `x` above all, cannot be read: in a trace or a CUDA graph, or it has none."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or (x is not None and (isinstance(x, FakeTensor) or x.is_meta))
        or (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())
    )


def _free_variables(function: Any) -> dict[str, Any]:
    return dict(zip(function.__code__.co_freevars, [c.cell_contents for c in function.__closure__ or ()], strict=True))


def _read(mask_function: Any) -> tuple[int | None, Tensor | None] | None:
    """The sliding window of a mask function of transformers that is causal, or None, and [B, T], the packed sequence
    that each token belongs to, or None; None where the function is any other."""
    if mask_function is causal_mask_function:
        return None, None
    if torch.compiler.is_compiling():  # to which closures are closed
        return None
    if getattr(mask_function, "__qualname__", "") != "and_masks.<locals>.and_mask":
        return None
    parts = _free_variables(mask_function).get("mask_functions", ())
    names = [getattr(part, "__qualname__", "") for part in parts]
    if len(parts) != 2:
        return None
    if names[0] == "sliding_window_overlay.<locals>.inner_mask" and parts[1] is causal_mask_function:
        return _free_variables(parts[0]).get("sliding_window"), None
    if names[1] != "packed_sequence_mask_function.<locals>.inner_mask":
        return None
    order = parts[0]
    if names[0] == "remap_positions_for_packed_sequence.<locals>.inner_mask":  # places within each sequence
        order = _free_variables(order).get("mask_function")
    read = _read(order)
    if read is None or read[1] is not None:
        return None
    return read[0], _free_variables(parts[1]).get("packed_sequence_mask")


def _row_numbers(sequences: Tensor) -> Tensor:
    """[B, T] numbers of sequences -> [1, 1, 1, N+1] int32, where each begins in the rows laid end to end."""
    B, T = sequences.shape
    rows = torch.arange(B, device=sequences.device).unsqueeze(1)
    flat = (sequences + rows * (T + 1)).flatten()
    begins = (flat[1:] != flat[:-1]).nonzero().flatten() + 1
    return torch.cat((begins.new_zeros(1), begins, begins.new_full((1,), B * T))).int()[None, None, None]


def mask(
    *,
    batch_size: int,
    kv_length: int,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> Tensor | None:
    """transformers' mask function of "llama_fast": arguments of `masking_utils.sdpa_mask`, results as above."""
    positions = kwargs.get("cache_position")
    length = kwargs["q_length"] if positions is None else positions.shape[0]
    read, local = _read(mask_function), kwargs.get("local_size")
    if read is None and allow_is_causal_skip and local is not None and kv_length <= local:
        read = local, None  # of a sliding window or of chunks, of which all keys are in one
    if read is not None:
        window, sequences = read
        if window is not None and kv_length <= window:
            window = None  # it holds all keys
        if sequences is not None:
            if attention_mask is None and kv_offset == 0 and kv_length == length and not _hidden(sequences):
                return _packed(sequences.expand(batch_size, -1), window)
        elif allow_is_causal_skip and (window is None or not _hidden()):
            offset = kwargs.get("q_offset", 0) if positions is None else positions[0]
            if _last_at_last(offset, length, kv_offset, kv_length):
                spans: list[list[int]] | None = [[0, kv_length]]
                if attention_mask is not None:
                    padded = attention_mask.shape[-1] == kv_offset + kv_length and not _hidden(attention_mask)
                    spans = _spans(attention_mask[:, kv_offset:], length, window) if padded else None
                short = None if spans is None else _short(spans, kv_length, window)
                if spans is not None and (short is None or not _hidden(short)):
                    return short
    return sdpa_mask(
        batch_size=batch_size,
        kv_length=kv_length,
        kv_offset=kv_offset,
        mask_function=mask_function,
        attention_mask=attention_mask,
        **{**kwargs, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False},
    )


def _last_at_last(offset: Any, length: int, kv_offset: Any, kv_length: int) -> bool:
    """Whether the last query stands at the last key, as far as can be known."""
    if isinstance(kv_offset, int) and kv_offset == 0 and kv_length == length:
        return True
    known = not any(isinstance(place, Tensor) and _hidden(place) for place in (offset, kv_offset))
    return known and int(offset) + length == int(kv_offset) + kv_length


def _packed(sequences: Tensor, window: int | None) -> Tensor:
    """The short mask of packed sequences, from [B, T], the number of each token's."""
    if window is None and bool((sequences[:, -1] == sequences[:, 0]).all()):
        return sequences.new_zeros((1, 1, 1, 1), dtype=torch.int32)
    begins = _row_numbers(sequences)
    return begins if window is None else torch.cat((begins, torch.full_like(begins, window)), dim=2)


def _short(spans: list[list[int]], S: int, window: int | None) -> Tensor | None:
    """The short mask of rows that see the keys of their spans alone."""
    whole = all(span == [0, S] for span in spans)
    if window is not None:
        spans = [[*span, window] for span in (spans[:1] if whole else spans)]
    elif whole:
        return None
    return torch.tensor(spans, device="cpu")[:, None, None]


def _spans(seen: Tensor, T: int, window: int | None) -> list[list[int]] | None:
    """[B, S] bool -> [first, last + 1] of each row's true places; None where they leave gaps, or end before the last
    of S > T keys, or of those within a window, so that no two numbers can say which keys a query sees."""
    S = seen.shape[1]
    if bool(seen.all()):
        return [[0, S]] * seen.shape[0]
    places = seen.int()
    rows = torch.stack((places.argmax(1), S - places.flip(1).argmax(1), places.sum(1)), dim=1).tolist()
    contiguous = all(end - begin == count and (end == S or (S == T and window is None)) for begin, end, count in rows)
    return [[begin, end] for begin, end, _ in rows] if contiguous else None


def four_dimensional(mask: Tensor | None, B: int, T: int, S: int, device: torch.device) -> Tensor | None:
    """A mask of this implementation as scaled_dot_product_attention takes it, [B, 1, T, S]; None where its own do."""
    if mask is None and T in (1, S):
        return None
    if mask is not None and not is_short(mask):
        return mask
    causal = torch.ones(T, S, dtype=torch.bool, device=device).tril_(S - T)[None, None]
    if mask is None:
        return causal
    mask, key = mask.to(device), torch.arange(S, device=device)
    window: list[Tensor]  # the number, if there is one, which a trace cannot look at
    if mask.dtype == torch.int64:
        begin, end, *window = mask.unsqueeze(-2).unbind(-1)
        sees = (begin <= key) & (key < end)
    else:
        begins, *window = mask[0, 0].unbind(0)
        sequence = torch.bucketize(torch.arange(B * T, device=device), begins[1:], right=True).view(B, 1, T)
        sees = sequence.unsqueeze(3) == sequence.unsqueeze(2)
        window = [number[0] for number in window]
    for number in window:
        sees = sees & (key > key[S - T :, None] - number)
    return causal & sees


def is_causal_alone(mask: Tensor | None) -> bool:
    """Whether a mask says no more than that attention is causal. Its shape tells: to read numbers breaks a graph."""
    return mask is not None and mask.dtype == torch.int32 and tuple(mask.shape) == (1, 1, 1, 1)


def is_short(mask: Tensor) -> bool:
    """Whether a mask says in numbers of rows or keys what queries see, not place by place."""
    shape = tuple(mask.shape)
    if mask.dtype == torch.int64:
        return shape[1:] in ((1, 1, 2), (1, 1, 3))
    return mask.dtype == torch.int32 and shape[:-1] in ((1, 1, 1), (1, 1, 2))


def _has_numbers(mask: Tensor) -> bool:
    """Whether `seen` looks at the numbers of a short mask: at all but where packed sequences begin."""
    return mask.dtype == torch.int64 or mask.shape[2] > 1


class Seen(NamedTuple):
    """What a short mask, or None, says beside causal, each None where it says nothing of it.

    Args:
        cu_seqlens: [N+1] int32, where each packed sequence begins in the rows laid end to end.
        spans: of each row, the first and one past the last of the keys that it sees.
        window: of how many keys, up to its own, a query sees those.
    """

    cu_seqlens: Tensor | None = None
    spans: tuple[tuple[int, int], ...] | None = None
    window: int | None = None


def seen(mask: Tensor | None) -> Seen:
    """Reads a short mask, the numbers of its rows too: such a mask is on the CPU."""
    if mask is None or is_causal_alone(mask):
        return Seen()
    if mask.dtype == torch.int32:
        begins = mask[0, 0]
        return Seen(cu_seqlens=begins[0], window=int(begins[1, 0]) if len(begins) > 1 else None)
    rows = mask.flatten(1).tolist()
    window = rows[0][2] if mask.shape[-1] == 3 else None
    if window is not None and len(rows) == 1 and rows[0][0] == 0:
        return Seen(window=window)
    return Seen(spans=tuple((row[0], row[1]) for row in rows), window=window)


def kernel_objection() -> str | None:
    """Why no kernel runs whatever the tensors are, or None: kernels are hidden from what looks into each operation."""
    if torch.compiler.is_compiling():  # which knows the ops
        return None
    if torch._C._are_functorch_transforms_active():
        return "a transform of torch.func"
    if torch.jit.is_tracing():
        return "torch.jit.trace"
    return "forward-mode differentiation" if forward_ad._current_level >= 0 else None


def objection(mask: Tensor | None, dropout: float, kwargs: dict[str, Any]) -> str | None:
    """Why lf.attention does not take a call, or None."""
    if against := kernel_objection():
        return against
    if dropout:
        return f"attention dropout of {dropout:g}"
    if mask is not None and not is_short(mask):
        return "a mask that is not causal"
    if mask is not None and _has_numbers(mask) and torch.compiler.is_compiling():
        return "a mask whose numbers a compiled layer cannot look at"
    return next((f"{name} is given" for name in (*_SDPA_ONLY, *_UNKNOWN) if kwargs.get(name) is not None), None)


def _padded(
    q: Tensor, k: Tensor, v: Tensor, spans: tuple[tuple[int, int], ...], scale: float | None, window: int | None
) -> Tensor:
    """Attention of rows of which each has its own span of keys; a query beyond its row's span, of which there are none
    where there is a window, sees all of that."""
    T, out = q.shape[1], []
    for b, (begin, end) in enumerate(spans):
        q_row, k_row, v_row = q[b : b + 1], k[b : b + 1, begin:end], v[b : b + 1, begin:end]
        within = T - (k.shape[1] - end)
        parts = [attention(q_row[:, :within], k_row, v_row, scale=scale, window=window)]
        if within < T:
            parts.append(attention(q_row[:, within:], k_row, v_row, causal=False, scale=scale))
        out += [torch.cat(parts, dim=1) if len(parts) > 1 else parts[0]]
    return torch.cat(out) if len(out) > 1 else out[0]


def _with_weights(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float,
    scaling: float | None,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """transformers' eager attention, which has the weights [B, H, T, S] to give."""
    (B, _, T, D), S = query.shape, key.shape[2]
    if attention_mask is None and causal:
        attention_mask = torch.ones(T, S, dtype=torch.bool, device=query.device).tril_(S - T)[None, None]
    attention_mask = four_dimensional(attention_mask, B, T, S, query.device)
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        lowest = max(torch.finfo(t).min for t in (query.dtype, torch.float32))  # the softmax is in float32
        attention_mask = torch.zeros_like(attention_mask, dtype=query.dtype).masked_fill_(~attention_mask, lowest)
    scaling = D**-0.5 if scaling is None else scaling
    return stock.eager_attention_forward(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout)


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """transformers' attention function of "llama_fast": lf.attention where it can say the call, else sdpa.

    Args:
        module: the attention layer.
        query: [B, H, T, D].
        key, value: [B, G, S, D].
        attention_mask: of the mask function above.
        dropout, scaling, is_causal, kwargs: as `sdpa_attention_forward`.

    Returns:
        out: [B, T, H, D], and None in place of the weights [B, H, T, S] unless `output_attentions` asks for them.

    Raises:
        NotSupported: the call is of another attention: with sinks, a cap on the scores, keys chosen one by one.
    """
    if unknown := next((name for name in _UNKNOWN if kwargs.get(name) is not None), None):
        raise NotSupported(
            f"hf: {type(module).__name__} calls its attention with {unknown}, which neither {NAME} nor sdpa knows: "
            'expected attn_implementation="eager", or another that the model supports'
        )
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if is_causal_alone(attention_mask):
        attention_mask, causal = None, True
    B, _, T, _ = query.shape
    config = getattr(module, "config", None)
    wanted = kwargs.get("output_attentions", getattr(config, "output_attentions", False))
    if wanted or forward_ad._current_level >= 0:  # which sdpa does not know
        out, weights = _with_weights(module, query, key, value, attention_mask, dropout, scaling, causal)
        return out, weights if wanted else None
    alike = value.shape[-1] == query.shape[-1]  # not where keys carry rotary beside what values have, as DeepSeek's
    if alike and objection(attention_mask, dropout, kwargs) is None:
        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        what = seen(attention_mask)
        if what.spans is not None:
            return _padded(q, k, v, what.spans, scaling, what.window), None
        if what.cu_seqlens is not None:
            rows = (x.reshape(-1, *x.shape[2:]) for x in (q, k, v))
            out = attention(*rows, scale=scaling, cu_seqlens=what.cu_seqlens, window=what.window)
            return out.view(q.shape), None
        causal = causal or attention_mask is not None
        return attention(q, k, v, causal=causal, scale=scaling, window=what.window), None
    if causal or attention_mask is not None:
        attention_mask = four_dimensional(attention_mask, B, T, key.shape[2], query.device)
    return sdpa_attention_forward(
        module,
        query,
        key,
        value,
        attention_mask,
        dropout=dropout,
        scaling=scaling,
        is_causal=causal and attention_mask is None and T > 1,
        **kwargs,
    )
