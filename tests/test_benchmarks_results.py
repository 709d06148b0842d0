"""Result files: what is written is read back, and a file that contradicts itself is refused with the field's name."""

from __future__ import annotations

import dataclasses
import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from benchmarks import model, results, suite
from benchmarks.results import Environment, Error, Limit, Line, Results, Seconds
from llama_fast import cli

ROOT = Path(__file__).parents[1]


def an_environment(**changes: Any) -> Environment:
    """A complete environment, made up."""
    made = results.environment(
        root=ROOT, kind="cpu", device="a processor", memory=1 << 34, clocks={"now": 3000.0}, threads=2, allocator="kept"
    )
    return dataclasses.replace(made, **changes)


LIMITS = (
    Limit("copy", "byte/s", 1e10, "copy_ of 256 MB"),
    Limit("matmul bfloat16", "flop/s", 1e12, "2048^3"),
)


def a_line(**changes: Any) -> Line:
    """A measured line at half of the copy bandwidth, made up."""
    line = Line(
        op="rms_norm",
        label="llama-7b",
        case={"R": 4096, "C": 4096},
        dtype="bfloat16",
        direction="forward",
        provider="llama_fast:cpu",
        status="measured",
        reason="",
        seconds=Seconds(0.02, 0.019, 0.022, 30),
        bytes=10**8,
        flops=0,
        limit="copy",
        share=0.5,
        peak_bytes=10,
        kept_bytes=None,
        error=Error("out", 1e-3, 2e-3),
        tokens=None,
        command="python -m benchmarks rms_norm",
    )
    return dataclasses.replace(line, **changes)


def a_file(*lines: Line, **environment: Any) -> Results:
    """Results with these lines."""
    return Results(results.FORMAT, an_environment(**environment), LIMITS, lines)


def test_the_table_cuts_nothing_off() -> None:
    """At the width that files and narrow terminals are given, with the longest names beside each other."""
    numbers = {"seconds": Seconds(1.168, 1.1681, 1.1912, 5), "peak_bytes": 12_345_000_000, "kept_bytes": 9_876_000_000}
    work = {"case": {"B": 2, "T": 1024, "C": 768, "F": 2048, "H": 12}, "limit": "matmul bfloat16", **numbers}
    names = {name for op in ("block", "training_step", "lora_step", "decode") for name in model.providers(op)}
    lines = [a_line(op="training_step", direction="forward+backward", provider=name, **work) for name in sorted(names)]
    lines += [a_line(op="linear_cross_entropy", direction="forward+backward", provider=name) for name in ("eager", "x")]
    assert suite.WIDEST == cli.WIDEST
    console = Console(record=True, width=cli.WIDEST)
    console.print(suite.table_of(lines))
    text = console.export_text()
    assert "\u2026" not in text
    assert max(names, key=len) in text
    assert "1,168..1,191" in text


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    lines = (
        a_line(),
        a_line(provider="eager", status="wrong", reason="off by one", seconds=None, limit=None, share=None),
        a_line(case={"B": 1, "T": 7, "interleaved": True, "lengths": [3, 4]}, tokens=7),
    )
    written = a_file(*lines)
    path = tmp_path / "a.json"
    results.write(written, path)
    assert results.read(path) == written
    assert results.main([str(path)]) == 0
    assert len(path.read_text().splitlines()) < 80, "one line of the file a result line"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"status": "fine"}, "status is 'fine', expected one of measured, wrong, not run"),
        ({"direction": "sideways"}, "direction is 'sideways', expected one of forward"),
        ({"seconds": None}, "seconds are None, expected 0 < p20"),
        ({"seconds": Seconds(0.02, 0.021, 0.022, 3)}, "expected 0 < p20 <= median"),
        ({"share": 0.6}, "share is 0.6, expected 0.5"),
        ({"limit": "matmul bfloat16"}, "limit is 'matmul bfloat16', expected 'copy'"),
        ({"dtype": "float32", "flops": 1}, "no 'matmul float32' among copy, matmul bfloat16"),
        ({"reason": "slow"}, "reason is 'slow', expected none"),
        ({"status": "wrong", "reason": "off"}, "expected none of a line that is 'wrong'"),
        ({"status": "not run", "seconds": None, "share": None}, "reason is empty, expected one"),
        ({"bytes": 0}, "bytes and flops are both 0"),
        ({"command": ""}, "command is empty"),
    ],
)
def test_a_line_that_contradicts_itself_is_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        results.write(a_file(a_line(**change)), tmp_path / "a.json")
    assert str(caught.value).startswith("line rms_norm R4096 C4096 ")
    assert not (tmp_path / "a.json").exists()


