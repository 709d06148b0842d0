"""linear_cross_entropy: error budget on every target, extreme logits, gradients, memory, bad input, bugs to be seen."""

from __future__ import annotations

import math
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from numerics import DTYPES, TARGETS, EveryResult, LiveBytes, assert_bug_is_caught, assert_within_budget, target
from torch import Tensor

import llama_fast as lf
from llama_fast.ops import chunks, eager, linear, native, pieces, reference
from llama_fast.verify import Case

OP = "linear_cross_entropy"
OPTIONS: list[dict[str, Any]] = [
    {},
    {"reduction": "sum"},
    {"reduction": "none"},
    {"label_smoothing": 0.1},
    {"z_loss": 1e-2},
    {"label_smoothing": 0.3, "z_loss": 1e-2, "reduction": "none", "ignore_index": 2},
]
SHAPES = [
    {"...": (1,), "C": 1, "V": 1},
    {"...": (2, 5), "C": 3, "V": 7},
    {"...": (3, 37), "C": 64, "V": 1003},
    {"...": (6,), "C": 16, "V": 50001},
    {"...": (0,), "C": 16, "V": 33},
    {"...": (2100,), "C": 24, "V": 131},
]
CPU = [t for t in TARGETS if t.startswith("cpu")]


def some_ignored(*values: int) -> dict[str, Callable[[torch.dtype], Tensor]]:
    return {"targets": lambda _: torch.tensor(values)}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("target_name", TARGETS)
def test_budget(target_name: str, dtype: torch.dtype) -> None:
    for dims in SHAPES:
        assert_within_budget(Case(OP, dims), target_name, dtype)
    dims = {"...": (40,), "C": 48, "V": 515}
    for options in OPTIONS:
        assert_within_budget(Case(OP, dims, options), target_name, dtype)
    assert_within_budget(Case(OP, dims, strided=True), target_name, dtype)
    assert_within_budget(Case(OP, dims, scale=3.0), target_name, dtype)


