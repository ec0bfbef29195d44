"""Expert parallelism comes out of the search: tokens travel to their experts by all-to-all, and experts may be split inside too."""

from __future__ import annotations

import torch

from tests.models import TOLERANCE
from tests.strategies.models import MixtureModel
from tests.strategies.search import Found, search, worst_at

LAYERS = 2
WIDTH, INNER = 4096, 14336
"""Mixtral's (Jiang et al. 2024)."""


def mixture(batch: int, seq: int, count: int, axes: dict[str, int]) -> Found:
    return search(lambda: MixtureModel(LAYERS, WIDTH, INNER, count), (torch.zeros(batch, seq, WIDTH),), axes, "dgx-h100")


def small_error(found: Found, batch: int, count: int) -> float:
    x = torch.randn(batch, 16, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    return worst_at(found, lambda: MixtureModel(LAYERS, 16, 32, count), (x,))


def experts(found: Found) -> dict[str, str]:
    return {name: layout for name, layout in found.weights.items() if name.endswith(("up", "down"))}


def test_expert_parallelism() -> None:
    """GShard (Lepikhin et al. 2021): tokens split by batch, experts by number; two all-to-alls a layer forward and two backward."""
    found = mixture(8, 4096, 8, {"ep": 8})
    assert set(experts(found).values()) == {"S(0)"}
    assert all(found.used(name) == {"S(0)"} for name in experts(found))
    assert {word for module, word in found.plan.strategies.items() if module.endswith("router")} == {"batch"}
    between = [entry for entry in found.plan.conversions if "by slot" in "".join(entry.shows)]
    assert [entry.forward for entry in between] == [("all_to_all over ep",)] * 2 * LAYERS
    assert found.plan.collectives["forward"]["all_to_all"] == found.plan.collectives["backward"]["all_to_all"] == 2 * LAYERS
    assert small_error(found, 8, 8) < TOLERANCE


def test_expert_and_tensor_parallelism() -> None:
    """Experts across one axis, each of them column- and row-parallel on the other (DeepSpeed-TED, Singh et al. 2023)."""
    found = mixture(8, 2048, 4, {"ep": 4, "tp": 2})
    assert {name.rpartition("_")[2]: layout for name, layout in experts(found).items()} == {"up": "S(0), S(2)", "down": "S(0), S(1)"}
    assert all(found.used(name) == {layout} for name, layout in experts(found).items())
    moved = found.moved("forward", weights=False)
    assert moved["all_to_all over ep"] > 0 and moved["reduce_scatter over tp"] == LAYERS
    assert "all_to_all over tp" not in moved
    assert small_error(found, 8, 4) < TOLERANCE
