"""Tokenizer: every byte string round-trips, ids are LLaMA's, training is repeatable, errors name what is wrong."""

import importlib.util
import itertools
import os
import random
import re
import sysconfig
from pathlib import Path

import pytest
import sentencepiece

from llama_fast import tokenizer as tokenizer_module
from llama_fast.tokenizer import Tokenizer

STDLIB = Path(sysconfig.get_path("stdlib"))
# Characters that SentencePiece, UTF-8 decoders or a prefix space could treat specially.
TRICKY = [" ", "\u2581", "\0", "\n", "\r", "\t", "\u2585", "\ufffd", "\ufeff", "\u00a0", "\u3000", "e\u0301", "\ufb01"]
TRICKY += ["<s>", "</s>", "<unk>", "<0x41>", "\u2047", "\U0010ffff", "\u200d", "a", "7", "    ", "\u0130", "\u4e2d"]
# Pieces of UTF-8 that are no character: a continuation byte, cut sequences, overlong, a surrogate, past the last one.
BROKEN = [b"\x80", b"\xe2", b"\xe2\x96", b"\xf0\x9f\x98", b"\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xff"]


def stdlib_texts() -> list[str]:
    """Forty modules of the standard library, about 2 MB."""
    return [path.read_bytes().decode() for path in sorted(STDLIB.glob("*.py"))[:80:2]]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    Tokenizer.train(stdlib_texts(), path, vocab_size=2000)
    return path


@pytest.fixture(scope="module")
def tok(model_path: Path) -> Tokenizer:
    return Tokenizer(model_path)


@pytest.fixture(scope="module")
def plain(model_path: Path) -> sentencepiece.SentencePieceProcessor:
    """The same model as SentencePiece itself reads it."""
    return sentencepiece.SentencePieceProcessor(model_proto=model_path.read_bytes())


def check_round_trip(tok: Tokenizer, data: bytes) -> None:
    ids = tok.encode(data)
    assert tok.decode_bytes(ids) == data, (data, ids)
    assert not {0, tok.bos_id, tok.eos_id} & set(ids), (data, ids)


def test_every_byte_and_every_pair_of_bytes_round_trips(tok: Tokenizer) -> None:
    data = [b"", *(bytes([a]) for a in range(256)), *(bytes([a, b]) for a in range(256) for b in range(256))]
    for text, ids in zip(data, tok.encode_many(data), strict=True):
        assert tok.decode_bytes(ids) == text, (text, ids)


def test_pairs_and_triples_of_tricky_text_round_trip(tok: Tokenizer) -> None:
    parts = [text.encode() for text in TRICKY] + BROKEN
    for a in parts:
        for b in parts:
            check_round_trip(tok, a + b)
            check_round_trip(tok, a + b" " + b + a)


def test_random_bytes_round_trip(tok: Tokenizer) -> None:
    rng = random.Random(20230227)
    parts = [text.encode() for text in TRICKY] + BROKEN + [b"return", b"def f(x):\n", b"\r\n"]
    for _ in range(3000):
        check_round_trip(tok, rng.randbytes(rng.randrange(40)))
        check_round_trip(tok, b"".join(rng.choices(parts, k=rng.randrange(12))))
        check_round_trip(tok, "".join(chr(rng.randrange(0xD800)) for _ in range(rng.randrange(12))).encode())


