"""The training loop: accumulation, clipping, schedule, held-out loss, JSONL log, checkpoints, exact resume.

Runs any model with `loss(tokens, targets)` on any data with the `Data` protocol below. A step is: `accumulate` batches,
the mean loss over all their targets, the clipped gradient, one AdamW update. Everything that a later step depends on
(weights, optimizer, schedule, data position, torch's, numpy's and Python's generators) is in the checkpoint, so a
resumed run computes bit for bit what an uninterrupted one does, on the same machine with the same number of threads.
"""

from __future__ import annotations

import errno
import fcntl
import functools
import itertools
import json
import math
import os
import random
import resource
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from io import FileIO
from numbers import Integral
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from llama_fast import checkpoint
from llama_fast.config import LlamaConfig
from llama_fast.ops import linear
from llama_fast.train.progress import Progress
from llama_fast.train.recipe import Recipe, build_optimizer, set_learning_rate

LOG = "log.jsonl"
IGNORE_INDEX = -100
_NO_HELD_OUT = "data has no held-out batches: expected some, or eval_every = 0"
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@runtime_checkable
class Data(Protocol):
    """Where the batches come from. All tensors are [B, T] int64; a target of -100 does not count."""

    def batches(self, batch_size: int, seq_len: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Training batches (tokens, targets) from the current position on; each `next` moves the position."""
        ...

    def valid_batches(self, batch_size: int, seq_len: int, n: int) -> Iterable[tuple[Tensor, Tensor]]:
        """The same `n` held-out batches at every call, at most; none of their text is in `batches`."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """The position: tensors, plain numbers, strings and containers of these."""
        ...

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to the position that `state_dict` gave."""
        ...


@dataclass(frozen=True)
class Settings:
    """How a run trains. What shapes the curve (all but eval_*, checkpoint_every and keep) must not change at resume.

    Args:
        recipe: optimizer and schedule.
        batch_size, seq_len: B and T of one forward pass.
        accumulate: forward passes a step.
        dtype: "float32", or "bfloat16" for autocast over float32 weights.
        seed: of torch's, numpy's and Python's global generators, set when a run starts afresh.
        eval_every: steps between held-out losses, 0 for none; the last step has one too.
        eval_batches: batches in a held-out loss.
        checkpoint_every: steps between checkpoints, 0 for none but the last step's.
        keep: checkpoints kept.

    Raises:
        ValueError: names the field, its value and what was expected.
    """

    recipe: Recipe
    batch_size: int
    seq_len: int
    accumulate: int = 1
    dtype: str = "float32"
    seed: int = 0
    eval_every: int = 0
    eval_batches: int = 8
    checkpoint_every: int = 0
    keep: int = 3

    def __post_init__(self) -> None:
        if not isinstance(self.recipe, Recipe):
            raise ValueError(f"recipe = {self.recipe!r}: expected a Recipe")
        for name, least in _LEAST.items():
            value = getattr(self, name)
            if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name} = {value!r}: expected an integer of {least} or more")
            object.__setattr__(self, name, int(value))  # NumPy's too: a checkpoint takes Python's alone
        if self.seed >= 2**64:  # torch's own limit
            raise ValueError(f"seed = {self.seed}: expected less than 2^64")
        if not isinstance(self.dtype, str) or self.dtype not in _DTYPES:
            raise ValueError(f"dtype = {self.dtype!r}: expected one of {', '.join(_DTYPES)}")

    @property
    def tokens_per_step(self) -> int:
        """B * T * accumulate."""
        return self.batch_size * self.seq_len * self.accumulate


_LEAST = {
    "batch_size": 1,
    "seq_len": 1,
    "accumulate": 1,
    "seed": 0,
    "eval_every": 0,
    "eval_batches": 1,
    "checkpoint_every": 0,
    "keep": 1,
}
_CURVE = ("recipe", "batch_size", "seq_len", "accumulate", "dtype", "seed")  # a change of these changes the run


@dataclass(frozen=True)
class Report:
    """What a run did.

    Args:
        step: the last step done.
        signal: the one that stopped it before the last step of the recipe, else None.
        losses: training loss of every step of the run, those before a resume included, as far as the log has them.
        valid_losses: held-out loss by step, likewise.
        tokens_per_s: of this process's steps, without evaluation and checkpoints; 0 where it did none.
        seconds: of the run's steps, those before a resume included.
        peak_memory_bytes: the largest resident set of this process since it started (getrusage's ru_maxrss), so with
            the interpreter and whatever ran before, a parent that forked it included; on a GPU
            torch.cuda.max_memory_allocated.
        checkpoint: the newest one.
    """

    step: int
    signal: int | None
    losses: list[float]
    valid_losses: dict[int, float]
    tokens_per_s: float
    seconds: float
    peak_memory_bytes: int
    checkpoint: Path

    @property
    def interrupted(self) -> bool:
        """Stopped by a signal before the last step of the recipe."""
        return self.signal is not None


