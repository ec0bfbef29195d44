"""Predicted peaks against counted ones; what the walk gets wrong must show."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from autotp import flights, footprint
from autotp.errors import AutotpError
from autotp.planning import Request, make_plan
from autotp.plans import MemoryUse
from autotp.price.cluster import load_cluster
from autotp.trace import trace
from tests.benchmarks import memory_accuracy
from tests.benchmarks.memory_accuracy import Change
from tests.benchmarks.memory_models import Step
from tests.models import splitting_pays

PARTS = memory_accuracy.PARTS


class Block(nn.Module):
    """A residual block with a convolution's worth of everything: a norm, a product, views, dropout, a weight used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down, self.drop = nn.LayerNorm(64), nn.Linear(64, 256), nn.Linear(256, 64), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.down(functional.gelu(self.up(self.norm(x)))))


class Small(nn.Module):
    """An embedding tied to the head, blocks, attention between, a loss beside the logits."""

    def __init__(self, blocks: int = 3) -> None:
        super().__init__()
        self.embedding = nn.Embedding(300, 64)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))

    def forward(self, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        x = self.embedding(ids)
        for block in self.blocks:
            heads = x.unflatten(-1, (4, 16)).transpose(1, 2)
            x = x + functional.scaled_dot_product_attention(heads, heads, heads, is_causal=True).transpose(1, 2).flatten(2)
            x = block(x)
        logits = functional.linear(x, self.embedding.weight)
        return functional.cross_entropy(logits.flatten(0, 1), labels.flatten()), logits


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    def make() -> Step:
        torch.manual_seed(0)
        ids, labels = torch.randint(0, 300, (2, 8, 32))
        return Step(Small(), (ids, labels), {})

    monkeypatch.setitem(memory_accuracy.MODELS, "small", make)


def differences(pair: tuple[MemoryUse, MemoryUse]) -> dict[str, float]:
    predicted, measured = pair
    return {part: getattr(predicted, part) - getattr(measured, part) for part in PARTS}


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("mode", ["train", "inference"])
def test_every_part_of_the_peak_is_counted_to_a_few_bytes(mode: str, ranks: int) -> None:
    pair = memory_accuracy.measure_first("small", mode, ranks)
    slack = 0.002 * pair[1].total  # numbers, such as an optimizer's step counts
    assert all(abs(difference) <= slack for difference in differences(pair).values()), differences(pair)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("change", [Change("weights", True), Change("attention"), Change("block"), Change("block", True)], ids=str)
def test_what_is_made_again_is_counted_to_a_few_bytes_and_less(change: Change) -> None:
    pair = memory_accuracy.measure_first("small", "train", 2, change)
    kept = memory_accuracy.measure_first("small", "train", 2, Change("none", change.zero))
    slack = 0.002 * pair[1].total
    assert all(abs(difference) <= slack for difference in differences(pair).values()), differences(pair)
    assert pair[1].total < 0.97 * kept[1].total and pair[1].activations < kept[1].activations


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few tokens: parameters, and what they are gathered into, are most of the memory."""

    def make() -> Step:
        torch.manual_seed(0)
        ids, labels = torch.randint(0, 300, (2, 2, 4))
        return Step(Small(6), (ids, labels), {})

    monkeypatch.setitem(memory_accuracy.MODELS, "narrow", make)


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("recompute", ["none", "weights"])
def test_what_is_under_way_counts(recompute: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights gathered for the next block, gradients that are still reduced: the peak of ZeRO-3, which lies in backward."""
    change = memory_accuracy.Change(recompute, zero=True)
    pair = memory_accuracy.measure_first("narrow", "train", 2, change)
    assert all(abs(difference) <= 500 for difference in differences(pair).values()), differences(pair)
    monkeypatch.setattr(flights.Journey, "is_needed", False)
    blind = memory_accuracy.measure_first("narrow", "train", 2, change)
    assert blind[1] == pair[1] and blind[0].total < 0.98 * pair[0].total


@pytest.mark.usefixtures("small")
def test_an_operator_that_is_taken_to_keep_nothing_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = footprint._forward

    def forgetful(call: Any, operands: Any) -> Any:
        found = honest(call, operands)
        return dataclasses.replace(found, kept=()) if "gelu" in str(call.function) else found

    monkeypatch.setattr(footprint, "_forward", forgetful)
    pair = memory_accuracy.measure_first("small", "train", 1)
    assert differences(pair)["activations"] < -0.05 * pair[1].activations


def test_the_reported_peak_keeps_the_limit_and_the_least_named_is_reachable() -> None:
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.Linear(256, 64), nn.LayerNorm(64))
    program = trace(model, (torch.ones(32, 64),), dynamic=False)

    def peak(limit: float | None) -> float:
        return make_plan(program, Request({"tp": 4}, memory=limit), load_cluster("dgx-h100"), "small").memory.total

    free = peak(None)
    assert peak(0.6 * free) <= 0.6 * free
    with pytest.raises(AutotpError, match="the least that would do on this mesh") as refused:
        peak(0.01 * free)
    least = refused.value.least  # type: ignore[attr-defined]
    assert peak(least * 1.0005) <= least * 1.0005


def test_an_unknown_optimizer_is_refused_and_a_known_one_counts() -> None:
    with pytest.raises(AutotpError, match="optimizer 'adam2' is unknown; give one of adamw"):
        Request({"tp": 1}, optimizer="adam2")
    model = nn.Linear(64, 64).bfloat16()
    program = trace(model, (torch.ones(2, 64, dtype=torch.bfloat16),), dynamic=False)
    sizes = {
        name: make_plan(program, Request({"tp": 1}, optimizer=name), splitting_pays(), "linear").memory.optimizer
        for name in ("adamw", "adamw-master", "momentum", "sgd")
    }
    elements = 64 * 64 + 64
    assert sizes == {"adamw": 4 * elements, "adamw-master": 12 * elements, "momentum": 2 * elements, "sgd": 0}
