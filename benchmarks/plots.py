"""The plots of a report, drawn by matplotlib: each as an inline SVG that follows the page's colours, and as a PNG."""

from __future__ import annotations

import io
import math
import re
import textwrap
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from .results import Line, is_ours

WIDTH = 4.5  # inches: at 10 points, readable where a phone shows it 360 pixels wide
ROW = 0.3
INK, GRID = "#010101", "#020202"  # stand-ins, replaced by the page's own colours
# As many of ours, and of others, as an op has at most
OURS_COLORS = ("#2f81c7", "#1b4f80", "#7fb6e3", "#5a54d6", "#3fc1c9")
OURS_COLOR = OURS_COLORS[0]
COLORS = (
    *("#d98032", "#3f9b6c", "#a05fc0", "#c9485b", "#8a8f3c", "#4aa3b5", "#b5754a", "#7d7d8c"),
    *("#d06a9f", "#2e6b57", "#c7a52f"),
)
SHORT = {"bfloat16": "bf16", "float32": "f32", "float16": "f16", "forward": "fwd", "forward+backward": "fwd+bwd"}


@dataclass(frozen=True)
class Plot:
    """A drawn plot: a file name without suffix, a sentence that says what it shows, SVG text, PNG bytes."""

    name: str
    caption: str
    svg: str
    png: bytes


Draft = tuple[str, str, float, Callable[[Any], None]]  # name, caption, height in inches without the axis, what draws it


def group(lines: Iterable[Line]) -> list[list[Line]]:
    """The measured lines of each case, dtype and direction; ours first, the fastest of them before the others."""
    groups: dict[tuple[str, ...], list[Line]] = {}
    for x in lines:
        if x.seconds is not None:
            groups.setdefault(x.key, []).append(x)
    return [sorted(rows, key=_place) for rows in groups.values()]


def _place(x: Line) -> tuple[bool, float]:
    return not is_ours(x.provider), _median(x) if is_ours(x.provider) else 0.0


def labels(rows: Sequence[Line]) -> tuple[str, list[str]]:
    """(what all cases have in common, each case's own sizes), in few letters; as many keys as queries go unsaid."""
    parts = []
    for x in rows:
        keys = f"S{x.case.get('T')}"
        parts.append([p for p in (*x.sizes.split(), SHORT.get(x.dtype, x.dtype)) if p != keys])
    common = [p for p in parts[0] if all(p in other for other in parts)] if len(rows) > 1 else []
    own = [textwrap.fill(" ".join(p for p in x if p not in common), 20) for x in parts]
    return " ".join(common), own


def time_text(seconds: float) -> str:
    """Three digits and a unit."""
    for unit, scale in (("s", 1.0), ("ms", 1e3), ("µs", 1e6)):
        if seconds * scale >= 1 or unit == "µs":
            value = seconds * scale
            return f"{value:.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"
    raise AssertionError


def range_text(low: float, high: float) -> str:
    """Two times in the unit of the second: `3.01-3.29 ms`."""
    number, unit = time_text(high).split()
    scale = {"s": 1.0, "ms": 1e3, "µs": 1e6}[unit]
    return f"{low * scale:.{max(0, 3 - len(str(int(low * scale))))}f}–{number} {unit}"


def all_plots(lines: Sequence[Line], prefix: str, device: str) -> list[Plot]:
    """The plots of one op on one device; none where nothing was measured beside ours."""
    found: list[Draft | None] = []
    for direction in dict.fromkeys(x.direction for x in lines):
        rows = [g for g in group(lines) if g[0].direction == direction]
        name = f"{prefix}_{re.sub('[^a-z]+', '_', direction)}"
        found += [_speedup(rows, name, direction), _times(rows, name, direction), _shares(rows, name, direction)]
    found += [_against_length(lines, prefix, "time"), _against_length(lines, prefix, "memory")]
    return [_plot(f"{lines[0].op} on {device}", *draft) for draft in found if draft is not None]


def _speedup(groups: list[list[Line]], name: str, direction: str) -> Draft | None:
    """Bars: how many times faster ours is than eager PyTorch and than the fastest other provider."""
    rows: list[tuple[Line, list[tuple[float, str, str]]]] = []
    for lines in groups:
        ours, others = lines[0], lines[1:]
        if not is_ours(ours.provider) or not (others := [x for x in others if not is_ours(x.provider)]):
            continue
        best = min(others, key=_median)
        bars = [(_median(x) / _median(ours), x.provider, COLORS[0]) for x in others if x.provider == "eager"]
        if best.provider != "eager":
            bars.append((_median(best) / _median(ours), best.provider, COLORS[1]))
        rows.append((ours, bars))
    if not rows:
        return None
    common, own = labels([ours for ours, _ in rows])

    def draw(axis: Any) -> None:
        y, ticks = 0.0, []
        most = max(1.0, *(r for _, bars in rows for r, _, _ in bars))
        for _, bars in rows:
            ticks.append(y + (len(bars) - 1) * 0.45)
            for ratio, provider, color in bars:
                axis.barh(y, ratio, height=0.8, color=color)
                axis.text(max(ratio, 1.0) + most * 0.02, y, f"{ratio:.2f}x {provider}", va="center", fontsize=8.5)
                y += 0.9
            y += 0.6
        axis.set_yticks(ticks, own)
        axis.axvline(1.0, color=INK, linewidth=1)
        axis.set_xlim(0, most * 1.45)
        axis.set_xlabel("times faster than the other")
        axis.invert_yaxis()

    height = sum(len(bars) * 0.9 + 0.6 for _, bars in rows) * 0.26
    caption = _caption(
        f"{direction}: how many times faster ours is than eager PyTorch and the fastest other one", common
    )
    return f"{name}_speedup", caption, max(height, 0.5), draw


