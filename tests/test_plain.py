"""PlainLlama: against transformers in float64, its weights, its checks."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from llama_fast.config import PRESETS, LlamaConfig, rope_cos_sin
from llama_fast.plain import PlainLlama, init_weights_

TINY = PRESETS["tiny"]
CONFIGS = {
    "grouped": TINY,
    "multi-head": dataclasses.replace(TINY, n_kv_heads=4),
    "tied": dataclasses.replace(TINY, tie_embeddings=True),
    "head_dim": dataclasses.replace(TINY, explicit_head_dim=24),
    "llama3-rope": dataclasses.replace(TINY, rope_scaling=PRESETS["llama-3.1-8b"].rope_scaling, rope_theta=500000.0),
}


def batch(config: LlamaConfig, t: int = 17) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = torch.randint(config.vocab_size, (3, t + 1), generator=torch.Generator().manual_seed(1))
    targets = tokens[:, 1:].clone()
    targets[0, :5] = -100
    return tokens[:, :-1], targets


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_and_gradients_equal_transformers(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    config = CONFIGS[name]
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=config.dim,
            num_hidden_layers=config.n_layers,
            num_attention_heads=config.n_heads,
            num_key_value_heads=config.n_kv_heads,
            intermediate_size=config.ffn_dim,
            vocab_size=config.vocab_size,
            max_position_embeddings=config.max_seq_len,
            rms_norm_eps=config.norm_eps,
            head_dim=config.head_dim,
            tie_word_embeddings=config.tie_embeddings,
            attn_implementation="sdpa",  # eager computes its softmax in float32
        )
    ).double()
    ours = PlainLlama(config, dtype=torch.float64)
    theirs.model.load_state_dict({k: v for k, v in ours.state_dict().items() if k != "lm_head.weight"})
    theirs.lm_head.weight.data.copy_(ours.lm_head.weight)
    tokens, targets = batch(config)

    # theirs computes the angles in float32: give it our tables, which test_config compares with its own
    class Tables(torch.nn.Module):
        def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> Any:
            cos, sin = rope_cos_sin(config, position_ids)
            return tuple(torch.cat((t, t), dim=-1).double() for t in (cos, sin))

    theirs.model.rotary_emb = Tables()
    # its RMSNorm computes in float32 whatever the dtype
    for module in theirs.modules():
        if type(module).__name__ == "LlamaRMSNorm":
            module.forward = lambda x, m=module: torch.nn.functional.rms_norm(
                x, m.weight.shape, m.weight, m.variance_epsilon
            )

    their_logits = theirs(tokens).logits
    our_logits = ours(tokens)
    torch.testing.assert_close(our_logits, their_logits, rtol=1e-10, atol=1e-12)

    ours.loss(tokens, targets).backward()
    torch.nn.functional.cross_entropy(their_logits.flatten(0, 1), targets.flatten()).backward()
    grads = {k.removeprefix("model."): p.grad for k, p in theirs.named_parameters()}
    assert grads.keys() == dict(ours.named_parameters()).keys()
    for key, p in ours.named_parameters():
        torch.testing.assert_close(p.grad, grads[key], rtol=1e-9, atol=1e-12, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("name", CONFIGS)
def test_parameter_count_is_the_configs(name: str) -> None:
    model = PlainLlama(CONFIGS[name], device="meta")
    assert sum(p.numel() for p in model.parameters()) == CONFIGS[name].n_params


def test_meta_65b_costs_nothing() -> None:
    model = PlainLlama(PRESETS["llama-65b"], device="meta", dtype=torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) == 65_285_660_672
    with pytest.raises(ValueError, match="meta device"):
        model.reset_parameters()


def test_meta_then_empty_keeps_the_tie() -> None:
    model = PlainLlama(CONFIGS["tied"], device="meta").to_empty(device="cpu")
    model.reset_parameters(0)
    assert model.lm_head.weight is model.embed_tokens.weight
    twin = PlainLlama(CONFIGS["tied"])
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))


def test_initial_weights() -> None:
    torch.manual_seed(0)
    before = torch.get_rng_state()
    config = dataclasses.replace(TINY, dim=256, n_layers=8, max_seq_len=64)
    model = PlainLlama(config)
    assert torch.equal(torch.get_rng_state(), before)
    weights = model.state_dict()
    assert weights["layers.3.self_attn.q_proj.weight"].std().item() == pytest.approx(0.02, rel=0.02)
    assert weights["embed_tokens.weight"].std().item() == pytest.approx(0.02, rel=0.02)
    assert weights["layers.3.self_attn.o_proj.weight"].std().item() == pytest.approx(0.005, rel=0.02)
    assert weights["layers.3.mlp.down_proj.weight"].std().item() == pytest.approx(0.005, rel=0.02)
    assert torch.equal(weights["norm.weight"], torch.ones(256))


def test_weights_do_not_depend_on_order_or_dtype() -> None:
    a = PlainLlama(TINY)
    half = PlainLlama(TINY, dtype=torch.bfloat16)
    for p, q in zip(a.parameters(), half.parameters(), strict=True):
        assert torch.equal(p.bfloat16(), q)
    other = torch.nn.Module()  # the same names, registered the other way round
    other.lm_head = torch.nn.Linear(64, 256, bias=False)
    other.embed_tokens = torch.nn.Embedding(256, 64)
    small = torch.nn.Module()
    small.embed_tokens = torch.nn.Embedding(256, 64)
    small.lm_head = torch.nn.Linear(64, 256, bias=False)
    init_weights_(other, 2, seed=5)
    init_weights_(small, 2, seed=5)
    assert torch.equal(other.lm_head.weight, small.lm_head.weight)
    a.reset_parameters(1)
    assert not torch.equal(a.embed_tokens.weight, PlainLlama(TINY).embed_tokens.weight)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_loss_dtype_and_causality(dtype: torch.dtype) -> None:
    model = PlainLlama(TINY, dtype=dtype)
    tokens, targets = batch(TINY)
    loss = model.loss(tokens, targets)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert loss.item() == pytest.approx(torch.tensor(256.0).log().item(), abs=0.2)
    logits = model(tokens)
    assert logits.dtype == dtype
    changed = tokens.clone()
    changed[:, 9] += 1
    changed %= 256
    assert torch.equal(model(changed)[:, :9], logits[:, :9])
    assert not torch.equal(model(changed)[:, 9:], logits[:, 9:])


def test_runs_under_autocast() -> None:
    model = PlainLlama(TINY)
    tokens, targets = batch(TINY)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model.loss(tokens, targets)
    loss.backward()
    assert loss.dtype == torch.float32
    assert abs(loss.item() - model.loss(tokens, targets).item()) < 0.01


def test_bad_tokens_are_named() -> None:
    model = PlainLlama(TINY)
    tokens, targets = batch(TINY)
    with pytest.raises(ValueError, match=r"\(17,\).*expected \[B, T\]"):
        model(tokens[0])
    with pytest.raises(ValueError, match=r"torch.int32"):
        model(tokens.int())
    with pytest.raises(ValueError, match=r"T = 129.*max_seq_len = 128"):
        model(torch.zeros(1, 129, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"ids 0 .. 256: expected 0 .. 255"):
        model(torch.tensor([[0, 256]]))
    with pytest.raises(ValueError, match=r"targets is \(3, 16\)"):
        model.loss(tokens, targets[:, 1:])
    with pytest.raises(ValueError, match=r"targets holds the id -1:"):
        model.loss(tokens, torch.full_like(targets, -1))


def test_empty_batch_and_no_tokens() -> None:
    model = PlainLlama(TINY)
    assert model(torch.zeros(0, 5, dtype=torch.int64)).shape == (0, 5, 256)
    assert model(torch.zeros(2, 0, dtype=torch.int64)).shape == (2, 0, 256)
