"""transformers' decoder layers, of LLaMA and the architectures like it, with llama_fast's kernels inside.

`derive` makes of each of transformers' classes one of the same name, in this module, whose forward is that of a part
below. It adds no state that a checkpoint sees, and can be put on an existing module by assigning its `__class__`:
parameters, names, hooks and everything else stay as they are. What runs is decided at each call: the whole block where
nothing stands against it, else the ops one by one, each where it fits. A forward that someone has wrapped (accelerate
does) outlives `unpatch` and is then that of the module's class.

Legend: B batch, T tokens, C width, H query heads, G key/value heads, D head dim.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.cache_utils import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llama_fast.block import BlockOptions, Weights, transformer_block
from llama_fast.hf import layout
from llama_fast.hf.attention import NAME, attention_forward, kernel_objection, objection, seen
from llama_fast.hf.layout import stock
from llama_fast.low_rank import LINEAR, LowRank, tensors
from llama_fast.ops.dispatch import autocast_dtype
from llama_fast.ops.rms_norm import add_rms_norm, rms_norm
from llama_fast.ops.rope import rope
from llama_fast.ops.swiglu import swiglu
from llama_fast.projections import (
    adapters_objection,
    addition,
    base,
    cast_once,
    is_a,
    plain_tensors,
    project,
    projection_objection,
    watched,
)

_apply_rotary = stock.apply_rotary_pos_emb
# Projection -> its weight in the block
_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_WEIGHTS = dict(zip(_PROJECTIONS, LINEAR, strict=True))
_SILU = (nn.SiLU, type(ACT2FN["silu"]))


# ---- what stands against an op or the block --------------------------------------------------------------------------
def is_ours(module: Any, part: Any) -> bool:
    """Whether a module's class is one that `derive` made with this part, and none that derives from it."""
    return vars(type(module)).get("_part") is part


def runs(module: Any, part: Any) -> bool:
    """Whether a module's class is one that `derive` made with this part, or the one that FSDP2 derives from that."""
    found = type(module)
    of_fsdp = found.__module__.startswith("torch.distributed.")
    return is_ours(module, part) or (of_fsdp and any(vars(base).get("_part") is part for base in found.__bases__))


def norm_objection(norm: Any, x: Tensor | None = None) -> str | None:
    """Why a norm does not run on lf.rms_norm, or None; without `x`, what its structure says."""
    if not is_ours(norm, RMSNorm):
        return is_a(norm)
    if not plain_tensors(norm.weight):
        return f"has a {type(norm.weight).__name__} for a weight"
    if x is not None and x.dtype != norm.weight.dtype:
        return f"has a {norm.weight.dtype} weight beside {x.dtype}"
    return None


def activation_objection(mlp: Any) -> str | None:
    """Why a feed-forward layer does not run on lf.swiglu, or None."""
    if not is_ours(mlp, MLP):
        return is_a(mlp)
    if type(mlp.act_fn) not in _SILU:
        return f"has the activation {type(mlp.act_fn).__name__}"
    found = watched(mlp.act_fn)
    return found and f"has {found} on its activation"


def projections(layer: Any) -> list[tuple[str, Any]]:
    """The projections of a layer by name, in the order of `_WEIGHTS`."""
    a, m = layer.self_attn, layer.mlp
    of = (a, a, a, a, m, m, m)
    return [(name, getattr(part, name)) for name, part in zip(_WEIGHTS, of, strict=True)]


def head_norms(attn: Any) -> tuple[str, ...]:
    """The norms of queries and keys that an attention layer has, by name."""
    return ("q_norm", "k_norm") if attn._norms_heads else ()


def structure_objection(layer: Any) -> str | None:
    """What in a layer, whatever the call, keeps it from running as one block; None if nothing."""
    attn, mlp = layer.self_attn, layer.mlp
    if not is_ours(attn, Attention):
        return f"self_attn {is_a(attn)}"
    if found := activation_objection(mlp):
        return f"mlp {found}"
    norms = {name: getattr(layer, name) for name in ("input_layernorm", "post_attention_layernorm")}
    norms |= {name: getattr(attn, name) for name in head_norms(attn)}
    for name, norm in norms.items():
        if found := norm_objection(norm):
            return f"{name} {found}"
    for name, module in {"self_attn": attn, "mlp": mlp, **norms}.items():
        if found := watched(module):
            return f"{name} has {found}"
    for name, projection in projections(layer):
        if found := projection_objection(projection):
            return f"{name} {found}"
        if base(projection).bias is not None and name not in ("q_proj", "k_proj", "v_proj"):
            return f"{name} has a bias"
    if len({norm.variance_epsilon for norm in norms.values()}) > 1:
        return "the norms differ in epsilon"
    if not getattr(attn, "is_causal", True):
        return "self_attn is not causal"
    if attn.scaling != attn.head_dim**-0.5:
        return f"self_attn has a scaling of {attn.scaling:g}"
    if attn.attention_dropout and layer.training:
        return f"attention dropout of {attn.attention_dropout:g}"
    if attn.config._attn_implementation != NAME:
        return f"the attention implementation is {attn.config._attn_implementation}"
    if not layer._llama_fast.fit(attn.head_dim, layer.input_layernorm.variance_epsilon):
        return "a head dim or epsilon that was changed, which a compiled block cannot take in"
    return None