def _times(groups: list[list[Line]], name: str, direction: str) -> Draft | None:
    """Dots: median of every provider, with the 20th to 80th percentile."""
    rows = [g for g in groups if len(g) > 1]
    providers = list(dict.fromkeys(x.provider for g in rows for x in g))
    if not rows:
        return None
    common, own = labels([g[0] for g in rows])

    def draw(axis: Any) -> None:
        for provider in providers:
            points = [(i, x) for i, g in enumerate(rows) for x in g if x.provider == provider]
            medians = [_median(x) * 1e3 for _, x in points]
            low = [m - x.seconds.p20 * 1e3 for m, (_, x) in zip(medians, points, strict=True) if x.seconds]
            high = [x.seconds.p80 * 1e3 - m for m, (_, x) in zip(medians, points, strict=True) if x.seconds]
            style = {"fmt": "o", "markersize": 5, "elinewidth": 1.5, "color": _color(provider, providers)}
            axis.errorbar(medians, [i for i, _ in points], xerr=(low, high), label=provider, **style)
        axis.set_yticks(range(len(rows)), own)
        axis.set_ylim(len(rows) - 0.5, -0.5)
        _log(axis.set_xscale, axis.xaxis)
        axis.set_xlabel("ms, median and 20th to 80th percentile")
        _legend(axis, len(providers))

    height = max(len(rows) * ROW, 0.5) + 0.25 * math.ceil(len(providers) / 2)
    caption = _caption(f"{direction}: time of each provider; less is better", common)
    return f"{name}_time", caption, height, draw


def _shares(groups: list[list[Line]], name: str, direction: str) -> Draft | None:
    """Bars: share of the machine's limit that ours and the fastest other provider reach."""
    others = [[x for x in g if not is_ours(x.provider)] for g in groups]
    rows = [(g[0], min(o, key=_median)) for g, o in zip(groups, others, strict=True) if o and is_ours(g[0].provider)]
    if not rows:
        return None
    common, own = labels([ours for ours, _ in rows])

    def draw(axis: Any) -> None:
        most = max(1.0, *(x.share or 0.0 for pair in rows for x in pair)) * 100
        for i, pair in enumerate(rows):
            for shift, x, color in ((-0.2, pair[0], OURS_COLOR), (0.2, pair[1], COLORS[1])):
                share = x.share or 0.0
                axis.barh(i + shift, share * 100, height=0.38, color=color)
                text = f"{share:.0%} of {(x.limit or '').split()[0]}" if shift < 0 else f"{share:.0%} {x.provider}"
                axis.text(most * 1.03, i + shift, text, va="center", fontsize=8.5)
        axis.set_yticks(range(len(rows)), own)
        axis.set_ylim(len(rows) - 0.5, -0.5)
        axis.axvline(100, color=INK, linewidth=1)
        axis.set_xlim(0, most * 1.7)
        axis.set_xlabel("% of the limit")

    caption = _caption(
        f"{direction}: share of the limit measured in the same run, of ours (blue) and of the fastest other one", common
    )
    return f"{name}_share", caption, max(len(rows) * ROW * 1.5, 0.5), draw