class Trainer:
    """One run: `Trainer(model, data, settings, run_dir).run()`.

    Args:
        model: float32 parameters, on the device to train on; its weights are where the run starts.
        data: see `Data`.
        settings: see `Settings`.
        run_dir: gets `log.jsonl` and the checkpoints.
        resume: go on from the newest good checkpoint in `run_dir`, or start where there is none. A damaged one is named
            and set aside as `step_N.damaged`. The log is cut back to the checkpoint's step.
        progress: what shows the run; the default is a bar on a terminal and plain lines elsewhere.

    Raises:
        ValueError: an argument is of another kind; a parameter is not float32, or none trains; the state of `data`
            could not be saved; there is nothing to evaluate on; `run_dir` holds checkpoints and `resume` is False; the
            checkpoint was trained with other settings, is not a Trainer's, or does not fit the model.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        settings: Settings,
        run_dir: Path | str,
        *,
        resume: bool = False,
        progress: Progress | None = None,
    ) -> None:
        self.model, self.data, self.settings, self.run_dir = model, data, settings, Path(run_dir)
        if not isinstance(model, nn.Module) or not callable(getattr(model, "loss", None)):
            raise ValueError(f"model is a {type(model).__name__}: expected a Module with loss(tokens, targets)")
        if not isinstance(data, Data):
            methods = "batches, valid_batches, state_dict and load_state_dict"
            raise ValueError(f"data is a {type(data).__name__}: expected one with {methods}, RunData for one")
        if not isinstance(settings, Settings):
            raise ValueError(f"settings is a {type(settings).__name__}: expected Settings")
        for name, p in model.named_parameters():
            if p.dtype != torch.float32:
                raise ValueError(f"{name} is {p.dtype}: expected float32; dtype = 'bfloat16' trains with autocast")
        checkpoint.state_bytes(data.state_dict(), "data.state_dict()")  # better now than at the first checkpoint
        if settings.eval_every:
            self._expect_held_out()  # better now than after eval_every steps
        self.optimizer = build_optimizer(model, settings.recipe)
        self.device = next(model.parameters()).device
        self.step = 0
        self.seconds = 0.0
        self._log_path = self.run_dir / LOG
        found = checkpoint.checkpoints(self.run_dir)
        if not resume:
            checkpoint.expect_none(run_dir)
        skipped: list[str] = []
        if found:
            self._resume(skipped)
        self._newest = checkpoint.checkpoints(self.run_dir)[-1:]
        if self.step == 0:
            _seed_all(settings.seed)
        recipe = settings.recipe
        self.progress = progress or Progress(recipe.steps, self.step, every=max(1, recipe.steps // 20))
        for line in skipped:
            self.progress.message(line)

    def run(self) -> Report:
        """Train to the last step, or to Ctrl-C or SIGTERM: then the step is finished, saved, and the report says so.

        A message says so at once. A second Ctrl-C stops without saving.

        Raises:
            FloatingPointError: a loss or gradient norm is not finite: nothing was updated or saved for that step; or a
                held-out loss is not: nothing was saved.
            ValueError: `data` gave a bad batch or ended; another Trainer saved in `run_dir` since this one was made.
            OSError: the log or a checkpoint could not be written; earlier checkpoints are untouched.
        """
        steps, first = self.settings.recipe.steps, self.step
        started_at = self.seconds
        flops = self._flops_per_second_per_token()
        batches = iter(self.data.batches(self.settings.batch_size, self.settings.seq_len))
        saved = self.step if first else -1
        say = self.progress.message
        with _locked_log(self._log_path) as log, _stop_signals(say) as stop, self.progress:
            if (newest := checkpoint.checkpoints(self.run_dir)[-1:]) != self._newest:
                name = newest[0].name if newest else "no checkpoint"
                raise ValueError(f"{self.run_dir} holds {name}, of another Trainer: expected one at a time in a folder")
            _cut_log(log, self._log_path, self.step, say)
            while self.step < steps and not stop:
                row = self._train_step(batches)
                self.step += 1
                if self._due(self.settings.eval_every):
                    row["valid_loss"] = valid = self.valid_loss()
                    self._expect_finite(self.step, "held-out loss", valid, "nothing was saved")
                self._append(log, row)
                rate = row["tokens_per_s"]
                self.progress.step(self.step, row["loss"], row["lr"], rate, rate * flops if flops else None)
                if self._due(self.settings.checkpoint_every) or self.step == steps:
                    self._save(log.fileno())
                    saved = self.step
            if saved != self.step:
                self._save(log.fileno())
        return self._report(first, self.seconds - started_at, stop[0] if stop and self.step < steps else None)

    def valid_loss(self) -> float:
        """Mean loss in nats over the targets of `eval_batches` held-out batches.

        Raises:
            ValueError: `data` has none.
        """
        s = self.settings
        total, count = 0.0, 0
        self.model.eval()
        with torch.no_grad():
            for tokens, targets in map(_pair, self.data.valid_batches(s.batch_size, s.seq_len, s.eval_batches)):
                if n := _count(targets):
                    total += float(self._loss(tokens, targets)) * n
                    count += n
        self.model.train()
        if count == 0:
            raise ValueError(_NO_HELD_OUT)
        return total / count

    def _expect_held_out(self) -> None:
        s = self.settings
        try:
            batches = self.data.valid_batches(s.batch_size, s.seq_len, s.eval_batches)
            some = any(_count(targets) for _, targets in map(_pair, batches))
        except ValueError as error:
            raise ValueError(f"{error}; or eval_every = 0 (--eval-every 0)") from error
        if not some:
            raise ValueError(_NO_HELD_OUT)

    def _due(self, every: int) -> bool:
        return every > 0 and (self.step % every == 0 or self.step == self.settings.recipe.steps)

    def _train_step(self, batches: Iterator[tuple[Tensor, Tensor]]) -> dict[str, Any]:
        """Do step self.step + 1 and return its log row."""
        step, start = self.step + 1, time.perf_counter()
        lr = self.settings.recipe.learning_rate(step)
        set_learning_rate(self.optimizer, lr)
        micro_batches = [self._next(batches) for _ in range(self.settings.accumulate)]
        counts = [_count(targets) for _, targets in micro_batches]
        if not any(counts):
            raise ValueError(f"step {step}: the batches have no target that counts; expected at least one")
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        loss = torch.zeros((), device=self.device)
        for (tokens, targets), n in zip(micro_batches, counts, strict=True):
            if n:  # a mean over no target is NaN
                part = self._loss(tokens, targets) * (n / sum(counts))
                part.backward()
                loss += part.detach()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        norm = nn.utils.clip_grad_norm_(trained, self.settings.recipe.clip)  # a frozen one can hold an old gradient
        for name, value in (("loss", float(loss)), ("gradient norm", float(norm))):
            self._expect_finite(step, name, value, "nothing was updated")
        self.optimizer.step()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        took = time.perf_counter() - start
        self.seconds += took
        return {
            "step": step,
            "loss": float(loss),
            "lr": lr,
            "grad_norm": float(norm),
            "tokens": step * self.settings.tokens_per_step,
            "tokens_per_s": self.settings.tokens_per_step / took,
            "seconds": self.seconds,
        }

    def _expect_finite(self, step: int, name: str, value: float, so: str) -> None:
        if not math.isfinite(value):
            found = checkpoint.checkpoints(self.run_dir)
            last = f"the last checkpoint is {found[-1]}" if found else "there is no checkpoint yet"
            raise FloatingPointError(f"step {step}: the {name} is {value}; {so}; {last}")

    def _next(self, batches: Iterator[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        expected = (self.settings.batch_size, self.settings.seq_len)
        try:
            tokens, targets = _pair(next(batches))
        except StopIteration:
            raise ValueError(f"data ended in step {self.step + 1}: expected batches without end") from None
        for name, t in (("tokens", tokens), ("targets", targets)):
            if t.shape != expected or t.dtype != torch.int64:
                raise ValueError(f"data gave {name} {tuple(t.shape)} {t.dtype}: expected {expected} torch.int64")
        return tokens, targets

    def _loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        tokens, targets = tokens.to(self.device), targets.to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.settings.dtype == "bfloat16"):
            loss = self.model.loss(tokens, targets)  # type: ignore[operator]
        if not isinstance(loss, Tensor) or loss.ndim:
            found = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise ValueError(f"model.loss gave {found}: expected a tensor of one number")
        return loss

    def _flops_per_second_per_token(self) -> float:
        """MFU of one token a second, or 0 where the model's flops are unknown."""
        config = getattr(self.model, "config", None)
        if not isinstance(config, LlamaConfig):
            return 0.0
        rate = _gemm_rate(self.settings.dtype, self.device, torch.get_num_threads())
        return config.flops_per_token(self.settings.seq_len) / rate

    def _append(self, log: FileIO, row: dict[str, Any]) -> None:
        line = json.dumps(row, allow_nan=False).encode() + b"\n"
        try:
            if log.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            what = f"log {self._log_path}, step {self.step}, not written: {error.strerror}; checkpoints are untouched"
            raise OSError(error.errno, what) from error

    def _save(self, log_fd: int) -> None:
        os.fsync(log_fd)  # so that the log never ends before the checkpoint
        state = {
            "optimizer": self.optimizer.state_dict(),
            "data": self.data.state_dict(),
            "generators": _generator_states(),
            "settings": _plain_settings(self.settings),
            "seconds": self.seconds,
        }
        self._newest = [checkpoint.save(self.run_dir, self.step, self.model, state, keep=self.settings.keep)]

    def _resume(self, skipped: list[str]) -> None:
        def set_aside(path: Path, reason: str) -> None:
            aside = _free(path.with_name(f"{path.name}.damaged"))
            skipped.append(f"skipped a damaged checkpoint, now {aside.name}: {reason}")
            path.rename(aside)

        path = checkpoint.latest(self.run_dir, set_aside)
        if path is None:
            return
        saved = checkpoint.load(path)
        if missing := {"optimizer", "data", "generators", "settings", "seconds"} - saved.state.keys():
            raise ValueError(f"{path} holds no {', '.join(sorted(missing))}: expected a checkpoint of a Trainer")
        before, now = saved.state["settings"], _plain_settings(self.settings)
        changed = [f"{k} = {now.get(k)!r} (was {before.get(k)!r})" for k in now if now[k] != before.get(k)]
        if changed:
            raise ValueError(f"{path} was trained with other settings: {'; '.join(changed)}; expected the same")
        self._expect_config(path)
        was, new = (
            sum(len(group["params"]) for group in state["param_groups"])
            for state in (saved.state["optimizer"], self.optimizer.state_dict())
        )
        if was != new:
            raise ValueError(f"{path} trained {was} parameters, of the model {new} would train now: expected the same")
        checkpoint.load_into(self.model, saved.weights)
        self.optimizer.load_state_dict(saved.state["optimizer"])
        self.data.load_state_dict(saved.state["data"])
        _set_generator_states(saved.state["generators"])
        self.step, self.seconds = saved.step, saved.state["seconds"]

    def _expect_config(self, path: Path) -> None:
        """Refuses another model whose weights have the same shapes: with other heads, rotary wavelengths or epsilon."""
        config = getattr(self.model, "config", None)
        if isinstance(config, LlamaConfig) and (path / checkpoint.CONFIG).is_file():
            before, now = checkpoint.load_config(path).to_dict(), config.to_dict()
            changed = [f"{k} = {now[k]!r} (was {before[k]!r})" for k in now if now[k] != before[k]]
            if changed:
                raise ValueError(f"{path} is of another model: {'; '.join(changed)}; expected the same")

    def _report(self, first: int, seconds: float, stopped_by: int | None) -> Report:
        rows = [json.loads(line) for line in self._log_path.read_text(encoding="utf-8").splitlines()]
        if self.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(self.device)
        else:
            unit = 1 if sys.platform == "darwin" else 1024  # Linux counts KiB
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return Report(
            step=self.step,
            signal=stopped_by,
            losses=[row["loss"] for row in rows],
            valid_losses={row["step"]: row["valid_loss"] for row in rows if "valid_loss" in row},
            tokens_per_s=(self.step - first) * self.settings.tokens_per_step / seconds if seconds else 0.0,
            seconds=self.seconds,
            peak_memory_bytes=peak,
            checkpoint=checkpoint.checkpoints(self.run_dir)[-1],
        )


