"""SentencePiece BPE as LLaMA uses it, made exact: every byte string survives `decode_bytes(encode(b)) == b`.

SentencePiece alone loses three things, and each is mended here without changing one id of ordinary text:

- The space that it puts before a text (`add_dummy_prefix`, on in LLaMA, so that "the" is one piece at the start of a
  text and inside one). We load the model with that switch off and put the space there ourselves, always, also before
  a text that starts with a space; decoding drops exactly one. So the prefix costs no round trip and stays on.
- U+2581, its own picture of a space: a literal U+2581 is encoded as its three byte pieces.
- Bytes that are not UTF-8: each is encoded as its byte piece.

Long texts are cut into chunks only where no piece of the vocabulary could reach across the cut, so that the chunks can
be encoded on several threads and still give the ids of the whole text.
"""

import codecs
import hashlib
import io
import itertools
import operator
import os
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import sentencepiece

from llama_fast.files import write_atomically

# Added to a serialised model, this overrides one field, as protobuf merges repeated occurrences of a message:
# normalizer_spec (field 3) { add_dummy_prefix (field 3): false }.
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"
_SPACE = "\u2581"
# Text that must not reach SentencePiece: its space character, and undecodable bytes as `surrogateescape` shows them.
_AS_BYTES = re.compile("[\u2581\udc80-\udcff]+")
_BEHIND_NEWLINE = re.compile("(?<=\n).", re.DOTALL)
# Characters that have a meaning of their own in SentencePiece's trainer (end of string, space, unknown byte).
_NOT_IN_TRAINING = {0: None, 0x2581: None, 0x2585: None}
# A text whose round trip fails if the model's normaliser changes anything: runs of spaces, NFKC candidates, controls.
_PROBE = "  a \n\n \t b\u00a0\ufb01\uff21e\u0301\u212b\u200b\ufeff\x01\r\n  "
_CHUNK_CHARS = 1 << 16  # a unit of work for a thread; smaller ones cost more in calls than they give in balance
_CHUNKS_A_PART = 64  # about 4 MB of text: plenty for the threads, and its ids fit anywhere
_SENTENCE_CHARS = 4096  # the trainer counts pieces a sentence at a time and drops sentences over its length limit
_SAMPLE_BYTES = 10_000_000  # trains in seconds; more text moves few of the 32,000 most frequent merges


