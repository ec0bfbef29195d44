"""Random plans: every legal combination of strategies must be equal to one device, not only the ones that are cheap.

Each plan draws a random strategy for every node of a real graph, partial and uneven layouts often; the EMITTED graphs of all
ranks run in the simulation, and outputs and every parameter gradient are compared with the single device in float64.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from autotp.equality import compare
from autotp.errors import AutotpError
from autotp.layouts import MOVES
from autotp.planning import Request, prepare, traced_sizes
from autotp.price.cluster import load_cluster
from autotp.price.conversion import ConversionPrices
from autotp.random_plans import random_plan
from autotp.rules import RULES, bind
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


@pytest.mark.parametrize(
    ("table", "key", "wrong"),
    [
        (MOVES, ("I", "R"), ("none", "none")),  # the gradient's all-reduce forgotten
        (MOVES, ("R", "S"), ("slice", "all_gather")),
        (MOVES, ("I", "P"), ("none", "none")),  # a bias added by every rank
        (RULES, "aten.mul.Tensor", lambda call: bind("..., ... -> ...", call, linear=((0, 1),))),
        (RULES, "aten.add.Tensor", lambda call: bind(", ".join(["..."] * len(call.operands)) + " -> ...", call, linear=((0,),))),
        (RULES, "aten.layer_norm.default", lambda call: bind("... d, d, d -> ... d", call)),
        (RULES, "aten.addmm.default", lambda call: bind("n, m k, k n -> m n", call)),  # the bias no summand
    ],
)
def test_fuzzing_catches_planted_errors(monkeypatch: pytest.MonkeyPatch, table: Any, key: Any, wrong: Any) -> None:
    monkeypatch.setitem(table, key, wrong)
    space_of.cache_clear()
    with pytest.raises((AssertionError, AutotpError, RuntimeError)):  # unequal, or not even runnable
        fuzz("gpt2", (2,), range(12))
    space_of.cache_clear()


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [*MESHES, (5,), (2, 3), (2, 2, 2)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_many_random_plans_equal_one_device(name: str, mesh: tuple[int, ...]) -> None:
    fuzz(name, mesh, range(1000, 1040))
