"""One question, one file: the shape of the tree, and the rules that source text can show."""

from __future__ import annotations

import ast
import inspect
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import llama_fast as lf
from llama_fast.ops import native
from llama_fast.ops.table import OPS

ROOT = Path(__file__).parents[1]
HOME_OF = {"add_rms_norm": "rms_norm"}  # ops that share the files of another
STEMS = sorted({HOME_OF.get(op, op) for op in OPS})
SKIPPED = {"build", "build-asan", "dist", "demo", "runs", "__pycache__", "node_modules"}
CODE = {".py", ".h", ".cpp", ".cu", ".cuh"}
# Files that are about no single op, each with what it is for.
SHARED = {
    "csrc/cuda": {
        "bindings": "Python's view",
        "ops": "declarations",
        "device": "what a kernel is written in",
        "launch": "launching",
        "stream": "the device of a stream",
        "ptx": "instructions of sm_80",
        "ptx_sm90": "of sm_90a",
        "ptx_wgmma": "and its matrix products",
        "tensor_map": "TMA's descriptors",
        "vec": "16-byte pieces",
        "reduce": "sums over a block",
    },
    "csrc/cpu": {
        "isa": "instruction sets",
        "memory": "the host allocator",
        "linear": "the matrix-vector product",
        "brgemm": "a product by oneDNN's tiles",
        "decode": "a whole step of a decode",
        "transpose": "first operands the other way round",
        "argmax": "its greedy choice",
    },
    "llama_fast/ops": {
        "table": "the rows",
        "dispatch": "the choice",
        "library": "loading the native ones",
        "native": "launchers",
        "reference": "truth",
        "eager": "yardstick",
        "linear": "which matrix product",
        "chunks": "linear_cross_entropy by chunks, for every backend",
        "pieces": "its dweight by blocks of classes, for GPUs",
        "cuda": "launchers of the CUDA library",
        "proven": "which GPU kernels are chosen by default",
        "flops": "operations, for FlopCounterMode",
        "vendor": "PyTorch's own ops",
        "vendor_xformers": "xFormers'",
    },
    "kernels": {"launch": "launch parameters"},
    "benchmarks": {
        "harness": "timing",
        "suite": "all of them",
        "block": "the block",
        "model": "the model",
        "floors": "floors.toml",
        "gpu": "the GPU kernels on a GPU",
        "gpu_bench": "their speed",
        "gpu_cases": "what is checked",
        "gpu_model": "what is checked beyond single ops",
        "gpu_run": "units of work in processes",
        "gpu_time": "timing on a GPU",
        "sass_cuda": "what nvcc made of the CUDA kernels",
        "sass": "what the compiler made of the Triton kernels",
        "machine_code": "what stands in a compiled kernel",
        "providers": "who can compute an op",
        "compare": "two versions in turn",
        "worker": "one side of compare",
        "readme": "README's results",
        "gpu_results": "a GPU bench as a result file",
        "plots": "plots of a report",
        "report": "result files as a page",
        "results": "the format of result files",
        "LOG": "what was tried, and what it gave",
    },
    "docs/ops": {"linear": "which matrix product"},
}
# Tests of several files at once; every other tests/test_X.py tests a module or an op called X.
CROSS_CUTTING = {
    "layout",
    "packaging",
    "bad_input",
    "readme",
    "native",
    "determinism",
    "benchmarks",
    "emulator",
    "cuda",
    "triton",
    "architectures",
    "sass",
    "gpu",
}


def _files(*suffixes: str, under: str = ".") -> Iterator[Path]:
    for folder, folders, names in os.walk(ROOT / under):
        folders[:] = sorted(f for f in folders if f not in SKIPPED and not f.startswith(".") and "egg-info" not in f)
        yield from (Path(folder, n) for n in sorted(names) if Path(n).suffix in suffixes)


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _matches(path: Path, pattern: str) -> list[str]:
    lines = path.read_text().splitlines()
    return [f"{_name(path)}:{i}: {line.strip()}" for i, line in enumerate(lines, 1) if re.search(pattern, line)]


@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize(
    "place",
    [
        "csrc/cpu/{}.cpp|csrc/cpu/{}_fwd.cpp",
        "csrc/cuda/{}.cu",
        "kernels/{}.py",
        "llama_fast/ops/{}.py",
        "tests/test_{}.py",
        "benchmarks/{}.py",
        "docs/ops/{}.md",
    ],
)
def test_each_op_has_each_file(stem: str, place: str) -> None:
    candidates = [p.format(stem) for p in place.split("|")]
    assert any((ROOT / c).is_file() for c in candidates), f"op {stem}: expected {' or '.join(candidates)}"


