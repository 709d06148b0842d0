"""The block, the training step, the step of LoRA and the decode, each in every way that people would run it: same
weights, same tokens.

Providers: ours with each policy of the block; `llama_fast:hf`, transformers' model patched by `lf.hf.patch`; `eager`,
the plain PyTorch of plain.py; transformers as it is, under torch.compile, with Liger's kernels, and with
torch.utils.checkpoint around each layer. All share one set of weights and one optimizer, so that they fit beside each
other and can take turns. Flops are model flops, 6 N and attention (`LlamaConfig.flops_per_token`; what a policy
computes twice does not count), so a line's share of the matrix rate is its MFU against the measured peak. On a GPU the
shapes are layers of published models; on a CPU they are small.

Legend: B batch, T tokens, C width, F ffn width, H heads, L layers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import llama_fast
from llama_fast.block import POLICIES
from llama_fast.config import LlamaConfig, rope_cos_sin
from llama_fast.model import Llama
from llama_fast.nn import TransformerBlock
from llama_fast.plain import PlainLlama

from . import harness
from .results import OURS, Line

# hidden 768, ffn 2048, 6 layers, 12 heads, vocabulary 32000: 92 M parameters with both embeddings
SMALL = LlamaConfig(768, 6, 12, 12, 2048, 32000, 2048)
WIDE = LlamaConfig(2048, 1, 16, 16, 5504, 32, 2048)  # a block of a model of 1.3 G parameters
PROMPT, NEW_TOKENS = 16, 64
RANK = 16  # of LoRA
DEFAULT = "recompute-cheap"
PATCHED = f"{OURS}:hf"
# Relative root-mean-square difference from eager PyTorch in the same dtype. The error budget is the ops' own tests'.
TOLERANCE = {torch.bfloat16: 3e-2, torch.float32: 1e-3}


@dataclass
class Side:
    """A provider of a scenario.

    Args:
        run: does the work once.
        values: gives tensors that must agree with those of every other side.
        kept: gives the bytes that one layer keeps between forward and backward; None where that is not measured.
    """

    run: Callable[[], Any]
    values: Callable[[], list[Tensor]]
    kept: Callable[[], int] | None = None


Builder = Callable[["Scenario"], Iterator[tuple[str, Callable[[], Side] | str]]]


@dataclass(frozen=True)
class Scenario:
    """Work that several providers do alike.

    Args:
        op: "block", "training_step", "lora_step" or "decode".
        config: the model, its `n_layers` those that are measured.
        label: whose shape it is, or what else sets it apart; "" for one of the small ones.
        B, T: sequences and their tokens.
        dtype: of weights and computation.
        device: "cpu" or "cuda".
        dropout: before the adapters of "lora_step".
    """

    op: str
    config: LlamaConfig
    label: str
    B: int
    T: int
    dtype: torch.dtype
    device: str = "cpu"
    dropout: float = 0.0

    @property
    def name(self) -> str:
        return " ".join(filter(None, (self.op, harness.dtype_name(self.dtype), self.label)))

    @property
    def tokens(self) -> int:
        return NEW_TOKENS * self.B if self.op == "decode" else self.B * self.T

    def sides(self) -> dict[str, Callable[[], Side] | str]:
        """Provider -> what makes it, or why it cannot run here. Makers share weights; ours come first."""
        makers = {"block": _block, "training_step": _training_step, "lora_step": _lora_step, "decode": _decode}
        return dict(makers[self.op](self))

    def facts(self) -> dict[str, Any]:
        """The fields of a result line that are the same for all providers."""
        c = self.config
        case: dict[str, Any] = {
            "B": self.B,
            "T": self.T,
            "C": c.dim,
            "F": c.ffn_dim,
            "H": c.n_heads,
            "G": c.n_kv_heads,
            "L": c.n_layers,
        }
        flops, moved = self.tokens * c.flops_per_token(self.T), 0
        if self.op == "block":
            flops -= self.tokens * 6 * c.vocab_size * c.dim
        else:
            case["V"] = c.vocab_size
        if self.op == "lora_step":  # of the weights' gradients none is made
            flops -= 2 * self.tokens * c.n_matmul_params
            case["r"] = RANK
            case |= {"dropout": self.dropout} if self.dropout else {}
        if self.op == "decode":  # every step reads the weights once
            moved, flops = NEW_TOKENS * c.n_matmul_params * self.dtype.itemsize, 2 * self.tokens * c.n_matmul_params
        directions = {"block": "forward+backward", "lora_step": "forward+backward", "training_step": "step"}
        place = "" if self.device == "cpu" else f" --device {self.device}"
        return {
            "op": self.op,
            "label": self.label,
            "case": case,
            "dtype": harness.dtype_name(self.dtype),
            "direction": directions.get(self.op, self.op),
            "bytes": moved,
            "flops": flops,
            "tokens": self.tokens,
            "command": f"llama-fast bench --op {self.op} --case '{self.name}'{place}",
        }


def providers(op: str) -> list[str]:
    """Every provider of a scenario's op, by name."""
    if op == "decode":
        return [OURS, PATCHED, "eager", "transformers"]
    if op == "lora_step":
        return [PATCHED, "transformers", "transformers+checkpoint"]
    ours = [f"{OURS}:{policy}" for policy in (DEFAULT, *(p for p in POLICIES if p != DEFAULT))]
    return [*ours, *([PATCHED] if op == "training_step" else []), "eager", *_WAYS]