def call_objection(
    layer: Any, w: Weights, added: dict[str, LowRank], x: Tensor, arguments: dict[str, Any]
) -> str | None:
    """What in a call keeps a layer from running as one block; None if nothing."""
    attn = layer.self_attn
    attention_mask, cache = arguments.get("attention_mask"), arguments.get(layout.CACHE)
    if against := objection(attention_mask, 0.0, arguments):
        return against
    if arguments.get("is_causal") is False:
        return "is_causal is False"
    if arguments.get("output_attentions", getattr(attn.config, "output_attentions", False)):
        return "the attention weights are asked for"
    if x.ndim != 3 or not plain_tensors(x):
        return f"hidden states that are a {type(x).__name__} of shape {tuple(x.shape)}"
    if any(p.device != x.device or p.dtype != x.dtype for p in w.given()):
        return f"weights that are not all on {x.device} and {x.dtype}"
    if added and (found := adapters_objection(added, x, records(x, w, added))):
        return found
    autocast = autocast_dtype(x)
    if autocast is not None and x.dtype != torch.float64:
        if x.dtype not in (torch.float32, autocast):
            return f"autocast beside hidden states of {x.dtype}"
        if x.dtype == torch.float32 and not records(x, w, added):
            return "autocast without gradients: it keeps the weights that it has cast, the block would cast them again"
    tables = arguments.get("position_embeddings")
    if tables is None:
        return "no rotary tables are given"
    if torch.is_grad_enabled() and any(t.requires_grad for t in tables):
        return "rotary tables that need gradients"
    if cache is not None and attention_mask is not None and attention_mask.dtype == torch.int32:
        return "packed sequences beside a cache"
    if cache is not None and torch.is_grad_enabled():
        plain = type(cache) is DynamicCache and not getattr(cache, "offloading", False)
        if not plain and records(x, w, added):
            return f"a {type(cache).__name__} while gradients are recorded"
        if cache.get_seq_length(attn.layer_idx) != 0:  # keys that need gradients, it may be, if nothing else does
            return "a cache that holds keys while gradients are recorded"
    return None


def records(x: Tensor, w: Weights, added: dict[str, LowRank]) -> bool:
    """Whether gradients are recorded through a layer."""
    return torch.is_grad_enabled() and any(p.requires_grad for p in (x, *w.given(), *tensors(added)))


def block_weights(layer: Any) -> tuple[Weights, dict[str, LowRank]]:
    """The parameters of a layer as the block function takes them, and what adapters add to its products."""
    a = layer.self_attn
    found = [(_WEIGHTS[name], projection) for name, projection in projections(layer)]
    q, k, v, o, gate, up, down = (base(projection) for _, projection in found)
    weights = Weights(
        layer.input_layernorm.weight,
        q.weight,
        k.weight,
        v.weight,
        o.weight,
        layer.post_attention_layernorm.weight,
        gate.weight,
        up.weight,
        down.weight,
        q.bias,
        k.bias,
        v.bias,
        *(getattr(a, name).weight for name in head_norms(a)),
    )
    return weights, {name: a for name, projection in found if (a := addition(projection)) is not None}


# ---- caches ----------------------------------------------------------------------------------------------------------
class _LayerCache:
    """One layer of a transformers cache, as the block takes it."""

    def __init__(self, cache: Any, layer: int, arguments: dict[str, Any]) -> None:
        self.cache, self.layer = cache, layer
        self.extra: tuple[Any, ...] = ()
        self.named: dict[str, Any] = {"kwargs": arguments} if layout.ARGUMENTS_TO_CACHE else {}
        if layout.POSITIONS_TO_CACHE:
            cos, sin = arguments["position_embeddings"]
            self.extra = ({"sin": sin, "cos": cos, "cache_position": arguments.get("cache_position")},)

    def append(self, k_BTGD: Tensor, v_BTGD: Tensor) -> tuple[Tensor, Tensor]:
        k, v = (t.transpose(1, 2) for t in (k_BTGD, v_BTGD))
        k, v = self.cache.update(k, v, self.layer, *self.extra, **self.named)
        return k.transpose(1, 2), v.transpose(1, 2)


