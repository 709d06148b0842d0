"""Text streams: stop strings cut exactly, half characters are held back, the reason of the end is named."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from llama_fast.config import LlamaConfig
from llama_fast.model import Llama
from llama_fast.text import StopStrings, TextStream
from llama_fast.tokenizer import Tokenizer


def cut(text: str, stops: list[str]) -> str:
    """`text` up to the stop string that ends first; of those that end together, the longest."""
    ends = [(text.find(s) + len(s), -len(s)) for s in stops if s in text]
    end, length = min(ends, default=(len(text), 0))
    return text[: end + length]


def test_stop_strings_cut_where_the_first_one_ends() -> None:
    rng = random.Random(0)
    for _ in range(2000):
        text = "".join(rng.choices("abc", k=rng.randrange(12)))
        stops = ["".join(rng.choices("abc", k=rng.randrange(1, 4))) for _ in range(rng.randrange(3))]
        filter = StopStrings(stops)
        shown, at = "", 0
        while at < len(text):
            step = rng.randrange(1, 4)
            shown += filter.feed(text[at : at + step])
            assert cut(text, stops).startswith(shown), (text, stops)
            at += step
        found = filter.found
        shown += filter.finish()
        assert shown == cut(text, stops), (text, stops)
        assert (found is not None) == any(s in text for s in stops)


@pytest.mark.parametrize("stop", [3, None])
def test_stop_strings_that_are_none_are_named(stop: Any) -> None:
    with pytest.raises(ValueError, match=f"stop = {stop}: expected a string or several"):
        StopStrings(stop)


def test_text_that_cannot_begin_a_stop_string_is_shown_at_once() -> None:
    filter = StopStrings(["\n\n", "User:"])
    assert [filter.feed(t) for t in ("Hi", " U", "sed", "\n", "x", "\n\nmore", "no")] == [
        "Hi", " ", "Used", "", "\nx", "", "",
    ]  # fmt: skip
    assert filter.found == "\n\n"
    with pytest.raises(ValueError, match=r"stop = \['a', ''\]: expected strings of one character or more"):
        StopStrings(["a", ""])
    with pytest.raises(ValueError, match=r"stop = \[3\]: expected strings"):
        StopStrings([3])  # type: ignore[list-item]
    assert StopStrings("END").feed("sEND it: tEND") == "s"


@pytest.fixture(scope="module")
def tok(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    texts = ["".join(f"{i} the quick brown fox jumps over {i * 7} lazy dogs. \u65e5\u672c\n" for i in range(500))]
    return Tokenizer.train(texts, tmp_path_factory.mktemp("tokenizer") / "tokenizer.model", vocab_size=350)


class Script:
    """A model that says given ids; the rest of Llama is not asked."""

    def __init__(self, ids: list[int]) -> None:
        self.ids, self.given = ids, 0

    def stream(self, tokens: list[list[int]], max_new_tokens: int, **options: object):
        for i in self.ids[:max_new_tokens]:
            self.given += 1
            yield type("Step", (), {"tokens": torch.tensor([i]), "logprobs": torch.tensor([-0.5])})


def test_an_answer_and_why_it_ended(tok: Tokenizer) -> None:
    ids = tok.encode("the quick fox\u65e5 jumps", eos=True)
    for limit, stop, text, reason in (
        (99, [], " the quick fox\u65e5 jumps", "eos"),
        (len(ids) - 1, [], " the quick fox\u65e5 jumps", "length"),
        (99, ["x\u65e5"], " the quick fo", "stop"),
        (99, ["zzz", "ick fox\u65e5 jumps!"], " the quick fox\u65e5 jumps", "eos"),
    ):
        script = Script(ids)
        stream = TextStream(script, tok, [1], limit, stop, logprobs=True)  # type: ignore[arg-type]
        assert "".join(stream) == text == stream.text
        assert stream.reason == reason
        assert stream.new_ids == ids[: script.given]
        assert stream.token_logprobs == [-0.5] * script.given
    assert "".join(TextStream(Script(ids), tok, [1], 99, continuation=False)) == text.removeprefix(" ")  # type: ignore[arg-type]


def test_ids_that_the_tokenizer_lacks_are_no_text(tok: Tokenizer) -> None:
    """Embeddings have more rows than the vocabulary, for sizes that divide well; a model may sample such an id."""
    ids = tok.encode("the quick fox", eos=True)
    stream = TextStream(Script([ids[0], tok.vocab_size, *ids[1:3], tok.vocab_size + 7, *ids[3:]]), tok, [1], 99)  # type: ignore[arg-type]
    assert "".join(stream) == " the quick fox"
    assert (stream.reason, len(stream.new_ids)) == ("eos", len(ids) + 2)


def test_with_a_model(tok: Tokenizer) -> None:
    config = LlamaConfig(64, 2, 4, 2, 176, 350, 64)
    model = Llama(config)
    prompt = tok.encode("the quick", bos=True)
    stream = TextStream(model, tok, prompt, 12, sampling={"temperature": 1.0, "seed": 3})
    pieces = list(stream)
    expected = model.generate(torch.tensor([prompt]), max_new_tokens=12, temperature=1.0, seed=3, eos_id=tok.eos_id)
    assert [*prompt, *stream.new_ids] == expected[0].tolist()
    assert "".join(pieces) == tok.decode(stream.new_ids, continuation=True)
    with pytest.raises(ValueError, match="temperature = -1"):
        next(iter(TextStream(model, tok, prompt, 12, sampling={"temperature": -1.0})))
