"""The commands of benchmarks.gpu, dry: small cases on a CPU, the Triton kernels under the interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import gpu, gpu_bench, gpu_cases, gpu_results, gpu_run, gpu_time, harness, providers, results
from llama_fast.ops import pieces
from llama_fast.ops.table import OPS
from llama_fast.verify import Case

ROOT = Path(__file__).parents[1]
INTERPRETED = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "LLAMA_FAST_BACKEND": ""}


def dry(tmp_path: Path, command: str, *flags: str) -> tuple[Any, str]:
    """Result and output of a command in a process of its own."""
    out = tmp_path / "result.json"
    call = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "benchmarks.gpu",
        command,
        "--device",
        "cpu",
        "--tiny",
        "--out",
        str(out),
    ]
    done = subprocess.run(
        [*call, *flags], cwd=ROOT, env=os.environ | INTERPRETED, text=True, capture_output=True, check=False
    )
    assert out.exists(), done.stdout + done.stderr
    return json.loads(out.read_text()), done.stdout


def test_test(tmp_path: Path) -> None:
    result, text = dry(tmp_path, "test", "--ops", "swiglu", "--workers", "1")
    assert result["not_run"] == []
    found = {(r["kind"], r["backend"], r["dtype"]): r for r in result["rows"]}
    assert {k for k, r in found.items() if "problem" in r} == {
        *(("budget", "triton", d) for d in gpu_cases.DTYPES),
        ("repeat", "triton", "bfloat16"),
        ("compile", "triton", "bfloat16"),
    }
    assert found["repeat", "triton", "bfloat16"]["problem"] == ""
    assert found["compile", "triton", "bfloat16"]["problem"] == ""
    assert 0 < found["budget", "triton", "float32"]["share"] <= 1
    assert "swiglu" in text


def test_bench_and_proof(tmp_path: Path) -> None:
    result, text = dry(tmp_path, "bench", "--ops", "swiglu", "--workers", "1", "--limit", "30")
    timed = {(r["provider"], r["direction"]) for r in result["rows"] if "seconds" in r}
    assert {(p, d) for p in ("llama_fast:triton", "eager") for d in ("fwd", "bwd")} <= timed
    assert result["rates"]["copy"] > 0
    assert "swiglu tiny bf16 fwd: " in text
    assert any("liger" in r["provider"] for r in result["rows"])
    (path,) = tmp_path.glob("*.results.json")
    lines = results.read(path).lines
    measured = {(x.provider, x.direction) for x in lines if x.seconds is not None}
    assert {(p, d) for p in ("llama_fast:triton", "eager") for d in ("forward", "backward")} <= measured
    assert any(x.provider == "liger" and x.status == "not run" and x.reason for x in lines)
    kept = {(x.provider, x.direction): x.kept_bytes for x in lines if x.seconds is not None}
    assert kept["llama_fast:triton", "forward"] is None
    of_two = 2 * 2 * lines[0].case["R"] * lines[0].case["F"]  # gate and up in bfloat16
    assert kept["llama_fast:triton", "backward"] == of_two < kept["eager", "backward"]


RATES = {"copy": 1e12, "matmul bfloat16": 1e15, "matmul float32": 5e13}


def test_every_timed_case_has_a_limit() -> None:
    """So that no run of minutes ends without its results."""
    time = {"seconds": 1.0, "low": 1.0, "high": 1.0, "runs": 9, "no_graph": "", "peak": 0}
    for op in OPS:
        todo = gpu_bench.cases_of(op, False)
        rows = [
            {"op": op, "case": b.label, "dtype": harness.dtype_name(b.dtype), "provider": "eager", "direction": d}
            | time
            for b in todo
            for d in (("both",) if op in gpu_results.TOGETHER else ("fwd", "bwd"))
        ]
        found = gpu_results.of(rows, todo, RATES, "cpu", "sm_90", commit="c0ffee")
        assert len(found.lines) == len(rows)
        assert all(x.limit and x.share for x in found.lines)
        gpu_bench._rate(rows, gpu.parse(["bench", "--device", "cpu", "--ops", op]), RATES)
        assert all(r["share"] for r in rows)


def test_rows_become_lines() -> None:
    case = Case("attention", {"B": 1, "T": 8, "S": 8, "H": 2, "G": 2, "D": 16})
    loss = Case("linear_cross_entropy", {"...": (8,), "C": 16, "V": 32})
    todo = [harness.Benchmark(c, torch.bfloat16, "small", device="cuda") for c in (case, loss)]
    base = {"op": "attention", "case": "small", "dtype": "bfloat16"}
    # a median below the 20th: rounding
    time = {"seconds": 1e-3, "low": 1.1e-3, "high": 1.2e-3, "runs": 9, "no_graph": ""}
    rows = [
        base | {"provider": "llama_fast:triton", "direction": "bwd", "peak": 0} | time,
        base | {"provider": "sdpa:flash", "direction": "bwd", "peak": 5, "kept": 7} | time,
        base | {"provider": "liger", "problem": "not installed: pip install liger-kernel"},
        base | {"provider": "llama_fast:cuda", "problem": "gradient 0 is 0.3 of its size away"},
        base | {"op": loss.op, "provider": "torch.compile", "problem": "no time left"},
        {"op": loss.op, "case": "small", "problem": "no time left"},
        base | {"provider": "sdpa:flash", "problem": "RuntimeError: its forward cannot be captured"},
    ]
    found = gpu_results.of(rows, todo, RATES, "cpu", "sm_90", commit="c0ffee")
    results.check(found)
    assert found.environment.commit == "c0ffee"
    lines = {(x.provider, x.direction): x for x in found.lines}
    assert set(lines) == {
        *(("llama_fast:triton", "backward"), ("liger", "forward"), ("liger", "backward")),
        *(("sdpa:flash", "forward"), ("sdpa:flash", "backward")),
        *(("llama_fast:cuda", "forward"), ("llama_fast:cuda", "backward"), ("torch.compile", "forward+backward")),
    }
    ours = lines["llama_fast:triton", "backward"]
    assert (ours.flops, ours.limit) == (10 * 2 * 16 * 36, "copy")
    assert lines["sdpa:flash", "backward"].peak_bytes == 5
    assert lines["sdpa:flash", "backward"].kept_bytes == 7
    assert lines["sdpa:flash", "forward"].status == "not run"
    assert lines["llama_fast:cuda", "forward"].status == "wrong"
    assert lines["torch.compile", "forward+backward"].reason == "no time left"


def test_bench_goes_on_without_the_providers_that_raise_or_end_their_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    told = {"aborts": "ended the process (exit status -6)", "raises": "ZeroDivision"}
    code = (
        "import os, sys\n"
        "from benchmarks import gpu, gpu_bench\n"
        "from benchmarks.providers import Provider\n"
        "providers = gpu_bench.providers\n"
        "bad = [Provider('aborts', lambda **k: os.abort()), Provider('raises', lambda **k: 1 / 0)]\n"
        "gpu_bench.providers = lambda *a: [*providers(*a), *bad]\n"
        "raise SystemExit(gpu.main(sys.argv[1:]))\n"
    )
    command = gpu_run.worker_command

    def bad(*args: Any) -> list[str]:
        python, _, _, *rest = command(*args)
        return [python, "-c", code, *rest]

    monkeypatch.setattr(gpu_bench, "worker_command", bad)
    out = tmp_path / "bench.json"
    flags = ["--device", "cpu", "--tiny", "--ops", "swiglu", "--workers", "1", "--limit", "60"]
    assert gpu.main(["bench", *flags, "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    bad_rows = [r for r in result["rows"] if r.get("provider") in told and r["case"] == "tiny"]
    assert sorted(r["provider"] for r in bad_rows) == sorted(told)
    assert all(told[r["provider"]] in r["problem"] for r in bad_rows), bad_rows
    assert {(r["provider"], r["direction"]) for r in result["rows"] if "seconds" in r} >= {
        ("eager", "fwd"),
        ("eager", "bwd"),
    }
    assert all("share" in r for r in result["rows"] if "seconds" in r)
    assert "swiglu eager" in result["launch_seconds"]


def test_tune(tmp_path: Path) -> None:
    result, _ = dry(tmp_path, "tune", "--ops", "swiglu", "--workers", "1")
    assert {r["kernel"] for r in result["rows"]} == {"swiglu_fwd", "swiglu_bwd"}
    assert sum("(heuristic)" in r["parameters"] for r in result["rows"]) == 2


def test_sanitize_runs_its_worker_under_each_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a program that takes the tool's flags, writes its log and runs the rest."""
    program = tmp_path / "compute-sanitizer"
    program.write_text(
        '#!/bin/sh\necho "$2" >> "$(dirname "$0")/tools"\n'
        'echo "===== ERROR SUMMARY: 0 errors" > "$4"; shift 6; exec "$@"\n'
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    result, text = dry(tmp_path, "sanitize", "--ops", "swiglu")
    assert sorted((tmp_path / "tools").read_text().split()) == ["memcheck", "racecheck", "synccheck"]
    assert [(r["status"], r["ran"], len(r["summary"])) for r in result["rows"]] == [("0", ["swiglu triton"], 1)] * 3
    assert "0 errors" in text


def test_a_case_that_raises_is_red_and_the_run_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise RuntimeError("a kernel broke\nand said more")

    args = gpu.parse(["test", "--device", "cpu", "--tiny", "--backends", "torch", "--workers", "1"])
    monkeypatch.setattr(gpu, "measure", broken)
    out = tmp_path / "rows"
    todo = [u for u in gpu.units(["attention"], True) if u["kind"] == "budget"]
    assert gpu_run.run_units(
        [*todo, {"kind": "budget", "op": "attention", "case": 99, "dtype": "float32"}], args, out, gpu.CHECKS
    )
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    problems = [r["problem"] for r in rows]
    assert problems == ["RuntimeError: a kernel broke"] * 3 + ["IndexError: list index out of range"]


def test_a_vendors_error_is_counted_apart(capsys: pytest.CaptureFixture[str]) -> None:
    row = {"kind": "budget", "op": "swiglu", "dtype": "float32", "label": "F8", "share": 3.0, "problem": "too far"}
    assert gpu._print_test([row | {"backend": "torch"}, row | {"backend": "triton", "problem": ""}], [], 1.0) == 0
    text = capsys.readouterr().out
    assert "2 checks, 0 red, 1 of a vendor over budget" in text
    assert "vendor over budget: swiglu torch float32 F8: too far" in text
    for backend in ("triton", "all"):
        assert gpu._print_test([row | {"backend": backend}], [], 1.0) == 1
        assert "1 red" in capsys.readouterr().out


class _Capture:
    """torch.cuda.graph, whose end raises over whatever happened inside."""

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: Any) -> None:
        raise RuntimeError("operation failed due to a previous error during capture")