def measure(
    scenario: Scenario,
    seconds: float = 4.0,
    choose: Callable[[str], bool] = lambda name: True,
    until: float = math.inf,
    keep: Callable[[list[Line]], Any] = lambda lines: None,
) -> list[Line]:
    """The lines of a scenario, of every provider chosen; see `results.against`.

    Args:
        scenario: what to run.
        seconds: for each provider, about.
        choose: which providers.
        until: time.perf_counter() after which no provider is begun. Where there is such an end, each provider is timed
            once before the next one is made, and again in turn with the others if there is time.
        keep: given the lines known so far after every provider.
    """
    torch.compiler.reset()
    # which the others are compared with
    reference, called = ("transformers",) * 2 if scenario.op == "lora_step" else ("eager", "eager PyTorch")
    made = {n: maker for n, maker in scenario.sides().items() if choose(n) or n == reference}
    wait = harness.waiter(scenario.device)
    sides: dict[str, Side] = {}
    found: dict[str, dict[str, Any]] = {}  # provider -> fields of its line
    truth: list[Tensor] = []

    def lines() -> list[Line]:
        blank = {"status": "measured", "reason": "", "error": None, "seconds": None, "peak_bytes": None}
        blank |= {"kept_bytes": None, "limit": None, "share": None}
        return [Line(**scenario.facts(), provider=n, **blank | found[n]) for n in made if n in found and choose(n)]

    for name in sorted(made, key=lambda n: n != reference):
        maker = made[name]
        if truth and time.perf_counter() > until:
            maker = "no time left"
        if isinstance(maker, str):
            found[name] = {"status": "not run", "reason": maker}
            continue
        try:
            side = maker()
            values = side.values()
        except Exception as error:  # another library's failure, whatever it is, must not end the run
            found[name] = {"status": "not run", "reason": harness.first_line(error)}
            continue
        truth = truth or values
        gap = _gap(values, truth)
        if gap > TOLERANCE[scenario.dtype]:
            found[name] = {"status": "wrong", "reason": f"differs from {called} by {gap:.2g}, root-mean-square"}
        elif choose(name):
            sides[name] = side
            found[name] = {"kept_bytes": side.kept() if side.kept is not None else None}
            if scenario.op != "decode":  # its weights and its cache are what it takes
                found[name]["peak_bytes"] = harness.allocations(side.run, scenario.device)[0]
            if until < math.inf:
                found[name]["seconds"] = harness.interleave({name: side.run}, 0.0, least=2, wait=wait)[name]
                keep(lines())
    seconds = min(seconds, max(0.0, until - time.perf_counter()) / max(1, len(sides)))
    if sides and time.perf_counter() < until:
        few: dict[str, Any] = {"least": 3} if until < math.inf else {}
        timings = harness.interleave({n: x.run for n, x in sides.items()}, seconds, wait=wait, **few)
        for name, timing in timings.items():
            found[name]["seconds"] = timing
    keep(lines())
    return lines()


