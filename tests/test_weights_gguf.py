"""GGUF: files written by PyPI's gguf, of every type that it quantises, are the model that transformers reads too."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numerics import vary_

from llama_fast.config import LinearRopeScaling, Llama3RopeScaling, LlamaConfig
from llama_fast.model import Llama
from llama_fast.weights import gguf as ours
from llama_fast.weights.hf import hf_name
from llama_fast.weights.source import ModelSource, halves_to_pairs, tensor_shapes

gguf = pytest.importorskip("gguf", reason="the extra gguf is not installed")

CONFIG = LlamaConfig(64, 2, 4, 2, 128, 96, 256)


def write_gguf(
    path: Path,
    model: Llama,
    kind: str = "F32",
    change: dict[str, Any] | None = None,
    tensors: dict[str, Any] | None = None,
) -> Path:
    """A file as llama.cpp's converter writes it; `change` and `tensors` add, replace, or drop (None)."""
    config = model.config
    arch = "qwen2" if config.qkv_bias else "qwen3" if config.qk_norm else "llama"
    writer = gguf.GGUFWriter(path, arch)
    heads = config.head_dim
    fields = {
        "llama.vocab_size": config.vocab_size,
        "llama.block_count": config.n_layers,
        "llama.context_length": config.max_seq_len,
        "llama.embedding_length": config.dim,
        "llama.feed_forward_length": config.ffn_dim,
        "llama.attention.head_count": config.n_heads,
        "llama.attention.head_count_kv": config.n_kv_heads,
        "llama.rope.dimension_count": heads,
        "llama.rope.freq_base": config.rope_theta,
        "llama.attention.layer_norm_rms_epsilon": config.norm_eps,
    } | (change or {})
    for key, value in ((key.replace("llama.", f"{arch}."), value) for key, value in fields.items()):
        if key == "general.architecture":
            writer.kv_data[0][key].value = value
        elif isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, float):
            writer.add_float32(key, value)
        elif isinstance(value, list):
            writer.add_array(key, value)
        elif value is not None:
            writer.add_uint32(key, value)
    source = ModelSource(model)
    quantised = gguf.GGMLQuantizationType[kind]
    for name in tensor_shapes(config):
        t = source.read(name).float()
        if arch == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            t = halves_to_pairs(t, heads)
        if ours.gguf_name(name) in (tensors or {}):
            continue
        if t.ndim == 1 or kind == "F32":
            writer.add_tensor(ours.gguf_name(name), t.numpy())
        else:
            writer.add_tensor(ours.gguf_name(name), gguf.quants.quantize(t.numpy(), quantised), raw_dtype=quantised)
    for name, value in (tensors or {}).items():
        if value is not None:
            writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize("tied", [False, True])
def test_unquantised_is_bitwise(tmp_path: Path, tied: bool) -> None:
    model = Llama(dataclasses.replace(CONFIG, tie_embeddings=tied))
    read = Llama.from_pretrained(write_gguf(tmp_path / "a.gguf", model))
    assert read.config == model.config
    for (name, p), (_, q) in zip(model.named_parameters(), read.named_parameters(), strict=True):
        assert torch.equal(p, q), name
    read.save_pretrained(tmp_path / "hf")
    assert torch.equal(Llama.from_pretrained(tmp_path / "hf").lm_head.weight, model.lm_head.weight)


@pytest.mark.parametrize(
    ("kind", "dtype", "error"),
    [
        ("F16", torch.float16, 1e-3),
        ("BF16", torch.bfloat16, 8e-3),
        ("Q8_0", torch.float32, 1e-2),
        ("Q5_0", torch.float32, 7e-2),
        ("Q4_0", torch.float32, 0.14),
        ("Q4_1", torch.float32, 0.12),
    ],
)
def test_types_and_what_transformers_reads(tmp_path: Path, kind: str, dtype: torch.dtype, error: float) -> None:
    """Our weights are those of transformers' reader bit for bit, and those written up to the rounding of the type."""
    model = Llama(CONFIG)
    write_gguf(tmp_path / "a.gguf", model, kind)
    read = Llama.from_pretrained(tmp_path / "a.gguf")
    for name, p in model.named_parameters():
        q = dict(read.named_parameters())[name]
        assert q.dtype == dtype, name
        assert (p - q).norm() < error * p.norm(), name
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from hf_pairs import DTYPE

    theirs = transformers.LlamaForCausalLM.from_pretrained(tmp_path, gguf_file="a.gguf", **{DTYPE: dtype})
    for name, p in read.named_parameters():
        other = theirs.get_parameter(name if name.startswith("lm_head") else f"model.{name}")
        assert torch.equal(p, other), name


