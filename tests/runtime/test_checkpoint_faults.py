"""Killed while it saves or loads: the last complete checkpoint stays what it was, and the other ranks say what happened."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter

import autotp
from autotp.runtime import checkpoint_files as files
from tests.faulty_ranks import die, mark, survivors
from tests.models import splitting_pays

X = torch.randn(5, 12, generator=torch.Generator().manual_seed(0))


def plain() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 12))


def trained(module: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        loss = module(X).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def interrupted(folder: str, is_victim: bool, path: str, where: str) -> None:
    """Two steps, a checkpoint, two steps; then one rank dies in the midst of the next save, or of a load."""
    module = autotp.parallelize(plain(), (X,), cluster=splitting_pays(), check=False)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.05)
    trained(module, optimizer, 2)
    autotp.save(path, module, optimizer, extra="good")
    trained(module, optimizer, 2)
    if is_victim:
        places = {"write": (FileSystemWriter, "write_data"), "seal": (files, "sync_folder"), "read": (FileSystemReader, "read_data")}
        owner, name = places[where]
        original = getattr(owner, name)

        def fatal(*args: Any) -> Any:
            if where == "write":
                original(*args)
            mark(folder, die)

        setattr(owner, name, fatal)
    if where == "read":
        autotp.load(path, module, optimizer)
    else:
        autotp.save(path, module, optimizer, extra="bad")


@pytest.mark.parametrize(("where", "victim", "count"), [("write", 1, 3), ("seal", 0, 2), ("read", 1, 2)])
def test_a_rank_is_killed(where: str, victim: int, count: int, tmp_path: Path) -> None:
    path = tmp_path / "saved"
    said = survivors(interrupted, count, victim, str(path), where)
    doing = "loading" if where == "read" else "saving to"
    ending = "" if where == "read" else f"; the last complete checkpoint is {path}/1"
    for text in said.values():
        assert text.startswith(f"AutotpError: {doing} {path} was broken off on rank"), text
        assert text.endswith(ending), text
    leftover = [] if where == "read" else ["2.partial"]
    assert sorted(entry.name for entry in path.iterdir()) == ["1", *leftover]
    resumed, straight = plain(), plain()
    optimizers = [torch.optim.AdamW(module.parameters(), lr=0.05) for module in (resumed, straight)]
    assert autotp.load(path, resumed, optimizers[0]) == "good"
    losses = trained(straight, optimizers[1], 4)[2:]
    torch.testing.assert_close(trained(resumed, optimizers[0], 2), losses, atol=1e-6, rtol=1e-6)
    autotp.save(path, resumed)
    assert sorted(entry.name for entry in path.iterdir()) == ["1", "2"]


STEPS = [(os, "fsync"), (Path, "rename"), (Path, "mkdir"), (shutil, "rmtree"), (files, "digests"), (os, "open")]
"""What a save does to the disk."""


def killed_at(number: int, action: Callable[[], Any]) -> bool:
    """Run `action` in a copy of this process that is killed in the place of its `number`-th such step; whether it was."""
    child = os.fork()
    if child == 0:
        left = number

        def counted(original: Callable[..., Any]) -> Callable[..., Any]:
            def step(*args: Any, **kwargs: Any) -> Any:
                nonlocal left
                left -= 1
                if left < 0:
                    die()
                return original(*args, **kwargs)

            return step

        for owner, name in STEPS:
            setattr(owner, name, counted(getattr(owner, name)))
        try:
            action()
        except BaseException:
            os._exit(1)
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
    return os.WIFSIGNALED(status)


def test_killed_at_every_step_of_a_save(tmp_path: Path) -> None:
    module, path = nn.Linear(3, 4), tmp_path / "saved"
    autotp.save(path, module, extra=0)
    good, number = 0, 0
    while True:
        with torch.no_grad():
            module.weight.fill_(number + 1)
        was_killed = killed_at(number, lambda: autotp.save(path, module, extra=number + 1, keep=1))  # noqa: B023
        found = nn.Linear(3, 4)
        count = autotp.load(path, found)  # its files are compared with their digests
        assert count in (good, number + 1)
        assert count == 0 or (found.weight == count).all()
        good, number = count, number + 1
        if not was_killed:
            break
    assert number > 10
    assert count == number
    assert [entry.name for entry in path.iterdir()] == [autotp.latest(path).name]  # type: ignore[union-attr]
