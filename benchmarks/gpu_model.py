"""What `benchmarks.gpu test` checks beyond single ops: the block, this package's model, patched transformers models.

Each by every backend of ours that is asked for and by the one that is chosen without asking ("chosen"), against float64
on the same device by the backend `reference`. Errors are root-mean-square, relative to the result's size: the ops'
budgets are checked op by op, here it is how they are put together. What LoRA adds is as large as the products, and its
gradients, of B above all, are sums that cancel: they are given ADDED times the tolerance.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

import llama_fast as lf
from benchmarks.gpu_cases import DTYPES
from benchmarks.gpu_run import OURS, Check, Row
from benchmarks.gpu_time import Clock
from benchmarks.harness import first_line
from llama_fast.block import POLICIES, BlockOptions, Weights, transformer_block
from llama_fast.low_rank import LINEAR, LowRank
from llama_fast.plain import PlainLlama

PARTS = ("block", "llama", "hf")
TOLERANCE = {"bfloat16": 4e-2, "float16": 6e-3, "float32": 1e-4}
ADDED = 4.0
ARCHITECTURES: dict[str, dict[str, int]] = {"Llama": {}, "Mistral": {"sliding_window": 7}, "Qwen2": {}, "Qwen3": {}}
# of a LlamaConfig, beside its sizes
CONFIGS: dict[str, dict[str, Any]] = {
    "LLaMA": {},
    "biases": {"qkv_bias": True},
    "norms of heads": {"qk_norm": True},
    "window": {"window": 7},
}
# of the block: options of its call
VARIANTS = ("plain", "biases and norms of heads", "window", "packed", "padded", "LoRA", "LoRA with dropout")
_CAPTURED = ("plain", "LoRA")


def units(parts: Sequence[str], tiny: bool) -> list[Row]:
    """The checks of these parts."""
    found: list[Row] = []
    names = ["float32"] if tiny else list(DTYPES)
    for name in names:
        if "block" in parts:
            found += [{"kind": "block", "op": "block", "variant": v, "dtype": name} for v in VARIANTS]
        if "llama" in parts:
            found += [{"kind": "llama", "op": "llama", "has": has, "dtype": name} for has in CONFIGS]
    if "hf" in parts:
        for name in ["float32"] if tiny else ["float32", "bfloat16"]:
            found += [{"kind": "hf", "op": "hf", "architecture": a, "dtype": name} for a in ARCHITECTURES]
    return found


def _by_backend(unit: Row, args: argparse.Namespace, label: str, check: Callable[[], str]) -> Iterator[Row]:
    """A row for each backend: what `check` finds wrong with it."""
    for backend in [*(b for b in args.backends if b in (*OURS, "cpu")), "chosen"]:
        row = unit | {"backend": backend, "label": label}
        try:
            with contextlib.nullcontext() if backend == "chosen" else lf.backend(backend):
                row["problem"] = check()
        except lf.NotSupported as error:
            row["objection"] = str(error).splitlines()[-1].partition(": ")[2]
        except Exception as error:
            row["problem"] = first_line(error)
        yield row


def _worst(found: Sequence[Tensor], truth: Sequence[Tensor], names: Sequence[str], most: float) -> str:
    """The tensor whose relative error is largest, where that is above `most`."""
    errors = {}
    for name, got, want in zip(names, found, truth, strict=True):
        size = want.double().square().mean().sqrt().item()
        error = (got.double() - want.double()).square().mean().sqrt().item()
        errors[name] = error / size if size else error
    name = max(errors, key=lambda n: errors[n] if errors[n] == errors[n] else float("inf"))
    return "" if errors[name] <= most else f"{name}: error {errors[name]:.2g} of its size, expected {most:g}"


# ---- the block ------------------------------------------------------------------------------------------------------
class Block:
    """A small block of one variant: its parameters and inputs in float64, holding numbers of `rounded`."""

    def __init__(self, variant: str, rounded: torch.dtype, device: str, tiny: bool) -> None:
        B, T, C, H, G, D, F = (2, 9, 32, 2, 1, 16, 40) if tiny else (2, 150, 256, 4, 2, 64, 352)
        self.variant, self.device = variant, device
        self.D, self.window = D, T // 3 if variant == "window" else 0
        drawn = torch.Generator().manual_seed(0)

        def draw(*size: int) -> Tensor:
            return torch.randn(size, generator=drawn).to(rounded).double().to(device)

        def matrix(V: int, C: int) -> Tensor:
            return (draw(V, C) / C**0.5).to(rounded).double()

        sizes = ((H * D, C), (G * D, C), (G * D, C), (C, H * D), (F, C), (F, C), (C, F))
        linear = [matrix(*size) for size in sizes]
        gains = [1 + 0.25 * draw(C).sign() for _ in range(2)]
        more = [draw(H * D), draw(G * D), draw(G * D), *(1 + 0.25 * draw(D).sign() for _ in range(2))]
        given = more if variant.startswith("biases") else []
        parts: list[Any] = [gains[0], *linear[:4], gains[1], *linear[4:], *given]
        self.weights = Weights(*parts)
        self.added = {}
        if variant.startswith("LoRA"):
            for name, (V, C_) in zip(LINEAR, sizes, strict=True):
                self.added[name] = (matrix(4, C_), matrix(V, 4))
        self.dropout = 0.25 if variant.endswith("dropout") else 0.0
        self.x, self.dy = ((draw(1, B * T, C) if variant == "packed" else draw(B, T, C)) for _ in range(2))
        T = self.x.shape[1]
        angles = torch.arange(T, device=device).unsqueeze(1) * 100.0 ** -torch.linspace(0, 1, D // 2, device=device)
        self.cos, self.sin = angles.cos(), angles.sin()
        self.context: dict[str, Any] = {}
        if variant == "packed":
            self.context["cu_seqlens"] = torch.tensor([0, 5, 5, T // 2 + 1, T], dtype=torch.int32, device=device)
        if variant == "padded":
            self.context["spans"] = ((0, T - 3), (4, T))

    def given(self, dtype: torch.dtype) -> list[Tensor]:
        """x and all parameters, with gradients to come."""
        tensors = [self.x, *self.weights.given(), *(t for ab in self.added.values() for t in ab)]
        return [t.to(dtype).clone().requires_grad_() for t in tensors]

    def names(self) -> list[str]:
        weights = [n for n, w in zip(Weights._fields, self.weights, strict=True) if w is not None]
        return ["x", *weights, *(f"{part} of {name}" for name in self.added for part in "AB")]

    def y(self, given: Sequence[Tensor], policy: str = POLICIES[0], call: Callable[..., Any] | None = None) -> Tensor:
        x, rest = given[0], iter(given[1:])
        parts: list[Any] = [None if w is None else next(rest) for w in self.weights]
        weights = Weights(*parts)
        added = {name: LowRank(next(rest), next(rest), 2.0, self.dropout) for name in self.added}
        options = BlockOptions(self.D, policy=policy, window=self.window)
        return (call or transformer_block)(x, weights, self.cos, self.sin, options, low_rank=added, **self.context)

    def run(self, given: Sequence[Tensor], policy: str = POLICIES[0], **more: Any) -> list[Tensor]:
        """y and the gradients of all that is given."""
        torch.manual_seed(1)
        y = self.y(given, policy, **more)
        return [y.detach(), *torch.autograd.grad(y, list(given), self.dy.to(y.dtype))]


def _slope_problem(block: Block) -> str:
    """The gradients in float64 against the difference of two forwards, in a random direction."""
    given, step = block.given(torch.float64), 1e-6
    gradients = block.run(given)[1:]
    drawn = torch.Generator(block.device).manual_seed(2)
    steps = [torch.randn(t.shape, generator=drawn, device=block.device, dtype=t.dtype) * step for t in given]
    values = []
    for sign in (1, -1):
        torch.manual_seed(1)
        with torch.no_grad():
            values.append((block.y([t + sign * s for t, s in zip(given, steps, strict=True)]) * block.dy).sum())
    slope = sum((g * s).sum() for g, s in zip(gradients, steps, strict=True))
    found = ((values[0] - values[1]) / 2).item()
    error = abs(float(slope) - found) / max(abs(found), step)
    return "" if error < 1e-5 else f"the gradients give a slope that is {error:.2g} away from that of the results"


def check_block(unit: Row, args: argparse.Namespace) -> Iterator[Row]:
    """Every policy against float64, whose gradients are held to its results; repeats; a CUDA graph; torch.compile."""
    name, variant = unit["dtype"], unit["variant"]
    dtype = DTYPES[name]
    block = Block(variant, dtype, args.device, args.tiny)
    with lf.backend("reference"):
        truth = block.run(block.given(torch.float64))
        if name == "float32":
            yield unit | {"backend": "reference", "label": "gradients", "problem": _slope_problem(block)}
    names, most = ["y", *block.names()], TOLERANCE[name] * (ADDED if block.added else 1.0)

    def check() -> str:
        clock = Clock(torch.device(args.device))
        with clock.current():
            given = block.given(dtype)
            for policy in POLICIES:
                found = block.run(given, policy)
                if wrong := _worst(found, truth, names, most):
                    return f"{policy}: {wrong}"
            if not _same(found, block.run(given, POLICIES[-1])):
                return "two runs differ"
            if variant in _CAPTURED and clock.gpu:
                y = block.y(given)
                dy = block.dy.to(dtype)
                prepared = clock.prepare(lambda: [y, *torch.autograd.grad(block.y(given), given, dy)])
                if prepared.no_graph:
                    return f"not captured in a CUDA graph: {prepared.no_graph}"
                prepared.run()
                clock.wait()
                if wrong := _worst(prepared.kept[1:], truth[1:], names[1:], most):
                    return f"in a graph: {wrong}"
        if variant == "plain" and name != "float16":
            torch.compiler.reset()
            compiled = torch.compile(transformer_block, fullgraph=True, backend="aot_eager")
            if wrong := _worst(block.run(given, call=compiled), truth, names, most):
                return f"compiled: {wrong}"
        return ""

    yield from _by_backend(unit, args, variant, check)


def _same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# ---- the model ------------------------------------------------------------------------------------------------------
def check_llama(unit: Row, args: argparse.Namespace) -> Iterator[Row]:
    """Loss and gradients against float64; in float32 the tokens of a generation, alone and beside a longer prompt."""
    name = unit["dtype"]
    sizes = (32, 2, 2, 1, 40, 33, 64) if args.tiny else (256, 2, 4, 2, 352, 515, 256)
    config = lf.LlamaConfig(*sizes, **CONFIGS[unit["has"]])
    plain = PlainLlama(config, device=args.device, dtype=DTYPES[name])
    with torch.no_grad():
        for p in plain.parameters():
            if p.ndim == 1:  # gains that are not one, biases that are not zero
                p.add_(0.25 * torch.linspace(-1, 1, len(p), device=args.device).to(p.dtype))
    exact = PlainLlama(config, device=args.device, dtype=torch.float64)
    exact.load_state_dict(plain.state_dict())
    drawn = torch.Generator().manual_seed(0)
    tokens = torch.randint(config.vocab_size, (2, 40), generator=drawn).to(args.device)

    def gradients(model: nn.Module) -> list[Tensor]:
        loss = model.loss(tokens[:, :-1], tokens[:, 1:].contiguous())  # type: ignore[operator]
        return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))]

    names, truth = ["loss", *(n for n, _ in exact.named_parameters())], gradients(exact)

    def check() -> str:
        model = lf.Llama(config, device=args.device, dtype=DTYPES[name])
        model.load_state_dict(plain.state_dict())
        if wrong := _worst(gradients(model), truth, names, TOLERANCE[name]):
            return wrong
        if name != "float32":
            return ""
        prompts = [tokens[0, :9].tolist(), tokens[1, :4].tolist()]
        expected = []
        for prompt in prompts:
            ids = torch.tensor([prompt], device=args.device)
            with torch.no_grad():
                for _ in range(8):
                    ids = torch.cat((ids, exact(ids)[:, -1:].argmax(-1)), dim=1)
            expected.append(ids[0].tolist())
        found = model.generate(prompts, max_new_tokens=8)
        return "" if list(map(list, found)) == expected else f"generated {found}, expected {expected}"

    yield from _by_backend(unit, args, f"{unit['has']}: loss, gradients, generation", check)


# ---- transformers ---------------------------------------------------------------------------------------------------
def check_hf(unit: Row, args: argparse.Namespace) -> Iterator[Row]:
    """A patched model against the stock one in float32, then with adapters of PEFT's, with dropout and without."""
    label = f"{unit['architecture']}, patched"
    if find_spec("transformers") is None:
        yield unit | {"backend": "chosen", "label": label, "objection": "transformers is not installed"}
        return
    dtype, tolerance = DTYPES[unit["dtype"]], TOLERANCE[unit["dtype"]]
    tokens = torch.randint(3, 97, (2, 19), generator=torch.Generator().manual_seed(0)).to(args.device)
    mask = torch.ones_like(tokens)
    mask[1, :5] = 0  # padding in front, as in a generation

    def run(model: Any) -> dict[str, Tensor]:
        torch.manual_seed(1)
        model.zero_grad()
        logits = model(tokens, attention_mask=mask).logits[mask.bool()]
        logits.float().square().mean().backward()
        return {"logits": logits.detach(), **{n: p.grad for n, p in model.named_parameters() if p.grad is not None}}

    def not_the_block(ours: Any) -> str:
        ran = {m._llama_fast.last for m in ours.modules() if hasattr(m, "_llama_fast")}
        return "" if ran == {"block"} else f"ran {ran}, expected the block"

    def compare(ours: Any, theirs: Any, most: float) -> str:
        found, want = run(ours), run(theirs)
        if found.keys() != want.keys():
            return f"gradients of {sorted(found.keys() ^ want.keys())} are there on one side alone"
        if wrong := not_the_block(ours):
            return wrong
        return _worst(list(found.values()), list(want.values()), list(want), most)

    def check() -> str:
        ours, theirs = (_model(unit["architecture"], args.device, args.tiny) for _ in range(2))
        lf.hf.patch(ours.to(dtype))
        if wrong := compare(ours, theirs, tolerance):
            return wrong
        if dtype == torch.float32:
            call = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
            if not torch.equal(ours.generate(tokens, **call), theirs.generate(tokens, **call)):
                return "generate gives other tokens"
        if find_spec("peft") is None:
            return ""
        ours, theirs = (_adapted(m) for m in (ours, theirs))
        if wrong := compare(ours, theirs, ADDED * tolerance):
            return f"LoRA: {wrong}"
        for module in ours.modules():
            if hasattr(module, "lora_dropout"):
                module.lora_dropout["default"] = nn.Dropout(0.25)
        first, second = run(ours), run(ours)
        if wrong := not_the_block(ours):
            return f"LoRA with dropout: {wrong}"
        without = run(ours.eval())
        if not _same(list(first.values()), list(second.values())):
            return "LoRA with dropout: two runs from the same seed differ"
        return "LoRA with dropout: drops nothing" if torch.equal(first["logits"], without["logits"]) else ""

    yield from _by_backend(unit, args, label, check)
    if find_spec("peft") is None:
        yield unit | {"backend": "chosen", "label": f"{label}, LoRA", "objection": "peft is not installed"}


def _model(architecture: str, device: str, tiny: bool) -> Any:
    """A small model in float32, whose gains are not one and whose biases are not zero."""
    import transformers

    D = 16 if tiny else 64
    sizes = {"hidden_size": 4 * D, "intermediate_size": 112, "num_hidden_layers": 2, "vocab_size": 97}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "initializer_range": 0.12}
    more = ARCHITECTURES[architecture] | ({"head_dim": D} if architecture == "Qwen3" else {})
    config = getattr(transformers, f"{architecture}Config")(**sizes, **heads, **special, **more)
    torch.manual_seed(0)
    model = getattr(transformers, f"{architecture}ForCausalLM")(config).to(device)
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 1:
                p.add_(0.1 * torch.randn(p.shape).to(device))
            p.copy_(p.bfloat16())  # numbers that every dtype holds
    return model


def _adapted(model: Any) -> Any:
    import peft

    options: dict[str, Any] = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    torch.manual_seed(0)
    model = peft.get_peft_model(model, peft.LoraConfig(**options)).train()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_((0.2 * torch.randn(p.shape)).bfloat16())
    return model


CHECKS: dict[str, Check] = {"block": check_block, "llama": check_llama, "hf": check_hf}