def measure_gemm_rate(dtype: str = "float32", device: torch.device | str = "cpu", seconds: float = 0.5) -> float:
    """Flops a second of the fastest square matrix product of `dtype` that is to be had here, over `seconds`.

    On a CPU PyTorch's own choice, oneDNN and the path of a linear layer here (docs/ops/linear.md) are tried: on two
    cores of an AMD Zen 5, float32, these do 226, 446 and 480 GFLOP/s.

    Raises:
        ValueError: `dtype` is neither "float32" nor "bfloat16".
    """
    if dtype not in _DTYPES:
        raise ValueError(f"dtype = {dtype!r}: expected one of {', '.join(_DTYPES)}")
    device = torch.device(device)
    n = 1024 if device.type == "cpu" else 8192  # large enough for the full rate, small enough for many in 0.5 s
    generator = torch.Generator().manual_seed(0)  # of the CPU, whatever torch's default device is
    a, b = (torch.randn(n, n, generator=generator, device="cpu").to(device, _DTYPES[dtype]) for _ in "ab")
    products = [lambda: a @ b]
    if device.type == "cpu":
        products.append(lambda: linear.nt(a, b))
        if torch.backends.mkldnn.is_available():
            products.append(lambda: torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], ""))

    def time_of(product: Callable[[], Tensor]) -> float:
        start = time.perf_counter()
        product()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    best = math.inf
    for product in products:
        time_of(product)  # the first call sets up
        end = time.perf_counter() + seconds / len(products)
        while time.perf_counter() < end:
            best = min(best, time_of(product))
    return 2 * n**3 / best


