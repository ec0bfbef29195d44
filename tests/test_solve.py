"""The solver against brute force, on random problems with shared conversions, buckets, limits, and tensors that are made again."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from random import Random

import numpy
import pytest

from autotp.errors import AutotpError
from autotp.problem import Bucket, Choice, Link, Matrix, Memory, Problem, Saved, bytes_of, fits, made_again, seconds_of
from autotp.solve import least_memory, solve


def random_problem(seed: int, limit: float | None = None) -> Problem:
    draw = Random(seed)
    counts = [draw.randint(1, 3) for _ in range(6)]
    choices = tuple(
        Choice(f"n{i}", tuple(draw.random() * 1e-3 for _ in range(n)), tuple(range(n))) for i, n in enumerate(counts)
    )
    links, saved = [], []
    for producer in range(4):
        consumers = draw.sample(range(producer + 1, 6), k=draw.randint(1, 2))
        made = tuple(draw.randrange(3) for _ in range(counts[producer]))
        wanted = tuple((c, tuple(draw.randrange(3) for _ in range(counts[c]))) for c in consumers)
        links.append(Link(f"t{producer}", producer, made, wanted, table(draw, 1e-3) * (1 - numpy.eye(3))))
        again = numpy.where(table(draw, 1.0) < 0.6, table(draw, 5e-4), numpy.inf)
        savers = tuple(place for place in range(len(wanted) + 1) if draw.random() < 0.6)
        saved.append(Saved(producer, savers, table(draw, 6e8) * (table(draw, 1.0) < 0.7), again))
    buckets = (Bucket("b", 4e-4, ((0, 0, 1), (1, 0, 1), (2, 2, 0))),)
    memory = Memory(
        tuple(tuple(draw.random() * 1e9 for _ in range(n)) for n in counts),
        tuple(saved),
        tuple(tuple(draw.random() * 1e9 for _ in range(n)) for n in counts),
    )
    return Problem(choices, tuple(links), buckets, memory, limit)


def table(draw: Random, most: float) -> Matrix:
    return numpy.array([[draw.random() * most for _ in range(3)] for _ in range(3)])


def least_bytes(problem: Problem, chosen: tuple[int, ...]) -> float:
    """The peak if all is made again that can be."""
    return bytes_of(replace(problem, limit=0.0), chosen)


def every_choice(problem: Problem) -> list[tuple[int, ...]]:
    return list(product(*(choice.allowed for choice in problem.choices)))


@pytest.mark.parametrize("solver", ["HiGHS", "CBC"])
@pytest.mark.parametrize("seed", range(12))
def test_the_optimum_is_found(seed: int, solver: str) -> None:
    problem = random_problem(seed)
    found = solve(problem, solver=solver, gap=1e-9)
    assert found.seconds == pytest.approx(min(seconds_of(problem, chosen) for chosen in every_choice(problem)), rel=1e-6)
    assert found.seconds == seconds_of(problem, found.chosen)
    assert (found.status, found.solver) == ("optimal", solver)


@pytest.mark.parametrize("solver", ["HiGHS", "CBC"])
@pytest.mark.parametrize("seed", range(6))
def test_the_limit_is_kept(seed: int, solver: str) -> None:
    free = random_problem(seed)
    sizes = sorted(least_bytes(free, chosen) for chosen in every_choice(free))
    limit = sizes[len(sizes) // 8] * 1.01
    problem = random_problem(seed, limit)
    found = solve(problem, solver=solver, gap=1e-9)
    assert found.bytes <= limit * (1 + 1e-9)
    best = min(seconds_of(problem, chosen) for chosen in every_choice(problem) if fits(problem, chosen))
    assert found.seconds == pytest.approx(best, rel=1e-6)


def test_an_impossible_limit_says_the_least() -> None:
    problem = random_problem(3, limit=1.0)
    least = min(least_bytes(problem, chosen) for chosen in every_choice(problem))
    assert least_memory(problem) == pytest.approx(least, rel=1e-6)
    with pytest.raises(AutotpError, match=f"limit of 1 bytes .* the least that would do on this mesh is {least * 1.0005 / 1e9:.4g} GB"):
        solve(problem)


def test_equal_optima_go_to_the_first_listed() -> None:
    choices = (Choice("a", (1e-3, 1e-3, 1e-3), (0, 1, 2)), Choice("b", (2e-3, 2e-3), (0, 1)))
    nothing = Memory(((0.0,) * 3, (0.0,) * 2), (), ((0.0,) * 3, (0.0,) * 2))
    assert solve(Problem(choices, (), (), nothing, None)).chosen == (0, 0)


def test_pins_leave_only_what_they_allow() -> None:
    choices = (Choice("a", (1e-3, 5e-3), (1,)),)
    assert solve(Problem(choices, (), (), Memory(((0.0, 0.0),), (), ((0.0, 0.0),)), None)).chosen == (1,)


def test_what_costs_the_fewest_seconds_per_byte_is_made_again_first() -> None:
    """Three tensors of 4 bytes, 12 in all; the last must be kept."""
    choices = tuple(Choice(name, (0.0,), (0,)) for name in "abcd")
    links = tuple(Link("t", n, (0,), ((n + 1, (0,)),), numpy.zeros((1, 1))) for n in range(3))
    saved = tuple(Saved(n, (1,), numpy.full((1, 1), 4.0), numpy.full((1, 1), again)) for n, again in enumerate((3e-6, 1e-6, numpy.inf)))
    nothing = ((0.0,),) * 4
    for limit, shares, seconds in ((12.0, [], 0.0), (10.0, [0.5], 5e-7), (5.0, [1.0, 0.75], 1e-6 + 0.75 * 3e-6)):
        problem = Problem(choices, links, (), Memory(nothing, saved, nothing), limit)
        assert [share for _, share in made_again(problem, (0,) * 4)] == shares
        assert (bytes_of(problem, (0,) * 4), seconds_of(problem, (0,) * 4)) == (limit, pytest.approx(seconds))
        for solver in ("HiGHS", "CBC", None):
            assert solve(problem, solver=solver).seconds == pytest.approx(seconds)
    with pytest.raises(AutotpError, match="the least that would do on this mesh is 4 bytes"):
        solve(replace(problem, limit=3.9))
