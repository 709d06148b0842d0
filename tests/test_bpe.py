"""Byte-level BPE: a trained vocabulary, as tokenizer.json, as Llama 3's file and inside a GGUF, gives one tokenizer."""

from __future__ import annotations

import base64
import json
import random
import sysconfig
import unicodedata
from pathlib import Path
from typing import Any

import pytest

from llama_fast import bpe
from llama_fast.bpe import BPETokenizer
from llama_fast.pretrained import chat_template, load_tokenizer, write_companions

library = pytest.importorskip("tokenizers", reason="the extra chat is not installed")

STDLIB = Path(sysconfig.get_path("stdlib"))
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEXTS = [
    "",
    "a",
    " a  b\n\n\n c\t\r\n",
    "Hello, world! It's 12345.678 o'clock; they'LL see 3D",
    "naïve café — 日本語 😀👩‍👩‍👧 \u00a0\u200b\ufeff é",
    "def f(x):\n    return x**2  # <|im_start|>",
    "\x00\x01\x7f\ufffd",
]


def trained(pattern: Any, normalizer: Any = None, whole: bool = False) -> Any:
    backend = library.Tokenizer(library.models.BPE(ignore_merges=whole))
    if normalizer is not None:
        backend.normalizer = normalizer
    backend.pre_tokenizer = pattern
    backend.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=1500,
        special_tokens=SPECIAL,
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [(STDLIB / name).read_text() for name in ("argparse.py", "tarfile.py", "typing.py")]
    backend.train_from_iterator([*texts, *TEXTS], trainer)
    return backend


@pytest.fixture(scope="module")
def digits() -> Any:
    pre = library.pre_tokenizers
    return trained(pre.Sequence([pre.Digits(individual_digits=True), pre.ByteLevel(add_prefix_space=False)]))


