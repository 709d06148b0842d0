"""A model class for EleutherAI's lm-evaluation-harness (the extra `eval`), registered there as `llama_fast`.

    llama-fast evaluate PATH --tasks arc_easy,hellaswag

is the harness's own command line with that model. PATH is any checkpoint that `Llama.from_pretrained` reads, with its
tokenizer.

Source: https://github.com/EleutherAI/lm-evaluation-harness, docs/model_guide.md.

Legend: B batch, T tokens, C width, V vocabulary, N scored tokens.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llama_fast.chat import ChatTemplate
from llama_fast.model import Llama
from llama_fast.pretrained import chat_template, load_tokenizer
from llama_fast.text import TextStream

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
except ImportError as error:
    raise ImportError(f"{error}: the harness is an extra: pip install 'llama_fast[eval]'") from None


_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # the first that is given counts
_SAMPLING = ("top_k", "top_p", "min_p", "repetition_penalty")


@torch.no_grad()
def loglikelihoods(
    model: Llama, pairs: Sequence[tuple[Sequence[int], Sequence[int]]], batch_size: int = 8
) -> list[tuple[float, bool]]:
    """For each (context, continuation) of ids: the continuation's log-probability, and whether it is the greedy one.

    Rows are filled up behind their ends, where causal attention cannot see; logits are computed where they are scored.

    Args:
        model: the model.
        pairs: contexts of one id or more, continuations of any number. Of a pair that is longer than the model's
            max_seq_len + 1 the front of the context is left out.
        batch_size: rows of a forward pass.

    Returns:
        (natural logarithm of the probability, in float32 sums; True where each token is the likeliest) of each pair.

    Raises:
        ValueError: an empty context, or a continuation longer than max_seq_len.
    """
    longest = model.config.max_seq_len
    for context, continuation in pairs:
        if not context or len(continuation) > longest:
            raise ValueError(
                f"a context of {len(context)} and a continuation of {len(continuation)} ids: expected 1 or more, and "
                f"at most max_seq_len = {longest}"
            )
    rows = [[*context, *continuation][-longest - 1 :] for context, continuation in pairs]
    found: dict[int, tuple[float, bool]] = {}
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))  # rows of like length side by side
    device = model.lm_head.weight.device
    for at in range(0, len(order), batch_size):
        batch = order[at : at + batch_size]
        T = len(rows[batch[0]]) - 1
        tokens = torch.tensor([rows[i][:-1] + [0] * (T + 1 - len(rows[i])) for i in batch], device=device)
        hidden_BTC = model.hidden(tokens.view(len(batch), T)) if T else None
        for b, i in enumerate(batch):
            N = len(pairs[i][1])
            if N == 0 or hidden_BTC is None:
                found[i] = (0.0, True)
                continue
            end = len(rows[i]) - 1
            targets = torch.tensor(rows[i][-N:], device=device)
            found[i] = _score(model.lm_head(hidden_BTC[b, end - N : end]), targets)
    return [found[i] for i in range(len(rows))]


def _score(logits_NV: Tensor, targets_N: Tensor) -> tuple[float, bool]:
    logprobs = logits_NV.float().log_softmax(-1)
    return float(logprobs.gather(1, targets_N[:, None]).sum()), bool((logits_NV.argmax(-1) == targets_N).all())


def rolling_windows(ids: Sequence[int], prefix: int, longest: int) -> Iterator[tuple[list[int], list[int]]]:
    """(context, continuation) pairs that score each of `ids` once, in windows of `longest` inputs.

    The first window starts from `prefix`; each later one is full: its context is all that fits before what it scores.
    """
    for at in range(0, len(ids), longest):
        scored = list(ids[at : at + longest])
        before = [prefix, *ids[:at]]
        yield before[max(0, len(before) - (longest + 1 - len(scored))) :], scored


def _generation_options(options: Mapping[str, Any], longest: int) -> tuple[str | Sequence[str], int, dict[str, Any]]:
    """Stop strings, the most new tokens and the sampling of a task's options, which mean what they mean to the
    harness's own models: a temperature alone is sampling, and a top_k of 0 is none."""
    given = {name: value for name, value in options.items() if value is not None}
    until = given.pop("until", ())
    limits = [given.pop(name) for name in _LIMITS if name in given]
    temperature = float(given.pop("temperature", 0.0))
    sampling: dict[str, Any] = {"temperature": temperature if given.pop("do_sample", True) else 0.0}
    sampling |= {name: value for name in _SAMPLING if (value := given.pop(name, None))}
    if given:
        warnings.warn(f"generation options that llama_fast does not know: {', '.join(sorted(given))}", stacklevel=3)
    return until, int(limits[0] if limits else longest), sampling


