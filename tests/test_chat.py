"""Chat templates as transformers renders them, in a sandbox; conversations that compute each token once."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llama_fast.bpe import BPETokenizer
from llama_fast.chat import Answer, Chat, ChatTemplate
from llama_fast.config import LlamaConfig
from llama_fast.model import Llama
from llama_fast.pretrained import chat_template

pytest.importorskip("jinja2", reason="the extra chat is not installed")
library = pytest.importorskip("tokenizers", reason="the extra chat is not installed")

CHATML = """{% for message in messages %}
{% if loop.first and message['role'] != 'system' %}
    {{ '<|im_start|>system\\nBe kind.<|im_end|>\\n' }}
{% endif %}
{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
LLAMA2 = """{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}{% endif %}
{%- for message in messages if message['role'] != 'system' -%}
{%- if message['role'] == 'user' -%}
{{- bos_token + '[INST] ' + message['content'].strip() + ' [/INST]' -}}
{%- elif message['role'] == 'assistant' -%}{{- ' ' + message['content'] + ' ' + eos_token -}}
{%- else -%}{{- raise_exception('no role ' + message['role']) -}}{%- endif -%}
{%- if loop.index > 99 -%}{%- break -%}{%- endif -%}
{%- endfor -%}"""
TOOLS = """{{ messages | tojson }}{{ messages | tojson(indent=2) }}{{ 'é<>&' | tojson }}
{{ 'é' | tojson(ensure_ascii=True) }}{{ messages | tojson(ensure_ascii=False, sort_keys=True) }}"""
GENERATION = """{% set n = 'outer' %}
{% for message in messages %}
    {% if message['role'] == 'assistant' %}
        {% generation %}{% set n = 'inner' %}
{{ n + message['content'] }} {% endgeneration %}

    {% else %}{{ loop.index }}{{ message['content'] }}{% endif %}
{% endfor %}{{ n }}"""
MESSAGES = [
    {"role": "system", "content": "Say é."},
    {"role": "user", "content": " Hi <b>&amp;</b> "},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "Why\n"},
]
SPECIAL = ["<s>", "<|im_start|>", "<|im_end|>"]


def backend() -> Any:
    alphabet = sorted(library.pre_tokenizers.ByteLevel.alphabet())
    vocab = {t: i for i, t in enumerate([*SPECIAL, *alphabet])}
    made = library.Tokenizer(library.models.BPE(vocab, []))
    made.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = library.decoders.ByteLevel()
    made.add_special_tokens(SPECIAL)
    return made


@pytest.fixture
def tok() -> BPETokenizer:
    return BPETokenizer(backend(), 0, [2], adds_bos=False)


@pytest.mark.parametrize("source", [CHATML, LLAMA2, TOOLS, GENERATION])
def test_transformers_renders_the_same(source: str) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=backend(), bos_token="<s>", eos_token="<|im_end|>")
    template = ChatTemplate(source, "<s>", "<|im_end|>")
    for messages in (MESSAGES, MESSAGES[1:2]):
        for add in (True, False):
            expected = theirs.apply_chat_template(
                messages, chat_template=source, add_generation_prompt=add, tokenize=False
            )
            assert template.render(messages, add_generation_prompt=add) == expected


def test_templates_are_sandboxed_and_their_errors_are_named() -> None:
    with pytest.raises(ValueError, match="chat template: no role tool"):
        ChatTemplate(LLAMA2).render([{"role": "tool", "content": ""}])
    with pytest.raises(ValueError, match=r"chat template: .*expected a jinja2 template"):
        ChatTemplate("{% if %}")
    for escape in ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ messages.append(1) }}"):
        with pytest.raises(ValueError, match=r"chat template: .*(unsafe|immutable|not safely callable)"):
            ChatTemplate(escape).render(MESSAGES)
    for failing in ("{{ 'a' + 1 }}", "{{ 1 // 0 }}", "{{ messages[0]['content']['x'].y }}", "{{ {}.popitem() }}"):
        with pytest.raises(ValueError, match="chat template: "):
            ChatTemplate(failing).render(MESSAGES)


def test_a_checkpoint_without_a_template_is_told(model: Llama, tok: BPETokenizer, tmp_path: Path) -> None:
    none = chat_template(tmp_path)
    assert none is None
    with pytest.raises(ValueError, match="chat template: None: expected the source of one; a checkpoint without"):
        Chat(model, tok, none)


def test_an_old_sandbox_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for version, message in (("3.1.5", "jinja2 3.1.5 has known ways out of its sandbox"), ("3.2rc1", None)):
        monkeypatch.setattr("llama_fast.chat.version", lambda _, version=version: version)
        if message is None:
            ChatTemplate(CHATML)
        else:
            with pytest.raises(ImportError, match=message):
                ChatTemplate(CHATML)


@pytest.fixture(scope="module")
def model() -> Llama:
    model = Llama(LlamaConfig(64, 2, 4, 2, 176, 259, 256))
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim == 2:
                p.mul_(4.0)
    return model


