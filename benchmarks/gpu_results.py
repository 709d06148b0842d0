"""The rows of `benchmarks.gpu bench` as lines of a result file, for the report and README."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from llama_fast.ops.table import OPS

from . import harness, results
from .gpu_cases import DTYPES, Timed
from .gpu_run import OURS, Row
from .providers import sizes
from .results import COPY, Limit, Line, Results, Seconds

DIRECTIONS = {"fwd": "forward", "bwd": "backward", "both": "forward+backward"}
_PARTS = {"fwd": (0,), "bwd": (1,), "both": (0, 1)}
_ALLOCATOR = "CUDA: torch's caching allocator"


def of(
    rows: Sequence[Row], todo: Iterable[Timed], rates: Row, device: str, kind: str, commit: str | None = None
) -> Results:
    """A result file of a bench.

    Args:
        rows: as `bench_one` gives them; one with a "problem" has no time.
        todo: the cases, by whose op, label and dtype rows are known.
        rates: "copy" in bytes/s and "matrix" in flop/s of bfloat16.
        device: "cuda" or "cpu".
        kind: device class, as in proven.json.
        commit: of the tree, where it is under no version control.
    """
    limits = (
        Limit(COPY, "byte/s", rates["copy"], "a copy of what is larger than the caches"),
        Limit("matmul bfloat16", "flop/s", rates["matrix"], "a large product in bfloat16"),
    )
    cases = {(t.case.op, t.label): t for t in todo}
    found: dict[tuple[str, ...], Line] = {}
    for row in sorted(rows, key=lambda r: "seconds" in r):  # a direction that was timed stands, whatever failed later
        timed = cases.get((row["op"], row.get("case", "")))
        if timed is None or "provider" not in row:
            continue  # a case that no provider reached: the bench's own file has its reason
        directions = [row["direction"]] if "direction" in row else ["both"] if timed.together else ["fwd", "bwd"]
        for x in (results.against(_line(row, timed, d), limits) for d in directions):
            key = (*x.key, x.provider)
            found.pop(key, None)
            found[key] = x
    notes = {"clock": "CUDA events, second-level cache flushed, graphs replayed where a call can be captured"}
    environment = harness.environment(_ALLOCATOR, device, commit=commit, notes={**notes, "device class": kind})
    place = {name: i for i, name in enumerate(OPS)}
    lines = sorted(found.values(), key=lambda x: (place[x.op], not results.is_ours(x.provider)))
    return Results(results.FORMAT, environment, limits, tuple(lines))


def _line(row: Row, timed: Timed, direction: str) -> Line:
    op, case, dtype = OPS[timed.case.op], timed.case, DTYPES[timed.dtype]
    moved = op.traffic(sizes(case), dtype.itemsize)
    flops = op.flops(sizes(case), case.options) if op.flops else (0, 0)
    fields: dict[str, Any] = {"seconds": None, "status": "measured", "reason": row.get("problem", "")}
    if "seconds" in row:
        low, high = min(row["low"], row["seconds"]), max(row["high"], row["seconds"])
        fields["seconds"] = Seconds(row["seconds"], low, high, max(1, row.get("runs", 1)))
    else:
        fields["status"] = "wrong" if "of its size away" in fields["reason"] else "not run"
    return Line(
        op=case.op,
        label=timed.label,
        case=harness.case_of(case),
        dtype=timed.dtype,
        direction=DIRECTIONS[direction],
        provider=provider(row["provider"]),
        bytes=sum(moved[i] for i in _PARTS[direction]),
        flops=sum(flops[i] for i in _PARTS[direction]),
        limit=None,
        share=None,
        peak_bytes=row.get("peak") or None,
        kept_bytes=None,
        error=None,
        tokens=None,
        command=f"python -m benchmarks.gpu bench --ops {case.op}",
        **fields,
    )


def provider(name: str) -> str:
    """A rival's or backend's name as result files have it."""
    if name in OURS:
        return f"{results.OURS}:{name}"
    return {"compile": "torch.compile"}.get(name, name.replace("sdpa-", "sdpa:"))