def test_a_line_stands_there_once(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="stands there twice"):
        results.check(a_file(a_line(), a_line()))
    results.check(a_file(a_line(), a_line(provider="eager")))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda f: f.update(format="other"), "format is 'other', expected 'llama_fast results 1'"),
        (lambda f: f["lines"][0].pop("flops"), r"lines\[0\]: expected the fields .*differs in \['flops'\]"),
        (lambda f: f["lines"][0].update(color="red"), r"differs in \['color'\]"),
        (lambda f: f["lines"][0].update(bytes="many"), r"lines\[0\].bytes is 'many', expected int"),
        (lambda f: f["lines"][0]["case"].update(R={}), r"lines\[0\].case.R is {}, expected"),
        (lambda f: f["environment"].update(dirty=1), "environment.dirty is 1, expected"),
        (lambda f: f["environment"].update(kind="tpu"), "environment.kind is 'tpu', expected 'cpu' or 'cuda'"),
        (lambda f: f["limits"][0].update(rate=0), "copy has rate 0.0, expected a positive number"),
    ],
)
def test_a_damaged_file_is_named(damage: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    results.write(a_file(a_line()), path)
    values = json.loads(path.read_text())
    damage(values)
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=message) as caught:
        results.read(path)
    assert str(caught.value).startswith(str(path))
    assert results.main([str(path)]) == 1


def test_the_binding_limit_is_the_one_that_takes_longer() -> None:
    assert results.binding_limit(10**10, 10**11, "bfloat16", LIMITS) == (LIMITS[0], 1.0)
    assert results.binding_limit(10**9, 10**12, "bfloat16", LIMITS) == (LIMITS[1], 1.0)


def test_a_line_is_set_against_its_limit() -> None:
    bare = a_line(limit=None, share=None)
    assert results.against(bare, LIMITS) == a_line()
    absent = a_line(status="not run", reason="absent", seconds=None, limit=None, share=None)
    assert results.against(absent, ()) == absent
    slower = tuple(dataclasses.replace(x, rate=x.rate / 2) for x in LIMITS)
    assert results.better((slower[0], LIMITS[1]), (LIMITS[0], slower[1])) == LIMITS


def test_commit_and_dirty_flag_are_those_of_the_tree(tmp_path: Path) -> None:
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    assert results.revision(tmp_path) is None
    (tmp_path / "llama_fast").mkdir()
    (tmp_path / "llama_fast" / "__init__.py").write_text('__version__ = "7.0"\n')
    subprocess.run([*git, "init", "-q"], check=True)
    assert results.revision(tmp_path) is None, "the package is not part of that repository"
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-qm", "a"], check=True)
    found = results.revision(tmp_path)
    assert found is not None
    assert len(found[0]) == 40
    assert found[1] is False
    (tmp_path / "new.py").write_text("")
    assert results.revision(tmp_path) == (found[0], True)
    arguments: dict[str, Any] = {"kind": "cpu", "device": "", "memory": 1, "clocks": {}, "threads": 1, "allocator": ""}
    made = results.environment(root=tmp_path, **arguments)
    assert (made.commit, made.dirty, made.packages["llama_fast"]) == (found[0], True, "7.0")
    assert made.packages["torch"]


def test_committed_files_are_sound() -> None:
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        found = results.read(path)
        assert path.stat().st_size < 200_000, path
        assert found.environment.commit, path
        assert found.environment.dirty is False, path
