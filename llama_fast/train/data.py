"""Text to batches: named sources -> token files, memory-mapped -> a weighted mixture that resumes bit for bit.

A source is a list of documents with a weight: the share of training windows drawn from it (arXiv:2302.13971, table 1).
`build_token_file` writes `<source>.train.bin` and `<source>.valid.bin`, little-endian uint16 or uint32 ids of
"bos document eos" after one another, and last of all `meta.json`: without it there is no dataset. docs/data.md has
the rules in words.
"""

import contextlib
import fcntl
import hashlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from llama_fast.files import sync, write_atomically
from llama_fast.tokenizer import Tokenizer
from llama_fast.train.sources import NAME, Source, default_sources, name_hash, parse_data_args

__all__ = ["Mixture", "Source", "TokenDataset", "TokenSource", "build_token_file", "default_sources", "parse_data_args"]

Scan = list[tuple[str, int, str]]  # (name, bytes, SHA-256 of the text) of every document of a source

_VERSION = 1  # of the token files, meta.json and the sampler's state; raised when an old one can no longer be read
_BATCH_BYTES = 4_000_000  # of text handed to the tokenizer at a time: keeps its threads busy, bounds memory
_SPLITS = ("train", "valid")


def build_token_file(
    sources: Sequence[Source], tokenizer: Tokenizer, out_dir: str | os.PathLike[str], *, valid_fraction: float = 0.05
) -> "TokenDataset":
    """Tokenise `sources` into `out_dir`, or reuse what is there if it came from the same text and tokenizer.

    Held out, of each source: whole documents, in order of the SHA-256 of their names, each that still fits into
    `valid_fraction` of the source's bytes; where these come to less than half of that (a single document, or a few
    large ones), the tail of every document instead, from the first line that starts in its last `valid_fraction`.

    All files are written under temporary names, synced and renamed, `meta.json` last: after an error or a crash there
    is either the old dataset, or the new one, or none. Two processes that build in one folder take turns; the second
    reuses the first's. Every call reads all text, as reuse is decided by content, not by date.

    Args:
        sources: names must differ, also when case is ignored.
        out_dir: made if missing.
        valid_fraction: in (0, 0.5].

    Raises:
        ValueError: bad arguments; text that is unreadable or too short to give both splits.
        OSError: `out_dir` cannot be written, or the disk is full; nothing half-written is left.
    """
    if not isinstance(valid_fraction, int | float) or not 0 < valid_fraction <= 0.5:
        raise ValueError(f"valid_fraction {valid_fraction!r} is not in (0, 0.5]")
    if not sources or len({source.name.lower() for source in sources}) != len(sources):
        raise ValueError(f"sources {[source.name for source in sources]}: expected one or more with different names")
    scans = [_scan(source) for source in sources]
    settings = [_VERSION, tokenizer.fingerprint, valid_fraction, [source.name for source in sources], scans]
    inputs = hashlib.sha256(json.dumps(settings).encode()).hexdigest()
    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    weights = [source.weight for source in sources]
    if (dataset := _reusable(folder, tokenizer, inputs)) and [s.weight for s in dataset.sources] == weights:
        return dataset
    with _locked(folder):
        if dataset := _reusable(folder, tokenizer, inputs):
            meta = _read_meta(folder)
            for entry, weight in zip(meta["sources"], weights, strict=True):
                entry["weight"] = weight
            _write_meta(folder, meta)
        else:
            meta = {"version": _VERSION, "dtype": _dtype(tokenizer.vocab_size).name, "inputs": inputs}
            meta |= {"vocab_size": tokenizer.vocab_size, "tokenizer": tokenizer.fingerprint}
            _build(sources, scans, tokenizer, folder, meta | {"valid_fraction": valid_fraction})
        return TokenDataset.open(folder, tokenizer)  # behind the lock another builder puts its own weights, or text


