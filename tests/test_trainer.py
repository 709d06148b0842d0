"""The trainer: recipe, accumulation, log, stops, and runs that are killed at every delicate moment and resumed.

Run as a program (`python test_trainer.py FOLDER`) it does the killed runs, each in a fork of its own.
"""

from __future__ import annotations

import dataclasses
import io
import json
import math
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import Tensor

import llama_fast
from llama_fast import checkpoint
from llama_fast.config import LlamaConfig
from llama_fast.plain import PlainLlama
from llama_fast.train import trainer
from llama_fast.train.progress import Progress
from llama_fast.train.recipe import Recipe, build_optimizer
from llama_fast.train.trainer import Report, Settings, Trainer, measure_gemm_rate

CONFIG = LlamaConfig(32, 2, 2, 1, 48, 64, 32)
RECIPE = Recipe(steps=12, lr=1e-2, warmup_steps=3)
SETTINGS = Settings(RECIPE, batch_size=2, seq_len=16, accumulate=2, eval_every=4, eval_batches=2, checkpoint_every=3)


class Rows:
    """Rows 0, 1, 2, ... of a repeating text; `noise` replaces tokens by draws from the three global generators."""

    def __init__(self, noise: bool = False, hook: Callable[[int], None] = lambda row: None) -> None:
        self.row, self.noise, self.hook = 0, noise, hook

    def make(self, row: int, seq_len: int) -> tuple[Tensor, Tensor]:
        text = (torch.arange(seq_len + 1) * (row % 5 + 1) + row) % 64
        tokens, targets = text[:-1].clone(), text[1:].clone()
        targets[: row % 7] = -100  # so that batches differ in how many targets count
        return tokens, targets

    def batches(self, batch_size: int, seq_len: int) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            self.hook(self.row)
            rows = [self.make(self.row + i, seq_len) for i in range(batch_size)]
            self.row += batch_size
            tokens, targets = (torch.stack(t) for t in zip(*rows, strict=True))
            if self.noise:
                tokens[:, 3] = int(torch.randint(64, ()))
                tokens[:, 4] = int(np.random.randint(64))
                tokens[:, 5] = random.randrange(64)
            yield tokens, targets

    def valid_batches(self, batch_size: int, seq_len: int, n: int) -> Iterator[tuple[Tensor, Tensor]]:
        for i in range(n):
            rows = [self.make(10**6 + i * batch_size + j, seq_len) for j in range(batch_size)]
            tokens, targets = (torch.stack(t) for t in zip(*rows, strict=True))
            yield tokens, targets

    def state_dict(self) -> dict[str, Any]:
        return {"row": self.row}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.row = state["row"]


def train(
    run_dir: Path,
    *,
    settings: Settings = SETTINGS,
    data: Rows | None = None,
    resume: bool = False,
    model: PlainLlama | None = None,
    said: io.StringIO | None = None,
) -> Report:
    quiet = Progress(settings.recipe.steps, quiet=True, console=Console(file=said or io.StringIO()))
    data = data or Rows(noise=True)
    return Trainer(model or PlainLlama(CONFIG), data, settings, run_dir, resume=resume, progress=quiet).run()


