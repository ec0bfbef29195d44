"""Real models within a memory limit: the walk keeps it, the time is what the unfolded graph takes, the module equals one device."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest

from autotp.decisions import read_plan
from autotp.describe import describe
from autotp.equality import compare
from autotp.formulate import formulate
from autotp.memory_limit import decisions_of, solve_within, walk
from autotp.planning import Request, make_plan, prepare, traced_sizes
from autotp.plans import Plan
from autotp.price.cluster import load_cluster
from autotp.price.conversion import ConversionPrices
from autotp.program import Program
from autotp.solve import OutOfMemoryError
from autotp.trace import trace
from tests.models import Example, InFloat64, example

CHANGED = {"llama": {"num_hidden_layers": 4}, "gpt2": {"n_layer": 4}, "qwen3": {"num_hidden_layers": 4}}
TOLERANCE = 1e-9


@cache
def traced(name: str) -> tuple[Example, Program]:
    with InFloat64():
        one = example(name, batch=4, seq=16, **CHANGED[name])
        return one, trace(one.model, one.args, one.kwargs)


def plan(name: str, mesh: dict[str, int], limit: float | None = None) -> Plan:
    return make_plan(traced(name)[1], Request(mesh, memory=limit), load_cluster("dgx-h100"), name, time_limit=1.0)


@cache
def free(name: str) -> Plan:
    return plan(name, {"tp": 2})


@pytest.mark.parametrize("name", CHANGED)
def test_any_limit_is_kept_or_refused_and_the_module_is_equal(name: str) -> None:
    one, program = traced(name)
    state = {**dict(one.model.named_parameters()), **dict(one.model.named_buffers())}
    draw = random.Random(name)
    kept = 0
    for share in (draw.uniform(0.55, 0.75), draw.uniform(0.75, 1.0)):
        limit = share * free(name).memory.total
        space, border = prepare(program, Request({"tp": 2}, memory=limit))
        prices = ConversionPrices(load_cluster("dgx-h100"), (2,), True, traced_sizes(program))
        formulation = formulate(space, prices, border, None, limit)
        found = solve_within(formulation.problem, partial(walk, space, prices, border, formulation), time_limit=2.0, gap=1e-4)
        again = found.recomputation
        kept += bool(again.groups)
        assert found.memory.total <= limit
        decisions = decisions_of(space, prices, border, formulation, found.solution)
        with InFloat64():
            compared = compare(space, replace(decisions, recomputed=again.recomputed), state, one.args, one.kwargs)
        assert compared.worst < TOLERANCE, compared.where
        options: dict[str, Any] = {"model": name, "mode": "train", "axes": {"tp": 2}, "memory": found.memory}
        said = describe(space, prices, border, formulation, found.solution, recomputation=again, **options)
        plain = describe(space, prices, border, formulation, found.solution, **options)
        assert said.time.step_s == pytest.approx(found.seconds, rel=1e-9)
        assert said.time.step_s - plain.time.step_s == pytest.approx(again.seconds, abs=1e-9 * found.seconds)
        assert sum(entry.seconds for entry in said.recomputed) == pytest.approx(again.seconds)
        assert sum(entry.bytes for entry in said.recomputed) == again.bytes
        assert said.collectives["forward"] == plain.collectives["forward"]
        assert read_plan(space, said, {}, {}).recomputed == again.recomputed
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
    plans = (plan("llama", {"tp": 2}, share * free("llama").memory.total) for share in (0.8, 0.7, 0.6, 0.5))
    found = next(one for one in plans if one.recomputed)
    work = [one.kpi["model_flops_utilisation"] * one.time.step_s for one in (free("llama"), found)]
    assert work[0] == pytest.approx(work[1])
