"""The one format of result files: writer, reader and checks. README, report and comparisons are made from such files.

A file is JSON, one object:

    format        "llama_fast results 1"
    environment   where, with what and how it was measured, see `Environment`
    limits        what the machine did at best in the same run, see `Limit`
    lines         one a case, direction and provider, see `Line`

All times are seconds, all sizes bytes, all rates a second. A line is `measured`, or it is `wrong` (its results missed
the error budget: no time is given) or `not run`, each with its reason. `python -m benchmarks.results FILE...` checks
files. This module needs neither torch nor the library.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

FORMAT = "llama_fast results 1"
STATUSES = ("measured", "wrong", "not run")
DIRECTIONS = ("forward", "backward", "forward+backward", "step", "decode")
COPY = "copy"  # the name of the limit in bytes a second
PACKAGES = ("torch", "triton", "transformers", "xformers", "liger-kernel", "flash-attn", "numpy")

OURS = "llama_fast"  # what the names of our own providers begin with

Value = int | float | bool | str | None | list[int]  # of a size or an option


@dataclass(frozen=True)
class Environment:
    """Where the lines come from.

    Args:
        time: UTC, ISO 8601.
        command: what was run.
        commit: of the measured tree; None where it is under no version control (a wheel).
        dirty: the tree differed from its commit; None with no commit.
        against: the commit of the older side of a comparison, else None.
        device: name of the processor or GPU.
        kind: "cpu" or "cuda".
        clocks: name -> MHz, as the machine states them: "now", right after its limits were measured, "most", and a
            GPU's "memory".
        memory: bytes of the device.
        system: operating system and architecture.
        driver: of the GPU, else "".
        python: its version.
        packages: name -> version, None where it is not installed; "llama_fast" is among them.
        isa: the best instruction set that the native library uses here, else "".
        threads: of the CPU work.
        pinned: how threads are bound to cores, in words.
        allocator: its state, in words.
        notes: anything else that a reader must know, as `name -> text`.
    """

    time: str
    command: str
    commit: str | None
    dirty: bool | None
    against: str | None
    device: str
    kind: str
    clocks: dict[str, float]
    memory: int
    system: str
    driver: str
    python: str
    packages: dict[str, str | None]
    isa: str
    threads: int
    pinned: str
    allocator: str
    notes: dict[str, str]


@dataclass(frozen=True)
class Limit:
    """What the machine did at best, measured in the same run.

    Args:
        name: "copy", or "matmul <dtype>".
        unit: "byte/s" or "flop/s".
        rate: in that unit; of a copy, bytes read and written.
        how: what was run to find it.
    """

    name: str
    unit: str
    rate: float
    how: str


@dataclass(frozen=True)
class Seconds:
    """Time of one run: median, 20th and 80th percentile over `runs` runs."""

    median: float
    p20: float
    p80: float
    runs: int


@dataclass(frozen=True)
class Error:
    """The tensor nearest to, or furthest over, its budget: largest absolute error against float64."""

    tensor: str
    value: float
    budget: float


@dataclass(frozen=True)
class Line:
    """One provider on one case in one direction.

    Args:
        op: a row of the op table, or "block", "training_step", "decode".
        label: whose shape it is, for example "llama-7b"; "" for none.
        case: size of each letter, and the options that are not the default.
        dtype: "bfloat16" and so on.
        direction: one of DIRECTIONS.
        provider: "llama_fast:<backend>", "eager", "sdpa:flash", "torch.compile", "transformers" and so on.
        status: one of STATUSES.
        reason: why it is wrong or not run; "" if measured.
        seconds: None unless measured.
        bytes: least that must move.
        flops: least that must be done; 0 for a memory-bound op.
        limit: name of the limit that binds: the one by which bytes or flops take longer. None unless measured.
        share: time that the limit allows / median. None unless measured.
        peak_bytes: most memory during a run above that before it; None if not measured.
        kept_bytes: held between forward and backward, parameters left out; None if not measured.
        error: how far the results are from float64; None where they are compared in another way or not at all.
        tokens: handled by one run; None for an op.
        command: measures this line again.
    """

    op: str
    label: str
    case: dict[str, Value]
    dtype: str
    direction: str
    provider: str
    status: str
    reason: str
    seconds: Seconds | None
    bytes: int
    flops: int
    limit: str | None
    share: float | None
    peak_bytes: int | None
    kept_bytes: int | None
    error: Error | None
    tokens: int | None
    command: str

    @property
    def sizes(self) -> str:
        """The case as text: `B1 T2048 H32 interleaved=True`."""
        return sizes_text(self.case)

    @property
    def key(self) -> tuple[str, str, str, str]:
        """What the lines of one comparison have in common: all but the provider."""
        return self.op, self.sizes, self.dtype, self.direction


@dataclass(frozen=True)
class Results:
    """A result file."""

    format: str
    environment: Environment
    limits: tuple[Limit, ...]
    lines: tuple[Line, ...]


def is_ours(provider: str) -> bool:
    """Whether a provider of this name is this library."""
    return provider.partition(":")[0] == OURS


def sizes_text(case: Mapping[str, Value]) -> str:
    """A case as text: letters with their sizes, then options as name=value."""
    return " ".join(
        f"{name}{value}" if name.isupper() and not isinstance(value, bool) else f"{name}={value}"
        for name, value in case.items()
    )


def binding_limit(bytes_moved: int, flops: int, dtype: str, limits: Iterable[Limit]) -> tuple[Limit, float]:
    """The limit that takes longest for this work, and the seconds that it takes.

    Raises:
        ValueError: the limit that the work needs was not measured.
    """
    known = {limit.name: limit for limit in limits}
    found = []
    for name, work in ((COPY, bytes_moved), (f"matmul {dtype}", flops)):
        if work:
            if name not in known:
                raise ValueError(f"limits: no {name!r} among {', '.join(known) or 'none'}")
            found.append((work / known[name].rate, known[name]))
    if not found:
        raise ValueError("bytes and flops are both 0: expected work of one kind")
    seconds, limit = max(found, key=lambda pair: pair[0])
    return limit, seconds


def against(line: Line, limits: Sequence[Limit]) -> Line:
    """A measured line with its limit and its share of it; another one as it is.

    Raises:
        ValueError: the limit that the work needs was not measured.
    """
    if line.seconds is None:
        return line
    limit, least = binding_limit(line.bytes, line.flops, line.dtype, limits)
    return dataclasses.replace(line, limit=limit.name, share=least / line.seconds.median)


def better(first: Iterable[Limit], second: Iterable[Limit]) -> tuple[Limit, ...]:
    """Of two measurements of the same limits the faster ones: a limit is what the machine did at best."""
    return tuple(max(pair, key=lambda x: x.rate) for pair in zip(first, second, strict=True))


def geometric_mean(ratios: Sequence[float]) -> float:
    """The mean of ratios."""
    return statistics.geometric_mean(ratios)


def summary(samples: Sequence[float]) -> Seconds:
    """Median, 20th and 80th percentile of single runs, of which there are two at least."""
    fifths = statistics.quantiles(samples, n=5, method="inclusive")
    return Seconds(statistics.median(samples), fifths[0], fifths[3], len(samples))


# ---- reading, writing, checking -------------------------------------------------------------------------------------
def write(results: Results, path: Path) -> None:
    """Checks `results` and writes them, one line of the file a result line.

    Raises:
        ValueError: names the field that is wrong.
    """
    check(results)
    parts = dataclasses.asdict(results)
    text = [f' "format": {json.dumps(results.format)},']
    text.append(f' "environment": {json.dumps(parts["environment"], indent=1, allow_nan=False)},')
    for name, end in (("limits", ","), ("lines", "")):
        rows = ",\n".join(f"  {json.dumps(row, allow_nan=False)}" for row in parts[name])
        text.append(f' "{name}": [\n{rows}\n ]{end}')
    path.write_text("{\n" + "\n".join(text) + "\n}\n", encoding="utf-8")


def read(path: Path) -> Results:
    """The results of a file, checked.

    Raises:
        ValueError: names the file, the field, its value and what was expected.
        OSError: the file cannot be read.
    """
    try:
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"is no JSON ({error}), expected a result file, as `--json` writes it") from None
        if not isinstance(values, dict) or values.get("format") != FORMAT:
            found = values.get("format") if isinstance(values, dict) else type(values).__name__
            raise ValueError(f"format is {found!r}, expected {FORMAT!r}")
        results = _build(Results, values, "")
        check(results)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return results


def check(results: Results) -> None:
    """Raises unless the lines are consistent with themselves and with the limits.

    Raises:
        ValueError: names the line, the field, its value and what was expected.
    """
    if results.environment.kind not in ("cpu", "cuda"):
        raise ValueError(f"environment.kind is {results.environment.kind!r}, expected 'cpu' or 'cuda'")
    for limit in results.limits:
        if not 0 < limit.rate < math.inf:
            raise ValueError(f"limits: {limit.name} has rate {limit.rate}, expected a positive number")
    seen: set[tuple[Any, ...]] = set()
    for line in results.lines:
        where = f"line {' '.join((*line.key, line.provider))}"
        if (problem := _problem(line, results.limits)) is not None:
            raise ValueError(f"{where}: {problem}")
        if (*line.key, line.provider) in seen:
            raise ValueError(f"{where}: stands there twice")
        seen.add((*line.key, line.provider))


def _problem(line: Line, limits: Sequence[Limit]) -> str | None:
    if line.status not in STATUSES:
        return f"status is {line.status!r}, expected one of {', '.join(STATUSES)}"
    if line.direction not in DIRECTIONS:
        return f"direction is {line.direction!r}, expected one of {', '.join(DIRECTIONS)}"
    if line.status != "measured":
        if line.seconds is not None or line.share is not None:
            return f"seconds or share are given, expected none of a line that is {line.status!r}"
        return None if line.reason else f"reason is empty, expected one for status {line.status!r}"
    if line.reason:
        return f"reason is {line.reason!r}, expected none of a measured line"
    s = line.seconds
    if s is None or not 0 < s.p20 <= s.median <= s.p80 < math.inf or s.runs < 1:
        return f"seconds are {s}, expected 0 < p20 <= median <= p80"
    if not line.command:
        return "command is empty, expected one that measures the line again"
    try:
        limit, least = binding_limit(line.bytes, line.flops, line.dtype, limits)
    except ValueError as error:
        return str(error)
    if line.limit != limit.name:
        return f"limit is {line.limit!r}, expected {limit.name!r}"
    if line.share is None or not math.isclose(line.share, least / s.median, rel_tol=1e-6):
        return f"share is {line.share}, expected {least / s.median:.6g}"
    return None


def _build(kind: Any, value: Any, where: str) -> Any:
    """`value`, as JSON gave it, as an instance of the type `kind`."""
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    made: Any = kind
    if dataclasses.is_dataclass(kind):
        hints = typing.get_type_hints(kind)
        if not isinstance(value, dict) or set(value) != set(hints):
            found = sorted(value) if isinstance(value, dict) else type(value).__name__
            differing = sorted(set(hints) ^ set(value)) if isinstance(value, dict) else found
            raise ValueError(f"{where or 'the file'}: expected the fields {', '.join(hints)}; differs in {differing}")
        return made(**{name: _build(hint, value[name], f"{where}.{name}".strip(".")) for name, hint in hints.items()})
    if origin is tuple and isinstance(value, list):
        return tuple(_build(inner[0], item, f"{where}[{i}]") for i, item in enumerate(value))
    if origin is list and isinstance(value, list):
        return [_build(inner[0], item, f"{where}[{i}]") for i, item in enumerate(value)]
    if origin is dict and isinstance(value, dict):
        return {str(name): _build(inner[1], item, f"{where}.{name}") for name, item in value.items()}
    if origin in (types.UnionType, typing.Union):
        for option in inner:
            try:
                return _build(option, value, where)
            except ValueError:
                continue
    elif kind is type(None):
        if value is None:
            return None
    elif kind is float:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
    elif isinstance(kind, type) and type(value) is kind:
        return value
    raise ValueError(f"{where} is {value!r}, expected {getattr(kind, '__name__', kind)}")


# ---- the environment ------------------------------------------------------------------------------------------------
def environment(
    *,
    root: Path,
    kind: str,
    device: str,
    memory: int,
    clocks: Mapping[str, float],
    threads: int,
    allocator: str,
    isa: str = "",
    driver: str = "",
    against: str | None = None,
    commit: str | None = None,
    command: Sequence[str] | None = None,
    notes: Mapping[str, str] | None = None,
) -> Environment:
    """The environment of a run in this process.

    Args:
        root: folder of the measured tree, the parent of the package.
        commit: where the tree has no version control (a copy on another machine); its state then counts as clean.
        command: what was run; by default this process's own command line.
        kind, device, memory, clocks, threads, allocator, isa, driver, against, notes: as in `Environment`.
    """
    found = None if commit else revision(root)
    versions: dict[str, str | None] = {"llama_fast": _package_version(root)}
    versions |= {name: _version(name) for name in PACKAGES}
    pinning = [f"{name}={os.environ[name]}" for name in ("OMP_PROC_BIND", "OMP_PLACES") if os.environ.get(name)]
    return Environment(
        time=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        command=" ".join(command) if command is not None else command_line(),
        commit=commit or (found[0] if found else None),
        dirty=False if commit else (found[1] if found else None),
        against=against,
        device=device,
        kind=kind,
        clocks=dict(clocks),
        memory=memory,
        system=f"{platform.system()} {platform.release()} {platform.machine()}",
        driver=driver,
        python=platform.python_version(),
        packages=versions,
        isa=isa,
        threads=threads,
        pinned=", ".join(pinning) or "no: the system places the threads",
        allocator=allocator,
        notes=dict(notes or {}),
    )


def command_line() -> str:
    """How this process was started, without the places of this machine."""
    original = list(sys.orig_argv)
    if len(original) > 2 and original[1] == "-m":
        return " ".join(["python", *original[1:]])
    return " ".join([Path(sys.argv[0]).name, *sys.argv[1:]])


def revision(root: Path) -> tuple[str, bool] | None:
    """(commit, dirty) of the tree at `root`; None where the package there is under no version control."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
        except OSError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    if git("ls-files", "--error-unmatch", "llama_fast/__init__.py") is None:
        return None
    head, changes = git("rev-parse", "HEAD"), git("status", "--porcelain")
    return None if head is None or changes is None else (head, bool(changes))


