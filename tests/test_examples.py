"""The ladder in `examples/` runs as written."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"


def test_plan(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "01_plan.py"))
    printed = capsys.readouterr().out
    assert "model.layers.0-31.mlp.down_proj" in printed
    assert "ms per step: attention pinned to column and row" in printed


TEARDOWN = "terminate called without an active exception"
"""What the teardown of Gloo's threads in torch sometimes says of a process that has finished, with or without autotp."""


def torchrun(script: str, attempts: int = 5) -> str:
    """What a script prints on two CPU ranks. Only if torch's own teardown aborts it, it is run again."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(EXAMPLES / script)]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    if ran.returncode and TEARDOWN in ran.stderr and "Traceback" not in ran.stderr.partition(TEARDOWN)[0] and attempts > 1:
        return torchrun(script, attempts - 1)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def test_parallelize_mlp() -> None:
    printed = torchrun("02_parallelize_mlp.py")
    for rank in range(2):
        assert f"rank {rank} holds {{'0.weight': (128, 64), '0.bias': (128,), '2.weight': (64, 128), '2.bias': (64,)}}" in printed
    assert "outputs and trained weights equal those of one device" in printed


def test_train_gpt2() -> None:
    printed = torchrun("03_train_gpt2.py")
    assert "step 4" in printed
    assert "the losses are equal" in printed


def test_own_operator() -> None:
    printed = torchrun("04_own_operator.py")
    assert "mylib.leaky_sum.default" in printed
    assert "leaky_sum  column" in printed
    assert "outputs and gradients equal those of one device" in printed


def test_generate() -> None:
    printed = torchrun("05_generate.py")
    assert "keys of the first layer: (3, 2, 64, 8) on each rank" in printed
    assert "the greedy tokens equal those of one device" in printed


def test_every_example_is_tested() -> None:
    tested = Path(__file__).read_text()
    for script in EXAMPLES.glob("[0-9]*.py"):
        assert script.name in tested