@pytest.mark.parametrize("C", [512, 2048])
def test_budget_of_a_long_float32_contraction(C: int) -> None:
    """oneDNN's sums of that many terms in one chain miss it."""
    case = Case(OP, {"...": (64,), "C": C, "V": 1003}, {"reduction": "none"}, scale=0.3)
    assert_within_budget(case, "cpu/", torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("target_name", TARGETS)
def test_ignored_rows(target_name: str, dtype: torch.dtype) -> None:
    dims = {"...": (5,), "C": 8, "V": 33}
    for reduction in ("mean", "sum", "none"):
        options = {"reduction": reduction, "label_smoothing": 0.1, "z_loss": 1e-2}
        some, every = some_ignored(-100, 0, 32, -100, 5), some_ignored(*[-100] * 5)
        assert_within_budget(Case(OP, dims, options, tensors=some), target_name, dtype)
        assert_within_budget(Case(OP, dims, options, tensors=every), target_name, dtype)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_leading_dimension(reduction: str) -> None:
    hidden, weight, targets = Case(OP, {"...": (1,), "C": 16, "V": 33}).inputs(torch.float32).values()
    one = lf.linear_cross_entropy(hidden, weight, targets, reduction=reduction)
    scalar = lf.linear_cross_entropy(hidden[0], weight, targets[0], reduction=reduction)
    assert scalar.shape == ()
    assert scalar.item() == one.item()


@pytest.mark.parametrize("R", [4096, 6000])
@pytest.mark.parametrize("mean", [0.0, 1.0])
def test_budget_of_dweight_over_many_chunks(R: int, mean: float) -> None:
    """In place for the first size and in a float32 copy for the second; partial sums that cancel, and that add up."""
    C, V = 8, 24
    assert chunks.plan(R, C, V, 2, True) == ((1024, False) if R == 4096 else (1024, True))
    hidden = torch.randn(R, C, generator=torch.Generator().manual_seed(3)) + mean
    for dtype in (torch.bfloat16, torch.float16):
        case = Case(OP, {"...": (R,), "C": C, "V": V}, {"reduction": "sum"}, tensors={"hidden": hidden.to})
        assert_within_budget(case, "cpu/", dtype)


def rows_of(logits: Tensor, targets: Tensor, **options: float) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, lse, gradient) of the native kernel."""
    x, R = logits.clone(), logits.shape[0]
    loss, lse = torch.full((R,), torch.nan), torch.full((R,), torch.nan)
    smoothing, z_loss = options.get("label_smoothing", 0.0), options.get("z_loss", 0.0)
    native._native.cpu.cross_entropy_rows(x, targets, torch.ones(R), -100, smoothing, z_loss, loss, lse)
    return loss, lse, x


@pytest.mark.parametrize("target_name", CPU)
@pytest.mark.parametrize("smoothing", [0.0, 0.2, 1.0])
def test_extreme_logits_as_cross_entropy(target_name: str, smoothing: float) -> None:
    V = 45
    x = torch.randn(12, V, generator=torch.Generator().manual_seed(0))
    x[0], x[1, ::2], x[1, 1::2] = 1e4, 1e4, -1e4
    x[2, 3] = 1e4
    x[3, 5:] = -torch.inf
    x[4, 7] = -torch.inf
    x[5] = -torch.inf
    x[6, 9], x[7, 44], x[8, 0] = torch.inf, torch.inf, torch.nan
    x[9] = 3e38
    x[10] = -3e38
    t = torch.tensor([1, 2, 3, 4, 7, 0, 3, 44, 2, 8, 44, -100])
    exact = x.double().requires_grad_()
    truth = F.cross_entropy(exact, t, label_smoothing=smoothing, reduction="none")
    (gradient,) = torch.autograd.grad(truth.sum(), exact)
    with target(target_name):
        loss, _, found = rows_of(x, t, label_smoothing=smoothing)
    torch.testing.assert_close(loss, truth.float(), rtol=2e-6, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(found, gradient.float(), rtol=2e-6, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("target_name", CPU)
@pytest.mark.parametrize("lead", [0.0, 5.0, 17.0, 40.0, 80.0])
def test_true_class_keeps_its_digits_when_its_probability_is_near_one(target_name: str, lead: float) -> None:
    V = 1003
    x = torch.randn(4, V, generator=torch.Generator().manual_seed(0))
    t = torch.tensor([0, 500, 1002, 17])
    x[range(4), t] += lead
    exact = x.double()
    others = exact.scatter(1, t.unsqueeze(1), -torch.inf).logsumexp(1)
    gap = others - exact.gather(1, t.unsqueeze(1)).squeeze(1)
    with target(target_name):
        loss, _, gradient = rows_of(x, t)
    torch.testing.assert_close(loss.double(), F.softplus(gap), rtol=1e-6, atol=0)
    found = gradient.gather(1, t.unsqueeze(1)).squeeze(1).double()
    torch.testing.assert_close(found, -torch.sigmoid(gap), rtol=1e-6, atol=0)


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the mode is that of x86 processors")
@pytest.mark.parametrize("target_name", CPU)
def test_subnormal_probabilities_are_zero_where_they_cost_time_and_the_mode_stays_inside(target_name: str) -> None:
    x = torch.zeros(64, 100)
    x[:, 1:] = -95.0
    with target(target_name):
        _, _, gradient = rows_of(x, torch.zeros(64, dtype=torch.int64))
    found = gradient[:, 1:]
    if native.amd_family() == 0:
        assert not found.any()
    else:
        torch.testing.assert_close(found, torch.full_like(found, 5.52e-42), rtol=1e-2, atol=0.0)
    small = torch.full((1 << 20,), 1e-40)  # for all threads
    assert (small * 0.5 > 0.0).all()


@pytest.mark.parametrize("target_name", CPU)
def test_kernel_stays_inside_the_row_for_any_target(target_name: str) -> None:
    x, t = torch.zeros(3, 5), torch.tensor([5, -1, 1 << 40])
    with target(target_name):
        loss, lse, gradient = rows_of(x, t)
    assert loss.isnan().all()
    assert lse.isnan().all()
    assert gradient.isnan().all()


@pytest.mark.parametrize("target_name", CPU)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_are_left_alone_without_row_scale(target_name: str, dtype: torch.dtype) -> None:
    x, t, out = torch.randn(3, 37).to(dtype), torch.tensor([0, 36, -100]), torch.empty(3)
    kept = x.clone()
    with target(target_name):
        native._native.cpu.cross_entropy_rows(x, t, None, -100, 0.1, 0.1, out, out)
    assert torch.equal(x, kept)


@pytest.mark.parametrize("options", [*OPTIONS, {"label_smoothing": 1.0, "z_loss": 1e-3}], ids=str)
def test_gradcheck(options: dict[str, Any]) -> None:
    case = Case(OP, {"...": (2, 3), "C": 4, "V": 5}, options)
    hidden, weight, targets = case.inputs(torch.float64).values()
    targets[0, 1] = options.get("ignore_index", -100)
    leaves = (hidden.requires_grad_(), weight.requires_grad_())
    assert torch.autograd.gradcheck(lambda h, w: lf.linear_cross_entropy(h, w, targets, **options), leaves)


def test_scaled_and_retained_backward() -> None:
    hidden, weight, targets = Case(OP, {"...": (9,), "C": 8, "V": 33}).inputs(torch.float32).values()
    leaves = (hidden.requires_grad_(), weight.requires_grad_())
    once = torch.autograd.grad(lf.linear_cross_entropy(*leaves, targets), leaves)
    kept = [g.clone() for g in once]
    loss = lf.linear_cross_entropy(*leaves, targets)
    scaled = torch.autograd.grad(0.25 * loss, leaves, retain_graph=True)
    again = torch.autograd.grad(3.0 * loss, leaves, retain_graph=True)
    for g, s, a, k in zip(once, scaled, again, kept, strict=True):
        torch.testing.assert_close(s, 0.25 * g)
        torch.testing.assert_close(a, 3.0 * g)
        assert torch.equal(g, k)
    for _ in range(2):
        loss.backward(retain_graph=True)
    torch.testing.assert_close(weight.grad, 2.0 * kept[1])


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_gradient_scaler_keeps_float16_gradients(reduction: str) -> None:
    """Its factor is in before they are rounded: p / R alone is below float16's normal numbers."""
    R, V = 2048, 8192
    leaves = Case(OP, {"...": (R,), "C": 16, "V": V}).inputs(torch.float16)
    targets = leaves.pop("targets")
    scale = 65536.0 / (R if reduction == "sum" else 1)

    def gradients(module: Any, dtype: torch.dtype) -> tuple[Tensor, ...]:
        inputs = [x.to(dtype).detach().requires_grad_() for x in leaves.values()]
        return torch.autograd.grad(module.linear_cross_entropy(*inputs, targets, reduction=reduction) * scale, inputs)

    ours, theirs, truth = (
        gradients(lf, torch.float16),
        gradients(eager, torch.float16),
        gradients(reference, torch.float64),
    )
    for a, b, exact in zip(ours, theirs, truth, strict=True):
        assert (a - exact).norm() <= 1.5 * (b - exact).norm() + 2**-11 * exact.norm()