def test_a_conversation_computes_each_token_once(
    model: Llama, tok: BPETokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = Chat(model, tok, CHATML, system="s")
    computed = []
    hidden = model.hidden
    monkeypatch.setattr(model, "hidden", lambda t, cache: computed.append(t.shape[1]) or hidden(t, cache))
    for turn in ("one", "two", "three"):
        prompt = chat.prompt(turn)
        computed.clear()
        answer = chat.say(turn, max_new_tokens=9)
        text = "".join(answer)
        alone = model.generate(torch.tensor([prompt]), max_new_tokens=9, eos_id=tok.eos_id)[0, len(prompt) :]
        assert answer.stream.new_ids == alone.tolist()
        assert chat.messages[-2:] == [
            {"role": "user", "content": turn}, {"role": "assistant", "content": text},
        ]  # fmt: skip
        assert computed[0] == answer.computed
        assert answer.computed == len(prompt) if turn == "one" else answer.computed < 40 < len(prompt)
    assert [m["role"] for m in chat.messages] == ["system", *["user", "assistant"] * 3]


def test_an_answer_that_is_broken_off_counts(model: Llama, tok: BPETokenizer) -> None:
    chat = Chat(model, tok, CHATML)
    pieces = iter(chat.say("Hello", max_new_tokens=50))
    said = next(pieces) + next(pieces)
    pieces.close()
    assert chat.messages == [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": said}]
    prompt = chat.prompt("Go on")
    answer = chat.say("Go on", max_new_tokens=5)
    list(answer)
    alone = model.generate(torch.tensor([prompt]), max_new_tokens=5, eos_id=tok.eos_id)[0, len(prompt) :]
    assert answer.stream.new_ids == alone.tolist()


def test_a_message_breaks_off_the_answer_before_it(model: Llama, tok: BPETokenizer) -> None:
    """An iterator that is kept would otherwise go on in the cache of the next answer."""
    chat = Chat(model, tok, CHATML)
    list(chat.say("One", max_new_tokens=9))
    kept = iter(chat.say("Two", max_new_tokens=9))
    said = next(kept)
    answer = chat.say("Three", max_new_tokens=9)
    assert chat.messages[2:] == [{"role": "user", "content": "Two"}, {"role": "assistant", "content": said}]
    assert list(kept) == []
    prompt = chat.prompt("Three")
    assert _ids(answer) == _alone(model, tok, prompt)
    assert [m["role"] for m in chat.messages] == ["user", "assistant"] * 3


def test_answers_in_any_order_are_right(model: Llama, tok: BPETokenizer) -> None:
    chat = Chat(model, tok, CHATML)
    prompts = [chat.prompt(text) for text in ("One", "Two", "Three")]
    answers = [chat.say(text, max_new_tokens=9) for text in ("One", "Two", "Three")]
    for i in (1, 0, 2):
        assert _ids(answers[i]) == _alone(model, tok, prompts[i])


def test_an_answer_that_fails_does_not_count(model: Llama, tok: BPETokenizer) -> None:
    chat = Chat(model, tok, CHATML)
    list(chat.say("One", max_new_tokens=9))
    before = list(chat.messages)
    for wrong in ({"temperature": -1.0}, {"max_new_tokens": -1}):
        with pytest.raises(ValueError, match="= -1"):
            list(chat.say("Two", **wrong))
        assert chat.messages == before
    assert _alone(model, tok, chat.prompt("Two")) == _ids(chat.say("Two", max_new_tokens=9))


def test_under_autocast(model: Llama, tok: BPETokenizer) -> None:
    chat = Chat(model, tok, CHATML)
    for enabled in (False, True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            prompt = chat.prompt("One")
            answer = chat.say("One", max_new_tokens=9)
            assert _ids(answer) == _alone(model, tok, prompt)
            assert answer.computed == len(prompt)  # of another dtype than those before


def test_the_repetition_penalty_counts_what_the_cache_holds(model: Llama, tok: BPETokenizer) -> None:
    chat = Chat(model, tok, CHATML)
    for text in ("One", "Two", "Three"):
        prompt = chat.prompt(text)
        answer = chat.say(text, max_new_tokens=9, repetition_penalty=1.5)
        whole = model.generate([prompt], max_new_tokens=9, eos_id=tok.eos_id, repetition_penalty=1.5)
        assert _ids(answer) == whole[0][len(prompt) :]
    assert answer.computed < len(prompt) / 2


def _ids(answer: Answer) -> list[int]:
    assert "".join(answer) == answer.stream.text
    return answer.stream.new_ids


def _alone(model: Llama, tok: BPETokenizer, prompt: list[int]) -> list[int]:
    whole = model.generate(torch.tensor([prompt]), max_new_tokens=9, eos_id=tok.eos_id)
    return whole[0, len(prompt) :].tolist()


def test_a_full_context_is_named(model: Llama, tok: BPETokenizer) -> None:
    chat = Chat(model, tok, CHATML)
    answer = chat.say("x" * 150, max_new_tokens=500)
    assert "".join(answer) == answer.stream.text
    assert len(chat.prompt("")) > 200
    with pytest.raises(ValueError, match=r"the conversation has \d+ tokens: expected fewer than max_seq_len = 256"):
        chat.say("x" * 150)


def test_text_of_the_user_cannot_be_told_from_the_template(tok: BPETokenizer, model: Llama) -> None:
    """As in transformers: special tokens in a message are special. Written down, so that a change is seen."""
    assert Chat(model, tok, CHATML).prompt("<|im_end|>").count(2) == 3
