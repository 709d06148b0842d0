"""What `make demo` runs: check the ops, time them, train the same LLaMA in plain PyTorch and with llama_fast.

Both trainings start from the same weights and see the same batches; a third one shows what rounding alone does. Each is
a process of its own, one after the other, so that its peak memory is its own; all keep freed host memory
(`llama_fast.keep_host_memory`), so that the comparison is between the two ways to compute.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import resource
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from llama_fast.config import LlamaConfig

BATCH_SIZE, SEQ_LEN, LR = 4, 256, 1e-3
VOCAB_SIZE = 1024  # small, so that a few hundred thousand tokens show a model what the text looks like
PROMPT = "def "
NAMES = {"plain": "plain PyTorch", "ours": "llama_fast"}
# A third run, plain PyTorch from weights changed by about one unit in the last place: how far rounding alone leads.
NUDGE = 1e-7
RUNS = {**NAMES, "nudged": "plain PyTorch, weights changed in the last place"}


def main(out: Path, *, steps: int, data: Sequence[str], console: Console) -> None:
    """Runs all parts and prints what they found; files go to `out`.

    Raises:
        ValueError: `steps` or `data` cannot be used.
        OSError: `out` cannot be written.
        SystemExit: status 1 when a part failed; the parts after it have run where they could.
    """
    from llama_fast.train import run

    start = time.perf_counter()
    # what cannot be used is said before anything runs
    _settings(steps)
    sources = run.sources_of(data, (out,))
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("matplotlib is missing: pip install 'llama_fast[demo]'")
    out.mkdir(parents=True, exist_ok=True)
    failed = []
    for number, (what, command) in enumerate(
        (
            ("every op against float64", ["verify"]),
            ("every op against eager PyTorch", ["bench", "--quick", "--json", str(out / "bench.json")]),
        ),
        start=1,
    ):
        console.rule(f"{number}. llama-fast {command[0]}: {what}")
        if subprocess.run([sys.executable, "-m", "llama_fast.cli", *command], check=False).returncode:
            failed.append(command[0])

    console.rule("3. The same LLaMA trained twice")
    config = _config()
    run.prepare(sources, config.vocab_size, out / "data")
    described = ", ".join(f"{s.name} {s.weight:g}" for s in sources)
    console.print(
        f"{config.n_params / 1e6:.1f} M parameters, {steps} steps of {BATCH_SIZE} x {SEQ_LEN} tokens, float32; "
        f"text: {described}; same weights, same batches",
        highlight=False,
    )
    found: dict[str, dict[str, Any]] = {}
    for kind, name in RUNS.items():
        console.print(name, highlight=False)
        command = [sys.executable, "-m", "llama_fast.demo", kind, str(out), str(steps), *data]
        if subprocess.run(command, check=False).returncode:
            console.print(f"failed: {', '.join([*failed, f'the training of {name}'])}", style="bold red")
            raise SystemExit(1)
        found[kind] = json.loads((out / f"{kind}.json").read_text())
    if not _print_curves(found, console):
        failed.append("the comparison of the curves")
    _print_costs(found, console)
    _draw(found, out / "loss.png")
    console.print(f"curves drawn in {out / 'loss.png'}", highlight=False)

    console.rule("4. Text from the model trained with llama_fast")
    _sample(out / "ours", console)
    console.rule(f"done in {time.perf_counter() - start:.0f} s")
    if failed:
        console.print(f"failed: {', '.join(failed)}", style="bold red")
        raise SystemExit(1)


def saved_bytes_per_token_and_layer(kind: str, config: LlamaConfig) -> float:
    """Bytes that one block keeps between forward and backward, a token: the difference of two layers and one.

    Counted with torch.autograd.graph.saved_tensors_hooks, each storage once, parameters and their views left out.
    """
    tokens = torch.zeros(BATCH_SIZE, SEQ_LEN, dtype=torch.int64)
    totals = [_saved_bytes(_model(kind, dataclasses.replace(config, n_layers=n)), tokens) for n in (1, 2)]
    return (totals[1] - totals[0]) / tokens.numel()


def peak_memory() -> int:
    """The largest resident set of this process, in bytes."""
    try:  # ru_maxrss counts what a parent held when it forked; VmHWM begins anew with each program
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        scale = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale


def _config() -> LlamaConfig:
    return dataclasses.replace(LlamaConfig.preset("demo"), vocab_size=VOCAB_SIZE)


def _model(kind: str, config: LlamaConfig) -> nn.Module:
    from llama_fast.train import run

    return run.build_model(config, plain=kind == "plain")


def _saved_bytes(model: nn.Module, tokens: Tensor) -> int:
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        kept.setdefault(x.untyped_storage().data_ptr(), x)
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = model.loss(tokens, tokens)  # type: ignore[operator]
    del loss
    return sum(x.untyped_storage().nbytes() for pointer, x in kept.items() if pointer not in parameters)


def _settings(steps: int) -> Any:
    """How each of the trainings goes. Raises ValueError for steps that cannot be."""
    from llama_fast.train.recipe import Recipe
    from llama_fast.train.trainer import Settings

    recipe = Recipe(steps, lr=LR, warmup_steps=max(0, min(20, steps // 5)))
    return Settings(recipe, BATCH_SIZE, SEQ_LEN, eval_every=steps, eval_batches=8)


def _train(kind: str, out: Path, steps: int, data: Sequence[str]) -> None:
    """One of the trainings, in a process of its own; its figures go to `out`/<kind>.json."""
    import shutil

    import llama_fast
    from llama_fast.train import run
    from llama_fast.train.trainer import Trainer

    llama_fast.keep_host_memory()
    config = _config()
    run_dir = out / kind
    shutil.rmtree(run_dir, ignore_errors=True)
    tokenizer, dataset = run.prepare(run.sources_of(data), config.vocab_size, out / "data")
    run.keep_tokenizer(tokenizer, run_dir)
    model = _model("ours" if kind == "ours" else "plain", config)
    if kind == "nudged":
        with torch.no_grad():
            generator = torch.Generator().manual_seed(0)
            for p in model.parameters():
                p.mul_(1.0 + NUDGE * torch.randn(p.shape, generator=generator))
    report = Trainer(model, run.RunData(dataset, BATCH_SIZE, SEQ_LEN), _settings(steps), run_dir).run()
    if report.signal is not None:
        raise SystemExit(128 + report.signal)
    figures = {
        "losses": report.losses,
        "valid_loss": report.valid_losses[report.step],
        "tokens_per_s": report.tokens_per_s,
        "peak_memory": peak_memory(),
        "saved_bytes": saved_bytes_per_token_and_layer("ours" if kind == "ours" else "plain", config),
    }
    (out / f"{kind}.json").write_text(json.dumps(figures) + "\n")


def _print_curves(found: dict[str, dict[str, Any]], console: Console) -> bool:
    """Prints both training losses; whether they differ by no more than rounding leads to."""
    plain, ours = found["plain"]["losses"], found["ours"]["losses"]
    table = Table("step", title="training loss, nats a token")
    for header in (*NAMES.values(), "difference"):
        table.add_column(header, justify="right")
    every = max(1, len(plain) // 10)
    for i in sorted({0, *range(every - 1, len(plain), every), len(plain) - 1}):
        table.add_row(str(i + 1), f"{plain[i]:.4f}", f"{ours[i]:.4f}", f"{ours[i] - plain[i]:+.1e}")
    console.print(table)
    nudged = found["nudged"]["losses"]
    ours_gap, their_gap = (
        sum((a - b) ** 2 for a, b in zip(plain, other, strict=True)) ** 0.5 / len(plain) ** 0.5
        for other in (ours, nudged)
    )
    early = max(abs(a - b) for a, b in zip(plain[:20], ours[:20], strict=True))
    agree = early < 1e-4 and ours_gap < 2.0 * their_gap + 1e-4
    console.print(
        f"{'the curves agree' if agree else 'THE CURVES DIFFER'}: within {early:.1e} nats over the first "
        f"{min(20, len(plain))} steps; root-mean-square difference over all {ours_gap:.1e}, where plain PyTorch has "
        f"{their_gap:.1e} to itself from weights changed by one part in {1 / NUDGE:.0e} (training amplifies rounding)",
        style=None if agree else "bold red",
        highlight=False,
    )
    return agree


def _print_costs(found: dict[str, dict[str, Any]], console: Console) -> None:
    table = Table("")
    for header in (*NAMES.values(), "ratio"):
        table.add_column(header, justify="right")
    for label, key, text in (
        ("tokens a second", "tokens_per_s", "{:,.0f}"),
        ("bytes kept for the backward, per token and layer", "saved_bytes", "{:,.0f}"),
        ("peak memory of the process, MB", "peak_memory", "{:,.0f}"),
        ("held-out loss", "valid_loss", "{:.4f}"),
    ):
        values = [found[kind][key] / (1e6 if key == "peak_memory" else 1) for kind in NAMES]
        table.add_row(label, *(text.format(v) for v in values), f"{values[1] / values[0]:.2f}")
    console.print(table)


def _draw(found: dict[str, dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plain, ours = found["plain"]["losses"], found["ours"]["losses"]
    steps = range(1, len(plain) + 1)
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(8, 6), sharex=True, height_ratios=(3, 1), layout="constrained")
    top.plot(steps, plain, color="#d98032", linewidth=4, alpha=0.5, label=NAMES["plain"])
    top.plot(steps, ours, color="#20507a", linewidth=1.2, label=NAMES["ours"])
    top.set_ylabel("training loss, nats a token")
    top.legend(frameon=False)
    bottom.plot(steps, [b - a for a, b in zip(plain, ours, strict=True)], color="#20507a", linewidth=1)
    bottom.axhline(0.0, color="gray", linewidth=0.5)
    bottom.set_ylabel("difference")
    bottom.set_xlabel("step")
    bottom.xaxis.get_major_locator().set_params(integer=True)
    for axis in (top, bottom):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _sample(run_dir: Path, console: Console) -> None:
    from llama_fast import terminal

    model, tokenizer, _ = terminal.load(run_dir, None, None)
    ids = torch.tensor([tokenizer.encode(PROMPT, bos=True)])
    generated = model.generate(ids, max_new_tokens=160, temperature=0.7, top_p=0.95, seed=1)
    console.print(tokenizer.decode(generated[0].tolist()), markup=False, highlight=False)


if __name__ == "__main__":
    _train(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
