"""The benchmarks' bookkeeping: floors are read, judged and reported. No test here depends on a time."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from benchmarks import floors, harness, providers, results, suite
from benchmarks.providers import Provider
from benchmarks.results import Limit, Results
from llama_fast.config import PRESETS
from llama_fast.ops import eager
from llama_fast.ops.table import OPS
from llama_fast.verify import Case

RMS_NORM = "rms_norm bfloat16 ...(4096,) C4096"


def test_the_committed_floors_name_known_cases_and_cover_every_op() -> None:
    found = floors.read()
    cases = {f.case.split()[0] for f in found}
    assert cases >= {"attention", "rms_norm", "add_rms_norm", "swiglu", "rope", "linear_cross_entropy"}
    assert cases >= {"block", "training_step", "decode"}
    assert all(set(f.least) <= set(floors.PROCESSORS.values()) for f in found)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('["rms_norm"]\n"forward of limit" = { zen5 = 1.0 }', r"\['rms_norm'\], expected one of "),
        (f'["{RMS_NORM}"]\n"forward of limit; lost" = {{ zen5 = 1.0 }}', "'forward of limit; lost' ends in none of "),
        (f'["{RMS_NORM}"]\n"forward of limit" = {{ zen3 = 1.0 }}', "is for {'zen3'}, expected"),
        (f'["{RMS_NORM}"]\n"forward of limit" = {{}}', r"is for set\(\), expected"),
    ],
)
def test_a_wrong_line_is_named(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "floors.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        floors.read(path)


def test_a_figure_under_its_floor_falls(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {
        "": {"forward vs eager": 2.0, "forward of limit": 0.8},
        "default memory": {"forward vs eager": 9.0},
    }
    monkeypatch.setattr(floors, "_in_process", lambda case, memory, only=None: found[memory])
    monkeypatch.setattr(floors, "processor", lambda: "zen5")
    lines = [
        floors.Floor(RMS_NORM, "forward vs eager", "", {"zen5": 2.5, "zen4": 1.0}),
        floors.Floor(RMS_NORM, "forward of limit", "", {"zen5": 0.7}),
        floors.Floor(RMS_NORM, "forward of limit", "", {"zen4": 0.9}),
        floors.Floor(RMS_NORM, "no such figure", "", {"zen5": 0.1}),
        floors.Floor(RMS_NORM, "forward vs eager", "default memory", {"zen5": 8.0}),
    ]
    rows = floors.check(lines, Console(quiet=True))
    assert [r["ok"] for r in rows] == [False, True, True, False, True]


def test_a_case_that_fails_falls_and_the_rest_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        if RMS_NORM in command:
            return subprocess.CompletedProcess(command, 1, "", "Traceback\nRuntimeError: results differ\n")
        return subprocess.CompletedProcess(command, 0, "a warning\n" + json.dumps({"time vs transformers": 3.0}), "")

    monkeypatch.setattr(subprocess, "run", broken)
    monkeypatch.setattr(floors, "processor", lambda: "zen5")
    lines = [
        floors.Floor(RMS_NORM, "forward of limit", "", {"zen5": 0.1}),
        floors.Floor("decode bfloat16", "time vs transformers", "", {"zen5": 2.0}),
    ]
    console = Console(record=True, width=200)
    assert [r["ok"] for r in floors.check(lines, console)] == [False, True]
    assert f"{RMS_NORM}: RuntimeError: results differ" in console.export_text()


def test_sides_with_processes_of_their_own_take_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def one(case: str, memory: str, only: str | None = None) -> dict[str, float]:
        calls.append(str(only))
        assert memory == "ours kept"
        return {"seconds": {"llama_fast": 2.0, "transformers": 5.0}[str(only)] + 0.1 * (len(calls) > 4)}

    monkeypatch.setattr(floors, "_in_process", one)
    assert floors._one_sided("training_step bfloat16") == {"time vs transformers": 2.5}
    assert calls == ["llama_fast", "transformers"] * floors.ROUNDS


def test_providers_are_timed_in_turn() -> None:
    order: list[str] = []
    timings = harness.interleave({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, seconds=0.0, least=3)
    assert order == ["a", "a", "b", "b", *["a", "b"] * 3]
    assert set(timings) == {"a", "b"}
    assert all(t.p20 <= t.median <= t.p80 for t in timings.values())


def test_bytes_kept_counts_each_storage_once_and_leaves_out_what_is_not_the_layers() -> None:
    w, x = torch.randn(8, 8, requires_grad=True), torch.randn(4, 8, requires_grad=True)
    layer = lambda: (x @ w).sin() * (x @ w.t())  # noqa: E731
    # x, x W, sin(x W), x W^T: x is saved by both products
    assert harness.kept_bytes(layer, [w]) == 4 * (4 * 8 * 4)
    assert harness.kept_bytes(layer, []) == 4 * (4 * 8 * 4) + 8 * 8 * 4


def test_allocations_are_counted_from_zero_at_their_peak_and_at_the_end() -> None:
    x = torch.ones(1 << 16)
    peak, held, result = harness.allocations(lambda: (x * 2).add(x * 3))
    assert result.nbytes == x.nbytes
    assert x.nbytes * 3 <= peak < x.nbytes * 3.1
    assert x.nbytes <= held < x.nbytes * 1.1


# ---- judging and measuring one case ---------------------------------------------------------------------------------
LIMITS = (Limit("copy", "byte/s", 1e10, "made up"), Limit("matmul float32", "flop/s", 1e11, "made up"))
SMALL = harness.Benchmark(
    Case("attention", {"B": 1, "T": 24, "S": 24, "H": 4, "G": 2, "D": 16}), torch.float32, "small"
)


def test_a_case_gives_a_line_a_provider_and_direction() -> None:
    lines = harness.measure(SMALL, seconds=0.0, choose=lambda p: p.name != "torch.compile")
    by_provider = {x.provider: x for x in lines if x.direction == "forward+backward"}
    assert len(lines) == 2 * len(by_provider)
    expected = {"llama_fast:cpu", "eager", "sdpa:math", "sdpa:flash", "sdpa_repeated"}
    assert {n for n, x in by_provider.items() if x.status == "measured"} >= expected
    assert by_provider["sdpa:cudnn"].reason == "runs on cuda only"
    assert by_provider["flash-attn"].status == "not run"
    ours = by_provider["llama_fast:cpu"]
    q, kv, lse = 24 * 4 * 16 * 4, 24 * 2 * 16 * 4, 24 * 4 * 4
    assert ours.kept_bytes == q + 2 * kv + q + lse  # q, k, v, out, lse
    assert ours.peak_bytes is not None
    assert ours.peak_bytes > q
    assert ours.error is not None
    assert ours.error.value <= ours.error.budget
    shares = tuple(results.against(x, LIMITS) for x in lines)
    results.check(Results(results.FORMAT, harness.environment("kept"), LIMITS, shares))


def test_a_wrong_provider_shows_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(**arguments: Any) -> torch.Tensor:
        out = eager.attention(**arguments)
        return torch.where(torch.arange(24).view(1, 24, 1, 1) == 23, out * 1.01, out)

    def broken(**arguments: Any) -> torch.Tensor:
        raise RuntimeError("no kernel image\nfor this device")

    found = [
        Provider("llama_fast:cpu", wrong),
        Provider("eager", eager.attention),
        Provider("other", wrong),
        Provider("crashes", broken),
        Provider("absent", eager.attention, "no_such_module", "no-such-package"),
    ]
    monkeypatch.setattr(harness, "of", lambda op, device: found)
    lines = harness.measure(SMALL, seconds=0.0)
    status = {x.provider: (x.status, x.seconds is None) for x in lines}
    assert status == {
        "llama_fast:cpu": ("wrong", True),
        "eager": ("measured", False),
        "other": ("wrong", True),
        "crashes": ("not run", True),
        "absent": ("not run", True),
    }
    reasons = {x.provider: x.reason for x in lines}
    assert "largest error" in reasons["llama_fast:cpu"]
    assert reasons["crashes"] == "RuntimeError: no kernel image"
    assert reasons["absent"] == "not installed: pip install no-such-package"
    console = Console(record=True, width=200)
    suite.print_lines([results.against(x, LIMITS) for x in lines], console)
    text = console.export_text()
    assert "WRONG: attention B1 T24 S24 H4 G2 D16 float32 forward llama_fast:cpu" in text
    assert "not run: attention: absent: not installed" in text


def test_of_large_attention_some_heads_are_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "CHECKED_BYTES", 1)
    work = harness.Work.of(SMALL)
    judged = harness.Judge(work)
    assert judged.truth["dq"].shape == (1, 24, 2, 16)
    assert judged.truth["dk"].shape == (1, 24, 1, 16)
    found = work.everything(eager.attention)
    assert judged(found, ours=True)[1] == ""
    found["dk"][0, 3, 0, 5] += 1e-3
    assert judged(found, ours=True)[1].startswith("dk: largest error")


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_cases_of_presets_and_providers(op: str) -> None:
    cases = suite.collect([op])
    assert any(b.quick for b in cases)
    assert all(b.label for b in cases)
    assert any(b.label.split(",")[0] in PRESETS for b in cases)
    names = [p.name for p in providers.of(op, "cuda")]
    assert "eager" in names
    assert "torch.compile" in names
    assert any(p.package and p.device == "cuda" for p in providers.of(op, "cuda"))
    assert len(names) == len(set(names))
    assert "llama_fast:cpu" in [p.name for p in providers.of(op, "cpu") if p.ours]


@pytest.mark.parametrize(
    ("op", "dims"),
    [
        ("rms_norm", {"...": (3,), "C": 64}),
        ("add_rms_norm", {"...": (3,), "C": 64}),
        ("swiglu", {"...": (3,), "F": 64}),
        ("rope", {"B": 1, "T": 5, "H": 4, "G": 2, "D": 16}),
        ("linear_cross_entropy", {"...": (7,), "C": 16, "V": 50}),
    ],
)
def test_what_runs_here_is_right_on_a_small_case(op: str, dims: dict[str, Any]) -> None:
    benchmark = harness.Benchmark(Case(op, dims), torch.bfloat16, "small")
    lines = harness.measure(benchmark, seconds=0.0, choose=lambda p: p.name != "torch.compile")
    assert not [x for x in lines if x.status == "wrong"]
    assert {x.provider for x in lines if x.seconds} >= {"llama_fast:cpu", "eager"}


def test_the_command_line_names_what_it_does_not_know(capsys: pytest.CaptureFixture[str]) -> None:
    assert suite.main(["--list", "rope"]) == 0
    assert "rope bfloat16 B2 T2048 H32 G32 D128" in capsys.readouterr().out
    assert suite.main(["rope", "--case", "B77"]) == 2
    assert "no benchmark has a case of them whose name contains 'B77'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        suite.main(["norm"])
    assert "OP norm: expected one of rms_norm" in capsys.readouterr().err
