"""The plan's numbers: activations against measured ones, states against a real model, the paper's figure, bad input."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import pytest
import torch

import llama_fast as lf
from benchmarks import harness
from llama_fast import cli, plan
from llama_fast.block import POLICIES, BlockOptions, transformer_block
from llama_fast.config import LlamaConfig, rope_cos_sin
from llama_fast.plan import DEVICES, Layout

# two widths and head layouts: letters that are exchanged by mistake have different sizes
SHAPES = (LlamaConfig(256, 3, 4, 4, 688, 512, 256), LlamaConfig(192, 2, 6, 2, 640, 1024, 256, explicit_head_dim=48))
OTHERS = {"qkv_bias": True, "qk_norm": True, "window": 40}
WIDE = LlamaConfig(dim=64, n_layers=1, n_heads=4, n_kv_heads=2, ffn_dim=176, vocab_size=32, max_seq_len=512)
B, T = 2, 128


def test_policies_are_the_blocks() -> None:
    assert plan.POLICIES == POLICIES


def _block(config: LlamaConfig, dtype: torch.dtype) -> lf.nn.TransformerBlock:
    c = config
    more: dict[str, Any] = {name: getattr(c, name) for name in OTHERS}
    return lf.nn.TransformerBlock(c.dim, c.n_heads, c.ffn_dim, c.n_kv_heads, c.head_dim, dtype=dtype, **more)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("config", [*SHAPES, dataclasses.replace(SHAPES[1], **OTHERS)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_blocks_bytes_are_those_that_it_keeps(config: LlamaConfig, policy: str, dtype: torch.dtype) -> None:
    layer = _block(config, dtype)
    layer.options = dataclasses.replace(layer.options, policy=policy)
    cos, sin = rope_cos_sin(config, T)
    x = torch.randn(B, T, config.dim).to(dtype).requires_grad_()
    kept = harness.kept_bytes(lambda: layer(x, cos, sin), [*layer.parameters(), cos, sin])
    assert kept == B * T * plan.block_bytes_per_token(config, policy, dtype.itemsize)


@pytest.mark.parametrize("policy", POLICIES)
def test_a_models_activations_are_those_that_it_keeps(policy: str) -> None:
    config = SHAPES[0]
    model = lf.Llama(config, dtype=torch.float32, policy=policy)
    tokens = torch.randint(config.vocab_size, (B, T))
    cos, sin = model.rope_tables(0, T, tokens.device)
    targets = tokens.clone()
    found = plan.plan(config, DEVICES["h100"], Layout(), policy, seq_len=T, batch_size=B, itemsize=4)
    kept = harness.kept_bytes(lambda: model.loss(tokens, targets), [*model.parameters(), cos, sin])
    unseen = B * T * config.dim * 4  # the head's gradient of its input is kept past the hooks
    scalars = 64  # the count of the targets, and the like
    assert found.activations <= kept + unseen <= found.activations + scalars


@pytest.mark.parametrize("policy", POLICIES)
def test_a_backwards_workspace_is_its_measured_peak(policy: str) -> None:
    config, rows = SHAPES[1], 2048
    layer = _block(config, torch.float32)
    cos, sin = rope_cos_sin(config, rows)
    options = BlockOptions(config.head_dim, policy=policy)
    x = torch.randn(1, rows, config.dim).requires_grad_()
    dy = torch.randn(1, rows, config.dim)
    # of what was made unseen the profiler does not see the end either
    _, _, y = harness.allocations(lambda: transformer_block(x, layer.weights(), cos, sin, options))
    inputs = [x, *layer.parameters()]
    peak, _, _ = harness.allocations(lambda: torch.autograd.grad(y, inputs, dy))
    expected = rows * plan.workspace_bytes_per_token(config, policy, 4)
    more = sum(p.nbytes for p in layer.parameters()) + x.nbytes  # the weights' gradients, and one tensor as x
    assert expected < peak + dy.nbytes < 1.05 * expected + more


@pytest.mark.parametrize("rows", [96, 4096, 8192])  # one chunk, four, and eight with a float32 copy
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loss_workspace_is_its_measured_peak(rows: int, dtype: torch.dtype) -> None:
    config = dataclasses.replace(WIDE, vocab_size=16000, max_seq_len=rows)
    hidden, weight = (torch.randn(n, WIDE.dim).to(dtype).requires_grad_() for n in (rows, 16000))
    targets = torch.randint(16000, (rows,))
    peak, _, _ = harness.allocations(lambda: lf.linear_cross_entropy(hidden, weight, targets))
    expected = plan.loss_workspace_bytes(config, rows, dtype.itemsize)
    measured = peak - hidden.nbytes - weight.nbytes
    scratch = hidden.nbytes + weight.nbytes if dtype == torch.bfloat16 else 0  # of the vendor's products
    assert expected <= measured < 1.1 * expected + scratch + 256 * rows
    found = plan.plan(config, DEVICES["h100"], Layout(), "save", seq_len=rows, itemsize=dtype.itemsize)
    assert found.workspace == max(expected, rows * plan.workspace_bytes_per_token(config, "save", dtype.itemsize))


def _without_gradients(dtype: torch.dtype, return_keys: bool = False, autocast: bool = False) -> tuple[int, int]:
    """Bytes of 512 tokens at the peak and held at the end."""
    layer, (cos, sin) = _block(WIDE, dtype), rope_cos_sin(WIDE, 512)
    x, options = torch.randn(1, 512, WIDE.dim).to(dtype), BlockOptions(WIDE.head_dim, policy="save")

    def run() -> Any:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return transformer_block(x, layer.weights(), cos, sin, options, return_keys=return_keys)

    return harness.allocations(run)[:2]


@pytest.mark.parametrize("return_keys", [False, True])
def test_without_gradients_nothing_is_kept(return_keys: bool) -> None:
    """At the peak, before SwiGLU, x's sum and norm and the two products beside each other, whatever the policy."""
    peak, held = _without_gradients(torch.float32, return_keys)
    keys = 2 * WIDE.n_kv_heads * WIDE.head_dim * return_keys
    assert held <= 4 * 512 * (WIDE.dim + keys) + 64
    assert peak <= 4 * 512 * (2 * WIDE.dim + 2 * WIDE.ffn_dim + keys + 2 + WIDE.n_heads)


