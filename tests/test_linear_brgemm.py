"""Products by tiles of oneDNN's kernel (csrc/cpu/brgemm.cpp): numbers, bits, and the memory that they take."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from linear_products import ISAS, TILED, TRUTH, operands, problem, tiled
from numerics import target
from torch import Tensor

from llama_fast.ops import linear
from llama_fast.verify import FORWARD_FACTOR, judge


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", TILED, ids=str)
@pytest.mark.parametrize(
    ("M", "N", "K"),
    [
        (2 * 256 + 70, 3, 64),  # whole blocks of rows where they lie, the last ones packed
        (2100, 65, 128),  # more rows than share a panel
        (300, 130, 4500),  # pieces of the terms, whose tiles wait
        (20, 2 * 64 + 1, 8200),
        (264, 72, 101),  # terms that fill no part
    ],
)
def test_brgemm(M: int, N: int, K: int, dtype: torch.dtype, isa: str) -> None:
    for form in linear.FORMS:
        a, b = operands(form, M, N, K, dtype)
        truth, plain = TRUTH[form](a.double(), b.double()), TRUTH[form](a, b)
        for kind in (dtype, torch.float32):
            whole = torch.full((M, N + 3), torch.nan, dtype=kind)
            out = whole[:, :N]
            with linear.force("brgemm"), target(isa):
                getattr(linear, form)(a, b, out=out)
                assert problem(out.to(dtype), truth, plain, K) == ""
                if form != "nt":
                    getattr(linear, form)(a, b, out=out, accumulate=True)
                    assert problem(out.to(dtype), 2 * truth, plain + plain, K) == ""
            assert whole[:, N:].isnan().all()
        with linear.force("brgemm"), target(isa):
            assert problem(getattr(linear, form)(a, b), truth, plain, K) == ""


@pytest.mark.parametrize("dtype", TILED, ids=str)
def test_brgemm_waits_for_a_group_of_columns(dtype: torch.dtype) -> None:
    """More columns than 8 MB of tiles: 2,048 rows of 1,024."""
    a, b = operands("nn", 2048, 1100, 4200, dtype)
    with linear.force("brgemm"):
        found = linear.nn(a, b)
    assert problem(found, a.double() @ b.double(), a @ b, 4200) == ""


@pytest.mark.parametrize("dtype", TILED, ids=str)
def test_brgemm_of_rows_far_apart(dtype: torch.dtype) -> None:
    """256 rows 8 MB apart, 2 GB of which little is touched: oneDNN's kernel takes no such distance."""
    stride = 2**23 // dtype.itemsize
    a, b = operands("nn", 256, 70, 64, dtype)
    far = torch.empty(255 * stride + 64, dtype=dtype).as_strided(a.shape, (stride, 1)).copy_(a)
    with linear.force("brgemm"):
        assert torch.equal(linear.nn(far, b), linear.nn(a, b))


MANY_STRIDES = """
import sys, torch
from pathlib import Path
from llama_fast.ops import linear

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

torch.set_num_threads(1)
dtype = getattr(torch, sys.argv[1])
a, b, memory = torch.randn(256, 320).to(dtype), torch.randn(320, 64).to(dtype), torch.empty(256 * 1000, dtype=dtype)
with linear.force("brgemm"):
    y = linear.nn(a, b)
    for stride in range(321, 721):
        if stride == 521:
            before = resident()
        assert torch.equal(linear.nn(memory.as_strided(a.shape, (stride, 1)).copy_(a), b), y)
print(resident() - before)
"""


MANY_LENGTHS = """
import sys, torch
from pathlib import Path
from llama_fast.ops import linear

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

torch.set_num_threads(1)
dtype = getattr(torch, sys.argv[1])
step = 32 // dtype.itemsize
dy, x = torch.zeros(256 * step, 256, dtype=dtype), torch.zeros(256 * step, 64, dtype=dtype)
with linear.force("brgemm"):
    linear.tn(dy, x)
    before = resident()
    for rows in range(17 * step, 257 * step, step):
        linear.tn(dy[:rows], x[:rows])
print(resident() - before)
"""


def growth(program: str, dtype: torch.dtype, folder: Path) -> int:
    """The bytes that a program prints, run in a process of its own."""
    command = [sys.executable, "-c", program, str(dtype).removeprefix("torch.")]
    # AddressSanitizer keeps what is freed, unless told not to
    environment = {
        **os.environ,
        "ASAN_OPTIONS": "detect_leaks=0:quarantine_size_mb=0:thread_local_quarantine_size_kb=0",
    }
    done = subprocess.run(command, check=False, capture_output=True, text=True, cwd=folder, env=environment)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


@pytest.mark.parametrize("dtype", TILED, ids=str)
def test_brgemm_keeps_no_kernel_for_each_distance_of_rows(dtype: torch.dtype, tmp_path: Path) -> None:
    """Of 200 more, after 200 of which it may keep some; a kernel takes 20 to 130 kB. The bits are the same for each."""
    assert growth(MANY_STRIDES, dtype, tmp_path) < 4 << 20


