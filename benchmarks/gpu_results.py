"""The rows of `benchmarks.gpu bench` as lines of a result file, for the report and README."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from llama_fast.ops.table import OPS

from . import harness, results
from .gpu_run import Row
from .harness import Benchmark
from .results import COPY, Limit, Line, Results, Seconds

DIRECTIONS = {"fwd": "forward", "bwd": "backward", "both": "forward+backward"}
TOGETHER = frozenset({"linear_cross_entropy"})  # timed forward with backward: its gradients come with the forward pass
_ALLOCATOR = "CUDA: torch's caching allocator"


def of(
    rows: Sequence[Row], todo: Iterable[Benchmark], rates: Row, device: str, kind: str, commit: str | None = None
) -> Results:
    """A result file of a bench.

    Args:
        rows: as `bench_one` gives them; one with a "problem" has no time.
        todo: the cases, by whose op and label rows are known.
        rates: "copy" in bytes/s, "matmul bfloat16" and "matmul float32" in flop/s.
        device: "cuda" or "cpu".
        kind: device class, as in proven.json.
        commit: of the tree, where it is under no version control.
    """
    limits = [Limit(COPY, "byte/s", rates["copy"], "a copy of what is larger than the caches")]
    for dtype in ("bfloat16", "float32"):
        limits.append(Limit(f"matmul {dtype}", "flop/s", rates[f"matmul {dtype}"], f"a large product in {dtype}"))
    cases = {(b.case.op, b.label): b for b in todo}
    found: dict[tuple[str, ...], Line] = {}
    for row in sorted(rows, key=lambda r: "seconds" in r):  # a direction that was timed stands, whatever failed later
        benchmark = cases.get((row["op"], row.get("case", "")))
        if benchmark is None or "provider" not in row:
            continue  # a case that no provider reached: the bench's own file has its reason
        both = row["op"] in TOGETHER
        directions = [row["direction"]] if "direction" in row else ["both"] if both else ["fwd", "bwd"]
        for x in (results.against(_line(row, benchmark, d), limits) for d in directions):
            key = (*x.key, x.provider)
            found.pop(key, None)
            found[key] = x
    notes = {"clock": "CUDA events, second-level cache flushed, graphs replayed where a call can be captured"}
    environment = harness.environment(_ALLOCATOR, device, commit=commit, notes={**notes, "device class": kind})
    place = {name: i for i, name in enumerate(OPS)}
    lines = sorted(found.values(), key=lambda x: (place[x.op], not results.is_ours(x.provider)))
    return Results(results.FORMAT, environment, tuple(limits), tuple(lines))


def _line(row: Row, benchmark: Benchmark, direction: str) -> Line:
    fields: dict[str, Any] = {"seconds": None, "status": "measured", "reason": row.get("problem", "")}
    if "seconds" in row:
        low, high = min(row["low"], row["seconds"]), max(row["high"], row["seconds"])
        fields["seconds"] = Seconds(row["seconds"], low, high, row["runs"])
    else:
        fields["status"] = "wrong" if "of its size away" in fields["reason"] else "not run"
    return Line(
        **harness.facts(benchmark, DIRECTIONS[direction]),
        provider=row["provider"],
        limit=None,
        share=None,
        peak_bytes=row.get("peak") or None,
        kept_bytes=row.get("kept"),
        error=None,
        **fields,
    )