def curve(run_dir: Path) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (run_dir / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_s")} for row in rows]


def final_files(run_dir: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    last = checkpoint.load(run_dir / f"step_{RECIPE.steps:07d}")
    del last.state["seconds"]
    return last.weights, last.state


def assert_same_run(a: Path, b: Path) -> None:
    """Bit for bit: every logged number that is no time, every weight, every optimizer moment, every generator."""
    assert curve(a) == curve(b)
    assert [row["step"] for row in curve(a)] == list(range(1, RECIPE.steps + 1))
    (weights_a, state_a), (weights_b, state_b) = final_files(a), final_files(b)
    assert_equal(weights_a, weights_b)
    assert_equal(state_a, state_b)


def assert_equal(a: Any, b: Any) -> None:
    if isinstance(a, Tensor):
        assert torch.equal(a, b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, list | tuple):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_equal(x, y)
    else:
        assert a == b


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """These models are too small for two threads, and the killed runs have one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Report]:
    """A run that nothing interrupted."""
    run_dir = tmp_path_factory.mktemp("whole")
    return run_dir, train(run_dir)


def test_learning_rate() -> None:
    recipe = Recipe(steps=100, lr=1.0, warmup_steps=20)
    expected = {1: 0.05, 10: 0.5, 20: 1.0, 40: 0.1 + 0.9 * (2 + math.sqrt(2)) / 4, 60: 0.55, 100: 0.1}
    for step, lr in expected.items():
        assert recipe.learning_rate(step) == pytest.approx(lr, abs=1e-12), step
    assert Recipe(steps=1, lr=1.0, warmup_steps=0).learning_rate(1) == pytest.approx(0.1)
    assert Recipe(steps=5, lr=1.0, warmup_steps=5).learning_rate(5) == 1.0
    for step in (0, 101):
        with pytest.raises(ValueError, match=f"step = {step}: expected 1 .. steps = 100"):
            recipe.learning_rate(step)


def test_weight_decay_is_on_matrices_only() -> None:
    model = PlainLlama(CONFIG)
    optimizer = build_optimizer(model, Recipe(steps=10, lr=0.1, warmup_steps=0))
    before = {k: p.detach().clone() for k, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        decayed = before[name] * (1 - 0.1 * 0.1) if p.ndim == 2 else before[name]
        torch.testing.assert_close(p.detach(), decayed, rtol=1e-6, atol=0)
    assert all(g["betas"] == (0.9, 0.95) for g in optimizer.param_groups)
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps = 0"),
        ({"lr": math.nan}, "lr = nan"),
        ({"warmup_steps": 13}, "warmup_steps = 13: expected 0 .. steps = 12"),
        ({"clip": 0.0}, "clip = 0"),
        ({"beta2": 1.0}, r"beta2 = 1\.0"),
        ({"weight_decay": -0.1}, r"weight_decay = -0\.1"),
        ({"steps": 12.5}, r"steps = 12\.5: expected an integer"),
        ({"warmup_steps": True}, "warmup_steps = True: expected an integer"),
        ({"lr": "1e-3"}, "lr = '1e-3': expected a number"),
        ({"clip": None}, "clip = None: expected a number"),
    ],
)
def test_bad_recipe_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(RECIPE, **change)


@pytest.mark.parametrize(
    "change",
    [{"batch_size": 0}, {"accumulate": 0}, {"seq_len": 1.5}, {"dtype": "float16"}, {"keep": 0}, {"seed": -1}]
    + [{"seed": 2**64}],
)
def test_bad_settings_are_named(change: dict[str, Any]) -> None:
    name, value = next(iter(change.items()))
    with pytest.raises(ValueError, match=f"{name} = {value!r}: expected"):
        dataclasses.replace(SETTINGS, **change)


def test_accumulation_equals_one_big_batch(tmp_path: Path) -> None:
    """Also where the small batches differ in how many targets count."""
    recipe = dataclasses.replace(RECIPE, eps=1e-3)  # AdamW with a tiny eps turns rounding into whole updates
    small = Settings(recipe, batch_size=1, seq_len=16, accumulate=8)
    big = Settings(recipe, batch_size=8, seq_len=16, accumulate=1)
    model_a, model_b = PlainLlama(CONFIG), PlainLlama(CONFIG)
    a = train(tmp_path / "a", settings=small, data=Rows(), model=model_a)
    b = train(tmp_path / "b", settings=big, data=Rows(), model=model_b)
    assert a.losses == pytest.approx(b.losses, rel=1e-5)
    norms_a, norms_b = ([row["grad_norm"] for row in curve(tmp_path / x)] for x in "ab")
    assert norms_a == pytest.approx(norms_b, rel=1e-4)
    for (name, p), q in zip(model_a.named_parameters(), model_b.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_one_step_is_the_recipe(tmp_path: Path) -> None:
    """Against the same step written out: clipped gradient, learning rate of step 1, first AdamW update."""
    model, twin = PlainLlama(CONFIG), PlainLlama(CONFIG)
    recipe = Recipe(steps=1, lr=1e-2, warmup_steps=0, clip=0.1)
    train(tmp_path, settings=Settings(recipe, batch_size=2, seq_len=16), data=Rows(), model=model)
    loss = twin.loss(*next(Rows().batches(2, 16)))
    loss.backward()
    grads = {k: p.grad.double() for k, p in twin.named_parameters()}  # type: ignore[union-attr]
    norm = math.sqrt(sum(float(g.square().sum()) for g in grads.values()))
    row = curve(tmp_path)[0]
    assert row["loss"] == pytest.approx(loss.item())
    assert row["grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert norm > 0.1
    lr = 1e-3
    assert row["lr"] == pytest.approx(lr)
    for name, p in twin.named_parameters():
        g = grads[name] * 0.1 / norm
        update = g / (g.abs() + 1e-8)
        expected = p.detach().double() * (1 - lr * 0.1 * (p.ndim == 2)) - lr * update
        torch.testing.assert_close(model.get_parameter(name).detach().double(), expected, rtol=1e-5, atol=1e-6)


def test_report_and_log(whole: tuple[Path, Report]) -> None:
    run_dir, report = whole
    assert (report.step, report.interrupted, report.signal) == (12, False, None)
    assert report.losses[-1] < report.losses[0] - 0.3
    rows = curve(run_dir)
    assert [row["loss"] for row in rows] == report.losses
    assert [row["lr"] for row in rows] == [RECIPE.learning_rate(s) for s in range(1, 13)]
    assert {row["step"]: row["valid_loss"] for row in rows if "valid_loss" in row} == report.valid_losses
    assert list(report.valid_losses) == [4, 8, 12]
    assert rows[-1]["tokens"] == 12 * 2 * 2 * 16
    assert [p.name for p in checkpoint.checkpoints(run_dir)] == ["step_0000006", "step_0000009", "step_0000012"]
    assert report.checkpoint == run_dir / "step_0000012"
    assert report.tokens_per_s == pytest.approx(12 * 64 / report.seconds)
    assert 50e6 < report.peak_memory_bytes < 50e9
    assert checkpoint.load_config(report.checkpoint) == CONFIG


def test_valid_loss_is_the_mean_over_targets(whole: tuple[Path, Report]) -> None:
    report = whole[1]
    model = PlainLlama(CONFIG)
    checkpoint.load_into(model, checkpoint.load_model_weights(report.checkpoint))
    tokens, targets = next(Rows().valid_batches(4, 16, 1))  # the two batches of two as one
    assert report.valid_losses[12] == pytest.approx(model.loss(tokens, targets).item(), rel=1e-6)


def test_evaluation_and_checkpoints_change_nothing(tmp_path: Path, whole: tuple[Path, Report]) -> None:
    rare = dataclasses.replace(SETTINGS, eval_every=0, checkpoint_every=0)
    assert train(tmp_path, settings=rare).losses == whole[1].losses
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == ["step_0000012"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stop_signal_saves_and_resumes(tmp_path: Path, whole: tuple[Path, Report], number: signal.Signals) -> None:
    handler = signal.getsignal(number)

    def stop_in_step_5(row: int) -> None:
        if row == 4 * 4:
            os.kill(os.getpid(), number)

    said = io.StringIO()
    report = train(tmp_path, data=Rows(noise=True, hook=stop_in_step_5), said=said)
    assert (report.step, report.interrupted, report.signal) == (5, True, number)
    assert report.checkpoint.name == "step_0000005"
    assert said.getvalue() == f"{number.name}: this step is finished and saved, then the run ends; Ctrl-C ends it now\n"
    assert signal.getsignal(number) is handler
    torch.manual_seed(1234)
    report = train(tmp_path, resume=True)
    assert report.losses == whole[1].losses
    assert report.valid_losses == whole[1].valid_losses
    assert_same_run(tmp_path, whole[0])
    seconds = [json.loads(line)["seconds"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert seconds == sorted(seconds)
    assert seconds[-1] == report.seconds
    # nothing left to do: the same report again
    again = train(tmp_path, resume=True)
    assert (again.losses, again.step, again.tokens_per_s) == (report.losses, 12, 0.0)
    assert_same_run(tmp_path, whole[0])


def test_second_ctrl_c_stops_at_once(tmp_path: Path) -> None:
    def twice(row: int) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path, data=Rows(hook=twice))


def test_resume_without_a_checkpoint_starts(tmp_path: Path, whole: tuple[Path, Report]) -> None:
    (tmp_path / "log.jsonl").write_text('{"step": 1, "loss": 3.0}\n{"step": 2')
    assert train(tmp_path, resume=True).losses == whole[1].losses
    assert_same_run(tmp_path, whole[0])


def test_resume_passes_over_a_damaged_checkpoint(tmp_path: Path, whole: tuple[Path, Report]) -> None:
    train(tmp_path)
    os.truncate(tmp_path / "step_0000012" / "state.pt", 100)
    (tmp_path / "step_0000009" / "model.safetensors").unlink()
    shown = io.StringIO()
    progress = Progress(12, console=Console(file=shown, width=400))
    Trainer(PlainLlama(CONFIG), Rows(noise=True), SETTINGS, tmp_path, resume=True, progress=progress).run()
    for name, reason in (("step_0000012", "state.pt: 100 bytes"), ("step_0000009", "model.safetensors: missing")):
        assert f"skipped a damaged checkpoint, now {name}.damaged: {tmp_path / name}/{reason}" in shown.getvalue()
        assert (tmp_path / f"{name}.damaged").is_dir()
    assert_same_run(tmp_path, whole[0])


def test_a_used_folder_or_other_settings_are_refused(tmp_path: Path) -> None:
    train(tmp_path)
    before = (tmp_path / "log.jsonl").read_text()
    with pytest.raises(ValueError, match=r"holds step_0000012: expected resume=True"):
        train(tmp_path)
    other = dataclasses.replace(SETTINGS, batch_size=3, recipe=dataclasses.replace(RECIPE, lr=0.5))
    with pytest.raises(ValueError, match=r"batch_size = 3 \(was 2\); recipe.lr = 0.5 \(was 0.01\)"):
        train(tmp_path, settings=other, resume=True)
    with pytest.raises(ValueError, match=r"step_0000012 is of another model: vocab_size = 99 \(was 64\)"):
        train(tmp_path, resume=True, model=PlainLlama(dataclasses.replace(CONFIG, vocab_size=99)))
    assert (tmp_path / "log.jsonl").read_text() == before


def test_two_trainers_in_one_folder(tmp_path: Path) -> None:
    def second(row: int) -> None:
        if row == 4:
            with pytest.raises(ValueError, match="another process trains here"):
                train(tmp_path)

    assert train(tmp_path, data=Rows(hook=second)).step == 12


@pytest.mark.parametrize("where", ["loss", "gradient norm"])
def test_a_loss_that_is_no_number_stops(tmp_path: Path, where: str) -> None:
    class Breaks(PlainLlama):
        calls = 0

        def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
            loss = super().loss(tokens, targets)
            self.calls += self.training
            if self.calls < 9:  # two a step: breaks in step 5
                return loss
            if where == "loss":
                return loss * math.nan
            loss.register_hook(lambda grad: grad * math.inf)
            return loss

    model = Breaks(CONFIG)
    with pytest.raises(FloatingPointError, match=rf"step 5: the {where} is (nan|inf); .*step_0000003$"):
        train(tmp_path, model=model)
    assert len(curve(tmp_path)) == 4
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == ["step_0000003"]
    assert all(p.isfinite().all() for p in model.parameters())


def test_full_disk_leaves_the_last_checkpoint(
    tmp_path: Path, whole: tuple[Path, Report], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, "No space left on device")

    def break_in_step_5(row: int) -> None:
        if row == 4 * 4:
            monkeypatch.setattr("torch.save", full)

    with pytest.raises(OSError, match=r"step_0000006 not written: .*No space left"):
        train(tmp_path, data=Rows(noise=True, hook=break_in_step_5))
    monkeypatch.undo()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["log.jsonl", "step_0000003"]
    train(tmp_path, resume=True)
    assert_same_run(tmp_path, whole[0])


@pytest.mark.parametrize("written", [None, 10])
def test_full_disk_under_the_log(tmp_path: Path, whole: tuple[Path, Report], written: int | None) -> None:
    """The log is refused in step 5: by an error, or by a write that stops halfway."""

    class FullLog(Trainer):
        def _append(self, log: Any, row: dict[str, Any]) -> None:
            if self.step == 5:
                log = Full(log)
            super()._append(log, row)

    class Full:
        def __init__(self, log: Any) -> None:
            self.log = log

        def write(self, line: bytes) -> int:
            if written is None:
                raise OSError(28, "No space left on device")
            return self.log.write(line[:written])

    progress = Progress(12, quiet=True)
    with pytest.raises(OSError, match=r"log.jsonl, step 5, not written: No space left on device; checkpoints are"):
        FullLog(PlainLlama(CONFIG), Rows(noise=True), SETTINGS, tmp_path, progress=progress).run()
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == ["step_0000003"]
    train(tmp_path, resume=True)
    assert_same_run(tmp_path, whole[0])


def test_a_batch_without_targets_counts_nothing(tmp_path: Path) -> None:
    class Half(Rows):
        def make(self, row: int, seq_len: int) -> tuple[Tensor, Tensor]:
            tokens, targets = super().make(row, seq_len)
            return tokens, torch.full_like(targets, -100) if row % 4 < 2 else targets

    assert all(math.isfinite(x) for x in train(tmp_path, data=Half()).losses)


def test_bfloat16_trains_float32_weights(tmp_path: Path, whole: tuple[Path, Report]) -> None:
    model = PlainLlama(CONFIG)
    settings = dataclasses.replace(SETTINGS, dtype="bfloat16")
    seen: list[torch.dtype] = []
    model.lm_head.register_forward_hook(lambda m, args, out: seen.append(out.dtype))
    report = train(tmp_path, settings=settings, model=model)
    assert set(seen) == {torch.bfloat16}
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert report.losses != whole[1].losses
    assert report.losses == pytest.approx(whole[1].losses, abs=0.05)
    with pytest.raises(ValueError, match=r"embed_tokens.weight is torch.bfloat16: expected float32"):
        train(tmp_path, model=PlainLlama(CONFIG, dtype=torch.bfloat16))


def test_plain_lines_and_bar(tmp_path: Path) -> None:
    shown = io.StringIO()
    progress = Progress(12, every=4, console=Console(file=shown, width=200))
    Trainer(PlainLlama(CONFIG), Rows(), SETTINGS, tmp_path / "a", progress=progress).run()
    lines = shown.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["1/12", "4/12", "8/12", "12/12"]
    assert all(word in lines[0] for word in ("loss 4.", "lr 3.33e-03", "tokens/s", "MFU"))
    shown = io.StringIO()
    bar = Progress(12, console=Console(file=shown, width=200, force_terminal=True))
    Trainer(PlainLlama(CONFIG), Rows(), SETTINGS, tmp_path / "b", progress=bar).run()
    assert "12/12" in shown.getvalue()
    assert "lr 1.00e-03" in shown.getvalue()


@pytest.mark.parametrize("stop", [False, True])
def test_a_progress_that_nobody_reads_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: tuple[Path, Report], stop: bool
) -> None:
    """Ctrl-C in `llama-fast train 2>&1 | tee log` ends tee first: the steps since the last checkpoint were lost."""
    read, write = os.pipe()

    def in_step_5(row: int) -> None:
        if row == 4 * 4:
            os.close(read)
            if stop:
                os.kill(os.getpid(), signal.SIGINT)

    with suppress(BrokenPipeError), open(write, "w", buffering=1) as pipe, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", pipe)
        data = Rows(noise=True, hook=in_step_5)
        report = Trainer(PlainLlama(CONFIG), data, SETTINGS, tmp_path, progress=Progress(12)).run()
    assert report.checkpoint.name == f"step_{5 if stop else 12:07d}"
    assert report.losses == whole[1].losses[: report.step]


def test_gemm_rate() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    assert 1e8 < measure_gemm_rate("float32", seconds=0.1) < 1e16
    assert 1e8 < measure_gemm_rate("bfloat16", seconds=0.1) < 1e16
    assert torch.equal(torch.get_rng_state(), before)
    with torch.device("meta"):  # as where the default device is a GPU
        assert 1e8 < measure_gemm_rate("float32", "cpu", seconds=0.1) < 1e16
    with pytest.raises(ValueError, match="dtype = 'int8'"):
        measure_gemm_rate("int8")


# Where the killed runs die: (function, its how manieth call). An event is one call of the function in the whole run; a
# save fsyncs the log, five paths of the new checkpoint (four files, the folder) and the run directory.
KILLS = {
    "in a forward pass": ("llama_fast.plain.PlainLlama.loss", 15),
    "before the optimizer": ("torch.optim.AdamW.step", 5),
    "before the first checkpoint": ("torch.optim.AdamW.step", 2),
    "writing the first weights": ("safetensors.torch.save_file", 1),
    "writing the second state": ("torch.save", 2),
    "before the log's fsync": ("os.fsync", 8),
    "at a file's fsync": ("os.fsync", 10),
    "at the run directory's fsync": ("os.fsync", 14),
    "before the rename": ("pathlib.Path.rename", 3),
    "removing an old checkpoint": ("shutil.rmtree", 1),
    "in the last save": ("torch.save", 4),
}


def die_at(target: str, nth: int, half: bool) -> None:
    """Make the `nth` call of `target` kill this process, after half of the file is written where `half` says so."""
    patch = pytest.MonkeyPatch()
    calls = 0

    def deadly(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == nth:
            if half:
                real(*args, **kwargs)
                file = args[1] if isinstance(args[1], Path) else Path(args[1].name)
                os.truncate(file, file.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)

    module, _, name = target.rpartition(".")
    owner = PlainLlama if name == "loss" else eval(module, {"torch": torch, **_modules()})
    real = getattr(owner, name)
    patch.setattr(owner, name, deadly)


def _modules() -> dict[str, Any]:
    import pathlib
    import shutil

    import safetensors.torch

    return {"os": os, "pathlib": pathlib, "shutil": shutil, "safetensors": safetensors}


def killed_runs(folder: Path) -> None:
    """For each of KILLS a run that dies and one that resumes it; prints how each first one ended. Before any torch
    arithmetic, so that the forks start with no threads."""
    torch.set_num_threads(1)
    trainer._gemm_rate = lambda *args: 1e12  # else each fork measures it
    build_optimizer(PlainLlama(CONFIG), RECIPE)  # imports half of torch, once for all forks
    for i, (target, nth) in enumerate(KILLS.values()):
        run_dir = folder / str(i)
        for resume in (False, True):
            pid = os.fork()
            if pid == 0:
                try:
                    if not resume:
                        die_at(target, nth, half="save" in target)
                    settings = dataclasses.replace(SETTINGS, keep=2)
                    train(run_dir, settings=settings, resume=resume)
                    os._exit(0)
                except BaseException as error:
                    print(repr(error), file=sys.stderr, flush=True)
                    os._exit(1)
            _, status = os.waitpid(pid, 0)
            before = sorted(p.name for p in run_dir.iterdir() if p.name.startswith(("step", ".step")))
            print(json.dumps([i, resume, os.waitstatus_to_exitcode(status), before]), flush=True)


def test_killed_runs_resume_bit_for_bit(tmp_path: Path) -> None:
    env = {**os.environ, "PYTHONPATH": str(Path(llama_fast.__file__).parents[1])}
    command = [sys.executable, __file__, str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120, check=False)
    assert (done.stderr, done.returncode) == ("", 0)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == 2 * len(KILLS)
    train(tmp_path / "whole", settings=dataclasses.replace(SETTINGS, keep=2))
    for i, name in enumerate(KILLS):
        (_, _, died, left), (_, _, resumed, final) = lines[2 * i], lines[2 * i + 1]
        assert (died, resumed) == (-signal.SIGKILL, 0), (name, left)
        assert final == ["step_0000009", "step_0000012"], name
        assert_same_run(tmp_path / str(i), tmp_path / "whole")
    # the kills hit what their names say
    left_at = {name: lines[2 * i][3] for i, name in enumerate(KILLS)}
    assert left_at["before the first checkpoint"] == []
    assert [n.endswith(".tmp") for n in left_at["writing the first weights"]] == [True]
    assert [n.endswith(".tmp") for n in left_at["writing the second state"]] == [True, False]
    assert left_at["before the log's fsync"] == ["step_0000003"]
    assert [n.endswith(".tmp") for n in left_at["at a file's fsync"]] == [True, False]
    assert left_at["at the run directory's fsync"] == ["step_0000003", "step_0000006"]
    assert [n.endswith(".tmp") for n in left_at["before the rename"]] == [True, False, False]
    assert left_at["removing an old checkpoint"] == [".step_0000003.old.tmp", "step_0000006", "step_0000009"]
    assert [n.endswith(".tmp") for n in left_at["in the last save"]] == [True, False, False]


if __name__ == "__main__":
    killed_runs(Path(sys.argv[1]))
