"""What a training costs before a device is rented: parameters, states, activations by policy and layout, flops, days.

The bytes of activations are those that block.py keeps, to the byte; tests/test_plan.py measures them. All else is
stated as a rule beside its number: nothing here knows how fast a device really is, so speed is what `mfu` says.

Letters: T tokens of a sequence, C width, F ffn width, H query heads, G key/value heads, D head dim, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

from llama_fast.config import LlamaConfig
from llama_fast.ops import chunks

POLICIES = ("save", "recompute-cheap", "recompute-linear", "recompute-all")  # of block.py
SHARDS = ("full", "states", "none")
_NAMES = {"full": "FSDP", "states": "ZeRO-1", "none": "DDP"}


@dataclass(frozen=True)
class Device:
    """A device's published figures: bytes of memory, dense bfloat16 flop/s, memory bytes/s."""

    name: str
    memory: int
    flops: float
    bandwidth: float


# NVIDIA's data sheets, SXM modules, dense (without sparsity).
DEVICES: dict[str, Device] = {
    d.name: d
    for d in (
        Device("a100", 80 << 30, 312e12, 2.039e12),
        Device("h100", 80 << 30, 989.4e12, 3.35e12),
        Device("h200", 141 << 30, 989.4e12, 4.8e12),
        Device("b200", 180 << 30, 2250e12, 8.0e12),
    )
}
USABLE = 0.92  # of the memory: the rest is the context, the libraries' workspaces and fragments

# Bytes a parameter: weights, gradients, optimizer. "float32": float32 weights under autocast, as `llama-fast train`;
# "mixed": bfloat16 weights and gradients, the optimizer holds float32 weights and both moments; "bfloat16": all of it.
STATES = {"float32": (4, 4, 8), "mixed": (2, 2, 12), "bfloat16": (2, 2, 4)}

# Touvron et al. 2023, section 2.4: 65B on 2048 A100 of 80 GB, 380 tokens a second and GPU, 1.4 T tokens in 21 days.
PAPER_PRESET, PAPER_DEVICE, PAPER_TOKENS_PER_S, PAPER_SEQ_LEN = "llama-65b", "a100", 380.0, 2048


@dataclass(frozen=True)
class Layout:
    """How a training is spread over devices.

    Args:
        world: devices.
        tensor: devices that split each layer's heads and ffn between them; divides `world`.
        sequence: between the split products, the rows too are split over those devices.
        shard: what the devices of data parallelism split: "full" weights, gradients and optimizer (FSDP), "states"
            the optimizer alone (ZeRO 1), "none" (DDP).

    Raises:
        ValueError: names the field, its value and what was expected.
    """

    world: int = 1
    tensor: int = 1
    sequence: bool = False
    shard: str = "full"

    def __post_init__(self) -> None:
        for name in ("world", "tensor"):
            _check_count(name, getattr(self, name))
        if self.world % self.tensor:
            raise ValueError(f"tensor = {self.tensor}: expected a divisor of world = {self.world}")
        if self.shard not in SHARDS:
            raise ValueError(f"shard = {self.shard!r}: expected one of {', '.join(SHARDS)}")

    @property
    def data(self) -> int:
        """Devices of data parallelism."""
        return self.world // self.tensor

    def __str__(self) -> str:
        split = f"tensor {self.tensor}{'+sequence' if self.sequence else ''}, " if self.tensor > 1 else ""
        return f"{split}{_NAMES[self.shard]} {self.data}"


@dataclass(frozen=True)
class Plan:
    """Bytes of one device, and the work.

    Args:
        layout, policy: of this plan.
        weights, gradients, optimizer: bytes held all the time.
        gathered: bytes of weights that FSDP brings together for the layers at work, and of gradients not yet spread.
        activations: bytes kept between forward and backward, all layers and what stands outside them.
        workspace: bytes that the backward of one layer needs besides, or the loss, at its peak.
        total: the sum.
        fits: whether USABLE of the device's memory holds it.
        recomputed: flops a token that the policy does twice, not counted by MFU.
    """

    layout: Layout
    policy: str
    weights: int
    gradients: int
    optimizer: int
    gathered: int
    activations: int
    workspace: int
    total: int
    fits: bool
    recomputed: int


def device(name: str) -> Device:
    """The device of this name in DEVICES.

    Raises:
        ValueError: no such name.
    """
    if name not in DEVICES:
        raise ValueError(f"device = {name!r}: expected one of {', '.join(DEVICES)}")
    return DEVICES[name]


