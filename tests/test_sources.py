"""What stands in a folder of text and cannot be read: an error, as text that is left out in silence is not seen."""

import os
from pathlib import Path
from typing import Any

import pytest

from llama_fast.train.sources import parse_data_args


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
