"""Gradient accumulation: `no_sync` puts off the reductions of gradients, and the last backward makes up for them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor.debug import CommDebugMode

import autotp
from autotp.errors import AutotpError
from tests.models import InFloat64, example, splitting_pays
from tests.ranks import run_ranks
from tests.runtime.test_prefetch import made, same_gradients

Loss = Callable[[nn.Module, int], Tensor]


def micro_step(model: nn.Module, loss: Loss, part: int) -> int:
    """Forward and backward on other inputs; the number of exchanges in backward."""
    found = loss(model, part)
    with CommDebugMode() as counter:
        found.backward()
    return counter.get_total_counts()


def accumulated(one: nn.Module, many: autotp.ParallelModule, loss: Loss, what: str) -> tuple[int, int]:
    """Three micro-steps; exchanges in the backward of one that puts them off, and of the last."""
    for model in (one, many):
        model.zero_grad()
    counts = []
    for part in range(3):
        micro_step(one, loss, part)
        with many.no_sync() if part < 2 else nullcontext():
            counts.append(micro_step(many, loss, part))
    same_gradients(one, many, what)
    assert not many._accumulation.sums and counts[0] == counts[1]
    return counts[0], counts[2]


def without_reductions() -> None:
    """Weights whole on every rank, split, and split and gathered again in backward.

    What remains is the exchange for a weight that is transposed before it is converted, and what is gathered again.
    """
    for rests, remaining in (("I", 1), ("S", 1), ("S+", 1 + 3 * 4)):
        one, many, x = made(rests)

        def loss(model: nn.Module, part: int, x: Tensor = x) -> Tensor:
            return (model(x.roll(part, 0)) * torch.arange(12.0, dtype=x.dtype).unsqueeze(1)).square().mean()

        for _ in range(2):
            off, last = accumulated(one, many, loss, rests)
        for model in (one, many):
            model.zero_grad()
            always = micro_step(model, loss, 0)
        same_gradients(one, many, "after")
        if dist.get_rank() == 0:
            print(f"{rests}: {off} exchanges in a backward that puts reductions off, {last} in the last, {always} without no_sync")
        assert always == last > off == remaining
    misuse(one, many, loss)


def misuse(one: nn.Module, many: autotp.ParallelModule, loss: Loss) -> None:
    """Steps on what is not reduced are refused; gradients that are zeroed take what waits with them."""
    optimizer = torch.optim.SGD(many.parameters(), lr=0.0)
    many.zero_grad()
    with many.no_sync():
        micro_step(many, loss, 1)
        with pytest.raises(AutotpError, match="is not reduced yet; run the last forward and backward before the step outside"):
            optimizer.step()
    torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=1.0).step()
    for zero in (optimizer.zero_grad, many.zero_grad):
        for to_none in (True, False):
            with many.no_sync():
                micro_step(many, loss, 1)
            zero(set_to_none=to_none)
            one.zero_grad()
            for model in (one, many):
                micro_step(model, loss, 2)
            same_gradients(one, many, "zeroed")
            optimizer.step()
            many.zero_grad()
    with many.no_sync():
        micro_step(many, loss, 1)
        for parameter in many.parameters():
            if parameter.grad is not None:
                parameter.grad.add_(1.0)
    with pytest.raises(AutotpError, match="was changed while a part of it is not reduced yet"):
        optimizer.step()
    many.zero_grad()


def tensor_parallel() -> None:
    one = example("gpt2")
    many = autotp.parallelize(one.model, one.args, one.kwargs, cluster=splitting_pays())

    def loss(model: nn.Module, part: int) -> Tensor:
        found: Tensor = model(**{key: value.roll(part, 0) for key, value in one.kwargs.items()}).loss
        return found

    accumulated(one.model, many, loss, "tensor parallel")


def in_float64(*checks: Any) -> None:
    with InFloat64():
        for check in checks:
            check()


def test_accumulation_equals_one_device() -> None:
    run_ranks(in_float64, 2, without_reductions, tensor_parallel)
