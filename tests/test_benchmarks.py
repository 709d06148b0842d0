"""The benchmarks' bookkeeping: floors are read, judged and reported. No test here depends on a time."""

from __future__ import annotations

import dataclasses
import functools
import json
import shutil
import subprocess
import sys
import types
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

import llama_fast
from benchmarks import compare, floors, harness, model, providers, results, suite
from benchmarks.providers import Provider
from benchmarks.results import Limit, Line, Results
from llama_fast import plan
from llama_fast.config import PRESETS, LlamaConfig
from llama_fast.ops import eager
from llama_fast.ops.table import OPS
from llama_fast.verify import Case


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The work here is tiny; threads would only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


RMS_NORM = "rms_norm bfloat16 ...(4096,) C4096"


def test_the_committed_floors_name_known_cases_and_cover_every_op() -> None:
    found = floors.read()
    cases = {f.case.split()[0] for f in found}
    assert cases >= {"attention", "rms_norm", "add_rms_norm", "swiglu", "rope", "linear_cross_entropy"}
    assert cases >= {"block", "training_step", "lora_step", "decode"}
    assert all(set(f.least) <= floors.CLASSES for f in found)


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

    monkeypatch.setattr(floors, "subprocess", types.SimpleNamespace(run=broken))
    monkeypatch.setattr(floors, "processor", lambda: "zen5")
    lines = [
        floors.Floor(RMS_NORM, "forward of limit", "", {"zen5": 0.1}),
        floors.Floor("decode bfloat16", "time vs transformers", "", {"zen5": 2.0}),
    ]
    console = Console(record=True, width=200)
    assert [r["ok"] for r in floors.check(lines, console)] == [False, True]
    assert f"{RMS_NORM}: RuntimeError: results differ" in console.export_text()


def test_figures_are_named_as_the_floors_name_them(monkeypatch: pytest.MonkeyPatch) -> None:
    committed = {(f.case.split()[0], f.figure) for f in floors.read()}
    monkeypatch.setattr(llama_fast, "keep_host_memory", lambda: None)
    limits = (*LIMITS, Limit("matmul bfloat16", "flop/s", 1e11, "made up"))
    monkeypatch.setattr(harness, "measure_limits", lambda dtypes: limits)
    ops = ("block", "training_step", "lora_step", "decode")
    scenarios = [dataclasses.replace(_scenario(op), label="") for op in ops]
    monkeypatch.setattr(model, "scenarios", lambda: scenarios)
    monkeypatch.setattr(suite, "collect", lambda ops: [SMALL])
    interleave = harness.interleave
    monkeypatch.setattr(harness, "interleave", lambda runs, seconds, **more: interleave(runs, 0.0, least=2, **more))
    monkeypatch.setattr(model, "NEW_TOKENS", 3)
    assert set(floors.figures(SMALL.name, "default memory")) == {
        *("forward vs eager", "forward+backward vs eager", "forward vs sdpa_repeated"),
        *("forward+backward vs sdpa_repeated", "forward of limit", "forward+backward of limit"),
    }
    if find_spec("transformers") is not None:
        block = floors.figures("block float32", "")
        assert set(block) == {"time vs transformers", "memory vs transformers"}
        assert block["memory vs transformers"] > 1.5
        with monkeypatch.context() as patch:
            patch.setattr(torch, "compile", lambda f: f)
            step = floors.figures("training_step float32", "default memory")
        assert set(step) == {"time vs transformers", "time vs torch.compile"}
        assert set(floors.figures("decode float32", "default memory")) == {"time vs transformers"}
        if find_spec("peft") is not None:
            lora = floors.figures("lora_step float32", "")
            assert set(lora) == {"time vs transformers", "memory vs transformers"}
            assert lora["memory vs transformers"] > 1.5
        assert set(floors.figures("training_step float32", "ours kept", "transformers")) == {"seconds"}
    assert set(floors.figures("training_step float32", "ours kept", "llama_fast")) == {"seconds"}
    assert {figure for op, figure in committed if op == "block"} == {"time vs transformers", "memory vs transformers"}


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
    assert ("torch.compile" in names) == (op != "attention")  # there it is eager's call again
    assert "torch.compile" in [p.name for p in providers.of(op, "cpu")]
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


