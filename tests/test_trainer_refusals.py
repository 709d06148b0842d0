"""What the trainer refuses, and that it does so before the first step: nothing is lost by an error that comes late.

And what it finds damaged.
"""

from __future__ import annotations

import dataclasses
import io
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_trainer import CONFIG, RECIPE, SETTINGS, Rows, curve, final_files, train
from torch import Tensor

from llama_fast import checkpoint
from llama_fast.plain import PlainLlama
from llama_fast.train.recipe import Recipe
from llama_fast.train.trainer import Trainer


def test_data_state_that_cannot_be_saved(tmp_path: Path) -> None:
    data = Rows()
    data.row = np.int64(3)  # type: ignore[assignment]
    with pytest.raises(ValueError, match=r"data.state_dict\(\)\['row'\] is a int64"):
        train(tmp_path, data=data)
    assert list(tmp_path.iterdir()) == []


def test_bad_data_is_named(tmp_path: Path) -> None:
    class Bad(Rows):
        def __init__(self, *batches: tuple[Tensor, Tensor]) -> None:
            super().__init__()
            self.list = batches

        def batches(self, batch_size: int, seq_len: int) -> Iterator[tuple[Tensor, Tensor]]:
            return iter(self.list)

        def valid_batches(self, batch_size: int, seq_len: int, n: int) -> Iterator[tuple[Tensor, Tensor]]:
            return iter(())

    good = torch.zeros(2, 16, dtype=torch.int64)
    none = torch.full_like(good, -100)
    once = dataclasses.replace(SETTINGS, accumulate=1, eval_every=0)
    for i, (batches, message) in enumerate(
        [
            ([], r"data ended in step 1"),
            ([(good, good[:1])], r"data gave targets \(1, 16\) torch.int64: expected \(2, 16\)"),
            ([(good.int(), good)], r"data gave tokens \(2, 16\) torch.int32: expected"),
            ([good], r"data gave a Tensor: expected \(tokens, targets\), two tensors"),
            ([(good, none)], r"step 1: the batches have no target that counts"),
        ]
    ):
        with pytest.raises(ValueError, match=message):
            train(tmp_path / str(i), settings=once, data=Bad(*batches))


def test_nothing_to_evaluate_on_is_said_before_the_first_step(tmp_path: Path) -> None:
    class NoneHeldOut(Rows):
        def valid_batches(self, batch_size: int, seq_len: int, n: int) -> Iterator[tuple[Tensor, Tensor]]:
            for tokens, targets in super().valid_batches(batch_size, seq_len, n):
                yield tokens, torch.full_like(targets, -100)

    class TooShort(Rows):
        def valid_batches(self, batch_size: int, seq_len: int, n: int) -> Iterator[tuple[Tensor, Tensor]]:
            raise ValueError("9 valid tokens are too few")

    for data, message in (
        (NoneHeldOut(), r"no held-out batches: expected some, or eval_every = 0"),
        (TooShort(), r"9 valid tokens are too few; or eval_every = 0 \(--eval-every 0\)"),
    ):
        with pytest.raises(ValueError, match=message):
            train(tmp_path, data=data)
        assert list(tmp_path.iterdir()) == []
    assert train(tmp_path, settings=dataclasses.replace(SETTINGS, eval_every=0), data=TooShort()).step == RECIPE.steps


def test_a_held_out_loss_that_is_no_number_stops(tmp_path: Path) -> None:
    class Broken(PlainLlama):
        def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
            return super().loss(tokens, targets) * (1.0 if self.training else float("nan"))

    with pytest.raises(
        FloatingPointError, match=r"step 4: the held-out loss is nan; nothing was saved; .*step_0000003"
    ):
        train(tmp_path, model=Broken(CONFIG))
    assert [row["step"] for row in curve(tmp_path)] == [1, 2, 3]


def test_an_old_gradient_of_a_frozen_parameter_clips_nothing(tmp_path: Path) -> None:
    for old in (0.0, 1000.0):
        model = PlainLlama(CONFIG)
        model.reset_parameters(0)
        frozen = next(model.parameters()).requires_grad_(False)
        frozen.grad = torch.full_like(frozen, old)
        train(tmp_path / str(old), model=model)
    assert curve(tmp_path / "0.0") == curve(tmp_path / "1000.0")


def test_another_model_of_the_same_shapes_is_refused(tmp_path: Path) -> None:
    train(tmp_path, settings=dataclasses.replace(SETTINGS, checkpoint_every=6))
    for changed in ({"n_heads": 4, "n_kv_heads": 2}, {"rope_theta": 5e5}, {"norm_eps": 1e-6}):
        other = dataclasses.replace(CONFIG, **changed)  # type: ignore[arg-type]
        named = ".*".join(f"{k} = .* \\(was" for k in changed)
        with pytest.raises(ValueError, match=f"step_0000012 is of another model: {named}"):
            train(tmp_path, model=PlainLlama(other), resume=True)


