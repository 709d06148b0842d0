"""Result files as one HTML page that needs no network: tables and plots of each op, environments, commands.

llama-fast report FILES... -o report.html [--png FOLDER]
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from llama_fast import plan
from llama_fast.config import LlamaConfig

from . import plots, results
from .plots import Plot, time_text
from .results import Environment, Line, Results, is_ours

_STYLE = Path(__file__).with_name("report.css")


def write(paths: Sequence[Path], out: Path, png: Path | None = None) -> list[Path]:
    """Writes the report of result files to `out`, and each plot as a PNG to the folder `png`.

    Returns:
        The files written.

    Raises:
        ValueError: no file, one that is no result file, or `out` is one of them; matplotlib is missing.
        OSError: a file cannot be read or written.
    """
    if not paths:
        raise ValueError("report: no result file is given")
    if out.resolve() in [path.resolve() for path in paths]:
        raise ValueError(f"{out}: is one of the result files, expected another file for the page")
    page, drawn = build([(path.stem, results.read(path)) for path in paths])
    out.write_text(page, encoding="utf-8")
    written = [out]
    if png is not None:
        png.mkdir(parents=True, exist_ok=True)
        for plot in drawn:
            (png / f"{plot.name}.png").write_bytes(plot.png)
            written.append(png / f"{plot.name}.png")
    return written


def build(files: Sequence[tuple[str, Results]]) -> tuple[str, list[Plot]]:
    """(the page, its plots) of result files by name; a second one of a name is called name-2, and so are its plots."""
    files = list(zip(_distinct([name for name, _ in files]), [r for _, r in files], strict=True))
    ops = list(dict.fromkeys(x.op for _, r in files for x in r.lines))
    drawn: list[Plot] = []
    sections = []
    for op in ops:
        parts = []
        for name, r in files:
            lines = [x for x in r.lines if x.op == op]
            if lines:
                made = plots.all_plots(lines, f"{_slug(name)}_{op}", r.environment.device)
                drawn += made
                parts.append(_device_part(name, r, lines, made))
        sections.append(f'<section id="{op}"><h2>{escape(op)}</h2>{"".join(parts)}</section>')
    links = "".join(f'<a href="#{op}">{escape(op)}</a>' for op in ops)
    environments = "".join(_environment(name, r) for name, r in files)
    body = (
        "<header><h1>llama_fast: benchmark report</h1>"
        f"<p>{_summary(files)}</p><nav>{links}<a href='#environment'>environment</a></nav></header>"
        f"<main>{_overview(files)}{''.join(sections)}"
        f'<section id="environment"><h2>environment</h2>{environments}</section></main>'
    )
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<meta name="color-scheme" content="light dark"><title>llama_fast: benchmark report</title>'
        f"<style>{_STYLE.read_text(encoding='utf-8')}</style>"
    )
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>{body}</body></html>\n', drawn


def _summary(files: Sequence[tuple[str, Results]]) -> str:
    lines = [x for _, r in files for x in r.lines]
    count = {s: sum(x.status == s for x in lines) for s in results.STATUSES}
    devices = ", ".join(dict.fromkeys(r.environment.device for _, r in files))
    return (
        f"{escape(devices)}. {count['measured']} lines measured, {count['wrong']} wrong, {count['not run']} not run. "
        "Each time is the median of runs that took turns with those of the other providers; a provider whose results "
        "are wrong shows no time. Limits were measured in the same run."
    )


def _overview(files: Sequence[tuple[str, Results]]) -> str:
    """One row an op and device: geometric mean of our speed-up over eager PyTorch and over the fastest other one."""
    rows = []
    for name, r in files:
        for op in dict.fromkeys(x.op for x in r.lines):
            ratios: dict[str, list[float]] = {"eager": [], "best": []}
            shares = []
            for lines in plots.group(x for x in r.lines if x.op == op):
                ours, others = lines[0], [x for x in lines[1:] if not is_ours(x.provider)]
                if not is_ours(ours.provider) or ours.seconds is None:
                    continue
                shares.append(ours.share or 0.0)
                times = {x.provider: x.seconds.median for x in others if x.seconds}
                if "eager" in times:
                    ratios["eager"].append(times["eager"] / ours.seconds.median)
                if times:
                    ratios["best"].append(min(times.values()) / ours.seconds.median)
            means = [f"{results.geometric_mean(v):.2f}x" if v else "-" for v in ratios.values()]
            share = " to ".join(dict.fromkeys(f"{f(shares):.0%}" for f in (min, max))) if shares else "-"
            wrong = sum(x.op == op and x.status == "wrong" for x in r.lines)
            cells = "".join(f"<td>{escape(c)}</td>" for c in (*means, share))
            cells += f"<td class='wrong'>{wrong} wrong</td>" if wrong else ""
            rows.append(f'<tr><th><a href="#{op}">{_breakable(op)}</a><small>{escape(name)}</small></th>{cells}</tr>')
    notes = [text for _, r in files for text in paper(r)]
    if any(x.tokens and x.op != "decode" for _, r in files for x in r.lines):
        notes = [MFU, *notes]
    return (
        '<section id="overview"><h2>overview</h2><table class="overview"><thead><tr><th>op</th><th>over eager</th>'
        f"<th>over the fastest other</th><th>of the limit</th></tr></thead><tbody>{''.join(rows)}</tbody></table>"
        "<p class='note'>Speed-ups are of the fastest of our lines of a case: geometric means over all cases, forward "
        f"and backward.</p>{''.join(f'<p class=note>{escape(text)}</p>' for text in notes)}</section>"
    )


_TURNS = (
    "Two versions in turn. Speed-ups here are ratios of the medians; the command prints the median of the turns' "
    "ratios, which a machine that slows down moves less. The other version is commit"
)


def _device_part(name: str, r: Results, lines: Sequence[Line], drawn: Iterable[Plot]) -> str:
    pictures = "".join(
        f"<figure id='{p.name}'>{p.svg}<figcaption>{escape(p.caption)}</figcaption></figure>" for p in drawn
    )
    groups: dict[tuple[str, ...], list[Line]] = {}
    for x in lines:
        groups.setdefault(x.key, []).append(x)
    cards = "".join(_card(rows, r.environment) for rows in groups.values() if any(x.status != "not run" for x in rows))
    absent: dict[tuple[str, str], int] = {}
    for x in lines:
        if x.status == "not run":
            absent[x.provider, x.reason] = absent.get((x.provider, x.reason), 0) + 1
    items = "".join(
        f"<li><b>{escape(provider)}</b>: {escape(reason)} ({count} lines)</li>"
        for (provider, reason), count in absent.items()
    )
    missing = f"<details><summary>not run, and why: {len(absent)}</summary><ul>{items}</ul></details>" if items else ""
    against = r.environment.against
    turns = "" if against is None else f"<p class='note'>{_TURNS} {against[:12]}.</p>"
    return (
        f"<h3>{escape(r.environment.device)} <small>{escape(name)}</small></h3>{turns}"
        f'<div class="plots">{pictures}</div><div class="cards">{cards}</div>{missing}'
    )


def _card(rows: Sequence[Line], environment: Environment) -> str:
    """A case, dtype and direction: a row a provider, and the command that measures it again."""
    rows = sorted((x for x in rows if x.status != "not run"), key=lambda x: not is_ours(x.provider))
    first = rows[0]
    ours = min((x.seconds.median for x in rows if is_ours(x.provider) and x.seconds), default=None)
    with_tokens, remembered = any(x.tokens for x in rows), any(x.kept_bytes or x.peak_bytes for x in rows)
    body = []
    for x in rows:
        kind = ' class="ours"' if is_ours(x.provider) else ""
        if x.seconds is None:
            body.append(
                f'<tr{kind}><th>{_breakable(x.provider)}</th><td colspan="4" class="wrong">WRONG: {escape(x.reason)}'
            )
            body.append("</td></tr>")
            continue
        s = x.seconds
        ratio = "" if ours is None or is_ours(x.provider) else f"{s.median / ours:.2f}x"
        share = f"{x.share:.0%}" if x.share is not None else ""
        if with_tokens and x.tokens:
            share += f"<small>{x.tokens / s.median:,.0f} tok/s</small>"
            used = mfu(x, environment)
            share += "" if used is None else f"<small>{used:.1%} MFU</small>"
        memory = _bytes(x.kept_bytes)
        if x.kept_bytes is not None and x.tokens:
            memory += f"<small>{x.kept_bytes / x.tokens:,.0f} B/tok/layer</small>"
        if x.peak_bytes is not None:
            memory += f"<small>peak {_bytes(x.peak_bytes)}</small>"
        spread = plots.range_text(s.p20, s.p80)
        body.append(
            f"<tr{kind}><th>{_breakable(x.provider)}</th><td>{time_text(s.median)}<small>{spread}</small></td>"
            f"<td>{share}</td>{f'<td>{memory}</td>' if remembered else ''}<td>{ratio}</td></tr>"
        )
    limit = next((x.limit for x in rows if x.limit), None)
    work = (f"{first.flops / 1e9:,.1f} Gflop" if first.flops else "", _bytes(first.bytes) if first.bytes else "")
    about = f"{', '.join(filter(None, work))} at least; limit: {limit or 'none'}"
    columns = ("provider", "time", "of limit", *(["kept"] if remembered else []), "speed-up")
    head = "".join(f"<th>{name}</th>" for name in columns)
    title = f"{first.sizes} <b>{escape(plots.SHORT.get(first.dtype, first.dtype))}</b> {escape(first.direction)}"
    return (
        f'<article class="card"><h4>{title}</h4><p class="note">{escape(first.label)}{"; " if first.label else ""}'
        f"{escape(about)}</p><table><thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody></table>"
        f"<code>{escape(first.command)}</code></article>"
    )


def device_of(environment: Environment) -> plan.Device | None:
    """The published figures of this GPU, where plan.py knows them."""
    words = re.findall(r"[a-z]+\d+", environment.device.lower())
    return next((d for name, d in plan.DEVICES.items() if name in words), None)


def mfu(x: Line, environment: Environment) -> float | None:
    """Model flops over time and the device's published peak, of a measured step on a known GPU in half precision."""
    device = device_of(environment)
    half = x.dtype in ("bfloat16", "float16")
    if device is None or x.seconds is None or not x.flops or x.op == "decode" or not half:
        return None
    return x.flops / x.seconds.median / device.flops