def _gap(found: list[Tensor], truth: list[Tensor]) -> float:
    """Largest relative root-mean-square difference; infinity where something is not finite."""
    worst = 0.0
    for a, b in zip(found, truth, strict=True):
        difference, size = (x.double().square().mean().sqrt().item() for x in (a - b, b))
        gap = difference / max(size, 1e-30)
        worst = max(worst, math.inf if math.isnan(gap) else gap)
    return worst


# ---- transformers ---------------------------------------------------------------------------------------------------
def _transformers_config(c: LlamaConfig) -> Any:
    from transformers import LlamaConfig as TheirConfig

    return TheirConfig(
        hidden_size=c.dim,
        intermediate_size=c.ffn_dim,
        num_hidden_layers=c.n_layers,
        num_attention_heads=c.n_heads,
        num_key_value_heads=c.n_kv_heads,
        head_dim=c.head_dim,
        vocab_size=c.vocab_size,
        max_position_embeddings=c.max_seq_len,
        rms_norm_eps=c.norm_eps,
        rope_theta=c.rope_theta,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope_theta},
        attn_implementation="sdpa",
        pad_token_id=None,  # with one, its embedding gets no gradient
    )


def _transformers_model(c: LlamaConfig, ours: nn.Module) -> Any:
    """transformers' model with our parameters themselves."""
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        theirs = LlamaForCausalLM(_transformers_config(c))
    renamed = {n if n.startswith("lm_head") else f"model.{n}": p for n, p in ours.state_dict(keep_vars=True).items()}
    theirs.load_state_dict(renamed, assign=True)
    with next(ours.parameters()).device:  # its tables are no parameters
        theirs.model.rotary_emb = type(theirs.model.rotary_emb)(theirs.config)
    return theirs


def _with_liger(model: Any) -> Callable[[], contextlib.AbstractContextManager[None]]:
    """Applies Liger-Kernel to transformers' model and gives the context in which it runs.

    Liger replaces names in transformers' module, one of which is looked up at every call: outside they are restored, or
    plain transformers would be timed with Liger's rope.
    """
    from liger_kernel.transformers import apply_liger_kernel_to_llama
    from transformers.models.llama import modeling_llama

    names = vars(modeling_llama)
    before = dict(names)
    apply_liger_kernel_to_llama(model=model)
    theirs = {n: x for n, x in names.items() if n in before and x is not before[n]}

    @contextlib.contextmanager
    def context() -> Iterator[None]:
        names.update(theirs)
        try:
            yield
        finally:
            names.update((n, before[n]) for n in theirs)

    with context():
        return context


def _missing(device: str, *modules: tuple[str, str]) -> str | None:
    for module, package in modules:
        if find_spec(module) is None:
            return f"not installed: pip install {package}"
    if any(module == "liger_kernel" for module, _ in modules) and device != "cuda":
        return "runs on cuda only"
    return None


_THEIRS, _LIGER = ("transformers", "transformers"), ("liger_kernel", "liger-kernel")
_WAYS = {  # provider -> what it needs
    "transformers": (_THEIRS,),
    "transformers+liger": (_LIGER, _THEIRS),
    "transformers+checkpoint": (_THEIRS,),
    "torch.compile": (_THEIRS,),  # last: its compiler takes up to a minute
}


def _drawn(module: Any, device: str) -> Any:
    """A module of the meta device with weights drawn on `device`: billions of them take minutes on a processor."""
    module = module.to_empty(device=device)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.fill_(1.0) if p.ndim == 1 else p.normal_(0.0, 0.02)
    return module


