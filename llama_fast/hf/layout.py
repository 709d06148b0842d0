"""The transformers that is installed, and whether its models are laid out as this package expects.

Known are 4.53 to 4.57 and 5.x. What differs among them is read from the code that is there: the name of the cache
argument, whether a layer gives a tuple. LLaMA's code must be as expected, or importing this raises with what was found;
another architecture whose code is not laid out as LLaMA's is left out, and `LEFT_OUT` says why.
"""

from __future__ import annotations

import importlib
import inspect
from typing import Any, NamedTuple

from llama_fast.ops.dispatch import NotSupported

try:
    import transformers
    from transformers.models.llama import modeling_llama as stock
except ImportError as error:
    raise ImportError(f"llama_fast.hf needs transformers: pip install 'llama_fast[hf]' ({error})") from error

OLDEST, BELOW = (4, 53), (6, 0)
NAMES = ("Llama", "Mistral", "Qwen2", "Qwen3")
CACHES = ("cache", "past_key_values", "past_key_value")
_LAYER = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}


class Architecture(NamedTuple):
    """transformers' classes of one architecture."""

    RMSNorm: Any
    MLP: Any
    Attention: Any
    DecoderLayer: Any
    ForCausalLM: Any


_FORWARDS = Architecture(
    RMSNorm={"hidden_states"},
    MLP={"x"},
    Attention={"hidden_states", "position_embeddings", "attention_mask"},
    DecoderLayer={"hidden_states", "position_embeddings", "attention_mask"},
    ForCausalLM={"input_ids", "labels", "logits_to_keep"},
)


def parameters(function: Any) -> tuple[str, ...]:
    """Names of the parameters of a method, self aside, looking through decorators."""
    kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return tuple(name for name, p in inspect.signature(function).parameters.items() if p.kind in kinds)[1:]


def _found() -> str:
    return f"transformers {transformers.__version__} is installed"


def _check_version() -> None:
    try:
        version = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    except ValueError:
        raise NotSupported(f"hf: {_found()}, expected a version number") from None
    if not OLDEST <= version < BELOW:
        low, high = (".".join(map(str, v)) for v in (OLDEST, BELOW))
        raise NotSupported(f"hf: {_found()}, expected at least {low} and below {high}")


def _architecture(name: str, module: Any) -> Architecture:
    """The classes of an architecture, of which each is there and takes what this package gives it."""
    file = module.__name__.rpartition(".")[2]
    classes = []
    for part, needed in _FORWARDS._asdict().items():
        there = getattr(module, name + part, None)
        if there is None:
            raise NotSupported(f"hf: {_found()}, and {file} has no {name}{part}")
        if there.__module__ != module.__name__:
            raise NotSupported(f"hf: {file}.{name}{part} is {there.__module__}'s, expected transformers' own")
        taken = parameters(there.forward)
        if not needed <= set(taken):
            raise NotSupported(
                f"hf: {_found()}, and {name}{part}.forward takes {taken}, expected {sorted(needed)} among them"
            )
        if part in ("Attention", "DecoderLayer") and not set(CACHES) & set(taken):
            raise NotSupported(
                f"hf: {_found()}, and {name}{part}.forward takes {taken}, expected one of {CACHES} among them"
            )
        classes.append(there)
    return Architecture(*classes)


def _dialect(a: Architecture) -> dict[str, Any]:
    """What differs from version to version, as one architecture has it."""
    layer, attention, model = (parameters(kind.forward) for kind in (a.DecoderLayer, a.Attention, a.ForCausalLM))
    return {
        "CACHE": next(name for name in CACHES if name in layer),
        "MODEL_CACHE": next(name for name in CACHES if name in model),
        "GIVES_TUPLE": "output_attentions" in layer,
        "POSITIONS_TO_CACHE": "cache_position" in attention,
        "ARGUMENTS_TO_CACHE": ("kwargs",) in inspect.unwrap(a.Attention.forward).__code__.co_consts,
    }


_check_version()
VERSION: str = transformers.__version__
ARCHITECTURES: dict[str, Architecture] = {"Llama": _architecture("Llama", stock)}
LEFT_OUT: dict[str, str] = {}  # why, by the name of an architecture
_SPOKEN = _dialect(ARCHITECTURES["Llama"])
CACHE: str = _SPOKEN["CACHE"]
MODEL_CACHE: str = _SPOKEN["MODEL_CACHE"]
GIVES_TUPLE: bool = _SPOKEN["GIVES_TUPLE"]  # a layer: (hidden_states,) or (hidden_states, weights)
POSITIONS_TO_CACHE: bool = _SPOKEN["POSITIONS_TO_CACHE"]  # a cache's update wants them
# update(..., kwargs=kwargs): a paged cache reads and changes the arguments of the call
ARGUMENTS_TO_CACHE: bool = _SPOKEN["ARGUMENTS_TO_CACHE"]

for _name in NAMES[1:]:
    try:
        _module = importlib.import_module(f"transformers.models.{_name.lower()}.modeling_{_name.lower()}")
        _classes = _architecture(_name, _module)
        if _dialect(_classes) != _SPOKEN:
            raise NotSupported(f"hf: {_found()}, and {_name}'s layers are called in another way than Llama's")
        ARCHITECTURES[_name] = _classes
    except (ImportError, NotSupported) as error:
        LEFT_OUT[_name] = str(error)

LAYERS: tuple[Any, ...] = tuple(a.DecoderLayer for a in ARCHITECTURES.values())
CAUSAL_LMS: tuple[Any, ...] = tuple(a.ForCausalLM for a in ARCHITECTURES.values())
LAYER_NAMES = " or ".join(kind.__name__ for kind in LAYERS)


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
