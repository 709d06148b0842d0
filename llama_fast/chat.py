"""Conversations: a checkpoint's chat template (the extra `chat`), and a model that answers in one.

A template is a program that came with the weights, so it runs in jinja2's sandbox.
"""

from __future__ import annotations

import json
import re
import weakref
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from datetime import datetime
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from llama_fast.generate import KVCache, cache_dtype
from llama_fast.pretrained import AnyTokenizer
from llama_fast.text import TextStream

if TYPE_CHECKING:
    from llama_fast.model import Llama

_SANDBOX_HOLDS = (3, 1, 6)  # before it templates got out: CVE-2024-56326, CVE-2025-27516

Message = Mapping[str, str]  # role: system, user or assistant; content


class ChatTemplate:
    """A jinja2 template that turns messages into the text of a prompt, with what Hugging Face's templates expect.

    Args:
        source: the template; None, as `chat_template` gives it for a checkpoint without one, is refused.
        bos_token, eos_token: what it may refer to by these names.

    Raises:
        ImportError: jinja2 is not installed, or older than 3.1.6.
        ValueError: it is no template, or None.

    Source: https://huggingface.co/docs/transformers/chat_templating_writing
    """

    def __init__(self, source: str | None, bos_token: str = "", eos_token: str = "") -> None:
        if source is None:
            raise ValueError(
                "chat template: None: expected the source of one; a checkpoint without can continue texts only"
            )
        try:
            import jinja2
            from jinja2.ext import Extension, loopcontrols
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError:
            raise ImportError("chat templates need the package jinja2: pip install 'llama_fast[chat]'") from None
        if tuple(map(int, re.findall(r"\d+", version("jinja2"))[:3])) < _SANDBOX_HOLDS:
            raise ImportError(
                f"jinja2 {version('jinja2')} has known ways out of its sandbox, in which chat templates run: "
                "pip install 'llama_fast[chat]'"
            )

        class Generation(Extension):
            """{% generation %}, which marks what the model says, for those who train it."""

            tags = {"generation"}  # noqa: RUF012 - as jinja2 has it

            def parse(self, parser: Any) -> Any:
                next(parser.stream)
                return jinja2.nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True))

        def refuse(message: str) -> None:
            raise ValueError(f"chat template: {message}")

        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
        )
        environment.filters["tojson"] = lambda value, **options: json.dumps(value, **{"ensure_ascii": False, **options})
        environment.globals["raise_exception"] = refuse
        environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}
        self._error = jinja2.TemplateError
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise ValueError(f"chat template: {error}: expected a jinja2 template") from None

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """The text of `messages`, and of the beginning of an answer.

        Raises:
            ValueError: the template refuses these messages, or fails.
        """
        try:
            return self._template.render(
                messages=[dict(m) for m in messages], add_generation_prompt=add_generation_prompt, **self._tokens
            )
        except (self._error, TypeError, AttributeError, LookupError, ArithmeticError) as error:
            raise ValueError(f"chat template: {error}") from None


class Chat:
    """A conversation with a model. What stands in the cache from the turns before is not computed again.

    Args:
        model: answers.
        tokenizer: its own.
        template: source of its chat template, see `ChatTemplate`.
        system: a first message that says how to answer; None for what the template says.
    """

    def __init__(self, model: Llama, tokenizer: AnyTokenizer, template: str | None, system: str | None = None) -> None:
        names = ("" if i is None else tokenizer.token(i) for i in (tokenizer.bos_id, tokenizer.eos_id))
        self._template = ChatTemplate(template, *names)
        self._model, self._tokenizer = model, tokenizer
        self._cache: KVCache | None = None
        self._cached: list[int] = []
        # of the answer that is being given
        self._pieces: Callable[[], Generator[str, None, None] | None] = lambda: None
        self.messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]

    def prompt(self, text: str) -> list[int]:
        """Ids of the conversation so far and of `text` as the user's next message."""
        messages = [*self.messages, {"role": "user", "content": text}]
        return self._tokenizer.encode_marked(self._template.render(messages))

    def say(self, text: str, max_new_tokens: int = 512, stop: str | Sequence[str] = (), **sampling: Any) -> Answer:
        """The model's answer to `text`, to be iterated; the turn counts once it has been, to the end or not.

        An answer that is still being given is broken off, and counts.

        Args:
            text: the user's message.
            max_new_tokens: of the answer; less where the context ends before.
            stop: a string or several at which it ends.
            sampling: temperature, top_k, top_p, min_p, repetition_penalty, seed.

        Raises:
            ValueError: the conversation fills the context; or, as the answer is iterated, which then does not count, an
                argument is out of its range.
        """
        self._break_off()
        ids = self.prompt(text)
        left = self._model.config.max_seq_len - len(ids)
        if left < 1:
            raise ValueError(
                f"the conversation has {len(ids)} tokens: expected fewer than max_seq_len = "
                f"{self._model.config.max_seq_len}; begin a new one"
            )
        return Answer(self, text, ids, min(max_new_tokens, left), stop, sampling)

    def _break_off(self) -> None:
        pieces = self._pieces()
        if pieces is not None:
            pieces.close()

    def _reuse(self, ids: Sequence[int]) -> tuple[KVCache, int]:
        """The cache, with the first of `ids` in it, and how many these are."""
        weight = self._model.lm_head.weight
        like = (weight.device, cache_dtype(weight))
        if self._cache is None or like != (self._cache.k_LBSGD.device, self._cache.k_LBSGD.dtype):
            self._cache, self._cached = KVCache(self._model.config, 1, 0, *like), []
        common = 0
        for old, new in zip(self._cached, ids[:-1], strict=False):  # the last is always computed: it has the logits
            if old != new:
                break
            common += 1
        self._cache.used, self._cached = common, list(ids[:common])
        return self._cache, common


class Answer:
    """One answer of a `Chat`: iterate over its pieces of text, once; `stream` has its text, ids and reason.

    `computed`: tokens of the prompt that the cache did not have.
    """

    def __init__(
        self,
        chat: Chat,
        text: str,
        ids: list[int],
        max_new_tokens: int,
        stop: str | Sequence[str],
        sampling: dict[str, Any],
    ) -> None:
        self._chat, self._text, self._ids = chat, text, ids
        self.computed = 0
        self.stream = TextStream(
            chat._model, chat._tokenizer, ids, max_new_tokens, stop, sampling=sampling, continuation=False
        )

    def __iter__(self) -> Iterator[str]:
        self._chat._break_off()
        pieces = self._give()
        self._chat._pieces = weakref.ref(pieces)  # so that a loop that is left closes it
        return pieces

    def _give(self) -> Generator[str, None, None]:
        chat, stream = self._chat, self.stream
        cache, common = chat._reuse(self._ids)
        self.computed = len(self._ids) - common
        stream.cache, stream.before, stream.ids = cache, self._ids[:common], self._ids[common:]
        counts = True
        try:
            yield from stream
        except Exception:
            counts = False
            raise
        finally:
            if counts:
                chat._cached = [*self._ids, *stream.new_ids][: cache.used]
                said = {"role": "user", "content": self._text}
                chat.messages += [said, {"role": "assistant", "content": stream.text}]