def test_peak_memory() -> None:
    R, C, V = 4096, 32, 1024
    inputs = Case(OP, {"...": (R,), "C": C, "V": V}).inputs(torch.bfloat16)
    peaks = {}
    for name, module in (("ours", lf), ("eager", eager)):
        leaves = {n: x.detach().requires_grad_(x.is_floating_point()) for n, x in inputs.items()}
        with LiveBytes() as memory:
            module.linear_cross_entropy(**leaves).backward()
        peaks[name] = memory.peak - sum(x.nbytes for x in leaves.values() if x.requires_grad)
        if name == "ours":
            assert memory.largest == R // 4 * V * 2
    assert peaks["eager"] > R * V * 6
    assert peaks["ours"] <= peaks["eager"] / 8


MANY_TERMS = Case(OP, {"...": (700,), "C": 256, "V": 1003}, scale=0.2)


def run_once(dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    hidden, weight, targets = MANY_TERMS.inputs(dtype).values()
    leaves = (hidden.requires_grad_(), weight.requires_grad_())
    loss = lf.linear_cross_entropy(*leaves, targets)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_repeats_bitwise_and_threads_change_only_rounding(dtype: torch.dtype) -> None:
    """The vendor's products add in another order with another number of threads; no order errs more than eager's."""
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            assert all(torch.equal(a, b) for a, b in zip(run_once(dtype), run_once(dtype), strict=True))
            assert_within_budget(MANY_TERMS, TARGETS[0], dtype)
    finally:
        torch.set_num_threads(threads)


def test_repeats_bitwise_in_another_process() -> None:
    code = "import hashlib, test_linear_cross_entropy as t\nfor dtype in (t.torch.float32, t.torch.bfloat16):\n"
    code += " print(hashlib.sha256(b''.join(x.float().numpy().tobytes() for x in t.run_once(dtype))).hexdigest())\n"
    runs = [
        subprocess.run([sys.executable, "-c", code], env=_environment(), check=True, capture_output=True, text=True)
        for _ in range(2)
    ]
    assert runs[0].stdout == runs[1].stdout
    assert len(runs[0].stdout.split()) == 2


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}