def block_bytes_per_token(
    config: LlamaConfig, policy: str, itemsize: int = 2, tensor: int = 1, sequence: bool = False
) -> float:
    """Bytes a token that one block keeps between forward and backward, on one of `tensor` devices.

    Raises:
        ValueError: no such policy.
    """
    _check_policy(policy)
    rows = tensor if sequence else 1
    stream = config.dim * itemsize / rows
    if policy == "recompute-all":
        return stream
    if policy == "recompute-linear":
        return stream + _attended_bytes(config, itemsize) / tensor
    heads = (2 * config.n_heads + 2 * config.n_kv_heads) * config.head_dim  # q, the attention output, k, v
    statistics = 4 * (2 / rows + config.n_heads / tensor)  # two rstd, and a log-sum-exp a head
    cheap = 2 * stream + (heads + 2 * config.ffn_dim) * itemsize / tensor + statistics
    return cheap + (2 * stream + config.ffn_dim * itemsize / tensor if policy == "save" else 0)


def _attended_bytes(config: LlamaConfig, itemsize: int) -> int:
    """Bytes a token of the attention's output and log-sum-exp."""
    return config.n_heads * (config.head_dim * itemsize + 4)


def workspace_bytes_per_token(
    config: LlamaConfig, policy: str, itemsize: int = 2, tensor: int = 1, sequence: bool = False
) -> float:
    """Bytes a token at the peak of one block's backward, besides what it kept and the weights' gradients.

    The incoming gradient and one tensor of the ffn's width, silu(gate) up and then its gradient: those of gate and up
    take the place of gate and up. "save" has kept silu(gate) up, whose place is free again; "recompute-linear" and
    "recompute-all" first make again what "recompute-cheap" keeps. With rows that are split, a product's whole input
    stands beside. A retained graph takes two tensors of the ffn's width more. Measured: up to a tensor as wide as x
    more.
    """
    _check_policy(policy)
    rows = tensor if sequence else 1
    wide = 0.0 if policy == "save" else config.ffn_dim * itemsize / tensor
    gathered = config.dim * itemsize if rows > 1 else 0
    again = 0.0
    if policy in ("recompute-linear", "recompute-all"):
        kept = block_bytes_per_token(config, policy, itemsize, tensor, sequence)
        again = block_bytes_per_token(config, "recompute-cheap", itemsize, tensor, sequence) - kept
    return config.dim * itemsize / rows + wide + gathered + again


def outside_bytes_per_token(config: LlamaConfig, itemsize: int = 2) -> int:
    """Bytes a token outside the blocks: the last norm's input and statistic, the head's input and its gradient.

    Token and target ids are 8 bytes each. The gradient of the head's weight counts as a gradient.
    """
    return 3 * config.dim * itemsize + 4 + 16


def loss_workspace_bytes(config: LlamaConfig, rows: int, itemsize: int = 2) -> int:
    """Bytes at the peak of the loss of `rows` tokens, besides the gradients of the head's input and weight.

    The logits of a chunk of rows, and where that is less a float32 copy of the weight's gradient beside fewer.
    """
    chunk, copied = chunks.plan(rows, config.dim, config.vocab_size, itemsize, True)
    return config.vocab_size * (chunk * itemsize + (config.dim * 4 if copied else 0))


def plan(
    config: LlamaConfig,
    device: Device,
    layout: Layout,
    policy: str = "recompute-cheap",
    *,
    seq_len: int,
    batch_size: int = 1,
    states: str = "mixed",
    itemsize: int = 2,
) -> Plan:
    """What one device holds.

    Args:
        config: the model.
        device: see DEVICES.
        layout: how it is spread.
        policy: one of POLICIES.
        seq_len: T.
        batch_size: sequences in one forward pass of a device, or of the `tensor` devices together.
        states: one of STATES.
        itemsize: bytes of a number of the computation.

    Raises:
        ValueError: names the argument, its value and what was expected.
    """
    _check(config, layout, seq_len, batch_size, states, itemsize)
    rows, data, tensor = batch_size * seq_len, layout.data, layout.tensor
    split, whole = _parameters(config)
    mine = split / tensor + whole
    per_weight, per_gradient, per_moment = STATES[states]
    full, some = (data if layout.shard == "full" else 1), (data if layout.shard != "none" else 1)
    weights, gradients = mine * per_weight / full, mine * per_gradient / full
    optimizer = mine * per_moment / some
    gathered = 0.0
    if full > 1:  # two layers and the head, a layer's gradients and the head's, in the dtype of the computation
        gathered = (3 * split / tensor / config.n_layers + 2 * config.vocab_size * config.dim) * itemsize
    kept = config.n_layers * block_bytes_per_token(config, policy, itemsize, tensor, layout.sequence)
    activations = rows * (kept + outside_bytes_per_token(config, itemsize))
    workspace = max(
        rows * workspace_bytes_per_token(config, policy, itemsize, tensor, layout.sequence),
        loss_workspace_bytes(config, rows, itemsize),
    )
    total = weights + gradients + optimizer + gathered + activations + workspace
    return Plan(
        layout,
        policy,
        round(weights),
        round(gradients),
        round(optimizer),
        round(gathered),
        round(activations),
        round(workspace),
        round(total),
        total <= USABLE * device.memory,
        recomputed_flops_per_token(config, seq_len, policy),
    )