@functools.cache
def _gemm_rate(dtype: str, device: torch.device, threads: int) -> float:
    """Measured once a process for equal arguments, so that the MFU of its runs compares."""
    return measure_gemm_rate(dtype, device)


def _pair(batch: Any) -> tuple[Tensor, Tensor]:
    if not isinstance(batch, tuple | list) or [isinstance(t, Tensor) for t in batch] != [True, True]:
        raise ValueError(f"data gave a {type(batch).__name__}: expected (tokens, targets), two tensors")
    return batch[0], batch[1]


def _count(targets: Tensor) -> int:
    return int((targets != IGNORE_INDEX).sum())


def _plain_settings(settings: Settings) -> dict[str, Any]:
    values = asdict(settings)
    flat = {k: v for k, v in values.items() if k in _CURVE and k != "recipe"}
    return flat | {f"recipe.{k}": v for k, v in values["recipe"].items()}


def _seed_all(seed: int) -> None:
    torch.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


def _generator_states() -> dict[str, Any]:
    kind, keys, *rest = np.random.get_state()
    states: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "numpy": (kind, [int(k) for k in keys], *rest),
        "python": random.getstate(),
    }
    if torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state_all()
    return states


def _set_generator_states(states: dict[str, Any]) -> None:
    torch.set_rng_state(states["torch"])
    np.random.set_state(states["numpy"])
    random.setstate(states["python"])
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states["cuda"])


