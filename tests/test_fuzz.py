"""Random plans: every legal combination of strategies must be equal to one device, not only the ones that are cheap.

Each plan draws a random strategy for every node of a real graph, partial and uneven layouts often; the EMITTED graphs of all
ranks run in the simulation, and outputs and every parameter gradient are compared with the single device in float64.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from autotp.equality import compare
from autotp.planning import Request, prepare, traced_sizes
from autotp.price.cluster import load_cluster
from autotp.price.conversion import ConversionPrices
from autotp.random_plans import random_plan
from autotp.trace import trace
from tests.models import NAMES, TOLERANCE, Example, InFloat64, example

MESHES = ((2,), (3,), (4,), (2, 2))
PLANS_EACH = 18
"""Three models × four meshes × 18 plans: 216 in CI."""


@cache
def traced(name: str) -> tuple[Example, Any]:
    with InFloat64():
        one = example(name)
        return one, trace(one.model, one.args, one.kwargs)


@cache
def space_of(name: str, mesh: tuple[int, ...]) -> Any:
    _, program = traced(name)
    return prepare(program, Request({f"axis{number}": size for number, size in enumerate(mesh)}))


def fuzz(name: str, mesh: tuple[int, ...], seeds: range) -> None:
    one, program = traced(name)
    space, border = space_of(name, mesh)
    prices = ConversionPrices(load_cluster("dgx-h100"), mesh, True, traced_sizes(program))
    state = {**dict(one.model.named_parameters()), **dict(one.model.named_buffers())}
    for seed in seeds:
        decisions = random_plan(space, border, prices, seed)
        with InFloat64():
            found = compare(space, decisions, state, one.args, one.kwargs, seed=seed)
        assert found.worst < TOLERANCE, f"{name} on {mesh}, seed {seed}: {found.worst} at {found.where}"


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_random_plans_equal_one_device(name: str, mesh: tuple[int, ...]) -> None:
    fuzz(name, mesh, range(PLANS_EACH))


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [*MESHES, (5,), (2, 3), (2, 2, 2)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_many_random_plans_equal_one_device(name: str, mesh: tuple[int, ...]) -> None:
    fuzz(name, mesh, range(1000, 1040))
