"""llama-fast generate and convert on a small checkpoint of every format: a run, Hugging Face, Meta, GGUF."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from llama_fast import checkpoint, cli, terminal
from llama_fast.config import LlamaConfig
from llama_fast.model import Llama
from llama_fast.pretrained import load_tokenizer
from llama_fast.tokenizer import Tokenizer

TEMPLATE = "{% for m in messages %}{{ bos_token }}{{ m['role'] }}: {{ m['content'] }}{% endfor %}"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a training run: two checkpoints and their tokenizer."""
    path = tmp_path_factory.mktemp("run")
    texts = ["".join(f"{i} the quick brown fox jumps over {i * 7} lazy dogs.\n" for i in range(500))]
    tok = Tokenizer.train(texts, path / "tokenizer.model", vocab_size=350)
    model = Llama(LlamaConfig(64, 2, 4, 2, 176, tok.vocab_size, 128))
    checkpoint.save(path, 1, model, {})
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p.mul_(5.0)  # an answer that depends on the prompt
    checkpoint.save(path, 2, model, {})
    return path


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    def call(*args: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["llama-fast", *map(str, args)])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        captured = capsys.readouterr()
        return int(stopped.value.code or 0), captured.out, captured.err

    return call


def test_convert_there_and_back_is_bitwise(program: Any, run: Path, tmp_path: Path) -> None:
    hf, meta, back = tmp_path / "hf", tmp_path / "meta", tmp_path / "back"
    status, out, err = program("convert", run, hf, "--shards", "3")
    assert (status, err) == (0, "")
    assert out == f"{hf}: {Llama.from_pretrained(hf).config.n_params:,} parameters, float32, hf, 3 files of weights\n"
    assert program("convert", hf, meta, "--to", "meta", "--shards", "2")[0] == 0
    assert program("convert", meta, back, "--max-seq-len", "128")[0] == 0
    newest, read = Llama.from_pretrained(run / "step_0000002"), Llama.from_pretrained(back)
    assert read.config == newest.config
    for (name, p), q in zip(newest.named_parameters(), read.parameters(), strict=True):
        assert torch.equal(p, q), name
    for folder in (hf, meta, back):
        assert load_tokenizer(folder).encode("the fox") == load_tokenizer(run).encode("the fox")
    status, _, err = program("convert", hf, meta)
    assert status == 2
    assert "expected a new or an empty folder" in err
    status, out, _ = program("convert", hf, tmp_path / "half", "--dtype", "bfloat16")
    assert "bfloat16, hf, 1 file of weights" in out


def test_a_checkpoint_without_a_tokenizer_is_converted_and_says_so(program: Any, run: Path, tmp_path: Path) -> None:
    Llama(LlamaConfig.preset("tiny")).save_pretrained(tmp_path / "a")
    status, out, _ = program("convert", tmp_path / "a", tmp_path / "b", "--to", "meta")
    assert status == 0
    assert "no tokenizer was written: " in out
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == ["consolidated.00.pth", "params.json"]


def test_generate_from_every_format(program: Any, run: Path, tmp_path: Path) -> None:
    program("convert", run, tmp_path / "hf")
    program("convert", run, tmp_path / "meta", "--to", "meta")
    said = set()
    for path in (run, run / "step_0000002", tmp_path / "hf", tmp_path / "meta"):
        status, out, err = program(
            "generate", "--checkpoint", path, "--prompt", "the quick", "--max-new-tokens", "9", "--seed", "4",
            "--min-p", "0.01", "--repetition-penalty", "1.1",
        )  # fmt: skip
        assert (status, err) == (0, "")
        said.add(out)
    (text,) = said
    assert text.startswith("the quick")
    assert text.endswith("\n")
    stop = text[12:14]
    out = program("generate", "--checkpoint", run, "--prompt", "the quick", "--max-new-tokens", "9", "--seed", "4",
                  "--min-p", "0.01", "--repetition-penalty", "1.1", "--stop", stop)[1]  # fmt: skip
    assert out == text[: text.index(stop, len("the quick"))] + "\n"
    status, out, err = program("generate", "--checkpoint", run, "--prompt", "the", "--temperature", "-1")
    assert (status, out) == (2, "")
    assert "temperature = -1.0" in err


def test_an_answer_ends_with_the_context(program: Any, run: Path) -> None:
    status, out, err = program("generate", "--checkpoint", run, "--prompt", "the", "--temperature", "0")
    assert (status, err) == (0, "")
    tokenizer = load_tokenizer(run / "step_0000002")
    prompt = tokenizer.encode("the", bos=tokenizer.adds_bos)
    model = Llama.from_pretrained(run / "step_0000002")
    ids = model.generate([prompt], max_new_tokens=128 - len(prompt), eos_id=tokenizer.eos_ids)[0]
    assert out == tokenizer.decode(ids) + "\n"


def test_a_damaged_checkpoint_is_passed_over_and_named(program: Any, run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    with open(copy / "step_0000002" / "model.safetensors", "ab") as file:
        file.write(b"x")
    status, out, err = program("generate", "--checkpoint", copy, "--prompt", "the", "--seed", "0")
    assert status == 0
    assert out.startswith("the")
    assert "passed over a damaged checkpoint: step_0000002: " in err
    assert err.endswith("; read step_0000001\n")


def test_chat_at_the_prompt_and_in_one_go(
    program: Any, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("jinja2", reason="the extra chat is not installed")
    chat = ["generate", "--checkpoint", tmp_path / "hf", "--chat", "--temperature", "0", "--max-new-tokens", "6"]
    program("convert", run, tmp_path / "hf")
    status, _, err = program(*chat)
    assert status == 2
    assert "has no chat template; without --chat it continues a text" in err
    file = tmp_path / "hf" / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "chat_template": TEMPLATE}))
    status, once, err = program(*chat, "--prompt", "the fox")
    assert (status, err) == (0, "")
    lines = iter(["the fox", "", "the fox " * 2000, "/new", "the fox"])

    def typed(prompt: str) -> str:
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", typed)
    status, out, _ = program(*chat)
    assert status == 0
    full = re.search("the conversation has .*; begin a new one: /new\n", out)
    assert full is not None
    began = "Ctrl-C ends an answer, Ctrl-D the conversation; /new begins a new one.\n"
    assert out == f"{began}{once}{full[0]}{once}\n"
    assert program(*chat, "--prompt", "the fox", "--system", "lazy dogs")[1] != once


def test_dtypes_by_name() -> None:
    assert terminal.dtype_of(None) is None
    assert terminal.dtype_of("bfloat16") == torch.bfloat16
    with pytest.raises(ValueError, match="dtype = 'int8': expected one of float32, bfloat16, float16, float64"):
        terminal.dtype_of("int8")