def cpu_clocks() -> dict[str, float]:
    """The processor's clock now and at most in MHz, as far as the system says; a virtual machine may state neither."""
    found = {}
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        now = [float(line.partition(":")[2]) for line in lines if line.startswith("cpu MHz")]
        if now:
            found["now"] = statistics.fmean(now)
        found["most"] = int(Path("/sys/devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq").read_text()) / 1000
    except (OSError, ValueError):
        pass
    return found


def gpu_state() -> tuple[dict[str, float], str]:
    """(clocks of the first GPU in MHz: "now", "most" and "memory"; its driver's version), as nvidia-smi states them."""
    fields = ("clocks.sm", "clocks.max.sm", "clocks.mem", "driver_version")
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits", "--id=0"]
    try:
        values = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip().split(", ")
        return dict(zip(("now", "most", "memory"), map(float, values[:3]), strict=True)), values[3]
    except (OSError, ValueError, subprocess.CalledProcessError):
        return {}, ""


def cpu_name() -> str:
    """The processor's own name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())


def cpu_memory() -> int:
    """Bytes of this machine's memory."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _version(name: str) -> str | None:
    if name == "torch":
        import torch

        return str(torch.__version__)  # a wheel of PyPI is "2.13.0" to pip, and "2.13.0+cu130" to itself
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _package_version(root: Path) -> str | None:
    try:
        text = (root / "llama_fast" / "__init__.py").read_text(encoding="utf-8")
    except OSError:
        return None
    return next((line.split('"')[1] for line in text.splitlines() if line.startswith("__version__")), None)


def main(paths: Sequence[str]) -> int:
    """Checks files; says what is wrong and returns 1 if one is, 2 where none is named."""
    if not paths:
        print("usage: python -m benchmarks.results FILE...", file=sys.stderr)
        return 2
    bad = 0
    for name in paths:
        try:
            found = read(Path(name))
            print(f"{name}: {len(found.lines)} lines on {found.environment.device}")
        except (ValueError, OSError) as error:
            bad += 1
            print(error, file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