def named(
    parameters: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any], cache: str = layout.CACHE
) -> dict[str, Any]:
    """All arguments of a call by name, the cache, whatever a version calls it, by the name `cache`."""
    if args:
        kwargs = {**dict(zip(parameters, args, strict=False)), **kwargs}
    for other in layout.CACHES:
        if other != cache and kwargs.get(other) is not None:
            kwargs[cache] = kwargs.pop(other)
    return kwargs


# ---- the classes -----------------------------------------------------------------------------------------------------
class State:
    """What a decoder layer remembers beside its parameters.

    Args:
        layer: the decoder layer.
        policy: what its block keeps for the backward, one of `llama_fast.block.POLICIES`.
    """

    def __init__(self, layer: Any, policy: str = "recompute-cheap") -> None:
        self.policy = policy
        self.options: Any = None  # of the block: BlockOptions, once `fit` has made them
        self.last: str | None = None  # "block", or what stood against it in the last call
        head_dim = getattr(layer.self_attn, "head_dim", None)
        eps = getattr(layer.input_layernorm, "variance_epsilon", None)
        if head_dim is not None and eps is not None:  # they are, unless an adapter stands in their place
            self.fit(head_dim, eps)

    def fit(self, head_dim: int, eps: float) -> bool:
        """Makes the options of the block where they are not of these numbers; False where torch.compile, which cannot
        trace that, keeps it from doing so."""
        if self.options is None or (self.options.head_dim, self.options.eps) != (head_dim, eps):
            if torch.compiler.is_compiling():
                return False
            self.options = BlockOptions(head_dim, eps, self.policy, keep_residual=True)
        return True


class _Recorded(type):
    """isinstance() takes the stock modules too.

    transformers notes hidden states of the instances of a class that its model class names, and puts a registered class
    in that place for good, for models too that are built without it.
    """

    def __instancecheck__(cls, instance: object) -> bool:
        return super().__instancecheck__(instance) or isinstance(instance, cls.__dict__.get("_stock", ()))


# The parts: `derive` puts the stock class behind each, whose forward is then `stock_forward`.
class RMSNorm:
    """A norm on lf.rms_norm, where the gain has the dtype of the input."""

    def fast_forward(self: Any, hidden_states: Tensor) -> Tensor:
        """x [..., C] -> [..., C]."""
        if kernel_objection() or norm_objection(self, hidden_states):
            return self.stock_forward(hidden_states)
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)


class MLP:
    """A feed-forward layer on lf.swiglu, where the activation is SiLU."""

    def fast_forward(self: Any, x: Tensor) -> Tensor:
        """x [..., C] -> [..., C]."""
        if kernel_objection() or activation_objection(self):
            return self.stock_forward(x)
        x = cast_once(x, self.gate_proj, self.up_proj)
        gate, up = project(self.gate_proj, x), project(self.up_proj, x)
        if gate.dtype != up.dtype:
            return self.down_proj(self.act_fn(gate) * up)
        return project(self.down_proj, swiglu(gate, up))


class Attention:
    """An attention layer on lf.rope and the attention function of its config.

    `_norms_heads`: its queries and keys have norms, between the projections and rotary, as Qwen3's do.
    """

    def fast_forward(self: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """x [B, T, C] -> [B, T, C] and the attention weights or None."""
        if kernel_objection():
            return self.stock_forward(*args, **kwargs)
        kwargs = named(self._parameters_of_forward, args, kwargs)
        x, mask = kwargs.pop("hidden_states"), kwargs.pop("attention_mask", None)
        cos, sin = kwargs["position_embeddings"]
        projections = (self.q_proj, self.k_proj, self.v_proj)
        x = cast_once(x, *projections)
        q, k, v = (project(p, x).unflatten(-1, (-1, self.head_dim)) for p in projections)
        if self._norms_heads:
            q, k = self.q_norm(q), self.k_norm(k)
        learned = torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad)
        if cos.ndim == 3 and q.dtype == k.dtype and not learned:
            q, k = rope(q, k, cos, sin)
        else:
            q, k = _apply_rotary(q, k, cos, sin, unsqueeze_dim=2)
        cache = kwargs.pop(layout.CACHE, None)
        if cache is not None:
            k, v = _LayerCache(cache, self.layer_idx, kwargs).append(k, v)
        kwargs.pop("position_embeddings")
        name = self.config._attn_implementation
        attend = attention_forward if name == NAME else ALL_ATTENTION_FUNCTIONS.get(name, stock.eager_attention_forward)
        out, weights = attend(
            self,
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **self._window(),
            **kwargs,
        )
        return project(self.o_proj, out.reshape(*x.shape[:-1], -1)), weights

    def _window(self: Any) -> dict[str, int | None]:
        """What others' attention functions are told of a sliding window; this package's reads it in the mask."""
        if self._window_from is None:
            return {}
        holder = self if self._window_from == "layer" else self.config
        return {"sliding_window": getattr(holder, "sliding_window", None)}


