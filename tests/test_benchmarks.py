"""The benchmarks' bookkeeping: floors are read, judged and reported. No test here depends on a time."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from benchmarks import floors, harness, model

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
    layer = lambda x: (x @ w).sin() * (x @ w.t())  # noqa: E731
    # x, x W, sin(x W), x W^T: x is saved by both products
    assert model._bytes_kept(layer, x, [w]) == 4 * (4 * 8 * 4)
    assert model._bytes_kept(layer, x, []) == 4 * (4 * 8 * 4) + 8 * 8 * 4