def test_autocast_holds_a_copy_of_one_weight_at_a_time() -> None:
    bare, cast = _without_gradients(torch.bfloat16)[0], _without_gradients(torch.float32, autocast=True)[0]
    assert cast <= bare + 2 * 512 * WIDE.dim + 2 * WIDE.ffn_dim * WIDE.dim


def test_attention_costs_the_keys_of_its_window() -> None:
    whole, part = (dataclasses.replace(SHAPES[0], window=window) for window in (None, 40))
    more = plan.recomputed_flops_per_token(whole, T) - plan.recomputed_flops_per_token(part, T)
    assert more == 4 * whole.n_layers * whole.dim * (T - 40)
    assert plan.recomputed_flops_per_token(part, 40) == plan.recomputed_flops_per_token(whole, 40)


def test_states_are_those_of_a_real_model() -> None:
    config = SHAPES[1]
    model = lf.Llama(config, dtype=torch.float32)
    held = sum(p.nbytes for p in model.parameters())
    found = plan.plan(config, DEVICES["h100"], Layout(), seq_len=T, states="float32")
    assert (found.weights, found.gradients, found.optimizer, found.gathered) == (held, held, 2 * held, 0)
    assert found.total == 4 * held + found.activations + found.workspace


def test_layouts_divide_what_they_should() -> None:
    config = LlamaConfig.preset("llama-65b")
    arguments: dict[str, Any] = {"seq_len": 2048, "states": "mixed"}
    alone, fsdp, zero, ddp, split, rows = (
        plan.plan(config, DEVICES["h100"], layout, **arguments)
        for layout in (
            Layout(),
            Layout(64),
            Layout(64, shard="states"),
            Layout(64, shard="none"),
            Layout(8, 8),
            Layout(8, 8, sequence=True),
        )
    )
    assert alone.weights == 2 * config.n_params
    assert fsdp.weights == round(alone.weights / 64)
    assert fsdp.optimizer == zero.optimizer == round(alone.optimizer / 64)
    assert zero.weights == ddp.weights == alone.weights
    assert ddp.optimizer == alone.optimizer
    head = config.vocab_size * config.dim
    layer = (config.n_matmul_params - head) // config.n_layers
    assert fsdp.gathered == 2 * (3 * layer + 2 * head)
    assert zero.gathered == 0
    assert fsdp.activations == ddp.activations == alone.activations
    assert alone.activations / 8 < rows.activations < split.activations < alone.activations / 2
    assert not alone.fits
    assert fsdp.fits
    embeddings = 2 * config.vocab_size * config.dim + (2 * config.n_layers + 1) * config.dim
    assert split.weights == round(2 * ((config.n_params - embeddings) / 8 + embeddings))
    assert [x.tensor for x in plan.layouts(config, 2048)] == [1, 2, 4, 8]
    assert [x.tensor for x in plan.layouts(dataclasses.replace(config, n_kv_heads=2), 12)] == [1, 2]