@pytest.fixture(scope="module")
def folder(digits: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tokenizer")
    digits.save(str(path / "tokenizer.json"))
    settings = {"bos_token": "<|endoftext|>", "eos_token": {"content": "<|im_end|>"}, "chat_template": "{{ messages }}"}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    (path / "generation_config.json").write_text('{"eos_token_id": [0, 2]}')
    return path


@pytest.fixture
def tok(folder: Path) -> BPETokenizer:
    found = load_tokenizer(folder)
    assert isinstance(found, BPETokenizer)
    return found


def test_special_ids_and_marks(tok: BPETokenizer) -> None:
    assert (tok.vocab_size, tok.bos_id, tok.eos_id, tok.eos_ids, tok.adds_bos) == (1500, 0, 2, (2, 0), False)
    assert tok.encode("a", bos=True, eos=True) == [0, *tok.encode("a"), 2]
    marked = tok.encode_marked("<|im_start|>user\nHi<|im_end|>")
    assert (marked[0], marked[-1]) == (1, 2)
    plain = tok.encode("<|im_start|>user\nHi<|im_end|>")
    assert not {0, 1, 2} & set(plain)
    assert tok.decode(plain) == "<|im_start|>user\nHi<|im_end|>"
    assert tok.decode(marked) == "user\nHi"
    assert tok.token(2) == "<|im_end|>"


@pytest.mark.parametrize("text", TEXTS)
def test_round_trip_and_streams(tok: BPETokenizer, text: str) -> None:
    ids = tok.encode(text)
    assert tok.decode(ids) == text
    for continuation in (False, True):
        stream = tok.stream_decoder(continuation=continuation)
        pieces = [stream.feed(i) for i in ids]
        assert "".join(pieces) + stream.finish() == text
        assert not any("\ufffd" in p for p in pieces) or "\ufffd" in text


def test_streams_of_random_ids_are_the_whole_decoding(tok: BPETokenizer) -> None:
    rng = random.Random(0)
    for _ in range(100):
        ids = [rng.randrange(3, tok.vocab_size) for _ in range(rng.randrange(12))]
        assert tok.decode(ids) == tok.backend.decode(ids)
    with pytest.raises(ValueError, match=r"token id 1500 is outside \[0, 1500\)"):
        tok.decode([1500])


@pytest.mark.parametrize("text", ["\udcff", "ab\ud800"])
def test_no_text_is_named(tok: BPETokenizer, text: str) -> None:
    """Bytes of the command line that are not UTF-8 come as these."""
    for encode in (tok.encode, tok.encode_marked):
        with pytest.raises(ValueError, match=rf"text has a lone surrogate, .*, at position {len(text) - 1}"):
            encode(text)


def test_a_special_token_inside_a_text_takes_no_space() -> None:
    """LLaMA 2's decoder strips the space in front of a text, not those inside it."""
    vocab = {"<s>": 0, "\u2581a": 1, "\u2581b": 2, "c": 3, "a": 4}
    backend = library.Tokenizer(library.models.BPE(vocab, []))
    parts = (library.decoders.Replace("\u2581", " "), library.decoders.Fuse(), library.decoders.Strip(" ", 1, 0))
    backend.decoder = library.decoders.Sequence(list(parts))
    backend.add_special_tokens(["<s>"])
    tok = BPETokenizer(backend, 0, [], adds_bos=True)
    for ids in ([1, 0, 2, 3], [0, 1, 0, 0, 2], [1, 0], [0, 0, 1, 2], [3, 0, 3, 2]):
        assert tok.decode(ids) == backend.decode(ids)
    assert tok.decode([1, 0, 2], continuation=True) == " a b"


def test_a_vocabulary_that_leaves_numbers_out() -> None:
    library = pytest.importorskip("tokenizers", reason="the extra chat is not installed")
    alphabet = sorted(library.pre_tokenizers.ByteLevel.alphabet())
    backend = library.Tokenizer(library.models.BPE({**{t: i for i, t in enumerate(alphabet)}, "zz": 300}, []))
    backend.decoder = library.decoders.ByteLevel()
    tok = BPETokenizer(backend, None, [], adds_bos=False)
    assert tok.vocab_size == 301
    assert tok.decode([300, 299, 300]) == "zzzz"


def test_a_vocabulary_without_bos(digits: Any) -> None:
    tok = BPETokenizer(digits, None, [], adds_bos=True)
    assert not tok.adds_bos
    assert tok.eos_id is None
    with pytest.raises(ValueError, match="bos = True, eos = False: the vocabulary has bos None"):
        tok.encode("a", bos=True)


def test_a_post_processor_that_adds_bos(digits: Any, tmp_path: Path) -> None:
    backend = library.Tokenizer.from_str(digits.to_str())
    template = library.processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    backend.post_processor = template
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text('{"bos_token_id": 0, "eos_token_id": 2}')
    tok = load_tokenizer(tmp_path)
    assert (tok.bos_id, tok.eos_ids, tok.adds_bos) == (0, (2,), True)
    assert tok.encode("a") == tok.encode("a", bos=True)[1:]


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer.json: .*expected a tokenizer of the package tokenizers"):
        load_tokenizer(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"expected tokenizer.json or tokenizer.model"):
        load_tokenizer(tmp_path / "none")


def test_the_extra_is_named_where_it_is_missing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tokenizers", None)
    with pytest.raises(ImportError, match=r"tokenizer.json: .*pip install 'llama_fast\[chat\]'"):
        load_tokenizer(folder)


def test_written_files_give_the_same_and_transformers_reads_them(
    folder: Path, tok: BPETokenizer, tmp_path: Path
) -> None:
    bpe.save(tok, tmp_path, "{{ bos_token }}")
    again = load_tokenizer(tmp_path)
    assert (again.bos_id, again.eos_id) == (tok.bos_id, tok.eos_id)
    assert [again.encode(t) for t in TEXTS] == [tok.encode(t) for t in TEXTS]
    assert chat_template(tmp_path) == "{{ bos_token }}"
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert (theirs.bos_token_id, theirs.eos_token_id) == (0, 2)
    assert theirs(TEXTS[3])["input_ids"] == tok.encode(TEXTS[3])
    copied = tmp_path / "copied"
    copied.mkdir()
    write_companions(folder, copied)
    assert sorted(p.name for p in copied.iterdir()) == sorted(p.name for p in folder.iterdir())


# ---- Llama 3's file --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llama3(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[bytes, int]]:
    """A small vocabulary in Llama 3's form: every byte, then what training merged, in order."""
    backend = trained(bpe._pattern_split(library, bpe.LLAMA3_PATTERN))
    byte_of = {c: b for b, c in bpe._byte_characters().items()}
    tokens = sorted((i, t) for t, i in backend.get_vocab().items() if t not in SPECIAL)
    order = [bytes(byte_of[c] for c in t) for _, t in tokens]
    ranks = {t: rank for rank, t in enumerate(sorted(order, key=lambda t: len(t) > 1))}
    path = tmp_path_factory.mktemp("llama3")
    lines = [f"{base64.b64encode(t).decode()} {rank}" for t, rank in ranks.items()]
    (path / "tokenizer.model").write_text("\n".join(lines) + "\n")
    return path, ranks


def test_llama3_file_gives_tiktokens_ids(llama3: tuple[Path, dict[bytes, int]]) -> None:
    tiktoken = pytest.importorskip("tiktoken", reason="tiktoken is not installed")
    path, ranks = llama3
    tok = load_tokenizer(path)
    n = len(ranks)
    assert (tok.vocab_size, tok.bos_id, tok.eos_ids, tok.adds_bos) == (n + 256, n, (n + 1, n + 8, n + 9), True)
    assert [tok.token(n + i) for i in (6, 11, 12, 255)] == [
        "<|start_header_id|>", "<|image|>", "<|reserved_special_token_2|>", "<|reserved_special_token_245|>",
    ]  # fmt: skip
    oracle = tiktoken.Encoding("a", pat_str=bpe.LLAMA3_PATTERN, mergeable_ranks=ranks, special_tokens={})
    rng = random.Random(1)
    source = (STDLIB / "decimal.py").read_text() + (STDLIB / "_pydecimal.py").read_text()
    random_texts = ["".join(chr(rng.randrange(0x3000)) for _ in range(30)) for _ in range(200)]
    for text in [*TEXTS, source, *random_texts]:
        ids = tok.encode(text)
        assert ids == oracle.encode_ordinary(text), text[:80]
        assert tok.decode(ids) == text


def test_llama3_file_converted_keeps_its_ends_and_its_beginning(
    llama3: tuple[Path, dict[bytes, int]], tmp_path: Path
) -> None:
    write_companions(llama3[0], tmp_path)
    (tmp_path / "tokenizer.model").unlink()
    tok, again = load_tokenizer(llama3[0]), load_tokenizer(tmp_path)
    assert again.encode("a") == tok.encode("a")
    assert again.adds_bos
    assert (again.bos_id, again.eos_ids) == (tok.bos_id, tok.eos_ids)
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs(TEXTS[3])["input_ids"] == tok.encode(TEXTS[3], bos=True)
    ends = transformers.GenerationConfig.from_pretrained(tmp_path)
    assert (ends.bos_token_id, ends.eos_token_id) == (tok.bos_id, list(tok.eos_ids))


@pytest.mark.parametrize(
    ("line", "message"),
    [("not base64! 7", r"tokenizer.model:2: b'not base64! 7': expected a token"), ("IQ== 5", "ranks of 2 tokens")],
)
def test_damaged_llama3_files(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "tokenizer.model").write_text(f"Ig== 0\n{line}\n")
    with pytest.raises(ValueError, match=message):
        load_tokenizer(tmp_path)


# ---- Qwen's: another pattern, and texts in normal form C -------------------------------------------------------------

NOT_IN_NFC = "cafe\u0301 \u212b 12345 <|im_end|>"


@pytest.fixture(scope="module")
def qwen2() -> Any:
    """As transformers' tokenization_qwen2.py has it."""
    found = trained(bpe._pattern_split(library, bpe.QWEN2_PATTERN), library.normalizers.NFC())
    found.post_processor = library.processors.ByteLevel(trim_offsets=False)
    return found


def test_the_pattern_is_transformers() -> None:
    theirs = pytest.importorskip("transformers.models.qwen2.tokenization_qwen2", reason="transformers is not installed")
    assert getattr(theirs, "PRETOKENIZE_REGEX", bpe.QWEN2_PATTERN) == bpe.QWEN2_PATTERN


def test_qwens_folder(qwen2: Any, tmp_path: Path) -> None:
    """Its tokenizer_config.json has no bos_token, its config.json a bos_token_id that opens no text."""
    qwen2.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": null, "eos_token": "<|im_end|>"}')
    (tmp_path / "config.json").write_text('{"bos_token_id": 0, "eos_token_id": 2}')
    (tmp_path / "generation_config.json").write_text('{"bos_token_id": 0, "eos_token_id": [2, 0]}')
    tok = load_tokenizer(tmp_path)
    assert (tok.bos_id, tok.eos_ids, tok.adds_bos) == (0, (2, 0), False)
    qwen2.encode_special_tokens = True
    for text in [*TEXTS, NOT_IN_NFC, (STDLIB / "decimal.py").read_text()]:
        assert tok.encode(text) == qwen2.encode(text).ids
        assert tok.decode(tok.encode(text)) == unicodedata.normalize("NFC", text)
    assert tok.encode_marked("<|im_start|>a<|im_end|>")[::2] == [1, 2]
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)
    assert theirs(NOT_IN_NFC)["input_ids"] == tok.encode_marked(NOT_IN_NFC)


