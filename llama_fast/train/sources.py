"""Where training text comes from: files and folders that the user names, or the text that every Python has."""

import hashlib
import math
import os
import re
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

Documents = Iterable[tuple[str, bytes]]  # (name, UTF-8 text)

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")  # a source's name is the stem of a file
_CODE_BYTES = 8_000_000  # of the standard library: enough for a demonstration, tokenised in seconds on two cores
# Tests, installed packages and tables are not a programmer's writing; pydoc_data is the "prose" source.
_NOT_CODE = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "encodings", "pydoc_data"}


class _NotText(ValueError):
    """A file that is no UTF-8 text; the message says why."""


@dataclass(frozen=True)
class Source:
    """Named text with a weight.

    Attributes:
        name: letters, digits, ".", "_", "-"; names the token files.
        paths: the files, one document each unless `reader` says otherwise.
        weight: share of the training windows, relative to the other sources' weights; positive and finite.
        root: a document's name is its path from here; it decides, hashed, which documents are held out.
        reader: gives (name, UTF-8 text) for each document in a file; default: the file is the document.
        skipped: files below a folder that were left out because they are empty or no UTF-8 text.

    Raises:
        ValueError: a name, weight or path outside these rules, or no paths.
    """

    name: str
    paths: tuple[Path, ...]
    weight: float
    root: Path
    reader: Callable[[Path], Documents] | None = None
    skipped: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not NAME.fullmatch(self.name):
            raise ValueError(f"source name {self.name!r}: expected letters, digits, '.', '_' and '-'")
        if not (isinstance(self.weight, int | float) and math.isfinite(self.weight) and self.weight > 0):
            raise ValueError(f"source {self.name}: weight {self.weight!r} is not a positive finite number")
        if not self.paths:
            raise ValueError(f"source {self.name}: no files with text in {self.root}")
        for path in (self.paths,) if isinstance(self.paths, str) else self.paths:
            if not isinstance(path, Path) or (self.reader is None and not path.is_relative_to(self.root)):
                raise ValueError(f"source {self.name}: path {path!r}; expected a Path below root {self.root}")

    def documents(self) -> Iterator[tuple[str, bytes]]:
        """(name, UTF-8 text) of each document in order. Raises ValueError for a file that cannot be read as text."""
        for path in self.paths:
            if self.reader is not None:
                yield from self.reader(path)
            else:
                yield path.relative_to(self.root).as_posix(), _read_text(path)


def default_sources() -> list[Source]:
    """Text that every Python has, so that nothing is downloaded: "code", weight 0.9, and "prose", weight 0.1.

    code: the .py files of the standard library without tests, installed packages, `pydoc_data` and the tables in
    `encodings`; files in order of the SHA-256 of their relative path, each taken that still fits into 8 MB.
    prose: the topics of `pydoc_data.topics` (the language reference), one document a topic, 0.5 MB.

    Raises:
        ValueError: this Python has its standard library not as source files.
    """
    root = Path(sysconfig.get_path("stdlib")).resolve()
    files = [path for path in _walk(root, _NOT_CODE) if path.suffix == ".py" and "sysconfigdata" not in path.name]
    code, skipped = _text_files(sorted(files, key=lambda path: name_hash(path.relative_to(root).as_posix())))
    taken, room = [], _CODE_BYTES
    for path in code:
        if (size := path.stat().st_size) <= room:
            taken.append(path)
            room -= size
    topics = root / "pydoc_data" / "topics.py"
    if not taken or not topics.is_file():
        raise ValueError(f"no Python source files in {root}: name your own text files instead of the default sources")
    return [
        Source("code", tuple(taken), 0.9, root, skipped=skipped),
        Source("prose", (topics,), 0.1, root, reader=_topics),
    ]


