"""The thin model against PlainLlama: same names, same weights, same logits, losses and gradients; presets; policies."""

from __future__ import annotations

import copy
import dataclasses
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from llama_fast.block import POLICIES
from llama_fast.config import LinearRopeScaling, LlamaConfig
from llama_fast.model import Llama
from llama_fast.ops.dispatch import NotSupported
from llama_fast.plain import PlainLlama

TINY = LlamaConfig.preset("tiny")


def _batch(config: LlamaConfig, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(config.vocab_size, (2, 24), generator=generator)
    targets = tokens.roll(-1, dims=1)
    targets[:, -1] = -100
    return tokens, targets


def test_tied_weights_stay_tied_when_parameters_are_put_in() -> None:
    config = dataclasses.replace(TINY, tie_embeddings=True)
    model, other = Llama(config), Llama(config)
    other.reset_parameters(1)
    outer = torch.nn.ModuleList([model])
    for load, names in ((model.load_state_dict, ""), (outer.load_state_dict, "0.")):
        load({names + n: t.clone() for n, t in other.state_dict().items()}, assign=True)
        assert model.lm_head.weight is model.embed_tokens.weight
        assert torch.equal(model.lm_head.weight, other.lm_head.weight)
    assert copy.deepcopy(model).load_state_dict(other.state_dict(), assign=True) is not None


@pytest.mark.parametrize("tied", [False, True])
def test_names_weights_logits_loss_and_gradients_equal_plain(tied: bool) -> None:
    config = dataclasses.replace(TINY, tie_embeddings=tied)
    ours, theirs = Llama(config, dtype=torch.float64), PlainLlama(config, dtype=torch.float64)
    for (name, a), (other, b) in zip(sorted(ours.named_parameters()), sorted(theirs.named_parameters()), strict=True):
        assert name == other
        assert torch.equal(a, b)
    tokens, targets = _batch(config)
    # PlainLlama rounds its rotary tables to the dtype of the parameters, float64 keeps them
    torch.testing.assert_close(ours(tokens), theirs(tokens), rtol=1e-9, atol=1e-9)
    losses = ours.loss(tokens, targets), theirs.loss(tokens, targets)
    torch.testing.assert_close(*losses, rtol=1e-9, atol=1e-9)
    for loss in losses:
        loss.backward()
    for (name, a), (_, b) in zip(sorted(ours.named_parameters()), sorted(theirs.named_parameters()), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-8, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_loss_and_gradient_norm_by_policy(policy: str, dtype: torch.dtype) -> None:
    ours, theirs = Llama(TINY, dtype=dtype, policy=policy), PlainLlama(TINY, dtype=dtype)
    tokens, targets = _batch(TINY)
    norms = []
    for model in (ours, theirs):
        loss = model.loss(tokens, targets)
        loss.backward()
        norms.append((loss.item(), torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]).item()))
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert norms[0] == pytest.approx(norms[1], rel=tolerance)


def test_state_dict_goes_both_ways() -> None:
    ours, theirs = Llama(TINY), PlainLlama(TINY)
    theirs.reset_parameters(7)
    ours.load_state_dict(theirs.state_dict())
    tokens, _ = _batch(TINY)
    torch.testing.assert_close(ours(tokens), theirs(tokens), rtol=1e-4, atol=1e-5)
    theirs.load_state_dict(ours.state_dict())


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("llama-7b", 6_738_415_616),
        ("llama-13b", 13_015_864_320),
        ("llama-33b", 32_528_943_616),
        ("llama-65b", 65_285_660_672),
    ],
)
def test_presets_on_the_meta_device_have_the_papers_parameters(name: str, count: int) -> None:
    model = Llama(LlamaConfig.preset(name), device="meta")
    assert sum(p.numel() for p in model.parameters()) == count
    assert all(p.is_meta for p in model.parameters())


def test_autocast_trains_in_bfloat16_over_float32_weights() -> None:
    ours, theirs = Llama(TINY), PlainLlama(TINY)
    tokens, targets = _batch(TINY)
    losses = []
    for model in (ours, theirs):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model.loss(tokens, targets)
        loss.backward()
        losses.append(loss.item())
        assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
    assert losses[0] == pytest.approx(losses[1], rel=5e-3)


def test_training_follows_plain_pytorch() -> None:
    curves = []
    for model in (Llama(TINY), PlainLlama(TINY)):
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        curve = []
        for step in range(12):
            tokens, targets = _batch(TINY, seed=step % 3)
            loss = model.loss(tokens, targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
        curves.append(curve)
    assert curves[0][-1] < 0.9 * curves[0][0]
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)


def test_set_policy_reaches_every_block_and_names_a_wrong_one() -> None:
    model = Llama(TINY)
    model.set_policy("save")
    assert {layer.options.policy for layer in model.layers} == {"save"}
    with pytest.raises(ValueError, match="policy is 'none'"):
        model.set_policy("none")