@register_model("llama_fast")
class LlamaFastLM(TemplateLM):
    """The harness's view of a checkpoint.

    Args:
        pretrained: path of the checkpoint.
        dtype: of the weights, by name; None for the checkpoint's.
        device: of the model; None, and the harness's "cuda" on a machine without a GPU, for the CPU.
        batch_size: rows of a forward pass.
        max_batch_size: accepted for the harness, and not used.
        max_gen_toks: of an answer, where a task does not say.
    """

    def __init__(
        self,
        pretrained: str,
        dtype: str | None = None,
        device: str | None = None,
        batch_size: int | str = 8,
        max_batch_size: int | None = None,
        max_gen_toks: int = 256,
    ) -> None:
        super().__init__()
        from llama_fast.terminal import dtype_of, resolve

        if device is not None and device.startswith("cuda") and not torch.cuda.is_available():
            device = None  # the harness asks for a GPU of its own accord
        path = resolve(Path(pretrained))
        self.model = Llama.from_pretrained(path, dtype=dtype_of(dtype), device=device)
        self.text_tokenizer = load_tokenizer(path)
        self.batch_size = int(batch_size) if str(batch_size).isdigit() else 8
        self.max_gen_toks = max_gen_toks
        self._path = path

    @property
    def eot_token_id(self) -> int:
        """The id that ends a text."""
        return self.text_tokenizer.eos_ids[0]

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context."""
        return self.eot_token_id if self.text_tokenizer.bos_id is None else self.text_tokenizer.bos_id

    @property
    def max_length(self) -> int:
        """Tokens that the model takes."""
        return self.model.config.max_seq_len

    @property
    def tokenizer_name(self) -> str:
        """Names the tokenizer in the harness's cache."""
        return str(self._path)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of a text, behind `bos_id` where the model was trained so; special tokens written in it are these."""
        tokenizer = self.text_tokenizer
        ids = tokenizer.encode_marked(string)
        wants = tokenizer.adds_bos if add_special_tokens is None else add_special_tokens and tokenizer.adds_bos
        return [tokenizer.bos_id, *ids] if wants and ids[:1] != [tokenizer.bos_id] else ids  # type: ignore[list-item]

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        return loglikelihoods(self.model, [(context, ids) for _, context, ids in requests], self.batch_size)

    def loglikelihood_rolling(self, requests: Iterable[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each whole text."""
        totals = []
        for request in requests:
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            windows = list(rolling_windows(ids, self.prefix_token_id, self.max_length))
            totals.append(sum(value for value, _ in loglikelihoods(self.model, windows, self.batch_size)))
        return totals

    def generate_until(self, requests: Iterable[Any], disable_tqdm: bool = False) -> list[str]:
        """An answer to each context, up to the first of the task's `until` strings."""
        answers = []
        for request in requests:
            context, options = request.args[:2]
            until, limit, sampling = _generation_options(options, self.max_gen_toks)
            room = self.max_length - min(limit, self.max_length - 1)
            ids = self.tok_encode(context)[-room:]
            stream = TextStream(
                self.model, self.text_tokenizer, ids, min(limit, self.max_length - len(ids)), until, sampling=sampling
            )  # fmt: skip
            answers.append("".join(stream))
        return answers

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The text of a conversation by the checkpoint's chat template. Raises ValueError where it has none."""
        source = chat_template(self._path)
        if source is None:
            raise ValueError(f"{self._path}: has no chat template")
        tokenizer = self.text_tokenizer
        names = ("" if i is None else tokenizer.token(i) for i in (tokenizer.bos_id, tokenizer.eos_id))
        return ChatTemplate(source, *names).render(chat_history, add_generation_prompt=add_generation_prompt)


def main(checkpoint: Path, arguments: Sequence[str]) -> None:
    """The harness's own command line on `checkpoint`: `arguments` are its options beside the model's."""
    from lm_eval.__main__ import cli_evaluate

    sys.argv[1:] = ["run", "--model", "llama_fast", "--model_args", f"pretrained={checkpoint}", *arguments]
    cli_evaluate()
