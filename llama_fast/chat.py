"""Conversations: a checkpoint's chat template (the extra `chat`), and a model that answers in one.

A template is a program that came with the weights, so it runs in jinja2's sandbox.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from llama_fast.generate import KVCache
from llama_fast.pretrained import AnyTokenizer
from llama_fast.text import TextStream

if TYPE_CHECKING:
    from llama_fast.model import Llama

Message = Mapping[str, str]  # role: system, user or assistant; content


class ChatTemplate:
    """A jinja2 template that turns messages into the text of a prompt, with what Hugging Face's templates expect.

    Args:
        source: the template.
        bos_token, eos_token: what it may refer to by these names.

    Raises:
        ImportError: jinja2 is not installed.
        ValueError: it is no template.

    Source: https://huggingface.co/docs/transformers/chat_templating_writing
    """

    def __init__(self, source: str, bos_token: str = "", eos_token: str = "") -> None:
        try:
            import jinja2
            from jinja2.ext import loopcontrols
            from jinja2.sandbox import ImmutableSandboxedEnvironment
        except ImportError:
            raise ImportError("chat templates need the package jinja2: pip install 'llama_fast[chat]'") from None

        def refuse(message: str) -> None:
            raise ValueError(f"chat template: {message}")

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        environment.filters["tojson"] = lambda value, **options: json.dumps(value, ensure_ascii=False, **options)
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
        except self._error as error:
            raise ValueError(f"chat template: {error}") from None


class Chat:
    """A conversation with a model. What stands in the cache from the turns before is not computed again.

    Args:
        model: answers.
        tokenizer: its own.
        template: source of its chat template.
        system: a first message that says how to answer; None for what the template says.
    """

    def __init__(self, model: Llama, tokenizer: AnyTokenizer, template: str, system: str | None = None) -> None:
        names = ("" if i is None else tokenizer.token(i) for i in (tokenizer.bos_id, tokenizer.eos_id))
        self._template = ChatTemplate(template, *names)
        self._model, self._tokenizer = model, tokenizer
        weight = model.lm_head.weight
        self._cache = KVCache(model.config, 1, 0, weight.device, weight.dtype)
        self._cached: list[int] = []
        self.messages: list[Message] = [] if system is None else [{"role": "system", "content": system}]

    def prompt(self, text: str) -> list[int]:
        """Ids of the conversation so far and of `text` as the user's next message."""
        messages = [*self.messages, {"role": "user", "content": text}]
        return self._tokenizer.encode_marked(self._template.render(messages))

    def say(self, text: str, max_new_tokens: int = 512, stop: Sequence[str] = (), **sampling: Any) -> Answer:
        """The model's answer to `text`, to be iterated; the turn counts once it has been, to the end or not.

        Args:
            text: the user's message.
            max_new_tokens: of the answer; less where the context ends before.
            stop: strings at which it ends.
            sampling: temperature, top_k, top_p, min_p, repetition_penalty, seed.

        Raises:
            ValueError: the conversation fills the context, or an argument is out of its range.
        """
        ids = self.prompt(text)
        left = self._model.config.max_seq_len - len(ids)
        if left < 1:
            raise ValueError(
                f"the conversation has {len(ids)} tokens: expected fewer than max_seq_len = "
                f"{self._model.config.max_seq_len}; begin a new one"
            )
        common = 0
        for old, new in zip(self._cached, ids[:-1], strict=False):  # the last is always computed: it has the logits
            if old != new:
                break
            common += 1
        self._cache.used = common
        return Answer(self, text, ids, common, min(max_new_tokens, left), stop, sampling)


class Answer:
    """One answer of a `Chat`: iterate over its pieces of text; `stream` has its text, ids and reason."""

    def __init__(
        self,
        chat: Chat,
        text: str,
        ids: list[int],
        common: int,
        max_new_tokens: int,
        stop: Sequence[str],
        sampling: dict[str, Any],
    ) -> None:
        self._chat, self._text, self._ids = chat, text, ids
        self.computed = len(ids) - common  # prompt tokens that the cache does not have
        self.stream = TextStream(
            chat._model, chat._tokenizer, ids[common:], max_new_tokens, stop,
            cache=chat._cache, sampling=sampling, continuation=False,
        )  # fmt: skip

    def __iter__(self) -> Any:
        chat = self._chat
        try:
            yield from self.stream
        finally:
            chat._cached = [*self._ids, *self.stream.new_ids][: chat._cache.used]
            said = {"role": "user", "content": self._text}
            chat.messages += [said, {"role": "assistant", "content": self.stream.text}]