@pytest.mark.parametrize("dtype", TILED, ids=str)
def test_brgemm_leaves_no_hole_beside_each_kernel(dtype: torch.dtype, tmp_path: Path) -> None:
    """A kernel that is kept lies behind the scratch of its first call; 240 of these are 250 MB."""
    assert growth(MANY_LENGTHS, dtype, tmp_path) < 32 << 20


SCRATCH = """
import sys, torch
from pathlib import Path
from llama_fast.ops import linear

def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) << 10

torch.set_num_threads(1)
dtype = getattr(torch, sys.argv[1])
dy, x = torch.zeros(36000 // dtype.itemsize, 2048, dtype=dtype), torch.zeros(36000 // dtype.itemsize, 64, dtype=dtype)
out = torch.zeros(2048, 64, dtype=dtype)
with linear.force("brgemm"):
    linear.tn(dy[:64, :8], x[:64], out=out[:8])
    before = peak()
    linear.tn(dy, x, out=out)
print(peak() - before)
"""


@pytest.mark.parametrize("dtype", TILED, ids=str)
def test_brgemm_packs_a_part_of_the_rows_at_a_time(dtype: torch.dtype, tmp_path: Path) -> None:
    """2,048 rows of 36 kB: 74 MB packed at once, 17 MB by parts."""
    assert growth(SCRATCH, dtype, tmp_path) < 40 << 20


@pytest.mark.parametrize("dtype", TILED, ids=str)
def test_brgemm_gives_the_same_bits_on_every_number_of_threads(dtype: torch.dtype) -> None:
    threads, found = torch.get_num_threads(), {}
    try:
        for n in (1, 2, 3, 7):
            torch.set_num_threads(n)
            for form in linear.FORMS:
                for sizes in ((600, 200, 300), (2500, 70, 4300)):
                    with linear.force("brgemm"):
                        y = getattr(linear, form)(*operands(form, *sizes, dtype))
                    assert torch.equal(found.setdefault((form, sizes), y), y)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", TILED, ids=str)
@pytest.mark.parametrize("form", linear.FORMS)
def test_brgemm_keeps_a_nan_in_its_row(form: str, dtype: torch.dtype) -> None:
    """Padding is zero on both sides, and what lies behind a row is not read."""
    M, N, K = 270, 70, 90
    a, b = operands(form, M, N, K, dtype)
    (a if form != "tn" else a.t())[5] = torch.nan
    behind = torch.full((*a.shape[:-1], a.shape[-1] + 64), torch.nan, dtype=dtype)
    behind[:, : a.shape[-1]] = a
    with linear.force("brgemm"):
        y = getattr(linear, form)(behind[:, : a.shape[-1]], b)
    assert y.isnan().all(1).nonzero().flatten().tolist() == [5]
    assert y.isnan().any(1).sum() == 1


@tiled(torch.float32)
@pytest.mark.parametrize("form", linear.FORMS)
def test_brgemm_is_as_exact_as_chains_of_192_terms(form: str) -> None:
    """MKL's, on the processors that float32 goes to brgemm on. A chain of all terms has twice the error."""

    def chain(x: Tensor, weight: Tensor) -> Tensor:
        total, terms = torch.zeros(x.shape[0], weight.shape[0]), zip(x.double().t(), weight.double().t(), strict=True)
        for c, w in terms:  # the product of two float32 numbers is exact in float64
            total = torch.addcmul(total.double(), c.unsqueeze(1), w).float()
        return total

    a, b = operands(form, 128, 192, 4096, torch.float32)
    x, weight = {"nt": (a, b), "nn": (a, b.t()), "tn": (a.t(), b.t())}[form]
    parts = zip(x.split(192, dim=1), weight.split(192, dim=1), strict=True)
    truth, theirs = TRUTH[form](a.double(), b.double()), functools.reduce(torch.add, (chain(*part) for part in parts))
    with linear.force("brgemm"):
        assert judge(getattr(linear, form)(a, b), theirs, truth, FORWARD_FACTOR, torch.float32)[3] == ""
    assert "error" in judge(chain(x, weight), theirs, truth, FORWARD_FACTOR, torch.float32)[3]


@tiled(torch.float32)
@pytest.mark.parametrize("isa", ISAS)
def test_float16_is_multiplied_in_float32_tiles(isa: str) -> None:
    for form in linear.FORMS:
        a, b = operands(form, 300, 70, 200, torch.float16)
        truth, plain = TRUTH[form](a.double(), b.double()), TRUTH[form](a.float(), b.float()).half()
        with linear.force("upcast"), target(isa):
            assert problem(getattr(linear, form)(a, b), truth, plain, 200) == ""
            wide = getattr(linear, form)(a, b, out=torch.empty(300, 70))
            assert (wide - truth).abs().max() <= 1e-5 * truth.abs().max()  # nothing is rounded to float16
            out = torch.full((300, 140), torch.nan, dtype=torch.float16)[:, ::2]  # which a tile is not written to
            assert problem(getattr(linear, form)(a, b, out=out), truth, plain, 200) == ""


@tiled(torch.float32)
def test_brgemm_gives_way_where_torch_is_told_not_to_use_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "_amd_family", 26)
    assert linear.choose("nt", torch.float32, 2048, 2048, 2048) == "brgemm"
    with torch.backends.mkldnn.flags(enabled=False):
        assert linear.choose("nt", torch.float32, 2048, 2048, 2048) == "torch"
