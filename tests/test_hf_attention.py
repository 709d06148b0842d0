"""The attention and mask functions of attn_implementation="llama_fast", alone and in models that are no LLaMA."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from hf_pairs import B, T, make, patched, ran, tokens, transformers
from torch import Tensor

import llama_fast as lf
from llama_fast.hf import attention, layout
from llama_fast.hf.attention import NAME, four_dimensional

S = 26
_PADDED = torch.ones(B, T, dtype=torch.bool)
_PADDED[0, :5], _PADDED[2, 15:] = False, False
_PACKED = torch.tensor([[0] * 7 + [1] * 12, [0] * 19, [0] * 3 + [1] * 5 + [2] * 11])


def _mask(length: int, keys: int, **options: Any) -> Tensor | None:
    """Calls the mask function as this version of transformers does."""
    start = keys - length
    where = {"cache_position": torch.arange(start, keys)} if layout.POSITIONS_TO_CACHE else {
        "q_length": length, "q_offset": start, "device": "cpu"
    }  # fmt: skip
    return attention.mask(batch_size=B, kv_length=keys, **where, **options)


def _allowed(mask: Tensor | None, length: int, keys: int) -> Tensor:
    """[B, T, S] bool: what a mask means."""
    wide = four_dimensional(mask, B, length, keys, torch.device("cpu"))
    if wide is None:
        wide = torch.ones(length, keys, dtype=torch.bool).tril(keys - length)[None, None]
    return wide.expand(B, 1, length, keys).squeeze(1)


def _causal(length: int, keys: int) -> Tensor:
    return torch.ones(B, length, keys, dtype=torch.bool).tril(keys - length)


def test_plain_causal_needs_no_mask() -> None:
    for length, keys in ((T, T), (1, S), (7, S)):
        assert _mask(length, keys) is None
        assert _mask(length, keys, attention_mask=torch.ones(B, keys, dtype=torch.bool)) is None
        assert torch.equal(_allowed(None, length, keys), _causal(length, keys))


def test_padding_is_two_numbers_a_row() -> None:
    found = _mask(T, T, attention_mask=_PADDED)
    assert found.tolist() == [[[[5, 19]]], [[[0, 19]]], [[[0, 15]]]]
    assert torch.equal(_allowed(found, T, T), _causal(T, T) & _PADDED[:, None])
    left = torch.ones(B, S, dtype=torch.bool)
    left[1, :4] = False
    found = _mask(7, S, attention_mask=left)
    assert found.shape == (B, 1, 1, 2)
    assert torch.equal(_allowed(found, 7, S), _causal(7, S) & left[:, None])


def test_packed_sequences_are_row_numbers() -> None:
    from transformers import masking_utils as m

    packed = m.packed_sequence_mask_function(_PACKED)
    orders = [m.causal_mask_function]
    if hasattr(m, "remap_positions_for_packed_sequence"):
        positions = torch.cat([torch.arange(n) for n in (7, 12, 19, 3, 5, 11)]).view(B, T)
        orders.append(m.remap_positions_for_packed_sequence(m.causal_mask_function, positions))
    for order in orders:
        found = _mask(T, T, mask_function=m.and_masks(order, packed), allow_is_causal_skip=False)
        assert found.flatten().tolist() == [0, 7, 19, 38, 41, 46, 57]
        same = _PACKED.unsqueeze(2) == _PACKED.unsqueeze(1)
        assert torch.equal(_allowed(found, T, T), _causal(T, T) & same)
    one = m.packed_sequence_mask_function(torch.zeros_like(_PACKED))
    found = _mask(T, T, mask_function=m.and_masks(m.causal_mask_function, one), allow_is_causal_skip=False)
    assert attention.is_causal_alone(found)
    assert torch.equal(_allowed(found, T, T), _causal(T, T))


def test_a_sliding_window_is_a_number() -> None:
    from transformers import masking_utils as m

    for W in (1, 4, T - 1):
        window = m.sliding_window_causal_mask_function(W)
        found = _mask(T, T, mask_function=window, local_size=W)
        assert found.tolist() == [[[[0, T, W]]]]
        assert torch.equal(_allowed(found, T, T), _causal(T, T).triu(1 - W))
        left = _PADDED.flip(1)
        left[0] = True
        found = _mask(T, T, mask_function=window, local_size=W, attention_mask=left)
        assert found.shape == (B, 1, 1, 3)
        assert torch.equal(_allowed(found, T, T), _causal(T, T).triu(1 - W) & left[:, None])
    for W in (T, T + 1):
        assert _mask(T, T, mask_function=m.sliding_window_causal_mask_function(W), local_size=W) is None


def test_a_sliding_window_before_which_a_cache_has_dropped_keys() -> None:
    """10 of 26 keys are gone; queries count from 19."""
    from transformers import masking_utils as m

    W, gone, length = 10, 10, S - T
    where = {"cache_position": torch.arange(T, S)} if layout.POSITIONS_TO_CACHE else {
        "q_length": length, "q_offset": T, "device": "cpu"
    }  # fmt: skip
    call = {"batch_size": B, "kv_length": S - gone, "kv_offset": gone, "local_size": W, **where}
    call["mask_function"] = m.sliding_window_causal_mask_function(W)
    causal = _causal(length, S - gone).triu(S - gone - length + 1 - W)
    found = attention.mask(**call)
    assert found.tolist() == [[[[0, S - gone, W]]]]
    assert torch.equal(_allowed(found, length, S - gone), causal)
    left = torch.ones(B, S, dtype=torch.bool)
    left[0, :13], left[1, :4] = False, False
    found = attention.mask(**call, attention_mask=left)
    assert found[..., 0].flatten().tolist() == [3, 0, 0]
    assert torch.equal(_allowed(found, length, S - gone), causal & left[:, None, gone:])
    last = (
        {"cache_position": torch.tensor([S - 1])} if layout.POSITIONS_TO_CACHE else {"q_length": 1, "q_offset": S - 1}
    )
    one = {**call, **last, "kv_length": W, "kv_offset": S - W}
    assert attention.mask(**one) is None


def test_packed_sequences_within_a_sliding_window() -> None:
    from transformers import masking_utils as m

    packed = m.packed_sequence_mask_function(_PACKED)
    orders = [m.sliding_window_causal_mask_function(4)]
    if hasattr(m, "remap_positions_for_packed_sequence"):
        positions = torch.cat([torch.arange(n) for n in (7, 12, 19, 3, 5, 11)]).view(B, T)
        orders.append(m.remap_positions_for_packed_sequence(orders[0], positions))
    for order in orders:
        found = _mask(T, T, mask_function=m.and_masks(order, packed), allow_is_causal_skip=False)
        assert found.tolist() == [[[[0, 7, 19, 38, 41, 46, 57], [4] * 7]]]
        same = _PACKED.unsqueeze(2) == _PACKED.unsqueeze(1)
        assert torch.equal(_allowed(found, T, T), _causal(T, T).triu(-3) & same)


def test_any_other_mask_is_transformers_own() -> None:
    from transformers import masking_utils as m

    gaps = _PADDED.clone()
    gaps[1, 8] = False
    assert _mask(T, T, attention_mask=gaps).dtype == torch.bool
    assert torch.equal(_allowed(_mask(T, T, attention_mask=gaps), T, T), _causal(T, T) & gaps[:, None])
    window = m.sliding_window_causal_mask_function(4)
    found = _mask(T, T, mask_function=window, local_size=4, attention_mask=_PADDED)  # and keys that end before the last
    assert found.dtype == torch.bool
    assert torch.equal(found.expand(B, 1, T, T).squeeze(1), _causal(T, T).triu(-3) & _PADDED[:, None])
    prefix = m.or_masks(m.causal_mask_function, lambda b, h, q, k: k < 3)
    found = _mask(T, T, mask_function=prefix, allow_is_causal_skip=False)
    assert torch.equal(found.expand(B, 1, T, T).squeeze(1), _causal(T, T) | (torch.arange(T) < 3))
    found = _mask(T, T, allow_is_causal_skip=False)  # the caller wants to see it
    assert torch.equal(found.expand(B, 1, T, T).squeeze(1), _causal(T, T))


@pytest.mark.parametrize("hidden", ["fake", "in a CUDA graph"])
@pytest.mark.parametrize("kind", ["padding", "a window", "padding beside a window", "packed", "packed within a window"])
def test_numbers_that_cannot_be_seen_are_not_looked_at(kind: str, hidden: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import masking_utils as m

    mode = FakeTensorMode() if hidden == "fake" else contextlib.nullcontext()
    if hidden != "fake":
        monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        for name in ("__bool__", "tolist", "nonzero"):  # each would wait for the device
            monkeypatch.setattr(Tensor, name, None)
    with mode:
        rows = torch.ones(B, T, dtype=torch.long)
        call: dict[str, Any] = {"mask_function": m.causal_mask_function}
        if "window" in kind:
            call = {"mask_function": m.sliding_window_causal_mask_function(4), "local_size": 4}
        if "packed" in kind:
            call["mask_function"] = m.and_masks(call["mask_function"], m.packed_sequence_mask_function(rows))
        if "padding" in kind:
            call["attention_mask"] = rows.bool()
        assert _mask(T, T, **call).shape[-2:] == (T, T)


class _Layer(torch.nn.Module):
    num_key_value_groups = 2
    is_causal = True


@pytest.mark.parametrize("kind", ["none", "chunk", "padding", "packed", "one each", "own", "not causal"])
def test_attention_equals_sdpa_on_the_whole_mask(kind: str) -> None:
    length, keys = (7, S) if kind == "chunk" else (T, T)
    torch.manual_seed(0)
    q = torch.randn(B, 4, length, 16, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(B, 2, keys, 16, dtype=torch.float64, requires_grad=True) for _ in range(2))
    mask = {
        "padding": _mask(T, T, attention_mask=_PADDED),
        "packed": attention._row_numbers(_PACKED),
        "one each": torch.zeros(1, 1, 1, 1, dtype=torch.int32),  # causal, whatever the layer says
        "own": (_PADDED[:, None, None] & _causal(T, T)[:, None]),
    }.get(kind)
    causal = {"is_causal": False} if kind in ("not causal", "one each") else {}
    allowed = torch.ones(B, T, T, dtype=torch.bool) if kind == "not causal" else _allowed(mask, length, keys)
    wide = [t.repeat_interleave(2, dim=1) for t in (k, v)]
    want = torch.nn.functional.scaled_dot_product_attention(q, *wide, attn_mask=allowed[:, None], scale=0.3)
    dout = torch.randn(want.shape, dtype=torch.float64)
    for options in ({}, {"dropout": 0.0, "output_attentions": True}):
        got, weights = attention.attention_forward(_Layer(), q, k, v, mask, scaling=0.3, **causal, **options)
        near = 1e-5 if options else 1e-9  # transformers' eager softmax is in float32
        sees = allowed.any(-1)  # eager attention gives a query that sees nothing the mean of all values
        torch.testing.assert_close(got[sees], want.transpose(1, 2)[sees], rtol=near, atol=near)
        assert (weights is None) == (not options)
        if weights is not None:
            torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]), atol=1e-6, rtol=0)
        else:
            for one, other in zip(
                torch.autograd.grad(got, (q, k, v), dout.transpose(1, 2)),
                torch.autograd.grad(want, (q, k, v), dout, retain_graph=True),
                strict=True,
            ):
                torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("packed", [False, True], ids=["", "packed"])
def test_layers_that_are_not_causal(packed: bool) -> None:
    """Without a mask such a layer sees all keys; what transformers makes of packed sequences is causal all the same,
    and without a cache transformers 4.x takes rows for packed sequences, one each."""
    stock = make().double()
    for layer in stock.model.layers:
        layer.self_attn.is_causal = False
    ours = patched(stock)
    for use_cache in (False, True):
        call = {"use_cache": use_cache}
        if packed:
            call["position_ids"] = torch.cat([torch.arange(n) for n in (7, 12, 19, 3, 5, 11)]).view(B, T)
        torch.testing.assert_close(ours(tokens(), **call).logits, stock(tokens(), **call).logits, rtol=1e-5, atol=1e-5)
        assert ran(ours) == "self_attn is not causal"
    assert "ops, for self_attn is not causal" in lf.hf.report(ours)


def test_a_mask_that_is_causal_alone_is_none_to_the_block() -> None:
    stock = make().double()
    ours = patched(stock)
    call = {"attention_mask": torch.zeros(1, 1, 1, 1, dtype=torch.int32), "use_cache": False}
    torch.testing.assert_close(ours(tokens(), **call).logits, stock(tokens()).logits, rtol=1e-5, atol=1e-5)
    assert ran(ours) == "block"


def test_dropout_is_transformers_own() -> None:
    stock = make(attention_dropout=0.3).double()
    ours = patched(stock)
    for rows in (None, _PADDED):
        call = {} if rows is None else {"attention_mask": rows.long()}
        torch.manual_seed(3)
        want = stock.train()(tokens(), **call).logits
        torch.manual_seed(3)
        got = ours.train()(tokens(), **call).logits
        assert ran(ours) == "attention dropout of 0.3"
        assert "attention is sdpa, for its dropout of 0.3" in lf.hf.report(ours)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(got, stock(tokens(), **call).logits)
        got, want = (m.eval()(tokens(), **call).logits for m in (ours, stock))
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert ran(ours) == "block"


@pytest.mark.parametrize("name", ["softcap", "s_aux", "sinks", "indices", "block_indices"])
def test_another_attention_is_refused(name: str) -> None:
    """sdpa passes over all of these but the first."""
    x = torch.randn(1, 2, 5, 16)
    with pytest.raises(
        RuntimeError, match=f"_Layer calls its attention with {name}, which neither llama_fast nor sdpa"
    ):
        attention.attention_forward(_Layer(), x, x, x, None, **{name: torch.ones(2)})
    attention.attention_forward(_Layer(), x, x, x, None, **{name: None})


@pytest.mark.parametrize("kind", ["Mistral", "Qwen2", "DeepseekV3"])
def test_other_architectures_take_the_attention(kind: str) -> None:
    lf.hf.register()
    try:
        sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
                 "num_key_value_heads": 2, "vocab_size": 97, "max_position_embeddings": 64}  # fmt: skip
        if kind == "Mistral":
            sizes["sliding_window"] = 6
        if kind == "DeepseekV3":  # keys of another width than values
            sizes |= {"num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 8,
                      "qk_nope_head_dim": 8, "v_head_dim": 12, "first_k_dense_replace": 2}  # fmt: skip
        config = getattr(transformers, f"{kind}Config")(**sizes)
        torch.manual_seed(0)
        model = getattr(transformers, f"{kind}ForCausalLM")(config).double().eval()
        found = []
        for name in ("sdpa", NAME):
            model.config._attn_implementation = name
            found.append([model(tokens()).logits, model(tokens(), attention_mask=_PADDED.long()).logits[_PADDED]])
        torch.testing.assert_close(found[1], found[0], rtol=1e-6, atol=1e-6)
    finally:
        if hasattr(transformers, "monkey_patching"):
            transformers.monkey_patching.clear_patch_mapping()