@pytest.mark.parametrize("folder", SHARED)
def test_no_orphans(folder: str) -> None:
    for path in _files(".py", ".cpp", ".cu", ".cuh", ".md", under=folder):
        known = path.stem in SHARED[folder] or path.stem.startswith("__")
        known = known or any(path.stem == s or path.stem.startswith(f"{s}_") for s in STEMS)
        assert known, f"{_name(path)} belongs to no op of the table, and SHARED in tests/test_layout.py lacks it"


def test_no_orphan_tests() -> None:
    modules = {p.stem for p in _files(".py", under="llama_fast")} | {"__init__"}
    modules |= {p.parent.name for p in _files(".py", under="llama_fast")} | CROSS_CUTTING
    for path in _files(".py", under="tests"):
        if path.stem.startswith("test_"):
            words = path.stem.removeprefix("test_").split("_")
            prefixes = {"_".join(words[:n]) for n in range(1, len(words) + 1)}
            assert prefixes & modules, f"{_name(path)}: no module, op or cross-cutting subject of that name"


def test_every_folder_of_the_package_is_a_package() -> None:
    for path in _files(".py", under="llama_fast"):
        assert (path.parent / "__init__.py").is_file(), f"{_name(path.parent)} has no __init__.py"


def test_every_op_is_public() -> None:
    for op in OPS:
        assert op in lf.__all__, f"{op} is a row of the table and no public name"
        parameters = list(inspect.signature(getattr(lf, op)).parameters)
        public = list(OPS[op].public)
        assert [p for p in parameters if p in public] == public, f"{op}: tensors of the table and of the function"


# not linear_cross_entropy: its native part is cross_entropy_rows, a chunk of rows; native.py makes the primitive of it
NATIVE = [op for op in OPS if op != "linear_cross_entropy"]


@pytest.mark.parametrize("primitive", [f"{op}_{direction}" for op in NATIVE for direction in ("fwd", "bwd")])
def test_launcher_parameters_are_the_schemas(primitive: str) -> None:
    name, direction = primitive.rsplit("_", 1)
    if native._native is None:
        pytest.skip("the native library is not built")
    signature = getattr(native._native.cpu, primitive).__doc__.splitlines()[0]
    found = re.findall(r"(\w+): ", signature[signature.index("(") : signature.rindex(")")])
    schema = OPS[name].schema(direction)
    assert found == [a.name for a in (*schema.args, *schema.results)]


CUDA = [op for op in NATIVE if any(b.name == "cuda" for b in OPS[op].backends)]


@pytest.mark.parametrize("primitive", [f"{op}_{direction}" for op in CUDA for direction in ("fwd", "bwd")])
def test_cuda_launcher_parameters_are_the_schemas_and_a_stream(primitive: str) -> None:
    """And before the stream, perhaps, scratch."""
    name, direction = primitive.rsplit("_", 1)
    text = (ROOT / "csrc" / "cuda" / "bindings.cpp").read_text()
    call = re.search(rf'bind\(module, "{primitive}", &cuda::{primitive}, ([^;]*)\);', text)
    assert call, f"{primitive} is not bound in csrc/cuda/bindings.cpp"
    schema = OPS[name].schema(direction)
    expected = [a.name for a in (*schema.args, *schema.results)]
    assert re.findall(r'"(\w+)"', call[1])[: len(expected)] == expected


TRITON = [op for op in OPS if any(b.name == "triton" for b in OPS[op].backends)]


@pytest.mark.parametrize("primitive", [f"{op}_{direction}" for op in TRITON for direction in ("fwd", "bwd")])
def test_triton_launcher_parameters_are_the_schemas(primitive: str) -> None:
    name, direction = primitive.rsplit("_", 1)
    (b,) = (b for b in OPS[name].backends if b.name == "triton")
    path = ROOT / "kernels" / f"{b.module.rpartition('.')[2]}.py"
    functions = [n for n in ast.parse(path.read_text()).body if isinstance(n, ast.FunctionDef) and n.name == primitive]
    if name == "linear_cross_entropy":  # made by llama_fast/ops/chunks.py
        assert "chunks.primitives(" in path.read_text()
        return
    assert [a.arg for a in functions[0].args.args] == [a.name for a in OPS[name].schema(direction).args]


def test_native_functions_that_are_no_launchers_are_few() -> None:
    if native._native is None:
        pytest.skip("the native library is not built")
    launchers = {f"{op}_{direction}" for op in OPS for direction in ("fwd", "bwd")}
    declared = (ROOT / "csrc" / "ops.h").read_text()
    for name in dir(native._native.cpu):
        if not name.startswith("_") and name not in launchers:
            assert re.search(rf"\b{name}\b|\b{name[:-1]}_count\b", declared), f"{name} is bound, and not in csrc/ops.h"


def test_intrinsics_stand_in_simd_headers_only() -> None:
    for path in _files(".h", ".cpp", under="csrc"):
        if not path.name.startswith("simd"):
            assert not (found := _matches(path, r"\b_mm\d*_|\b__m(128|256|512)|immintrin")), found


