"""What nvcc made of the CUDA kernels: registers, stack, static shared memory and instructions, held to sass_cuda.toml.

    python -m benchmarks.sass_cuda        every kernel's figures by architecture, and what breaks the budget

Needs no GPU: cuobjdump reads the built library.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

BUDGET = Path(__file__).with_name("sass_cuda.toml")
LOCAL = ("LDL", "STL")  # what a spill is made of
# in a mangled name, the first integer of the template: the variant for rows off the 16-byte boundary
ELEMENTWISE = re.compile(r"kernelI(?:(?!Li\d).)*Li1E")


@dataclass(frozen=True)
class Usage:
    """One instantiation of a kernel on one architecture.

    `name` is mangled; `instructions` are the opcodes with their modifiers, as LDG.E.128.
    """

    kernel: str
    name: str
    architecture: str
    registers: int
    stack: int
    shared: int
    instructions: frozenset[str]


def library() -> Path | None:
    """The built CUDA library, or None."""
    spec = importlib.util.find_spec("llama_fast._native_cuda")
    return None if spec is None or spec.origin is None else Path(spec.origin)


def cuobjdump() -> str | None:
    """CUDA's or Triton's, or None."""
    found = shutil.which("cuobjdump")
    spec = importlib.util.find_spec("triton")
    if found is None and spec is not None and spec.origin is not None:
        found = shutil.which("cuobjdump", path=str(Path(spec.origin).parent / "backends" / "nvidia" / "bin"))
    return found


def unavailable() -> str | None:
    """Why nothing can be read here, or None."""
    if library() is None:
        return "the CUDA library is not built"
    return None if cuobjdump() else "no cuobjdump: CUDA's toolkit and Triton have one"


def read(path: Path) -> list[Usage]:
    """Every kernel of a library, for every architecture."""

    def dump(option: str) -> str:
        command = [str(cuobjdump()), option, str(path)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    sizes: dict[tuple[str, str], tuple[int, int, int]] = {}
    architecture = name = ""
    for line in dump("-res-usage").splitlines():
        if found := re.match(r"arch = (\w+)", line):
            architecture = found[1]
        elif found := re.match(r"\s*Function (\w+):", line):
            name = found[1]
        elif found := re.match(r"\s*REG:(\d+) STACK:(\d+) SHARED:(\d+)", line):
            sizes[architecture, name] = (int(found[1]), int(found[2]), int(found[3]))
    instructions: dict[tuple[str, str], set[str]] = {}
    current: set[str] = set()
    for line in dump("-sass").splitlines():
        if found := re.match(r"arch = (\w+)", line):
            architecture = found[1]
        elif found := re.match(r"\s*Function : (\w+)", line):
            current = instructions.setdefault((architecture, found[1]), set())
        elif found := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+ )?([A-Z][\w.]*)", line):
            current.add(found[1])
    usages = []
    for (architecture, name), (registers, stack, shared) in sizes.items():
        kernel = re.search(r"\d((?:[a-z]+\d*_)+kernel)", name)
        if kernel:
            opcodes = frozenset(instructions[architecture, name])
            short = f"sm90_{kernel[1]}" if "4sm90" in name else kernel[1]  # of the namespace sm90
            usages.append(Usage(short, name, architecture, registers, stack, shared, opcodes))
    return usages


def budget() -> dict[str, Any]:
    """sass_cuda.toml: kernel -> registers by architecture, shared, instructions."""
    return tomllib.loads(BUDGET.read_text())


def problems(usages: list[Usage], limits: dict[str, Any]) -> list[str]:
    """What breaks the budget, a sentence each."""
    found = []
    for u in usages:
        where = f"{u.kernel} for {u.architecture} ({u.name})"
        limit = limits.get(u.kernel)
        if limit is None:
            found.append(f"{where}: not in {BUDGET.name}")
            continue
        if u.stack or any(op.startswith(LOCAL) for op in u.instructions):
            found.append(f"{where}: spills: {u.stack} bytes of stack")
        most = limit["registers"].get(u.architecture)
        if most is None:
            found.append(f"{where}: no registers for it in {BUDGET.name}")
        elif u.registers > most:
            found.append(f"{where}: {u.registers} registers, at most {most}")
        if u.shared > limit["shared"]:
            found.append(f"{where}: {u.shared} bytes of static shared memory, at most {limit['shared']}")
        for wanted in limit["instructions"]:
            if not ELEMENTWISE.search(u.name) and not any(op.startswith(wanted) for op in u.instructions):
                found.append(f"{where}: no {wanted}")
    built = {u.kernel for u in usages}
    architectures = {u.architecture for u in usages}
    for kernel, limit in limits.items():
        if kernel not in built and architectures & set(limit["registers"]):
            found.append(f"{kernel}: in {BUDGET.name}, and not in the library")
    return found


def main() -> None:
    """Prints the figures; exits with 1 where the budget is broken."""
    path = library()
    if path is None or unavailable():
        sys.exit(f"sass_cuda: {unavailable()}")
    usages = read(path)
    rows: dict[tuple[str, str], list[Usage]] = {}
    for u in usages:
        rows.setdefault((u.kernel, u.architecture), []).append(u)
    for (kernel, architecture), group in sorted(rows.items()):
        registers, shared = max(u.registers for u in group), max(u.shared for u in group)
        print(f"{kernel:36} {architecture:8} {len(group):3} kernels, registers {registers:3}, shared {shared:5}")
    broken = problems(usages, budget())
    print("\n".join(broken) or "within the budget")
    sys.exit(bool(broken))


if __name__ == "__main__":
    main()
