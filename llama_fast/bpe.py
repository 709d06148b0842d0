"""Byte-level BPE, as Llama 3 and its kin use it, through PyPI's `tokenizers` (the extra `chat`).

From a folder's `tokenizer.json`, from Llama 3's tiktoken file, or from the vocabulary inside a GGUF file.
"""

from __future__ import annotations

import base64
import functools
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llama_fast.files import read_json, write_json

# Llama 3's own, in tokenizer.py of meta-llama/llama-models; splits text before any merge.
LLAMA3_PATTERN = "|".join(
    (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)",
        r"[^\r\n\p{L}\p{N}]?\p{L}+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    )
)
QWEN2_PATTERN = LLAMA3_PATTERN.replace(r"\p{N}{1,3}", r"\p{N}")  # in transformers' tokenization_qwen2.py: single digits
_SPECIAL_COUNT = 256
_NAMED_SPECIAL = (
    "begin_of_text", "end_of_text", "reserved_special_token_0", "reserved_special_token_1", "finetune_right_pad_id",
    "step_id", "start_header_id", "end_header_id", "eom_id", "eot_id", "python_tag", "image",
)  # fmt: skip
# What llama.cpp calls the ways to split a text, by what it does there: Llama 3's pattern, GPT-2's, single digits first,
# Qwen2's pattern after Unicode's normal form C.
_LLAMA3_SPLITS = {"llama-bpe", "llama3", "llama-v3"}
_GPT2_SPLITS = {"gpt-2", "gpt2"}
_DIGIT_SPLITS = {"smollm", "starcoder", "refact", "command-r", "codeshell"}
_QWEN2_SPLITS = {"qwen2"}
_CONTROL, _USER_DEFINED = 3, 4  # token types of GGUF


class BPETokenizer:
    """A tokenizer of the `tokenizers` package with what a language model needs to know beside it.

    Args:
        backend: a `tokenizers.Tokenizer`.
        bos_id: opens a text; None for a vocabulary without.
        eos_ids: end an answer; the first is `eos_id`.
        adds_bos: whether the model was trained on texts that begin with `bos_id`.
    """

    def __init__(self, backend: Any, bos_id: int | None, eos_ids: Sequence[int], adds_bos: bool) -> None:
        self.backend = backend
        self.bos_id, self.eos_ids, self.adds_bos = (
            bos_id,
            tuple(dict.fromkeys(eos_ids)),
            adds_bos and bos_id is not None,
        )

    @functools.cached_property
    def vocab_size(self) -> int:
        """Ids are in [0, vocab_size), where some vocabularies leave numbers out."""
        return 1 + max(self.backend.get_vocab(with_added_tokens=True).values(), default=-1)

    @property
    def eos_id(self) -> int | None:
        """Id that closes a text."""
        return self.eos_ids[0] if self.eos_ids else None

    def encode(self, text: str, *, bos: bool = False, eos: bool = False) -> list[int]:
        """Ids of one text; what looks like a special token in it ("<|eot_id|>") is plain text.

        Args:
            text: any string without lone surrogates.
            bos: put `bos_id` in front.
            eos: put `eos_id` behind.

        Raises:
            ValueError: `bos` or `eos` is asked for, and the vocabulary has none; or a lone surrogate in the text.
        """
        if (bos and self.bos_id is None) or (eos and self.eos_id is None):
            raise ValueError(f"bos = {bos}, eos = {eos}: the vocabulary has bos {self.bos_id} and eos {self.eos_id}")
        ids = self._encode(text, special=False)
        front = [self.bos_id] if bos and self.bos_id is not None else []
        return [*front, *ids, *([self.eos_ids[0]] if eos else [])]

    def encode_marked(self, text: str) -> list[int]:
        """As `encode`, but special tokens written in the text are these tokens: for chat templates."""
        return self._encode(text, special=True)

    def _encode(self, text: str, special: bool) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            found = f"{text[error.start]!r}, at position {error.start}"
            raise ValueError(f"text has a lone surrogate, {found}: expected Unicode text") from None
        self.backend.encode_special_tokens = not special
        return list(self.backend.encode(text, add_special_tokens=False).ids)

    def decode(self, ids: Iterable[int], *, continuation: bool = False) -> str:
        """The text of `ids`, special tokens left out; `continuation`: they go on from an earlier text."""
        stream = self.stream_decoder(continuation=continuation)
        return "".join([*(stream.feed(i) for i in ids), stream.finish()])

    def token(self, i: int) -> str:
        """The text of a token as the vocabulary has it, special ones by their name."""
        return str(self.backend.id_to_token(i))

    def stream_decoder(self, *, continuation: bool = False) -> BPEStreamDecoder:
        """A decoder that takes one id at a time and never prints half a character."""
        return BPEStreamDecoder(self, self.encode("a") if continuation else [])


