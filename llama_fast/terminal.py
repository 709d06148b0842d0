"""What the command line does with a checkpoint: continue a text, converse, convert, and show progress meanwhile."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from llama_fast import weights
from llama_fast.chat import Chat
from llama_fast.model import Llama
from llama_fast.pretrained import AnyTokenizer, chat_template, load_tokenizer, write_companions
from llama_fast.text import TextStream
from llama_fast.train.run import find_checkpoint


def resolve(path: Path) -> Path:
    """The checkpoint at `path`; of a training run, its newest good one.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: a training checkpoint is damaged.
    """
    if not path.exists():
        kinds = "a folder of Hugging Face or Meta, a .gguf file, or a run of `llama-fast train`"
        raise FileNotFoundError(f"{path}: no such folder or file, expected {kinds}")
    if path.is_file() or any((path / name).is_file() for name in (weights.CONFIG, weights.PARAMS)):
        return find_checkpoint(path) if (path / "manifest.json").is_file() else path
    return find_checkpoint(path)


def load(path: Path, dtype: str | None, device: str | None) -> tuple[Llama, AnyTokenizer, Path]:
    """Model and tokenizer of the checkpoint at `path`, with a progress bar on a terminal.

    Raises:
        FileNotFoundError, ImportError, ValueError: as `Llama.from_pretrained` and `load_tokenizer`, or no such device.
    """
    check_device(device)
    path = resolve(path)
    tokenizer = load_tokenizer(path)
    with progress_bar(f"reading {path.name}") as progress:
        model = Llama.from_pretrained(path, dtype=dtype_of(dtype), device=device, progress=progress)
    return model, tokenizer, path


def check_device(name: str | None) -> None:
    """Raises ValueError unless torch can read a number on the device called `name`; None is the default one."""
    try:
        torch.zeros((), device=name).item()
    except (RuntimeError, AssertionError) as error:  # the latter from a torch that was built without CUDA
        raise ValueError(f"device = {name!r}: {str(error).splitlines()[0]}") from None


def check_system(system: str | None, chat: bool) -> None:
    """Raises ValueError for a system message outside a conversation."""
    if system is not None and not chat:
        raise ValueError(f"--system {system!r}: expected --chat beside it")


def dtype_of(name: str | None) -> torch.dtype | None:
    """The floating-point dtype called `name`, None for None.

    Raises:
        ValueError: there is none.
    """
    if name is None:
        return None
    known = {str(d).removeprefix("torch."): d for d in weights.FLOATS}
    if name not in known:
        raise ValueError(f"dtype = {name!r}: expected one of {', '.join(known)}")
    return known[name]


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[str, int, int], None]]:
    """A callback (name, bytes done, bytes in all) that moves a bar on standard error, where that is a terminal."""
    columns = TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(what, total=None)
        yield lambda name, done, total: bar.update(task, completed=done, total=total)


def complete(
    model: Llama, tokenizer: AnyTokenizer, prompt: str, max_new_tokens: int, stop: Sequence[str], **sampling: Any
) -> None:
    """Prints `prompt` and its continuation as it is made."""
    ids = tokenizer.encode(prompt, bos=tokenizer.adds_bos or not prompt)
    if len(ids) < model.config.max_seq_len:
        max_new_tokens = min(max_new_tokens, model.config.max_seq_len - len(ids))
    stream = TextStream(model, tokenizer, ids, max_new_tokens, stop, continuation=bool(prompt), sampling=sampling)
    show(stream, prompt)


def show(pieces: Iterable[str], before: str = "") -> None:
    """Prints `before` with the first piece, so that an argument out of its range prints nothing, then the others."""
    for piece in pieces:
        print(before + piece, end="", flush=True)
        before = ""
    print(before)


def converse(
    model: Llama,
    tokenizer: AnyTokenizer,
    path: Path,
    system: str | None,
    prompt: str | None,
    max_new_tokens: int,
    stop: Sequence[str],
    **sampling: Any,
) -> None:
    """Answers `prompt`, or lines from the terminal until its end. Ctrl-C ends an answer; /new begins again.

    Raises:
        ValueError: the checkpoint has no chat template, or an argument is out of its range.
    """
    template = chat_template(path)
    if template is None:
        raise ValueError(f"{path}: has no chat template; without --chat it continues a text")
    chat = Chat(model, tokenizer, template, system)
    if prompt is not None:
        show(chat.say(prompt, max_new_tokens, stop, **sampling))
        return
    print("Ctrl-C ends an answer, Ctrl-D the conversation; /new begins a new one.")
    while True:
        try:
            text = input("> ").strip()
        except EOFError:
            print()
            return
        if text == "/new":
            chat = Chat(model, tokenizer, template, system)
        elif text:
            try:
                answer = chat.say(text, max_new_tokens, stop, **sampling)
            except ValueError as full:  # the conversation fills the context
                print(f"{full}: /new")
                continue
            try:
                show(answer)
            except KeyboardInterrupt:
                print()


def convert(path: Path, target: Path, format: str, shards: int, dtype: str | None, max_seq_len: int | None) -> None:
    """Writes the checkpoint at `path` to the new folder `target`, with its tokenizer where it has one.

    Raises:
        FileExistsError, FileNotFoundError, ImportError, OSError, ValueError: as `weights.open_checkpoint` and `write`.
    """
    path = resolve(path)
    source = weights.open_checkpoint(path, max_seq_len)
    left_out: list[str] = []

    def beside(folder: Path) -> None:
        try:
            write_companions(path, folder)
        except (FileNotFoundError, ImportError, ValueError) as error:
            left_out.append(str(error))

    with progress_bar(f"writing {target.name}") as progress:
        weights.write(source, target, format, shards=shards, dtype=dtype_of(dtype), beside=beside, progress=progress)
    kind = str(dtype_of(dtype) or source.dtype).removeprefix("torch.")
    files = f"{shards} file{'s' * (shards > 1)} of weights"
    print(f"{target}: {source.config.n_params:,} parameters, {kind}, {format}, {files}")
    for reason in left_out:
        print(f"no tokenizer was written: {reason}")
