"""README.md says what is so: its examples run, its table is the op table, its targets and commands exist."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

from llama_fast.cli import app
from llama_fast.ops.table import OPS, Op

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def _row(op: Op) -> str:
    page = f"docs/ops/{'rms_norm' if op.name == 'add_rms_norm' else op.name}.md"  # the two share a page
    backends = ", ".join(f"`{b.name}`" for b in op.backends)
    return f"| [`{op.name}`]({page}) | `{op.fwd.text}` | {backends} |"


def test_op_table() -> None:
    found = [line for line in README.splitlines() if line.startswith("| [`")]
    assert found == [_row(op) for op in OPS.values()]


@pytest.mark.parametrize("number", range(README.count("```python")))
def test_examples_run(number: int) -> None:
    code = re.findall(r"```python\n(.*?)```", README, re.DOTALL)[number]
    if "transformers" in code and importlib.util.find_spec("transformers") is None:
        pytest.skip("the extra hf is not installed")
    exec(compile(code, "README.md", "exec"), {})


def test_make_targets_exist_and_are_listed() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z0-9-]+):.*## ", makefile, re.MULTILINE))
    (phony,) = re.findall(r"^\.PHONY: (.*)$", makefile, re.MULTILINE)
    assert targets == set(phony.split())
    for document in ("README.md", "CONTRIBUTING.md"):
        named = re.findall(
            r"\bmake ([a-z0-9-]+)\b(?=[`  ]|$)", "".join(re.findall(r"`[^`]+`", (ROOT / document).read_text()))
        )
        assert set(named) <= targets


def test_commands_exist() -> None:
    commands = {c.name or c.callback.__name__ for c in app.registered_commands if c.callback is not None}
    for document in (README, (ROOT / "CONTRIBUTING.md").read_text()):
        assert set(re.findall(r"llama-fast ([a-z]+)\b", document)) <= commands


def test_ci_runs_the_test_command_and_the_checks() -> None:
    text = (ROOT / ".ci" / "run").read_text()
    assert re.search(r"for target in test check asan", text)
    assert "make test" in README