class BPEStreamDecoder:
    """Text of a growing list of ids; the strings that `feed` and one final `finish` return join to the whole.

    Some decoders treat the first token apart or join tokens, so a token's text is the difference of two decodings of
    the last few: one without and one with it.
    """

    def __init__(self, tokenizer: BPETokenizer, before: list[int]) -> None:
        self._tokenizer = tokenizer
        self._ids = before
        self._shown = len(before)  # ids whose text was given out

    def feed(self, i: int) -> str:
        """The text that id `i` completes, perhaps none. Raises ValueError for an id outside [0, vocab_size)."""
        if not 0 <= i < self._tokenizer.vocab_size:
            raise ValueError(f"token id {i} is outside [0, {self._tokenizer.vocab_size})")
        self._ids.append(i)
        text = self._new_text()
        if text.endswith("\ufffd"):  # perhaps the beginning of a character
            return ""
        if text:  # else a special token, behind which another would be the first of a text
            self._ids = self._ids[self._shown :]
        self._shown = len(self._ids)
        return text

    def finish(self) -> str:
        """What is left at the end: U+FFFD for a character that was begun and not completed, else nothing."""
        text = self._new_text()
        self._shown = len(self._ids)
        return text

    def _new_text(self) -> str:
        decode = self._tokenizer.backend.decode
        old = decode(self._ids[: self._shown], skip_special_tokens=True)
        return str(decode(self._ids, skip_special_tokens=True))[len(old) :]


def from_folder(folder: Path) -> BPETokenizer:
    """The tokenizer of a folder's `tokenizer.json`, its special ids from the JSON files beside it.

    Raises:
        ImportError: the package `tokenizers` is not installed.
        ValueError: the file is no tokenizer.
    """
    path = folder / "tokenizer.json"
    library = _tokenizers(path)
    try:
        backend = library.Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises Exception itself
        raise ValueError(f"{path}: {error}: expected a tokenizer of the package tokenizers") from None
    files = [folder / name for name in ("generation_config.json", "config.json", "tokenizer_config.json")]
    settings = {file.name: read_json(file) if file.is_file() else {} for file in files}
    named = settings["tokenizer_config.json"]
    eos: list[int] = []
    for name in ("generation_config.json", "config.json"):
        value = settings[name].get("eos_token_id")
        eos += value if isinstance(value, list) else [] if value is None else [value]
    bos_id = _id_of(backend, named.get("bos_token"))
    if bos_id is None:
        bos_id = settings["config.json"].get("bos_token_id")
    eos_id = _id_of(backend, named.get("eos_token"))
    if eos_id is not None:
        eos = [eos_id, *eos]
    first = backend.encode("a", add_special_tokens=True).ids[:1]
    return BPETokenizer(backend, bos_id, eos, adds_bos=first == [bos_id])


def _id_of(backend: Any, token: str | Mapping[str, Any] | None) -> int | None:
    name = token.get("content") if isinstance(token, Mapping) else token
    return None if name is None else backend.token_to_id(name)


def is_tiktoken(data: bytes) -> bool:
    """Whether a `tokenizer.model` is Llama 3's kind of file: lines of a token in base64 and its rank."""
    return re.match(rb"[A-Za-z0-9+/]+={0,2} \d+\r?\n", data) is not None


