"""Which kernel is chosen, with what launch parameters: under the interpreter (tests/test_triton.py)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import llama_fast as lf
from llama_fast.kernels import attention_tiles, launch
from llama_fast.kernels.attention_tiles import head_descriptor
from llama_fast.kernels.swiglu import CANDIDATES, HEURISTIC
from llama_fast.ops import dispatch, proven


@pytest.fixture
def fresh_choices() -> Iterator[None]:
    """The primitives remember which backend takes which shapes."""
    for primitive in dispatch.primitives.values():
        primitive._chosen.clear()
    yield
    for primitive in dispatch.primitives.values():
        primitive._chosen.clear()


def test_unproven_kernels_run_only_when_asked_for(fresh_choices: None, monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(2, 8)
    monkeypatch.setattr(proven, "listed", lambda: {})
    text = lf.explain("swiglu", x, x)
    assert 'triton: unproven on cpu in float32: lf.backend("triton") or LLAMA_FAST_BACKEND=triton runs it' in text
    assert "triton: runs" not in text
    with lf.backend("triton"):
        assert "triton: runs" in lf.explain("swiglu", x, x)


def test_a_listed_primitive_runs_by_default(fresh_choices: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proven, "listed", lambda: {"cpu": {"triton": {"swiglu_fwd": ["float32"]}}})
    x = torch.randn(2, 8)
    assert "triton: forward runs; backward unproven on cpu" in lf.explain("swiglu", x, x)
    assert "triton: unproven" in lf.explain("swiglu", x.half(), x.half())
    ran: list[str] = []
    kernels = __import__("llama_fast.kernels.swiglu", fromlist=["swiglu_fwd"])
    for name in ("swiglu_fwd", "swiglu_bwd"):
        original = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *a, n=name, f=original: (ran.append(n), f(*a))[1])
    y = lf.swiglu(x.requires_grad_(), x)
    y.sum().backward()
    assert ran == ["swiglu_fwd"]
    with lf.backend("triton"):
        y = lf.swiglu(x, x)
    y.sum().backward()  # outside the block: the backward follows its forward
    assert ran == ["swiglu_fwd"] * 2 + ["swiglu_bwd"]


def test_a_proof_ends_with_the_sizes_that_were_timed(fresh_choices: None, monkeypatch: pytest.MonkeyPatch) -> None:
    both = {"attention_fwd": ["float32"], "attention_bwd": ["float32"]}
    monkeypatch.setattr(proven, "listed", lambda: {"cpu": {"triton": both}})

    def explained(T: int, D: int, packed: bool = False) -> str:
        q, k = torch.randn(1, T, 4, D), torch.randn(1, 128, 2, D)
        if packed:
            bounds = torch.tensor([0, T], dtype=torch.int32)
            return lf.explain("attention", q[0], k[0, :T], k[0, :T], bounds)
        return lf.explain("attention", q, k, k)

    asked = 'lf.backend("triton") or LLAMA_FAST_BACKEND=triton runs it'
    for text in (explained(128, 64), explained(200, 128), explained(128, 64, packed=True)):
        assert "triton: runs" in text
    for packed in (False, True):
        assert f"triton: not timed where T = 100 is less than 128: {asked}" in explained(100, 64, packed)
    assert f"triton: not timed where D = 32 not in 64, 128: {asked}" in explained(128, 32)
    with lf.backend("triton"):
        assert "triton: runs" in explained(1, 32)
    monkeypatch.setattr(proven, "listed", lambda: {})
    assert "triton: unproven on cpu" in explained(1, 64)


def _choose(run: Any, device: torch.device) -> Any:
    return launch.choose("swiglu_fwd", (torch.float32, 64), device, HEURISTIC, lambda: CANDIDATES, run)


def test_parameters_are_the_heuristic_unless_forced() -> None:
    ran: list[Any] = []
    with launch.autotune():  # not on a CPU
        assert _choose(ran.append, torch.device("cpu")) is HEURISTIC
    with launch.force("swiglu_fwd", CANDIDATES[0]):
        assert _choose(ran.append, torch.device("cpu")) is CANDIDATES[0]
    assert _choose(ran.append, torch.device("cpu")) is HEURISTIC
    assert ran == []


def test_autotuning_measures_once_and_keeps_the_fastest(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    best, ran = CANDIDATES[3], []
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a device")

    def time(run: Any) -> float:
        run()
        return 1.0 if ran[-1] == best else 2.0

    monkeypatch.setattr(launch.triton.testing, "do_bench", time)
    device, file = torch.device("cuda", 0), tmp_path / "new" / "tuned.json"
    assert _choose(ran.append, device) is HEURISTIC
    with launch.autotune(file):
        assert _choose(ran.append, device) == best
        measured = len(ran)
        assert measured == len({HEURISTIC, *CANDIDATES})
        assert _choose(ran.append, device) == best
    assert len(ran) == measured
    file.write_text("{ not JSON")
    with launch.autotune(file):
        assert _choose(ran.append, device) == best


def test_autotuning_leaves_out_what_the_device_has_no_room_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a device")
    monkeypatch.setattr(launch.triton.testing, "do_bench", lambda run: run() or 1.0)

    def run(parameters: Any) -> None:
        if parameters != CANDIDATES[2]:
            raise launch.triton.runtime.errors.OutOfResources(70000, 65536, "shared memory")

    with launch.autotune(tmp_path / "tuned.json"):
        assert _choose(run, torch.device("cuda", 0)) == CANDIDATES[2]


class FakeKernel:
    """Records (first call or later one, grid, arguments)."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        class Compiled:
            def __getitem__(_, grid: tuple[int, ...]) -> Any:
                return lambda *args: self.calls.append(("again", grid, args))

        def first(*args: Any, **options: Any) -> Any:
            self.calls.append(("first", grid, args, options))
            return Compiled()

        return first


