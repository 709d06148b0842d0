"""README.md's results are what `python -m benchmarks.readme` makes of the committed files."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from test_report import gpu, made_up

from benchmarks import readme, results
from benchmarks.results import is_ours

ROOT = Path(__file__).parents[1]


def test_the_readme_shows_the_committed_results() -> None:
    document = (ROOT / "README.md").read_text()
    assert document == readme.replaced(document, readme.text(readme.committed())), "run python -m benchmarks.readme"


def test_figures_are_those_of_the_files() -> None:
    made = made_up()
    environment = dataclasses.replace(made.environment, commit="0123456789abcdef")
    text = readme.text([("zen5.json", dataclasses.replace(made, environment=environment))])
    row = next(line for line in text.splitlines() if line.startswith("| `attention`"))
    assert row == "| `attention` | 3.40x | 3.40x | 2.70x | 3.40x | 114% |"
    assert "**A Processor <9000>**, 2 threads, avx512bf16" in text
    assert "[zen5.json](benchmarks/results/zen5.json)" in text
    assert "copy 40 GB/s, matmul bfloat16 900 Gflop/s" in text
    assert "commit `0123456789`" in text


def test_a_gpus_backward_is_told_apart_and_empty_columns_are_left_out() -> None:
    made = made_up()
    renamed = {"forward+backward": "backward"}
    lines = [dataclasses.replace(x, kept_bytes=None) for x in made.lines]
    lines = [dataclasses.replace(x, direction=renamed.get(x.direction, x.direction)) for x in lines]
    loss = [x for x in lines if x.op == "rms_norm" and x.direction == "backward"]
    lines += [dataclasses.replace(x, op="linear_cross_entropy", direction="forward+backward") for x in loss]
    found = readme.text([("gpu.json", dataclasses.replace(made, lines=tuple(lines)))])
    assert "| op | forward, over eager | backward, over eager | over the fastest other | of the limit |" in found
    assert "| `attention` | 3.40x | 3.40x | 2.70x |" in found
    assert "| `linear_cross_entropy` | - | 7.50x with forward | 7.50x |" in found


def test_models_are_shown_in_the_papers_terms() -> None:
    made = gpu()
    lines = tuple(dataclasses.replace(x, label="llama-65b") for x in made.lines)
    text = readme.text([("h100.json", dataclasses.replace(made, lines=lines))])
    assert "| `training_step` llama-65b bfloat16 (save) |" in text
    assert "1.45x transformers" in text
    assert "57.1% MFU" in text  # 8192 tokens of 2e10 flop in 290 ms, of 989.4e12 flop/s
    assert "380 tokens a second and GPU on A100: 49.5% MFU with attention (47.7% by 6 N alone)" in text
    assert "in the whole model 1,391 tokens a second before communication" in text


def test_of_files_of_one_device_the_newest_that_has_an_op_counts() -> None:
    old = made_up()
    slower = [
        dataclasses.replace(x, seconds=results.Seconds(0.9, 0.9, 0.9, 9))
        for x in old.lines
        if x.op == "attention" and x.seconds and is_ours(x.provider)
    ]
    slower += [x for x in old.lines if x.op == "attention" and not is_ours(x.provider)]
    time = dataclasses.replace(old.environment, time="2027-01-01T00:00:00+00:00", commit="feed" * 10)
    newer = dataclasses.replace(old, lines=tuple(slower), environment=time)
    text = readme.text([("new.json", newer), ("old.json", old)])
    assert text.count("**A Processor <9000>**") == 1
    assert text.count("| `attention` |") == text.count("| `rms_norm` |") == 1
    assert "| `attention` | 0.0" in text
    assert text.index("old.json") < text.index("new.json): 2027-01-01, commit `feedfeedfe`")
    only = readme.text([("new.json", dataclasses.replace(old, environment=time)), ("old.json", old)])
    assert "old.json" not in only


def test_comparisons_and_an_empty_folder(tmp_path: Path) -> None:
    made = made_up()
    other = dataclasses.replace(made, environment=dataclasses.replace(made.environment, against="c0ffee"))
    assert readme.text([("ab.json", other)]) == "No result file is committed yet."
    assert readme.committed(tmp_path) == []


def test_a_document_without_its_marks_is_refused() -> None:
    document = f"a\n{readme.BEGIN}\nold\n{readme.END}\nb\n"
    assert readme.replaced(document, "new") == f"a\n{readme.BEGIN}\n\nnew\n\n{readme.END}\nb\n"
    with pytest.raises(ValueError, match="expected each of the marks"):
        readme.replaced("a", "new")
    with pytest.raises(ValueError, match="expected each of the marks"):
        readme.replaced(document + readme.END, "new")