def parse_data_args(args: Sequence[str], written: Sequence[Path] = ()) -> list[Source]:
    """Sources from "PATH" or "PATH:WEIGHT" (weight 1 if left out), each a file or a folder.

    An argument that exists as a path is that path, colon or not; else what follows the last colon is the weight. A
    folder gives every UTF-8 text file below it, one document each; hidden names, links to folders, empty and binary
    files are passed over and counted. A file named itself must be text. The source is named after the last part of
    the path; a second one of that name gets "-2".

    Args:
        args: see above.
        written: folders that the program writes. Below a folder of text, what stands there would be text too the next
            time, and a run could not go on with the data that it began with.

    Raises:
        ValueError: no arguments, a path that is missing, empty, unreadable or no UTF-8 text, a folder without text or
            with what cannot be read, a weight that is not a positive finite number, a file that two arguments name, or
            a folder of `written` that would be read as text; the message quotes the argument, the value found and what
            was expected.
    """
    if isinstance(args, str):  # of whose letters "/" would be the whole file system
        raise ValueError(f"data {args!r}: expected a list of PATH or PATH:WEIGHT")
    if not args:
        raise ValueError("no data arguments; expected PATH or PATH:WEIGHT, a text file or a folder of text files")
    sources: list[Source] = []
    owner: dict[str, int] = {}
    for i, arg in enumerate(args):
        if not isinstance(arg, str | os.PathLike):
            raise ValueError(f"data {arg!r}: expected PATH or PATH:WEIGHT")
        path, weight = _path_and_weight(arg)
        if path.is_dir():
            for folder in written:
                if _walks_into(path, folder):
                    raise ValueError(
                        f"data {arg!r}: {folder} lies in it, and what is written there would be read as text the next "
                        "time; expected a folder outside, or a hidden one"
                    )
            root = path
            try:
                paths, skipped = _text_files(_walk(path, set()))
            except ValueError as error:
                raise ValueError(f"data {arg!r}: {error}") from error
            if not paths:
                raise ValueError(
                    f"data {arg!r}: no text in folder {path} ({skipped} empty or binary files passed over); "
                    "expected at least one UTF-8 text file"
                )
        else:
            root, paths, skipped = path.parent, [path], 0
            try:
                _read_text(path)
            except ValueError as error:
                raise ValueError(f"data {arg!r}: {error}") from error
        for file in paths:
            other = owner.setdefault(os.path.realpath(file), i)
            if other != i:
                raise ValueError(f"data {arg!r}: {file} is already in {args[other]!r}; expected each file once")
        names = {source.name.lower() for source in sources}
        sources.append(Source(_free_name(path, names), tuple(paths), weight, root, skipped=skipped))
    return sources


def name_hash(name: str) -> str:
    """SHA-256 of a name, file names that are no UTF-8 included: an order that depends on nothing else."""
    return hashlib.sha256(os.fsencode(name)).hexdigest()


def _topics(path: Path) -> Documents:
    from pydoc_data import topics

    return [(f"{path.name}/{name}", text.encode()) for name, text in sorted(topics.topics.items())]


def _read_text(path: Path) -> bytes:
    """The bytes of a file, checked to be UTF-8 text. Raises _NotText with the reason, ValueError for a failed read."""
    if not path.is_file():
        raise _NotText(f"{path} is not a regular file; expected a UTF-8 text file")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise _unreadable(error) from error
    if not data.strip():
        raise _NotText(f"{path} is empty or only spaces; expected UTF-8 text")
    if (position := data.find(b"\0")) >= 0:
        raise _NotText(f"{path} is binary: a zero byte at {position}; expected UTF-8 text")
    try:
        data.decode()
    except UnicodeDecodeError as error:
        raise _NotText(f"{path} is not UTF-8 text: byte 0x{data[error.start]:02x} at {error.start}") from error
    return data


def _unreadable(error: OSError) -> ValueError:
    return ValueError(f"{error.filename} cannot be read: {error.strerror}; expected readable files and folders")


def _walk(root: Path, leave_out: set[str]) -> list[Path]:
    """Files below `root` without hidden names, folders in `leave_out` and links to folders, sorted."""

    def stop(error: OSError) -> None:
        raise _unreadable(error) from error

    found = []
    for folder, folders, files in os.walk(root, onerror=stop):
        folders[:] = [name for name in folders if name not in leave_out and not name.startswith(".")]
        found += [Path(folder, name) for name in files if not name.startswith(".")]
    return sorted(found)


def _walks_into(root: Path, folder: Path) -> bool:
    """Whether `_walk` of `root` finds, or would find, the files of `folder`."""
    inside, root = folder.resolve(), root.resolve()
    return inside.is_relative_to(root) and not any(part.startswith(".") for part in inside.relative_to(root).parts)


def _text_files(paths: Iterable[Path]) -> tuple[list[Path], int]:
    """Those of `paths` that are text, a file that has several names once; and how many are not."""
    seen: set[str] = set()
    texts, skipped = [], 0
    for path in paths:
        try:
            _read_text(path)
        except _NotText:
            skipped += 1
            continue
        if (real := os.path.realpath(path)) not in seen:
            seen.add(real)
            texts.append(path)
    return texts, skipped


def _path_and_weight(arg: str) -> tuple[Path, float]:
    if arg and os.path.exists(arg):
        return Path(arg), 1.0
    path, colon, weight = os.fspath(arg).rpartition(":")
    if not colon or not path or not os.path.exists(path):
        raise ValueError(f"data {arg!r}: {(path or arg)!r} does not exist; expected PATH or PATH:WEIGHT")
    try:
        value = float(weight)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"data {arg!r}: weight {weight!r}; expected a positive finite number")
    return Path(path), value


def _free_name(path: Path, taken: set[str]) -> str:
    """A source name from the last part of `path` that is not in `taken` (lower case)."""
    stem = re.sub(r"[^A-Za-z0-9._-]+", "_", path.resolve().name).lstrip("._-") or "text"
    name, number = stem, 1
    while name.lower() in taken:
        number += 1
        name = f"{stem}-{number}"
    return name