# ---- inside a GGUF file ----------------------------------------------------------------------------------------------


def gguf_fields(backend: Any, pre: str) -> dict[str, Any]:
    vocab = sorted(backend.get_vocab(), key=backend.token_to_id)
    model = json.loads(backend.to_str())["model"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": vocab,
        "tokenizer.ggml.token_type": [3 if t in SPECIAL else 1 for t in vocab],
        "tokenizer.ggml.merges": [" ".join(m) for m in model["merges"]],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.eos_token_id": 2,
    }


def test_gguf_vocabularies_give_the_same_ids(digits: Any, qwen2: Any) -> None:
    pre = library.pre_tokenizers
    ways = {
        "smollm": digits,
        "gpt-2": trained(pre.ByteLevel(add_prefix_space=False)),
        "llama-bpe": trained(bpe._pattern_split(library, bpe.LLAMA3_PATTERN), whole=True),
        "qwen2": qwen2,
    }
    for name, backend in ways.items():
        tok = bpe.from_gguf(Path("a.gguf"), gguf_fields(backend, name))
        for text in [*TEXTS, NOT_IN_NFC, Path(__file__).read_text()]:
            backend.encode_special_tokens = True
            assert tok.encode(text) == backend.encode(text).ids, (name, text)
        assert (tok.bos_id, tok.eos_ids, tok.adds_bos) == (0, (2,), name == "llama-bpe")
        assert tok.encode_marked("<|im_end|>") == [2]


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("qwen2", ["1", "2", "a", "bc"]),
        ("smollm", ["1", "2", "a", "bc"]),
        ("gpt-2", ["12", "a", "bc"]),
        ("llama-bpe", ["12", "abc"]),
    ],
)
def test_digits_and_tokens_that_no_merges_lead_to(pre: str, expected: list[str]) -> None:
    """Llama 3's tokens are taken whole where a text has them, the others' are what the merges give."""
    tokens = [*sorted(library.pre_tokenizers.ByteLevel.alphabet()), "12", "bc", "ab", "abc"]
    fields = {"pre": pre, "tokens": tokens, "token_type": len(tokens) * [1]}
    fields["merges"] = ["1 2", "b c", "a b", "ab c"]
    tok = bpe.from_gguf(Path("a.gguf"), {f"tokenizer.ggml.{name}": value for name, value in fields.items()})
    assert [tok.token(i) for i in tok.encode("12abc")] == expected


def test_gguf_metadata_that_will_not_do(digits: Any) -> None:
    fields = gguf_fields(digits, "smollm")
    with pytest.raises(ValueError, match=r"a.gguf: tokenizer.ggml.pre = 'tekken': expected one of"):
        bpe.from_gguf(Path("a.gguf"), {**fields, "tokenizer.ggml.pre": "tekken"})
    del fields["tokenizer.ggml.merges"]
    with pytest.raises(ValueError, match=r"a.gguf: tokenizer.ggml.merges is missing"):
        bpe.from_gguf(Path("a.gguf"), fields)