def test_the_papers_figure() -> None:
    config, a100 = LlamaConfig.preset("llama-65b"), DEVICES["a100"]
    assert plan.mfu(config, a100, 2048, 380, attention=False) == pytest.approx(0.477, abs=5e-4)
    with_attention = plan.mfu(config, a100, 2048, 380)
    assert with_attention == pytest.approx(0.494, abs=1e-3)
    assert plan.tokens_per_second(config, a100, 2048, with_attention) == pytest.approx(380)
    assert pytest.approx(21, abs=0.2) == 1.4e12 / (380 * 2048) / 86400  # the paper's days


def test_recomputing_costs_a_forward_without_its_last_product() -> None:
    config = LlamaConfig.preset("llama-65b")
    last = config.n_layers * 2 * config.dim * config.ffn_dim
    attention = 4 * config.n_layers * config.n_heads * config.head_dim * 2048
    all_but_last = config.flops_per_token(2048) / 3 - 2 * config.vocab_size * config.dim - last
    for policy, more in (("save", 0), ("recompute-linear", all_but_last - attention), ("recompute-all", all_but_last)):
        assert plan.recomputed_flops_per_token(config, 2048, policy) == more
        assert plan.plan(config, DEVICES["a100"], Layout(), policy, seq_len=2048).recomputed == more
    assert plan.recomputed_flops_per_token(config, 2048) / config.flops_per_token(2048) == pytest.approx(0.26, abs=0.01)
    assert plan.plan(config, DEVICES["a100"], Layout(), seq_len=2048).recomputed == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seq_len": 4096}, "seq_len = 4096: expected 1 .. max_seq_len = 2048"),
        ({"seq_len": 2.5}, "seq_len = 2.5: expected 1 .. max_seq_len = 2048"),
        ({"batch_size": 0}, "batch_size = 0: expected an integer of 1 or more"),
        ({"batch_size": "a"}, "batch_size = 'a': expected an integer of 1 or more"),
        ({"itemsize": 0}, "itemsize = 0: expected an integer of 1 or more"),
        ({"states": "int8"}, "states = 'int8': expected one of float32, mixed, bfloat16"),
        ({"policy": "none"}, "policy = 'none': expected one of save, recompute-cheap, recompute-linear, recompute-all"),
        ({"layout": (9, 3)}, "tensor = 3: expected a divisor of n_kv_heads = 64"),
        ({"layout": (8, 3)}, "tensor = 3: expected a divisor of world = 8"),
        ({"layout": (0, 1)}, "world = 0: expected an integer of 1 or more"),
        ({"layout": (2.5, 1)}, "world = 2.5: expected an integer of 1 or more"),
        ({"layout": (8, 1, False, "half")}, "shard = 'half': expected one of full, states, none"),
    ],
)
def test_bad_input_is_named(arguments: dict[str, Any], message: str) -> None:
    arguments = {"seq_len": 2048, **arguments}
    with pytest.raises(ValueError, match=message):
        plan.plan(LlamaConfig.preset("llama-65b"), DEVICES["h100"], Layout(*arguments.pop("layout", ())), **arguments)


def _call(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["llama-fast", "plan", *args])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    captured = capsys.readouterr()
    return int(stopped.value.code or 0), captured.out, captured.err


def test_the_command_prints_layouts_policies_and_the_paper(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = _call(monkeypatch, capsys, "--preset", "llama-65b", "--device", "h100", "--world", "2048")
    assert status == 0, err
    for text in ("65.29 G parameters", "tensor 8+sequence, FSDP 256", "recompute-all", "47.7% MFU"):
        assert text in out
    assert "days on 2048" in out
    status, out, _ = _call(
        monkeypatch, capsys, "--preset", "llama-7b", "--tensor", "1", "--shard", "none", "--policy", "save"
    )
    assert status == 0
    assert "DDP 1" in out
    assert "recompute-cheap" not in out
    assert _call(monkeypatch, capsys, "--preset", "llama-7b", "--device", "v100")[2] == (
        "llama-fast: device = 'v100': expected one of a100, h100, h200, b200\n"
    )
    assert "mfu = 2.0: expected a share" in _call(monkeypatch, capsys, "--preset", "llama-7b", "--mfu", "2")[2]