# how `mfu` and a model level's share of the matrix rate are counted; docs/measuring.md, LlamaConfig.flops_per_token
MFU = (
    "MFU: tokens/s x (6 N + 12 L H D T) / peak flop/s. N: parameters of the matrices that every token is multiplied "
    "with, the head's among them (not of a block) and the embedding's not; 12 L H D T: attention over all T keys, the "
    "masked half too. What a policy computes twice does not count."
)


def model_figures(x: Line, environment: Environment) -> list[str]:
    """Of a measured line of the model level: tokens a second, share of the limits, bytes that a block keeps a token."""
    assert x.seconds is not None
    assert x.tokens is not None
    found = [f"{x.tokens / x.seconds.median:,.0f} tokens/s"]
    used = mfu(x, environment)
    if used is not None:
        found.append(f"{used:.1%} MFU of the published peak")
    if x.share is not None:
        kind = "" if x.op == "decode" else " MFU"
        found.append(f"{x.share:.1%}{kind} of the {x.limit} rate measured here")
    if x.kept_bytes is not None:
        found.append(f"{x.kept_bytes / x.tokens:,.0f} bytes kept a token and layer")
    return found


def paper(r: Results) -> Iterable[str]:
    """Our training step on layers of the 65B shape in the paper's terms, where it was measured on a known GPU."""
    config, a100 = LlamaConfig.preset(plan.PAPER_PRESET), plan.device(plan.PAPER_DEVICE)
    steps = [x for x in r.lines if x.op == "training_step" and x.label == plan.PAPER_PRESET and is_ours(x.provider)]
    device = device_of(r.environment)
    shares = [share for x in steps if (share := mfu(x, r.environment)) is not None]
    if device is not None and shares:
        T, known = plan.PAPER_SEQ_LEN, plan.PAPER_TOKENS_PER_S
        rate = plan.tokens_per_second(config, device, T, max(shares))
        alone = plan.mfu(config, device, T, rate, attention=False)
        with_attention = plan.mfu(config, a100, T, known)
        by_parameters = plan.mfu(config, a100, T, known, attention=False)
        yield (
            f"The paper's 65B ran {known:.0f} tokens a second and GPU on A100: {with_attention:.1%} MFU with attention "
            f"({by_parameters:.1%} by 6 N alone). Layers of that shape on one {r.environment.device}: "
            f"{max(shares):.1%} ({alone:.1%}), in the whole model {rate:,.0f} tokens a second before communication."
        )


