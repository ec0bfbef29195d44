"""A job whose processes are killed goes on from its last checkpoint, restarted by torchrun or on fewer ranks, with the same losses."""

from __future__ import annotations

import os
import re
import signal
import subprocess
from pathlib import Path

import pytest

from tests.test_examples import ENVIRONMENT, command

SCRIPT, STEPS, EVERY = "04_train_with_checkpoints.py", 16, 4
KILLED_AFTER = (6, 11)
"""Steps after which rank 1 is killed: in the first life of the job, and in the second."""


def run(folder: Path, ranks: int, restarts: int, killed_after: tuple[int, ...] = ()) -> tuple[list[dict[int, float]], str]:
    """The losses by step in each life of the job, and what it said on stderr if it failed."""
    arguments = (str(folder), "--steps", str(STEPS), "--every", str(EVERY))
    job = subprocess.Popen(
        command(SCRIPT, *arguments, ranks=ranks, restarts=restarts),
        env={**ENVIRONMENT, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"},  # see docs/running.md
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert job.stdout is not None and job.stderr is not None
    lives: list[dict[int, float]] = []
    processes: dict[int, int] = {}
    planned = list(killed_after)
    for line in job.stdout:
        for rank, process in re.findall(r"rank (\d+) of \d+ is process (\d+)", line):
            processes[int(rank)] = int(process)
            if rank == "0":
                lives.append({})
        if step := re.match(r"step (\d+): (\S+)", line):
            lives[-1][int(step[1])] = float(step[2])
            if planned and len(lives) + len(planned) > len(killed_after) and int(step[1]) >= planned[0]:
                planned.pop(0)
                os.kill(processes[1], signal.SIGKILL)
    said = job.stderr.read()
    failed = job.wait(60) != 0
    assert not planned, f"{lives}\n{said}"
    return lives, said if failed else ""


def test_a_killed_job_goes_on(tmp_path: Path) -> None:
    (whole,), said = run(tmp_path / "whole", 1, 0)
    assert not said and list(whole) == list(range(STEPS))
    lives, said = run(tmp_path / "run", 2, 1, KILLED_AFTER)
    assert "SIGKILL" in said and len(lives) == 2, f"{lives}\n{said}"
    first, second = lives
    assert min(second) == KILLED_AFTER[0] // EVERY * EVERY
    again = set(first) & set(second)
    assert again and all(first[step] == second[step] for step in again), "on as many ranks the losses are the same to the last digit"
    (third,), said = run(tmp_path / "run", 1, 0)
    assert not said and min(third) % EVERY == 0 and min(third) > min(second)
    for life in (first, second, third):
        for step, loss in life.items():
            assert loss == pytest.approx(whole[step], abs=2e-5), f"step {step}"
    assert max(third) == STEPS - 1
