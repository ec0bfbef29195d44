"""Mesh axes are bound to links by rank order: the last axis is innermost, and what talks most belongs there."""

from __future__ import annotations

from functools import cache

import pytest
import torch

import autotp
from tests.strategies.models import Decoder, Sizes
from tests.strategies.search import decoder, prices, search, tokens

WIDE = {"width": 12288, "heads": 96, "groups": 96, "inner": 32768, "vocabulary": 32000}
BATCH, LENGTH = 32, 2048


@cache
def step_seconds(order: tuple[str, str], uniform: bool = False) -> float:
    """Seconds of a step on 2 nodes of 4 devices: batch on `dp` alone, anything else on `tp`."""
    sizes = {"dp": 2, "tp": 4}
    cluster = prices((1e11,), (None,), latency=1e-6, flops=1e14, memory=1e12) if uniform else "derecho"
    found = search(decoder(1, **WIDE), tokens(BATCH, LENGTH), {name: sizes[name] for name in order}, cluster, data=("dp",))
    return found.plan.time.step_s


def test_tensor_parallelism_belongs_inside() -> None:
    """With `tp` as the outer axis, its groups span both nodes."""
    assert step_seconds(("tp", "dp")) > 1.05 * step_seconds(("dp", "tp"))


def test_on_equal_links_the_order_does_not_matter() -> None:
    assert step_seconds(("tp", "dp"), True) == pytest.approx(step_seconds(("dp", "tp"), True), rel=1e-3)


@pytest.mark.slow
def test_recommend_puts_the_chatty_axis_inside() -> None:
    """Of all meshes of 16 devices in four nodes the best is data parallelism across nodes and tensor parallelism inside, in this order."""
    with torch.device("meta"):
        model = Decoder(Sizes(1, **WIDE)).to(torch.bfloat16)
        ids, labels = (x.to("meta") for x in tokens(BATCH, LENGTH))
    best = autotp.recommend(model, (ids, labels), gpus=16, cluster="derecho").best
    assert best is not None
    assert list(best.mesh.items()) == [("dp", 4), ("tp", 4)]