@contextmanager
def _locked_log(path: Path) -> Iterator[FileIO]:
    """The log, unbuffered, for this process alone."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab+", buffering=0) as log:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"{path.parent}: another process trains here; expected an unused folder") from None
        yield log


def _cut_log(log: FileIO, path: Path, step: int, say: Callable[[str], None]) -> None:
    """Cuts the log after the line of `step`.

    Later and half-written lines are those of a run that was killed after its checkpoint. No such run's lines end before
    `step`: that is damage, which is said, and what lies behind it is kept in a copy.
    """
    keep = last = 0
    data = path.read_bytes()
    for line in data.splitlines(keepends=True):
        try:
            row = json.loads(line)
            if not line.endswith(b"\n") or row["step"] > step or not isinstance(row["loss"], float):
                break
        except (ValueError, KeyError, TypeError):
            break
        keep, last = keep + len(line), row["step"]
    if last != step:
        message = f"{path} is damaged: it can be read up to step {last}, and the checkpoint is of step {step}"
        if keep < len(data):
            shutil.copyfile(path, aside := _free(path.with_name(f"{path.name}.damaged")))
            message += f"; what it was is now {aside.name}"
        say(message)
    log.truncate(keep)


def _free(path: Path) -> Path:
    """`path`, with a number behind it where that exists."""
    numbered = (path.with_name(f"{path.name}-{i}") for i in itertools.count(2))
    return next(p for p in itertools.chain([path], numbered) if not p.exists())


@contextmanager
def _stop_signals(say: Callable[[str], None]) -> Iterator[list[int]]:
    """The SIGINT and SIGTERM that came, by number; a SIGINT after the first raises. Only the main thread can listen."""
    stop: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def on_signal(number: int, frame: Any) -> None:
        if stop and number == signal.SIGINT:
            raise KeyboardInterrupt
        if not stop:
            say(
                f"{signal.Signals(number).name}: this step is finished and saved, then the run ends; Ctrl-C ends it now"
            )
        stop.append(number)

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
