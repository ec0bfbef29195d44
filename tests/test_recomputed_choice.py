"""Plans within a memory limit of real models: the limit is kept by the walk, the time is what the unfolded graph takes, the module is equal."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache

import pytest

from autotp.describe import describe
from autotp.equality import compare
from autotp.formulate import formulate
from autotp.memory_limit import Fitted, decisions_of, solve_within, walk
from autotp.planning import Request, make_plan, prepare, traced_sizes
from autotp.plans import Plan
from autotp.price.cluster import load_cluster
from autotp.price.conversion import ConversionPrices
from autotp.program import Program
from autotp.solve import OutOfMemoryError
from autotp.trace import trace
from tests.models import Example, InFloat64, example

CHANGED = {"llama": {"num_hidden_layers": 4}, "gpt2": {"n_layer": 4}, "qwen3": {"num_hidden_layers": 3}}
TOLERANCE = 1e-9


@cache
def traced(name: str) -> tuple[Example, Program]:
    with InFloat64():
        one = example(name, batch=4, seq=24, **CHANGED[name])
        return one, trace(one.model, one.args, one.kwargs)


def plan(name: str, mesh: dict[str, int], limit: float | None = None) -> Plan:
    return make_plan(traced(name)[1], Request(mesh, memory=limit), load_cluster("dgx-h100"), name, time_limit=2.0)


@cache
def free(name: str) -> Plan:
    return plan(name, {"tp": 2})


@pytest.mark.parametrize("name", CHANGED)
def test_any_limit_is_kept_or_refused_and_the_module_is_equal(name: str) -> None:
    one, program = traced(name)
    state = {**dict(one.model.named_parameters()), **dict(one.model.named_buffers())}
    draw = random.Random(name)
    kept = 0
    for share in (draw.uniform(0.3, 0.5), draw.uniform(0.5, 0.75), draw.uniform(0.75, 1.0)):
        limit = share * free(name).memory.total
        request = Request({"tp": 2}, memory=limit)
        space, border = prepare(program, request)
        prices = ConversionPrices(load_cluster("dgx-h100"), (2,), True, traced_sizes(program))
        formulation = formulate(space, prices, border, None, limit)
        try:
            found: Fitted = solve_within(
                formulation.problem, lambda one: walk(space, prices, border, formulation, one), time_limit=2.0, gap=1e-4
            )
        except OutOfMemoryError as error:
            assert error.least > limit
            continue
        kept += bool(found.recomputation.recomputed)
        assert found.memory.total <= limit
        decisions = replace(
            decisions_of(space, prices, border, formulation, found.solution), recomputed=found.recomputation.recomputed
        )
        with InFloat64():
            assert compare(space, decisions, state, one.args, one.kwargs).worst < TOLERANCE
        said = describe(
            space, prices, border, formulation, found.solution, model=name, mode="train", axes={"tp": 2}, memory=found.memory,
            recomputation=found.recomputation,
        )  # fmt: skip
        assert said.time.step_s == pytest.approx(found.seconds, rel=1e-9)
        assert sum(entry.seconds for entry in said.recomputed) == pytest.approx(found.recomputation.seconds, rel=1e-9)
        assert sum(entry.bytes for entry in said.recomputed) == found.recomputation.bytes
        assert sum(c.copies * len([w for w in c.forward if w.startswith("all_gather")]) for c in said.conversions) == said.collectives[
            "forward"
        ].get("all_gather", 0)
    assert kept


@pytest.mark.parametrize("name", ["llama"])
def test_the_least_memory_that_is_named_is_reached_by_making_all_again(name: str) -> None:
    with pytest.raises(OutOfMemoryError, match="the least that would do") as error:
        plan(name, {"tp": 2}, 0.1 * free(name).memory.total)
    found = plan(name, {"tp": 2}, 1.0005 * error.value.least)
    assert found.memory.total <= 1.0005 * error.value.least < free(name).memory.total
    assert found.recomputed


def test_model_flops_utilisation_does_not_count_what_is_made_again() -> None:
    """MFU counts the FLOPs of the model alone (Chowdhery et al. 2022): it falls as the step takes longer."""
    found = plan("gpt2", {"tp": 2}, 0.7 * free("gpt2").memory.total)
    assert found.recomputed
    utilisations = [one.kpi["model_flops_utilisation"] * one.time.step_s for one in (free("gpt2"), found)]
    assert utilisations[0] == pytest.approx(utilisations[1])