def layouts(config: LlamaConfig, world: int) -> list[Layout]:
    """Sensible ways to spread a model over `world` devices: FSDP alone, and each tensor split inside a machine of 8."""
    found = [Layout(world)]
    for tensor in (2, 4, 8):
        if world % tensor == 0 and config.n_kv_heads % tensor == 0 and config.ffn_dim % tensor == 0:
            found.append(Layout(world, tensor, sequence=True))
    return found


def recomputed_flops_per_token(config: LlamaConfig, seq_len: int, policy: str = "recompute-all") -> int:
    """Flops a token that a policy does twice: each block's products but the last; with "recompute-all" attention too.

    Raises:
        ValueError: no such policy.
    """
    _check_policy(policy)
    if policy in ("save", "recompute-cheap"):
        return 0
    blocks, _ = _parameters(config)
    products = 2 * (blocks - config.n_layers * config.dim * config.ffn_dim)
    attention = 4 * config.n_layers * config.n_heads * config.head_dim * min(seq_len, config.window or seq_len)
    return products + (attention if policy == "recompute-all" else 0)


def tokens_per_second(config: LlamaConfig, device: Device, seq_len: int, mfu: float) -> float:
    """Tokens a second of one device at `mfu`: the share of its peak flop/s that model flops use.

    Raises:
        ValueError: `mfu` is no share, or `seq_len` no count.
    """
    _check_count("seq_len", seq_len)
    if not 0 < mfu <= 1:
        raise ValueError(f"mfu = {mfu}: expected a share between 0 and 1")
    return mfu * device.flops / config.flops_per_token(seq_len)


def mfu(config: LlamaConfig, device: Device, seq_len: int, tokens_per_s: float, attention: bool = True) -> float:
    """Model flops utilisation of one device; without `attention`, by 6 N of all parameters alone, as the paper counts.

    Source: Chowdhery et al. 2022, arXiv:2204.02311, appendix B.
    """
    per_token = config.flops_per_token(seq_len) if attention else 6 * config.n_params
    return tokens_per_s * per_token / device.flops


def _parameters(config: LlamaConfig) -> tuple[int, int]:
    """(matrices of the blocks, which tensor parallelism splits; the rest, which every device has)."""
    blocks = config.n_matmul_params - config.vocab_size * config.dim
    return blocks, config.n_params - blocks


def _check_policy(policy: str) -> None:
    if policy not in POLICIES:
        raise ValueError(f"policy = {policy!r}: expected one of {', '.join(POLICIES)}")


def _check_count(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} = {value!r}: expected an integer of 1 or more")


def _check(config: LlamaConfig, layout: Layout, seq_len: int, batch_size: int, states: str, itemsize: int) -> None:
    if states not in STATES:
        raise ValueError(f"states = {states!r}: expected one of {', '.join(STATES)}")
    if not isinstance(seq_len, int) or not 1 <= seq_len <= config.max_seq_len:
        raise ValueError(f"seq_len = {seq_len!r}: expected 1 .. max_seq_len = {config.max_seq_len}")
    _check_count("batch_size", batch_size)
    _check_count("itemsize", itemsize)
    for name in ("n_kv_heads", "n_heads", "ffn_dim"):
        if getattr(config, name) % layout.tensor:
            raise ValueError(f"tensor = {layout.tensor}: expected a divisor of {name} = {getattr(config, name)}")