def _breakable(name: str) -> str:
    """A name that may be broken after its signs."""
    return re.sub(r"([:_+-])", r"\1<wbr>", escape(name))


def _bytes(count: int | None) -> str:
    if count is None:
        return ""
    for unit, scale in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}"
    return f"{count} B"


def _environment(name: str, r: Results) -> str:
    e = r.environment
    state = "no version control" if e.commit is None else e.commit + (" with changes" if e.dirty else "")
    facts = {
        "device": e.device,
        "measured": e.time,
        "command": e.command,
        "commit": state,
        "against": e.against or "",
        "clocks": ", ".join(f"{k} {v:,.0f} MHz" for k, v in e.clocks.items()) or "not stated by the system",
        "memory": _bytes(e.memory),
        "system": " ".join(filter(None, (e.system, f"driver {e.driver}" if e.driver else ""))),
        "versions": ", ".join([f"Python {e.python}", *(f"{k} {v}" for k, v in e.packages.items() if v)]),
        "not installed": ", ".join(k for k, v in e.packages.items() if not v),
        "instruction set": e.isa,
        "threads": f"{e.threads}, pinned: {e.pinned}",
        "allocator": e.allocator,
        **e.notes,
    }
    for limit in r.limits:
        unit = "GB/s" if limit.unit == "byte/s" else "Gflop/s"
        facts[f"limit: {limit.name}"] = f"{limit.rate / 1e9:,.1f} {unit} ({limit.how})"
    rows = "".join(f"<tr><th>{escape(k)}</th><td>{escape(v)}</td></tr>" for k, v in facts.items() if v)
    return f'<h3>{escape(name)}</h3><table class="facts"><tbody>{rows}</tbody></table>'


def _distinct(names: Iterable[str]) -> list[str]:
    """The names, numbered where their plots would be called the same."""
    given: dict[str, str] = {}
    for name in names:
        free, number = name, 1
        while _slug(free) in given:
            number += 1
            free = f"{name}-{number}"
        given[_slug(free)] = free
    return list(given.values())


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