def test_every_character_of_unicode_round_trips(tok: Tokenizer) -> None:
    characters = [chr(c) for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    for start in range(0, len(characters), 4096):
        check_round_trip(tok, "".join(characters[start : start + 4096]).encode())


def test_standard_library_round_trips_with_the_ids_of_sentencepiece(
    tok: Tokenizer, plain: sentencepiece.SentencePieceProcessor
) -> None:
    texts = [path.read_bytes().decode() for path in sorted(STDLIB.glob("*.py"))[1:120:4]]
    encoded = tok.encode_many(texts)
    assert sum(map(len, texts)) > 500_000
    for text, ids in zip(texts, encoded, strict=True):
        assert tok.decode_bytes(ids) == text.encode()
        assert ids == plain.encode(text)
        assert tok.decode(ids) == plain.decode(ids)


@pytest.mark.parametrize("text", ["", "a", " a", "  a  ", "a\n\n\n# b", "7 77", "\r\n", "\u4e2d\u6587 x", "<s>a</s>"])
def test_ids_of_short_texts_are_sentencepieces(
    tok: Tokenizer, plain: sentencepiece.SentencePieceProcessor, text: str
) -> None:
    assert tok.encode(text) == plain.encode(text)
    assert tok.encode(text.encode()) == tok.encode(text)
    assert tok.encode(text, bos=True, eos=True) == [1, *plain.encode(text), 2]


def test_chunks_and_threads_do_not_change_ids(tok: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "".join(stdlib_texts()[:4]) + "\n\n#\n\n\n#\n# x\n    y\n\n###\n" * 50
    whole = tok.encode(text)
    monkeypatch.setattr(tokenizer_module, "_CHUNK_CHARS", 1)
    assert len(list(tok._chunks(text))) > 500
    assert tok.encode(text) == whole
    assert tok.encode_many([text, "", text], num_threads=3) == [whole, [], whole]


def test_parts_join_to_the_whole(tok: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    text = b"\xff" + stdlib_texts()[1].encode() + b"\xe2\x96 x"
    whole = tok.encode(text, bos=True, eos=True)
    monkeypatch.setattr(tokenizer_module, "_CHUNK_CHARS", 100)
    monkeypatch.setattr(tokenizer_module, "_CHUNKS_A_PART", 2)
    parts = list(tok.encode_parts(text, bos=True, eos=True))
    assert len(parts) > 10
    assert max(map(len, parts)) < 400
    assert [i for part in parts for i in part] == whole
    assert list(tok.encode_parts("")) == []


def test_chunks_respect_pieces_with_two_newlines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "a\n\nb\n\nc\n\nd\n\n#x" * 20
    tok = Tokenizer.train([text], tmp_path / "m", vocab_size=269)
    whole = tok.encode(text)
    assert b"\n\n#" in map(tok.piece, whole)
    assert b"\n#" not in {tok.piece(i) for i in range(tok.vocab_size)}
    monkeypatch.setattr(tokenizer_module, "_CHUNK_CHARS", 1)
    assert len(list(tok._chunks(text))) == 61
    assert tok.encode(text) == whole


def test_training_follows_llama(tok: Tokenizer) -> None:
    pieces = [tok.piece(i) for i in range(tok.vocab_size)]
    assert tok.vocab_size == 2000
    assert (tok.bos_id, tok.eos_id) == (1, 2)
    assert pieces[:3] == [" \u2047 ".encode(), b"", b""]
    assert pieces[3:259] == [bytes([b]) for b in range(256)]
    learned = [piece.decode() for piece in pieces[259:]]
    assert not [p for p in learned if sum(c.isdigit() for c in p) and len(p.strip()) > 1], "digits stand alone"
    assert max(map(len, learned)) <= 16
    assert {"\n", "\n\n", ":\n", "    ", "        "} <= set(learned), "newlines and indentation are pieces"


def test_training_is_repeatable_and_leaves_one_file(tmp_path: Path) -> None:
    texts = stdlib_texts()[:6]
    a = Tokenizer.train(texts, tmp_path / "a.model", vocab_size=600)
    b = Tokenizer.train(iter(texts), tmp_path / "b.model", vocab_size=600)
    c = Tokenizer.train(texts, tmp_path / "c.model", vocab_size=601)
    assert a.fingerprint == b.fingerprint != c.fingerprint
    assert sorted(os.listdir(tmp_path)) == ["a.model", "b.model", "c.model"]


def test_training_takes_an_even_sample_of_long_text(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_module, "_SAMPLE_BYTES", 1000)
    texts = [f"document {i:05d}\n" for i in range(5000)]
    kept = tokenizer_module._sample(texts)
    steps = {texts.index(b) - texts.index(a) for a, b in itertools.pairwise(kept)}
    assert steps == {128}
    assert 500 <= sum(map(len, kept)) <= 1000
    long = "".join(f"line {i}\n" for i in range(3000)) + "x" * 9000
    sentences = list(tokenizer_module._sentences(long))
    assert "".join(sentences) == long
    assert max(map(len, sentences)) <= 4096
    assert all(sentence.endswith("\n") for sentence in sentences[:6])


def test_training_is_not_upset_by_reserved_characters(tmp_path: Path) -> None:
    texts = ["a \0 b \u2581 c \u2585 d <s> </s> <unk> <0x0A> <0x0A>\t" * 50 + text for text in stdlib_texts()[:3]]
    check_round_trip(Tokenizer.train(texts, tmp_path / "m", vocab_size=500), texts[0].encode())


def test_training_says_which_vocabulary_sizes_fit(tmp_path: Path) -> None:
    texts = ["hello world\n foo", "bar"] * 20
    with pytest.raises(ValueError, match=r"vocab_size 200 is too small.* at least \d+") as small:
        Tokenizer.train(texts, tmp_path / "m", vocab_size=200)
    with pytest.raises(
        ValueError, match=r"vocab_size 90000 is too large.* at most \d+ pieces: expected more text"
    ) as large:
        Tokenizer.train(texts, tmp_path / "m", vocab_size=90_000)
    assert not os.listdir(tmp_path)
    for error in (small, large):
        size = int(re.findall(r"at (?:least|most) (\d+)", str(error.value))[0])
        assert Tokenizer.train(texts, tmp_path / "m", vocab_size=size).vocab_size == size


@pytest.mark.parametrize("texts", [[], [""], ["  \n ", "\t"], ["\u2581\0"]])
def test_training_on_nothing_is_an_error(tmp_path: Path, texts: list[str]) -> None:
    with pytest.raises(ValueError, match="no text to train on"):
        Tokenizer.train(texts, tmp_path / "m", vocab_size=300)


def test_training_on_one_text_in_place_of_several_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="texts is a str; expected several, a list of one for one"):
        Tokenizer.train("some text and more\n" * 99, tmp_path / "tokenizer.model", 280)


def test_files_that_are_no_model_are_named(tmp_path: Path, model_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere\.model"):
        Tokenizer(tmp_path / "nowhere.model")
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        Tokenizer(tmp_path)
    model = model_path.read_bytes()
    for name, data in {"empty": b"", "text": b"hello", "half": model[: len(model) // 2], "short": model[:-5]}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(ValueError, match=f"{tmp_path}/{name}"):
            Tokenizer(tmp_path / name)


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"byte_fallback": False}, "no byte pieces"),
        ({"normalization_rule_name": "nfkc"}, "normalises text"),
        ({"remove_extra_whitespaces": True}, "normalises text"),
        ({"bos_id": -1}, "bos id -1"),
    ],
)
def test_models_that_lose_text_are_refused(tmp_path: Path, options: dict[str, object], problem: str) -> None:
    settings: dict[str, object] = {"byte_fallback": True, "normalization_rule_name": "identity"}
    settings |= {"remove_extra_whitespaces": False, "model_type": "bpe", "vocab_size": 500, "minloglevel": 2}
    with open(tmp_path / "m", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(stdlib_texts()[0].split("\n")), model_writer=file, **(settings | options)
        )
    with pytest.raises(ValueError, match=problem):
        Tokenizer(tmp_path / "m")


def test_a_lone_surrogate_is_an_error_with_its_position(tok: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"udcff.* position 2"):
        tok.encode("ab\udcff")
    with pytest.raises(ValueError, match="lone surrogate"):
        Tokenizer.train(["a\ud800"], tmp_path / "m", vocab_size=300)


@pytest.mark.parametrize("i", [-1, 2000, 10**12])
def test_ids_outside_the_vocabulary_are_an_error(tok: Tokenizer, i: int) -> None:
    with pytest.raises(ValueError, match=rf"token id {i} is outside \[0, 2000\)"):
        tok.decode([5, i])
    with pytest.raises(TypeError):
        tok.decode([5.0])  # type: ignore[list-item]


def test_decoding_knows_where_texts_start(tok: Tokenizer) -> None:
    a, b = tok.encode(" a", bos=True, eos=True), tok.encode("b c", bos=True, eos=True)
    assert tok.decode(a + b) == " ab c"
    assert tok.decode(tok.encode("and so"), continuation=True) == " and so"
    assert tok.decode([tok.eos_id, *tok.encode("x")]) == "x"


def test_broken_text_decodes_with_replacement(tok: Tokenizer) -> None:
    assert tok.decode(tok.encode(b"a\xffb\xe2\x96")) == "a\ufffdb\ufffd"


def test_streaming_gives_the_same_text_and_no_half_characters(tok: Tokenizer) -> None:
    for data in [
        "caf\u00e9 \U0001f600!".encode(),
        b"  x\xe2\x96 y\xff",
        "\u4e2d\u6587".encode(),
        b"a\xf0\x9f\x98",
        b"",
    ]:
        ids = tok.encode(data, bos=True, eos=True)
        stream = tok.stream_decoder()
        parts = [stream.feed(i) for i in ids] + [stream.finish()]
        assert "".join(parts) == tok.decode(ids) == data.decode(errors="replace")
    stream = tok.stream_decoder(continuation=True)
    ids = tok.encode("\u4e2d")
    assert [stream.feed(i) for i in ids] == [" ", "", "", "\u4e2d"]


def test_marks_of_a_template_and_names(tok: Tokenizer, model_path: Path) -> None:
    """Control pieces written in a template's text; each text between them is one of its own."""
    assert tok.encode_marked("<s>the</s><s>def f") == [1, *tok.encode("the"), 2, 1, *tok.encode("def f")]
    assert tok.encode_marked("") == []
    assert 1 not in tok.encode("<s>the")
    assert [tok.token(i) for i in (1, 2)] == ["<s>", "</s>"]
    assert (tok.eos_ids, tok.adds_bos) == ((2,), True)
    from_bytes = Tokenizer("elsewhere", model=model_path.read_bytes())
    assert from_bytes.encode(TRICKY[8]) == tok.encode(TRICKY[8])
    assert from_bytes.fingerprint == tok.fingerprint


# ---- a real vocabulary: PyPI's mistral-common carries one of LLaMA's kind (Apache-2.0) -------------------------------


def test_a_real_vocabulary_of_32000_pieces() -> None:
    spec = importlib.util.find_spec("mistral_common")
    file = Path(str(spec and spec.origin)).parent / "data" / "tokenizer.model.v1"
    if not file.is_file():
        pytest.skip("mistral-common 1.13.1 is not installed (pip install mistral-common==1.13.1)")
    real = Tokenizer(file)
    plain = sentencepiece.SentencePieceProcessor(model_file=str(file))
    assert (real.vocab_size, real.bos_id, real.eos_id) == (32000, 1, 2)
    for text in [
        "Hello, world!",
        "the",
        " two  spaces",
        "1234 \n\n x = [1,2]",
        "\u65e5\u672c\u8a9e \U0001f600",
        *TRICKY,
    ]:
        if not text.startswith(" ") and "\u2581" not in text:  # the two that the class mends
            assert real.encode(text) == plain.encode(text), text
        check_round_trip(real, text.encode())
    source = stdlib_texts()[0]
    assert real.encode(source) == plain.encode(source)
