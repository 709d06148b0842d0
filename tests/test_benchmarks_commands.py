"""`python -m benchmarks` and its kin as a user types them: what they refuse, what they print, what Ctrl-C leaves."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from rich.console import Console

import llama_fast
from benchmarks import compare, floors, harness, model, results, suite
from benchmarks.results import Limit, Line
from llama_fast.cli import app
from llama_fast.config import LlamaConfig
from llama_fast.ops.table import OPS
from llama_fast.verify import Case

LIMITS = (
    Limit("copy", "byte/s", 1e10, "made up"),
    Limit("matmul float32", "flop/s", 1e11, "made up"),
    Limit("matmul bfloat16", "flop/s", 1e12, "made up"),
)
CASES = [
    harness.Benchmark(Case("swiglu", {"...": (rows,), "F": 64}), torch.float32, "small", quick=True) for rows in (3, 5)
]
TINY = LlamaConfig(64, 2, 4, 2, 176, 96, 128)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two small cases, a small block, and limits that take no time."""
    monkeypatch.setattr(suite, "collect", lambda ops, quick=False: [b for b in CASES if b.case.op in ops])
    scenarios = [model.Scenario("block", TINY, "", 2, 32, torch.float32)]
    monkeypatch.setattr(model, "scenarios", lambda device="cpu": scenarios)
    monkeypatch.setattr(harness, "measure_limits", lambda *_: LIMITS)
    monkeypatch.setattr(llama_fast, "keep_host_memory", lambda: "as it was")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["rope", "--case", "B77"],
            "no benchmark has a case of them whose name contains 'B77'; --list shows their names",
        ),
        (["rope", "--quick", "--vs", "v0"], "revision 'v0': git says 'Needed a single revision'; expected a commit"),
        (
            ["rope", "--provider", "lieger"],
            "provider = 'lieger': expected one of eager, torch.compile, transformers, liger",
        ),
        (["block", "--provider", "sdpa:flash"], "provider = 'sdpa:flash': expected one of eager, transformers, "),
        (["rope", "--seconds", "-1"], "seconds = -1: expected a number above 0"),
        (["block", "--limit", "0"], "limit = 0: expected a number above 0"),
        (["rope", "--seconds", "nan"], "seconds = nan: expected a number above 0"),
    ],
)
def test_what_cannot_be_is_named(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    assert suite.main(arguments) == 2
    assert f"benchmarks: {message}" in capsys.readouterr().err.replace("rope: no", "no")


def test_ops_and_devices_are_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        suite.main(["norm"])
    assert "op norm: expected one of rms_norm" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert suite.main(["block", "--device", "cuda"]) == 2
    assert "device = 'cuda': torch sees no CUDA device; expected 'cpu' here" in capsys.readouterr().err
    with pytest.raises(ValueError, match="device = 'tpu': expected cpu or cuda"):
        suite.chosen([], "tpu")


def test_cases_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert suite.main(["--list", "rope"]) == 0
    assert "rope bfloat16 B2 T2048 H32 G32 D128" in capsys.readouterr().out
    assert suite.main(["--list", "block", "--device", "cuda"]) == 0
    assert "block bfloat16 llama-65b" in capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_lines_command_is_the_installed_programs(device: str) -> None:
    """`python -m benchmarks` is there in a clone alone, and result files are read by whoever has the wheel."""
    commands = {s.name: s.facts()["command"] for s in model.scenarios(device)}
    if device == "cpu":
        commands |= {b.name: harness.facts(b, "forward")["command"] for b in suite.collect(list(OPS), quick=True)}
    for name, command in commands.items():
        program, subcommand, *arguments = shlex.split(command)
        assert (program, subcommand) == ("llama-fast", "bench")
        given = typer.main.get_command(app).commands["bench"].make_context("bench", arguments).params
        assert (given["case"], given["device"]) == ([name], device)
        assert name in suite.case_names(suite.chosen(given["op"], device), device)


def test_a_quick_run_says_of_which_ops_a_provider_is_left_out() -> None:
    quick = suite.collect(["rms_norm", "swiglu", "rope"], quick=True)
    left_out = suite._slow(quick)
    assert "torch.compile" in left_out
    assert "transformers (rms_norm)" in left_out, "rope's is timed in a quick run too"
    assert not any(name.startswith("transformers") for name in suite._slow(suite.collect(["rope"], quick=True)))


def test_the_environment_stands_in_two_lines_of_any_length() -> None:
    """A terminal breaks them where it likes; a file keeps them whole."""
    console = Console(record=True, width=suite.WIDEST)
    suite.print_environment(harness.environment("kept " * 60), console)
    machine, versions = console.export_text().splitlines()
    assert machine.rstrip().endswith("kept kept")
    assert f"torch {torch.__version__}" in versions


@pytest.mark.usefixtures("small")
def test_a_run_says_what_its_figures_belong_to() -> None:
    console = Console(record=True, width=400)
    found = suite.run(["swiglu"], quick=True, seconds=1e-9, console=console)
    text, facts = console.export_text(), found.environment
    assert f"{facts.device}, clock " in text
    assert f"commit {(facts.commit or '')[:12]}" in text
    assert f"torch {torch.__version__}" in text
    assert "left out of a quick run: torch.compile, liger, flash-attn" in text
    ours = next(x for x in found.lines if x.op == "swiglu" and results.is_ours(x.provider))
    assert ours.seconds is not None
    assert ours.peak_bytes is not None
    row = next(line for line in text.splitlines() if "swiglu" in line and "forward" in line)
    assert f"{ours.share:.0%} copy" in row
    assert f"{ours.seconds.median * 1e3:.3g} " in row, "microseconds are not rounded away"
    assert f"{ours.peak_bytes / 1e6:.3g} " in row


@pytest.mark.usefixtures("small")
def test_a_line_of_the_model_level_has_its_dtype_mfu_and_memory() -> None:
    console = Console(record=True, width=400)
    found = suite.run(["block"], seconds=1e-9, providers=["eager"], console=console)
    block = next(x for x in found.lines if x.provider == "llama_fast:save")
    assert block.seconds is not None
    assert block.kept_bytes is not None
    lines = console.export_text().splitlines()
    line = next(x for x in lines if x.startswith("block float32 B2 T32 C64") and "llama_fast:save" in x)
    assert f"{64 / block.seconds.median:,.0f} tokens/s" in line
    assert f"{block.share:.1%} MFU of the matmul float32 rate measured here" in line
    assert f"{block.kept_bytes / 64:,.0f} bytes kept a token and layer" in line


def _second_raises(monkeypatch: pytest.MonkeyPatch, error: type[BaseException]) -> None:
    measure = harness.measure

    def measured(benchmark: harness.Benchmark, *arguments: Any) -> list[Line]:
        if benchmark is CASES[1]:
            raise error
        return measure(benchmark, *arguments)

    monkeypatch.setattr(harness, "measure", measured)


@pytest.mark.usefixtures("small")
def test_a_run_that_dies_has_written_what_it_measured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    _second_raises(monkeypatch, MemoryError)
    with pytest.raises(MemoryError):
        suite.main(["swiglu", "--quick", "--seconds", "1e-9", "--json", str(path)])
    assert {x.case["R"] for x in results.read(path).lines} == {3}


@pytest.mark.usefixtures("small")
def test_ctrl_c_keeps_what_was_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "a.json"
    _second_raises(monkeypatch, KeyboardInterrupt)
    assert suite.main(["swiglu", "--quick", "--seconds", "1e-9", "--json", str(path)]) == 130
    found = results.read(path)
    assert {(x.case["R"], x.direction) for x in found.lines} == {(3, "forward"), (3, "forward+backward")}
    out = capsys.readouterr().out
    assert f"interrupted: the {len(found.lines)} lines above were measured before, and stand in {path}" in out
    assert "R3 F64" in out


@pytest.mark.usefixtures("small")
def test_ctrl_c_ends_a_comparison_with_what_it_has(sides: Any, tmp_path: Path) -> None:
    def ask(folder: Path, **request: Any) -> dict[str, Any]:
        if request.get("prepare") == CASES[1].name:
            raise KeyboardInterrupt
        if "limits" in request:
            return {"limits": [dataclasses.asdict(x) for x in LIMITS]}
        return {"seconds": [0.1] * request["run"] if "run" in request else 0.1, "folder": str(folder)}

    sides(ask)
    path = tmp_path / "ab.json"
    assert suite.main(["swiglu", "--vs", "main", "--json", str(path)]) == 130
    assert [(x.case["R"], x.direction) for x in results.read(path).lines] == [
        *[(3, "forward")] * 2,
        *[(3, "forward+backward")] * 2,
    ]


def test_a_worker_outlives_the_ctrl_c_of_its_parent(tmp_path: Path) -> None:
    """It stands in a session of its own, so that a terminal's signal does not reach it in the middle of an answer."""
    import os

    with compare.Worker(Path(harness.__file__).parents[1]) as worker:
        assert os.getsid(worker.process.pid) != os.getsid(0)
    assert worker.process.returncode == 0


def test_floors_of_no_case_are_an_error(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["floors", "--case", "softmax"])
    with pytest.raises(SystemExit) as stopped:
        floors.main()
    assert stopped.value.code == 2
    assert "--case softmax: expected part of the name of a case with a floor in floors.toml" in capsys.readouterr().err


def test_each_floor_stands_in_one_column(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(floors, "_in_process", lambda *_: {"forward of limit": 0.8})
    floor = floors.Floor("a case", "forward of limit", "", {"zen5": 0.7, "zen4": 0.6})
    for kind, headers, numbers in (
        ("zen5", ["measured", "floor (zen5)"], ["0.80", "0.70", "ok"]),
        ("zen4", ["measured", "floor (zen4)", "floor (zen5)"], ["0.80", "0.60", "0.70", "ok"]),
        (None, ["measured", "floor (zen5)"], ["0.80", "0.70"]),
    ):
        monkeypatch.setattr(floors, "processor", lambda kind=kind: kind)
        console = Console(record=True, width=200)
        floors.check([floor], console)
        rows = [[c.strip() for c in x.replace("┃", "│").split("│")[1:-1]] for x in console.export_text().splitlines()]
        rows = [row for row in rows if row]
        assert rows[0][3:] == [*headers, ""]
        assert [c for c in rows[1][3:] if c] == numbers


def test_checking_no_file_says_how(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert results.main([]) == 2
    assert "usage: python -m benchmarks.results FILE..." in capsys.readouterr().err
    (tmp_path / "a.json").write_text("# a page")
    assert results.main([str(tmp_path / "a.json")]) == 1
    assert (
        "a.json: is no JSON (Expecting value: line 1 column 1 (char 0)), expected a result" in capsys.readouterr().err
    )
