"""csrc/emulator on small kernels of its own: the instructions, the schedule, and every check, each seen to catch."""

from __future__ import annotations

import re

import emulated
import pytest
import torch

pytestmark = pytest.mark.skipif(emulated.unavailable() is not None, reason=f"emulator: {emulated.unavailable()}")


def test_shuffles_shared_memory_and_barriers() -> None:
    x, y = torch.rand(1000), torch.full((1000,), torch.nan)
    assert emulated.run(emulated.load("basics"), "block_sums", x, y, 1000, 1000) == ""
    sums = torch.nn.functional.pad(x, (0, 24)).view(4, 256).sum(1).repeat_interleave(256)[:1000]
    torch.testing.assert_close(y, sums)


def test_a_global_access_outside_the_tensor_names_thread_and_tensor() -> None:
    x, y = torch.rand(1000), torch.full((1000,), torch.nan)
    report = emulated.run(emulated.load("basics"), "block_sums", x, y, 1000, 1001)
    expected = "block (3,0,0) thread 232 (warp 7 lane 8): ld.global: 4 bytes at offset 4000 of x, which has 4000 bytes"
    assert report == f"block_sums: {expected}"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cp_async_ldmatrix_and_mma(dtype: torch.dtype) -> None:
    a, b, d = torch.randn(16, 16).to(dtype), torch.randn(16, 8).to(dtype), torch.full((16, 8), torch.nan)
    assert emulated.run(emulated.load("basics"), "product", a, b, d, dtype == torch.bfloat16) == ""
    torch.testing.assert_close(d, (a.double() @ b.double()).float())


