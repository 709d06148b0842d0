"""A step of a decode as one native call: a token of each row through the whole model, on the CPU.

The native plan (csrc/cpu/decode.cpp) holds addresses. So each step first makes sure that everything these were read
from is still in its place: the modules, the parameters, their memory, dtype, shape and strides, and the cache. Where
something was replaced (`.to()`, `load_state_dict(assign=True)`, `functional_call`, a cache that grew), the plan is made
anew. Where something watches or changes the computation (hooks, autograd, autocast, torch.compile, a forced backend),
the ops run one by one.

Legend: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks

from llama_fast.block import Weights
from llama_fast.nn import BIASED, HEAD_NORMS, Linear, RMSNorm, TransformerBlock
from llama_fast.ops import linear, native
from llama_fast.ops.dispatch import forced, plain
from llama_fast.parallel import Single

if TYPE_CHECKING:
    from llama_fast.generate import KVCache
    from llama_fast.model import Llama

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_WEIGHTS = (
    "input_layernorm",
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "post_attention_layernorm",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)  # the modules of what each block.Weights has
_SETTINGS = ("eps", "window", "qkv_bias", "qk_norm")  # of modules within a block


def step(model: Llama, tokens: Tensor, cache: KVCache) -> Tensor | None:
    """Logits [B, V] of `tokens` [B, 1] after those of the cache, which takes in their keys and values.

    None, with nothing done, where it cannot be one native call; the ops one by one then compute it, or name what is
    wrong.
    """
    if tokens.ndim != 2 or tokens.shape[1] != 1 or not tokens.is_cpu or not plain(tokens) or _watched():
        return None
    plan = cache.plan
    if plan is None or not plan.holds(model, cache):
        plan = cache.plan = Plan.of(model, cache)
    return None if plan is None else plan.step(tokens, cache)


def _watched() -> bool:
    """Whether something must see the ops, or may change what they do."""
    return (
        torch.is_grad_enabled()
        or torch.compiler.is_compiling()
        or torch.is_autocast_enabled("cpu")
        or forced() not in (None, "cpu")
        or linear.forced() is not None
        or torch._C._are_functorch_transforms_active()
        or global_hooks._has_any_global_hook()
    )


class _Changed(Exception):
    """The model is not made of the parts that the native call stands for."""


class Plan:
    """What a native plan was made of."""

    def __init__(self, model: Llama, cache: KVCache) -> None:
        self._model = model
        self._places: list[tuple[dict[str, Any], str, Any]] = []  # dict, key, and what stands there; None: nothing
        self._hooks: list[dict[int, Any]] = []
        self._classes: list[tuple[nn.Module, type]] = []
        self._tensors: list[Tensor] = []
        from llama_fast.generate import KVCache
        from llama_fast.model import Llama

        if type(model) is not Llama or type(cache) is not KVCache:
            raise _Changed
        self._classes.append((model, Llama))
        self._places.append((vars(model), "config", model.config))
        self._places += [(vars(model), name, None) for name in ("hidden", "rope_tables")]
        embedding = self._child(model, "embed_tokens")
        self._called(embedding, nn.Embedding)
        self._places.append((vars(embedding), "max_norm", None))  # rows that are too long would be shortened
        embed = self._weight(embedding)
        self._blocks = self._child(model, "layers")._modules
        self._layers = list(self._blocks.values())
        layers = [self._layer(layer) for layer in self._layers]
        norm, head = self._child(model, "norm"), self._child(model, "lm_head")
        self._called(norm, RMSNorm)
        self._called(head, Linear)
        self._places.append((vars(norm), "eps", norm.eps))
        tensors = (self._weight(norm), self._weight(head))
        self._cached = keys, values = cache.k_LBSGD, cache.v_LBSGD  # the cache itself would keep its memory in a cycle
        self._tensors += [keys, values]
        if len(layers) != len(keys) or any(not t.is_cpu or t.layout != torch.strided for t in self._tensors):
            raise _Changed
        self._memory = self._read()
        room = min(keys.shape[2], model.config.max_seq_len)
        self._tables = model.rope_tables(0, room, embed.device)  # held: the native plan has their addresses
        self._native = native.decode_plan(
            embed,
            *self._tables,
            [(*w, k, v, *o) for (w, o), k, v in zip(layers, keys, values, strict=True)],
            tensors[0],
            norm.eps,
            tensors[1],
        )
        if self._native is None or any(self._moved()):  # there are hooks, or a forward of the module's own
            raise _Changed
        self._logits = (model.config.vocab_size, embed.dtype)

    @classmethod
    def of(cls, model: Llama, cache: KVCache) -> Plan | None:
        """A plan for the two as they are, or None where a native call cannot stand for the model."""
        try:
            return cls(model, cache)
        except (_Changed, AttributeError, KeyError):
            return None

    def _child(self, module: nn.Module, name: str) -> Any:
        child = module._modules[name]
        self._places.append((module._modules, name, child))  # type: ignore[arg-type]
        return child

    def _weight(self, module: nn.Module, bias: Tensor | None = None) -> Tensor:
        """The weight of a module that has this bias."""
        own: Any = module._parameters
        weight = own["weight"]
        if type(weight) is not nn.Parameter or not (bias is None or type(bias) is nn.Parameter):
            raise _Changed
        self._places += [(own, "weight", weight), (own, "bias", bias)]
        self._tensors += [weight] if bias is None else [weight, bias]
        return weight

    def _called(self, module: nn.Module, expected: type) -> None:
        """Notes what would make a call of the module something else than its class's forward."""
        if type(module) is not expected:
            raise _Changed
        self._classes.append((module, expected))
        self._places += [(vars(module), name, None) for name in ("forward", "_compiled_call_impl")]
        self._hooks += [getattr(module, name) for name in _HOOKS]

    def _layer(self, layer: Any) -> tuple[Weights, tuple[float, bool, int]]:
        self._called(layer, TransformerBlock)
        options: Any = layer.options
        if type(options.collectives) is not Single or layer.change() is not None:
            raise _Changed
        self._places += [(vars(layer), "options", options), (vars(layer), "weights", None)]
        modules = {"": layer}
        for path, (owner, name, _) in layer.built().items():
            module = modules[path] = self._child(modules[owner], name)
            self._places.append((vars(module), "forward", None))
            self._places += [(vars(module), key, vars(module)[key]) for key in _SETTINGS if key in vars(module)]
            self._hooks += [getattr(module, key) for key in _HOOKS]
        biases: dict[str, Any] = {path: modules[path]._parameters["bias"] for path in BIASED}
        weights = [self._weight(modules[path], biases.get(path)) for path in _WEIGHTS]
        norms: list[Any] = [self._weight(modules[path]) if path in modules else None for path in HEAD_NORMS]
        return Weights(*weights, *biases.values(), *norms), (options.eps, options.interleaved, options.window)

    def _read(self) -> list[tuple[Any, ...]]:
        return [(t.data_ptr(), t.dtype, t.shape, t.stride()) for t in self._tensors]

    def _moved(self) -> Iterator[bool]:
        yield any(places.get(key) is not value for places, key, value in self._places)
        yield any(self._hooks)
        yield any(type(module) is not expected for module, expected in self._classes)
        yield list(self._blocks.values()) != self._layers
        yield self._read() != self._memory

    def holds(self, model: Llama, cache: KVCache) -> bool:
        """Whether all that the plan was made of is still in its place."""
        keys, values = self._cached
        there = self._model is model and cache.k_LBSGD is keys and cache.v_LBSGD is values
        return there and not any(self._moved())

    def step(self, tokens: Tensor, cache: KVCache) -> Tensor | None:
        """See the function of that name."""
        vocabulary, dtype = self._logits
        logits = tokens.new_empty(tokens.shape[0], vocabulary, dtype=dtype)
        if not self._native.step(tokens[:, 0], cache.used, cache.starts or (), logits):
            return None
        cache.used += 1
        return logits
