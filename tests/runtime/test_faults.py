"""A rank that dies or hangs ends the others with one sentence within the timeout; ranks that differ are told so and go on living."""

from __future__ import annotations

from itertools import pairwise
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import nn

import autotp
import autotp.ranks
from autotp.errors import AutotpError
from autotp.runtime.comm import ProcessComm
from tests.faulty_ranks import Fault, die, hang, mark, survivors
from tests.models import example, splitting_pays
from tests.ranks import run_ranks

PINS = {"0": "column", "2": "row", "4": "column", "6": "row"}


def step(folder: str, is_victim: bool, backward: bool, fault: Fault) -> None:
    """The victim's fault comes when it waits for the first exchange of a forward, or of a backward."""
    torch.manual_seed(0)
    widths = (12, 24, 12, 24, 12)
    layers = [layer for i, o in pairwise(widths) for layer in (nn.Linear(i, o), nn.Tanh())]
    x = torch.randn(5, 12)
    many = autotp.parallelize(nn.Sequential(*layers), (x,), pins=PINS, check=False)
    many(x).sum().backward()
    plain = ProcessComm.wait

    def wait(comm: ProcessComm, received: torch.Tensor) -> torch.Tensor:
        mark(folder, fault)
        return plain(comm, received)

    if is_victim and not backward:
        ProcessComm.wait = wait  # type: ignore[method-assign]
    output = many(x)
    if is_victim and backward:
        ProcessComm.wait = wait  # type: ignore[method-assign]
    output.sum().backward()
    many(x)  # what the victim waited for may have come before it died; nothing comes from it any more


SENTENCE = "AutotpError: an exchange between the ranks 0, 1, 2 failed, as one of them has died, hangs or does something else"


@pytest.mark.parametrize(("backward", "fault"), [(False, die), (True, die), (False, hang)])
def test_survivors_end_with_a_sentence(backward: bool, fault: Any) -> None:
    said = survivors(step, 3, 1, backward, fault)
    for rank, text in said.items():
        assert text.startswith(SENTENCE), f"rank {rank}: {text}"


def differing() -> None:
    """In each of these rank 1 starts, or goes on, with something else; both are told, and both can go on."""
    one = example("mlp")
    second = dist.get_rank() == 1

    def refused(match: str, model: Any = one.model, args: Any = one.args, **options: Any) -> None:
        with pytest.raises(AutotpError, match=match):
            autotp.parallelize(model, args, **options)

    wider = nn.Sequential(nn.Linear(20, 30), nn.GELU(), nn.Linear(30, 20)).double()
    refused(r"the model is not the same on every rank: rank 1 has .* of 1,2.. numbers .*rank 0 has", wider if second else one.model)
    refused(r"the model is not .* in eval mode .* in train mode", example("mlp").model.train(not second))
    with patch.object(torch, "__version__", "2.10.1" if second else torch.__version__):
        refused(r"the version of PyTorch is not the same on every rank: rank 1 has 2.10.1, rank 0 has 2")
    with patch.object(autotp.ranks, "installed_version", lambda: f"0.{dist.get_rank()}"):
        refused(r"the version of autotp is not the same on every rank: rank 1 has 0.1, rank 0 has 0.0")
    plans = [autotp.plan(one.model, one.args, mesh=2, pins={"0": how}) for how in ("column", "row")]
    refused(r"the plan is not the same on every rank: rank 1 has [0-9a-f]+, rank 0 has [0-9a-f]+", plan=plans[second])
    refused(r"what is asked for \(mode, memory, pins.*rank 1 has another than rank 0", pins={"0": "column"} if second else None)
    refused(r"the mesh is not the same on every rank: rank 1 has {'row': 1, 'col': 2}|the mesh is not", mesh=(1, 2) if second else 2)
    many = autotp.parallelize(one.model, one.args, cluster=splitting_pays())
    (x,) = one.args
    with pytest.raises(AutotpError, match=r"the input of this call is not the same on every rank: rank 1 has .*\(2, 20\), rank 0 has"):
        many(x[:2] if second else x)
    torch.testing.assert_close(many(x), one.model(x))


def test_ranks_that_differ_are_told() -> None:
    run_ranks(differing, 2)


def test_the_fault_is_seen_by_its_absence() -> None:
    """The harness can fail: without a fault nobody says anything."""
    with pytest.raises(FileNotFoundError):
        survivors(_quiet, 2, 1)


def _quiet(folder: str, is_victim: bool) -> None:
    dist.barrier()