def test_a_model_that_inference_mode_has_seen_can_still_be_trained() -> None:
    tokens, targets = _batch(TINY)
    seen, fresh = Llama(TINY), Llama(TINY)
    with torch.inference_mode():
        seen(tokens)
    losses = [model.loss(tokens, targets) for model in (seen, fresh)]
    assert torch.equal(*losses)
    losses[0].backward()


def test_a_config_that_is_put_in_turns_by_its_own_angles() -> None:
    """A longer context by another scaling, say; the tables are kept between calls."""
    tokens, _ = _batch(TINY)
    model = Llama(TINY)
    model(tokens), model.generate(tokens, max_new_tokens=2)
    model.config = dataclasses.replace(TINY, rope_scaling=LinearRopeScaling(4.0), max_seq_len=256)
    fresh = Llama(model.config)
    assert torch.equal(model(tokens), fresh(tokens))
    assert torch.equal(model.generate(tokens, max_new_tokens=9), fresh.generate(tokens, max_new_tokens=9))


@pytest.mark.parametrize("kind", ["fake mode", "make_fx"])
def test_a_model_that_ran_on_fake_tensors_can_still_be_used(kind: str) -> None:
    """Its rotary tables are kept between calls, and those of a trace are fake."""
    tokens, targets = _batch(TINY)
    model = Llama(TINY)
    if kind == "make_fx":
        make_fx(model, tracing_mode="fake", _allow_non_fake_inputs=True)(tokens)
    else:
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert model(mode.from_tensor(tokens)).shape == (*tokens.shape, TINY.vocab_size)
    assert torch.equal(model.loss(tokens, targets), Llama(TINY).loss(tokens, targets))


def test_the_default_device_is_not_the_models() -> None:
    """As where `torch.set_default_device("cuda")` stands beside a model on the CPU."""
    model = Llama(TINY)
    tokens, targets = _batch(TINY)
    expected, loss = model.generate(tokens, max_new_tokens=5), model.loss(tokens, targets)
    with torch.device("meta"):
        assert torch.equal(model.generate(tokens, max_new_tokens=5), expected)
        assert torch.equal(model.loss(tokens, targets), loss)
        assert torch.equal(model.generate(tokens, max_new_tokens=5, eos_id=expected[0, -1].item()), expected)


def test_bad_tokens_are_named() -> None:
    model = Llama(TINY)
    with pytest.raises(ValueError, match=r"tokens holds ids 0 .. 256: expected 0 .. 255"):
        model(torch.tensor([[0, 256]]))
    with pytest.raises(ValueError, match=r"tokens has T = 129"):
        model(torch.zeros(1, 129, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"targets holds the id 300"):
        model.loss(torch.zeros(1, 2, dtype=torch.int64), torch.tensor([[1, 300]]))
    with pytest.raises(ValueError, match=r"tokens is on meta: expected cpu as the model"):
        model(torch.zeros(1, 2, dtype=torch.int64, device="meta"))
    with pytest.raises(ValueError, match=r"tokens is a list: expected a torch.Tensor"):
        model([[1, 2]])
    with pytest.raises(ValueError, match=r"targets is a list: expected a torch.Tensor"):
        model.loss(torch.zeros(1, 2, dtype=torch.int64), [[1, 2]])


@pytest.mark.parametrize("what", ["logits", "loss", "generate"])
def test_vmap_is_refused_by_name(what: str) -> None:
    """And not by torch, as a check that reads the tokens; that of plain PyTorch lets it pass."""
    tokens = torch.randint(TINY.vocab_size, (3, 1, 5))
    calls: dict[str, Any] = {
        "logits": lambda model, row: model(row),
        "loss": lambda model, row: model.loss(row, row),
        "generate": lambda model, row: model.generate(row, max_new_tokens=2),
    }
    model, plain = Llama(TINY), PlainLlama(TINY)
    with pytest.raises(NotSupported, match="do not take part in torch"):
        torch.vmap(lambda row: calls[what](model, row))(tokens)
    if what == "logits":
        torch.testing.assert_close(torch.vmap(plain)(tokens), torch.stack([plain(row) for row in tokens]))


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_break(dynamic: bool) -> None:
    model = Llama(TINY)
    loss = torch.compile(model.loss, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for length in (24, 13):
        tokens, targets = (x[:, :length] for x in _batch(TINY))
        found, expected = (
            torch.autograd.grad(f(tokens, targets), list(model.parameters())) for f in (loss, model.loss)
        )
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=str)
def test_sharded_by_fsdp2(policy: str, dtype: torch.dtype | None) -> None:
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    model, expected = Llama(TINY, policy=policy), Llama(TINY, policy=policy)
    mesh = torch.distributed.init_device_mesh("cpu", (1,))
    mixed = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=mixed)
    fully_shard(model, mesh=mesh, mp_policy=mixed)
    register_fsdp_forward_method(model, "loss")
    for m in (model, expected):
        m.loss(*_batch(TINY)).backward()
    for (name, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
        error = (p.grad.full_tensor() - q.grad).norm() / q.grad.norm()
        assert error <= (0.03 if dtype else 0.0), name