def test_why_a_call_could_not_be_captured_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = gpu_time.Clock(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", _Capture)
    monkeypatch.setattr(gpu_time.Clock, "wait", lambda self: None)
    clock.gpu, calls = True, iter((1, 1, 1, 0))
    prepared = clock.prepare(lambda: 1 / next(calls))
    last = "RuntimeError: operation failed due to a previous error during capture"
    assert prepared.no_graph == f"{last} after ZeroDivisionError: division by zero"


def test_inputs_and_gradients_of_a_provider_are_its_own() -> None:
    """A kernel that writes over what it is given, as Liger-Kernel's rope does, changes nothing for the others."""

    class Rude(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.data.mul_(2).clone()

        @staticmethod
        def backward(ctx: Any, dy: torch.Tensor) -> torch.Tensor:
            return dy.data.mul_(2).clone()

    inputs = {"x": torch.randn(5)}
    before = inputs["x"].clone()
    _, _, rude = gpu_time.forward_and_backward(Rude.apply, inputs, {})
    _, _, plain = gpu_time.forward_and_backward(lambda x: 2 * x, inputs, {})
    assert gpu_bench.disagreement(rude(), plain()) == ""
    assert torch.equal(inputs["x"], before)


def test_a_process_that_dies_is_named_and_the_others_finish(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    args = gpu.parse(["test", "--device", "cpu", "--workers", "2"])
    code = (
        "import json, os, sys\n"
        "for unit in json.load(open(sys.argv[1])):\n"
        "    if unit['op'] == 'bad': os._exit(9)\n"
        "    print(json.dumps(unit | {'unit': unit}), file=open(sys.argv[2], 'a'))\n"
    )

    def command(_: Any, folder: Path, i: int) -> list[str]:
        return [sys.executable, "-c", code, str(folder / f"todo{i}"), str(folder / f"rows{i}")]

    monkeypatch.setattr(gpu_run, "worker_command", command)
    todo = [{"kind": "budget", "op": op, "case": n} for n, op in enumerate(["a", "b", "bad", "c", "d", "e"])]
    rows = gpu_run.in_processes(todo, args, 20.0)
    assert sorted(r["op"] for r in rows) == ["a", "b", "bad", "c", "d", "e"]
    assert [r["problem"] for r in rows if r["op"] == "bad"] == ["the process died"]


def _results(**changes: Any) -> tuple[Any, Any]:
    test = [
        {"kind": "budget", "op": "swiglu", "backend": b, "dtype": d, "problem": changes.get(f"{b}_{d}", "")}
        for b in ("cuda", "triton")
        for d in gpu_cases.DTYPES
    ]
    ours = {"triton": 1.0, "cuda": 1.5} | changes.get("seconds", {})
    seconds = {"eager": 2.0} | {f"llama_fast:{b}": s for b, s in ours.items()}
    bench = [
        {"op": "swiglu", "case": "a", "dtype": "bfloat16", "provider": p, "direction": d, "seconds": s}
        for p, s in seconds.items()
        for d in ("fwd", "bwd")
    ]
    ops = {"ops": ["swiglu"]}
    return ops | {"command": "test", "rows": test, "not_run": []}, ops | {"command": "bench", "rows": bench}


def test_proof_lists_what_is_right_and_not_slower() -> None:
    both = {"swiglu_fwd": ["half"], "swiglu_bwd": ["half"]}
    assert gpu_bench.proof(*_results()) == {"triton": both, "cuda": both}
    assert gpu_bench.proof(*_results(triton_float16="dup: largest error")) == {"cuda": both}
    assert gpu_bench.proof(*_results(seconds={"triton": 2.5})) == {"cuda": both}
    assert gpu_bench.proof(*_results(seconds={"triton": 2.5, "cuda": 2.5})) == {}
    assert gpu_bench.proof({"rows": [], "not_run": []}, _results()[1]) == {}
    test, bench = _results()
    for unit in ({"kind": "compile", "op": "swiglu"}, {"kind": "budget", "op": "swiglu", "dtype": "float16"}):
        assert gpu_bench.proof(test | {"not_run": [unit]}, bench) == {}
    assert gpu_bench.proof(test | {"not_run": [{"kind": "budget", "op": "rope", "dtype": "float16"}]}, bench)
    died = {"kind": "repeat", "op": "swiglu", "backend": "all", "problem": "the process died"}
    assert gpu_bench.proof(test | {"rows": [*test["rows"], died]}, bench) == {}
    untimed = [r for r in bench["rows"] if (r["provider"], r["direction"]) != ("llama_fast:triton", "bwd")]
    found = gpu_bench.proof(test, {"rows": untimed})
    assert found == {"triton": {"swiglu_fwd": ["half"]}, "cuda": both}


def test_prove_keeps_other_devices(tmp_path: Path) -> None:
    test, bench = _results()
    files = [tmp_path / "test.json", tmp_path / "bench.json"]
    for file, result in zip(files, (test, bench), strict=True):
        file.write_text(json.dumps(result | {"device_class": "sm_90"}))
    out = tmp_path / "proven.json"
    out.write_text(json.dumps({"sm_80": {"triton": {"rope_fwd": ["half"]}}}))
    assert gpu.main(["prove", *map(str, files), "--out", str(out)]) == 0
    listed = json.loads(out.read_text())
    assert listed["sm_80"] == {"triton": {"rope_fwd": ["half"]}}
    assert set(listed["sm_90"]) == {"cuda", "triton"}


def test_prove_of_several_files(tmp_path: Path) -> None:
    test, bench = (r | {"device_class": "sm_90"} for r in _results())
    slow = [r | {"seconds": 1e3} if r.get("provider") == "llama_fast:triton" else r for r in bench["rows"]]
    wrong = [r | {"problem": "red"} if r["backend"] == "triton" else r for r in test["rows"]]
    results = (test, bench | {"rows": slow}, bench, test | {"rows": wrong}, bench | {"ops": ["rope"], "rows": []})
    files = [tmp_path / name for name in ("test.json", "slow.json", "bench.json", "wrong.json", "another.json")]
    for file, result in zip(files, results, strict=True):
        file.write_text(json.dumps(result))

    def listed(*order: Path) -> set[str]:
        out = tmp_path / "proven.json"
        assert gpu.main(["prove", *map(str, order), "--out", str(out)]) == 0
        return set(json.loads(out.read_text())["sm_90"])

    assert listed(files[0], files[1], files[2]) == listed(files[0], files[2])  # of an op the last file counts
    assert "triton" in listed(files[0], files[2])
    assert "triton" not in listed(files[0], files[2], files[1])
    assert "triton" not in listed(files[0], files[2], files[3])
    assert "triton" in listed(files[3], files[2], files[0], files[4])
    files[3].write_text(json.dumps(test | {"not_run": [{"kind": "budget", "op": "swiglu", "dtype": "float16"}]}))
    assert not listed(files[0], files[2], files[3])
    assert "triton" in listed(files[3], files[0], files[2])
    for too_few in (files[:1], files[1:3]):
        with pytest.raises(SystemExit, match="expected results of test and of bench"):
            gpu.main(["prove", *map(str, too_few)])


def test_dweight_by_blocks_of_classes_is_among_the_cases() -> None:
    """On a GPU, with rows whose logits are computed again and without."""
    dims = [case.dims for case in gpu_cases.test_cases("linear_cross_entropy", False)]
    plans = [pieces.plan(d["..."][0], d["C"], d["V"], pieces.Sizes()) for d in dims]
    assert {plan.end > plan.kept for plan in plans if plan} == {True, False}
    assert any(unit.get("by_classes") for unit in gpu.units(["linear_cross_entropy"], True))


def test_every_op_has_cases_of_both_kinds() -> None:
    for op in OPS:
        assert len(gpu_cases.test_cases(op, False)) > 5
        timed = gpu_bench.cases_of(op, False)
        assert timed
        assert len({b.label for b in timed}) == len(timed)  # rows are known by it
        for case in gpu_cases.test_cases(op, False):
            assert str(case)


@pytest.mark.parametrize("op", OPS)
def test_every_provider_takes_a_gpus_cases_or_says_why_not(op: str) -> None:
    """As far as can be asked without a GPU; nothing is run."""
    names = [p.name for p in providers.of(op, "cuda")]
    assert {"llama_fast:cuda", "llama_fast:triton", "eager"} <= set(names)
    assert ("torch" in names) == any(b.name == "torch" for b in OPS[op].backends)  # what `prove` compares with
    for b in gpu_bench.cases_of(op, False):
        reasons = {p.name: p.objection(b.case, b.dtype, "cuda") for p in providers.of(op, "cuda")}
        windowed = bool(b.case.options.get("window"))
        assert (reasons["eager"] is None) != windowed
        assert any(reasons[n] is None for n in ("eager", "torch") if n in reasons)  # the others are compared with it
        assert all(r is None or r for r in reasons.values())


def test_large_inputs_are_those_of_the_case() -> None:
    """`bench` makes its inputs on the device; shapes and dtypes are the public function's."""
    args = gpu.parse(["bench", "--device", "cpu", "--tiny"])
    args.device = "meta"
    for op in OPS:
        (timed,) = gpu_bench.cases_of(op, True)
        made, expected = gpu_bench._inputs(timed, args), timed.case.inputs(torch.bfloat16)
        assert {n: (x.shape, x.dtype) for n, x in made.items()} == {n: (x.shape, x.dtype) for n, x in expected.items()}


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(SystemExit):
        gpu.main(["test"])
    assert "torch sees no GPU" in capsys.readouterr().err
