"""Communication that compute hides: the optimum against all choices, and the claim against the unfolded program."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import numpy
import pytest

from autotp.overlap import hideable
from autotp.planning import Request, make_plan, pose
from autotp.presolve import presolve
from autotp.price.cluster import load_cluster
from autotp.problem import Overlap, Problem, conversions_of, fits, seconds_of, sides_of
from autotp.solve import solve
from autotp.trace import trace
from tests.models import example
from tests.test_solve import every_choice, least_bytes, random_problem


def with_overlaps(seed: int, limit: float | None = None) -> Problem:
    """A random problem, of whose choices and conversions some may run at the same time."""
    random, problem = Random(seed), random_problem(seed, limit)
    overlaps = []
    for number in range(2):
        compute = {place: choice.seconds for place, choice in enumerate(problem.choices) if place % 2 == number}
        moved = {
            place: numpy.where(numpy.isfinite(link.seconds), link.seconds, 0.0) * random.choice((0.5, 1.0))
            for place, link in enumerate(problem.links)
            if place % 2 == number
        }
        overlaps.append(Overlap(f"part {number}", compute, moved))
    return replace(problem, overlaps=tuple(overlaps))


@pytest.mark.parametrize("seed", range(30))
@pytest.mark.parametrize("solver", [None, "HiGHS", "CBC"])
def test_the_optimum_is_that_of_all_choices(seed: int, solver: str | None) -> None:
    problem = with_overlaps(seed)
    found = solve(problem, solver=solver, gap=1e-6)
    best = min(seconds_of(problem, chosen) for chosen in every_choice(problem))
    assert found.seconds == pytest.approx(best, rel=2e-5)
    assert found.seconds * (1 - found.gap) <= best * (1 + 1e-9)


@pytest.mark.parametrize("seed", range(6))
def test_the_optimum_within_a_limit(seed: int) -> None:
    """Prices per byte and shares are searched together: the bound holds, and the plan is the best that fits."""
    free = with_overlaps(seed)
    sizes = sorted(least_bytes(free, chosen) for chosen in every_choice(free))
    problem = replace(free, limit=sizes[len(sizes) // 8] * 1.01)
    best = min(seconds_of(problem, chosen) for chosen in every_choice(problem) if fits(problem, chosen))
    known = presolve(problem, 1e-6, 30.0)
    assert known.bound <= best * (1 + 1e-9)
    assert known.chosen is None or fits(problem, known.chosen)
    assert solve(problem, gap=1e-6).seconds == pytest.approx(best, rel=2e-5)


def test_the_shorter_of_both_is_hidden() -> None:
    problem = with_overlaps(3)
    for chosen in every_choice(problem)[:20]:
        used = conversions_of(problem, chosen)
        exposed = seconds_of(replace(problem, overlaps=()), chosen)
        assert seconds_of(problem, chosen) == pytest.approx(exposed - sum(min(sides_of(one, chosen, used)) for one in problem.overlaps))


@pytest.mark.parametrize(("mesh", "cluster"), [({"tp": 8}, "dgx-h100"), ({"dp": 4, "tp": 4}, "derecho"), ({"tp": 2}, "pcie-workstation")])
def test_the_claim_is_recounted_on_the_unfolded_program(mesh: dict[str, int], cluster: str) -> None:
    made = example("llama", num_hidden_layers=3)
    program = trace(made.model, made.args, made.kwargs, dynamic=False)
    priced = load_cluster(cluster)
    exposed = make_plan(program, Request(mesh), priced, "decoder")
    request = Request(mesh, overlap=True)
    plan = make_plan(program, request, priced, "decoder")
    problem = pose(program, request, priced).formulation.problem
    assert plan.time.step_s == pytest.approx(seconds_of(problem, solve(problem).chosen), rel=1e-9)
    assert 0 <= plan.time.hidden_s <= min(plan.time.compute_s, plan.time.communication_s)
    assert plan.time.step_s == pytest.approx(plan.time.compute_s + plan.time.communication_s - plan.time.hidden_s)
    assert plan.kpi["exposed_communication_s"] == pytest.approx(plan.time.communication_s - plan.time.hidden_s)
    assert plan.time.step_s <= exposed.time.step_s * (1 + 1e-3)


def test_one_copy_has_nothing_to_hide_behind() -> None:
    assert hideable(1) == 0 and hideable(4) == 0.75
