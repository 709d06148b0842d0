"""transformers' models with a language modelling head: the product of lm_head on llama_fast's paths, and a loss without
logits."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from llama_fast.hf import layout
from llama_fast.hf.attention import kernel_objection
from llama_fast.hf.layers import derive, named, runs
from llama_fast.ops.dispatch import autocast_dtype
from llama_fast.ops.linear_cross_entropy import linear_cross_entropy
from llama_fast.projections import linear_objection, project

_CACHE_FIELD = next(f.name for f in dataclasses.fields(CausalLMOutputWithPast) if f.name in layout.CACHES)
FUSED = (False, True, "training")


def loss_objection(model: Any) -> str | None:
    """Why a model with labels makes its logits, or None."""
    if not runs(model, ForCausalLM) or not model._llama_fast_loss:
        return "fused_loss is False"
    if model._llama_fast_loss == "training" and not model.training:
        return 'fused_loss is "training" and the model is in evaluation mode'
    if model.loss_function is not ForCausalLMLoss:
        return f"the model has the loss function {getattr(model.loss_function, '__name__', model.loss_function)}"
    if against := head_objection(model):
        return against
    return "lm_head has a bias" if model.lm_head.bias is not None else None


def head_objection(model: Any) -> str | None:
    """Why lm_head is called as a module, or None where its weight is used directly."""
    found = linear_objection(model.lm_head)
    return found and f"lm_head {found}"


class ForCausalLM:
    """A model with llama_fast's product in the place of its lm_head's call.

    With `_llama_fast_loss` its loss is lf.linear_cross_entropy, and its outputs then have no logits: True, False, or
    "training" for no fused loss in evaluation mode.
    """

    def fast_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        """As transformers' own; with labels and the fused loss `logits` is None."""
        kwargs = named(self._parameters_of_forward, args, kwargs, layout.MODEL_CACHE)
        labels, keep = kwargs.get("labels"), kwargs.get("logits_to_keep", 0)
        of_all = isinstance(keep, int) and keep == 0
        fused = labels is not None and of_all and loss_objection(self) is None
        if kernel_objection() or head_objection(self) or not isinstance(keep, int):
            return self.stock_forward(**kwargs)
        call = {name: value for name, value in kwargs.items() if name not in ("labels", "logits_to_keep")}
        return self._with_fused_loss(labels, **call) if fused else self._with_logits(labels, keep, **call)

    @can_return_tuple
    def _with_fused_loss(self: Any, labels: Tensor, **call: Any) -> CausalLMOutputWithPast:
        outputs = self.model(**call)
        return _outputs(outputs, loss=_loss(outputs.last_hidden_state, self.lm_head.weight, labels, **call))

    @can_return_tuple
    def _with_logits(self: Any, labels: Tensor | None, keep: int, **call: Any) -> CausalLMOutputWithPast:
        outputs = self.model(**call)
        logits = project(self.lm_head, outputs.last_hidden_state[:, slice(-keep, None)])
        loss = None
        if labels is not None:
            extra = {name: value for name, value in call.items() if name not in self._parameters_of_forward}
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **extra)
        return _outputs(outputs, loss=loss, logits=logits)


def _outputs(outputs: Any, **made: Tensor | None) -> CausalLMOutputWithPast:
    """`made`, and what of the model's outputs goes with it."""
    return CausalLMOutputWithPast(
        **made,
        hidden_states=outputs.hidden_states,
        attentions=outputs.attentions,
        **{_CACHE_FIELD: getattr(outputs, _CACHE_FIELD)},
    )


def _loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """What `ForCausalLMLoss` computes of the logits hidden weight^T: the label at t + 1 counts at t."""
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    targets = shift_labels.to(hidden.device).reshape(hidden.shape[:-1])
    if weight.dtype != hidden.dtype and autocast_dtype(hidden) is None:
        raise ValueError(f"hf: lm_head.weight has dtype {weight.dtype}, expected {hidden.dtype} as the hidden states")
    if num_items_in_batch is None:
        return linear_cross_entropy(hidden, weight, targets, ignore_index=ignore_index)
    total = linear_cross_entropy(hidden, weight, targets, ignore_index=ignore_index, reduction="sum")
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch


HEAD_REPLACEMENTS = {
    theirs: derive(theirs, ForCausalLM, __name__, _llama_fast_loss=False) for theirs in layout.CAUSAL_LMS
}
