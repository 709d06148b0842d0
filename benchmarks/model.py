"""The block, the training step and the decode beside transformers': the same weights, the same tokens, one process.

Peers need the extra `bench` (transformers). Each scenario gives its providers as functions to time in turn.

Legend: B batch, T tokens, C width, F ffn width, H heads.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from llama_fast.config import LlamaConfig, rope_cos_sin
from llama_fast.model import Llama
from llama_fast.nn import TransformerBlock

from .harness import kept_bytes

# hidden 768, ffn 2048, 6 layers, 12 heads, vocabulary 32000: 92 M parameters with both embeddings
SMALL = LlamaConfig(768, 6, 12, 12, 2048, 32000, 2048)
BATCH, SEQUENCE = 2, 1024
PROMPT, NEW_TOKENS = 16, 64
BLOCK_C, BLOCK_H, BLOCK_F, BLOCK_T = 2048, 16, 5504, 1024


@dataclass(frozen=True)
class Scenario:
    """Work that several providers do alike.

    Args:
        name: as in floors.toml.
        build: makes the providers: name -> a function that does the work once.
        tokens: that one run handles.
        flops: of one run, by `LlamaConfig.flops_per_token`; 0 where that is not the limit.
        memory: "memory vs <peer>" -> how many times less memory ours needs; None where that is not measured.
    """

    name: str
    build: Callable[[], dict[str, Callable[[], Any]]]
    tokens: int
    flops: int = 0
    memory: Callable[[], dict[str, float]] | None = None


def _transformers_config(c: LlamaConfig) -> Any:
    from transformers import LlamaConfig as TheirConfig

    return TheirConfig(
        hidden_size=c.dim,
        intermediate_size=c.ffn_dim,
        num_hidden_layers=c.n_layers,
        num_attention_heads=c.n_heads,
        num_key_value_heads=c.n_kv_heads,
        vocab_size=c.vocab_size,
        max_position_embeddings=c.max_seq_len,
        rms_norm_eps=c.norm_eps,
        attn_implementation="sdpa",
        pad_token_id=0,
    )


def _transformers_model(c: LlamaConfig, ours: Llama) -> Any:
    from transformers import LlamaForCausalLM

    theirs = LlamaForCausalLM(_transformers_config(c)).to(ours.lm_head.weight.dtype)
    renamed = {n if n.startswith("lm_head") else f"model.{n}": p for n, p in ours.state_dict().items()}
    theirs.load_state_dict(renamed)
    return theirs


def _both_passes(
    layer: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor, parameters: list[Tensor]
) -> Callable[[], None]:
    def call() -> None:
        torch.autograd.grad(layer(x), [x, *parameters], dy)

    return call


# a layer, its parameters, and its rotary tables, which all layers of a model share
_Layer = tuple[Callable[[Tensor], Tensor], list[Tensor], tuple[Tensor, ...]]


def _block_layers(dtype: torch.dtype) -> tuple[Tensor, Tensor, dict[str, _Layer]]:
    """x, dy and the layers."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    config = LlamaConfig(BLOCK_C, 1, BLOCK_H, BLOCK_H, BLOCK_F, 32, BLOCK_T)
    ours = TransformerBlock(BLOCK_C, BLOCK_H, BLOCK_F, dtype=dtype)
    theirs = LlamaDecoderLayer(_transformers_config(config), layer_idx=0).to(dtype)
    theirs.load_state_dict(ours.state_dict())
    cos, sin = rope_cos_sin(config, BLOCK_T)
    doubled = tuple(torch.cat((t, t), dim=-1).unsqueeze(0).to(dtype) for t in (cos, sin))
    x = torch.randn(1, BLOCK_T, BLOCK_C).to(dtype).requires_grad_()
    dy = torch.randn(1, BLOCK_T, BLOCK_C).to(dtype)

    def their_forward(x: Tensor) -> Tensor:
        y = theirs(x, attention_mask=None, position_embeddings=doubled)
        return y[0] if isinstance(y, tuple) else y

    layers: dict[str, _Layer] = {
        "llama_fast": (lambda x: ours(x, cos, sin), list(ours.parameters()), (cos, sin)),
        "transformers": (their_forward, list(theirs.parameters()), doubled),
    }
    return x, dy, layers


def block(dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    """One block, forward and backward, beside transformers' LlamaDecoderLayer."""
    x, dy, layers = _block_layers(dtype)
    return {name: _both_passes(layer, x, dy, parameters) for name, (layer, parameters, _) in layers.items()}


def block_memory(dtype: torch.dtype) -> dict[str, float]:
    """How many times fewer bytes one block keeps between forward and backward."""
    x, _, layers = _block_layers(dtype)
    kept = {name: kept_bytes(partial(layer, x), [*own, *shared]) for name, (layer, own, shared) in layers.items()}
    return {"memory vs transformers": kept["transformers"] / kept["llama_fast"]}


def _step(model: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def training_step(dtype: torch.dtype, compiled: bool = False) -> dict[str, Callable[[], Any]]:
    """Loss, backward and AdamW of the 92 M model on 2 x 1024 tokens, beside transformers' (and its torch.compile)."""
    ours = Llama(SMALL, dtype=dtype)
    theirs = _transformers_model(SMALL, ours)
    tokens = torch.randint(SMALL.vocab_size, (BATCH, SEQUENCE + 1))
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def their_step(model: Any) -> Callable[[], None]:
        return _step(model, lambda: model(input_ids=inputs, labels=inputs, shift_labels=targets, use_cache=False).loss)

    providers = {"llama_fast": _step(ours, lambda: ours.loss(inputs, targets))}
    if compiled:
        providers["torch.compile"] = their_step(torch.compile(copy.deepcopy(theirs)))
    providers["transformers"] = their_step(theirs)
    return providers


def decode(dtype: torch.dtype) -> dict[str, Callable[[], Any]]:
    """64 greedy tokens after a prompt of 16, batch 1, beside transformers' generate."""
    ours = Llama(SMALL, dtype=dtype).requires_grad_(False)
    theirs = _transformers_model(SMALL, ours)
    prompt = torch.randint(1, SMALL.vocab_size, (1, PROMPT))
    arguments = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
    return {
        "llama_fast": lambda: ours.generate(prompt, max_new_tokens=NEW_TOKENS),
        "transformers": lambda: theirs.generate(prompt, attention_mask=torch.ones_like(prompt), **arguments),
    }


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def scenarios() -> list[Scenario]:
    """All of them, in float32 and bfloat16."""
    block_flops = BLOCK_T * LlamaConfig(BLOCK_C, 1, BLOCK_H, BLOCK_H, BLOCK_F, 1, BLOCK_T).flops_per_token(BLOCK_T)
    step_tokens = BATCH * SEQUENCE
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        found += [
            Scenario(
                f"block {_name(dtype)}",
                lambda d=dtype: block(d),  # type: ignore[misc]
                BLOCK_T,
                block_flops,
                lambda d=dtype: block_memory(d),  # type: ignore[misc]
            ),
            Scenario(
                f"training_step {_name(dtype)}",
                lambda d=dtype: training_step(d, compiled=True),  # type: ignore[misc]
                step_tokens,
                step_tokens * SMALL.flops_per_token(SEQUENCE),
            ),
            Scenario(f"decode {_name(dtype)}", lambda d=dtype: decode(d), NEW_TOKENS),  # type: ignore[misc]
        ]
    return found
