"""The thin LLaMA: embedding, blocks, norm, output projection. Parameter names are those of PlainLlama (plain.py).

Legend: B batch, T tokens, C width, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llama_fast import decode, weights
from llama_fast import generate as generation
from llama_fast.config import LlamaConfig, rope_cos_sin
from llama_fast.generate import KVCache
from llama_fast.nn import Linear, RMSNorm, TransformerBlock, watched
from llama_fast.ops.dispatch import plain
from llama_fast.ops.linear_cross_entropy import linear_cross_entropy
from llama_fast.plain import check_targets, check_tokens, init_weights_
from llama_fast.projections import base
from llama_fast.sampling import Sampler

Prompts = TypeVar("Prompts", bound=Tensor | Sequence[Sequence[int]])


class Llama(nn.Module):
    """A LLaMA made of llama_fast's blocks; or a Mistral, Qwen2 or Qwen3, as its config says.

    Args:
        config: its sizes, see `LlamaConfig.preset`.
        device: of the parameters; "meta" costs no memory and draws no weights.
        dtype: of the parameters; the default is torch's.
        policy: what each block keeps for the backward: "save", "recompute-cheap", "recompute-linear" or
            "recompute-all" (block.py).

    Weights are drawn by `reset_parameters(0)`, equal to PlainLlama's. Where the config ties them, `lm_head.weight` is
    `embed_tokens.weight`. Under autocast the residual stream too is in autocast's dtype.
    """

    def __init__(
        self,
        config: LlamaConfig,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        policy: str = "recompute-cheap",
    ) -> None:
        super().__init__()
        self.config = config
        like: dict[str, Any] = {"device": "meta", "dtype": dtype}
        self.embed_tokens = nn.Embedding(config.vocab_size, config.dim, **like)
        self.layers = nn.ModuleList(
            TransformerBlock(
                config.dim,
                config.n_heads,
                config.ffn_dim,
                config.n_kv_heads,
                config.head_dim,
                config.norm_eps,
                policy,
                qkv_bias=config.qkv_bias,
                qk_norm=config.qk_norm,
                window=config.window,
                **like,
            )
            for _ in range(config.n_layers)
        )
        self.norm = RMSNorm(config.dim, config.norm_eps, **like)
        self.lm_head = Linear(config.dim, config.vocab_size, **like)
        self._rope: tuple[LlamaConfig, Tensor, Tensor] | None = None
        self._tie()
        self.register_load_state_dict_post_hook(_tie_again)
        if device is None:
            device = torch.get_default_device()
        if torch.device(device).type != "meta":
            self.to_empty(device=device)
            self.reset_parameters(0)

    def _tie(self) -> None:
        if self.config.tie_embeddings:
            base(self.lm_head).weight = self.embed_tokens.weight

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Llama:
        super()._apply(fn, recurse)
        self._tie()  # to_empty gives each name a storage of its own
        self._rope = None
        return self

    def reset_parameters(self, seed: int = 0) -> None:
        """Draw new weights, see `plain.init_weights_`."""
        init_weights_(self, self.config.n_layers, seed)

    def set_policy(self, policy: str) -> None:
        """Makes every block keep what `policy` says ("save", "recompute-cheap", "recompute-linear", "recompute-all").

        Raises:
            ValueError: no such policy.
        """
        for layer in self.layers:
            assert isinstance(layer, TransformerBlock)
            layer.options = dataclasses.replace(layer.options, policy=policy)

    def rope_tables(self, start: int, end: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos, sin [end - start, D/2] float32 of the positions start..end-1, from tables that are computed once."""
        rows = self.config.max_seq_len  # where a compiler watches: fewer would bind it to these lengths
        if not torch.compiler.is_compiling():
            rows = min(rows, 1 << (end - 1).bit_length()) if end else 0
        kept = self._rope
        if kept is None or kept[0] is not self.config or kept[1].shape[0] < rows or kept[1].device != device:
            with torch.inference_mode(False):  # for later calls too, whose backward keeps them
                cos, sin = rope_cos_sin(self.config, rows, device)
            # not fake ones, nor what an export or a trace has recorded
            if not torch.compiler.is_exporting() and (torch.compiler.is_compiling() or plain(cos, sin)):
                self._rope = self.config, cos, sin
        else:
            _, cos, sin = kept
        return cos[start:end], sin[start:end]

    def hidden(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """Normalised last hidden states [B, T, C] of `tokens` [B, T] int64; with a cache, of the tokens after its own.

        Raises:
            ValueError: shape, dtype, length or (on the CPU) ids of `tokens`; more tokens than the cache has room for.
        """
        check_tokens(self.config, tokens)
        weight = self.embed_tokens.weight
        if tokens.device != weight.device:
            raise ValueError(f"tokens is on {tokens.device}: expected {weight.device} as the model")
        start = 0 if cache is None else cache.used
        end = start + tokens.shape[1]
        if end > self.config.max_seq_len:
            raise ValueError(f"tokens end at position {end}: expected at most max_seq_len = {self.config.max_seq_len}")
        if cache is not None and cache.k_LBSGD.shape[0] != len(self.layers):
            raise ValueError(f"cache has {cache.k_LBSGD.shape[0]} layers: expected {len(self.layers)}, the model's")
        if cache is not None and tokens.shape[1] > cache.room:
            raise ValueError(f"tokens has T = {tokens.shape[1]}: expected at most the cache's room of {cache.room}")
        cos, sin = self.rope_tables(start, end, tokens.device)
        x = self.embed_tokens(tokens)
        for i, layer in enumerate(self.layers):
            x = layer(x, cos, sin, cache=None if cache is None else cache.layer(i))
        if cache is not None:
            cache.used = end
        return self.norm(x)

    def forward(self, tokens: Tensor, cache: KVCache | None = None) -> Tensor:
        """Logits [B, T, V], in the dtype of the hidden states, of `tokens` [B, T] int64.

        Raises:
            ValueError: shape, dtype, length or (on the CPU) ids of `tokens`.
        """
        logits_BV = None if cache is None else decode.step(self, tokens, cache)
        return self.lm_head(self.hidden(tokens, cache)) if logits_BV is None else logits_BV.unsqueeze(1)

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats over the targets that are not -100; the logits never exist as a whole.

        Args:
            tokens: [B, T] int64.
            targets: [B, T] int64, the next token at each place, or -100 to leave it out.

        Returns:
            A scalar, float32 (float64 for a float64 model).

        Raises:
            ValueError: shape, dtype, length or (on the CPU) ids of `tokens` or `targets`.
        """
        check_targets(self.config, tokens, targets)
        if watched(self.lm_head, Linear):  # an adapter, a hook: it is called
            logits = self.lm_head(self.hidden(tokens)).flatten(0, 1)
            return F.cross_entropy(logits if logits.dtype == torch.float64 else logits.float(), targets.flatten())
        return linear_cross_entropy(self.hidden(tokens), self.lm_head.weight, targets)

    @classmethod
    def from_pretrained(
        cls,
        path: Path | str,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        policy: str = "recompute-cheap",
        max_seq_len: int | None = None,
        progress: Callable[[str, int, int], object] | None = None,
    ) -> Llama:
        """The model of a checkpoint, in evaluation mode; peak memory is the model and one tensor.

        Args:
            path: a folder of Hugging Face (safetensors) or of Meta, a step_N of `llama-fast train`, or a .gguf file.
            device: of the parameters; the default is torch's.
            dtype: of the parameters; the default is the checkpoint's, float32 for quantised weights.
            policy: what each block keeps for the backward.
            max_seq_len: the context, in place of the checkpoint's; a Meta folder names none (weights/meta.py).
            progress: called after each tensor with its name, the bytes done and the bytes in all.

        Raises:
            FileNotFoundError: nothing is there, or a file of it is missing.
            ValueError: another architecture, or damaged; names the file, and tensors that are missing, extra or
                misshapen, up to eight of a kind.
        """
        source = weights.open_checkpoint(path, max_seq_len)
        return weights.load_model(source, device, dtype, progress, policy=policy)

    def save_pretrained(
        self,
        path: Path | str,
        format: str = "hf",
        *,
        shards: int = 1,
        dtype: torch.dtype | None = None,
        progress: Callable[[str, int, int], object] | None = None,
    ) -> None:
        """Write the model for other programs; beside the model it takes the memory of one tensor.

        Args:
            path: a folder that is not there yet, or empty. It appears whole, or not at all.
            format: "hf", or "meta" (its `params.json` names no context).
            shards: files of weights; for Meta, model-parallel ranks.
            dtype: of the weights written; the default is the model's.
            progress: as for `from_pretrained`.

        Raises:
            FileExistsError: `path` is not empty.
            ValueError: an argument is out of its range, the format has no such model, or the model has other
                parameters than its config says.
            OSError: the disk is full or fails.
        """
        weights.write(weights.ModelSource(self), path, format, shards=shards, dtype=dtype, progress=progress)

    def generate(
        self,
        tokens: Prompts,
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float = 1.0,
        seed: int | None = None,
        eos_id: int | Sequence[int] | None = None,
        prefill_chunk: int = generation.PREFILL_CHUNK,
    ) -> Prompts:
        """Continue prompts, greedily at temperature 0, else by sampling (sampling.py).

        Args:
            tokens: [B, T] int64, T >= 1; or B lists of ids, which may differ in length.
            max_new_tokens: how many to add at most.
            temperature: divides the logits before sampling.
            top_k: sample among the k likeliest.
            top_p: sample among the likeliest whose probabilities reach p together.
            min_p: sample among those whose probability is at least min_p times the largest.
            repetition_penalty: above 1 makes tokens that stand in the text already less likely, also at temperature 0.
            seed: of the sampling; None draws from torch's generator.
            eos_id: one or several ids that end a row; all rows done ends the call.
            prefill_chunk: tokens of the prompt in one pass.

        Returns:
            For a tensor [B, T + new] int64, new <= max_new_tokens, a row that is done filled with the first eos_id; for
            lists, lists, each ending with its own eos_id.

        Raises:
            ValueError: an argument is out of its range, or T + max_new_tokens exceeds max_seq_len.
        """
        sampler = Sampler(temperature, top_k, top_p, min_p, repetition_penalty, seed, self.lm_head.weight.device)
        return generation.generate(self, tokens, max_new_tokens, sampler, _ids(eos_id), prefill_chunk)

    def stream(
        self,
        tokens: Tensor | Sequence[Sequence[int]],
        *,
        max_new_tokens: int,
        eos_id: int | Sequence[int] | None = None,
        logprobs: bool = False,
        prefill_chunk: int = generation.PREFILL_CHUNK,
        cache: KVCache | None = None,
        before: Sequence[int] = (),
        **sampling: Any,
    ) -> Iterator[generation.Step]:
        """As `generate`, a step at a time: the next token of each row is computed when it is asked for.

        Args:
            tokens, max_new_tokens, eos_id, prefill_chunk: as for `generate`.
            logprobs: give each token's log-probability too, under the model, before temperature and filters.
            cache: of earlier tokens, which the prompt goes on from (B = 1).
            before: these earlier tokens, where repetition_penalty is given, which counts them.
            sampling: temperature, top_k, top_p, min_p, repetition_penalty, seed.

        Returns:
            An iterator of steps: `tokens` [B] int64, `logprobs` [B] float32 or None.

        Raises:
            ValueError: as `generate`.
        """
        sampler = Sampler(**sampling, device=self.lm_head.weight.device)
        return generation.stream(
            self, tokens, max_new_tokens, sampler, _ids(eos_id),
            logprobs=logprobs, prefill_chunk=prefill_chunk, cache=cache, before=before,
        )  # fmt: skip


def _tie_again(model: Llama, _: object) -> None:
    """After load_state_dict(assign=True), which gives each name a parameter of its own."""
    model._tie()


def _ids(eos_id: int | Sequence[int] | None) -> Sequence[int]:
    if eos_id is None:
        return ()
    try:
        return tuple(map(operator.index, eos_id if isinstance(eos_id, Iterable) else (eos_id,)))
    except TypeError:
        raise ValueError(f"eos_id = {eos_id!r}: expected a token id or several") from None
