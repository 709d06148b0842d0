"""What `torch.utils.flop_counter.FlopCounterMode` counts for the ops, which to it are opaque.

Floating-point operations of the matrix products that a primitive really does: of attention those of the pairs that see
each other (of packed sequences whose bounds are not known, as under FakeTensorMode, as if they were one), in the
backward the scores made again; of linear_cross_entropy the gradients where its forward makes them. The memory-bound ops
count as nothing, as PyTorch's own do.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from llama_fast.ops.table import ATTENTION, LINEAR_CROSS_ENTROPY, Op


def count(op: Op, direction: str, args: Sequence[Any]) -> int:
    """Operations of the primitive `<op>_<direction>` called with `args`."""
    if op.flops is None:
        return 0
    dims = op.bind(direction, args)
    forward, backward = op.flops(dims, dims)
    if op is LINEAR_CROSS_ENTROPY:  # half of `backward` is one gradient's; its backward begins with the logits
        return forward + backward // 2 * (dims["wants_dhidden"] + dims["wants_dweight"])
    if op is ATTENTION and "N" in dims:
        bounds = next(a for a, arg in zip(args, op.schema(direction).args, strict=True) if arg.name == "cu_seqlens")
        if type(bounds) is Tensor and not bounds.is_meta:
            lengths = [end - begin for begin, end in pairwise(bounds.tolist())]
            each = [op.flops(sizes, sizes) for sizes in (dims | {"T": n, "S": n} for n in lengths)]
            forward, backward = sum(f for f, _ in each), sum(b for _, b in each)
    return forward if direction == "fwd" else backward


def tell_counters(op: Op, direction: str, target: Any) -> None:
    """Gives the counters that watch how to count `target`, the registered primitive. They are known by what they have:
    to import torch.utils.flop_counter imports Triton."""
    for mode in _get_current_dispatch_mode_stack():
        formulas = getattr(getattr(mode, "counter", None), "flop_registry", None)
        if isinstance(formulas, dict):
            formulas.setdefault(target, lambda *args, out_val=None: count(op, direction, args))
