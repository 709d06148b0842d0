"""Two versions side by side: `python -m benchmarks OP ... --vs REVISION`.

The older revision is checked out and built in a folder of its own. Each side is a process that stays loaded and is told
when to run, so that the two take turns run by run on the same machine, in the same minutes; the order changes with each
turn. A case's ratio is the median over the turns of old / new, with its 20th and 80th percentile: over 1, the new one
is faster. The noise of a machine is what `--vs HEAD` gives on an unchanged tree (docs/measuring.md).
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from . import results
from .results import Limit, Line, Seconds

ROOT = Path(__file__).resolve().parents[1]
TURN = 0.02  # seconds at least that a side runs before the other one's turn
TURNS = 15


class Worker:
    """A side: a process that measures the llama_fast of `folder`; a context manager.

    Raises:
        RuntimeError: of `ask`, what the worker says went wrong.
    """

    def __init__(self, folder: Path) -> None:
        command = [sys.executable, str(Path(__file__).with_name("worker.py")), str(folder)]
        # a session of its own: Ctrl-C is for the program that asks, which then ends the worker's input
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=folder, start_new_session=True
        )

    def ask(self, **request: Any) -> dict[str, Any]:
        """The worker's answer to a request, see worker.py."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise RuntimeError(f"the worker ended with status {self.process.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


@dataclass(frozen=True)
class Ratio:
    """How many times faster the new side is: median, 20th and 80th percentile over the turns."""

    median: float
    p20: float
    p80: float

    @property
    def verdict(self) -> str:
        """ "faster" or "slower" where the whole range is on one side of 1, else "same"."""
        return "faster" if self.p20 > 1 else "slower" if self.p80 < 1 else "same"


def checkout(revision: str, root: Path = ROOT) -> tuple[Path, str]:
    """(folder, commit) of a built revision, in build/revisions; kept for the next time.

    Raises:
        ValueError: `root` is no clone; no such revision, or it does not build.
    """
    if not (root / "setup.py").is_file():  # installed below a clone, in its .venv, git would take it for the clone
        raise ValueError(f"revision {revision!r}: {root} is an installed copy; run `python -m benchmarks` in a clone")

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=False)
        if done.returncode:
            said = done.stderr.strip().splitlines()[-1].removeprefix("fatal: ")
            raise ValueError(f"revision {revision!r}: git says {said!r}; expected a commit, branch or tag of {root}")
        return done.stdout.strip()

    commit = git("rev-parse", "--verify", f"{revision}^{{commit}}")
    folder = root / "build" / "revisions" / commit[:12]
    if not (folder / "built").exists():
        shutil.rmtree(folder, ignore_errors=True)  # what Ctrl-C or a failed build left may be half of it
        git("worktree", "prune")
        git("worktree", "add", "--detach", "--force", "--force", str(folder), commit)  # twice: over a locked one too
        command = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ValueError(f"revision {revision!r} does not build: {(done.stderr or done.stdout).strip()[-400:]}")
        (folder / "built").write_text("")
    return folder, commit


def alternate(
    sides: Mapping[str, Callable[[int], Sequence[float]]], first: Mapping[str, float], turns: int = TURNS
) -> tuple[dict[str, Seconds], Ratio]:
    """Times of both sides and their ratio. A side is a function: how often to run -> the seconds of each run.

    Args:
        sides: "old" and "new".
        first: seconds of one run of each, from the warm-up.
        turns: how often each side's turn comes.
    """
    count = max(1, min(200, round(TURN / max(min(first.values()), 1e-9))))
    samples: dict[str, list[float]] = {"old": [], "new": []}
    ratios = []
    for turn in range(turns):
        medians = {}
        for name in ("old", "new") if turn % 2 == 0 else ("new", "old"):
            times = sides[name](count)
            medians[name] = statistics.median(times)
            samples[name] += times
        ratios.append(medians["old"] / medians["new"])
    spread = results.summary(ratios)
    return {n: results.summary(s) for n, s in samples.items()}, Ratio(spread.median, spread.p20, spread.p80)


def compare(
    names: Sequence[tuple[str, str]],
    revision: str,
    describe: Callable[[str, str], dict[str, Any]],
    dtypes: Sequence[str],
    console: Console,
    turns: int = TURNS,
) -> tuple[list[Line], tuple[Limit, ...], str, bool]:
    """Measures cases, by name and direction, on both sides and prints their ratios.

    Args:
        names: (case, direction).
        revision: the older side.
        describe: case, direction -> the fields of a result line that do not depend on the side.
        dtypes: whose matrix rate is measured.
        console: where to print.
        turns: as in `alternate`.

    Returns:
        Lines of the providers "llama_fast" and "before:<commit>", the limits, the old commit, and whether Ctrl-C came
        before the last case.

    Raises:
        ValueError: the revision is unknown or does not build.
    """
    with console.status(f"building {revision}"):
        folder, commit = checkout(revision)
    console.print(f"old: {revision}, commit {commit[:12]}; new: this tree", highlight=False)
    lines: list[Line] = []
    table = Table("case", "direction")
    for header in ("old ms", "new ms", "new is", "20..80 % of turns", ""):
        table.add_column(header, justify="right")
    interrupted = False
    with Worker(folder) as old, Worker(ROOT) as new, console.status("") as status:
        sides = {"old": old, "new": new}
        about = {n: w.ask(about=True) for n, w in sides.items()}
        limits = tuple(Limit(**x) for x in new.ask(limits=list(dtypes))["limits"])
        try:
            for name, direction in names:
                status.update(f"{name} {direction}")
                failed: dict[str, str] = {}
                first = {}
                for n, w in sides.items():
                    try:
                        first[n] = float(w.ask(prepare=name, direction=direction)["seconds"])
                    except RuntimeError as error:
                        failed[n] = str(error)
                times: dict[str, Seconds] = {}
                if not failed:
                    run = {n: (lambda k, w=w: w.ask(run=k)["seconds"]) for n, w in sides.items()}  # type: ignore[misc]
                    times, ratio = alternate(run, first, turns)
                    ms = (f"{times[n].median * 1e3:.3f}" for n in sides)
                    spread = f"{ratio.p20:.3f}..{ratio.p80:.3f}"
                    table.add_row(name, direction, *ms, f"{ratio.median:.3f}x", spread, ratio.verdict)
                for n, text in failed.items():
                    table.add_row(name, direction, "", "", f"{n}: {text}", "", "")
                for n, provider in (("new", results.OURS), ("old", f"before:{commit[:12]}")):
                    reason = failed.get(n, "" if times else "the other side failed")
                    wrong = reason.startswith("RuntimeError: wrong")
                    fields = {**describe(name, direction), "provider": provider, "reason": reason, "error": None}
                    fields |= {"status": "wrong" if wrong else "not run" if reason else "measured"}
                    fields |= {"seconds": times.get(n)}
                    fields |= dict.fromkeys(("limit", "share", "peak_bytes", "kept_bytes"))
                    fields["command"] += f" --vs {commit[:12]}"
                    lines.append(Line(**fields))
            limits = results.better(limits, (Limit(**x) for x in new.ask(limits=list(dtypes))["limits"]))
        except KeyboardInterrupt:
            interrupted = True
    console.print(table)
    assert Path(about["old"]["folder"]) == folder
    assert Path(about["new"]["folder"]) == ROOT
    return [results.against(x, limits) for x in lines], limits, commit, interrupted
