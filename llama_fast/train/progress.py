"""What a person sees while a run trains: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar


class _Console(Console):
    """rich's ends the program where the reader of a pipe has gone."""

    def on_broken_pipe(self) -> None:
        raise BrokenPipeError


class Progress:
    """Shows the step, loss, learning rate, tokens/s and MFU of a run; a context manager.

    What cannot be written, to a pipe whose reader has gone, a closed terminal or a full disk, ends no run: from then on
    nothing is shown.

    Args:
        steps: of the whole run.
        done: steps that were done before.
        every: a plain line each so many steps, where there is no terminal.
        console: of rich; the default writes to standard error.
        quiet: show nothing but messages.
    """

    def __init__(
        self, steps: int, done: int = 0, *, every: int = 1, console: Console | None = None, quiet: bool = False
    ) -> None:
        self.console = console or _Console(stderr=True)
        self._steps, self._every, self._quiet = steps, every, quiet
        self._bar: Bar | None = None
        if self.console.is_terminal and not quiet:
            self._bar = Bar(
                TextColumn("step"),
                MofNCompleteColumn(),
                BarColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.description}"),
                console=self.console,
            )
            self._task = self._bar.add_task("", total=steps, completed=done)

    def __enter__(self) -> Progress:
        with self._showing():
            if self._bar is not None:
                self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._showing():
            if self._bar is not None:
                self._bar.stop()

    def step(self, step: int, loss: float, lr: float, tokens_per_s: float, mfu: float | None) -> None:
        """Show one finished step; `mfu` is a fraction, None where it is unknown."""
        text = f"loss {loss:.4f}  lr {lr:.2e}  {tokens_per_s:,.0f} tokens/s"
        if mfu is not None:
            text += f"  MFU {mfu:.0%}"
        if self._bar is not None:
            with self._showing():
                self._bar.update(self._task, completed=step, description=text)
        elif not self._quiet and (step % self._every == 0 or step in (1, self._steps)):
            self.message(f"step {step}/{self._steps}  {text}")

    def message(self, text: str) -> None:
        """Print one line, above the bar where there is one."""
        with self._showing():
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def _showing(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            self.console.quiet = True
