"""The command line: every command at a small size, exit statuses, one-line errors."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import llama_fast
import llama_fast.verify
from llama_fast import cli, demo
from llama_fast.config import LlamaConfig
from llama_fast.ops.table import OPS
from llama_fast.tokenizer import Tokenizer
from llama_fast.train import run as training
from llama_fast.train.trainer import Report, Trainer
from llama_fast.verify import Case

ROOT = Path(__file__).parents[1]


class Output:
    """What one call printed, and its exit status."""

    def __init__(self, status: int, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err


@pytest.fixture
def llama_fast_program(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    def call(*args: str) -> Output:
        monkeypatch.setattr(sys, "argv", ["llama-fast", *args])
        # the other tests of this process keep the allocator that they began with
        monkeypatch.setattr(llama_fast, "keep_host_memory", lambda: None, raising=False)
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        captured = capsys.readouterr()
        return Output(int(stopped.value.code or 0), captured.out, captured.err)

    return call


@pytest.fixture
def text(tmp_path: Path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("".join(f"the {i} quick brown foxes jump over {i * 7} lazy dogs\n" for i in range(3000)))
    return file


def test_help_lists_the_commands(llama_fast_program: Any) -> None:
    found = llama_fast_program("--help")
    assert found.status == 0
    for command in ("info", "verify", "bench", "train", "generate", "convert", "demo"):
        assert command in found.out


def test_a_character_that_the_locale_lacks_ends_nothing() -> None:
    code = """if True:
        from llama_fast import cli
        @cli.app.command()
        def say(): print("a \\u2192 b")
        cli.main()
    """
    environment = {**os.environ, "PYTHONIOENCODING": "latin-1"}
    command = [sys.executable, "-c", code, "say"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False, env=environment)
    assert (done.returncode, done.stdout) == (0, "a ? b\n"), done.stderr


def test_every_command_has_help(llama_fast_program: Any) -> None:
    """evaluate too, whose other options are the harness's, with the harness or without."""
    for command in cli.app.registered_commands:
        name = command.name or command.callback.__name__  # type: ignore[union-attr]
        for option in ("--help", "-h"):
            found = llama_fast_program(name, option)
            assert (found.status, "Show this message and exit" in found.out) == (0, True), (name, option, found)


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["generate", "--help"], ["no-such-command"]], ids=" ".join
)
def test_what_needs_no_torch_does_not_import_it(arguments: list[str]) -> None:
    code = f"""if True:
        import sys
        from llama_fast import cli
        sys.argv = ["llama-fast", *{arguments}]
        try:
            cli.main()
        except SystemExit:
            print("torch" in sys.modules, "numpy" in sys.modules)
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.stdout.splitlines()[-1] == "False False", done.stderr


def test_version(llama_fast_program: Any) -> None:
    found = llama_fast_program("--version")
    assert (found.status, found.out) == (0, f"llama-fast {llama_fast.__version__}\n")


def test_info_shows_every_op_and_backend(llama_fast_program: Any) -> None:
    found = llama_fast_program("info")
    assert found.status == 0
    for op in OPS.values():
        assert op.name in found.out
        assert all(b.name in found.out for b in op.backends)
    assert torch.__version__ in found.out
    assert "native library" in found.out
    assert len(llama_fast_program("info", "--brief").out.splitlines()) == 1


def test_verify_passes_and_fails_with_its_status(llama_fast_program: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(llama_fast.verify, "CASES", (Case("swiglu", {"...": (3,), "F": 40}),))
    found = llama_fast_program("verify", "--op", "swiglu", "--all")
    assert found.status == 0, found.out
    assert "reference" in found.out
    assert " 0 not" in found.out
    monkeypatch.setattr(llama_fast.verify, "ulp", lambda *_: -1.0)  # no budget is left
    found = llama_fast_program("verify", "--op", "swiglu")
    assert found.status == 1
    assert "NO: swiglu" in found.out
    assert "draws" not in found.out
    for name, value in (("ulp", lambda *_: 0.0), ("FORWARD_FACTOR", 0.1), ("BACKWARD_FACTOR", 0.1)):
        monkeypatch.setattr(llama_fast.verify, name, value)
    found = llama_fast_program("verify", "--op", "swiglu")
    assert found.status == 1
    assert ", means of 16 draws" in found.out
    assert "judged by the means of 16 draws of the inputs" in found.out


def test_bench_writes_its_table_and_json(
    llama_fast_program: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    suite, results = cli._benchmarks("suite"), cli._benchmarks("results")
    tiny = suite.Benchmark(Case("swiglu", {"...": (64,), "F": 256}), torch.float32, "tiny", quick=True)
    monkeypatch.setattr(suite, "collect", lambda ops, quick: [tiny])
    monkeypatch.setenv("OMP_PROC_BIND", "false")  # as it is: the program would start itself again
    path = tmp_path / "bench.json"
    found = llama_fast_program("bench", "--quick", "--op", "swiglu", "--json", str(path))
    assert found.status == 0, found.err
    assert "limit: copy" in found.out
    written = results.read(path)
    assert {x.direction for x in written.lines} == {"forward", "forward+backward"}
    assert {x.provider for x in written.lines} == {"llama_fast:cpu", "eager"}
    assert written.environment.packages["torch"] == torch.__version__
    assert written.environment.pinned == "OMP_PROC_BIND=false"
    assert written.limits[0].rate > 0


def test_train_resume_and_generate(llama_fast_program: Any, text: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    sizes = ["--config", "tiny", "--vocab-size", "320", "--batch-size", "2", "--seq-len", "32", "--eval-batches", "2"]
    common = ["train", "--out", str(run), "--data", f"{text}:2", *sizes]
    found = llama_fast_program(*common, "--steps", "4")
    assert found.status == 0, found.err
    assert "held-out loss" in found.out
    assert len((run / "log.jsonl").read_text().splitlines()) == 4
    tokens = (run / "data" / "meta.json").read_bytes()
    again = llama_fast_program("train", "--out", str(run), *sizes, "--steps", "4")  # of other text: the default
    assert again.status == 2
    assert "resume" in again.err
    assert (run / "data" / "meta.json").read_bytes() == tokens
    assert llama_fast_program(*common, "--steps", "4", "--resume").status == 0

    for checkpoint in (run, next(run.glob("step_*"))):
        found = llama_fast_program(
            "generate", "--checkpoint", str(checkpoint), "--prompt", "the ", "--max-new-tokens", "5", "--seed", "1"
        )
        assert found.status == 0, found.err
        assert found.out.startswith("the ")

    log = (run / "log.jsonl").read_text().splitlines(True)
    (run / "log.jsonl").write_text(log[0] + "no JSON\n" + log[3])
    found = llama_fast_program(*common, "--steps", "4", "--resume")
    assert found.status == 0, found.err
    assert re.match(r"step 4: (held-out loss .*, )?peak memory", found.out), found.out  # not the loss of step 1


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_train_that_a_signal_ends_says_so_by_its_status(
    llama_fast_program: Any, monkeypatch: pytest.MonkeyPatch, text: Path, tmp_path: Path, number: signal.Signals
) -> None:
    step = Trainer._train_step

    def in_step_2(self: Trainer, batches: Any) -> dict[str, Any]:
        if self.step == 1:
            os.kill(os.getpid(), number)
        return step(self, batches)

    run = tmp_path / "run"
    sizes = ["--config", "tiny", "--vocab-size", "320", "--batch-size", "2", "--seq-len", "32", "--eval-every", "1"]
    common = ["train", "--out", str(run), "--data", str(text), *sizes, "--steps", "4"]
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_step", in_step_2)
        found = llama_fast_program(*common)
    assert found.status == {signal.SIGINT: 130, signal.SIGTERM: 143}[number]
    assert "interrupted and saved; the same command with --resume goes on" in found.out
    assert [p.name for p in run.glob("step_*")] == ["step_0000002"]
    assert re.match(r"step 2: loss [\d.]+, held-out loss [\d.]+, [\d,]+ tokens/s, peak", found.out)
    # the last held-out loss is of another step than the last
    found = llama_fast_program(*common, "--resume", "--eval-every", "0")
    assert found.status == 0
    assert re.match(r"step 4: loss [\d.]+, held-out loss [\d.]+ after step 2, [\d,]+ tokens/s, peak", found.out)
    assert len((run / "log.jsonl").read_text().splitlines()) == 4
    found = llama_fast_program(*common, "--resume")
    assert re.match(r"step 4: loss [\d.]+, held-out loss [\d.]+ after step 2, peak memory", found.out), (
        "no step was done"
    )


def test_a_tokenizer_that_cannot_be_kept_leaves_no_half_of_it(
    monkeypatch: pytest.MonkeyPatch, text: Path, tmp_path: Path
) -> None:
    """Half of one would be "not the tokenizer of this data" ever after."""
    tokenizer = Tokenizer.train([text.read_text()], tmp_path / "tokenizer.model", 320)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        patch.setattr("shutil.copyfileobj", full)
        with pytest.raises(OSError, match="No space left"):
            training.keep_tokenizer(tokenizer, tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []
    training.keep_tokenizer(tokenizer, tmp_path / "run")
    training.keep_tokenizer(tokenizer, tmp_path / "run")
    assert (tmp_path / "run" / "tokenizer.model").read_bytes() == (tmp_path / "tokenizer.model").read_bytes()
    # a run of other text that began in the same folder at the same time puts its own there
    Tokenizer.train([text.read_text()], tmp_path / "tokenizer.model", 300)
    training.keep_tokenizer(tokenizer, tmp_path / "other run")
    assert Tokenizer(tmp_path / "other run" / "tokenizer.model").fingerprint == tokenizer.fingerprint


def test_plain_starts_from_the_same_loss(llama_fast_program: Any, text: Path, tmp_path: Path) -> None:
    first = []
    for name, flags in (("ours", []), ("plain", ["--plain"])):
        sizes = ["--config", "tiny", "--vocab-size", "320", "--batch-size", "2", "--seq-len", "32", "--eval-every", "0"]
        out = tmp_path / name
        data = ["--data", str(text), "--tokens", str(tmp_path / "tokens")]
        assert llama_fast_program("train", "--out", str(out), *data, *sizes, "--steps", "1", *flags).status == 0
        first.append(json.loads((out / "log.jsonl").read_text())["loss"])
    assert first[0] == pytest.approx(first[1], rel=1e-5)


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["verify", "--op", "norm"], "--op norm: expected one of rms_norm"),
        (["bench", "--op", "norm"], "op norm: expected one of rms_norm"),
        (["bench", "--device", "tpu"], "device = 'tpu': expected cpu or cuda"),
        (["bench", "--seconds", "0"], "seconds = 0: expected a number above 0"),
        (["bench", "--op", "rope", "--provider", "lieger"], "provider = 'lieger': expected one of eager"),
        (["bench", "--op", "rms_norm", "--json", "/no/such/folder/x.json"], "/no/such/folder/x.json"),
        (["bench", "--op", "rms_norm", "--case", "C1"], "no benchmark has a case of them whose name contains 'C1'"),
        (["train", "--out", "OUT", "--config", "llama-8b"], "preset 'llama-8b': no such name"),
        (["train", "--out", "OUT", "--config", "llama-65b"], "config llama-65b: weights, gradients and the optimizer"),
        (["train", "--out", "OUT", "--data", "/no/such/file"], "'/no/such/file' does not exist"),
        (["train", "--out", "OUT", "--seq-len", "4096"], "seq_len = 4096: expected at most max_seq_len = 512"),
        (["train", "--out", "OUT", "--steps", "0"], "steps = 0"),
        (["train", "--out", "OUT", "--dtype", "int8"], "dtype = 'int8': expected one of float32, bfloat16"),
        (["train", "--out", "OUT", "--policy", "most"], "policy"),
        (["generate", "--checkpoint", "OUT"], "no such folder or file, expected a folder of Hugging Face or Meta"),
        (["generate", "--checkpoint", "OUT", "--system", "Be kind."], "--system 'Be kind.': expected --chat"),
        (["generate", "--checkpoint", "OUT", "--device", "gpu"], "device = 'gpu': Expected one of cpu, cuda"),
        (["generate", "--checkpoint", "OUT", "--device", "meta"], "device = 'meta': Tensor.item() cannot be called"),
        (["convert", "OUT", "elsewhere"], "no such folder or file, expected a folder of Hugging Face or Meta"),
        (["plan", "--preset", "tiny", "--seq-len", "0"], "seq_len = 0: expected 1 .. max_seq_len"),
        (["plan", "--preset", "tiny", "--tensor", "0"], "tensor = 0: expected an integer of 1 or more"),
        (["plan", "--preset", "tiny", "--tokens", "-5"], "tokens = -5: expected a finite number above 0"),
        (["plan", "--preset", "tiny", "--tokens", "inf"], "tokens = inf: expected a finite number above 0"),
        (["demo", "--out", "OUT", "--steps", "0"], "steps = 0: expected 1 or more"),
        (["demo", "--out", "OUT", "--data", "/no/such/file"], "'/no/such/file' does not exist"),
    ],
)
def test_errors_are_one_line_and_status_2(
    llama_fast_program: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, args: list[str], expected: str
) -> None:
    out = tmp_path / "out"
    monkeypatch.setenv("OMP_PROC_BIND", "false")
    found = llama_fast_program(*(str(out) if a == "OUT" else a for a in args))
    assert found.status == 2
    assert expected in found.err
    assert found.err.startswith("llama-fast: ")
    assert len(found.err.splitlines()) == 1
    assert not out.exists(), "something was written before the error"


def test_a_run_is_not_put_into_its_own_text(
    llama_fast_program: Any, monkeypatch: pytest.MonkeyPatch, text: Path, tmp_path: Path
) -> None:
    """Its log and the like would be text when it is resumed, and the data others than it began with."""
    monkeypatch.chdir(tmp_path)
    elsewhere = str(tmp_path.with_name("elsewhere"))
    for out, *more in (["run"], [elsewhere, "--tokens", "run"], ["run", "--tokens", elsewhere]):
        found = llama_fast_program("train", "--data", ".", "--out", out, *more)
        assert found.status == 2
        assert "data '.': run" in found.err
        assert "lies in it, and what is written there would be read as text" in found.err
    found = llama_fast_program("demo", "--data", str(tmp_path))
    assert (found.status, "demo lies in it" in found.err) == (2, True)
    assert [p.name for p in tmp_path.iterdir()] == ["text.txt"]


def test_bench_lists_the_names_that_case_looks_into(llama_fast_program: Any) -> None:
    assert "rope bfloat16 B1" in llama_fast_program("bench", "--list", "--op", "rope").out
    names = llama_fast_program("bench", "--list", "--op", "decode").out.splitlines()
    assert names
    assert all(name.startswith("decode ") for name in names)


def test_plan_without_sequence_splits_no_rows(llama_fast_program: Any) -> None:
    found = llama_fast_program("plan", "--preset", "llama-7b", "--world", "8", "--no-sequence").out
    assert "tensor 8, FSDP 1" in found
    assert "+sequence" not in found
    assert "tensor 8+sequence" in llama_fast_program("plan", "--preset", "llama-7b", "--world", "8").out


def test_plan_counts_the_parameters_of_a_small_model_in_millions(llama_fast_program: Any) -> None:
    small = LlamaConfig.preset("tiny")
    found = llama_fast_program("plan", "--preset", "tiny").out
    assert f"tiny: {small.n_params / 1e6:.2f} M parameters" in found
    assert f"6 x {small.n_matmul_params / 1e6:.2f} M in matrices" in found
    found = llama_fast_program("plan", "--preset", "llama-65b").out
    assert "llama-65b: 65.29 G parameters" in found
    assert "6 x 65.02 G in matrices" in found


def test_a_narrow_terminal_gets_the_whole_folder(llama_fast_program: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    folder = "/a_home_of_a_user/with_a_long_name/python3.11/site-packages/llama_fast"
    monkeypatch.setattr(llama_fast, "__file__", f"{folder}/__init__.py")
    assert folder in "".join(llama_fast_program("info").out.split())


def test_a_narrow_terminal_gets_whole_cells(llama_fast_program: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    piped = llama_fast_program("plan", "--preset", "llama-7b").out
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    for found in (piped, llama_fast_program("plan", "--preset", "llama-7b").out):
        assert "recompute-cheap" in found
        assert "B/token/layer" in found
        assert "\u2026" not in found


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_memory_that_is_not_there_is_one_line(
    llama_fast_program: Any, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    def too_much() -> None:
        if device == "cuda":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        torch.empty(1 << 60)

    monkeypatch.setattr("llama_fast.info.brief", too_much)
    found = llama_fast_program("info", "--brief")
    assert found.status == 2
    assert re.fullmatch(r"llama-fast: .*allocate .*\n", found.err)


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong() -> None:
        raise RuntimeError("a shape that cannot be")

    monkeypatch.setattr("llama_fast.info.brief", wrong)
    monkeypatch.setattr(sys, "argv", ["llama-fast", "info", "--brief"])
    with pytest.raises(RuntimeError, match="a shape"):
        cli.main()


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLAMA_FAST_LOG", "debug")
    monkeypatch.setattr(sys, "argv", ["llama-fast", "verify", "--op", "norm"])
    with pytest.raises(ValueError, match="--op norm"):
        cli.main()


def test_a_folder_without_checkpoints_and_a_damaged_one(llama_fast_program: Any, tmp_path: Path) -> None:
    found = llama_fast_program("generate", "--checkpoint", str(tmp_path))
    assert found.status == 2
    assert "holds no good checkpoint" in found.err
    (tmp_path / "step_0000001").mkdir()
    found = llama_fast_program("generate", "--checkpoint", str(tmp_path))
    assert found.status == 2
    assert "step_0000001" in found.err


def test_peak_memory_is_this_process_alone() -> None:
    """A parent's peak does not reach the child, as it does through getrusage."""
    ballast = torch.ones(1 << 28, dtype=torch.uint8)
    code = "from llama_fast.demo import peak_memory; print(peak_memory())"
    root = Path(cli.__file__).parents[1]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    before = demo.peak_memory()
    assert before > ballast.nbytes
    assert int(done.stdout) < before


