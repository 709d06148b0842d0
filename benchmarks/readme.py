"""Writes README.md's results from the committed result files: `python -m benchmarks.readme`. No figure there is typed.

The text stands between two marks; tests/test_benchmarks_readme.py checks that it is what this module makes of
benchmarks/results/*.json. Files of comparisons of two versions are left out.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path

from llama_fast.ops.table import OPS

from . import plots, report, results
from .results import Line, Results, is_ours

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "benchmarks" / "results"
BEGIN = "<!-- results: written by `python -m benchmarks.readme` -->"
END = "<!-- end of results -->"


def text(files: Sequence[tuple[str, Results]]) -> str:
    """The results as Markdown, files of one device together: of an op, the newest that has it."""
    devices: dict[str, list[tuple[str, Results]]] = {}
    for name, r in sorted(files, key=lambda file: file[1].environment.time):
        if r.environment.against is None:
            devices.setdefault(r.environment.device, []).append((name, r))
    return "\n\n".join(map(_of_device, devices.values())) or "No result file is committed yet."


def committed(folder: Path = FOLDER) -> list[tuple[str, Results]]:
    """The result files of the repository, by name."""
    return [(path.name, results.read(path)) for path in sorted(folder.glob("*.json"))]


def replaced(document: str, new: str) -> str:
    """The document with `new` between the marks.

    Raises:
        ValueError: it does not have each mark once.
    """
    if document.count(BEGIN) != 1 or document.count(END) != 1:
        raise ValueError(f"README.md: expected each of the marks {BEGIN!r} and {END!r} once")
    before, rest = document.split(BEGIN)
    return f"{before}{BEGIN}\n\n{new}\n\n{END}{rest.split(END)[1]}"


def _of_device(files: Sequence[tuple[str, Results]]) -> str:
    """Files from the oldest to the newest."""
    e = files[-1][1].environment
    newest = {x.op: name for name, r in files for x in r.lines}
    place = {name: i for i, name in enumerate(dict.fromkeys((*OPS, *newest)))}
    lines = sorted((x for n, r in files for x in r.lines if newest[x.op] == n), key=lambda x: place[x.op])
    merged = dataclasses.replace(files[-1][1], lines=tuple(lines))
    threads = f", {e.threads} threads, {e.isa}" if e.kind == "cpu" else ""
    several = len({x.provider for x in merged.lines if is_ours(x.provider) and x.tokens is None}) > 1
    head = f"**{e.device}**{threads}, torch {e.packages.get('torch')}." + several * _SEVERAL
    sources = [_source(name, r) for name, r in files if name in newest.values()]
    tables = [_ops_table([x for x in merged.lines if x.tokens is None]), _models_table(merged)]
    return "\n\n".join([f"{head} {' '.join(sources)}", *filter(None, tables), *report.paper(merged)])


_SEVERAL = " Of our backends the faster one counts."


def _source(name: str, r: Results) -> str:
    e = r.environment
    limits = ", ".join(f"{x.name} {x.rate / 1e9:,.0f} {'GB/s' if x.unit == 'byte/s' else 'Gflop/s'}" for x in r.limits)
    commit = (e.commit or "none")[:10]
    text = f"[{name}](benchmarks/results/{name}): {e.time[:10]}, commit `{commit}`, limits in the same run {limits}."
    return f"{text} Left out: {e.notes['left out']}." if "left out" in e.notes else text


def _ratio(ours: Line, other: Line) -> float:
    assert ours.seconds is not None
    assert other.seconds is not None
    return other.seconds.median / ours.seconds.median


def _mean(ratios: Sequence[float]) -> str:
    return f"{results.geometric_mean(ratios):.2f}x" if ratios else "-"


def _ops_table(lines: Sequence[Line]) -> str:
    """A row an op: geometric means over its cases; columns that nobody has are left out."""
    rows: list[tuple[str, ...]] = []
    alone = any(x.direction == "backward" for x in lines)
    for op in dict.fromkeys(x.op for x in lines):
        found: dict[str, list[float]] = {"forward": [], "backward": [], "forward+backward": [], "best": [], "kept": []}
        shares = []
        for group in plots.group(x for x in lines if x.op == op):
            ours, others = group[0], [x for x in group if not is_ours(x.provider)]
            if not is_ours(ours.provider):
                continue
            shares.append(ours.share or 0.0)
            found["best"] += [min(_ratio(ours, x) for x in others)] if others else []
            for x in others:
                if x.provider == "eager":
                    found[x.direction].append(_ratio(ours, x))
                    found["kept"] += [x.kept_bytes / ours.kept_bytes] if x.kept_bytes and ours.kept_bytes else []
        if shares:
            second = _mean(found["backward"] or found["forward+backward"])
            both = " with forward" if alone and not found["backward"] and second != "-" else ""
            means = (_mean(found[k]) for k in ("best", "kept"))
            share = " to ".join(dict.fromkeys(f"{f(shares):.0%}" for f in (min, max)))
            rows.append((f"`{op}`", _mean(found["forward"]), second + both, *means, share))
    if not rows:
        return ""
    backward = "backward, over eager" if alone else "and backward"
    head = ("op", "forward, over eager", backward, "over the fastest other", "fewer bytes kept", "of the limit")
    kept = [i for i in range(len(head)) if any(row[i] != "-" for row in rows)]
    first, *rest = ("| " + " | ".join(row[i] for i in kept) + " |" for row in (head, *rows))
    return "\n".join([first, "|" + "---|" * len(kept), *rest])


def _models_table(r: Results) -> str:
    """A row a scenario: tokens a second of ours and how many times the others', MFU, bytes kept."""
    rows = []
    for group in plots.group(x for x in r.lines if x.tokens is not None):
        if not is_ours(group[0].provider):
            continue
        ours = min((x for x in group if is_ours(x.provider)), key=lambda x: x.seconds.median if x.seconds else 0.0)
        assert ours.seconds is not None
        others = {x.provider: _ratio(ours, x) for x in group if not is_ours(x.provider)}
        speed = f"{(ours.tokens or 0) / ours.seconds.median:,.0f}"
        kept = f"{ours.kept_bytes / ours.tokens:,.0f}" if ours.kept_bytes and ours.tokens else "-"
        beside = ", ".join(f"{ratio:.2f}x {name}" for name, ratio in others.items())
        policy = ours.provider.partition(":")[2]
        name = " ".join(filter(None, (f"`{ours.op}`", ours.label, ours.dtype, f"({policy})" if policy else "")))
        rows.append(f"| {name} | {ours.sizes} | {speed} | {_utilisation(ours, r)} | {kept} | {beside} |")
    if not rows:
        return ""
    head = "| | sizes | tokens/s | of the peak | bytes a token and layer | over |"
    return "\n".join([head, "|---|---|---|---|---|---|", *rows])


def _utilisation(x: Line, r: Results) -> str:
    share = report.mfu(x, r.environment)
    if share is not None:
        return f"{share:.1%} MFU"
    return f"{x.share:.0%} of {x.limit}"


def main() -> int:
    """Rewrites README.md."""
    path = ROOT / "README.md"
    old = path.read_text(encoding="utf-8")
    new = replaced(old, text(committed()))
    path.write_text(new, encoding="utf-8")
    print("README.md: " + ("as it was" if new == old else "rewritten"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
