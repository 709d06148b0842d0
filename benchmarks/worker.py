"""One side of a comparison of two versions: measures what it is told to, with the llama_fast of the folder it is given.

    python benchmarks/worker.py FOLDER

FOLDER holds the package `llama_fast` to measure; the cases are those of this file's own tree, so that both sides do the
same work. Requests are JSON lines on the standard input, answers JSON lines on the standard output:

    {"prepare": name, "direction": "forward"}   inputs are made, the results are judged, two runs warm up
                                                -> {"seconds": of the second run}
    {"run": n}                                  -> {"seconds": [n times]}
    {"limits": [dtype]}                         -> {"limits": [a Limit each, as JSON]}
    {"about": true}                             -> {"folder": where llama_fast is from, "allocator": its state}

An error is {"error": text}; the worker goes on.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent


class Side:
    """What the requests are made of."""

    def __init__(self) -> None:
        import llama_fast

        self.allocator = str(llama_fast.keep_host_memory())
        self.folder = str(Path(llama_fast.__file__).parents[1])
        self.run: Any = None

    def answer(self, request: dict[str, Any]) -> dict[str, Any]:
        """The answer to one request."""
        if "prepare" in request:
            self.run = None  # its tensors go before the next ones come
            self.run = prepared(request["prepare"], request["direction"])
            self.run()
            return {"seconds": self._timed()}
        if "run" in request:
            return {"seconds": [self._timed() for _ in range(request["run"])]}
        if "limits" in request:
            import torch

            from benchmarks import harness

            found = harness.measure_limits([getattr(torch, name) for name in request["limits"]])
            return {"limits": [dataclasses.asdict(x) for x in found]}
        return {"folder": self.folder, "allocator": self.allocator}

    def _timed(self) -> float:
        start = time.perf_counter()
        self.run()
        return time.perf_counter() - start


def prepared(name: str, direction: str) -> Any:
    """The function to time: ours, on the case of this name.

    Raises:
        RuntimeError: the results are wrong.
    """
    import llama_fast
    from benchmarks import harness, model, suite
    from llama_fast.ops.table import OPS

    for scenario in model.scenarios():
        if scenario.name == name:
            maker = next(iter(scenario.sides().values()))  # ours comes first
            assert not isinstance(maker, str)
            return maker().run
    benchmark = next(b for b in suite.collect(list(OPS)) if b.name == name)
    work = harness.Work.of(benchmark)
    ours = getattr(llama_fast, benchmark.case.op)
    _, problem = harness.Judge(work)(work.everything(ours), ours=True)
    if problem:
        raise RuntimeError(f"wrong: {problem}")
    return work.forward(ours) if direction == "forward" else work.both(ours)


def main(folder: str) -> None:
    """Answers requests until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is no answer
    sys.path[0] = folder
    spec = importlib.util.spec_from_file_location(
        "benchmarks", HERE / "__init__.py", submodule_search_locations=[str(HERE)]
    )
    assert spec is not None
    assert spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules["benchmarks"] = package
    spec.loader.exec_module(package)
    side: Side | None = None
    for line in sys.stdin:
        try:
            side = side or Side()
            found = side.answer(json.loads(line))
        except Exception as error:  # the other side and the next case go on
            found = {"error": f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"}
        answers.write(json.dumps(found) + "\n")
        answers.flush()


if __name__ == "__main__":
    main(sys.argv[1])