# ---- the block ------------------------------------------------------------------------------------------------------
def _held_by_a_layer(layer: Callable[[Tensor], Tensor], x: Tensor) -> int:
    """Bytes that one layer of several keeps between forward and backward, its input among them: two less one."""
    device = x.device.type
    held = [harness.allocations(run, device)[1] for run in (lambda: layer(x), lambda: layer(layer(x)))]
    return held[1] - held[0]


def _block(s: Scenario) -> Iterator[tuple[str, Callable[[], Side] | str]]:
    """One block, forward and backward, its gradients of input and weights."""
    c = s.config
    like: dict[str, Any] = {"device": s.device, "dtype": s.dtype}
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(s.B, s.T, c.dim, generator=generator).to(**like) for _ in range(2))
    x.requires_grad_()
    cos, sin = rope_cos_sin(c, s.T, s.device)
    plain = _drawn(PlainLlama(dataclasses.replace(c, n_layers=1), device="meta", dtype=s.dtype).layers[0], s.device)
    shared = plain.state_dict(keep_vars=True)
    parameters = list(plain.parameters())

    def side(layer: Callable[[Tensor], Tensor]) -> Side:
        def run() -> tuple[Tensor, ...]:
            return torch.autograd.grad(layer(x), [x, *parameters], dy)

        def values() -> list[Tensor]:
            y = layer(x)
            return [y.detach(), *torch.autograd.grad(y, [x, *parameters], dy)]

        return Side(run, values, partial(_held_by_a_layer, layer, x))

    def ours(policy: str) -> Side:
        block = TransformerBlock(
            c.dim, c.n_heads, c.ffn_dim, c.n_kv_heads, c.head_dim, c.norm_eps, policy, device="meta"
        )
        block.load_state_dict(shared, assign=True)
        return side(lambda x: block(x, cos, sin))

    def theirs(way: str) -> Side:
        from transformers.models.llama.modeling_llama import LlamaDecoderLayer

        context: Callable[[], Any] = contextlib.nullcontext
        if way == "transformers+liger":
            small = dataclasses.replace(c, n_layers=1, vocab_size=32)
            whole = _transformers_model(small, PlainLlama(small, **like))
            context, layer = _with_liger(whole), whole.model.layers[0]
        else:
            with torch.device("meta"):
                layer = LlamaDecoderLayer(_transformers_config(c), layer_idx=0)
        layer.load_state_dict(shared, assign=True)
        doubled = tuple(torch.cat((t, t), dim=-1).unsqueeze(0).to(s.dtype) for t in (cos, sin))

        def forward(x: Tensor) -> Tensor:
            with context():
                y = layer(x, attention_mask=None, position_embeddings=doubled)
            return y[0] if isinstance(y, tuple) else y

        if way == "torch.compile":
            return side(torch.compile(forward))
        if way == "transformers+checkpoint":
            return side(lambda x: checkpoint(forward, x, use_reentrant=False))  # type: ignore[return-value]
        return side(forward)

    for policy in (DEFAULT, *(p for p in POLICIES if p != DEFAULT)):
        yield f"{OURS}:{policy}", partial(ours, policy)
    yield "eager", lambda: side(lambda x: plain(x, cos.to(s.dtype), sin.to(s.dtype)))
    for way, needs in _WAYS.items():
        yield way, _missing(s.device, *needs) or partial(theirs, way)


