"""transformers' models made fast in place: `lf.hf.patch(model)`, `unpatch`, `report`, `register`.

LLaMA, Mistral, Qwen2 and Qwen3.

Needs transformers 4.53 to 4.57 or 5.x (`pip install 'llama_fast[hf]'`). What keeps working, and what runs when:
docs/hf.md.
"""

from __future__ import annotations

import sys
import warnings
from types import MethodType
from typing import Any

from torch import nn
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llama_fast.block import POLICIES
from llama_fast.hf import layout
from llama_fast.hf.attention import NAME, attention_forward, mask
from llama_fast.hf.causal_lm import FUSED, HEAD_REPLACEMENTS, ForCausalLM
from llama_fast.hf.layers import REPLACEMENTS, Attention, DecoderLayer, State, is_ours, runs
from llama_fast.hf.report import report
from llama_fast.projections import is_forward_of

__all__ = ["patch", "register", "report", "unpatch"]

_ALL = {**REPLACEMENTS, **HEAD_REPLACEMENTS}
_STOCK = {ours: theirs for theirs, ours in _ALL.items()}


def patch(model: nn.Module, *, policy: str = "recompute-cheap", fused_loss: bool | str = False) -> nn.Module:
    """Makes the decoder layers of a transformers model run on llama_fast, in place.

    Parameters, names, hooks, checkpoints and the interface stay as they are. Each layer decides at each call what runs:
    the whole block, or the ops one by one where something stands against it; `report` says which and why.

    Args:
        model: any module with decoder layers of LLaMA, Mistral, Qwen2 or Qwen3 in it: LlamaForCausalLM, MistralModel, a
            PEFT model around one.
        policy: what each block keeps for the backward: "save", "recompute-cheap", "recompute-linear" or
            "recompute-all" (block.py).
        fused_loss: True: a LlamaForCausalLM, or its like, that is given labels computes its loss without making the
            logits, and gives None for them; "training": only in training mode; False: logits and loss are transformers'
            own.

    Returns:
        `model` itself.

    Raises:
        ValueError: an option is not one of those, or the model is no module, or has no decoder layer that can be
            patched, or with `fused_loss` no LlamaForCausalLM or its like.
        NotSupported: the version of transformers or the layout of its layers is unknown.
    """
    if policy not in POLICIES:
        raise ValueError(f"hf.patch: policy is {policy!r}, expected one of {', '.join(POLICIES)}")
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"hf.patch: model is a {type(model).__name__}, expected a module with a {layout.LAYER_NAMES} in it"
        )
    if fused_loss not in FUSED:
        raise ValueError(f"hf.patch: fused_loss is {fused_loss!r}, expected True, False or 'training'")
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, layout.LAYERS)]
    for name, layer in layers:
        layout.check_layer(name, layer)
    takable = [layer for _, layer in layers if runs(layer, DecoderLayer) or _can_swap(layer)]
    if not takable:
        raise ValueError(f"hf.patch: {_nothing_to_patch(model, layers)}")
    heads = [m for m in model.modules() if isinstance(m, layout.CAUSAL_LMS)]
    if fused_loss and not any(runs(m, ForCausalLM) or _can_swap(m) for m in heads):
        found = "one whose class or forward was replaced" if heads else "none"
        expected = " or ".join(kind.__name__ for kind in layout.CAUSAL_LMS)
        raise ValueError(f"hf.patch: fused_loss is {fused_loss!r}, expected a {expected} for it, found {found}")
    _register_attention()
    modules: list[Any] = list(model.modules())
    for module in modules:
        if type(module) in _ALL and _can_swap(module):
            _swap(module, _ALL[type(module)])
        if runs(module, DecoderLayer):
            module._llama_fast = State(module, policy)
        if runs(module, ForCausalLM):
            module._llama_fast_loss = fused_loss
    _switch_attention([m for m in modules if is_ours(m, Attention)])
    return model


