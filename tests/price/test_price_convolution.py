"""A convolution costs what its arithmetic costs, wherever it is split, and a depthwise one what its memory traffic costs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from autotp.planning import Request, prepare
from autotp.price.cluster import load_cluster
from autotp.price.conversion import ConversionPrices
from autotp.price.work import node_seconds
from autotp.trace import trace

PEAK, BANDWIDTH = 989e12, 3.35e12
"""Of an H100 in bf16: FLOP/s, and bytes per second."""


def forward_seconds(conv: nn.Module, *shape: int) -> dict[str, float]:
    """Strategy → seconds of the forward on one of two ranks."""
    program = trace(conv, (torch.empty(shape, dtype=torch.bfloat16, device="meta"),), dynamic=False)
    space, _ = prepare(program, Request({"axis": 2}))
    prices = ConversionPrices(load_cluster("dgx-h100"), (2,), True, {})
    (node,) = (node for node in program.nodes if node.kind == "op")
    rule = space.rules[node.index]
    return {found.key[0]: node_seconds(program, node, rule, found, prices).forward for found in space.strategies[node.index]}


CONVOLUTIONS = {
    "strided": (lambda: nn.Conv2d(256, 512, 3, 2, 1), (64, 256, 56, 56), 64 * 28 * 28 * 512 * 256 * 9),
    "transposed": (lambda: nn.ConvTranspose2d(4096, 256, 2, 2), (16, 4096, 28, 28), 16 * 28 * 28 * 4096 * 256 * 4),
    "grouped": (lambda: nn.Conv2d(512, 512, 3, 1, 1, groups=2), (64, 512, 28, 28), 64 * 28 * 28 * 512 * 256 * 9),
    "patches": (lambda: nn.Conv2d(256, 1024, 16, 16), (64, 256, 224, 224), 64 * 14 * 14 * 1024 * 256 * 256),
    "deep": (lambda: nn.Conv3d(256, 256, 3, 1, 1), (4, 256, 16, 28, 28), 4 * 16 * 28 * 28 * 256 * 256 * 27),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_arithmetic(name: str) -> None:
    build, shape, products = CONVOLUTIONS[name]
    with torch.device("meta"):
        found = forward_seconds(build().bfloat16(), *shape)
    ideal = 2 * products / PEAK
    assert ideal < found["I"] < 2 * ideal
    for factor in ("n", "i", "o"):
        assert ideal / 2 < found[factor] < 0.8 * found["I"], factor


def test_depthwise() -> None:
    with torch.device("meta"):
        found = forward_seconds(nn.Conv2d(256, 256, 7, 1, 3, groups=256).bfloat16(), 64, 256, 56, 56)
    ideal = 2 * 2 * 64 * 256 * 56 * 56 / BANDWIDTH
    assert ideal < found["I"] < 1.5 * ideal
    assert found["g"] == pytest.approx(found["n"], rel=0.05)
    assert found["g"] < 0.6 * found["I"]
