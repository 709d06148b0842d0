"""Checkpoints: round trip, damage, full disks, what is kept."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import llama_fast
from llama_fast import checkpoint
from llama_fast.config import PRESETS
from llama_fast.plain import PlainLlama

CONFIG = dataclasses.replace(PRESETS["tiny"], dim=32, vocab_size=64, ffn_dim=48, n_layers=1)
STATE = {"moments": {0: torch.arange(5.0)}, "seed": 7, "names": ["a"], "pair": (1, None), "x": 0.5, "yes": True}


@pytest.fixture
def model() -> PlainLlama:
    return PlainLlama(CONFIG)


def names(run_dir: Path) -> list[str]:
    return sorted(p.name for p in run_dir.iterdir())


def no_skip(path: Path, reason: str) -> None:
    raise AssertionError(f"{path} skipped: {reason}")


@pytest.mark.parametrize("tied", [False, True])
def test_round_trip(tmp_path: Path, tied: bool) -> None:
    config = dataclasses.replace(CONFIG, tie_embeddings=tied)
    model = PlainLlama(config)
    path = checkpoint.save(tmp_path, 12, model, STATE)
    assert names(tmp_path) == ["step_0000012"]
    assert names(path) == ["config.json", "manifest.json", "model.safetensors", "state.pt"]
    assert checkpoint.latest(tmp_path, no_skip) == path
    loaded = checkpoint.load(path)
    assert loaded.step == 12
    assert str(loaded.state) == str(STATE)
    assert checkpoint.load_config(path) == config
    assert ("lm_head.weight" in loaded.weights) is not tied
    other = PlainLlama(config)
    other.reset_parameters(99)
    checkpoint.load_into(other, checkpoint.load_model_weights(path))
    for key, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[key]), key
    assert (other.lm_head.weight is other.embed_tokens.weight) is tied


def test_a_path_that_is_not_utf8(tmp_path: Path, model: PlainLlama) -> None:
    path = checkpoint.save(tmp_path / os.fsdecode(b"run\xff"), 1, model, STATE)
    weights = checkpoint.load(path).weights
    assert all(torch.equal(value, weights[key]) for key, value in model.state_dict().items())


def test_keeps_the_newest(tmp_path: Path, model: PlainLlama) -> None:
    for step in (1, 9, 10, 12_345_678):  # the last has more digits than the name's seven
        checkpoint.save(tmp_path, step, model, STATE, keep=3)
    assert [p.name for p in checkpoint.checkpoints(tmp_path)] == ["step_0000009", "step_0000010", "step_12345678"]
    assert len(names(tmp_path)) == 3
    with pytest.raises(ValueError, match="keep = 0"):
        checkpoint.save(tmp_path, 1, model, STATE, keep=0)


def test_no_run_directory(tmp_path: Path) -> None:
    assert checkpoint.checkpoints(tmp_path / "none") == []
    assert checkpoint.latest(tmp_path / "none", no_skip) is None


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("model.safetensors", truncate, r"model.safetensors: \d+ bytes; expected \d+"),
        ("model.safetensors", flip_a_bit, r"model.safetensors: SHA-256 \w{64}; expected \w{64}"),
        ("model.safetensors", Path.unlink, r"model.safetensors: missing"),
        ("state.pt", truncate, r"state.pt: \d+ bytes; expected"),
        ("state.pt", flip_a_bit, r"state.pt: SHA-256"),
        ("config.json", flip_a_bit, r"config.json: SHA-256"),
        ("manifest.json", Path.unlink, r"manifest.json: missing"),
        ("manifest.json", truncate, None),
        ("manifest.json", lambda p: os.truncate(p, 30), r"manifest.json: .*expected JSON"),
        ("manifest.json", lambda p: p.write_text("[]"), r"manifest.json: holds a list"),
        ("manifest.json", lambda p: p.write_text("{}"), r"manifest.json: expected format 1"),
        (
            "manifest.json",
            lambda p: p.write_text('{"format": 1, "step": 2, "files": {}}'),
            r"manifest.json: lists \[\]; expected model.safetensors and state.pt",
        ),
    ],
)
def test_damage_is_named_and_skipped(
    tmp_path: Path, model: PlainLlama, file: str, damage: Any, message: str | None
) -> None:
    good = checkpoint.save(tmp_path, 1, model, STATE)
    bad = checkpoint.save(tmp_path, 2, model, STATE)
    damage(bad / file)
    skipped: list[tuple[Path, str]] = []
    found = checkpoint.latest(tmp_path, lambda path, reason: skipped.append((path, reason)))
    if message is None:  # only the line feed at the end went
        assert found == bad
        return
    assert found == good
    assert [p for p, _ in skipped] == [bad]
    with pytest.raises(ValueError, match=message) as caught:
        checkpoint.load(bad)
    assert skipped[0][1] == str(caught.value)
    assert str(bad) in str(caught.value)
    # saved again, the step is whole again
    checkpoint.save(tmp_path, 2, model, STATE)
    assert checkpoint.latest(tmp_path, no_skip) == bad


def test_a_good_step_is_left_as_it_is(tmp_path: Path, model: PlainLlama) -> None:
    path = checkpoint.save(tmp_path, 1, model, STATE)
    before = path.stat().st_ino
    assert checkpoint.save(tmp_path, 1, model, {}) == path
    assert path.stat().st_ino == before
    assert checkpoint.load(path).state["seed"] == 7


def test_truncated_weights_file(tmp_path: Path, model: PlainLlama) -> None:
    path = checkpoint.save(tmp_path, 1, model, STATE) / "model.safetensors"
    truncate(path)
    with pytest.raises(ValueError, match=r"model.safetensors: .*expected a whole safetensors file"):
        checkpoint.load_model_weights(path)
    with pytest.raises(ValueError, match="missing"):
        checkpoint.load_model_weights(tmp_path / "nothing")


@pytest.mark.parametrize("broken", ["safetensors.torch.save_file", "torch.save", "os.fsync", "pathlib.Path.rename"])
def test_full_disk(tmp_path: Path, model: PlainLlama, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    good = checkpoint.save(tmp_path, 1, model, STATE, keep=1)

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(broken, full)
        with pytest.raises(OSError, match=r"step_0000002 not written: .*No space left.*untouched") as caught:
            checkpoint.save(tmp_path, 2, model, STATE, keep=1)
    assert caught.value.errno == errno.ENOSPC
    assert names(tmp_path) == ["step_0000001"]
    assert checkpoint.latest(tmp_path, no_skip) == good
    checkpoint.save(tmp_path, 2, model, STATE, keep=1)
    assert names(tmp_path) == ["step_0000002"]


LIMITED = """
import resource, sys, torch
from llama_fast import checkpoint
from llama_fast.config import LlamaConfig
from llama_fast.plain import PlainLlama
model = PlainLlama(LlamaConfig.preset("tiny"))
big = {"moments": torch.zeros(1 << 20)}
good = checkpoint.save(sys.argv[1], 1, model, {})
for step, limit, state in ((2, 100_000, {}), (3, 1_000_000, big)):  # in the weights, in the state
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        checkpoint.save(sys.argv[1], step, model, state)
    except OSError as error:
        print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(checkpoint.latest(sys.argv[1], print).name)