def unpatch(model: nn.Module) -> nn.Module:
    """Takes back what `patch` did: classes, attention implementation and attributes are as before.

    Args:
        model: a patched model.

    Returns:
        `model` itself.

    Raises:
        ValueError: nothing in it is patched, or a patched module has another class since: fully_shard and
            parametrizations derive one.
    """
    for name, m in model.named_modules():
        if type(m) not in _STOCK and issubclass(type(m), tuple(_STOCK)):
            raise ValueError(
                f"hf.unpatch: {name or 'the model'} is a {type(m).__name__}, expected the class that patch gave it; a "
                "model that was sharded or parametrized since cannot be taken back"
            )
    ours: list[Any] = [m for m in model.modules() if type(m) in _STOCK]
    if not ours:
        raise ValueError(f"hf.unpatch: {type(model).__name__} has no patched module, expected a model after hf.patch")
    for module in ours:
        before = module.__dict__.pop("_llama_fast_before", None)
        if before is not None and module.config._attn_implementation == NAME:
            module.config._attn_implementation = before
        module.__dict__.pop("_llama_fast", None)
        module.__dict__.pop("_llama_fast_loss", None)
        _swap(module, _STOCK[type(module)])
    return model


def register() -> None:
    """Makes llama_fast known to transformers: what `from_pretrained` builds from here on can be fast from the start.

    - `attn_implementation="llama_fast"`, with its mask function, for any model of transformers that takes attention
      functions; `from_pretrained(..., attn_implementation="llama_fast")`.
    - Where transformers has a registry of class replacements (5.x from `transformers.monkey_patching` on), its
      decoder layers too: what `from_pretrained` and `from_config` build are this package's layers, which run as one
      block where the attention implementation is "llama_fast". Elsewhere `patch` does that for a model. Some versions
      of that registry fail where an optional package is missing, torchvision for one; then a warning says so, and the
      layers are not registered.

    May be called more than once.
    """
    _register_attention()
    try:
        from transformers import monkey_patching
    except ImportError:
        return
    # anchored: the keys are searched for in the names of all classes
    mapping = {f"^{theirs.__name__}$": ours for theirs, ours in REPLACEMENTS.items()}
    monkey_patching.register_patch_mapping(mapping, overwrite=True)
    try:
        with monkey_patching.apply_patches():
            pass
    except ImportError as error:
        monkey_patching.unregister_patch_mapping(list(mapping))
        _put_back()
        warnings.warn(
            f"the registry of class replacements of transformers {layout.VERSION} fails here ({error}): "
            "from_pretrained gives stock layers, use lf.hf.patch",
            stacklevel=2,
        )


def _put_back() -> None:
    """Puts the stock classes back where an attempt to replace them stopped half-way."""
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "transformers":
            for theirs, ours in REPLACEMENTS.items():
                if module.__dict__.get(theirs.__name__) is ours:
                    setattr(module, theirs.__name__, theirs)


def _register_attention() -> None:
    ALL_ATTENTION_FUNCTIONS.register(NAME, attention_forward)
    ALL_MASK_ATTENTION_FUNCTIONS.register(NAME, mask)


def _switch_attention(modules: list[Any]) -> None:
    """Sets the configs of attention layers to this package's attention, and notes in each layer what was set before."""
    for module in modules:
        if module.config._attn_implementation != NAME:
            module._llama_fast_before = module.config._attn_implementation
    for module in modules:
        module.config._attn_implementation = NAME


def _can_swap(module: nn.Module) -> bool:
    """Of a class that is known exactly, and its forward its class's or, by accelerate, wrapped around its class's."""
    kind, own = type(module), module.__dict__
    if kind not in _ALL:
        return False
    return (
        "forward" not in own
        or is_forward_of(own["forward"], module, kind)
        or is_forward_of(own.get("_old_forward"), module, kind)
    )


def _swap(module: nn.Module, kind: Any) -> None:
    before, own = type(module), module.__dict__
    module.__class__ = kind
    if is_forward_of(own.get("forward"), module, before):
        del own["forward"]
    if is_forward_of(own.get("_old_forward"), module, before):
        own["_old_forward"] = MethodType(kind.forward, module)


def _nothing_to_patch(model: nn.Module, layers: list[tuple[str, nn.Module]]) -> str:
    if not layers:
        kinds = sorted({type(m).__name__ for m in model.modules()})
        left_out = "".join(f"; {name} is left out: {why}" for name, why in layout.LEFT_OUT.items())
        return f"{type(model).__name__} has no {layout.LAYER_NAMES}, only {', '.join(kinds)}{left_out}"
    name, layer = layers[0]
    kind = type(layer)
    if kind in layout.LAYERS:
        return f"the forward of {name} was replaced, expected {kind.__name__}'s own"
    expected = next(stock.__name__ for stock in layout.LAYERS if isinstance(layer, stock))
    return (
        f"{name} is a {kind.__module__}.{kind.__name__}, expected {expected} itself; a model that is to be "
        "sharded is patched before fully_shard"
    )