def test_arguments_of_another_kind_are_named(tmp_path: Path) -> None:
    class Silent(torch.nn.Module):
        def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
            return tokens.new_zeros(())

    good = {"model": PlainLlama(CONFIG), "data": Rows(), "settings": SETTINGS}
    for change, message in (
        ({"model": torch.nn.Linear(2, 2)}, r"model is a Linear: expected a Module with loss\(tokens, targets\)"),
        ({"model": Silent()}, "model has no parameter that requires a gradient"),
        ({"data": [1]}, "data is a list: expected one with batches, valid_batches, state_dict and load_state_dict"),
        ({"settings": {"steps": 3}}, "settings is a dict: expected Settings"),
    ):
        with pytest.raises(ValueError, match=message):
            Trainer(run_dir=tmp_path, **{**good, **change})  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []
    for field, value, message in (
        ("recipe", {"steps": 3}, "recipe = {'steps': 3}: expected a Recipe"),
        ("dtype", ["float32"], r"dtype = \['float32'\]: expected one of float32, bfloat16"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(SETTINGS, **{field: value})  # type: ignore[arg-type]


@pytest.mark.parametrize("loss", [1.5, torch.ones(3, requires_grad=True)])
def test_a_loss_that_is_not_one_number_is_named(tmp_path: Path, loss: Any) -> None:
    class Odd(PlainLlama):
        def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
            return loss  # type: ignore[no-any-return]

    found = "float" if isinstance(loss, float) else r"\(3,\)"
    with pytest.raises(ValueError, match=f"model.loss gave {found}: expected a tensor of one number"):
        train(tmp_path, model=Odd(CONFIG))


def test_a_checkpoint_that_cannot_go_on_is_refused(tmp_path: Path) -> None:
    model = PlainLlama(CONFIG)
    checkpoint.save(tmp_path / "weights", 3, model, {})
    with pytest.raises(ValueError, match=r"step_0000003 holds no data, generators, .*: expected a checkpoint of a Tr"):
        train(tmp_path / "weights", model=model, resume=True)
    next(model.parameters()).requires_grad_(False)
    train(tmp_path / "run", model=model)
    other = PlainLlama(CONFIG)
    before = [p.clone() for p in other.parameters()]
    with pytest.raises(
        ValueError, match=r"trained \d+ parameters, of the model \d+ would train now: expected the same"
    ):
        train(tmp_path / "run", model=other, resume=True)
    assert all(torch.equal(a, b) for a, b in zip(before, other.parameters(), strict=True))


def test_numbers_of_numpy_are_taken(tmp_path: Path) -> None:
    """As from np.logspace; a checkpoint takes Python's alone, and the first one comes after hours."""
    sizes = {"steps": np.int64(12), "warmup_steps": np.int32(3)}
    ours = Recipe(lr=np.logspace(-2, -1, 2)[0], clip=np.float32(1), **sizes)  # type: ignore[arg-type]
    assert ours == RECIPE
    settings = dataclasses.replace(SETTINGS, recipe=ours, batch_size=np.int64(2), seed=np.uint8(0))  # type: ignore
    assert settings == SETTINGS
    assert train(tmp_path, settings=settings).step == 12
    assert final_files(tmp_path)[1]["settings"]["recipe.lr"] == RECIPE.lr


def test_a_checkpoint_that_is_damaged_again(tmp_path: Path) -> None:
    train(tmp_path)
    for aside in ("step_0000012.damaged", "step_0000012.damaged-2"):
        os.truncate(tmp_path / "step_0000012" / "state.pt", 100)
        assert train(tmp_path, resume=True).checkpoint == tmp_path / "step_0000012"
        assert (tmp_path / aside).is_dir()


@pytest.mark.parametrize("line", [b'{"step": 2}\n', b'{"st\x00p": 2, "loss": 4.0}\n'])
def test_a_damaged_log_is_said_and_kept(tmp_path: Path, line: bytes) -> None:
    train(tmp_path)
    log = tmp_path / "log.jsonl"
    rows = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(damaged := b"".join([rows[0], line, *rows[2:]]))
    said = io.StringIO()
    assert len(train(tmp_path, resume=True, said=said).losses) == 1
    assert (tmp_path / "log.jsonl.damaged").read_bytes() == damaged
    assert said.getvalue() == (
        f"{log} is damaged: it can be read up to step 1, and the checkpoint is of step 12; "
        "what it was is now log.jsonl.damaged\n"
    )
    train(tmp_path, resume=True)
    assert len(list(tmp_path.glob("log*"))) == 2


@pytest.mark.parametrize("resume", [False, True])
def test_two_trainers_in_turn(tmp_path: Path, resume: bool) -> None:
    """The second would leave its log beside the first's checkpoint."""
    if resume:
        train(tmp_path, data=Rows(hook=lambda row: os.kill(os.getpid(), signal.SIGTERM) if row == 4 else None))
    first, second = (Trainer(PlainLlama(CONFIG), Rows(), SETTINGS, tmp_path, resume=resume) for _ in range(2))
    first.run()
    before = curve(tmp_path)
    with pytest.raises(ValueError, match="holds step_0000012, of another Trainer: expected one at a time in a folder"):
        second.run()
    assert curve(tmp_path) == before
    assert first.run().step == 12