def test_compiles_without_graph_break() -> None:
    hidden, weight, targets = Case(OP, {"...": (9,), "C": 8, "V": 33}).inputs(torch.float32).values()
    leaves = (hidden.requires_grad_(), weight.requires_grad_())
    for reduction in ("mean", "none"):

        def loss(h: Tensor, w: Tensor, reduction: str = reduction) -> Tensor:
            return lf.linear_cross_entropy(h, w, targets, reduction=reduction).sum()

        compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
        for a, b in zip(
            torch.autograd.grad(compiled(*leaves), leaves), torch.autograd.grad(loss(*leaves), leaves), strict=True
        ):
            torch.testing.assert_close(a, b)


def test_autocast_casts_as_linear_does() -> None:
    hidden, weight, targets = Case(OP, {"...": (9,), "C": 64, "V": 33}).inputs(torch.float32).values()
    leaves = (hidden.requires_grad_(), weight.requires_grad_())
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = (m.linear_cross_entropy(*leaves, targets) for m in (lf, eager))
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    for a, b in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves), strict=True):
        assert a.dtype == torch.float32
        torch.testing.assert_close(a, b, rtol=2e-2, atol=1e-3)


@pytest.mark.skipif(native._native is None, reason="the native library is not built")
def test_large_new_tensors_are_announced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before their first write, for huge pages: the logits of a chunk and what sums dweight up, a float32 copy too."""
    found: list[tuple[torch.Size, torch.dtype]] = []
    fwd, _ = chunks.primitives(native._row_kernel, on_new=lambda new: found.append((new.shape, new.dtype)))
    for R, rows, total in ((300, 256, torch.bfloat16), (6000, 1024, torch.float32)):
        found.clear()
        inputs = Case(OP, {"...": (R,), "C": 8, "V": 24}).inputs(torch.bfloat16).values()
        fwd(*inputs, torch.ones(R), -100, 0.0, 0.0, True, True)
        assert found == [((rows, 24), torch.bfloat16), ((24, 8), total)]


@pytest.mark.skipif(native._native is None, reason="the native library is not built")
def test_the_cpu_sums_by_chunks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a GPU would sum by blocks of classes."""
    R, C, V = 600, 400, 640
    monkeypatch.setattr(pieces, "SIZES", pieces.Sizes(8, 32, 4, math.inf))
    assert pieces.plan(R, C, V, pieces.SIZES) is not None
    inputs = [*Case(OP, {"...": (R,), "C": C, "V": V}).inputs(torch.bfloat16).values(), torch.ones(R)]
    with linear.force("torch"), LiveBytes(*inputs) as memory:
        results = native.linear_cross_entropy_fwd(*inputs, -100, 0.0, 0.0, False, True)
    assert memory.peak - sum(x.nbytes for x in results) == R // 2 * V * 2


