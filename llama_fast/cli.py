"""The command line, `llama-fast`. Each command is a thin layer over the library; errors are one line, status 2."""

from __future__ import annotations

import dataclasses
import io
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Column, Table

from llama_fast import __version__

app = typer.Typer(
    help="Custom kernels for LLaMA-architecture models: check them, measure them, train and generate with them.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"llama-fast {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    """What stands before the command."""


WIDEST = 170  # columns of the widest table, that of bench

OpOption = Annotated[list[str] | None, typer.Option("--op", help="Only this op; can be given again.", metavar="NAME")]


def main() -> None:
    """Entry point of the `llama-fast` program."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a character that the locale has not ends no text
    try:
        app()
    except Exception as error:
        import torch  # here: --help does not wait for it

        from llama_fast.ops.dispatch import NotSupported

        expected = (ValueError, OSError, ImportError, NotSupported, FloatingPointError, torch.OutOfMemoryError)
        on_host = "can't allocate memory" in str(error)  # for a CPU torch has no class of its own
        if os.environ.get("LLAMA_FAST_LOG") == "debug" or not (isinstance(error, expected) or on_host):
            raise
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        print(f"llama-fast: {'; '.join(lines) or type(error).__name__}", file=sys.stderr)
        sys.exit(2)


def _console(wide: bool = True) -> Console:
    """A terminal's width; for files, and where `wide`, at least the widest table's: rich cuts off what does not fit."""
    if not sys.stdout.isatty():
        return Console(width=WIDEST)
    return Console(width=max(WIDEST, Console().width) if wide else None)


def _ops(names: list[str] | None) -> list[str]:
    from llama_fast.ops.table import OPS

    for name in names or ():
        if name not in OPS:
            raise ValueError(f"--op {name}: expected one of {', '.join(OPS)}")
    return [name for name in OPS if not names or name in names]


@app.command()
def info(brief: Annotated[bool, typer.Option("--brief", help="One line.")] = False) -> None:
    """What was built, what this machine can run, and why the rest cannot."""
    from llama_fast import info

    if brief:
        print(info.brief())
        return
    console = _console(wide=False)
    facts = Table(Column(), Column(overflow="fold"), box=None, show_header=False)  # a folder is never cut off
    for name, value in info.machine():
        facts.add_row(name, value)
    console.print(facts)
    table = Table("op", "backend", "runs")
    for row in info.support():
        dtypes = ", ".join(str(d).removeprefix("torch.") for d in row.dtypes)
        table.add_row(row.op, row.backend, dtypes or f"no: {row.objection}")
    console.print(table)


@app.command()
def verify(
    op: OpOption = None,
    every: Annotated[
        bool, typer.Option("--all", help="Every tensor of every case, not the worst of each kind.")
    ] = False,
) -> None:
    """Errors of every op, backend and instruction set that runs here, against float64, beside eager PyTorch's.

    Exit status 1 if a result misses its budget.
    """
    from llama_fast.verify import DRAWS, Result

    results: list[Result] = []
    skipped: dict[str, str] = {}
    for item in _verify_all(_ops(op)):
        if isinstance(item, Result):
            results.append(item)
        else:
            skipped[item[0]] = item[1]
    shown = results if every else _worst(results)
    table = Table("op", "case", "backend", "dtype", "tensor", title="error against float64")
    for header in ("error", "eager's", "budget", "ok"):
        table.add_column(header, justify="right")
    for r in shown:
        where = f"{r.backend}/{r.isa}" if r.isa else r.backend
        dtype = str(r.dtype).removeprefix("torch.")
        numbers = (f"{r.error:.2e}", f"{r.eager_error:.2e}", f"{r.budget:.2e}")
        table.add_row(r.case.op, str(r.case), where, dtype, r.tensor, *numbers, "NO" if r.problem else "yes")
    console = _console()
    console.print(table)
    for name, reason in skipped.items():
        console.print(f"not run: {name}: {reason}", highlight=False)
    bad = 0
    for r in results:
        if r.problem:
            bad += 1
            where = f"{r.backend}/{r.isa}" if r.isa else r.backend
            console.print(f"NO: {r.case.op} {r.case}, {where}, {r.dtype}, {r.tensor}: {r.problem}", highlight=False)
    again = sum(r.draws > 1 for r in results)
    means = f"; {again} judged by the means of {DRAWS} draws of the inputs" if again else ""
    console.print(
        f"{len(results)} tensors checked, {len(results) - bad} within budget, {bad} not{means}", highlight=False
    )
    if bad or not results:
        raise typer.Exit(1)


def _verify_all(ops: list[str]) -> Iterator[Any]:
    """A Result for every tensor, or (what, reason) for what cannot run here."""
    import torch

    from llama_fast.ops import native
    from llama_fast.ops.dispatch import NotSupported
    from llama_fast.ops.table import OPS
    from llama_fast.verify import CASES, instruction_set, measure

    torch.use_deterministic_algorithms(True)  # fills what torch.empty gives with NaN: a value left unwritten is seen
    for name in ops:
        for b in OPS[name].backends:
            isas = native.isas() if b.name == "cpu" else [""]
            if not isas:
                yield f"{name} on {b.name}", native.unavailable()
            if b.device == "cuda" and not torch.cuda.is_available():
                yield f"{name} on {b.name}", "torch sees no CUDA device"
                continue
            for isa in isas:
                for case in (c for c in CASES if c.op == name):
                    for dtype in (torch.float32, torch.bfloat16, torch.float16):
                        if dtype not in b.dtypes:
                            continue
                        try:
                            if isa:
                                with instruction_set(isa):
                                    yield from measure(case, b.name, dtype, b.device or "cpu")
                            else:
                                yield from measure(case, b.name, dtype, b.device or "cpu")
                        except NotSupported as error:
                            yield f"{name} on {b.name}, {case}", str(error).splitlines()[-1].strip()


def _worst(results: list[Any]) -> list[Any]:
    """Of each op, backend, dtype and direction the result nearest to, or furthest over, its budget."""
    worst: dict[tuple[Any, ...], Any] = {}

    def strain(r: Any) -> tuple[bool, float]:
        return bool(r.problem), r.error / r.budget if r.budget else 0.0

    for r in results:
        key = (r.case.op, r.backend, r.dtype, r.tensor.startswith("d"))
        if key not in worst or strain(r) > strain(worst[key]):
            worst[key] = r
    return list(worst.values())


@app.command()
def bench(
    op: OpOption = None,
    quick: Annotated[bool, typer.Option("--quick", help="One or two cases an op, about a minute.")] = False,
    case: Annotated[
        list[str] | None, typer.Option("--case", help="Only cases whose name contains this; can be given again.")
    ] = None,
    provider: Annotated[
        list[str] | None, typer.Option("--provider", help="Only this provider and ours; can be given again.")
    ] = None,
    seconds: Annotated[float | None, typer.Option(help="For each provider and direction, about.")] = None,
    device: Annotated[str, typer.Option(help="cpu; or cuda, for the model level.")] = "cpu",
    vs: Annotated[
        str | None, typer.Option("--vs", metavar="REVISION", help="Take turns with this older revision, built for it.")
    ] = None,
    json: Annotated[Path | None, typer.Option("--json", help="Write a result file too.")] = None,
    listed: Annotated[bool, typer.Option("--list", help="The names of the cases, and no more.")] = False,
) -> None:
    """Time every op against what people would use instead, interleaved in one process, beside the machine's limits.

    --op block, training_step, lora_step and decode are the model level. Exit status 1 if a result is wrong; it shows no
    time then. 130 after Ctrl-C, which prints and writes what was measured before.
    """
    suite = _benchmarks("suite")
    ops = suite.chosen(op or (), device)
    if listed:
        print("\n".join(suite.case_names(ops, device)))
        return
    _benchmarks("harness").pin_threads()
    found = suite.run(
        ops,
        device=device,
        quick=quick,
        cases=case or (),
        providers=provider or (),
        seconds=seconds,
        versus=vs,
        json_path=json,
        console=_console(),
    )
    if any(line.status == "wrong" for line in found.lines):
        raise typer.Exit(1)


@app.command()
def report(
    files: Annotated[list[Path], typer.Argument(help="Result files, as `llama-fast bench --json` writes them.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="The page.")] = Path("report.html"),
    png: Annotated[Path | None, typer.Option("--png", help="Folder for each plot as a picture.")] = None,
) -> None:
    """One HTML page of result files, with tables, plots and commands; it needs no network."""
    written = _benchmarks("report").write(files, out, png)
    print(f"{out}: {out.stat().st_size / 1e3:,.0f} kB" + (f", {len(written) - 1} pictures in {png}" if png else ""))


@app.command()
def plan(
    preset: Annotated[str, typer.Option(help="Model, llama-7b for one; an unknown name shows them all.")],
    device: Annotated[str, typer.Option(help="a100, h100, h200 or b200.")] = "h100",
    world: Annotated[int, typer.Option(help="Devices.")] = 1,
    tensor: Annotated[
        int | None, typer.Option(help="Devices that split each layer. Default: several, beside each other.")
    ] = None,
    sequence: Annotated[
        bool, typer.Option("--sequence/--no-sequence", help="Where layers are split: rows between them too.")
    ] = True,
    shard: Annotated[str, typer.Option(help="full (FSDP), states (ZeRO 1) or none (DDP).")] = "full",
    policy: Annotated[str | None, typer.Option(help="One policy of the block. Default: all.")] = None,
    seq_len: Annotated[int | None, typer.Option(help="Default: 2048, or the preset's longest if that is less.")] = None,
    batch_size: Annotated[int, typer.Option(help="Sequences in a forward pass.")] = 1,
    states: Annotated[str, typer.Option(help="float32, mixed or bfloat16.")] = "mixed",
    mfu: Annotated[
        float, typer.Option(help="Assumed share of the device's peak, attention counted; the paper's is 0.495.")
    ] = 0.45,
    tokens: Annotated[float, typer.Option(help="Tokens of the whole training.")] = 1.4e12,
) -> None:
    """Memory by policy and parallel layout, flops and days of a training, before a device is rented."""
    from llama_fast import plan as planner
    from llama_fast.config import LlamaConfig

    config = LlamaConfig.preset(preset)
    chosen, T = planner.device(device), min(2048, config.max_seq_len) if seq_len is None else seq_len
    if tensor is None:
        found = planner.layouts(config, world)
        spread = [dataclasses.replace(x, sequence=sequence and x.sequence, shard=shard) for x in found]
    else:
        spread = [planner.Layout(world, tensor, sequence and tensor > 1, shard)]
    policies = planner.POLICIES if policy is None else (policy,)
    plans = [
        planner.plan(config, chosen, x, p, seq_len=T, batch_size=batch_size, states=states)
        for x in spread
        for p in policies
    ]
    speed = list(_plan_speed(config, chosen, world, T, mfu, tokens))
    console, gb = _console(), 1 / 2**30
    console.print(
        f"{preset}: {_count(config.n_params)} parameters; {world} x {device} of {chosen.memory * gb:.0f} GiB; "
        f"{batch_size} x {T} tokens a forward pass; states {states}: {', '.join(map(str, planner.STATES[states]))} "
        "bytes a parameter for weights, gradients, optimizer",
        highlight=False,
        soft_wrap=True,
    )
    table = Table(title="GiB a device")
    table.add_column("layout", no_wrap=True)
    table.add_column("policy", no_wrap=True)
    columns = ("weights", "gradients", "optimizer", "gathered", "activations", "workspace", "total")
    for header in ("weights", "grads", "optim.", *columns[3:], "fits", "B/token/layer"):
        table.add_column(header, justify="right", no_wrap=True)
    for p in plans:
        per_token = planner.block_bytes_per_token(config, p.policy, 2, p.layout.tensor, p.layout.sequence)
        sizes = (f"{getattr(p, name) * gb:.2f}" for name in columns)
        table.add_row(str(p.layout), p.policy, *sizes, "yes" if p.fits else "NO", f"{per_token:,.0f}")
    console.print(table)
    console.print(
        "gathered: weights that FSDP brings together at once, and a layer's gradients; activations: kept between "
        "forward and backward; workspace: the backward of one layer, or the loss, at its peak; "
        f"fits: in {planner.USABLE:.0%} of the memory",
        highlight=False,
        soft_wrap=True,
    )
    for line in speed:
        console.print(line, highlight=False, soft_wrap=True)


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.2f} G" if parameters >= 1e9 else f"{parameters / 1e6:.2f} M"


def _plan_speed(config: Any, device: Any, world: int, T: int, share: float, tokens: float) -> Iterator[str]:
    """Flops a token, tokens a second and days; the paper's figure in the same terms."""
    from llama_fast import plan as planner
    from llama_fast.config import LlamaConfig

    if not 0 < tokens < math.inf:
        raise ValueError(f"tokens = {tokens:g}: expected a finite number above 0")
    flops, attention = config.flops_per_token(T), 12 * config.n_layers * config.n_heads * config.head_dim * T
    rate = planner.tokens_per_second(config, device, T, share)
    twice = {p: planner.recomputed_flops_per_token(config, T, p) for p in planner.POLICIES}
    more = [f"{policy} does {n:.3g}" for policy, n in twice.items() if n]
    yield (
        f"flops a token: {flops:.4g} = 6 N + 12 L H D T = 6 x {_count(config.n_matmul_params)} in matrices + "
        f"{attention:.3g} of attention; {' and '.join(more)} more"
    )
    yield (
        f"at {share:.1%} MFU of {device.flops / 1e12:.0f} Tflop/s: {rate:,.0f} tokens/s a device, "
        f"{tokens:.3g} tokens in {tokens / (rate * world) / 86400:,.1f} days on {world}"
    )
    paper, a100 = LlamaConfig.preset(planner.PAPER_PRESET), planner.DEVICES[planner.PAPER_DEVICE]
    known = (paper, a100, planner.PAPER_SEQ_LEN, planner.PAPER_TOKENS_PER_S)
    yield (
        f"the paper: {planner.PAPER_TOKENS_PER_S:.0f} tokens/s a device for {planner.PAPER_PRESET} on "
        f"{planner.PAPER_DEVICE} = {planner.mfu(*known, attention=False):.1%} MFU by 6 N of all parameters, "
        f"{planner.mfu(*known):.1%} with attention"
    )


@app.command()
def train(
    out: Annotated[Path, typer.Option(help="Run folder: log.jsonl, tokenizer and checkpoints.")],
    data: Annotated[
        list[str] | None,
        typer.Option(help="Text files and folders, PATH or PATH:WEIGHT. Default: Python's standard library."),
    ] = None,
    config: Annotated[str, typer.Option(help="Preset of the model's sizes; an unknown name shows them all.")] = "demo",
    steps: Annotated[int, typer.Option(help="Steps of the whole run.")] = 200,
    batch_size: Annotated[int, typer.Option(help="Sequences a forward pass.")] = 8,
    seq_len: Annotated[int, typer.Option(help="Tokens a sequence.")] = 256,
    accumulate: Annotated[int, typer.Option(help="Forward passes a step.")] = 1,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 1e-3,
    warmup: Annotated[int | None, typer.Option(help="Steps of warm-up; default a tenth, at most 2000.")] = None,
    dtype: Annotated[str, typer.Option(help="float32, or bfloat16 for autocast over float32 weights.")] = "float32",
    policy: Annotated[
        str, typer.Option(help="What a block keeps for the backward: save, or recompute-cheap, -linear or -all.")
    ] = "recompute-cheap",
    plain: Annotated[bool, typer.Option("--plain", help="The same model in plain PyTorch and autograd.")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest good checkpoint in --out.")] = False,
    seed: Annotated[int, typer.Option(help="Of the weights, the data order and the generators.")] = 0,
    vocab_size: Annotated[int | None, typer.Option(help="Default: the preset's.")] = None,
    tokens: Annotated[
        Path | None, typer.Option(help="Folder of tokenizer and token files, made or reused. Default: OUT/data.")
    ] = None,
    eval_every: Annotated[int, typer.Option(help="Steps between held-out losses, 0 for none.")] = 100,
    eval_batches: Annotated[int, typer.Option(help="Batches in a held-out loss.")] = 8,
    checkpoint_every: Annotated[int, typer.Option(help="Steps between checkpoints, 0 for the last alone.")] = 100,
    keep: Annotated[int, typer.Option(help="Checkpoints kept.")] = 3,
) -> None:
    """Train a LLaMA with the paper's recipe. Ctrl-C finishes the step and saves; --resume goes on bit for bit.

    Exit status 130 after Ctrl-C and 143 after SIGTERM, where steps are left to do.
    """
    import llama_fast
    from llama_fast import checkpoint
    from llama_fast.train import run
    from llama_fast.train.recipe import Recipe
    from llama_fast.train.trainer import Settings, Trainer

    llama_fast.keep_host_memory()
    sizes = run.config_for(config, seq_len, vocab_size)
    run.check_room(config, sizes)
    settings = Settings(
        Recipe(steps, lr=lr, warmup_steps=min(2000, steps // 10) if warmup is None else warmup),
        batch_size,
        seq_len,
        accumulate=accumulate,
        dtype=dtype,
        seed=seed,
        eval_every=eval_every,
        eval_batches=eval_batches,
        checkpoint_every=checkpoint_every,
        keep=keep,
    )
    token_folder = tokens or out / "data"
    if not resume:
        checkpoint.expect_none(out)  # before the token files of the run that is there are written anew
    sources = run.sources_of(data or [], (out, token_folder))
    model = run.build_model(sizes, plain=plain, policy=policy, seed=seed)
    tokenizer, dataset = run.prepare(sources, sizes.vocab_size, token_folder)
    run.keep_tokenizer(tokenizer, out)
    trainer = Trainer(model, run.RunData(dataset, batch_size, seq_len, seed), settings, out, resume=resume)
    report = trainer.run()
    known = report.tokens_per_s or len(report.losses) == report.step  # else the log was damaged, and ends before
    facts = [f"loss {report.losses[-1]:.4f}"] if report.losses and known else []
    if report.valid_losses:
        step, valid = list(report.valid_losses.items())[-1]
        facts.append(f"held-out loss {valid:.4f}" + (f" after step {step}" if step != report.step else ""))
    if report.tokens_per_s:  # 0 where all steps had been done before
        facts.append(f"{report.tokens_per_s:,.0f} tokens/s")
    facts.append(f"peak memory {report.peak_memory_bytes / 1e6:,.0f} MB")
    print(f"step {report.step}: {', '.join(facts)}; {report.checkpoint}")
    if report.signal is not None:
        print("interrupted and saved; the same command with --resume goes on")
        raise typer.Exit(128 + report.signal)


@app.command()
def generate(
    checkpoint: Annotated[
        Path,
        typer.Option(
            help="Folder of Hugging Face or Meta, .gguf file, run of `llama-fast train` or a checkpoint of it."
        ),
    ],
    prompt: Annotated[
        str | None, typer.Option(help="Text to continue; with --chat, the one message to answer.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Converse, by the checkpoint's chat template.")] = False,
    system: Annotated[str | None, typer.Option(help="With --chat: how to answer. Default: the template's.")] = None,
    max_new_tokens: Annotated[
        int, typer.Option(help="Tokens to add at most; fewer where the context ends before.")
    ] = 200,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.8,
    top_k: Annotated[int | None, typer.Option(help="Sample among the k likeliest.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Sample among the likeliest that reach p together.")] = 0.95,
    min_p: Annotated[
        float | None, typer.Option(help="Sample among those of min_p times the largest probability.")
    ] = None,
    repetition_penalty: Annotated[float, typer.Option(help="Above 1: tokens that were there are less likely.")] = 1.0,
    stop: Annotated[list[str] | None, typer.Option(help="End before this string; can be given again.")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the sampling.")] = None,
    dtype: Annotated[str | None, typer.Option(help="Of the weights. Default: the checkpoint's.")] = None,
    device: Annotated[str | None, typer.Option(help="Default: the CPU.")] = None,
) -> None:
    """Continue a text, or converse, with the model of a checkpoint; the text appears as it is made."""
    from llama_fast import terminal

    terminal.check_system(system, chat)
    model, tokenizer, path = terminal.load(checkpoint, dtype, device)
    sampling = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "seed": seed,
    }
    if chat:
        terminal.converse(model, tokenizer, path, system, prompt, max_new_tokens, stop or (), **sampling)
    else:
        terminal.complete(model, tokenizer, prompt or "", max_new_tokens, stop or (), **sampling)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(help="As --checkpoint of generate.")],
    target: Annotated[Path, typer.Argument(help="A new folder.")],
    to: Annotated[str, typer.Option(help="hf or meta.")] = "hf",
    shards: Annotated[int, typer.Option(help="Files of weights; for Meta, model-parallel ranks.")] = 1,
    dtype: Annotated[str | None, typer.Option(help="Of the weights written. Default: the source's.")] = None,
    max_seq_len: Annotated[
        int | None, typer.Option(help="Context, in place of the source's; a Meta source names none.")
    ] = None,
) -> None:
    """Rewrite a checkpoint in another program's format, one tensor at a time, with its tokenizer."""
    from llama_fast import terminal

    terminal.convert(source, target, to, shards, dtype, max_seq_len)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": ["-h"]})
def evaluate(
    context: typer.Context,
    checkpoint: Annotated[Path, typer.Argument(help="As --checkpoint of generate.")],
) -> None:
    """Run tasks of lm-evaluation-harness on a checkpoint; its options follow: --tasks arc_easy --limit 100."""
    if str(checkpoint) == "--help":  # behind a checkpoint it is the harness's
        print(context.get_help())
        return
    from llama_fast import evaluation

    evaluation.main(checkpoint, context.args)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for data, runs, figures and the picture.")] = Path("demo"),
    steps: Annotated[int, typer.Option(help="Steps of each training.")] = 200,
    data: Annotated[list[str] | None, typer.Option(help="As for train.")] = None,
) -> None:
    """Check the ops, time them, then train a small LLaMA in plain PyTorch and with llama_fast, side by side."""
    from llama_fast import demo

    demo.main(out, steps=steps, data=data or [], console=_console(wide=False))


def _benchmarks(module: str) -> Any:
    """A module of llama_fast.benchmarks; in a source tree that is not installed, of benchmarks/ beside the package."""
    import importlib
    import importlib.util

    name = "llama_fast.benchmarks"
    if importlib.util.find_spec(name) is None:
        folder = Path(__file__).parents[1] / "benchmarks"
        spec = importlib.util.spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        if spec is None or spec.loader is None or not folder.is_dir():
            raise FileNotFoundError(f"{folder}: the benchmarks are not installed")
        package = importlib.util.module_from_spec(spec)
        sys.modules[name] = package
        spec.loader.exec_module(package)
    return importlib.import_module(f"{name}.{module}")


if __name__ == "__main__":
    main()
