"""Atomic writes, of files and of folders."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from llama_fast.files import new_folder, write_atomically


def test_a_failed_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match=f"No space left on device: '{path}'"):
            write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["file"]
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"
    with pytest.raises(FileNotFoundError):
        write_atomically(tmp_path / "missing" / "file", b"")


def test_a_folder_takes_away_its_own_leftovers_alone(tmp_path: Path) -> None:
    others = [".m.1.abcdefgh.tmp", ".mx.abcdefgh.tmp", ".n.abcdefgh.tmp", ".m.notes.txt", ".m.old.tmp"]
    for name in (".m.abcdefgh.tmp", *others):
        (tmp_path / name).mkdir()
    (tmp_path / ".m.12345678.tmp").write_bytes(b"")  # of a file m that was being written
    (tmp_path / ".m.aaaaaaaa.tmp").symlink_to(tmp_path / others[0])
    others += [".m.12345678.tmp", ".m.aaaaaaaa.tmp"]
    for name in ("m", "[mn]", "*"):
        with new_folder(tmp_path / name, 0) as folder:
            (folder / "file").write_bytes(b"")
        assert os.listdir(tmp_path / name) == ["file"]
    assert {n for n in os.listdir(tmp_path) if n.startswith(".")} == set(others)


@pytest.mark.parametrize("there", [True, False])
def test_a_folder_behind_a_symbolic_link(tmp_path: Path, there: bool) -> None:
    real, link = tmp_path / "real", tmp_path / "link"
    if there:
        real.mkdir()
    link.symlink_to(real)
    with new_folder(link, 0) as folder:
        (folder / "file").write_bytes(b"")
    assert link.is_symlink()
    assert os.listdir(real) == ["file"]
    assert sorted(os.listdir(tmp_path)) == ["link", "real"]


def test_a_folder_that_cannot_be_replaced_is_seen_before_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(path: Path) -> None:
        with new_folder(path, 0):
            pytest.fail("the block ran")

    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(FileExistsError, match=r"is the current folder, .*: expected a folder in it"):
        write(Path("."))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "empty")
    with pytest.raises(FileExistsError, match=r"is a mount point, .*: expected a folder in it"):
        write(Path("empty"))