# ---- the training step ----------------------------------------------------------------------------------------------
def _training_step(s: Scenario) -> Iterator[tuple[str, Callable[[], Side] | str]]:
    """Loss, backward and AdamW."""
    c = s.config
    model = _drawn(Llama(c, device="meta", dtype=s.dtype), s.device)
    # at a rate of 0 a step does its whole work and leaves the weights, so that what runs later computes the same
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
    tokens = torch.randint(c.vocab_size, (s.B, s.T + 1), generator=torch.Generator().manual_seed(0)).to(s.device)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def side(loss: Callable[[], Tensor]) -> Side:
        def run() -> None:
            loss().backward()
            optimizer.step()
            optimizer.zero_grad()

        def values() -> list[Tensor]:
            found = loss()
            found.backward()
            norms = [p.grad.float().norm() for p in model.parameters() if p.grad is not None]
            optimizer.zero_grad()
            return [found.detach(), torch.stack(norms)]

        return Side(run, values)

    def ours(policy: str) -> Side:
        def loss() -> Tensor:
            model.set_policy(policy)
            return model.loss(inputs, targets)

        return side(loss)

    def eager() -> Side:
        with torch.device("meta"):
            plain = PlainLlama(c)
        plain.load_state_dict(model.state_dict(keep_vars=True), assign=True)
        return side(lambda: plain.loss(inputs, targets))

    def theirs(way: str) -> Side:
        their = _transformers_model(c, model)
        context = _with_liger(their) if way == "transformers+liger" else contextlib.nullcontext
        if way == PATCHED:
            llama_fast.hf.patch(their, fused_loss=True)
        if way == "transformers+checkpoint":
            their.gradient_checkpointing_enable({"use_reentrant": False})
            their.train()
        call = torch.compile(their) if way == "torch.compile" else their

        def loss() -> Tensor:
            with context():
                return call(input_ids=inputs, labels=inputs, shift_labels=targets, use_cache=False).loss

        return side(loss)

    for policy in (DEFAULT, *(p for p in POLICIES if p != DEFAULT)):
        yield f"{OURS}:{policy}", partial(ours, policy)
    yield PATCHED, _missing(s.device, _THEIRS) or partial(theirs, PATCHED)
    yield "eager", eager
    for way, needs in _WAYS.items():
        yield way, _missing(s.device, *needs) or partial(theirs, way)


# ---- the step of LoRA -----------------------------------------------------------------------------------------------
def _lora_step(s: Scenario) -> Iterator[tuple[str, Callable[[], Side] | str]]:
    """Loss and backward with PEFT's adapters on every projection, in float32 as PEFT has them, all else frozen."""
    c = s.config
    model = _drawn(Llama(c, device="meta", dtype=s.dtype), s.device).requires_grad_(False)
    tokens = torch.randint(c.vocab_size, (s.B, s.T + 1), generator=torch.Generator().manual_seed(0)).to(s.device)
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()
    x = torch.randn(s.B, s.T, c.dim, generator=torch.Generator().manual_seed(0)).to(s.device, s.dtype).requires_grad_()

    def side(way: str) -> Side:
        import peft

        their = _transformers_model(c, model)
        torch.manual_seed(0)
        options: dict[str, Any] = {
            "r": RANK,
            "lora_alpha": 2 * RANK,
            "lora_dropout": s.dropout,
            "target_modules": "all-linear",
        }
        adapted = peft.get_peft_model(their, peft.LoraConfig(task_type="CAUSAL_LM", **options))
        trained = [p for p in adapted.parameters() if p.requires_grad]
        with torch.no_grad():
            for p in trained:
                p.normal_(0.0, 0.02)  # PEFT begins with B = 0
        if way == PATCHED:
            llama_fast.hf.patch(adapted, fused_loss=True)
        if way == "transformers+checkpoint":
            adapted.gradient_checkpointing_enable({"use_reentrant": False})
        adapted.train()

        def gradients() -> tuple[Tensor, ...]:
            loss = adapted(input_ids=inputs, labels=inputs, shift_labels=targets, use_cache=False).loss
            return (loss.detach(), *torch.autograd.grad(loss, trained))

        def layer(x: Tensor) -> Tensor:
            places = torch.arange(s.T, device=s.device).unsqueeze(0)
            y = their.model.layers[0](x, position_embeddings=their.model.rotary_emb(x, places), position_ids=places)
            return y[0] if isinstance(y, tuple) else y

        def values() -> list[Tensor]:
            adapted.train(not s.dropout)  # on a GPU it drops other numbers here than there
            loss, *found = gradients()
            adapted.train()
            return [loss, torch.stack([g.float().norm() for g in found])]

        return Side(gradients, values, None if "checkpoint" in way else partial(_held_by_a_layer, layer, x))

    for way in providers("lora_step"):
        yield way, _missing(s.device, _THEIRS, ("peft", "peft")) or partial(side, way)


