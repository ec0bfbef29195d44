"""Outputs left split are DTensors, and losses on them are those of one device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional

import autotp
from autotp.errors import AutotpError
from tests.models import InFloat64, example, splitting_pays
from tests.ranks import run_ranks
from tests.test_api import assert_close, full_gradient


def same_gradients(one: nn.Module, many: autotp.ParallelModule, losses: list[Tensor], what: str) -> None:
    assert type(losses[1]) is Tensor
    assert_close(losses[1], losses[0], what)
    for model, loss in zip((one, many), losses, strict=True):
        model.zero_grad()
        loss.backward()
    for (name, wanted), mine in zip(one.named_parameters(), many.parameters(), strict=True):
        assert_close(full_gradient(many, name, mine), wanted.grad, f"{what}: gradient of {name}")


def losses_on_logits(mesh: dict[str, int], declared: dict[str, Any]) -> None:
    one = example("llama", batch=4)
    ids, labels = one.kwargs["input_ids"], one.kwargs["labels"]
    many = autotp.parallelize(one.model, (), {"input_ids": ids}, mesh=mesh, cluster=splitting_pays(), outputs={"logits": declared})
    for reduction in ("mean", "sum"):
        found, wanted = many(input_ids=ids).logits, one.model(input_ids=ids).logits
        assert isinstance(found, DTensor) and found.shape == wanted.shape
        expected = functional.cross_entropy(wanted.flatten(0, 1), labels.flatten(), reduction=reduction)
        same_gradients(one.model, many, [expected, autotp.cross_entropy(found, labels, reduction=reduction)], f"{declared} {reduction}")
    found, wanted = many(input_ids=ids).logits, one.model(input_ids=ids).logits
    same_gradients(one.model, many, [wanted.square().sum(), found.square().sum().full_tensor()], "the user's own")
    assert_close(many(input_ids=ids).logits.full_tensor(), one.model(input_ids=ids).logits, "whole")
    other = example("llama", batch=8, seq=6).kwargs["input_ids"]
    assert many(input_ids=other).logits.shape == (8, 6, 131)
    with pytest.raises(RuntimeError, match="out of bounds"):
        autotp.cross_entropy(many(input_ids=ids).logits, labels + 131)
    with pytest.raises(AutotpError, match="give a label for each row"):
        autotp.cross_entropy(many(input_ids=ids).logits, labels[0])
    with pytest.raises(AutotpError, match="give 'mean' or 'sum'"):
        autotp.cross_entropy(many(input_ids=ids).logits, labels, reduction="none")


def split_labels_and_partial_sums() -> None:
    """Rows passed split, their labels too; outputs left partial; logits that are whole."""
    torch.manual_seed(0)
    one, x = nn.Linear(6, 9).double(), torch.randn(4, 6, dtype=torch.float64)
    labels, half = torch.tensor([3, 8, -100, 0]), slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    split: dict[str, Any] = {"tp": 0}
    many = autotp.parallelize(one, (x,), cluster=splitting_pays(), inputs={"input": split}, outputs={"output": split})
    logits = many(x[half])
    mine = DTensor.from_local(labels[half], many.device_mesh, logits.placements)
    same_gradients(one, many, [functional.cross_entropy(one(x), labels), autotp.cross_entropy(logits, mine)], "labels split")
    with pytest.raises(AutotpError, match="make them equal"):
        autotp.cross_entropy(logits, DTensor.from_local(labels, many.device_mesh))
    assert_close(autotp.cross_entropy(one(x), labels), functional.cross_entropy(one(x), labels), "whole")
    many = autotp.parallelize(one, (x,), cluster=splitting_pays(), outputs={"output": {"tp": "partial"}})
    logits = many(x)
    same_gradients(one, many, [one(x).square().sum(), logits.full_tensor().square().sum()], "partial")
    with pytest.raises(AutotpError, match="declare them whole or split"):
        autotp.cross_entropy(logits, labels)


def uneven_on_two_axes() -> None:
    one, x = nn.Linear(6, 9).double(), torch.randn(4, 6, dtype=torch.float64)
    many = autotp.parallelize(one.eval(), (x,), mesh={"a": 2, "b": 2}, mode="inference", outputs={"output": {"a": 1, "b": 1}}, check=False)
    with pytest.raises(AutotpError, match="share unevenly"):
        many(x)


def all_of(*checks: Any) -> None:
    torch.manual_seed(0)
    with InFloat64():
        for check, *args in checks:
            check(*args)


def test_labels_that_lie_split() -> None:
    run_ranks(all_of, 2, (split_labels_and_partial_sums,))


def test_losses_on_two_axes() -> None:
    run_ranks(all_of, 4, (losses_on_logits, {"dp": 2, "tp": 2}, {"dp": 0, "tp": 2}), (uneven_on_two_axes,))
