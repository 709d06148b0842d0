"""What stands in a folder of text and cannot be read: an error, as text that is left out in silence is not seen.

And arguments of the data that are none.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llama_fast.train.data import Mixture, TokenDataset, TokenSource, build_token_file
from llama_fast.train.run import prepare
from llama_fast.train.sources import Source, parse_data_args


@pytest.mark.parametrize("what", ["sub", "sub/b.txt"])
def test_what_cannot_be_read_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "a.txt").write_text("some text")
    (tmp_path / "sub" / "b.txt").write_text("more text")
    paths = [[str(tmp_path)]] if what == "sub" else [[str(tmp_path)], [str(tmp_path / what)]]
    for data in paths:
        assert parse_data_args(data)[0].skipped == 0
    for module, name in ((os, "scandir"), (Path, "read_bytes")):
        real: Any = getattr(module, name)

        def denied(path: Any, real: Any = real) -> Any:
            if Path(path) == tmp_path / what:  # the tests may run as root, who may read all
                raise PermissionError(13, "Permission denied", str(path))
            return real(path)

        monkeypatch.setattr(module, name, denied)
    for data in paths:
        with pytest.raises(ValueError, match=f"data .*: {tmp_path / what} cannot be read: Permission denied"):
            parse_data_args(data)


def test_one_path_is_no_list_of_paths(tmp_path: Path) -> None:
    """The letters of a path are not read as paths: "/" is one of them, and the whole file system."""
    (tmp_path / "a.txt").write_text("some text")
    with pytest.raises(ValueError, match=r"data '/.*/a.txt': expected a list of PATH or PATH:WEIGHT"):
        parse_data_args(str(tmp_path / "a.txt"))
    with pytest.raises(ValueError, match="data 3: expected PATH or PATH:WEIGHT"):
        parse_data_args([3])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": 3}, "source name 3: expected letters"),
        ({"weight": "1"}, "source a: weight '1' is not a positive finite number"),
        ({"paths": ("/x/a.txt",)}, "source a: path '/x/a.txt'; expected a Path below root /x"),
        ({"paths": "/x/a.txt"}, "source a: path '/x/a.txt'; expected a Path below root /x"),
        ({"root": Path("/y")}, r"source a: path PosixPath\('/x/a.txt'\); expected a Path below root /y"),
    ],
)
def test_a_bad_source_is_named(change: dict[str, Any], message: str) -> None:
    good = {"name": "a", "paths": (Path("/x/a.txt"),), "weight": 1.0, "root": Path("/x")}
    Source(**good)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        Source(**{**good, **change})


def test_numbers_of_batches_are_integers(tmp_path: Path) -> None:
    ids = np.arange(50, dtype=np.uint16)
    dataset = TokenDataset([TokenSource("a", 1.0, ids, ids, tmp_path, tmp_path)], 64, "text", "tokenizer")
    good = {"batch_size": 2, "seq_len": 8, "seed": 0, "rank": 0, "world_size": 1}
    for name, value in (("batch_size", "2"), ("batch_size", 2.5), ("seq_len", None), ("world_size", 1.0)):
        with pytest.raises(ValueError, match=f"{name} {value!r} is not a positive integer"):
            Mixture(dataset, **{**good, name: value})
    for name, value in (("seed", 1.5), ("seed", "x"), ("rank", 0.5)):
        with pytest.raises(ValueError, match=f"{name} {value!r} is not an integer in"):
            Mixture(dataset, **{**good, name: value})
    for sizes, message in (({"limit": 1.5}, "limit 1.5"), ({"seq_len": "8"}, "seq_len '8'")):
        with pytest.raises(ValueError, match=f"{message} is not a positive integer"):
            dataset.valid_batches(**{"batch_size": 2, "seq_len": 8, **sizes})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"valid_fraction '0.1' is not in"):
        build_token_file([], None, tmp_path, valid_fraction="0.1")  # type: ignore[arg-type]
    mixture = Mixture(dataset, **{name: np.int64(value) for name, value in good.items()})
    assert all(type(value) is not np.int64 for value in mixture.state_dict().values())
    with pytest.raises(ValueError, match="sampler state: a list; expected the dictionary"):
        mixture.load_state_dict([])  # type: ignore[arg-type]


def test_a_folder_of_tokens_can_be_named_by_a_string(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some text and more\n" * 99)
    prepare(parse_data_args([str(tmp_path / "a.txt")]), 280, str(tmp_path / "tokens"))
    assert (tmp_path / "tokens" / "tokenizer.model").is_file()
    with pytest.raises(NotADirectoryError, match=r"tokens .*a.txt is a file: expected a folder, or a new one"):
        prepare(parse_data_args([str(tmp_path / "a.txt")]), 280, tmp_path / "a.txt")