def test_plan_of_blocks_of_classes() -> None:
    def plan(R: int, C: int, V: int) -> pieces.Plan | None:
        return pieces.plan(R, C, V, pieces.Sizes())

    assert plan(8192, 4096, 128256) == pieces.Plan(4096, 7680, 8448)  # 8448 x 4096: eight turns of 132 tiles
    assert plan(8192, 8192, 128256) == pieces.Plan(8192, 8192, 4224)
    assert plan(8193, 8192, 128256) == pieces.Plan(8192, 8192, 4224)
    for too_few_or_many in ((4096, 4096, 128256), (8193, 4096, 128256), (8192, 4096, 8192), (8192, 4096, 100)):
        assert plan(*too_few_or_many) is None
    found = 0
    for C in (2048, 2304, 4096, 8192):
        for R in range(4097, 2 * C + 1, 509):
            for V in (1919, 5003, 32000, 128256):
                blocks = plan(R, C, V)
                if blocks is None:
                    assert V < 128256  # a block's products would leave multiprocessors idle
                    continue
                found += 1
                assert blocks.end == R if R <= C else R - 512 <= blocks.end < R
                assert blocks.end % 512 == 0 or R <= C
                assert blocks.kept == min(blocks.end, C)
                assert blocks.classes % 128 == 0
                assert blocks.end * (blocks.classes + 256) >= 256 * V  # half of the scratch
                assert blocks.end * blocks.classes <= 512 * V
    assert found > 40