@dataclass(frozen=True)
class TokenSource:
    """One source of an open dataset: its ids, memory-mapped, and where they came from."""

    name: str
    weight: float
    train: np.ndarray  # [number of training tokens] uint16 or uint32, read-only
    valid: np.ndarray
    train_path: Path
    valid_path: Path


class TokenDataset:
    """Token files that `build_token_file` wrote, memory-mapped read-only; make it with `open`.

    Attributes:
        sources: list of `TokenSource`, in the order in which they were given.
        vocab_size: ids are below it.
        fingerprint: SHA-256 of everything the ids depend on: text, split and tokenizer.
        tokenizer_fingerprint: SHA-256 of the tokenizer's model file.
    """

    def __init__(
        self, sources: Sequence[TokenSource], vocab_size: int, fingerprint: str, tokenizer_fingerprint: str
    ) -> None:
        self.sources = list(sources)
        self.vocab_size = vocab_size
        self.fingerprint = fingerprint
        self.tokenizer_fingerprint = tokenizer_fingerprint

    @classmethod
    def open(cls, folder: str | os.PathLike[str], tokenizer: Tokenizer | None = None) -> "TokenDataset":
        """Map the dataset in `folder`; with `tokenizer`, check also that it is the one that made it.

        Raises:
            FileNotFoundError: no `meta.json`: there is no dataset, or building it was interrupted.
            ValueError: `meta.json` or a token file is damaged (the message names the file, what it has and what was
                expected), or another tokenizer made the dataset.
        """
        folder = Path(folder)
        meta = _read_meta(folder)
        try:
            if meta["version"] != _VERSION:
                raise ValueError(f"version {meta['version']}; expected {_VERSION}")
            vocab_size = int(meta["vocab_size"])
            dtype = _dtype(vocab_size)
            if meta["dtype"] != dtype.name:
                raise ValueError(f"dtype {meta['dtype']}; expected {dtype.name} for a vocabulary of {vocab_size}")
            made_with = str(meta["tokenizer"])
            sources = []
            for entry in meta["sources"]:
                train, valid = (_bin(folder, entry["name"], split) for split in _SPLITS)
                counts = int(entry["train"]["tokens"]), int(entry["valid"]["tokens"])
                ids = _map(train, dtype, counts[0]), _map(valid, dtype, counts[1])
                weight = float(entry["weight"])
                if not (math.isfinite(weight) and weight > 0):
                    raise ValueError(f"weight {weight} of source {entry['name']} is not a positive finite number")
                sources.append(TokenSource(entry["name"], weight, *ids, train, valid))
            if not sources:
                raise ValueError("no sources")
            fingerprint = str(meta["inputs"])
        except _Damaged:
            raise
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"dataset: {folder / 'meta.json'} is damaged: {error}; build it again") from error
        if tokenizer is not None and tokenizer.fingerprint != made_with:
            raise ValueError(
                f"dataset: {folder / 'meta.json'} was made with tokenizer {made_with[:12]}; "
                f"expected {tokenizer.fingerprint[:12]}, that of {tokenizer.path}"
            )
        return cls(sources, vocab_size, fingerprint, made_with)

    def batches(self, batch_size: int, seq_len: int, seed: int = 0, *, rank: int = 0, world_size: int = 1) -> "Mixture":
        """An endless iterator over (tokens, targets), both [batch_size, seq_len] int64; see `Mixture`."""
        return Mixture(self, batch_size, seq_len, seed, rank=rank, world_size=world_size)

    def valid_batches(
        self, batch_size: int, seq_len: int, *, source: str | None = None, limit: int | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The held-out windows, the same on every call: (tokens, targets), both [batch_size, seq_len] int64.

        Windows follow one another without overlap, source after source; what is left over at a source's end is not
        used. The last batch can have fewer rows.

        Args:
            batch_size: rows a batch.
            seq_len: tokens a row.
            source: name of the one source to take, for a loss of its own; default all.
            limit: at most this many batches, their windows spread evenly over all there are.

        Raises:
            ValueError: an unknown source, sizes that are no positive integers, or held-out text shorter than a window.
        """
        _positive(batch_size=batch_size, seq_len=seq_len, limit=1 if limit is None else limit)
        chosen = [s for s in self.sources if source in (None, s.name)]
        if not chosen:
            raise ValueError(f"source {source!r}: expected one of {', '.join(s.name for s in self.sources)}")
        counts = [_windows(s, "valid", s.valid, seq_len) for s in chosen]
        ends = np.cumsum(counts)
        total = int(ends[-1])
        taken = total if limit is None else min(total, limit * batch_size)
        picks = np.arange(taken) * total // taken

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            for start in range(0, taken, batch_size):
                rows = []
                for window in picks[start : start + batch_size]:
                    i = int(np.searchsorted(ends, window, side="right"))
                    first = int(window) - int(ends[i]) + counts[i]
                    rows.append(self._row(chosen[i].valid, chosen[i].valid_path, first, seq_len))
                yield _shift(rows)

        return batches()

    def _row(self, ids: np.ndarray, path: Path, window: int, seq_len: int) -> np.ndarray:
        """[seq_len + 1] int64: window number `window` and the token behind it."""
        row = ids[window * seq_len : (window + 1) * seq_len + 1].astype(np.int64)
        if int(row.max()) >= self.vocab_size:
            raise ValueError(f"dataset: {path} is damaged: id {row.max()} in a vocabulary of {self.vocab_size}")
        return row


class Mixture:
    """Endless training batches (tokens, targets), both [batch_size, seq_len] int64, targets one token further on.

    Each row's source is drawn by weight. A source's windows of `seq_len` tokens do not overlap; one epoch of it takes
    every window once, in an order of its own. All randomness is a function of (seed, step, source, epoch) through
    NumPy's frozen legacy generator, so the state is a few integers, and `load_state_dict(state_dict())`, in another
    process or with another NumPy, goes on with exactly the batches that would have come.

    With `world_size` > 1 each rank gets its own `batch_size` rows of one common batch; the state is the same on all
    ranks, and can be loaded by another number of ranks with the same `batch_size * world_size`.

    Raises:
        ValueError: sizes that are no positive integers, a rank or seed out of range, a source with too few tokens for
            one window, or weights whose sum is not finite.
    """

    def __init__(
        self, dataset: TokenDataset, batch_size: int, seq_len: int, seed: int, *, rank: int = 0, world_size: int = 1
    ) -> None:
        _positive(batch_size=batch_size, seq_len=seq_len, world_size=world_size)
        if not _is_integer(rank) or not 0 <= rank < world_size:
            raise ValueError(f"rank {rank!r} is not an integer in [0, {world_size})")
        if not _is_integer(seed) or not 0 <= seed < 2**32:
            raise ValueError(f"seed {seed!r} is not an integer in [0, 2^32)")
        batch_size, seq_len, seed, rank, world_size = map(int, (batch_size, seq_len, seed, rank, world_size))
        self._dataset = dataset
        self._seq_len = seq_len
        self._seed = seed
        self._rows = slice(rank * batch_size, (rank + 1) * batch_size)
        self._global_batch = batch_size * world_size
        self._counts = [_windows(s, "train", s.train, seq_len) for s in dataset.sources]
        weights = np.array([s.weight for s in dataset.sources])
        if not math.isfinite(total := sum(weights.tolist())):
            raise ValueError(f"weights {weights.tolist()}: together {total}; expected a finite sum")
        self._cumulative = np.cumsum(weights / weights.sum())
        self._step = 0
        self._used = [0] * len(self._counts)  # windows taken from each source so far
        self._orders: dict[int, tuple[int, np.ndarray]] = {}  # source -> (epoch, its order of windows)

    def __iter__(self) -> "Mixture":
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        draws = _generator(self._seed, 0, self._step, 0).random_sample(self._global_batch)
        chosen = np.minimum(np.searchsorted(self._cumulative, draws, side="right"), len(self._counts) - 1)
        windows = [(int(i), self._next_window(int(i))) for i in chosen]
        self._step += 1
        sources = self._dataset.sources
        return _shift(
            [
                self._dataset._row(sources[i].train, sources[i].train_path, window, self._seq_len)
                for i, window in windows[self._rows]
            ]
        )

    def state_dict(self) -> dict[str, Any]:
        """The whole state, as plain numbers, strings, lists and dicts: fit for JSON and `torch.save`."""
        return self._setup() | {"step": self._step, "windows": list(self._used)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state` was taken.

        Raises:
            ValueError: `state` belongs to other data, weights, seed, seq_len or global batch (the message says which),
                or is not a state; the mixture is unchanged then.
        """
        if not isinstance(state, dict):
            raise ValueError(f"sampler state: a {type(state).__name__}; expected the dictionary of state_dict()")
        for key, value in self._setup().items():
            if state.get(key) != value:
                why = ": the text, what is held out of it or the tokenizer is not the same" if key == "dataset" else ""
                raise ValueError(f"sampler state: {key} is {state.get(key)!r}; expected {value!r}{why}")
        step, used = state.get("step"), state.get("windows")
        if not (
            isinstance(step, int)
            and isinstance(used, list)
            and all(isinstance(n, int) and n >= 0 for n in used)
            and len(used) == len(self._used)
            and sum(used) == step * self._global_batch
        ):
            raise ValueError(
                f"sampler state: windows {used!r}; expected a count for each of {len(self._used)} sources, "
                f"together {step!r} steps of {self._global_batch}"
            )
        self._step, self._used = step, list(used)

    def usage(self) -> list[dict[str, Any]]:
        """For each source: `source`, `weight` (share), `tokens` seen so far, `epochs` seen, `available` tokens."""
        total = sum(s.weight for s in self._dataset.sources)
        return [
            {
                "source": s.name,
                "weight": s.weight / total,
                "tokens": used * self._seq_len,
                "epochs": used / count,
                "available": len(s.train),
            }
            for s, used, count in zip(self._dataset.sources, self._used, self._counts, strict=True)
        ]

    def usage_table(self) -> str:
        """`usage` as text, in the manner of table 1 of the LLaMA paper."""
        lines = [f"{'source':<16} {'weight':>7} {'tokens':>15} {'epochs':>8} {'available':>15}"]
        for row in self.usage():
            lines.append(
                f"{row['source']:<16} {row['weight']:>7.1%} {row['tokens']:>15,} "
                f"{row['epochs']:>8.2f} {row['available']:>15,}"
            )
        return "\n".join(lines)

    def _setup(self) -> dict[str, Any]:
        """What must be equal for a state to be loaded."""
        return {
            "version": _VERSION,
            "dataset": self._dataset.fingerprint,
            "weights": {s.name: s.weight for s in self._dataset.sources},
            "seed": self._seed,
            "seq_len": self._seq_len,
            "global_batch": self._global_batch,
        }

    def _next_window(self, i: int) -> int:
        epoch, position = divmod(self._used[i], self._counts[i])
        self._used[i] += 1
        if i not in self._orders or self._orders[i][0] != epoch:
            self._orders[i] = epoch, _generator(self._seed, 1, i, epoch).permutation(self._counts[i])
        return int(self._orders[i][1][position])


class _Damaged(ValueError):
    """A token file that is not what `meta.json` says."""


def _generator(*key: int) -> np.random.RandomState:
    """The generator of `key`. NumPy promises the legacy class's streams for ever (NEP 19), not those of Generator."""
    return np.random.RandomState(np.random.MT19937(np.random.SeedSequence(key)))


def _shift(rows: list[np.ndarray]) -> tuple[Tensor, Tensor]:
    both = torch.from_numpy(np.stack(rows))
    return both[:, :-1].contiguous(), both[:, 1:].contiguous()


def _windows(source: TokenSource, split: str, ids: np.ndarray, seq_len: int) -> int:
    count = (len(ids) - 1) // seq_len
    if count < 1:
        raise ValueError(
            f"source {source.name}: {len(ids)} {split} tokens are too few for seq_len {seq_len}, which needs "
            f"{seq_len + 1}: give more text, a smaller seq_len or another valid_fraction"
        )
    return count


def _is_integer(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _positive(**sizes: int) -> None:
    for name, value in sizes.items():
        if not _is_integer(value) or value < 1:
            raise ValueError(f"{name} {value!r} is not a positive integer")


def _scan(source: Source) -> Scan:
    """Read a source once, to decide what is held out and whether an old dataset can be reused."""
    return [(name, len(text), hashlib.sha256(text).hexdigest()) for name, text in source.documents()]


def _held_out(scan: Scan, fraction: float) -> set[str] | None:
    """Names of the held-out documents, or None where the tails of all documents are held out instead."""
    budget = room = fraction * sum(size for _, size, _ in scan)
    names = set()
    for name, size, _ in sorted(scan, key=lambda document: name_hash(document[0])):
        if size <= room:
            names.add(name)
            room -= size
    return names if budget - room >= budget / 2 else None


def _cut(text: bytes, fraction: float) -> int:
    """Where the tail of a document starts: at a line, or else at a character."""
    target = int(len(text) * (1 - fraction))
    if (line := text.find(b"\n", target) + 1) and line < len(text):
        return line
    while target < len(text) and text[target] & 0xC0 == 0x80:  # a continuation byte of UTF-8
        target += 1
    return target


def _dtype(vocab_size: int) -> np.dtype[Any]:
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def _bin(folder: Path, name: str, split: str) -> Path:
    if not NAME.fullmatch(name):
        raise ValueError(f"source name {name!r}")
    return folder / f"{name}.{split}.bin"


def _map(path: Path, dtype: np.dtype[Any], tokens: int) -> np.ndarray:
    expected = tokens * dtype.itemsize
    size = path.stat().st_size if path.is_file() else None
    if size is None or size != expected or tokens < 1:
        found = "missing" if size is None else f"{size} bytes long"
        raise _Damaged(
            f"dataset: {path} is {found}; expected {expected} bytes, {tokens} ids of {dtype.name}; build it again"
        )
    return np.memmap(path, dtype=dtype, mode="r", shape=(tokens,))


def _read_meta(folder: Path) -> dict[str, Any]:
    path = folder / "meta.json"
    if not path.is_file():
        raise FileNotFoundError(f"dataset: no {path}: nothing was built here, or building it was interrupted")
    try:
        meta = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"dataset: {path} is damaged: {error}; build it again") from error
    if not isinstance(meta, dict):
        raise ValueError(f"dataset: {path} is damaged: it holds no object; build it again")
    return meta


def _write_meta(folder: Path, meta: dict[str, Any]) -> None:
    write_atomically(folder / "meta.json", (json.dumps(meta, indent=1) + "\n").encode())


def _reusable(folder: Path, tokenizer: Tokenizer, inputs: str) -> "TokenDataset | None":
    """The dataset in `folder` if it is whole and came from `inputs`."""
    try:
        dataset = TokenDataset.open(folder, tokenizer)
    except (FileNotFoundError, ValueError):
        return None
    return dataset if dataset.fingerprint == inputs else None


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder's build lock; the kernel frees it if the process dies."""
    with open(folder / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _build(
    sources: Sequence[Source], scans: Sequence[Scan], tokenizer: Tokenizer, folder: Path, meta: dict[str, Any]
) -> None:
    """Write a new dataset, with `meta` completed by its sources, under the lock; on any error remove all of it."""
    for stale in folder.glob(".*.bin.tmp"):  # of a builder that was killed
        stale.unlink()
    replaced = _bins(folder)
    temporary = {
        _bin(folder, source.name, split): folder / f".{source.name}.{split}.bin.tmp"
        for source in sources
        for split in _SPLITS
    }
    to_remove = list(temporary.values())
    try:
        entries = []
        for source, scan in zip(sources, scans, strict=True):
            paths = [temporary[_bin(folder, source.name, split)] for split in _SPLITS]
            counts = _encode(source, scan, tokenizer, paths, meta["valid_fraction"])
            entry = {"name": source.name, "weight": source.weight, "root": str(source.root)}
            entries.append(entry | {"skipped_files": source.skipped} | dict(zip(_SPLITS, counts, strict=True)))
        (folder / "meta.json").unlink(missing_ok=True)
        sync(folder)
        to_remove += temporary.keys()
        for path in replaced:
            path.unlink(missing_ok=True)
        for final, path in temporary.items():
            os.replace(path, final)
        _write_meta(folder, meta | {"sources": entries})
    except BaseException as error:
        for path in to_remove:
            path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            problem = f"cannot write the dataset in {folder}, nothing of it was kept: {error.strerror}"
            raise OSError(error.errno, problem) from error
        raise


def _bins(folder: Path) -> list[Path]:
    """The token files of the dataset in `folder`; none if its meta.json is missing or damaged."""
    try:
        return [_bin(folder, entry["name"], split) for entry in _read_meta(folder)["sources"] for split in _SPLITS]
    except (FileNotFoundError, KeyError, TypeError, ValueError):
        return []


def _encode(
    source: Source, scan: Scan, tokenizer: Tokenizer, paths: Sequence[Path], fraction: float
) -> list[dict[str, int]]:
    """Write the ids of both splits to `paths`; for each split its documents, bytes of text and tokens."""
    held_out = _held_out(scan, fraction)
    dtype = _dtype(tokenizer.vocab_size)
    counts = [{"documents": 0, "bytes": 0, "tokens": 0} for _ in paths]
    waiting: list[list[bytes]] = [[] for _ in paths]
    waiting_bytes = [0 for _ in paths]
    with contextlib.ExitStack() as stack:
        files = [stack.enter_context(open(path, "wb")) for path in paths]

        def write(i: int, documents: list[bytes]) -> None:
            if len(documents) == 1:  # perhaps a very long one
                parts: Iterable[list[int]] = tokenizer.encode_parts(documents[0], bos=True, eos=True)
            else:
                parts = tokenizer.encode_many(documents, bos=True, eos=True)
            for ids in parts:
                files[i].write(np.asarray(ids, dtype=dtype).tobytes())
                counts[i]["tokens"] += len(ids)
            counts[i]["documents"] += len(documents)
            counts[i]["bytes"] += sum(map(len, documents))

        for (name, _, digest), (_, text) in zip(scan, source.documents(), strict=True):
            if hashlib.sha256(text).hexdigest() != digest:
                raise ValueError(f"source {source.name}: {name} changed while it was read; expected files at rest")
            cut = _cut(text, fraction) if held_out is None else len(text) * (name not in held_out)
            for i, part in enumerate((text[:cut], text[cut:])):
                if waiting_bytes[i] + len(part) > _BATCH_BYTES:
                    write(i, waiting[i])
                    waiting[i], waiting_bytes[i] = [], 0
                if part:
                    waiting[i].append(part)
                    waiting_bytes[i] += len(part)
        for i, file in enumerate(files):
            write(i, waiting[i])
            file.flush()
            os.fsync(file.fileno())
    for split, count in zip(_SPLITS, counts, strict=True):
        if not count["tokens"]:
            raise ValueError(f"source {source.name}: no text is left for {split}; expected more than a line of text")
    return counts