def _against_length(lines: Sequence[Line], prefix: str, what: str) -> Draft | None:
    """Lines: time, or bytes kept for the backward, against the sequence length, of cases that differ in it alone."""
    families: dict[tuple[Any, ...], dict[str, dict[int, float]]] = {}
    for x in lines:
        T, value = x.case.get("T"), x.kept_bytes if what == "memory" else x.seconds and x.seconds.median
        if x.status == "measured" and isinstance(T, int) and value and x.direction in ("forward+backward", "step"):
            rest = tuple((k, str(v)) for k, v in x.case.items() if k not in ("T", "S"))
            square = x.case.get("S", T) == T
            families.setdefault((square, x.dtype, rest), {}).setdefault(x.provider, {})[T] = value
    best = max(families.values(), key=lambda f: max(len(points) for points in f.values()), default={})
    if max((len(points) for points in best.values()), default=0) < 3:
        return None
    _, dtype, rest = next(key for key, value in families.items() if value is best)
    scale = 1e-6 if what == "memory" else 1e3

    def draw(axis: Any) -> None:
        for provider, points in best.items():
            color = _color(provider, list(best))
            values = [points[T] * scale for T in sorted(points)]
            axis.plot(sorted(points), values, marker="o", markersize=4, color=color, label=provider)
        axis.set_xscale("log", base=2)
        _log(axis.set_yscale, axis.yaxis)
        lengths = sorted({T for points in best.values() for T in points})
        axis.set_xticks(lengths, [str(T) for T in lengths])
        axis.xaxis.minorticks_off()
        axis.grid(axis="y")
        axis.set_xlabel("tokens")
        axis.set_ylabel("MB kept for the backward" if what == "memory" else "ms, forward and backward")
        _legend(axis, len(best))

    sizes = " ".join(f"{k}{v}" for k, v in rest)
    caption = f"{'memory' if what == 'memory' else 'time'} against sequence length, {sizes} {dtype}"
    return f"{prefix}_{what}_by_length", caption, 2.6, draw


def _caption(text: str, common: str) -> str:
    return f"{text} ({common})" if common else text


# ---- drawing --------------------------------------------------------------------------------------------------------
def _median(x: Line) -> float:
    assert x.seconds is not None
    return x.seconds.median


def _log(set_scale: Callable[[str], Any], axis: Any) -> None:
    """A logarithmic axis with plain numbers: at 1, 2 and 5 of each power of ten where there is room; two or more."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

    set_scale("log")
    low, high = axis.get_view_interval()
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 300 else (1,)))
    if sum(low <= x <= high for x in axis.get_majorticklocs()) < 2:
        axis.set_major_locator(MaxNLocator(5))
    axis.set_major_formatter(lambda x, _: f"{x:g}")
    axis.set_minor_formatter(NullFormatter())


def _color(provider: str, providers: list[str]) -> str:
    if is_ours(provider):
        ours = [p for p in providers if is_ours(p)]
        return OURS_COLORS[ours.index(provider) % len(OURS_COLORS)]
    others = [p for p in providers if not is_ours(p)]
    return COLORS[others.index(provider) % len(COLORS)]


def _legend(axis: Any, entries: int) -> None:
    columns = min(entries, 2)
    axis.figure.legend(loc="outside upper left", ncols=columns, frameon=False, fontsize=8.5, borderpad=0.1)


def _plot(where: str, name: str, caption: str, height: float, draw: Callable[[Any], None]) -> Plot:
    """A drawn `Draft`. The picture has `where` and the caption below it; on the page they stand beside it."""
    try:
        import matplotlib as mpl
    except ImportError:
        raise ValueError("matplotlib is missing: pip install 'llama_fast[demo]'") from None
    mpl.use("Agg")
    import matplotlib.pyplot as plt

    settings: Any = {
        "font.size": 10,
        "font.family": "sans-serif",
        "text.color": INK,
        "axes.labelcolor": INK,
        "axes.edgecolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
        "ytick.labelsize": 8.5,
        "xtick.labelsize": 8.5,
        "axes.grid": True,
        "axes.grid.axis": "x",
        "grid.color": GRID,
        "grid.linewidth": 0.6,
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "svg.fonttype": "none",
        "svg.hashsalt": name,
    }
    with mpl.rc_context(settings):
        figure, axis = plt.subplots(figsize=(WIDTH, height + 0.75), layout="constrained")
        draw(axis)
        svg, png = io.StringIO(), io.BytesIO()
        figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
        for line in axis.get_xgridlines() + axis.get_ygridlines():
            line.set_color("#dddddd")
        below = textwrap.wrap(f"{where}. {caption}", 62)  # of digits and capitals too, what WIDTH takes
        figure.set_figheight(figure.get_figheight() + 0.15 * len(below) + 0.1)
        figure.supxlabel("\n".join(below), x=0.01, ha="left", fontsize=8)
        figure.savefig(png, format="png", dpi=160, facecolor="white")
        plt.close(figure)
    return Plot(name, caption, _inline(svg.getvalue(), caption), png.getvalue())


def _inline(svg: str, caption: str) -> str:
    """An SVG document as an element that takes the page's colours and font, and loads nothing."""
    from html import escape

    text = svg[svg.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'(<svg [^>]*?)width="[^"]*" ', r"\1", re.sub(r'(<svg [^>]*?)height="[^"]*" ', r"\1", text, count=1))
    text = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", text)
    text = re.sub(r' xmlns:\w+="[^"]*"| xmlns="[^"]*"', "", text).replace(" xlink:href=", " href=")
    text = text.replace(INK, "currentColor").replace(GRID, "var(--grid)")
    return text.replace("<svg ", f'<svg role="img" aria-label="{escape(caption)}" ', 1)