def from_tiktoken(path: Path) -> BPETokenizer:
    """Llama 3's `tokenizer.model`, followed by its 256 special tokens.

    Raises:
        ImportError: the package `tokenizers` is not installed.
        ValueError: a line is no token and rank, or the ranks are not 0, 1, 2...
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError:
            raise ValueError(f"{path}:{number}: {line[:60]!r}: expected a token in base64 and its rank") from None
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError(f"{path}: ranks of {len(ranks)} tokens: expected each of 0 to {len(ranks) - 1} once")
    library = _tokenizers(path)
    names = [f"<|{name}|>" for name in _NAMED_SPECIAL]
    names += [f"<|reserved_special_token_{2 + i}|>" for i in range(_SPECIAL_COUNT - len(names))]
    shown = _byte_characters()
    vocab = {_shown(token, shown): rank for token, rank in ranks.items()}
    backend = _byte_level(library, vocab, _merges(ranks, shown), _pattern_split(library, LLAMA3_PATTERN), names, [])
    ids = [backend.token_to_id(f"<|{name}|>") for name in ("end_of_text", "eom_id", "eot_id")]
    return BPETokenizer(backend, backend.token_to_id("<|begin_of_text|>"), ids, adds_bos=True)


def _merges(ranks: Mapping[bytes, int], shown: Mapping[int, str]) -> list[tuple[str, str]]:
    """The merges that make each token, in order of its rank: tiktoken merges whatever two parts give a token."""
    merges = []
    for token, rank in ranks.items():
        parts = [(token[:i], token[i:]) for i in range(1, len(token))]
        known = [(ranks[a], ranks[b], a, b) for a, b in parts if a in ranks and b in ranks]
        merges += [(rank, *pair) for pair in sorted(known)]
    merges.sort(key=lambda m: m[0])
    return [(_shown(a, shown), _shown(b, shown)) for *_, a, b in merges]


def from_gguf(path: Path, fields: Mapping[str, Any]) -> BPETokenizer:
    """The byte-level vocabulary in the metadata of a GGUF file (`tokenizer.ggml.model` is "gpt2").

    Raises:
        ImportError: the package `tokenizers` is not installed.
        ValueError: the metadata lack a part, or name a way to split texts that is not known here.
    """
    library = _tokenizers(path)
    split_name = fields.get("tokenizer.ggml.pre", "default")
    pre = library.pre_tokenizers
    if split_name in _LLAMA3_SPLITS:
        split = _pattern_split(library, LLAMA3_PATTERN)
    elif split_name in _QWEN2_SPLITS:
        split = _pattern_split(library, QWEN2_PATTERN)
    elif split_name in _GPT2_SPLITS:
        split = pre.ByteLevel(add_prefix_space=False, use_regex=True)
    elif split_name in _DIGIT_SPLITS:
        digits = pre.Digits(individual_digits=True)
        split = pre.Sequence([digits, pre.ByteLevel(add_prefix_space=False, use_regex=True)])
    else:
        known = ", ".join(sorted(_LLAMA3_SPLITS | _GPT2_SPLITS | _DIGIT_SPLITS | _QWEN2_SPLITS))
        raise ValueError(f"{path}: tokenizer.ggml.pre = {split_name!r}: expected one of {known}")
    try:
        tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
        merges = [tuple(m.split(" ", 1)) for m in fields["tokenizer.ggml.merges"]]
    except KeyError as error:
        raise ValueError(f"{path}: {error.args[0]} is missing") from None
    special = [t for t, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL]
    added = [t for t, kind in zip(tokens, kinds, strict=True) if kind == _USER_DEFINED]
    vocab = {token: i for i, token in enumerate(tokens)}
    backend = _byte_level(library, vocab, merges, split, special, added)
    backend.model.ignore_merges = split_name in _LLAMA3_SPLITS
    if split_name in _QWEN2_SPLITS:
        backend.normalizer = library.normalizers.NFC()
    keys = ("eos_token_id", "eot_token_id", "eom_token_id")
    eos = [fields[f"tokenizer.ggml.{key}"] for key in keys if f"tokenizer.ggml.{key}" in fields]
    bos_id = fields.get("tokenizer.ggml.bos_token_id")
    adds_bos = fields.get("tokenizer.ggml.add_bos_token", split_name in _LLAMA3_SPLITS)
    return BPETokenizer(backend, bos_id, eos, bool(adds_bos))


def _byte_level(
    library: Any,
    vocab: Mapping[str, int],
    merges: Sequence[tuple[str, ...]],
    split: Any,
    special: Sequence[str],
    added: Sequence[str],
) -> Any:
    """A `tokenizers.Tokenizer` of byte-level BPE; tokens that the vocabulary has whole are taken without merging."""
    backend = library.Tokenizer(library.models.BPE(dict(vocab), list(merges), ignore_merges=True))
    backend.pre_tokenizer = split
    backend.decoder = library.decoders.ByteLevel()
    backend.add_special_tokens([library.AddedToken(t, special=True, normalized=False) for t in special])
    backend.add_tokens([library.AddedToken(t, normalized=False) for t in added])
    return backend


def _pattern_split(library: Any, pattern: str) -> Any:
    pre = library.pre_tokenizers
    split = pre.Split(library.Regex(pattern), behavior="isolated")
    return pre.Sequence([split, pre.ByteLevel(add_prefix_space=False, use_regex=False)])


def _byte_characters() -> dict[int, str]:
    """GPT-2's picture of each byte: itself where it can be printed, else the next free character from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (b for b in range(256) if b not in printable)
    return {b: chr(b) for b in printable} | {b: chr(0x100 + n) for n, b in enumerate(others)}


def _shown(token: bytes, characters: Mapping[int, str]) -> str:
    return "".join(characters[b] for b in token)


def save(tokenizer: BPETokenizer, folder: Path, chat_template: str | None) -> None:
    """Writes `tokenizer.json` and a `tokenizer_config.json` that transformers reads."""
    library = _tokenizers(folder)
    backend = library.Tokenizer.from_str(tokenizer.backend.to_str())
    bos_id = tokenizer.bos_id
    if tokenizer.adds_bos and bos_id is not None and backend.encode("a").ids[:1] != [bos_id]:
        bos = tokenizer.token(bos_id)
        backend.post_processor = library.processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", f"{bos}:1", "$B:1"], special_tokens=[(bos, bos_id)]
        )
    (folder / "tokenizer.json").write_text(backend.to_str(), encoding="utf-8")
    named = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id}
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"}
    config |= {name: tokenizer.token(i) for name, i in named.items() if i is not None}
    if chat_template is not None:
        config["chat_template"] = chat_template
    write_json(folder / "tokenizer_config.json", config)


def _tokenizers(path: Path) -> Any:
    try:
        import tokenizers
    except ImportError:
        raise ImportError(f"{path}: needs the package tokenizers: pip install 'llama_fast[chat]'") from None
    return tokenizers