def test_flash_attention_3_and_4_are_called_as_their_interface_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in: [B, T, H, D], a window to the left of each query, the log-sum-exp beside the result."""

    def flash_attn_func(q: Any, k: Any, v: Any, causal: bool = False, window_size: Any = (-1, -1)) -> Any:
        window = None if window_size == (-1, -1) else window_size[0] + 1
        return eager.attention(q, k, v, causal=causal, window=window), "log-sum-exp"

    q, k, v = Case("attention", {"B": 1, "T": 9, "S": 9, "H": 4, "G": 2, "D": 16}).inputs(torch.float32).values()
    found = {p.name: p for p in providers.of("attention", "cuda")}
    for name, module in (("flash-attn-3", "flash_attn_interface"), ("flash-attn-4", "flash_attn.cute")):
        assert (
            found[name].objection(SMALL.case, torch.bfloat16, "cuda")
            == f"not installed: pip install {found[name].package}"
        )
        for part in (module.partition(".")[0], module):
            stand_in: Any = types.ModuleType(part)
            stand_in.flash_attn_func = flash_attn_func
            monkeypatch.setitem(sys.modules, part, stand_in)
        for options in ({}, {"window": 3}):
            torch.testing.assert_close(found[name].call(q=q, k=k, v=v, **options), eager.attention(q, k, v, **options))


# ---- the model level ------------------------------------------------------------------------------------------------
TINY = LlamaConfig(64, 2, 4, 2, 176, 96, 128)


def _scenario(op: str, dtype: torch.dtype = torch.float32) -> model.Scenario:
    return model.Scenario(op, TINY, "tiny", 2, 32, dtype)


@pytest.mark.parametrize("op", ["block", "training_step", "lora_step", "decode"])
def test_every_way_to_run_a_model_gives_a_line(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "NEW_TOKENS", 4)
    s = _scenario(op)
    lines = {x.provider: x for x in model.measure(s, seconds=0.0, choose=lambda n: n != "torch.compile")}
    wrong = [(n, x.reason) for n, x in lines.items() if x.status == "wrong"]
    assert not wrong
    assert list(s.sides()) == model.providers(op)
    if op == "decode":
        assert list(lines) == ["llama_fast", "llama_fast:hf", "eager", "transformers"]
    elif op == "lora_step":
        assert list(lines) == ["llama_fast:hf", "transformers", "transformers+checkpoint"]
    else:
        ours = [f"llama_fast:{p}" for p in ("recompute-cheap", "save", "recompute-linear", "recompute-all")]
        ours += ["llama_fast:hf"] * (op == "training_step")
        expected = [*ours, "eager", "transformers", "transformers+liger", "transformers+checkpoint"]
        assert list(lines) == expected
    absent = {n: x.reason for n, x in lines.items() if x.status == "not run"}
    if find_spec("transformers") is not None:
        assert set(absent) <= {"transformers+liger"}
    assert all(r == "runs on cuda only" or r.startswith("not installed: pip install") for r in absent.values()), absent
    shares = tuple(results.against(x, LIMITS) for x in lines.values())
    results.check(Results(results.FORMAT, harness.environment("kept"), LIMITS, shares))
    line = next(iter(lines.values()))
    if op == "training_step":
        assert line.flops == 64 * TINY.flops_per_token(32)
        assert line.tokens == 64
    if op == "lora_step":
        assert line.flops == 64 * (TINY.flops_per_token(32) - 2 * TINY.n_matmul_params)


def test_liger_changes_transformers_for_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in that replaces what Liger replaces: names in transformers' module."""
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    before = llama.apply_rotary_pos_emb, llama.LlamaMLP

    def apply_liger_kernel_to_llama(model: Any) -> None:
        llama.apply_rotary_pos_emb, llama.LlamaMLP = "rope", "mlp"

    package: Any = types.ModuleType("liger_kernel.transformers")
    package.apply_liger_kernel_to_llama = apply_liger_kernel_to_llama
    monkeypatch.setitem(sys.modules, "liger_kernel", types.ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", package)
    context = model._with_liger(None)
    assert (llama.apply_rotary_pos_emb, llama.LlamaMLP) == before
    for _ in range(2):
        with context():
            assert (llama.apply_rotary_pos_emb, llama.LlamaMLP) == ("rope", "mlp")
        assert (llama.apply_rotary_pos_emb, llama.LlamaMLP) == before


def test_a_run_that_is_cut_off_keeps_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each provider is timed before the next one is made, and after the end none is begun."""
    begun, kept = [], []
    ways = ("eager", "llama_fast:recompute-cheap", "llama_fast:save")

    def sides(self: model.Scenario) -> dict[str, Any]:
        def maker(name: str) -> model.Side:
            begun.append(name)
            return model.Side(lambda: None, lambda: [torch.ones(2)])

        return {n: functools.partial(maker, n) for n in (*ways[1:], "eager", "transformers")}

    monkeypatch.setattr(model.Scenario, "sides", sides)
    monkeypatch.setattr(model.time, "perf_counter", lambda: float(len(kept)))
    lines = model.measure(
        _scenario("block"), until=2.0, keep=lambda x: kept.append([y.provider for y in x if y.seconds])
    )
    assert begun == list(ways)
    assert kept == [["eager"], [ways[1], "eager"], [*ways[1:], "eager"], [*ways[1:], "eager"]]
    assert {x.provider: x.reason for x in lines if x.status == "not run"} == {"transformers": "no time left"}


def test_a_training_step_in_the_papers_terms() -> None:
    case = {"B": 4, "T": 2048, "C": 8192, "L": 3}
    blank = dataclasses.asdict(model.measure(_scenario("block"), 0.0, lambda n: n == "eager")[0])
    blank |= {"op": "training_step", "case": case, "dtype": "bfloat16", "flops": 10**15, "tokens": 8192, "error": None}
    blank |= {"label": "llama-65b", "seconds": results.Seconds(2.0, 2.0, 2.0, 3), "provider": "llama_fast:save"}
    facts = dataclasses.replace(harness.environment("kept"), device="NVIDIA H200")
    console = Console(record=True, width=200)
    suite.print_models(Results(results.FORMAT, facts, LIMITS, (Line(**blank),)), console)
    text = console.export_text()
    line = (
        "training_step bfloat16 llama-65b B4 T2048 C8192 L3 llama_fast:save: 4,096 tokens/s, 50.5% MFU of the published"
    )
    assert line in text
    assert "MFU: tokens/s x (6 N + 12 L H D T) / peak flop/s." in text
    assert "380 tokens a second and GPU on A100: 49.5% MFU with attention (47.7% by 6 N alone)" in text
    assert "Layers of that shape on one NVIDIA H200: 50.5% (48.7%)" in text


def test_the_bytes_that_a_layer_keeps_are_the_plans() -> None:
    s = _scenario("block")
    lines = model.measure(s, seconds=0.0, choose=lambda n: n.startswith("llama_fast"))
    for x in lines:
        policy = x.provider.partition(":")[2]
        expected = s.tokens * plan.block_bytes_per_token(TINY, policy, 4)
        assert x.kept_bytes is not None
        assert expected <= x.kept_bytes <= expected + 4096, policy  # scalars and padding of the allocator


def test_a_model_that_computes_something_else_shows_no_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = model.TransformerBlock.forward

    def wrong(self: Any, x: torch.Tensor, *arguments: Any) -> torch.Tensor:
        y = right(self, x, *arguments)
        return y * 1.01 if self.options.policy == "save" else y

    monkeypatch.setattr(model.TransformerBlock, "forward", wrong)
    lines = {x.provider: x for x in model.measure(_scenario("block"), 0.0, lambda n: n.startswith("llama_fast"))}
    assert lines["llama_fast:save"].status == "wrong"
    assert lines["llama_fast:save"].seconds is None
    assert "differs from eager PyTorch by 0.01" in lines["llama_fast:save"].reason
    assert lines["llama_fast:recompute-cheap"].status == "measured"


def test_on_a_gpu_the_shapes_are_those_of_published_models() -> None:
    found = model.scenarios("cuda")
    assert {s.op for s in found} == {"block", "training_step", "lora_step", "decode"}
    assert {s.label for s in found} >= {"llama-7b", "llama-13b", "llama-65b", "llama-3-8b", "llama-3-70b"}
    step = next(s for s in found if s.name == "training_step bfloat16 llama-65b")
    assert (step.config.dim, step.config.n_layers) == (8192, 3)
    # weights, gradients and two moments in bfloat16, activations of every layer: beside each other in 80 GB
    held = 8 * step.config.n_params + step.tokens * 3 * plan.block_bytes_per_token(step.config, "save")
    assert held < 60e9


# ---- two versions ---------------------------------------------------------------------------------------------------
def test_two_sides_take_turns_and_change_their_order() -> None:
    calls: list[str] = []

    def side(name: str, seconds: list[float]) -> Any:
        def run(count: int) -> list[float]:
            calls.append(name)
            return [seconds[len(calls) % len(seconds)]] * count

        return run

    sides = {"old": side("o", [0.03]), "new": side("n", [0.02, 0.021])}
    times, ratio = compare.alternate(sides, {"old": 0.03, "new": 0.02}, turns=4)
    assert "".join(calls) == "onnoonno"
    assert times["old"].median == 0.03
    assert times["old"].runs == times["new"].runs == 4
    assert 0.03 / 0.021 <= ratio.p20 <= ratio.median <= ratio.p80 <= 1.5
    assert ratio.verdict == "faster"
    assert compare.Ratio(0.9, 0.85, 0.99).verdict == "slower"
    assert compare.Ratio(0.9, 0.85, 1.01).verdict == "same"
    quick = compare.alternate(sides, {"old": 1e-4, "new": 1e-4}, turns=2)[0]
    assert quick["old"].runs == 2 * 200, "short runs are repeated within a turn"


def test_a_worker_measures_the_package_of_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of the package with an error in it: that side says so, and the other one is measured."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    old = tmp_path / "old"
    root = Path(harness.__file__).parents[1]
    skip = shutil.ignore_patterns("__pycache__")
    shutil.copytree(root / "llama_fast", old / "llama_fast", ignore=skip)
    source = old / "llama_fast" / "ops" / "rms_norm.py"
    wrong = (
        "_right = rms_norm\n\n\ndef rms_norm(*arguments, **options):\n    return _right(*arguments, **options) * 1.5\n"
    )
    source.write_text(f"{source.read_text()}\n\n{wrong}")
    name = "rms_norm bfloat16 ...(1,) C4096"
    with compare.Worker(old) as worker, compare.Worker(root) as new:
        assert worker.ask(about=True)["folder"] == str(old)
        assert new.ask(about=True)["folder"] == str(root)
        with pytest.raises(RuntimeError, match="RuntimeError: wrong: out: largest error"):
            worker.ask(prepare=name, direction="forward")
        with pytest.raises(RuntimeError, match="StopIteration"):
            worker.ask(prepare="no such case", direction="forward")
        assert new.ask(prepare=name, direction="forward")["seconds"] > 0
        assert len(new.ask(run=3)["seconds"]) == 3
    assert worker.process.returncode == 0


def test_a_worker_that_ends_is_named(tmp_path: Path) -> None:
    worker = compare.Worker(tmp_path)
    worker.process.kill()
    worker.process.wait()
    with pytest.raises(RuntimeError, match="the worker ended with status -9"):
        worker.ask(about=True)


def test_a_revision_is_checked_out_and_built_once(tmp_path: Path) -> None:
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c"]
    (tmp_path / "setup.py").write_text("open('made', 'a').write('x')\n")
    (tmp_path / ".gitignore").write_text("build/\n")
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "works"]):
        subprocess.run([*git, *command], check=True)
    (tmp_path / "setup.py").write_text("raise SystemExit('no compiler')\n")
    subprocess.run([*git, "commit", "-qam", "broken"], check=True)
    folder, commit = compare.checkout("HEAD~1", tmp_path)
    (folder / "built").unlink()  # as after Ctrl-C in the middle of it
    for left in (folder / "setup.py", folder / ".git"):
        left.unlink()
        subprocess.run([*git, "worktree", "lock", str(folder)], check=True)  # git's own, while it checks out
        assert compare.checkout("HEAD~1", tmp_path) == (folder, commit)
        (folder / "built").unlink()
    assert compare.checkout("HEAD~1", tmp_path) == (folder, commit)
    assert len(commit) == 40
    assert folder == tmp_path / "build" / "revisions" / commit[:12]
    assert compare.checkout("HEAD~1", tmp_path) == (folder, commit)
    assert (folder / "made").read_text() == "x"
    with pytest.raises(ValueError, match="revision 'HEAD' does not build: no compiler"):
        compare.checkout("HEAD", tmp_path)
    installed = tmp_path / ".venv" / "lib" / "llama_fast"
    installed.mkdir(parents=True)
    with pytest.raises(ValueError, match=r"revision 'HEAD': .*llama_fast is an installed copy; run `python -m bench"):
        compare.checkout("HEAD", installed)
    assert list(installed.iterdir()) == []
    with pytest.raises(ValueError, match="revision 'v9': git says 'Needed a single revision'; expected a commit"):
        compare.checkout("v9", tmp_path)


def test_a_comparison_gives_lines_of_both_sides(sides: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def ask(folder: Path, **request: Any) -> dict[str, Any]:
        if "limits" in request:
            return {"limits": [dataclasses.asdict(x) for x in LIMITS]}
        if "about" in request:
            return {"folder": str(folder), "allocator": "kept"}
        old = folder == tmp_path
        if request.get("prepare", "").startswith("swiglu float32") and old:
            raise RuntimeError("RuntimeError: wrong: out: largest error 1 exceeds 0")
        return {"seconds": [0.2 if old else 0.1] * request["run"] if "run" in request else 0.1}

    sides(ask)
    monkeypatch.setattr(harness, "measure_limits", lambda *_: LIMITS)
    console, path = Console(record=True, width=200), tmp_path / "ab.json"
    suite.run(["swiglu"], cases=["F11008"], versus="main", json_path=path, console=console)
    found = results.read(path)
    assert found.environment.against == "c0ffee" + "0" * 34
    by_status = {(x.provider, x.dtype): x.status for x in found.lines}
    assert by_status == {
        ("llama_fast", "bfloat16"): "measured",
        ("before:c0ffee000000", "bfloat16"): "measured",
        ("llama_fast", "float32"): "not run",
        ("before:c0ffee000000", "float32"): "wrong",
    }
    assert found.lines[0].command.endswith("--vs c0ffee000000")
    text = console.export_text()
    assert "2.000x" in text
    assert "old: main, commit c0ffee000000; new: this tree" in text
    assert "old: RuntimeError: wrong" in text


def test_a_training_step_leaves_the_weights_to_the_next_provider() -> None:
    scenario = model.Scenario("training_step", LlamaConfig.preset("tiny"), "", 1, 16, torch.float32)
    maker = dict(model._training_step(scenario))["eager"]
    assert not isinstance(maker, str)
    side = maker()
    before = side.values()
    side.run()
    assert all(torch.equal(a, b) for a, b in zip(side.values(), before, strict=True))