def test_asm_stands_in_ptx_headers_and_one_of_the_cpu_only() -> None:
    """simd_amx.h: g++ 10 has no intrinsics for matrix registers, and those of 11 and 12 do not say that they read."""
    for path in _files(".h", ".cpp", ".cu", ".cuh", under="csrc"):
        if not path.name.startswith("ptx") and path.name != "simd_amx.h":
            assert not (found := _matches(path, r"\b(__)?asm(__)?\b *(volatile)?\b *\(")), found


def test_no_torch_in_csrc() -> None:
    for path in _files(".h", ".cpp", ".cu", ".cuh", under="csrc"):
        assert not (found := _matches(path, r"#\s*include\s*[<\"](torch|ATen|c10)")), found
    assert "Torch" not in (ROOT / "CMakeLists.txt").read_text()


def test_no_source_file_over_600_lines() -> None:
    long = {_name(p): n for p in _files(*CODE) if (n := len(p.read_text().splitlines())) > 600}
    assert not long, long


def test_no_left_overs() -> None:
    unfinished = "|".join(("TO" + "DO", "FIX" + "ME", "XX" + "X"))
    for path in _files(*CODE, ".md", ".toml", ".txt"):
        assert not (found := _matches(path, rf"\b({unfinished})\b")), found


def test_no_paths_of_one_machine() -> None:
    places = "|".join(f"/{place}/" for place in ("home", "root", "work", "Users"))
    for path in [*_files(*CODE, ".md", ".toml", ".txt", ".yaml", ".yml"), ROOT / "Makefile", ROOT / ".ci" / "run"]:
        assert not (found := _matches(path, rf"(?<![\w.\])*]){places}\w")), found


def test_links_in_documents_resolve() -> None:
    for path in _files(".md"):
        text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
        for target in re.findall(r"\]\(([^)\s]+)\)", text):
            if not re.match(r"[a-z]+:|#", target):
                assert (path.parent / target.partition("#")[0]).exists(), f"{_name(path)}: no {target}"


def test_documents_name_files_that_exist() -> None:
    """`csrc/...`, `llama_fast/...` and the like in backticks are paths in this tree."""
    pattern = r"`((?:csrc|llama_fast|tests|benchmarks|docs)/[\w./-]+\.(?:py|h|cpp|md|toml))`"
    for path in _files(".md"):
        for target in re.findall(pattern, path.read_text()):
            stand_in = re.search(r"\bX\b|_X\b", target)
            assert stand_in or (ROOT / target).exists(), f"{_name(path)}: no {target}"


@pytest.mark.parametrize("op", OPS)
def test_docstrings_of_ops_are_complete(op: str) -> None:
    text = inspect.getdoc(getattr(lf, op)) or ""
    sections = ("Args:", "Returns:", "Gradient:", "Memory:", "Error:", "Repeats:", "Raises:", "ValueError:")
    assert not (missing := [s for s in (*sections, "NotSupported:") if s not in text]), missing
    _assert_args_are_documented(op, getattr(lf, op))


def test_public_names_are_documented() -> None:
    for name in lf.__all__:
        value = getattr(lf, name)
        assert inspect.getdoc(value), f"{name} has no docstring"
        if inspect.isclass(value) and not issubclass(value, BaseException):
            _assert_args_are_documented(name, value)


def _assert_args_are_documented(name: str, value: object) -> None:
    text = inspect.getdoc(value) or ""
    for parameter in inspect.signature(value).parameters:  # type: ignore[arg-type]
        assert re.search(rf"^\s+[\w, ]*\b{parameter}\b[\w, ]*:", text, re.MULTILINE), f"{name}: no Args: {parameter}"


def test_public_functions_of_the_package_have_docstrings() -> None:
    """All but the launchers and the reference's and eager's functions, which the header of their file describes."""
    described = {"native.py", "cuda.py", "reference.py", "eager.py", "table.py", "vendor.py", "vendor_xformers.py"}
    bare = []
    for path in _files(".py", under="llama_fast"):
        if path.name not in described:
            for node in ast.parse(path.read_text()).body:
                public = isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_")
                if public and ast.get_docstring(node) is None:
                    bare.append(f"{_name(path)}: {node.name}")
    assert not bare, bare


def test_raised_errors_are_documented() -> None:
    """A public function of the package that raises ValueError in its own body says so."""
    silent = []
    for path in _files(".py", under="llama_fast"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                raised = [n for n in ast.walk(node) if isinstance(n, ast.Raise) and isinstance(n.exc, ast.Call)]
                raised = [n for n in raised if isinstance(n.exc.func, ast.Name)]  # type: ignore[union-attr]
                text = ast.get_docstring(node) or ""
                if raised and "Raise" not in text and not text.startswith("See `"):
                    silent.append(f"{_name(path)}:{node.lineno} {node.name}")
    assert not silent, silent