def test_no_gradient_no_gradient_work() -> None:
    hidden, weight, targets = Case(OP, {"...": (9,), "C": 8, "V": 33}).inputs(torch.float32).values()
    with LiveBytes() as memory:
        loss = lf.linear_cross_entropy(hidden, weight, targets)
    assert memory.largest == 9 * 33 * 4
    torch.testing.assert_close(loss, eager.linear_cross_entropy(hidden, weight, targets))


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("target_name", TARGETS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_frozen_side_costs_nothing(target_name: str, dtype: torch.dtype, reduction: str) -> None:
    R, C, V = 700, 40, 300
    hidden, weight, targets = Case(OP, {"...": (R,), "C": C, "V": V}).inputs(dtype).values()
    with target(target_name):
        for frozen, other in ((weight, hidden), (hidden, weight)):
            found = []
            for wants in (True, False):
                leaves = [x.detach().requires_grad_(wants or x is other) for x in (hidden, weight)]
                loss = lf.linear_cross_entropy(*leaves, targets, reduction=reduction)
                found.append(torch.autograd.grad(loss.sum(), leaves[0 if other is hidden else 1])[0])
            if other is hidden:  # by other chunks
                torch.testing.assert_close(*found)
            else:
                assert torch.equal(*found)
            with Made(*leaves) as made:
                lf.linear_cross_entropy(*leaves, targets, reduction=reduction).sum().backward()
            assert other.shape in made.shapes
            assert target_name == "reference" or frozen.shape not in made.shapes


class Made(EveryResult):
    """The shapes of all tensors that were made; views of those that are given do not count."""

    def __init__(self, *given: Tensor) -> None:
        super().__init__()
        self.given = {x.data_ptr() for x in given}
        self.shapes: set[torch.Size] = set()

    def saw(self, x: Tensor) -> None:
        if x.untyped_storage().data_ptr() not in self.given:
            self.shapes.add(x.shape)


def test_a_frozen_weight_compiles() -> None:
    hidden, weight, targets = Case(OP, {"...": (9,), "C": 8, "V": 33}).inputs(torch.float32).values()
    compiled = torch.compile(lambda h: lf.linear_cross_entropy(h, weight, targets), fullgraph=True, backend="aot_eager")
    hidden.requires_grad_()
    found, expected = (
        torch.autograd.grad(f(hidden), hidden)[0]
        for f in (compiled, lambda h: lf.linear_cross_entropy(h, weight, targets))
    )
    assert torch.equal(found, expected)


def _dweight_misses_a_row(results: tuple[Tensor, ...], args: Any) -> None:
    results[3].sub_(torch.outer(torch.ones(args["weight"].shape[0]), args["hidden"][-1]) * args["row_scale"][-1] * 1e-3)


def _true_class_not_subtracted(results: tuple[Tensor, ...], args: Any) -> None:
    results[2][7] += args["weight"][args["targets"][7]] * args["row_scale"][7]


def _loss_forgets_last_class(results: tuple[Tensor, ...], args: Any) -> None:
    logits = args["hidden"] @ args["weight"].T
    results[0].add_(logits[:, :-1].logsumexp(1) - logits.logsumexp(1))


def _bwd_scales_rows_alike(results: tuple[Tensor, ...], args: Any) -> None:
    results[0].mul_((args["dloss"].mean() / args["dloss"]).unsqueeze(1))


@pytest.mark.parametrize(
    ("primitive", "bug", "options"),
    [
        ("linear_cross_entropy_fwd", _dweight_misses_a_row, {}),
        ("linear_cross_entropy_fwd", _true_class_not_subtracted, {}),
        ("linear_cross_entropy_fwd", _loss_forgets_last_class, {}),
        ("linear_cross_entropy_bwd", _bwd_scales_rows_alike, {"reduction": "none"}),
    ],
)
def test_planted_bugs_are_caught(
    monkeypatch: pytest.MonkeyPatch, primitive: str, bug: Callable[..., None], options: dict[str, Any]
) -> None:
    assert_bug_is_caught(monkeypatch, Case(OP, {"...": (50,), "C": 32, "V": 515}, options), primitive, bug)


def test_bad_input_names_argument_value_and_expectation() -> None:
    h, w, t = torch.randn(2, 4, 8), torch.randn(11, 8), torch.zeros(2, 4, dtype=torch.int64)
    for bad in (11, -1, -99):
        wrong = t.clone()
        wrong[1, 2] = bad
        with pytest.raises(ValueError, match=rf"targets has {bad} at row 6, expected 0 <= target < V = 11"):
            lf.linear_cross_entropy(h, w, wrong)
    assert lf.linear_cross_entropy(h, w, t - 1, ignore_index=-1).isnan()
    with pytest.raises(ValueError, match=r"weight has shape \(11, 7\), expected \[V, C\] with C = 8"):
        lf.linear_cross_entropy(h, w[:, :7], t)
    with pytest.raises(ValueError, match=r"targets has shape \(2, 3\), expected leading dimensions \(2, 4\)"):
        lf.linear_cross_entropy(h, w, t[:, :3])
    with pytest.raises(ValueError, match=r"targets has dtype torch.int32, expected torch.int64"):
        lf.linear_cross_entropy(h, w, t.int())
    with pytest.raises(ValueError, match=r"label_smoothing is 1.5"):
        lf.linear_cross_entropy(h, w, t, label_smoothing=1.5)
    with pytest.raises(ValueError, match=r"z_loss is -1"):
        lf.linear_cross_entropy(h, w, t, z_loss=-1)
    with pytest.raises(ValueError, match=r"reduction is 'avg', expected one of mean, sum, none"):
        lf.linear_cross_entropy(h, w, t, reduction="avg")
