"""Text from a model as it is made: ids to characters, stop strings, and why it ended."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from llama_fast.generate import KVCache
from llama_fast.pretrained import AnyTokenizer

if TYPE_CHECKING:
    from llama_fast.model import Llama


class StopStrings:
    """Cuts a stream of text at the first of `stops`, and holds back what may be the beginning of one.

    Args:
        stops: a string or several, none empty. Where two end at the same character, the longer one counts.

    Raises:
        ValueError: one is empty, or no string.
    """

    def __init__(self, stops: str | Sequence[str]) -> None:
        if not isinstance(stops, Iterable):
            raise ValueError(f"stop = {stops!r}: expected a string or several")
        self._stops = (stops,) if isinstance(stops, str) else tuple(stops)
        if not all(isinstance(s, str) and s for s in self._stops):
            raise ValueError(f"stop = {list(self._stops)!r}: expected strings of one character or more")
        self._held = ""
        self.found: str | None = None

    def feed(self, text: str) -> str:
        """The text that can be shown now; after a stop string is found, none."""
        if self.found is not None:
            return ""
        for end in range(len(self._held) + 1, len(self._held) + len(text) + 1):
            ending = [s for s in self._stops if (self._held + text)[:end].endswith(s)]
            if ending:
                self.found = max(ending, key=len)
                shown, self._held = (self._held + text)[: end - len(self.found)], ""
                return shown
        whole = self._held + text
        held = max((n for s in self._stops for n in range(1, len(s)) if whole.endswith(s[:n])), default=0)
        shown, self._held = whole[: len(whole) - held], whole[len(whole) - held :]
        return shown

    def finish(self) -> str:
        """What was held back and is no stop string after all."""
        held, self._held = self._held, ""
        return held


@dataclass
class TextStream:
    """The answer to a prompt, as strings that join to it; iterate once.

    Args:
        model, tokenizer: what generates.
        ids: the prompt.
        max_new_tokens: of the answer.
        stop: a string or several at which it ends; they are no part of it.
        continuation: it goes on from text, so that a space in front of it stays.
        logprobs: collect each token's log-probability.
        cache: of the tokens before `ids`.
        before: these tokens.
        sampling: temperature, top_k, top_p, min_p, repetition_penalty, seed.

    While and after iterating:
        new_ids: the tokens, the one that ended it included.
        token_logprobs: of each.
        text: so far.
        reason: "eos", "stop" or "length" when it has ended, else "".

    Raises:
        ValueError: an argument is out of its range.
    """

    model: Llama
    tokenizer: AnyTokenizer
    ids: Sequence[int]
    max_new_tokens: int
    stop: str | Sequence[str] = ()
    continuation: bool = True
    logprobs: bool = False
    cache: KVCache | None = None
    before: Sequence[int] = ()
    sampling: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.new_ids: list[int] = []
        self.token_logprobs: list[float] = []
        self.text, self.reason = "", ""
        self._stops = StopStrings(self.stop)

    def __iter__(self) -> Iterator[str]:
        steps = self.model.stream(
            [list(self.ids)], max_new_tokens=self.max_new_tokens, eos_id=self.tokenizer.eos_ids,
            logprobs=self.logprobs, cache=self.cache, before=self.before, **self.sampling,
        )  # fmt: skip
        decoder = self.tokenizer.stream_decoder(continuation=self.continuation)
        for step in steps:
            token = int(step.tokens[0])
            self.new_ids.append(token)
            if step.logprobs is not None:
                self.token_logprobs.append(float(step.logprobs[0]))
            if token in self.tokenizer.eos_ids:
                self.reason = "eos"
                break
            if token < self.tokenizer.vocab_size:  # else of a row that only fills the embedding up, and no text
                yield from self._show(self._stops.feed(decoder.feed(token)))
            if self._stops.found is not None:
                self.reason = "stop"
                return
        yield from self._show(self._stops.feed(decoder.finish()) + self._stops.finish())
        self.reason = self.reason or "length"

    def _show(self, text: str) -> Iterator[str]:
        if text:
            self.text += text
            yield text
