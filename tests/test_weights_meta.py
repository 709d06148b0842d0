"""Meta's folders: the ranks' code, in float64, gives the logits of the model that is read; round trips; damage."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from llama_fast.config import PRESETS, LinearRopeScaling, Llama3RopeScaling, LlamaConfig, rope_cos_sin
from llama_fast.model import Llama
from llama_fast.weights import meta
from llama_fast.weights.source import ModelSource

# n_kv_heads = 2, so that four ranks are more than the key/value heads
CONFIG = LlamaConfig(64, 2, 8, 2, 176, 96, 2048, 1e-6)


def assert_same(a: Llama, b: Llama) -> None:
    assert a.config == b.config
    for (name, p), (other, q) in zip(a.named_parameters(), b.named_parameters(), strict=True):
        assert name == other
        assert p.dtype == q.dtype
        assert torch.equal(p, q), name


def write(model: Llama, path: Path, shards: int, embedding_axis: int) -> None:
    """`save_pretrained(format="meta")` with the embedding shared along either axis."""
    path.mkdir()
    saved = meta._LLAMA3_VOCAB
    meta._LLAMA3_VOCAB = model.config.vocab_size if embedding_axis == 0 else saved
    try:
        meta.write_meta(ModelSource(model), path, model.norm.weight.dtype, shards, None)
    finally:
        meta._LLAMA3_VOCAB = saved


# ---- Meta's forward pass, rank by rank -------------------------------------------------------------------------------


def ranks_logits(path: Path, config: LlamaConfig, tokens: Tensor, embedding_axis: int) -> Tensor:
    """Logits [B, T, V] float64: what N ranks compute from their files and sum or gather, as fairscale's layers do."""
    files = sorted(path.glob("consolidated.*.pth"))
    ranks = [{k: v.double() for k, v in torch.load(f, weights_only=True).items()} for f in files]
    B, T = tokens.shape
    D, N = config.head_dim, len(ranks)
    if embedding_axis == 1:
        x = torch.cat([F.embedding(tokens, r["tok_embeddings.weight"]) for r in ranks], dim=-1)
    else:
        rows = config.vocab_size // N
        x = torch.zeros(B, T, config.dim, dtype=torch.float64)
        for i, r in enumerate(ranks):
            inside = (tokens >= i * rows) & (tokens < (i + 1) * rows)
            local = torch.where(inside, tokens - i * rows, 0)
            x += F.embedding(local, r["tok_embeddings.weight"]) * inside[..., None]
    exponent = torch.arange(0, D, 2, dtype=torch.float64) / D
    angles = torch.arange(T)[:, None] * config.rope_theta**-exponent
    turn = torch.polar(torch.ones_like(angles), angles)[:, None]  # [T, 1, D/2]

    def rotate(h: Tensor) -> Tensor:
        return torch.view_as_real(torch.view_as_complex(h.unflatten(-1, (-1, 2))) * turn).flatten(-2)

    def norm(h: Tensor, r: dict[str, Tensor], name: str) -> Tensor:
        return F.rms_norm(h, (config.dim,), r[f"{name}.weight"], config.norm_eps)

    for i in range(config.n_layers):
        attended = torch.zeros_like(x)
        for r in ranks:
            w = {k: r[f"layers.{i}.attention.{k}.weight"] for k in ("wq", "wk", "wv", "wo")}
            h = norm(x, r, f"layers.{i}.attention_norm")
            q, k, v = ((h @ w[n].T).unflatten(-1, (-1, D)) for n in ("wq", "wk", "wv"))
            q, k = rotate(q), rotate(k)
            out = F.scaled_dot_product_attention(
                *(t.transpose(1, 2) for t in (q, k, v)), is_causal=True, enable_gqa=True
            )
            attended += out.transpose(1, 2).flatten(2) @ w["wo"].T
        x = x + attended
        fed = torch.zeros_like(x)
        for r in ranks:
            w1, w2, w3 = (r[f"layers.{i}.feed_forward.{n}.weight"] for n in ("w1", "w2", "w3"))
            h = norm(x, r, f"layers.{i}.ffn_norm")
            fed += (F.silu(h @ w1.T) * (h @ w3.T)) @ w2.T
        x = x + fed
    return torch.cat([norm(x, r, "norm") @ r["output.weight"].T for r in ranks], dim=-1)