@pytest.mark.parametrize(
    "fields",
    [{"qkv_bias": True, "tie_embeddings": True}, {"qk_norm": True, "explicit_head_dim": 128}],
    ids=["qwen2", "qwen3"],
)
def test_qwen(tmp_path: Path, fields: dict[str, Any]) -> None:
    """q and k have their rows in Hugging Face's order there. transformers' reader takes a head dim of 128."""
    config = dataclasses.replace(CONFIG, norm_eps=1e-6, **fields)
    model = Llama(config)
    vary_(model)
    arch = gguf.MODEL_ARCH.QWEN2 if config.qkv_bias else gguf.MODEL_ARCH.QWEN3
    names = gguf.get_tensor_name_map(arch, config.n_layers)
    for name in tensor_shapes(config):
        assert names.get_name(hf_name(name), try_suffixes=(".weight", ".bias")) == ours.gguf_name(name)
    change = {"llama.attention.key_length": config.head_dim, "llama.rope.dimension_count": None}
    read = Llama.from_pretrained(write_gguf(tmp_path / "a.gguf", model, change=change))
    assert read.config == config
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="a.gguf")
    for name, p in model.named_parameters():
        assert torch.equal(p, read.get_parameter(name)), name
        assert torch.equal(p, theirs.get_parameter(hf_name(name))), name
    tokens = torch.arange(24).view(2, 12)
    with torch.no_grad():
        torch.testing.assert_close(read(tokens), theirs.eval()(tokens).logits, rtol=1e-4, atol=1e-5)


def llama3_divisors(scaling: Llama3RopeScaling) -> np.ndarray:
    freqs = 500000.0 ** -(torch.arange(0, 16, 2, dtype=torch.float64) / 16)
    return (freqs / scaling.scale(freqs)).float().numpy()


def test_rotary_scalings(tmp_path: Path) -> None:
    linear = dataclasses.replace(CONFIG, rope_scaling=LinearRopeScaling(4.0))
    old = {"llama.rope.scale_linear": 4.0}  # as files of 2023 have it, without a type
    assert Llama.from_pretrained(write_gguf(tmp_path / "old.gguf", Llama(linear), change=old)).config == linear
    fields = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    path = write_gguf(tmp_path / "linear.gguf", Llama(linear), change=fields)
    assert Llama.from_pretrained(path).config == linear
    for factor in (8.0, 32.0):
        scaling = Llama3RopeScaling(factor, 1.0, 4.0, 8192)
        config = dataclasses.replace(CONFIG, rope_theta=500000.0, rope_scaling=scaling)
        divisors = llama3_divisors(scaling)
        path = write_gguf(tmp_path / f"{factor}.gguf", Llama(config), tensors={"rope_freqs.weight": divisors})
        assert Llama.from_pretrained(path).config == config
    divisors[1] = 3.0
    path = write_gguf(tmp_path / "other.gguf", Llama(config), tensors={"rope_freqs.weight": divisors})
    with pytest.raises(ValueError, match=r"rope_freqs.weight holds \[1.0, 3.0, .*expected those of Llama 3.1"):
        Llama.from_pretrained(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"general.architecture": "gemma"}, "general.architecture = 'gemma': expected one of llama, qwen2, qwen3"),
        ({"llama.expert_count": 8}, "llama.expert_count = 8: expected 0"),
        ({"llama.block_count": None}, "llama.block_count is missing"),
        ({"llama.rope.scaling.type": "yarn"}, "llama.rope.scaling.type = 'yarn': expected none or linear"),
        ({"llama.attention.key_length": 32}, "llama.rope.dimension_count = 16: expected head_dim = 32"),
        ({"llama.attention.head_count": 0}, "llama.attention.head_count = 0: expected a number above 0"),
        (
            {"llama.attention.head_count": 3},
            "llama.attention.head_count_kv = 2: expected a divisor of llama.attention.head_count = 3",
        ),
        ({"split.count": 3}, "split.count = 3: expected one file"),
    ],
)
def test_other_architectures_are_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    path = write_gguf(tmp_path / "a.gguf", Llama(CONFIG), change=change)
    with pytest.raises(ValueError, match=rf"a.gguf: {message}"):
        Llama.from_pretrained(path)