def test_saved_bytes_of_the_block_are_half() -> None:
    config = LlamaConfig.preset("demo")
    ours, plain = (demo.saved_bytes_per_token_and_layer(kind, config) for kind in ("ours", "plain"))
    formula = 4 * (6 + 2 * config.ffn_dim / config.dim) * config.dim  # docs/block.md, and the row statistics
    assert formula < ours < 1.02 * formula + 64
    assert ours < 0.6 * plain


@pytest.mark.parametrize("off", [0.0, 1e-3, float("nan")])
def test_a_demo_whose_curves_differ_fails(
    llama_fast_program: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, off: float
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(training, "prepare", lambda *_: None)
    monkeypatch.setattr(demo, "_sample", lambda *_: None)

    def run(command: list[str], check: bool) -> subprocess.CompletedProcess[str]:
        if "llama_fast.demo" in command:  # a training: its losses, which rounding changes a little
            kind, out = command[3], Path(command[4])
            away = {"plain": 0.0, "ours": off + 1e-6, "nudged": 2e-6}[kind]
            figures = {"losses": [5.0 - 0.1 * i + away for i in range(10)], "valid_loss": 4.0, "tokens_per_s": 1.0}
            (out / f"{kind}.json").write_text(json.dumps(figures | {"peak_memory": 1e9, "saved_bytes": 8.0}))
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(demo, "subprocess", SimpleNamespace(run=run))  # the demo's alone: matplotlib runs fc-list
    found = llama_fast_program("demo", "--out", str(tmp_path / "out"), "--steps", "10")
    assert found.status == (1 if off else 0)
    assert ("THE CURVES DIFFER" in found.out) == bool(off)
    assert ("failed: the comparison of the curves" in found.out) == bool(off)
    assert ("the curves agree" in found.out) == (not off)


def test_a_demo_whose_training_fails_names_it(
    llama_fast_program: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(training, "prepare", lambda *_: None)
    fails = lambda command, check: subprocess.CompletedProcess(command, int("plain" in command))  # noqa: E731
    monkeypatch.setattr(demo, "subprocess", SimpleNamespace(run=fails))
    found = llama_fast_program("demo", "--out", str(tmp_path / "out"), "--steps", "10")
    assert found.status == 1
    assert "failed: the training of plain PyTorch" in found.out


def test_a_training_of_the_demo_that_a_signal_ends_has_no_figures(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    stopped = Report(3, signal.SIGTERM, [5.0] * 3, {}, 1.0, 1.0, 1, tmp_path)
    for name in ("prepare", "sources_of", "keep_tokenizer", "RunData"):
        monkeypatch.setattr(training, name, lambda *_: (None, None))
    monkeypatch.setattr(llama_fast, "keep_host_memory", lambda: None)
    monkeypatch.setattr(demo, "_model", lambda *_: torch.nn.Linear(1, 1))
    monkeypatch.setattr(Trainer, "__init__", lambda *_: None)
    monkeypatch.setattr(Trainer, "run", lambda self: stopped)
    with pytest.raises(SystemExit) as ended:
        demo._train("plain", tmp_path, 5, [])
    assert ended.value.code == 143
    assert not (tmp_path / "plain.json").exists()