class Tokenizer:
    """A SentencePiece BPE model with byte fallback (LLaMA 1 and 2's `tokenizer.model` fits).

    Args:
        path: the model's file; with `model`, only the name in messages.
        model: the file's contents, where they stand elsewhere.

    Raises:
        FileNotFoundError: there is no file at `path`.
        ValueError: the file is not a SentencePiece model, or it cannot encode losslessly (no byte pieces, no space
            piece, no beginning- or end-of-text id, or a normaliser that changes text); the message names `path`.
    """

    adds_bos = True  # LLaMA was trained on texts that begin with it

    def __init__(self, path: str | os.PathLike[str], *, model: bytes | None = None) -> None:
        self.path = Path(path)
        if model is None:
            if not self.path.is_file():
                raise FileNotFoundError(f"tokenizer: {self.path} is not a file; expected a SentencePiece model")
            model = self.path.read_bytes()
        self.model = model
        self._fingerprint = hashlib.sha256(model).hexdigest()
        self._sp = _load(model, self.path)
        size = self._sp.get_piece_size()
        self._byte_ids = [self._sp.piece_to_id(f"<0x{byte:02X}>") for byte in range(256)]
        if not all(self._sp.is_byte(i) for i in self._byte_ids):
            raise ValueError(f"tokenizer: {self.path} has no byte pieces; train it with byte_fallback")
        if self._sp.is_unknown(self._sp.piece_to_id(_SPACE)):
            raise ValueError(f"tokenizer: {self.path} has no piece for a single space")
        if not (0 <= self.bos_id < size and 0 <= self.eos_id < size):
            raise ValueError(
                f"tokenizer: {self.path} has bos id {self.bos_id} and eos id {self.eos_id}; "
                f"expected both in [0, {size})"
            )
        self._controls: tuple[re.Pattern[str], dict[str, int]] | None = None
        self._pieces = [self._piece_bytes(i) for i in range(size)]
        self._after_newline = {
            char for piece in self._pieces for char in _BEHIND_NEWLINE.findall(piece.decode(errors="replace"))
        }
        if self.decode_bytes(self.encode(_PROBE)) != _PROBE.encode():
            raise ValueError(f"tokenizer: {self.path} normalises text; expected the identity normaliser, as LLaMA's")

    @classmethod
    def train(cls, texts: Iterable[str], path: str | os.PathLike[str], vocab_size: int = 32_000) -> "Tokenizer":
        """Learn a BPE vocabulary from `texts` with LLaMA's settings and write it to `path`, whole or not at all.

        Digits are split, unknown characters fall back to bytes, nothing is normalised, runs of spaces are pieces, no
        piece is longer than 16 characters; ids: unk 0, bos 1, eos 2, no pad. Unlike LLaMA's own vocabulary, newlines
        are ordinary characters, so that ":\\n" or "\\n\\n" can be pieces. A tab stays a byte piece, as in LLaMA.

        Sampling: the texts are cut into sentences of at most 4096 characters, after a newline where there is one. If
        they pass 10 MB, every second sentence kept so far is dropped and from then on every 2nd (4th, 8th...) is kept:
        an even sample of the whole, between 5 and 10 MB, in one pass.
        Repeats: the same texts give the same file, byte for byte, with the same version of sentencepiece.

        Args:
            texts: documents, newlines included.
            path: where to write the model; its folder must exist.
            vocab_size: number of pieces, the 3 control and 256 byte pieces included.

        Raises:
            ValueError: no text, a lone surrogate in it, or a `vocab_size` that the text cannot fill or that cannot
                hold its characters (the message says which size could).
            OSError: `path` cannot be written.

        Source: Touvron et al. 2023, arXiv:2302.13971, section 2.1; Kudo and Richardson 2018, arXiv:1808.06226.
        """
        if isinstance(texts, str | bytes):  # whose characters would be the documents
            raise ValueError(f"tokenizer: texts is a {type(texts).__name__}; expected several, a list of one for one")
        sentences = _sample(texts)
        if not any(sentence.strip() for sentence in sentences):
            raise ValueError("tokenizer: no text to train on")
        model = io.BytesIO()
        try:
            sentencepiece.SentencePieceTrainer.train(
                sentence_iterator=iter(sentences),
                model_writer=model,
                model_type="bpe",
                vocab_size=vocab_size,
                character_coverage=0.99995,
                split_digits=True,
                byte_fallback=True,
                normalization_rule_name="identity",
                remove_extra_whitespaces=False,
                add_dummy_prefix=True,
                allow_whitespace_only_pieces=True,
                max_sentencepiece_length=16,
                max_sentence_length=4 * _SENTENCE_CHARS,
                unk_id=0,
                bos_id=1,
                eos_id=2,
                pad_id=-1,
                num_threads=2,  # stored in the model, so a machine's core count must not reach it
                minloglevel=2,
            )
        except RuntimeError as error:
            raise ValueError(_explain_training(str(error), vocab_size)) from error
        write_atomically(Path(path), model.getvalue())
        return cls(path)

    @property
    def vocab_size(self) -> int:
        """Number of pieces; ids are in [0, vocab_size)."""
        return len(self._pieces)

    @property
    def bos_id(self) -> int:
        """Id that opens a text."""
        return int(self._sp.bos_id())

    @property
    def eos_id(self) -> int:
        """Id that closes a text."""
        return int(self._sp.eos_id())

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids that end an answer."""
        return (self.eos_id,)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the model file, in hexadecimal."""
        return self._fingerprint

    def encode(self, text: str | bytes, *, bos: bool = False, eos: bool = False) -> list[int]:
        """Ids of one text. An empty text has none; text that looks like a control piece ("<s>") is plain text.

        Args:
            text: any string without lone surrogates, or any bytes.
            bos: put `bos_id` in front.
            eos: put `eos_id` behind.

        Raises:
            ValueError: a lone surrogate in a `str`; the message gives its position.
        """
        return self.encode_many([text], bos=bos, eos=eos)[0]

    def encode_many(
        self, texts: Sequence[str | bytes], *, bos: bool = False, eos: bool = False, num_threads: int | None = None
    ) -> list[list[int]]:
        """Ids of each text, as `encode` gives them, on `num_threads` threads (default: the cores this process may use).

        Raises:
            ValueError: a lone surrogate in a `str`.
        """
        segments = [list(self._segments(_to_str(text))) for text in texts]
        encoded = iter(self._encode_segments([s for of_text in segments for s in of_text], num_threads))
        result = []
        for of_text in segments:
            ids = [self.bos_id] if bos else []
            for _ in of_text:
                ids.extend(next(encoded))
            if eos:
                ids.append(self.eos_id)
            result.append(ids)
        return result

    def encode_parts(
        self, text: str | bytes, *, bos: bool = False, eos: bool = False, num_threads: int | None = None
    ) -> Iterator[list[int]]:
        """The ids of `encode(text)` a few MB of text at a time, so that they never stand in memory all together.

        Raises:
            ValueError: a lone surrogate in a `str`.
        """
        if bos:
            yield [self.bos_id]
        segments = self._segments(_to_str(text))
        while part := list(itertools.islice(segments, _CHUNKS_A_PART)):
            yield [i for ids in self._encode_segments(part, num_threads) for i in ids]
        if eos:
            yield [self.eos_id]

    def encode_marked(self, text: str) -> list[int]:
        """As `encode`, but the names of control pieces in it, "<s>" say, are these pieces: for chat templates.

        What stands between them is encoded as texts of their own, as LLaMA 2's own code does.
        """
        if self._controls is None:
            names = {str(self._sp.id_to_piece(i)): i for i in range(self.vocab_size) if self._sp.is_control(i)}
            self._controls = re.compile("|".join(map(re.escape, names))), names
        pattern, ids = self._controls
        parts = pattern.split(text)
        marks = [ids[name] for name in pattern.findall(text)]
        result = self.encode(parts[0])
        for mark, part in zip(marks, parts[1:], strict=True):
            result += [mark, *self.encode(part)]
        return result

    def decode_bytes(self, ids: Iterable[int], *, continuation: bool = False) -> bytes:
        """The bytes that `ids` stand for; control ids stand for none.

        The space that `encode` puts before each text is dropped at the start and after each `bos_id`. With
        `continuation=True` the ids go on from earlier ones, as a model's answer does, and the first space stays.

        Raises:
            ValueError: an id outside [0, vocab_size).
            TypeError: an id that is no integer.
        """
        decoder = _Pieces(self, continuation)
        return b"".join(decoder.feed(i) for i in ids)

    def decode(self, ids: Iterable[int], *, continuation: bool = False) -> str:
        """`decode_bytes` as text; bytes that are not UTF-8 become U+FFFD. Same arguments and errors."""
        return self.decode_bytes(ids, continuation=continuation).decode("utf-8", errors="replace")

    def stream_decoder(self, *, continuation: bool = False) -> "StreamDecoder":
        """A decoder that takes one id at a time and never prints half a character (see `decode_bytes`)."""
        return StreamDecoder(_Pieces(self, continuation))

    def piece(self, i: int) -> bytes:
        """The bytes of id `i`: a control piece has none.

        Raises:
            ValueError: `i` is outside [0, vocab_size).
        """
        i = operator.index(i)
        if not 0 <= i < len(self._pieces):
            raise ValueError(f"token id {i} is outside [0, {len(self._pieces)})")
        return self._pieces[i]

    def token(self, i: int) -> str:
        """The text of id `i` as the vocabulary has it, control pieces by their name."""
        return str(self._sp.id_to_piece(i))

    def _piece_bytes(self, i: int) -> bytes:
        name = str(self._sp.id_to_piece(i))
        if self._sp.is_control(i):
            return b""
        if self._sp.is_byte(i):
            return bytes([int(name[3:5], 16)])
        if self._sp.is_unknown(i):
            return " \u2047 ".encode()  # SentencePiece's own picture of it; `encode` never gives this id
        return name.replace(_SPACE, " ").encode()

    def _encode_segments(self, segments: Sequence[str | bytes], num_threads: int | None) -> list[list[int]]:
        chunks = [segment for segment in segments if isinstance(segment, str)]
        threads = _cores() if num_threads is None else num_threads
        encoded = iter(self._sp.encode(chunks, num_threads=max(1, min(threads, len(chunks)))) if chunks else [])
        return [
            next(encoded) if isinstance(segment, str) else [self._byte_ids[byte] for byte in segment]
            for segment in segments
        ]

    def _segments(self, text: str) -> Iterator[str | bytes]:
        """`text`, with its prefix space, as strings for SentencePiece and bytes for byte pieces, in order."""
        if not text:
            return
        text = " " + text
        start = 0
        for match in _AS_BYTES.finditer(text):
            yield from self._chunks(text[start : match.start()])
            yield match.group().encode("utf-8", "surrogateescape")
            start = match.end()
        yield from self._chunks(text[start:])

    def _chunks(self, text: str) -> Iterator[str]:
        """`text` in chunks of about 2^16 characters, cut behind a newline that no piece joins to its right side."""
        start = 0
        cut = start + _CHUNK_CHARS
        while (newline := text.find("\n", cut)) >= 0 and newline + 1 < len(text):
            cut = newline + 1
            if text[cut] not in self._after_newline:
                yield text[start:cut]
                start, cut = cut, cut + _CHUNK_CHARS
        if start < len(text):
            yield text[start:]


