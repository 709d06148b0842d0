"""The projections of a layer: whether one is a plain linear layer, one with a LoRA adapter of PEFT, or neither.

A projection that is neither is called as the module that it is. PEFT is not imported: its adapters are told by the name
of their class. `kind`: the class of a plain linear layer.

Legend: C inputs, V outputs of a projection, r rank.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from llama_fast.low_rank import LowRank, tensors
from llama_fast.ops.dispatch import autocast_dtype
from llama_fast.ops.linear import linear

_RECORDER = "transformers.utils.output_capturing"  # its hooks only note what a module gave
_GLOBAL_HOOKS = (
    nn_module._global_forward_hooks,
    nn_module._global_forward_pre_hooks,
    nn_module._global_backward_hooks,
    nn_module._global_backward_pre_hooks,
)
_LORA = ("peft.tuners.lora.layer", "Linear")


# ---- what stands against using a module's weights directly ----------------------------------------------------------
def watched(module: Any) -> str | None:
    """What watches the calls of a module, so that they must be made: hooks, or a forward of its own; else None."""
    own = module.__dict__
    if "forward" in own and not is_forward_of(own["forward"], module, type(module)) and not _only_placed(module):
        return "a forward of its own"
    hooks = own["_forward_hooks"]
    if hooks and any(getattr(hook, "__module__", None) != _RECORDER for hook in hooks.values()):
        return "a hook"
    if own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]:
        return "a hook"
    return "a hook, as all modules have" if any(_GLOBAL_HOOKS) else None


def is_forward_of(function: Any, module: Any, kind: Any) -> bool:
    """Whether a function is `kind.forward`, bound to the module."""
    return getattr(function, "__func__", None) is kind.forward and function.__self__ is module


def _only_placed(module: Any) -> bool:
    """Whether accelerate stands around a module's forward for nothing but to bring its input to its device."""
    own = module.__dict__
    hook, inner = own.get("_hf_hook"), own.get("_old_forward")
    placing = (type(hook).__module__, type(hook).__name__) == ("accelerate.hooks", "AlignDevicesHook")
    return placing and not hook.offload and is_forward_of(inner, module, type(module))


def plain_tensors(*tensors: Tensor) -> bool:
    """Whether all are tensors or parameters of no other class."""
    return all([type(t) in (nn.Parameter, Tensor) for t in tensors])


def is_a(module: Any) -> str:
    """What a module is, for a sentence."""
    return f"is a {type(module).__module__.split('.')[0]} {type(module).__name__}"


def linear_objection(module: Any, kind: Any = nn.Linear) -> str | None:
    """Why a projection is called as a module, or None where its weight, and bias if it has one, are used directly."""
    if type(module) is not kind:
        return is_a(module)
    weight, bias = module.weight, module.bias
    if not plain_tensors(weight):
        return f"has a {type(weight).__name__} for a weight"
    if bias is not None and not plain_tensors(bias):
        return f"has a {type(bias).__name__} for a bias"
    found = watched(module)
    return found and f"has {found}"


def project(module: Any, x: Tensor) -> Tensor:
    """A projection of x, without a call of the module where nothing stands against that."""
    if linear_objection(module) is None and x.dtype == module.weight.dtype:
        return linear(x, module.weight, module.bias)
    return module(x)


def cast_once(x: Tensor, *projections: Any) -> Tensor:
    """The input of several projections in autocast's dtype, of which each would else make and keep a copy."""
    dtype = autocast_dtype(x)
    if dtype is not None and x.dtype == torch.float32 and not any(map(linear_objection, projections)):
        return x.to(dtype)
    return x


# ---- LoRA ------------------------------------------------------------------------------------------------------------
def is_lora(module: Any) -> bool:
    """Whether a projection is one of PEFT's linear layers with LoRA adapters."""
    return (type(module).__module__, type(module).__name__) == _LORA


def projection_objection(module: Any, kind: Any = nn.Linear) -> str | None:
    """Why a projection does not take part in a block, or None: plain layers do, and those with one LoRA adapter."""
    if type(module) is kind or not is_lora(module):
        return linear_objection(module, kind)
    if found := linear_objection(module.base_layer, kind):
        return f"has a base layer that {found}"
    if found := watched(module):
        return f"has {found}"
    if module.merged:
        return "is to be unmerged" if module.disable_adapters else None
    names = _active(module)
    if len(names) > 1:
        return f"has {len(names)} active adapters"
    return None if not names else _adapter_objection(module, names[0])


def _adapter_objection(module: Any, name: str) -> str | None:
    if name in getattr(module, "lora_variant", ()) or getattr(module, "use_dora", {}).get(name):
        return "has a variant of LoRA"
    for part in (module.lora_A[name], module.lora_B[name]):
        if found := linear_objection(part):
            return f"has an adapter that {found}"
        if part.bias is not None:
            return "has an adapter with a bias"
    dropout = module.lora_dropout[name]
    if found := watched(dropout):
        return f"has {found} on its dropout"
    if type(dropout) not in (nn.Dropout, nn.Identity):
        return f"has a dropout that {is_a(dropout)}"
    if _probability(dropout):
        if dropout.inplace:
            return "has a dropout in place"
        if torch.compiler.is_compiling():
            return f"has an adapter with a dropout of {dropout.p:g} under torch.compile"
    scale = module.scaling[name]
    if type(scale) not in (int, float):
        return f"has a {type(scale).__name__} for a scaling"
    return None if -math.inf < scale < math.inf else f"has a scaling of {scale}"


def _active(module: Any) -> list[str]:
    """The adapters that a call of the module would add to its product."""
    if module.disable_adapters:
        return []
    return [name for name in module.active_adapters if name in module.lora_A]


def _probability(dropout: Any) -> float:
    """Of a dropout, 0 where it does nothing."""
    return dropout.p if type(dropout) is nn.Dropout and dropout.training else 0.0


def base(module: Any) -> Any:
    """The linear layer of a projection that `projection_objection` lets pass."""
    return module.base_layer if is_lora(module) else module


def addition(module: Any) -> LowRank | None:
    """What its adapter adds to the product of such a projection, or None."""
    if not is_lora(module) or module.merged or not (names := _active(module)):
        return None
    name = names[0]
    a, b = module.lora_A[name].weight, module.lora_B[name].weight
    return LowRank(a, b, module.scaling[name], _probability(module.lora_dropout[name]))


def adapters_objection(added: dict[str, LowRank], x: Tensor, recording: bool) -> str | None:
    """Why the adapters of a layer do not take part in its block, whose input is x, or None."""
    found = tensors(added)
    if any(p.device != x.device for p in found):
        return f"adapters that are not all on {x.device}"
    if x.dtype != torch.float64 and any(p.dtype == torch.float64 for p in found):
        return f"adapters in torch.float64 beside {x.dtype}"
    other = any(p.dtype != x.dtype for p in found)
    if x.dtype == torch.float16 and other and autocast_dtype(x) is None and recording:
        return "adapters that are not in torch.float16, which would lose their small gradients"
    # its seed would be that of the capture for ever, which torch refuses
    if x.is_cuda and any(a.dropout for a in added.values()) and torch.cuda.is_current_stream_capturing():
        return "adapters with dropout while a CUDA graph is captured"
    return None