class DecoderLayer:
    """A decoder layer as one block with a hand-written backward, else by its modules.

    `_llama_fast`: the policy of the block, and in words what the last call ran.
    """

    def __init__(self: Any, config: Any, layer_idx: int) -> None:
        super().__init__(config, layer_idx)  # type: ignore[call-arg]
        self._llama_fast = State(self)

    def fast_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        """x [B, T, C] -> [B, T, C]."""
        kwargs = named(self._parameters_of_forward, args, kwargs)
        x = kwargs.pop("hidden_states")
        against, parameters = structure_objection(self), None
        if against is None:
            parameters = block_weights(self)
            against = call_objection(self, *parameters, x, kwargs)
        if not torch.compiler.is_compiling():
            self._llama_fast.last = against or "block"
        y = self._parts(x, kwargs) if parameters is None or against else self._block(*parameters, x, kwargs)
        return y if not layout.GIVES_TUPLE or isinstance(y, tuple) else (y,)

    def _block(self: Any, w: Weights, added: dict[str, LowRank], x: Tensor, arguments: dict[str, Any]) -> Tensor:
        attn = self.self_attn
        block = functools.partial(transformer_block, low_rank=added)
        options = self._llama_fast.options
        cos, sin = (t[..., : t.shape[-1] // 2].float() for t in arguments["position_embeddings"])
        cache, mask = arguments.get(layout.CACHE), seen(arguments.get("attention_mask"))
        if mask.window is not None:
            options = dataclasses.replace(options, window=mask.window)
        if mask.cu_seqlens is not None:
            B, T, C = x.shape
            cos, sin = (t.expand(B, -1, -1).reshape(1, B * T, -1) for t in (cos, sin))
            y = block(x.reshape(1, B * T, C), w, cos, sin, options, cu_seqlens=mask.cu_seqlens)
            return y.view(B, T, C)
        spans = mask.spans
        if cache is None:
            return block(x, w, cos, sin, options, spans=spans)
        held = _LayerCache(cache, attn.layer_idx, arguments)
        if not records(x, w, added):
            return block(x, w, cos, sin, options, spans=spans, cache=held)
        y, k, v = block(x, w, cos, sin, options, spans=spans, return_keys=True)
        held.append(k, v)
        return y

    def _parts(self: Any, x: Tensor, arguments: dict[str, Any]) -> Any:
        """The layer by its modules; the addition before the second norm within it, where both allow that."""
        norm = self.post_attention_layernorm
        attended, *rest = self.self_attn(hidden_states=self.input_layernorm(x), **arguments)
        if kernel_objection() or norm_objection(norm, x) or watched(norm) or attended.dtype != x.dtype:
            h = x + attended
            n2 = norm(h)
        else:
            n2, h = add_rms_norm(attended, x, norm.weight, norm.variance_epsilon)
        y = h + self.mlp(n2)
        return (y, *rest) if layout.GIVES_TUPLE and arguments.get("output_attentions") else y


def derive(theirs: Any, part: Any, module: str, **attributes: Any) -> Any:
    """The class of the same name that derives from `theirs` and has the forward of `part`; `module` holds it."""

    @functools.wraps(theirs.forward)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not issubclass(type(self), part):  # a wrapper that outlived `unpatch`
            return type(self).forward(self, *args, **kwargs)
        return self.fast_forward(*args, **kwargs)

    members = {"__module__": module, "__qualname__": theirs.__name__, "__doc__": part.__doc__, "forward": forward}
    members |= {"_part": part, "_stock": theirs, "stock_forward": theirs.forward}
    members |= {"_parameters_of_forward": layout.parameters(theirs.forward), **attributes}
    meta: Any = _Recorded if part in (Attention, DecoderLayer) else type
    ours = meta(theirs.__name__, (part, theirs), members)
    setattr(sys.modules[module], theirs.__name__, ours)
    return ours


# Where an attention layer has the window of which it tells an attention function
_WINDOW_FROM = {"Llama": None, "Mistral": "config", "Qwen2": "layer", "Qwen3": "layer"}
# made now: inside from_pretrained a registered class stands in the place of the one it derives from
REPLACEMENTS: dict[Any, Any] = {}
for _name, _stock in layout.ARCHITECTURES.items():
    for _theirs, _part in ((_stock.RMSNorm, RMSNorm), (_stock.MLP, MLP), (_stock.DecoderLayer, DecoderLayer)):
        REPLACEMENTS[_theirs] = derive(_theirs, _part, __name__)
    REPLACEMENTS[_stock.Attention] = derive(
        _stock.Attention, Attention, __name__, _window_from=_WINDOW_FROM[_name], _norms_heads=_name == "Qwen3"
    )