# ---- the decode -----------------------------------------------------------------------------------------------------
def _decode(s: Scenario) -> Iterator[tuple[str, Callable[[], Side] | str]]:
    """NEW_TOKENS greedy tokens after a prompt; all sides must give the logits of eager PyTorch after the prompt."""
    c = s.config
    model = _drawn(Llama(c, device="meta", dtype=s.dtype), s.device).requires_grad_(False)
    prompt = torch.randint(1, c.vocab_size, (s.B, PROMPT), generator=torch.Generator().manual_seed(0)).to(s.device)

    def no_grad(logits: Callable[[Tensor], Tensor]) -> Callable[[], list[Tensor]]:
        def values() -> list[Tensor]:
            with torch.no_grad():
                return [logits(prompt)[:, -1].float()]

        return values

    def eager() -> Side:
        with torch.device("meta"):
            plain = PlainLlama(c)
        plain.load_state_dict(model.state_dict(keep_vars=True), assign=True)

        @torch.no_grad()
        def run() -> None:  # without a cache of keys and values: what plain PyTorch costs
            tokens = prompt
            for _ in range(NEW_TOKENS):
                tokens = torch.cat((tokens, plain(tokens)[:, -1:].argmax(-1)), dim=1)

        return Side(run, no_grad(plain))

    def theirs(way: str) -> Side:
        their = _transformers_model(c, model)
        if way == PATCHED:
            llama_fast.hf.patch(their)
        length = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
        arguments = {**length, "do_sample": False, "pad_token_id": 0}
        mask = torch.ones_like(prompt)
        run = lambda: their.generate(prompt, attention_mask=mask, **arguments)  # noqa: E731
        return Side(run, no_grad(lambda p: their(p).logits))

    yield OURS, lambda: Side(lambda: model.generate(prompt, max_new_tokens=NEW_TOKENS), no_grad(model))
    for way in (PATCHED, "eager", "transformers"):
        yield way, eager if way == "eager" else _missing(s.device, _THEIRS) or partial(theirs, way)


# ---- which ones -----------------------------------------------------------------------------------------------------
def scenarios(device: str = "cpu") -> list[Scenario]:
    """All of a device's; on a CPU those of floors.toml, in bfloat16 and float32."""
    if device == "cpu":
        return [
            Scenario(op, config, "", B, T, dtype)
            for dtype in (torch.bfloat16, torch.float32)
            for op, config, B, T in (
                ("block", WIDE, 1, 1024),
                ("training_step", SMALL, 2, 1024),
                ("lora_step", SMALL, 2, 1024),
                ("decode", SMALL, 1, PROMPT + NEW_TOKENS),
            )
        ] + [Scenario("lora_step", SMALL, "dropout 0.05", 2, 1024, torch.bfloat16, dropout=0.05)]
    found = []
    for op, preset, layers, B, T in (
        ("block", "llama-7b", 1, 4, 2048),
        ("block", "llama-13b", 1, 4, 2048),
        ("block", "llama-65b", 1, 4, 2048),
        ("block", "llama-3-8b", 1, 2, 4096),
        ("block", "llama-3-70b", 1, 2, 4096),
        ("training_step", "llama-7b", 8, 4, 2048),
        ("training_step", "llama-65b", 3, 4, 2048),
        ("training_step", "llama-3-8b", 8, 2, 4096),
        ("lora_step", "llama-3-8b", 8, 2, 4096),
        ("decode", "llama-7b", 32, 1, PROMPT + NEW_TOKENS),
    ):
        config = dataclasses.replace(LlamaConfig.preset(preset), n_layers=layers)
        found.append(Scenario(op, config, preset, B, T, torch.bfloat16, device))
    return found
