"""The transformers that is installed, and whether its LLaMA is laid out as this package expects.

Known are 4.53 to 4.57 and 5.x. What differs among them is read from the code that is there: the name of the cache
argument, whether a layer gives a tuple. Anything unknown raises, with what was found.
"""

from __future__ import annotations

import inspect
from typing import Any

from llama_fast.ops.dispatch import NotSupported

try:
    import transformers
    from transformers.models.llama import modeling_llama as stock
except ImportError as error:
    raise ImportError(f"llama_fast.hf needs transformers: pip install 'llama_fast[hf]' ({error})") from error

OLDEST, BELOW = (4, 53), (6, 0)
_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
CACHES = ("cache", "past_key_values", "past_key_value")


def _parameters(function: Any) -> tuple[str, ...]:
    """Names of the parameters of a method, self aside, looking through decorators."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return tuple(name for name, p in inspect.signature(function).parameters.items() if p.kind in kinds)[1:]


def _check() -> None:
    found = f"transformers {transformers.__version__} is installed"
    try:
        version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    except ValueError:
        raise NotSupported(f"hf: {found}, expected a version number") from None
    if not OLDEST <= version < BELOW:
        low, high = (".".join(map(str, v)) for v in (OLDEST, BELOW))
        raise NotSupported(f"hf: {found}, expected at least {low} and below {high}")
    for name, needed in (
        ("LlamaRMSNorm", {"hidden_states"}),
        ("LlamaMLP", {"x"}),
        ("LlamaAttention", {"hidden_states", "position_embeddings", "attention_mask"}),
        ("LlamaDecoderLayer", {"hidden_states", "position_embeddings", "attention_mask"}),
        ("LlamaForCausalLM", {"input_ids", "labels", "logits_to_keep"}),
    ):
        there = getattr(stock, name, None)
        if there is None:
            raise NotSupported(f"hf: {found}, and modeling_llama has no {name}")
        if there.__module__ != stock.__name__:
            raise NotSupported(f"hf: modeling_llama.{name} is {there.__module__}'s, expected transformers' own")
        parameters = _parameters(there.forward)
        if not needed <= set(parameters):
            raise NotSupported(
                f"hf: {found}, and {name}.forward takes {parameters}, expected {sorted(needed)} among them"
            )
        if name in ("LlamaAttention", "LlamaDecoderLayer") and not set(CACHES) & set(parameters):
            raise NotSupported(
                f"hf: {found}, and {name}.forward takes {parameters}, expected one of {CACHES} among them"
            )


_check()
VERSION: str = transformers.__version__
LAYER_PARAMETERS = _parameters(stock.LlamaDecoderLayer.forward)
ATTENTION_PARAMETERS = _parameters(stock.LlamaAttention.forward)
MODEL_PARAMETERS = _parameters(stock.LlamaForCausalLM.forward)
CACHE = next(name for name in CACHES if name in LAYER_PARAMETERS)
MODEL_CACHE = next(name for name in CACHES if name in MODEL_PARAMETERS)
GIVES_TUPLE = "output_attentions" in LAYER_PARAMETERS  # a layer: (hidden_states,) or (hidden_states, weights)
POSITIONS_TO_CACHE = "cache_position" in ATTENTION_PARAMETERS  # a cache's update wants them
# update(..., kwargs=kwargs): a paged cache reads and changes the arguments of the call
ARGUMENTS_TO_CACHE = ("kwargs",) in inspect.unwrap(stock.LlamaAttention.forward).__code__.co_consts


def check_layer(name: str, layer: Any) -> None:
    """A decoder layer has the submodules that this package knows.

    Raises:
        NotSupported: it has others.
    """
    found = {n for n, _ in layer.named_children()}
    if found != _LAYER:
        raise NotSupported(
            f"hf: {name} of transformers {VERSION} has the submodules {sorted(found)}, expected {sorted(_LAYER)}"
        )
