"""What stands beside the weights of a checkpoint: its tokenizer and its chat template, whatever the format.

tokenizer.json                    Hugging Face's                       bpe.py
tokenizer.model                   SentencePiece's, or Llama 3's        tokenizer.py, bpe.py
inside a .gguf file               either kind                          sentencepiece_model below, bpe.py
"""

from __future__ import annotations

import shutil
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from llama_fast import bpe
from llama_fast.bpe import BPETokenizer
from llama_fast.checkpoint import MANIFEST
from llama_fast.files import read_json, write_json
from llama_fast.tokenizer import Tokenizer
from llama_fast.weights.gguf import read_fields
from llama_fast.weights.hf import CONFIG

AnyTokenizer = Tokenizer | BPETokenizer
GENERATION = "generation_config.json"
# What a tokenizer or a chat needs, beside the weights; a conversion takes these along.
_COMPANIONS = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    GENERATION,
)


def load_tokenizer(path: Path | str) -> AnyTokenizer:
    """The tokenizer of the checkpoint at `path`; of a training run's checkpoint, that of the run.

    A `tokenizer.model` beside the folder is taken too, as Meta's first models have it, but for Hugging Face's folders,
    which are whole.

    Raises:
        FileNotFoundError: there is none.
        ImportError: it needs an extra that is not installed; the message names it.
        ValueError: it is damaged, or of a kind that is not known here.
    """
    path = Path(path)
    if path.is_file():
        fields = read_fields(path)
        kind = fields.get("tokenizer.ggml.model")
        if kind == "gpt2":
            return bpe.from_gguf(path, fields)
        if kind == "llama":
            return Tokenizer(path, model=sentencepiece_model(path, fields))
        raise ValueError(f"{path}: tokenizer.ggml.model = {kind!r}: expected gpt2 or llama")
    if (path / "tokenizer.json").is_file():
        return bpe.from_folder(path)
    around = (path.parent, path.resolve().parent)  # the last of "." and of a link
    whole = (path / CONFIG).is_file() and not (path / MANIFEST).is_file()
    for folder in (path, *(() if whole else around)):
        file = folder / "tokenizer.model"
        if file.is_file():
            with open(file, "rb") as opened:
                return bpe.from_tiktoken(file) if bpe.is_tiktoken(opened.read(256)) else Tokenizer(file)
    where = "in it" if whole else "in it or in the run that it is of"
    raise FileNotFoundError(f"{path}: expected tokenizer.json or tokenizer.model, {where}")


def chat_template(path: Path | str) -> str | None:
    """The source of the chat template of the checkpoint at `path`, None where it has none.

    Where `tokenizer_config.json` has several, it is the one called "default".

    Raises:
        ValueError: a file is damaged.
    """
    path = Path(path)
    if path.is_file():
        return read_fields(path).get("tokenizer.chat_template")
    if (path / "chat_template.jinja").is_file():
        return (path / "chat_template.jinja").read_text(encoding="utf-8")
    file = path / "tokenizer_config.json"
    template = read_json(file).get("chat_template") if file.is_file() else None
    if isinstance(template, list):
        return {t["name"]: t["template"] for t in template}.get("default")
    return template


def write_companions(path: Path, folder: Path) -> None:
    """Writes into `folder` the tokenizer and the chat template of the checkpoint at `path`: its own files, and what
    Hugging Face's programs need where these are none of theirs.

    Raises:
        FileNotFoundError, ImportError, ValueError: as `load_tokenizer`; nothing was written then.
    """
    tokenizer = load_tokenizer(path)
    template = chat_template(path)
    if path.is_dir():
        for name in _COMPANIONS:
            if (path / name).is_file():
                shutil.copyfile(path / name, folder / name)
    if not (folder / GENERATION).is_file():  # without it transformers knows no end of an answer, or LLaMA 1's
        ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": list(tokenizer.eos_ids) or None}
        write_json(folder / GENERATION, ids)
    if isinstance(tokenizer, BPETokenizer):
        if not (folder / "tokenizer.json").is_file():
            bpe.save(tokenizer, folder, template)
        return
    (folder / "tokenizer.model").write_bytes(tokenizer.model)
    if not (folder / "tokenizer_config.json").is_file():
        named = {"bos_token": tokenizer.token(tokenizer.bos_id), "eos_token": tokenizer.token(tokenizer.eos_id)}
        config = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False, **named}
        write_json(folder / "tokenizer_config.json", config | ({} if template is None else {"chat_template": template}))


def sentencepiece_model(path: Path, fields: Mapping[str, Any]) -> bytes:
    """A SentencePiece model of the vocabulary in the metadata of a GGUF file (`tokenizer.ggml.model` is "llama").

    Raises:
        ValueError: the metadata lack a part, or ask for texts without a space in front.
    """
    if not fields.get("tokenizer.ggml.add_space_prefix", True):
        raise ValueError(f"{path}: tokenizer.ggml.add_space_prefix = False: expected True, as LLaMA's")
    try:
        pieces = zip(
            fields["tokenizer.ggml.tokens"],
            fields["tokenizer.ggml.scores"],
            fields["tokenizer.ggml.token_type"],  # SentencePiece's own numbers
            strict=True,
        )
        message = b"".join(_field(1, _piece(*piece)) for piece in pieces)
    except KeyError as error:
        raise ValueError(f"{path}: {error.args[0]} is missing") from None
    ids = (("unknown", 0), ("bos", 1), ("eos", 2))
    numbers = [fields.get(f"tokenizer.ggml.{name}_token_id", i) for name, i in ids]
    # model_type BPE; byte_fallback; unk_id, bos_id, eos_id; pad_id -1
    trainer = [(3, 2), (35, 1), *zip((40, 41, 42), numbers, strict=True), (43, (1 << 64) - 1)]
    message += _field(2, b"".join(_varint(field << 3) + _varint(value) for field, value in trainer))
    normalizer = _field(1, b"identity") + b"".join(_varint(n << 3) + _varint(v) for n, v in ((3, 1), (4, 0), (5, 1)))
    return message + _field(3, normalizer)


def _piece(text: str, score: float, kind: int) -> bytes:
    return _field(1, text.encode()) + b"\x15" + struct.pack("<f", score) + b"\x18" + _varint(int(kind))


def _field(number: int, data: bytes) -> bytes:
    """A protobuf field of length-delimited type."""
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _varint(value: int) -> bytes:
    return bytes(_varint_bytes(value))


def _varint_bytes(value: int) -> Iterator[int]:
    while value > 0x7F:
        yield value & 0x7F | 0x80
        value >>= 7
    yield value
