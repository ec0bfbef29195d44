"""The solver against brute force, on random problems with shared conversions, buckets, keeps and limits."""

from __future__ import annotations

from itertools import product
from random import Random

import pytest

from autotp.errors import AutotpError
from autotp.problem import Bucket, Choice, Keep, Link, Memory, Problem, bytes_of, seconds_of
from autotp.solve import least_memory, solve


def random_problem(seed: int, limit: float | None = None) -> Problem:
    draw = Random(seed)
    counts = [draw.randint(1, 3) for _ in range(6)]
    choices = tuple(
        Choice(f"n{i}", tuple(draw.random() * 1e-3 for _ in range(n)), tuple(range(n))) for i, n in enumerate(counts)
    )
    links = []
    for producer in range(4):
        consumers = draw.sample(range(producer + 1, 6), k=draw.randint(1, 2))
        made = tuple(draw.randrange(3) for _ in range(counts[producer]))
        wanted = tuple((c, tuple(draw.randrange(3) for _ in range(counts[c]))) for c in consumers)
        seconds = {(a, b): draw.random() * 1e-3 for a in range(3) for b in range(3) if a != b}
        links.append(Link(f"t{producer}", producer, made, wanted, seconds))
    buckets = (Bucket("b", 4e-4, ((0, 0, 1), (1, 0, 1), (2, 2, 0))),)
    memory = Memory(
        tuple(tuple(draw.random() * 1e9 for _ in range(n)) for n in counts),
        {(0, 0, 1): 5e8, (1, 1, 2): 3e8},
        (Keep(4e8, ((0, (0,)), (1, (0,)))),),
        tuple(tuple(draw.random() * 1e9 for _ in range(n)) for n in counts),
    )
    return Problem(choices, tuple(links), buckets, memory, limit)


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
    sizes = sorted(bytes_of(free, chosen) for chosen in every_choice(free))
    limit = sizes[len(sizes) // 8]
    problem = random_problem(seed, limit)
    found = solve(problem, solver=solver, gap=1e-9)
    assert found.bytes <= limit * (1 + 1e-9)
    best = min(seconds_of(problem, chosen) for chosen in every_choice(problem) if bytes_of(problem, chosen) <= limit)
    assert found.seconds == pytest.approx(best, rel=1e-6)


def test_an_impossible_limit_says_the_least() -> None:
    problem = random_problem(3, limit=1.0)
    least = min(bytes_of(problem, chosen) for chosen in every_choice(problem))
    assert least_memory(problem) == pytest.approx(least, rel=1e-6)
    with pytest.raises(AutotpError, match=f"limit of 1 bytes .* the least that would do on this mesh is {least * 1.0005 / 1e9:.4g} GB"):
        solve(problem)


def test_equal_optima_go_to_the_first_listed() -> None:
    choices = (Choice("a", (1e-3, 1e-3, 1e-3), (0, 1, 2)), Choice("b", (2e-3, 2e-3), (0, 1)))
    nothing = Memory(((0.0,) * 3, (0.0,) * 2), {}, (), ((0.0,) * 3, (0.0,) * 2))
    assert solve(Problem(choices, (), (), nothing, None)).chosen == (0, 0)


def test_pins_leave_only_what_they_allow() -> None:
    choices = (Choice("a", (1e-3, 5e-3), (1,)),)
    assert solve(Problem(choices, (), (), Memory(((0.0, 0.0),), {}, (), ((0.0, 0.0),)), None)).chosen == (1,)
