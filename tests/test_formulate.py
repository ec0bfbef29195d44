"""Claims: what the folded problem says a plan costs is what the unfolded graph costs."""

from __future__ import annotations

from typing import Any

import pytest

from autotp.describe import describe
from autotp.fold import Folding, fold, unfolded
from autotp.formulate import Border, formulate
from autotp.planning import Request, make_plan, traced_sizes
from autotp.price.cluster import load_cluster
from autotp.price.conversion import ConversionPrices
from autotp.problem import bytes_of, seconds_of
from autotp.program import Program
from autotp.solve import Solution, least_memory, solve
from autotp.strategies import build_space
from autotp.trace import trace
from tests.models import example, splitting_pays

DEEP = {"gpt2": {"n_layer": 4}, "llama": {"num_hidden_layers": 4}, "gemma2": {"num_hidden_layers": 4}, "opt": {"num_hidden_layers": 4}}
CLUSTERS = {"dgx-h100": lambda: load_cluster("dgx-h100"), "splitting pays": splitting_pays}


def program_of(name: str) -> Program:
    one = example(name, **DEEP[name])
    return trace(one.model, one.args, one.kwargs, dynamic=False)


def solved(program: Program, folding: Folding, ranks: int, cluster: str, limit: float | None = None) -> tuple[Any, Any, Any, Solution]:
    space = build_space(program, folding, (ranks,))
    prices = ConversionPrices(CLUSTERS[cluster](), (ranks,), True, traced_sizes(program))
    formulation = formulate(space, prices, Border({}, {}), limit=limit)
    return space, prices, formulation, solve(formulation.problem, gap=1e-9)


@pytest.mark.parametrize("cluster", CLUSTERS)
@pytest.mark.parametrize("name", DEEP)
def test_claim_equals_unfolded_cost_and_is_near_the_unfolded_optimum(name: str, cluster: str) -> None:
    program = program_of(name)
    folding = fold(program)
    assert folding.repeats
    space, prices, formulation, found = solved(program, folding, 4, cluster)
    plan = describe(
        space, prices, Border({}, {}), formulation, found, model=name, mode="train", axes={"tp": 4}
    )  # adds up over the unfolded program
    assert plan.time.step_s == pytest.approx(found.seconds, rel=1e-9)
    assert plan.memory.total == pytest.approx(found.bytes, rel=1e-9)
    _, _, _, best = solved(program, unfolded(program), 4, cluster)
    assert best.seconds <= found.seconds * (1 + 1e-9)
    assert found.seconds <= best.seconds * 1.005


def test_a_folded_choice_costs_the_same_in_the_unfolded_problem() -> None:
    program = program_of("llama")
    folding = fold(program)
    _, _, small, found = solved(program, folding, 4, "dgx-h100")
    whole_space = build_space(program, unfolded(program), (4,))
    prices = ConversionPrices(load_cluster("dgx-h100"), (4,), True, traced_sizes(program))
    whole = formulate(whole_space, prices, Border({}, {}))
    space = build_space(program, folding, (4,))
    keys = {node: space.strategies[node][s] for node, s in zip(small.nodes, found.chosen, strict=True) if node is not None}
    chosen = []
    for node in whole.nodes:
        wanted = keys[folding.representative[node]] if node is not None else None
        options = whole_space.strategies[node] if node is not None else (None,)
        same = (o for o, option in enumerate(options) if wanted is None or (option.key, option.outputs) == (wanted.key, wanted.outputs))
        chosen.append(next(same))
    # buckets of folded layers are one per layer, those of an unfolded program one in all: the fixed part differs by that alone
    fixed = sum(bucket.seconds for bucket in small.problem.buckets) - sum(bucket.seconds for bucket in whole.problem.buckets)
    assert seconds_of(whole.problem, chosen) == pytest.approx(found.seconds, abs=abs(fixed) + 1e-12)
    assert bytes_of(whole.problem, chosen) == pytest.approx(found.bytes, rel=1e-9)


def test_a_memory_limit_is_kept_at_a_price_and_the_least_is_reachable() -> None:
    program = program_of("llama")
    _, _, free_problem, free = solved(program, fold(program), 4, "dgx-h100")
    least = least_memory(free_problem.problem)
    assert least < free.bytes
    limit = (least + free.bytes) / 2
    _, _, _, limited = solved(program, fold(program), 4, "dgx-h100", limit)
    assert limited.bytes <= limit
    assert limited.seconds >= free.seconds
    _, _, _, tight = solved(program, fold(program), 4, "dgx-h100", least * 1.000001)
    assert tight.bytes <= least * 1.000001


def test_same_request_same_plan() -> None:
    program = program_of("gemma2")
    plans = [make_plan(program, Request({"tp": 4}), splitting_pays(), "gemma2") for _ in range(2)]
    assert plans[0].hash == plans[1].hash
