"""What the commands of benchmarks.gpu share: units of work in one process or several, the result's head and file."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.harness import first_line
from llama_fast.ops import dispatch, proven
from llama_fast.ops.table import OPS

ROOT = Path(__file__).parents[1]
OURS = ("cuda", "triton")
BACKENDS = (*OURS, "torch", "xformers")
Row = dict[str, Any]
Check = Callable[[Row, argparse.Namespace], Iterator[Row]]  # a unit -> its rows


def backends_of(op: str, asked: list[str]) -> list[str]:
    return [b.name for b in OPS[op].backends if b.name in asked]


def run_units(todo: list[Row], args: argparse.Namespace, out: Path, checks: dict[str, Check]) -> bool:
    """Runs units in this process and adds their rows to `out`; False where the device no longer answers."""
    for unit in todo:
        try:
            rows = list(checks[unit["kind"]](unit, args))
        except Exception as error:
            rows = [unit | {"backend": "all", "label": "", "problem": first_line(error)}]
        with out.open("a") as file:
            file.writelines(json.dumps(row | {"unit": unit}) + "\n" for row in rows or [unit])
        if args.device == "cuda":
            try:
                torch.cuda.synchronize()
            except Exception:
                return False
    return True


def in_process(todo: list[Row], args: argparse.Namespace, limit: float, checks: dict[str, Check]) -> list[Row]:
    """The rows of the units that this process ran within `limit` seconds."""
    end = time.perf_counter() + limit
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rows"
        out.touch()
        for unit in todo:
            if time.perf_counter() > end or not run_units([unit], args, out, checks):
                break
        return [json.loads(line) for line in out.read_text().splitlines()]


def in_processes(todo: list[Row], args: argparse.Namespace, limit: float) -> list[Row]:
    """The rows of the units that several processes ran within `limit` seconds: most of the time is Triton's compiler. A
    process whose device fails is started again with what it had left."""
    with tempfile.TemporaryDirectory() as folder:
        return _in_processes(todo, args, limit, Path(folder))


def _in_processes(todo: list[Row], args: argparse.Namespace, limit: float, folder: Path) -> list[Row]:
    end = time.perf_counter() + limit
    shares = {i: todo[i :: args.workers] for i in range(args.workers)}
    running: dict[int, subprocess.Popen[bytes]] = {}
    starts: defaultdict[int, int] = defaultdict(int)

    def rows_of(i: int) -> list[Row]:
        file = folder / f"rows{i}"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def left(i: int) -> list[Row]:
        seen = {json.dumps(r["unit"]) for r in rows_of(i)}
        return [u for u in shares[i] if json.dumps(u) not in seen]

    while time.perf_counter() < end:
        for i in shares:
            if i in running and running[i].poll() is None:
                continue
            rest = left(i)
            if i in running and rest and len(rest) == starts[i]:  # it died in its first unit: that one is the reason
                with (folder / f"rows{i}").open("a") as file:
                    row = rest[0] | {"backend": "all", "label": "", "problem": "the process died", "unit": rest[0]}
                    file.write(json.dumps(row) + "\n")
                rest = rest[1:]
            if rest:
                starts[i] = len(rest)
                (folder / f"todo{i}").write_text(json.dumps(rest))
                running[i] = subprocess.Popen(worker_command(args, folder, i), cwd=ROOT, stdout=2)
            else:
                running.pop(i, None)
        if not running:
            break
        time.sleep(0.2)
    for process in running.values():
        process.kill()
        process.wait()
    return [row for i in shares for row in rows_of(i)]


def worker_command(args: argparse.Namespace, folder: Path, i: int, command: str = "worker") -> list[str]:
    """A process that runs what todo<i> of the folder lists, and adds its rows to rows<i>."""
    flags = ["--device", args.device, "--backends", ",".join(args.backends), *["--tiny"] * args.tiny]
    files = ["--todo", str(folder / f"todo{i}"), "--out", str(folder / f"rows{i}")]
    limit = ["--limit", str(getattr(args, "limit_left", args.limit))]
    return [sys.executable, "-m", "benchmarks.gpu", command, *flags, *files, *limit]


def header(args: argparse.Namespace) -> Row:
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("triton", "xformers", "liger-kernel", "flash-attn", "transformers"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    device = torch.device(args.device)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
    return {
        "command": args.command,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        "device_class": proven.device_class(device),
        "versions": versions,
        "commit": args.commit or (commit.stdout.strip() if commit.returncode == 0 else "unknown"),
        "ops": args.ops,
        "available": {b.name: dispatch.unavailable(b.module) or "yes" for op in OPS.values() for b in op.backends},
    }


def output(args: argparse.Namespace, result: Row) -> Path:
    """Where a command's result goes."""
    slug = re.sub(r"[^a-z0-9]+", "-", str(result["device"]).lower()).strip("-")
    return Path(args.out or ROOT / "results" / f"{args.command}-{slug}.json")


def write(args: argparse.Namespace, result: Row, quiet: bool = False) -> None:
    out = output(args, result)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
    if quiet:
        return
    print(f"{result['device']} ({result['device_class']}), commit {result['commit'][:10]}, written: {out}")
    print(", ".join(f"{k} {str(v)[:24]}" for k, v in result["versions"].items()))
    print("backends: " + ", ".join(f"{k} {str(v)[:60]}" for k, v in result["available"].items()))
