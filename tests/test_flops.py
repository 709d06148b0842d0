"""torch.utils.flop_counter counts the products of the ops, and no more than these."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import llama_fast as lf

D, H, G = 16, 4, 2
PAIR = 4 * H * D  # operations of one query and key: their score, and its share of the output


def _counted(function: Any) -> int:
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


def _qkv(*lead: int, **options: Any) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(torch.randn(*lead, heads, D, **options) for heads in (H, G, G))  # type: ignore[return-value]


def test_a_training_step_of_the_model_is_six_operations_a_weight_and_token_and_the_attention() -> None:
    config = lf.LlamaConfig.preset("tiny")
    model = lf.Llama(config)
    tokens = torch.randint(config.vocab_size, (2, 33))
    embedding = config.vocab_size * config.dim
    weights = sum(p.numel() for p in model.parameters() if p.ndim == 2) - embedding
    pairs = config.n_layers * 2 * 32 * 33 // 2
    expected = 6 * 64 * weights + 14 * config.dim * pairs  # 4 forward, 10 in the backward, which makes the scores again
    assert _counted(lambda: model.loss(tokens[:, :-1], tokens[:, 1:]).backward()) == expected


@pytest.mark.parametrize(("options", "pairs"), [({}, 45), ({"causal": False}, 81), ({"window": 2}, 17)])
def test_attention_counts_the_pairs_that_see_each_other(options: dict[str, Any], pairs: int) -> None:
    q, k, v = _qkv(1, 9)
    assert _counted(lambda: lf.attention(q, k, v, **options)) == PAIR * pairs


def test_packed_sequences_count_each_by_itself() -> None:
    q, k, v = (x.requires_grad_() for x in _qkv(9))
    bounds = torch.tensor([0, 4, 4, 9], dtype=torch.int32)
    expected = PAIR * (10 + 15)
    assert _counted(lambda: lf.attention(q, k, v, cu_seqlens=bounds)) == expected
    assert _counted(lambda: lf.attention(q, k, v, cu_seqlens=bounds).sum().backward()) == expected * 7 // 2


def test_of_fake_packed_sequences_the_bounds_are_not_read() -> None:
    with FakeTensorMode():
        q, k, v = _qkv(9)
        bounds = torch.zeros(3, dtype=torch.int32)
        assert _counted(lambda: lf.attention(q, k, v, cu_seqlens=bounds)) == PAIR * 45


@pytest.mark.parametrize(("hidden", "weight", "products"), [(0, 0, 1), (1, 0, 2), (0, 1, 2), (1, 1, 3)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_cross_entropy_counts_the_gradients_that_are_wanted(
    hidden: int, weight: int, products: int, reduction: str
) -> None:
    R, C, V = 6, 8, 24
    h, w = torch.randn(R, C, requires_grad=bool(hidden)), torch.randn(V, C, requires_grad=bool(weight))
    targets = torch.randint(V, (R,))

    def step() -> None:
        loss = lf.linear_cross_entropy(h, w, targets, reduction=reduction).sum()
        if products > 1:
            loss.backward()

    again = int(reduction == "none" and products > 1)  # the logits are made again in the backward
    assert _counted(step) == 2 * R * C * V * (products + again)


def test_memory_bound_ops_count_as_nothing() -> None:
    x = torch.randn(4, 16, requires_grad=True)
    assert _counted(lambda: lf.swiglu(lf.rms_norm(x, torch.ones(16)), x).sum().backward()) == 0
