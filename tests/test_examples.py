"""The ladder in `examples/` runs as written."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import autotp

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"


def test_plan(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "01_plan.py"))
    printed = capsys.readouterr().out
    assert "model.layers.0-31.mlp.down_proj" in printed
    assert "ms per step: attention pinned to column and row" in printed


TEARDOWN = "terminate called without an active exception"
"""What the teardown of Gloo's threads in torch sometimes says of a process that has finished, with or without autotp."""


def torchrun(script: str, *arguments: str, ranks: int = 2, attempts: int = 5) -> str:
    """What a script prints on CPU ranks. Only if torch's own teardown aborts it, it is run again."""
    ran = subprocess.run(command(script, *arguments, ranks=ranks), env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    if ran.returncode and TEARDOWN in ran.stderr and "Traceback" not in ran.stderr.partition(TEARDOWN)[0] and attempts > 1:
        return torchrun(script, *arguments, ranks=ranks, attempts=attempts - 1)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def command(script: str, *arguments: str, ranks: int, restarts: int = 0) -> list[str]:
    options = ["--standalone", "--nproc-per-node", str(ranks), "--max-restarts", str(restarts)]
    return [sys.executable, "-m", "torch.distributed.run", *options, str(EXAMPLES / script), *arguments]


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


def test_parallelize_mlp() -> None:
    printed = torchrun("02_parallelize_mlp.py")
    for rank in range(2):
        assert f"rank {rank} holds {{'0.weight': (128, 64), '0.bias': (128,), '2.weight': (64, 128), '2.bias': (64,)}}" in printed
    assert "outputs and trained weights equal those of one device" in printed


def test_parallelize_llama() -> None:
    printed = torchrun("03_parallelize_llama.py")
    assert "step 4" in printed
    assert "the losses are equal" in printed


def test_train_with_checkpoints(tmp_path: Path) -> None:
    """tests/test_elastic.py kills it."""
    printed = torchrun("04_train_with_checkpoints.py", str(tmp_path), "--steps", "4", "--every", "2")
    assert "rank 1 of 2 is process" in printed
    assert "step 3: " in printed
    assert autotp.latest(tmp_path) is not None


def test_two_axes() -> None:
    printed = torchrun("05_two_axes.py", ranks=4)
    assert "rank 3 is at {'dp': 1, 'tp': 1} and holds (32, 64) of q_proj" in printed
    assert "step 2" in printed


def test_generate() -> None:
    printed = torchrun("06_generate.py")
    assert "keys of the first layer: (3, 2, 64, 8) on each rank" in printed
    assert "the greedy tokens equal those of one device" in printed


def test_own_operator() -> None:
    printed = torchrun("07_own_operator.py")
    assert "mylib.leaky_sum.default" in printed
    assert "leaky_sum  column" in printed
    assert "outputs and gradients equal those of one device" in printed


def test_own_cluster(capsys: pytest.CaptureFixture[str]) -> None:
    runpy.run_path(str(EXAMPLES / "08_own_cluster.py"))
    printed = capsys.readouterr().out
    infiniband, ethernet = (float(line.split(": ")[1].split(" ms")[0]) for line in printed.splitlines() if " ms per step, " in line)
    assert infiniband < ethernet
    assert "mesh axis nodes splits nothing here" in printed


def test_every_example_is_tested() -> None:
    tested = Path(__file__).read_text()
    for script in EXAMPLES.glob("[0-9]*.py"):
        assert script.name in tested
