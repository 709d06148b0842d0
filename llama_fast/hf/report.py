"""What runs in each layer of a patched model, in words."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from torch import nn

import llama_fast
from llama_fast.hf import layout
from llama_fast.hf.attention import NAME
from llama_fast.hf.causal_lm import ForCausalLM, head_objection, loss_objection
from llama_fast.hf.layers import (
    MLP,
    Attention,
    DecoderLayer,
    activation_objection,
    head_norms,
    is_ours,
    norm_objection,
    projections,
    runs,
    structure_objection,
)
from llama_fast.projections import addition, is_a, linear_objection


def report(model: nn.Module) -> str:
    """Says layer by layer what runs and why.

    Args:
        model: a model, patched or not.

    Returns:
        One line a layer, equal neighbours together: "block" where all of it is one function; else what stands against
        that, and what of its parts runs on llama_fast and what is transformers' own. What the last call ran is told
        where it differs from that: a mask or a cache can stand against the block in one call.

    Raises:
        ValueError: there is no decoder layer of LLaMA, Mistral, Qwen2 or Qwen3 in the model.
    """
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, layout.LAYERS)]
    if not layers:
        raise ValueError(f"hf.report: {type(model).__name__} has no {layout.LAYER_NAMES}")
    lines = [f"llama_fast {llama_fast.__version__}, transformers {layout.VERSION}"]
    for text, group in itertools.groupby(((name, _layer(m)) for name, m in layers), key=lambda pair: pair[1]):
        names = [name for name, _ in group]
        lines.append(f"{names[0]}{f' to {names[-1]}' if len(names) > 1 else ''}: {text}")
    for name, m in model.named_modules():
        if isinstance(m, layout.CAUSAL_LMS):
            where = name or type(m).__name__
            against = head_objection(m) if runs(m, ForCausalLM) else "not patched"
            what = "llama_fast" if against is None else f"transformers' ({against})"
            lines.append(f"{where}, lm_head: {what}")
            against = loss_objection(m)
            what = "fused, without logits" if against is None else f"transformers', on the logits ({against})"
            if against == "lm_head has a DTensor for a weight":
                what = "fused, without logits, in a call that finds the weight of lm_head, now in shards, whole"
            lines.append(f"{where}, loss of labels: {what}")
    return "\n".join(lines)


def _layer(layer: Any) -> str:
    if not runs(layer, DecoderLayer):
        return f"transformers' own ({type(layer).__name__}, not patched)"
    against = structure_objection(layer)
    state = layer._llama_fast
    block = f"block, {state.policy}"
    if against is not None and _in_shards(layer):
        last = block if state.last == "block" else state.last and f"ops, for {state.last}"
        return f"its weights are in shards, what runs depends on what a call finds; last call: {last or 'none yet'}"
    if against is None and (adapted := [name for name, p in projections(layer) if addition(p) is not None]):
        block += f", LoRA of {', '.join(adapted)}"
    text = block if against is None else f"ops, for {against}: " + "; ".join(_parts(layer))
    if against is None and state.last not in (None, "block"):
        text += f"; last call: ops, for {state.last}"
    return text


def _in_shards(module: nn.Module) -> bool:
    """Whether weights are DTensors: FSDP2 makes them whole for the time of a call."""
    return any(type(p).__name__ == "DTensor" for p in module.parameters())


def _parts(layer: Any) -> Iterator[str]:
    """What runs on llama_fast, then what does not."""
    attn, mlp = layer.self_attn, layer.mlp
    fast: list[str] = []
    slow: list[str] = []
    norms = {name: getattr(layer, name) for name in ("input_layernorm", "post_attention_layernorm")}
    if is_ours(attn, Attention):
        norms |= {name: getattr(attn, name) for name in head_norms(attn)}
    for name, norm in norms.items():
        found = norm_objection(norm)
        (slow if found else fast).append(f"{name} {found}" if found else "rms_norm")
    if not is_ours(attn, Attention):
        slow.append(f"self_attn {is_a(attn)}")
    else:
        fast.append("rope")
        if attn.config._attn_implementation != NAME:
            slow.append(f"attention is {attn.config._attn_implementation}")
        elif attn.attention_dropout and layer.training:
            slow.append(f"attention is sdpa, for its dropout of {attn.attention_dropout:g}")
        else:
            fast.append("attention")
    found = activation_objection(mlp)
    (slow if found else fast).append(f"mlp {found}" if found else "swiglu")
    for part, names in ((attn, ("q_proj", "k_proj", "v_proj", "o_proj")), (mlp, ("gate_proj", "up_proj", "down_proj"))):
        if is_ours(part, Attention) or is_ours(part, MLP):
            for name in names:
                found = linear_objection(getattr(part, name))
                (slow if found else fast).append(f"{name} {found}" if found else name)
    yield "llama_fast: " + (", ".join(dict.fromkeys(fast)) or "nothing")
    yield "transformers: " + (", ".join(slow) or "nothing")