"""


def test_writes_that_fail_in_the_kernel(tmp_path: Path) -> None:
    """The same without a patch: the operating system refuses to let a file grow past a limit."""
    env = {**os.environ, "PYTHONPATH": str(Path(llama_fast.__file__).parents[1])}
    command = [sys.executable, "-c", LIMITED, str(tmp_path)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    assert len(lines) == 3, done
    assert "step_0000002 not written" in lines[0]
    assert "step_0000003 not written" in lines[1]
    assert lines[2] == "step_0000001"
    assert names(tmp_path) == ["step_0000001"]


def test_too_little_space_is_seen_before_writing(
    tmp_path: Path, model: PlainLlama, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = sum(p.nbytes for p in model.parameters()) + 20
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 0, tensors))
    monkeypatch.setattr("tempfile.mkdtemp", None)
    with pytest.raises(OSError, match=r"not written: .*bytes needed, .* free in") as caught:
        checkpoint.save(tmp_path, 1, model, STATE)
    assert caught.value.errno == errno.ENOSPC
    assert names(tmp_path) == []


def test_leftovers_of_a_killed_save_are_removed(tmp_path: Path, model: PlainLlama) -> None:
    (tmp_path / ".step_0000002.abc.tmp").mkdir()
    (tmp_path / ".step_0000002.abc.tmp" / "model.safetensors").write_bytes(b"half")
    (tmp_path / ".step_0000001.old.tmp").mkdir()
    assert checkpoint.checkpoints(tmp_path) == []
    checkpoint.save(tmp_path, 3, model, STATE)
    assert names(tmp_path) == ["step_0000003"]


@pytest.mark.parametrize("value", [np.float64(1.0), np.arange(3), {1, 2}, np.random.default_rng(), b"bytes"])
def test_state_that_would_not_load_back(tmp_path: Path, model: PlainLlama, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"state\['data'\]\[0\] is a {type(value).__name__}: expected"):
        checkpoint.save(tmp_path, 1, model, {"data": [value]})
    assert names(tmp_path) == []
    checkpoint.load(checkpoint.save(tmp_path, 1, model, OrderedDict(a=1)))


@pytest.mark.parametrize("key", [np.int64(2), (1, np.int64(2)), Path("x")])
def test_a_key_that_would_not_load_back(tmp_path: Path, model: PlainLlama, key: Any) -> None:
    with pytest.raises(ValueError, match=r"key .* of state\['x'\].* is a \w+: expected tensors, plain numbers"):
        checkpoint.save(tmp_path, 1, model, {"x": {key: 1}})
    assert not checkpoint.checkpoints(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": -1}, "step = -1, keep = 3: expected an integer of 0 or more, and one of 1 or more"),
        ({"step": 1.5}, "step = 1.5, keep = 3: expected"),
        ({"step": np.int64(3)}, r"step = np.int64\(3\), keep = 3: expected"),
        ({"keep": "3"}, "step = 1, keep = '3': expected"),
        ({"state": None}, "state is a NoneType: expected a dictionary"),
    ],
)
def test_bad_arguments_are_named(tmp_path: Path, model: PlainLlama, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        checkpoint.save(tmp_path, **{"step": 1, "model": model, "state": {}, **change})
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_no_checkpoint(tmp_path: Path, model: PlainLlama) -> None:
    (tmp_path / "step_0000009").write_text("notes")
    saved = checkpoint.save(tmp_path, 3, model, {})
    assert checkpoint.checkpoints(tmp_path) == [checkpoint.latest(tmp_path, lambda path, reason: None)] == [saved]


def test_weights_that_do_not_fit(model: PlainLlama) -> None:
    weights = {k: v.clone() for k, v in checkpoint.unique_tensors(model).items()}
    before = model.embed_tokens.weight.clone()
    weights["embed_tokens.weight"].zero_()
    weights["norm.weight"] = torch.ones(33)
    with pytest.raises(ValueError, match=r"norm.weight is \(33,\): expected \(32,\)"):
        checkpoint.load_into(model, weights)
    weights["other"] = weights.pop("norm.weight")
    with pytest.raises(ValueError, match=r"missing norm.weight; unknown other$"):
        checkpoint.load_into(model, weights)
    with pytest.raises(ValueError, match=r"missing embed_tokens.weight, [\w.]+, [\w.]+ and \d+ more; unknown none$"):
        checkpoint.load_into(model, {})
    assert torch.equal(model.embed_tokens.weight, before)


def test_config_file_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"config.json: missing"):
        checkpoint.load_config(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"dim": 3}))
    with pytest.raises(ValueError, match="n_layers"):
        checkpoint.load_config(tmp_path)
