"""A training run put together from its parts, for the command line and the demo: tokenizer, data, model.

A run folder holds `tokenizer.model`, `data/` (token files, where no other folder is named), `log.jsonl` and the
checkpoints `step_N/`: all that `llama-fast generate` needs.
"""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from llama_fast import checkpoint
from llama_fast.config import LlamaConfig
from llama_fast.files import write_atomically
from llama_fast.plan import STATES
from llama_fast.tokenizer import Tokenizer
from llama_fast.train.data import Source, TokenDataset, build_token_file, default_sources, parse_data_args

TOKENIZER = "tokenizer.model"


class RunData:
    """A TokenDataset as the Trainer wants it: one mixture, whose position is the run's."""

    def __init__(self, dataset: TokenDataset, batch_size: int, seq_len: int, seed: int = 0) -> None:
        self._dataset = dataset
        self._sizes = (batch_size, seq_len)
        self._mixture = dataset.batches(batch_size, seq_len, seed)

    def batches(self, batch_size: int, seq_len: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The mixture's batches from its position on.

        Raises:
            ValueError: other sizes than the mixture's.
        """
        if (batch_size, seq_len) != self._sizes:
            raise ValueError(f"batch_size, seq_len = {batch_size}, {seq_len}: expected {self._sizes}")
        return self._mixture

    def valid_batches(self, batch_size: int, seq_len: int, n: int) -> Iterable[tuple[Tensor, Tensor]]:
        """At most `n` held-out batches, the same at every call."""
        return self._dataset.valid_batches(batch_size, seq_len, limit=n)

    def state_dict(self) -> dict[str, Any]:
        """The mixture's position."""
        return self._mixture.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a position. Raises ValueError where it belongs to other data or settings."""
        self._mixture.load_state_dict(state)


def sources_of(data: Sequence[str], written: Sequence[Path] = ()) -> list[Source]:
    """The sources that `--data` names, or Python's own standard library where it names none.

    Raises:
        ValueError: as `parse_data_args`; a folder of `written` lies in a folder of text, say.
    """
    return parse_data_args(data, written) if data else default_sources()


def prepare(
    sources: Sequence[Source], vocab_size: int, folder: str | os.PathLike[str]
) -> tuple[Tokenizer, TokenDataset]:
    """The tokenizer and the token files in `folder`, made where they are not there yet.

    A `tokenizer.model` of the right size in `folder` is used as it is; token files are reused if they came from the
    same text and tokenizer.

    Raises:
        ValueError: the text cannot be read or is too little for `vocab_size`, or tokenizer.model has another size.
        OSError: `folder` cannot be written.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"tokens {folder} is a file: expected a folder, or a new one")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / TOKENIZER
    if path.exists():
        tokenizer = Tokenizer(path)
        if tokenizer.vocab_size != vocab_size:
            raise ValueError(f"{path} has {tokenizer.vocab_size} pieces: expected vocab_size = {vocab_size}")
    else:
        texts = (text.decode() for source in sources for _, text in source.documents())
        tokenizer = Tokenizer.train(texts, path, vocab_size)
    return tokenizer, build_token_file(sources, tokenizer, folder)


def build_model(
    config: LlamaConfig, *, plain: bool = False, policy: str = "recompute-cheap", seed: int = 0
) -> nn.Module:
    """A float32 model with the weights of `seed`: `Llama`, or the same in plain PyTorch.

    Raises:
        ValueError: no such policy.
    """
    if plain:
        from llama_fast.plain import PlainLlama

        model: nn.Module = PlainLlama(config)
    else:
        from llama_fast.model import Llama

        model = Llama(config, policy=policy)
    model.reset_parameters(seed)  # type: ignore[operator]
    return model


def keep_tokenizer(tokenizer: Tokenizer, run_dir: Path) -> None:
    """Put the tokenizer into the run folder, so that a checkpoint is never without it.

    Raises:
        ValueError: the folder has a different one already.
        OSError: it cannot be written.
    """
    target = run_dir / TOKENIZER
    if target.exists():
        if Tokenizer(target).fingerprint != tokenizer.fingerprint:
            raise ValueError(f"{target} is not the tokenizer of this data: expected that, or an unused folder")
        return
    run_dir.mkdir(parents=True, exist_ok=True)
    write_atomically(target, tokenizer.model)  # half a file would be another tokenizer at the next start


def config_for(name: str, seq_len: int, vocab_size: int | None) -> LlamaConfig:
    """The preset `name`, with another vocabulary where one is given.

    Raises:
        ValueError: no such preset, or it cannot take `seq_len`.
    """
    config = LlamaConfig.preset(name)
    if seq_len > config.max_seq_len:
        raise ValueError(f"seq_len = {seq_len}: expected at most max_seq_len = {config.max_seq_len} of {name}")
    return config if vocab_size is None else dataclasses.replace(config, vocab_size=vocab_size)


def check_room(name: str, config: LlamaConfig) -> None:
    """Whether this machine's memory could hold the states of a run of the preset `name`; else the system would end it.

    Raises:
        ValueError: it could not.
    """
    a_parameter = sum(STATES["float32"])
    needed, room = a_parameter * config.n_params, os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > room:
        raise ValueError(
            f"config {name}: weights, gradients and the optimizer take {needed / 2**30:.0f} GiB, {a_parameter} bytes a "
            f"parameter: expected no more than this machine's memory, {room / 2**30:.0f} GiB"
        )


def find_checkpoint(path: Path) -> Path:
    """The checkpoint that `path` is, or the newest good one of the run that it is; verified.

    A newer, damaged one is named on standard error.

    Raises:
        FileNotFoundError: there is no good checkpoint in it.
        ValueError: the checkpoint is damaged.
    """
    folder: Path | None = path
    if not (path / checkpoint.MANIFEST).is_file():
        problems: list[str] = []
        folder = checkpoint.latest(path, lambda p, reason: problems.append(f"{p.name}: {reason}"))
        if folder is None:
            expected = "" if problems else ": expected config.json, params.json, or step_N of `llama-fast train`"
            raise FileNotFoundError(f"{path} holds no good checkpoint{expected}" + "".join(f"; {p}" for p in problems))
        for problem in problems:
            print(f"llama-fast: passed over a damaged checkpoint: {problem}; read {folder.name}", file=sys.stderr)
    assert folder is not None
    checkpoint.verify(folder)
    return folder