def test_start_compiles_for_what_triton_specialises_and_then_launches_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "INTERPRETED", False)
    kernel, x = FakeKernel(), torch.zeros(64)

    def kind(*args: Any, constants: tuple[Any, ...] = (8,), warps: int = 4) -> str:
        launch.start(kernel, (3,), args, constants, num_warps=warps)
        return kernel.calls[-1][0]

    assert kind(x, 32, 0.5) == "first"
    assert kernel.calls[-1] == ("first", (3,), (x, 32, 0.5, 8), {"enable_fp_fusion": True, "num_warps": 4})
    assert kind(x, 48, 0.25) == "again"
    assert kernel.calls[-1] == ("again", (3, 1, 1), (x, 48, 0.25, 8))
    for different in ((x[1:], 32, 0.5), (x, 33, 0.5), (x, 1, 0.5), (x, 1 << 40, 0.5), (x.half(), 32, 0.5)):
        assert kind(*different) == "first"
    assert kind(x, 32, 0.5, constants=(16,)) == "first"
    assert kind(x, 32, 0.5, warps=8) == "first"
    assert kind(x[4:], 32, 0.5) == "again"
    assert kind(x, 32, 1) == "first"  # a whole number that equals a fraction is another type
    assert kind(x, 32, 1.0) == "again"
    assert kind(x, 32, None) == "first"


def test_start_counts_warps_of_32_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "INTERPRETED", False)
    for place, warps in (("sm_90", 8), ("gfx1100", 8), ("gfx942", 4)):
        kernel = FakeKernel()
        with launch.pretend(place):
            launch.start(kernel, (3,), (torch.zeros(64),), (), num_warps=8)
        assert kernel.calls[-1][-1]["num_warps"] == warps, place


@pytest.mark.parametrize("hip", [False, True])
def test_amd_kernels_are_compiled_for_tensors_of_less_or_more_than_2_gb(
    hip: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(launch, "_HIP", hip)
    kernel, near, far = FakeKernel(), torch.empty(64, device="meta"), torch.empty(1 << 29, device="meta")
    for x in (near, far, far[:64], near, far):
        launch.start(kernel, (3,), (x, 32), ())
    assert [call[0] for call in kernel.calls] == ["first", "first" if hip else "again", "again", "again", "again"]


def test_start_compiles_for_the_tile_of_a_descriptor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "INTERPRETED", False)
    kernel, x = FakeKernel(), torch.zeros(2, 64, 3, 16)

    def kind(x: torch.Tensor, block: int) -> str:
        descriptor = head_descriptor(x, block, 16)
        launch.start(kernel, (3,), (descriptor, 5), ())
        assert kernel.calls[-1][2][0] is descriptor
        return kernel.calls[-1][0]

    assert [kind(x, 32), kind(x, 32), kind(torch.zeros(1, 80, 3, 16), 32)] == ["first", "again", "again"]
    assert [kind(x, 64), kind(x.half(), 32)] == ["first", "first"]


def test_a_descriptor_of_known_sizes_is_as_a_new_one() -> None:
    x, y = torch.zeros(2, 64, 3, 16), torch.ones(2, 64, 3, 16)
    attention_tiles._descriptors.clear()
    first, second = head_descriptor(x, 32, 16), head_descriptor(y, 32, 16)
    assert second.base is y
    assert {k: v for k, v in vars(first).items() if k != "base"} == {
        k: v for k, v in vars(second).items() if k != "base"
    }
    assert head_descriptor(x[:1], 32, 16).shape == [1, 3, 64, 16]