def _product(name: str, function: str, dtype: torch.dtype, M: int, N: int, K: int, planted: object = None) -> str:
    """Runs c = a b^T; "" or the fault's report, or what is wrong with c."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(rows, K, generator=generator).to(dtype) for rows in (M, N))
    c = torch.full((M, N), torch.nan, dtype=dtype)
    report = emulated.run(emulated.load(name, planted), function, a, b, c, M, N, K, dtype == torch.bfloat16)
    if report:
        return report
    try:
        torch.testing.assert_close(c, (a.double() @ b.double().T).to(dtype))
    except AssertionError:
        return "wrong result"
    return ""


SIZES = [(64, 64, 32), (64, 136, 8), (100, 72, 200)]


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernel", [("pipeline", "product"), ("hopper", "gemm")])
def test_a_pipelined_kernel(kernel: tuple[str, str], dtype: torch.dtype, seed: int) -> None:
    emulated.configure(seed=seed)
    for size in SIZES:
        assert _product(*kernel, dtype, *size) == "", size


def test_bank_conflicts_are_counted() -> None:
    emulated.counters()
    assert _product("pipeline", "product", torch.bfloat16, *SIZES[-1]) == ""
    assert emulated.counters()["bank_conflicts"] == 0
    assert _product("pipeline", "product", torch.bfloat16, *SIZES[-1], ("(row / 2 % 4)", "0")) == ""
    counters = emulated.counters()
    assert counters["bank_conflicts"] == 3 * 4 * counters["ldmatrix"]  # 8 rows of 16 bytes in 2 banks of 16 bytes


# What stands in the kernel, what is planted in its place, and what the emulator has to say.
PIPELINE_BUGS = {
    "no barrier before the reads": ("__syncthreads();  // the tiles are there", "", "race: ldmatrix reads"),
    "no barrier after the reads": ("__syncthreads();  // everyone has read them", "", "race: .* writes"),
    "a wait that is too weak": ("wait_group<1>()", "wait_group<2>()", "race: ldmatrix reads .* in flight"),
    "no wait": ("ptx::cp_async_wait_group<1>();", "", "race: ldmatrix reads .* in flight"),
    "no commit": ("ptx::cp_async_commit_group();\n    ptx", "ptx", "race: ldmatrix reads .* in flight"),
    "a wrong row": ("warp * 16 + lane % 16", "warp * 16 + lane % 8", "wrong result"),
    "a wrong fragment": ("lane % 8 + lane / 16 * 8, 2 * k + lane / 8 % 2", "lane % 16, 2 * k + lane / 16", "wrong"),
    "no __syncwarp": ("  __syncwarp();", "", "race: (ld|st).shared"),
    "a tail of rows off by one": ("row0 + row < rows", "row0 + row <= rows", "cp.async: 16 bytes at offset"),
    "a tail of columns not looked at": ("inside ? 16 : 0)", "row0 + row < rows ? 16 : 0)", "wrong result"),
    "a store outside": ("if (m < M && n < N) ptx", "if (n < N) ptx", "st.global: .* of c,"),
    "an unaligned store": (
        "static_cast<int64_t>(m) * N + n",
        "static_cast<int64_t>(m) * N + n + 1",
        "not aligned to 16",
    ),
    "too little shared memory": (
        "kBytes = 2 * kStageBytes",
        "kBytes = 2 * kStageBytes - 64",
        "bytes at shared address",
    ),
    "a barrier that not all reach": ("__syncwarp();", "__syncwarp(); if (warp) ptx::bar_sync(1, 128);", "deadlock"),
    "a shuffle that not all reach": ("__syncwarp();", "__syncwarp(); if (lane) __shfl_sync(~0u, m0, 1);", "deadlock"),
}
HOPPER_BUGS = {
    "no wait for an empty stage": (
        "ptx::mbarrier_wait(empty",
        "if (0) ptx::mbarrier_wait(empty",
        "mbarrier .* arrivals",
    ),
    "no wait for a full stage": ("ptx::mbarrier_wait(full", "if (0) ptx::mbarrier_wait(full", "race: "),
    "too few bytes": ("expect_tx(full + 8 * s, kStage)", "expect_tx(full + 8 * s, kABytes)", "race: wgmma"),
    "too many bytes": ("expect_tx(full + 8 * s, kStage)", "expect_tx(full + 8 * s, kStage + 16)", "deadlock"),
    "a flipped parity of the consumer": ("full + 8 * s, k / kStages & 1)", "full + 8 * s, ~k / kStages & 1)", "race: "),
    "a flipped parity of the producer": ("(k / kStages & 1) ^ 1)", "k / kStages & 1)", "deadlock"),
    "no fence of the mbarriers": ("ptx::fence_mbarrier_init();", "", "no fence.mbarrier_init"),
    "no barrier after their start": ("__syncthreads();", "", "mbarrier"),
    "a wrong count": ("ptx::mbarrier_init(empty + 8 * s, 4)", "ptx::mbarrier_init(empty + 8 * s, 3)", "race: TMA load"),
    "no wgmma.fence": ("ptx::wgmma_fence();", "", "no wgmma.fence"),
    "no wgmma.wait": ("wgmma_wait_group<0>()", "wgmma_wait_group<1>()", "race: TMA load writes"),
    "no wgmma.commit": ("ptx::wgmma_commit_group();", "", "race: TMA load writes"),
    "a wrong stride": ("kABytes + step * 32, 16, 1024", "kABytes + step * 32, 16, 512", "wrong result"),
    "a wrong step of k": ("tiles + s * kStage + step * 32, 16", "tiles + s * kStage + step * 16, 16", "wrong result"),
    "no fence of the proxies": ("ptx::fence_proxy_async();", "", "without a fence.proxy.async"),
    "no barrier before the store": ("ptx::bar_sync(1, 128);", "", "race: TMA store reads"),
    "a barrier of too many": ("bar_sync(1, 128)", "bar_sync(1, 256)", "deadlock"),
    "no wait for the store": ("ptx::bulk_wait_group_read<0>();", "", "bulk store in flight"),
    "a wrong swizzle of the result": ("(chunk ^ (row % 8))", "(chunk ^ (row % 4))", "wrong result"),
}


@pytest.mark.parametrize("bug", PIPELINE_BUGS)
def test_a_bug_planted_in_the_sm80_kernel_is_caught(bug: str) -> None:
    before, after, expected = PIPELINE_BUGS[bug]
    emulated.configure()
    assert re.search(expected, _product("pipeline", "product", torch.bfloat16, 100, 72, 200, (before, after)))


@pytest.mark.parametrize("bug", HOPPER_BUGS)
def test_a_bug_planted_in_the_sm90_kernel_is_caught(bug: str) -> None:
    before, after, expected = HOPPER_BUGS[bug]
    emulated.configure()
    assert re.search(expected, _product("hopper", "gemm", torch.bfloat16, 100, 136, 200, (before, after)))


def _chain(planted: object = None) -> str:
    """Runs blocks that add to each other's sums in turn; "" or the fault's report, or what is wrong with the sums."""
    x, doubled, total = torch.randn(6, 64), torch.full((6, 64), torch.nan), torch.zeros(64)
    turn = torch.zeros(1, dtype=torch.int32)
    report = emulated.run(emulated.load("ordered", planted), "chain", x, doubled, total, turn, 6)
    return report or ("" if torch.allclose(total, (2 * x).sum(0).flip(0)) else "wrong result")


def _bulk(planted: object = None) -> str:
    x, y, z = torch.randn(6, 64), torch.full((6, 64), torch.nan), torch.full((6,), torch.nan)
    report = emulated.run(emulated.load("ordered", planted), "bulk", x, y, z, 6)
    return report or ("" if torch.equal(x, y) and torch.equal(z, x[:, 63]) else "wrong result")


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_blocks_that_meet_in_global_memory(seed: int) -> None:
    emulated.configure(seed=seed)
    assert _chain() == ""
    assert _bulk() == ""


CHAIN_BUGS = {
    "no barrier within a block": ("__syncthreads();  // the row is there", "", "of doubled, which"),
    "no wait for the block before": ("while (ptx::ld_acquire_gpu(turn) != b) ptx::nanosleep(100);", ";", "of total"),
    "no barrier behind the wait": ("__syncthreads();  // the blocks before have added", "", "of total, which"),
    "no barrier before the release": ("__syncthreads();  // this one has", "", "of total, which"),
    "an atomic without release": ("ptx::red_release_gpu_add(turn, 1)", "atomicAdd(turn, 1)", "of total, which"),
    "two blocks in one row": ("doubled[b * kColumns + c] =", "doubled[c] =", "st.global writes .* of doubled, which"),
    "a counter that is read plainly": (
        "ptx::ld_acquire_gpu(turn) != b",
        "turn[0] != b",
        # told by whichever of the two comes second
        r"(ld\.global reads .* of turn|of turn, which .* reads \(ld\.global\))",
    ),
    "a promise of constant memory that is broken": (
        "const float mine = doubled[b * kColumns + kColumns - 1 - c];",
        "const float mine = bit_cast<float>(ptx::ld_global_nc_v4(doubled + b * kColumns).x);",
        "written by no thread of a kernel",
    ),
}


@pytest.mark.parametrize("bug", CHAIN_BUGS)
def test_a_race_planted_in_global_memory_is_caught(bug: str) -> None:
    before, after, expected = CHAIN_BUGS[bug]
    emulated.configure()
    found = _chain((before, after))
    assert re.search(f"race: .*{expected}", found), found


def test_a_bulk_store_read_before_it_is_complete_is_caught() -> None:
    emulated.configure()
    found = _bulk(("ptx::bulk_wait_group<0>()", "ptx::bulk_wait_group_read<0>()"))
    assert re.search(r"race: ld.global reads .* of y, which an asynchronous operation of block \d+ wrote", found), found


def _registers(planted: object = None) -> str:
    done = torch.zeros(384, dtype=torch.int32)
    report = emulated.run(emulated.load("registers", planted), "registers", done)
    return report or ("" if bool(done.all()) else "wrong result")


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_registers_are_handed_on(seed: int) -> None:
    emulated.configure(seed=seed)
    assert _registers() == ""


@pytest.mark.parametrize(
    ("bug", "expected"),
    [
        (("dec<24>", "dec<40>"), "deadlock: .*setmaxnreg.inc, for registers that others have"),
        (("inc<240>", "inc<248>"), "deadlock: .*setmaxnreg.inc, for registers that others have"),
        (("inc<240>", "inc<236>"), "setmaxnreg.inc: 236 registers, not a multiple of 8"),
        (("dec<24>", "dec<16>"), r"setmaxnreg.dec: 16 registers, not a multiple of 8 in 24\.\.256"),
        (("dec<24>", "dec<176>"), "setmaxnreg.dec: to 176 registers a thread from 168"),
        (("inc<240>", "inc<160>"), "setmaxnreg.inc: to 160 registers a thread from 168"),
        (("< 128", "< 96"), "in another warp of the warpgroup"),
    ],
    ids=lambda x: " to ".join(x) if isinstance(x, tuple) else "",
)
def test_registers_that_do_not_fit_are_caught(bug: tuple[str, str], expected: str) -> None:
    emulated.configure()
    found = _registers(bug)
    assert re.search(expected, found), found
