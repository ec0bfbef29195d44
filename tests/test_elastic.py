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


def run(folder: Path, ranks: int, restarts: int, killed_after: tuple[int, ...] = ()) -> tuple[list[dict[int, float]], int]:
    """The losses by step in each life of the job, and its exit code."""
    arguments = (str(folder), "--steps", str(STEPS), "--every", str(EVERY))
    job = subprocess.Popen(
        command(SCRIPT, *arguments, ranks=ranks, restarts=restarts),
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert job.stdout is not None and job.stderr is not None
    lives: list[dict[int, float]] = []
    processes: dict[int, int] = {}
    planned = list(killed_after)
    for line in job.stdout:
        if started := re.match(r"rank (\d+) of \d+ is process (\d+) and starts at step (\d+)", line):
            processes[int(started[1])] = int(started[2])
            if started[1] == "0":
                lives.append({})
        elif step := re.match(r"step (\d+): (\S+)", line):
            lives[-1][int(step[1])] = float(step[2])
            if planned and len(lives) + len(planned) > len(killed_after) and int(step[1]) >= planned[0]:
                planned.pop(0)
                os.kill(processes[1], signal.SIGKILL)
    said = job.stderr.read()
    code = job.wait(60)
    assert code == 0 or planned != list(killed_after), said
    return lives, code


def test_a_killed_job_goes_on(tmp_path: Path) -> None:
    (whole,), code = run(tmp_path / "whole", 1, 0)
    assert code == 0 and list(whole) == list(range(STEPS))
    lives, code = run(tmp_path / "run", 2, 1, KILLED_AFTER)
    assert code != 0 and len(lives) == 2
    first, second = lives
    assert min(second) == KILLED_AFTER[0] // EVERY * EVERY
    again = set(first) & set(second)
    assert again and all(first[step] == second[step] for step in again), "on as many ranks the losses are the same to the last digit"
    (third,), code = run(tmp_path / "run", 1, 0)
    assert code == 0 and min(third) % EVERY == 0 and min(third) > min(second)
    for life in (first, second, third):
        for step, loss in life.items():
            assert loss == pytest.approx(whole[step], abs=2e-5), f"step {step}"
    assert max(third) == STEPS - 1