def test_tensors_that_do_not_fit_are_named(tmp_path: Path) -> None:
    changed = {
        "output_norm.weight": None,
        "blk.0.attn_q.bias": np.zeros(64, np.float32),
        "blk.1.ffn_up.weight": None,
    }
    path = write_gguf(tmp_path / "a.gguf", Llama(CONFIG), tensors=changed)
    with pytest.raises(ValueError, match="do not fit") as caught:
        Llama.from_pretrained(path)
    expected = "missing: blk.1.ffn_up.weight, output_norm.weight; extra: blk.0.attn_q.bias"
    assert str(caught.value).partition("config: ")[2] == expected
    config = dataclasses.replace(CONFIG, n_kv_heads=4)
    path = write_gguf(tmp_path / "b.gguf", Llama(CONFIG), change={"llama.attention.head_count_kv": config.n_kv_heads})
    with pytest.raises(ValueError, match=r"misshapen: blk.0.attn_k.weight is \(32, 64\), expected \(64, 64\)"):
        Llama.from_pretrained(path)


def test_truncated_files_name_their_tensors(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "a.gguf", Llama(CONFIG))
    size = path.stat().st_size
    os.truncate(path, size - 32)
    with pytest.raises(ValueError, match=r"a.gguf: truncated, tensors cut off: output.weight: expected a whole GGUF"):
        Llama.from_pretrained(path)
    for rest in (600, 60, 0):
        os.truncate(path, rest)
        said = f"damaged, or cut off at {rest} bytes" if rest else "begins with b''"
        with pytest.raises(ValueError, match=rf"a.gguf: {said}: expected a whole GGUF file"):
            Llama.from_pretrained(path)
    path.write_bytes(b"not a GGUF file" * 100)
    with pytest.raises(ValueError, match=r"a.gguf: begins with b'not ': expected a whole GGUF file"):
        Llama.from_pretrained(path)


def test_a_type_that_is_not_dequantised_is_named(tmp_path: Path) -> None:
    integers = {"output_norm.weight": np.ones(64, dtype=np.int32)}
    path = write_gguf(tmp_path / "a.gguf", Llama(CONFIG), tensors=integers)
    with pytest.raises(ValueError, match=r"a.gguf: tensor output_norm.weight is I32: expected a type that gguf"):
        Llama.from_pretrained(path)


def test_the_extra_is_named_where_it_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_gguf(tmp_path / "a.gguf", Llama(CONFIG))
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(ImportError, match=r"pip install 'llama_fast\[gguf\]'"):
        Llama.from_pretrained(path)


# As in tests/test_weights.py: the system refuses what passes the limit. A file mapped to be read counts as nothing.
MEMORY = """
import resource, sys
from pathlib import Path
from llama_fast.model import Llama

folder, allowed = Path(sys.argv[1]), int(sys.argv[2])
Llama.from_pretrained(folder / "small.gguf")  # imports, and what torch sets up at its first call
now = int(Path("/proc/self/status").read_text().split("VmData:")[1].split()[0]) * 1024
resource.setrlimit(resource.RLIMIT_DATA, (now + allowed, resource.RLIM_INFINITY))
Llama.from_pretrained(folder / "large.gguf")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux limits a process's memory so")
def test_peak_memory_is_the_model_and_one_tensor(tmp_path: Path) -> None:
    config = LlamaConfig(512, 4, 8, 4, 1536, 8192, 128)
    model = Llama(config, device="meta").to_empty(device="cpu")
    for p in model.parameters():
        torch.nn.init.ones_(p)
    write_gguf(tmp_path / "small.gguf", Llama(CONFIG), "Q8_0")
    write_gguf(tmp_path / "large.gguf", model, "Q8_0")
    model_bytes, tensor, slack = 4 * config.n_params, 4 * config.vocab_size * config.dim, 8 << 20
    root = Path(ours.__file__).parents[2]
    env = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    for allowed, fits in ((model_bytes + tensor + slack, True), (model_bytes - slack, False)):
        command = [sys.executable, "-c", MEMORY, str(tmp_path), str(allowed)]
        done = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, check=False)
        assert (done.returncode == 0) == fits, done.stderr
        assert fits or "allocate memory" in done.stderr
