"""What the tests of llama_fast.hf share: a small transformers model, its patched copy, and the exact one."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="the extra hf is not installed")
import transformers

import llama_fast as lf
from llama_fast.verify import BACKWARD_FACTOR, ulp

B, T, VOCABULARY = 3, 19, 97
VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
BEFORE_4_56, BEFORE_5 = VERSION < (4, 56), VERSION < (5, 0)
DTYPE = "torch_dtype" if BEFORE_4_56 else "dtype"  # how from_pretrained calls it
# The quotient of the logits' root-mean-square errors, ours by stock's, is a random number: both models add up the same
# roundings in another order. Its logarithm over 60 seeds of each of six configurations has the mean -0.02 and the
# standard deviation 0.041 in float32 (0.89 to 1.13), -0.14 and 0.046 in bfloat16 (0.75 to 1.02). test_hf_numerics holds
# the mean over seeds at 0 or less; a single draw may lie four deviations above 0, in half precision two, which with
# that mean are five. No ulp is added: it would be 0.1 in float32, 0.4 in bfloat16 of the stock model's error.
SPREAD = {torch.float32: 0.041, torch.bfloat16: 0.046, torch.float16: 0.046}
DEVIATIONS = {torch.float32: 4, torch.bfloat16: 2, torch.float16: 2}
DTYPES = (torch.float64, torch.float32, torch.bfloat16)
SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 112,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 64,
    "initializer_range": 0.12,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@dataclass(frozen=True)
class Case:
    """A model and a way to call it.

    Args:
        config: beside SIZES.
        call: arguments of the model's forward beside input_ids; a function gives tensors of the device.
        runs: "block", or a part of what stands against it.
        rows: [B, T] bool, the places whose logits count; None for all.
    """

    config: dict[str, Any] = field(default_factory=dict)
    call: dict[str, Any] = field(default_factory=dict)
    runs: str = "block"
    rows: Tensor | None = None


def make(seed: int = 0, architecture: str = "Llama", **options: Any) -> Any:
    """A LlamaForCausalLM, or its like, with gains that are not one and biases that are not the first ones."""
    torch.manual_seed(seed)
    config = getattr(transformers, f"{architecture}Config")(**{**SIZES, **options})
    model = getattr(transformers, f"{architecture}ForCausalLM")(config)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(0.1 * torch.randn(p.shape))
    return model


def tokens(batch: int = B, length: int = T, seed: int = 1) -> Tensor:
    """[batch, length] int64, no padding token among them."""
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(seed))


def exact(model: Any) -> Any:
    """The model in float64 with norms that are in float64 too: transformers' own compute them in float32."""
    truth = copy.deepcopy(model).double()
    for module in truth.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = lambda x, m=module: (
                m.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + m.variance_epsilon)
            )
    return truth


def patched(model: Any, **options: Any) -> Any:
    """A patched copy."""
    return lf.hf.patch(copy.deepcopy(model), **options)


def run(model: Any, rows: Tensor | None = None, **call: Any) -> dict[str, Tensor]:
    """Logits at `rows`, and the gradient of each parameter for a random gradient of theirs, by name."""
    model.zero_grad(set_to_none=True)
    ids = call.pop("input_ids", None)
    logits = model(input_ids=tokens() if ids is None else ids, **call).logits
    dlogits = torch.randn(logits.shape, generator=torch.Generator().manual_seed(2)).bfloat16().to(logits.dtype)
    if rows is not None:
        logits, dlogits = logits[rows], dlogits[rows]
    logits.backward(dlogits)
    return {"logits": logits.detach(), **{f"d{n}": p.grad.clone() for n, p in model.named_parameters()}}


def rms(x: Tensor) -> float:
    return x.double().square().mean().sqrt().item()


def assert_close(
    ours: dict[str, Tensor], theirs: dict[str, Tensor], truth: dict[str, Tensor], autocast: torch.dtype | None = None
) -> None:
    """In float64 equal to the truth; else the root-mean-square error is within a factor of the stock model's own."""
    assert ours.keys() == truth.keys()
    problems = []
    for name, value in truth.items():
        got = ours[name]
        if got.dtype == torch.float64:
            torch.testing.assert_close(got, value, rtol=1e-9, atol=1e-9 * float(value.abs().max()), msg=name)
            continue
        error, stock = rms(got - value), rms(theirs[name] - value)
        if name == "logits":
            dtype = autocast or got.dtype
            budget = math.exp(DEVIATIONS[dtype] * SPREAD[dtype]) * stock
        else:
            budget = BACKWARD_FACTOR * stock + ulp(rms(value), got.dtype)
        problems += [] if error <= budget else [f"{name}: error {error:.3g} exceeds {budget:.3g}"]
    assert not problems, "\n".join(problems)


def ran(model: Any) -> str:
    """What the layers of a patched model ran in their last call, where all ran the same."""
    (what,) = set(ran_by_layer(model))
    return what


def ran_by_layer(model: Any) -> list[str]:
    return [m._llama_fast.last for m in model.modules() if type(m).__name__.endswith("DecoderLayer")]
