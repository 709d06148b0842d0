"""LlamaConfig: parameter counts, checks, presets, JSON, rotary tables."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import pytest
import torch

from llama_fast.config import PRESETS, LinearRopeScaling, Llama3RopeScaling, LlamaConfig, rope_cos_sin

N_PARAMS = {
    "llama-7b": 6_738_415_616,
    "llama-13b": 13_015_864_320,
    "llama-33b": 32_528_943_616,
    "llama-65b": 65_285_660_672,
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3-8b": 8_030_261_248,
    "llama-3-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400,
    "mistral-7b": 7_241_732_096,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-8b": 8_190_735_360,
    "llama-3.2-3b": 3_212_749_824,
}


@pytest.mark.parametrize("name", N_PARAMS)
def test_parameter_counts(name: str) -> None:
    assert LlamaConfig.preset(name).n_params == N_PARAMS[name]


def test_flops_are_palms() -> None:
    config = LlamaConfig.preset("llama-7b")
    n = 6_738_415_616 - 65 * 4096 - 32000 * 4096  # no norms, no embedding
    assert config.flops_per_token(2048) == 6 * n + 12 * 32 * 4096 * 2048
    assert dataclasses.replace(config, window=4096).flops_per_token(2048) == config.flops_per_token(2048)
    assert dataclasses.replace(config, window=512).flops_per_token(2048) == 6 * n + 12 * 32 * 4096 * 512


@pytest.mark.parametrize("name", ["llama7b", "llama-66b", "zzz"])
def test_unknown_preset_lists_all(name: str) -> None:
    with pytest.raises(ValueError, match=f"preset '{name}': no such name; expected one of {', '.join(PRESETS)}$"):
        LlamaConfig.preset(name)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": 0}, "dim = 0"),
        ({"n_layers": -1}, "n_layers = -1"),
        ({"n_layers": True}, "n_layers = True"),
        ({"vocab_size": 1.5}, r"vocab_size = 1\.5"),
        ({"n_heads": 3, "n_kv_heads": 3}, "n_heads = 3: expected a divisor of dim = 64"),
        ({"n_layers": 10**30}, "n_layers = 1000000000000000000000000000000: expected at most 100000"),
        ({"n_kv_heads": 3}, "n_kv_heads = 3: expected a divisor of n_heads = 4"),
        ({"dim": 60}, "head_dim = 15: expected an even number"),
        ({"explicit_head_dim": 7}, "head_dim = 7"),
        ({"explicit_head_dim": 0}, "explicit_head_dim = 0"),
        ({"norm_eps": 0.0}, r"norm_eps = 0\.0"),
        ({"rope_theta": float("nan")}, "rope_theta = nan"),
        ({"rope_scaling": 8.0}, r"rope_scaling = 8\.0"),
        ({"tie_embeddings": 1}, "tie_embeddings = 1: expected True or False"),
        ({"qkv_bias": 1}, "qkv_bias = 1: expected True or False"),
        ({"qk_norm": None}, "qk_norm = None: expected True or False"),
        ({"window": 0}, "window = 0: expected an integer of 1 or more"),
        ({"window": True}, "window = True: expected an integer of 1 or more"),
    ],
)
def test_bad_fields_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(PRESETS["tiny"], **change)


def test_bad_scaling_is_named() -> None:
    with pytest.raises(ValueError, match=r"rope_scaling.factor = 0"):
        LinearRopeScaling(0)
    with pytest.raises(ValueError, match=r"high_freq_factor = 1.0"):
        Llama3RopeScaling(8.0, 1.0, 1.0, 8192)


def test_explicit_head_dim() -> None:
    config = dataclasses.replace(PRESETS["tiny"], n_heads=3, n_kv_heads=3, explicit_head_dim=32)
    assert config.head_dim == 32
    assert dataclasses.replace(PRESETS["tiny"], dim=128).head_dim == 32


@pytest.mark.parametrize("name", PRESETS)
def test_json_round_trip(name: str) -> None:
    assert LlamaConfig.from_dict(json.loads(json.dumps(PRESETS[name].to_dict()))) == PRESETS[name]


def test_from_dict_names_what_is_wrong() -> None:
    good = PRESETS["tiny"].to_dict()
    linear = LlamaConfig.from_dict({**good, "rope_scaling": {"type": "linear", "factor": 2.0}})
    assert linear.rope_scaling == LinearRopeScaling(2.0)
    assert LlamaConfig.from_dict(linear.to_dict()) == linear
    old = {name: value for name, value in good.items() if name not in ("qkv_bias", "qk_norm", "window")}
    assert LlamaConfig.from_dict(old) == PRESETS["tiny"]
    other = dataclasses.replace(linear, qkv_bias=True, qk_norm=True, window=7)
    assert LlamaConfig.from_dict(json.loads(json.dumps(other.to_dict()))) == other
    with pytest.raises(ValueError, match="unknown field n_head;"):
        LlamaConfig.from_dict({**good, "n_head": 4})
    with pytest.raises(ValueError, match="'dim'"):
        LlamaConfig.from_dict({k: v for k, v in good.items() if k != "dim"})
    with pytest.raises(ValueError, match=r"rope_scaling.type = 'yarn'"):
        LlamaConfig.from_dict({**good, "rope_scaling": {"type": "yarn"}})


def test_rope_takes_counts_and_positions() -> None:
    config = PRESETS["tiny"]
    cos, sin = rope_cos_sin(config, 10)
    assert cos.shape == sin.shape == (10, 8)
    assert cos.dtype == sin.dtype == torch.float32
    positions = torch.tensor([[3, 4], [9, 0]])
    cos_at, sin_at = rope_cos_sin(config, positions)
    assert torch.equal(cos_at, cos[positions])
    assert torch.equal(sin_at, sin[positions])
    assert rope_cos_sin(config, 0)[0].shape == (0, 8)
    assert rope_cos_sin(dataclasses.replace(config, rope_theta=10**30), 2)[0].isfinite().all()  # beyond 64 bits
    assert rope_cos_sin(config, 5, "meta")[0].is_meta
    with pytest.raises(ValueError, match="positions = -1"):
        rope_cos_sin(config, -1)
    with pytest.raises(ValueError, match=r"float32: expected an integer"):
        rope_cos_sin(config, torch.ones(3))


def test_rope_far_out_is_rounded_once() -> None:
    """At position 131071 a float32 angle is off by up to 0.004 rad; these tables are within one rounding."""
    cos, _ = rope_cos_sin(PRESETS["llama-7b"], torch.tensor([131071]))
    freqs = 10000.0 ** (-torch.arange(0, 128, 2, dtype=torch.float64) / 128)
    assert (cos[0].double() - (131071 * freqs).cos()).abs().max() < 6e-8


@pytest.mark.parametrize("name", ["llama-7b", "llama-3-8b", "llama-3.1-8b", "llama-3.2-1b", "linear"])
def test_rope_equals_transformers(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    rotary = pytest.importorskip("transformers.models.llama.modeling_llama").LlamaRotaryEmbedding
    config = dataclasses.replace(PRESETS["llama-7b"], rope_scaling=LinearRopeScaling(4.0))
    config = PRESETS.get(name, config)
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if isinstance(config.rope_scaling, LinearRopeScaling):
        rope |= {"rope_type": "linear", "factor": 4.0}
    elif config.rope_scaling is not None:
        scaling = dataclasses.asdict(config.rope_scaling)
        scaling["original_max_position_embeddings"] = scaling.pop("original_max_seq_len")
        rope |= {"rope_type": "llama3", **scaling}
    theirs = rotary(
        transformers.LlamaConfig(
            hidden_size=config.dim,
            num_attention_heads=config.n_heads,
            max_position_embeddings=config.max_seq_len,
            rope_parameters=rope,
        )
    )
    positions = torch.arange(0, 512)
    cos, sin = theirs(torch.zeros(1, dtype=torch.float32), positions[None])
    ours_cos, ours_sin = rope_cos_sin(config, positions)
    half = config.head_dim // 2
    # their float32 angles err by positions * 2^-23
    torch.testing.assert_close(ours_cos, cos[0, :, :half], rtol=0, atol=1e-4)
    torch.testing.assert_close(ours_sin, sin[0, :, half:], rtol=0, atol=1e-4)