@pytest.mark.parametrize("embedding_axis", [0, 1])
@pytest.mark.parametrize("shards", [1, 2, 4])
def test_ranks_compute_the_model_that_was_written_and_is_read(tmp_path: Path, shards: int, embedding_axis: int) -> None:
    model = Llama(CONFIG, dtype=torch.float64)
    write(model, tmp_path / "a", shards, embedding_axis)
    tokens = torch.randint(CONFIG.vocab_size, (2, 20), generator=torch.Generator().manual_seed(0))
    expected = ranks_logits(tmp_path / "a", CONFIG, tokens, embedding_axis)
    with torch.no_grad():
        # cos and sin are rounded to float32 in the model
        torch.testing.assert_close(model(tokens), expected, rtol=1e-6, atol=1e-6)
    assert_same(model, Llama.from_pretrained(tmp_path / "a"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("tied", [False, True])
def test_round_trip_is_bitwise(tmp_path: Path, dtype: torch.dtype, tied: bool) -> None:
    model = Llama(dataclasses.replace(CONFIG, tie_embeddings=tied), dtype=dtype)
    for shards in (1, 2, 8):
        path = tmp_path / str(shards)
        model.save_pretrained(path, "meta", shards=shards)
        assert sorted(p.name for p in path.iterdir()) == [
            *(f"consolidated.{i:02d}.pth" for i in range(shards)),
            "params.json",
        ]
        assert_same(model, Llama.from_pretrained(path))
    # to Hugging Face and back, the files are the same byte for byte
    Llama.from_pretrained(path).save_pretrained(tmp_path / "hf", shards=3)
    Llama.from_pretrained(tmp_path / "hf").save_pretrained(tmp_path / "back", "meta", shards=8)
    for file in path.iterdir():
        assert file.read_bytes() == (tmp_path / "back" / file.name).read_bytes(), file.name


def test_the_file_is_torchs_own_format(tmp_path: Path) -> None:
    model = Llama(CONFIG)
    model.save_pretrained(tmp_path / "a", "meta")
    file = tmp_path / "a" / "consolidated.00.pth"
    mapped = torch.load(file, mmap=True, weights_only=True)
    read = torch.load(file, weights_only=True)
    assert read.keys() == mapped.keys()
    for name, t in read.items():
        assert torch.equal(t, mapped[name])
        assert mapped[name].data_ptr() % 64 == mapped["norm.weight"].data_ptr() % 64, name
    # what torch.save writes is read alike
    torch.save({**read, "rope.freqs": torch.ones(4)}, file)
    assert_same(model, Llama.from_pretrained(tmp_path / "a"))


# ---- params.json -----------------------------------------------------------------------------------------------------

# As published; the vocabulary of LLaMA 1 and 2 is -1 and that of the tokenizer.
LLAMA3 = {"n_kv_heads": 8, "norm_eps": 1e-5, "rope_theta": 500000.0, "vocab_size": 128256}
PARAMS: dict[str, dict[str, Any]] = {
    "llama-7b": {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-6},
    "llama-13b": {"dim": 5120, "multiple_of": 256, "n_heads": 40, "n_layers": 40, "norm_eps": 1e-6},
    "llama-33b": {"dim": 6656, "multiple_of": 256, "n_heads": 52, "n_layers": 60, "norm_eps": 1e-6},
    "llama-65b": {"dim": 8192, "multiple_of": 256, "n_heads": 64, "n_layers": 80, "norm_eps": 1e-5},
    "llama-2-7b": {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-5},
    "llama-2-13b": {"dim": 5120, "multiple_of": 256, "n_heads": 40, "n_layers": 40, "norm_eps": 1e-5},
    "llama-2-70b": {
        "dim": 8192, "multiple_of": 4096, "ffn_dim_multiplier": 1.3, "n_heads": 64, "n_kv_heads": 8, "n_layers": 80,
        "norm_eps": 1e-5,
    },
    "llama-3-8b": {
        **LLAMA3, "dim": 4096, "multiple_of": 1024, "ffn_dim_multiplier": 1.3, "n_heads": 32, "n_layers": 32,
    },
    "llama-3-70b": {
        **LLAMA3, "dim": 8192, "multiple_of": 4096, "ffn_dim_multiplier": 1.3, "n_heads": 64, "n_layers": 80,
    },
    "llama-3.1-8b": {
        **LLAMA3, "dim": 4096, "multiple_of": 1024, "ffn_dim_multiplier": 1.3, "n_heads": 32, "n_layers": 32,
        "use_scaled_rope": True,
    },
    "llama-3.2-1b": {
        **LLAMA3, "dim": 2048, "multiple_of": 256, "ffn_dim_multiplier": 1.5, "n_heads": 32, "n_layers": 16,
        "use_scaled_rope": True,
    },
    "llama-3.2-3b": {
        **LLAMA3, "dim": 3072, "multiple_of": 256, "ffn_dim_multiplier": 1.0, "n_heads": 24, "n_layers": 28,
        "use_scaled_rope": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PARAMS)
def test_published_params_give_the_presets(name: str) -> None:
    preset = dataclasses.replace(PRESETS[name], tie_embeddings=False)  # Meta's files always have both matrices
    assert meta.config_from_meta({"vocab_size": -1, **PARAMS[name]}, preset.vocab_size) == preset
    absent = dict.fromkeys(
        {"vocab_size", "n_kv_heads", "ffn_dim_multiplier", "multiple_of", "rope_theta"} - {*PARAMS[name]}
    )
    assert meta.config_from_meta({**absent, **PARAMS[name]}, preset.vocab_size) == preset  # null: not there


@pytest.mark.parametrize("name", [name for name in PRESETS if not name.startswith(("mistral", "qwen"))])
def test_written_params_give_the_config_back(name: str) -> None:
    config = dataclasses.replace(PRESETS[name], tie_embeddings=False)
    params = meta.params_to_meta(config)
    known = {"dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "multiple_of", "ffn_dim_multiplier"}
    assert params.keys() <= known | {"norm_eps", "rope_theta", "use_scaled_rope"}
    read = meta.config_from_meta(params, config.vocab_size)
    assert dataclasses.replace(read, max_seq_len=config.max_seq_len) == config


@pytest.mark.parametrize("F", [1, 7, 170, 171, 176, 1000, 1024, 4099])
def test_any_ffn_dim_can_be_written(F: int) -> None:
    config = dataclasses.replace(CONFIG, ffn_dim=F)
    assert meta.config_from_meta(meta.params_to_meta(config), CONFIG.vocab_size) == config


def test_vocabulary_of_minus_one_is_that_of_the_weights(tmp_path: Path) -> None:
    model = Llama(CONFIG)
    for axis in (0, 1):
        path = tmp_path / str(axis)
        write(model, path, 2, axis)
        params = json.loads((path / "params.json").read_text())
        params["vocab_size"] = -1
        (path / "params.json").write_text(json.dumps(params))
        assert_same(model, Llama.from_pretrained(path))
    assert Llama.from_pretrained(path, max_seq_len=77).config.max_seq_len == 77


@pytest.mark.parametrize(
    ("change", "shards", "message"),
    [
        ({"rope_scaling": LinearRopeScaling(2.0)}, 1, r"rope_scaling = .*Meta's format expects None or Llama 3.1's"),
        ({"rope_scaling": Llama3RopeScaling(16.0, 1.0, 4.0, 8192)}, 1, "rope_scaling = "),
        ({"rope_scaling": Llama3RopeScaling(8.0, 1.0, 4.0, 4096)}, 1, "rope_scaling = "),
        ({"explicit_head_dim": 16}, 1, "head_dim = 16: Meta's format expects dim / n_heads"),
        ({}, 3, "shards = 3: expected a divisor of n_heads = 8"),
        ({}, 0, "shards = 0: expected a divisor"),
        ({"n_heads": 16, "n_kv_heads": 16, "dim": 256, "ffn_dim": 180}, 8, "shards = 8: expected a divisor of ffn_dim"),
    ],
)
def test_what_meta_cannot_hold(tmp_path: Path, change: dict[str, Any], shards: int, message: str) -> None:
    model = Llama(dataclasses.replace(CONFIG, **change))
    with pytest.raises(ValueError, match=message):
        model.save_pretrained(tmp_path / "a", "meta", shards=shards)
    assert list(tmp_path.iterdir()) == []


def test_llama31_scaling_is_read_and_turns_alike(tmp_path: Path) -> None:
    config = dataclasses.replace(CONFIG, rope_theta=5e5, rope_scaling=Llama3RopeScaling(8.0, 1.0, 4.0, 8192))
    Llama(config).save_pretrained(tmp_path / "a", "meta")
    read = Llama.from_pretrained(tmp_path / "a").config
    assert read.max_seq_len == 131072
    assert torch.equal(rope_cos_sin(read, 64)[0], rope_cos_sin(config, 64)[0])


# ---- damage ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Llama(CONFIG).save_pretrained(tmp_path / "a", "meta", shards=2)
    return tmp_path / "a"


def change(file: Path, name: str, value: Tensor | None) -> None:
    shard = torch.load(file, weights_only=True)
    shard.pop(name, None)
    torch.save(shard if value is None else {**shard, name: value}, file)


def test_tensors_that_do_not_fit_are_named(folder: Path) -> None:
    for file in folder.glob("*.pth"):
        change(file, "norm.weight", None)
        change(file, "layers.0.attention.wqkv.weight", torch.zeros(2, 2))
        change(file, "layers.1.feed_forward.w2.weight", torch.zeros(64, 80))
    with pytest.raises(ValueError, match="do not fit") as caught:
        Llama.from_pretrained(folder)
    assert str(caught.value).partition("config: ")[2] == (
        "missing: norm.weight; extra: layers.0.attention.wqkv.weight; "
        "misshapen: layers.1.feed_forward.w2.weight is (64, 160), expected (64, 176)"
    )


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "norm.weight",
            None,
            r"consolidated.01.pth: its tensors differ from those of consolidated.00.pth: norm.weight",
        ),
        ("norm.weight", torch.ones(64, dtype=torch.int32), r"tensor norm.weight has dtype int32, expected float32"),
        (
            "layers.0.attention.wo.weight",
            torch.zeros(64, 16),
            r"consolidated.01.pth: tensor layers.0.attention.wo.weight is \(64, 16\), expected \(64, 32\)",
        ),
    ],
)
def test_ranks_that_disagree(folder: Path, name: str, value: Tensor | None, message: str) -> None:
    change(folder / "consolidated.01.pth", name, value)
    with pytest.raises(ValueError, match=message):
        Llama.from_pretrained(folder)


class Planted:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("true",)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda p: os.truncate(p, p.stat().st_size // 2),
            r"consolidated.00.pth: \d+ bytes that end in no zip archive's directory: expected a whole file of tensors",
        ),
        (lambda p: p.write_bytes(b""), r"consolidated.00.pth: 0 bytes .*expected a whole file of tensors"),
        (
            lambda p: torch.save({"norm.weight": Planted()}, p),
            r"consolidated.00.pth: calls posix.system when it is read, which is refused: expected a whole file",
        ),
        (lambda p: torch.save([torch.ones(1)], p), r"consolidated.00.pth: holds a list"),
    ],
)
def test_damaged_files_are_named_and_run_no_code(folder: Path, damage: Any, message: str) -> None:
    damage(folder / "consolidated.00.pth")
    with pytest.raises(ValueError, match=message):
        Llama.from_pretrained(folder)


def test_missing_ranks_and_params(folder: Path) -> None:
    (folder / "consolidated.00.pth").rename(folder / "consolidated.02.pth")
    with pytest.raises(FileNotFoundError, match=r"without a gap, found consolidated.01.pth, consolidated.02.pth"):
        Llama.from_pretrained(folder)
    (folder / "params.json").write_text('{"dim": 64}')
    with pytest.raises(FileNotFoundError, match="without a gap"):
        Llama.from_pretrained(folder)
    (folder / "consolidated.02.pth").rename(folder / "consolidated.00.pth")
    with pytest.raises(ValueError, match=r"params.json: n_heads is missing"):
        Llama.from_pretrained(folder)
    (folder / "params.json").write_text('{"dim": "64", "n_heads": 4}')
    with pytest.raises(ValueError, match=r"params.json: dim = '64': expected a number above 0"):
        Llama.from_pretrained(folder)