class StreamDecoder:
    """Text of a growing list of ids: the strings that `feed` and one final `finish` return join to `decode(ids)`."""

    def __init__(self, pieces: "_Pieces") -> None:
        self._pieces = pieces
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, i: int) -> str:
        """The text that id `i` completes, perhaps none. Raises ValueError for an id outside [0, vocab_size)."""
        return self._utf8.decode(self._pieces.feed(i))

    def finish(self) -> str:
        """What is left at the end: U+FFFD for a character that was begun and not completed, else nothing."""
        return self._utf8.decode(b"", final=True)


class _Pieces:
    """Bytes of one id after another, without the prefix space of a text."""

    def __init__(self, tokenizer: Tokenizer, continuation: bool) -> None:
        self._tokenizer = tokenizer
        self._at_start = not continuation

    def feed(self, i: int) -> bytes:
        piece = self._tokenizer.piece(i)
        if not piece:
            self._at_start = self._at_start or i == self._tokenizer.bos_id
            return b""
        at_start, self._at_start = self._at_start, False
        return piece.removeprefix(b" ") if at_start else piece


def _cores() -> int:
    """Cores that this process may use; only Linux can tell them from the machine's."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _load(model: bytes, path: Path) -> sentencepiece.SentencePieceProcessor:
    if not model:
        raise ValueError(f"tokenizer: {path} is empty; expected a SentencePiece model")
    try:
        return sentencepiece.SentencePieceProcessor(model_proto=model + _NO_DUMMY_PREFIX)
    except RuntimeError as error:
        raise ValueError(f"tokenizer: {path} is not a SentencePiece model, or it is damaged: {error}") from error


def _to_str(text: str | bytes) -> str:
    """`text` as a string in which an undecodable byte b is the lone surrogate U+DC00 + b."""
    if isinstance(text, bytes):
        return text.decode("utf-8", "surrogateescape")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"text has a lone surrogate, {text[error.start]!r}, at position {error.start}: it is no Unicode text; "
            "pass bytes to encode arbitrary data"
        ) from error
    return text


def _sample(texts: Iterable[str]) -> list[str]:
    """The sentences to train on; the rule stands in `Tokenizer.train`."""
    kept: list[str] = []
    kept_bytes = 0
    step = 1
    index = 0
    for text in texts:
        for sentence in _sentences(_to_str(text).translate(_NOT_IN_TRAINING)):
            if index % step == 0:
                kept.append(sentence)
                kept_bytes += len(sentence.encode())
            index += 1
            if kept_bytes > _SAMPLE_BYTES:
                kept = kept[::2]
                kept_bytes = sum(len(sentence.encode()) for sentence in kept)
                step *= 2
    return kept


def _sentences(text: str) -> Iterator[str]:
    start = 0
    while start < len(text):
        end = start + _SENTENCE_CHARS
        if end < len(text):
            end = text.rfind("\n", start, end) + 1 or end
        yield text[start:end]
        start = end


def _explain_training(message: str, vocab_size: int) -> str:
    if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", message):
        return (
            f"tokenizer: vocab_size {vocab_size} is too small: the control pieces, 256 byte pieces and the characters "
            f"of this text need at least {found[1]}"
        )
    if found := re.search(r"Please set it to a value <= (\d+)", message):
        return (
            f"tokenizer: vocab_size {vocab_size} is too large for this text, which gives at most {found[1]} pieces: "
            "expected more text, or a smaller vocab_size"
        )
    return f"tokenizer: training with vocab_size {vocab_size} failed: {message}"
