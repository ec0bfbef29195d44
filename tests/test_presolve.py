"""Bounds are bounds, what is left out is in no better plan, and large problems need no solver."""

from __future__ import annotations

import dataclasses
from random import Random

import numpy
import pytest

from autotp import bounds
from autotp.presolve import presolve
from autotp.problem import Bucket, Choice, Link, Memory, Problem, Saved, fits, seconds_of
from autotp.solve import solve
from tests.test_solve import every_choice, least_bytes, random_problem


def chain(seed: int, blocks: int, layouts: int = 8) -> Problem:
    """A residual stream: each block reads the stream, works on it in two steps and adds to it; distances are metric."""
    draw = Random(seed)
    where = [(draw.random(), draw.random()) for _ in range(layouts)]
    distance = numpy.array(
        [[(a != b) * (1e-3 * (abs(x[0] - y[0]) + abs(x[1] - y[1])) + 1e-4) for b, y in enumerate(where)] for a, x in enumerate(where)]
    )
    choices, links = [Choice("input", (0.0,), (0,))], []
    made = {0: (0,)}
    readers: dict[int, list[tuple[int, tuple[int, ...]]]] = {}

    def node(*sources: int) -> int:
        number, count = len(choices), 12
        choices.append(Choice(f"n{number}", tuple(draw.random() * 2e-3 for _ in range(count)), tuple(range(count))))
        made[number] = tuple(draw.randrange(layouts) for _ in range(count))
        for source in sources:
            readers.setdefault(source, []).append((number, tuple(draw.randrange(layouts) for _ in range(count))))
        return number

    stream = 0
    weights = []
    for _ in range(blocks):
        weights.append(node())
        stream = node(stream, node(node(stream, weights[-1])))
    for producer, consumers in readers.items():
        links.append(Link(f"t{producer}", producer, made[producer], tuple(consumers), distance))
    numbers = {link.producer: number for number, link in enumerate(links)}
    bucket = Bucket("weights", 1.5e-3, tuple((numbers[weight], 0, target) for weight in weights for target in range(1, layouts)))
    held = tuple(tuple(draw.random() * 1e8 for _ in choice.seconds) for choice in choices)
    nothing = tuple(tuple(0.0 for _ in choice.seconds) for choice in choices)
    return Problem(tuple(choices), tuple(links), (bucket,), Memory(held, (), nothing), None)


@pytest.mark.parametrize("seed", range(12))
def test_bounds_and_what_is_left(seed: int) -> None:
    problem = random_problem(seed)
    best = min(every_choice(problem), key=lambda chosen: seconds_of(problem, chosen))
    found = presolve(problem, 1e-9, 10.0)
    assert found.bound <= seconds_of(problem, best) * (1 + 1e-9)
    assert all(strategy in choice.allowed for strategy, choice in zip(best, found.problem.choices, strict=True))
    assert found.chosen is not None and seconds_of(problem, found.chosen) >= found.bound * (1 - 1e-9)


@pytest.mark.parametrize("seed", range(12))
def test_bounds_within_a_limit(seed: int) -> None:
    free = random_problem(seed)
    sizes = sorted(least_bytes(free, chosen) for chosen in every_choice(free))
    problem = dataclasses.replace(free, limit=sizes[len(sizes) // 8] * 1.01)
    fitting = [chosen for chosen in every_choice(problem) if fits(problem, chosen)]
    best = min(fitting, key=lambda chosen: seconds_of(problem, chosen))
    found = presolve(problem, 1e-9, 10.0)
    assert found.bound <= seconds_of(problem, best) * (1 + 1e-9)
    assert found.chosen is None or found.chosen in fitting
    assert all(strategy in choice.allowed for strategy, choice in zip(best, found.problem.choices, strict=True))


@pytest.mark.parametrize("seed", range(4))
def test_as_good_as_the_solver(seed: int) -> None:
    problem = chain(seed, 5)
    found = presolve(problem, 1e-6, 60.0)
    exact = solve(problem, solver="HiGHS", gap=1e-9)
    assert found.bound <= exact.seconds * (1 + 1e-9)
    assert solve(problem, gap=1e-9).seconds == pytest.approx(exact.seconds, rel=1e-9)
    assert all(strategy in choice.allowed for strategy, choice in zip(exact.chosen, found.problem.choices, strict=True))


def to_layout_1(seconds: float) -> numpy.ndarray:
    return numpy.array([[0.0, seconds], [numpy.inf, 0.0]])


def test_shared_conversions_are_paid_once() -> None:
    """Three consumers want layout 1 of a tensor that is made in layout 0: one conversion."""
    choices = (Choice("p", (0.0,), (0,)), *(Choice(f"c{i}", (0.0, 1e-3), (0, 1)) for i in range(3)))
    link = Link("t", 0, (0,), tuple((i, (1, 0)) for i in (1, 2, 3)), to_layout_1(2.5e-3))
    nothing = Memory(tuple((0.0,) * len(c.seconds) for c in choices), (), tuple((0.0,) * len(c.seconds) for c in choices))
    found = presolve(Problem(choices, (link,), (), nothing, None), 1e-9, 10.0)
    assert (found.chosen, found.bound) == ((0, 0, 0, 0), pytest.approx(2.5e-3))


def test_many_sharers_are_bounded_in_groups() -> None:
    count = bounds.SHARERS + 2
    choices = (Choice("p", (0.0,), (0,)), *(Choice(f"c{i}", (0.0,), (0,)) for i in range(count)))
    link = Link("t", 0, (0,), tuple((i + 1, (1,)) for i in range(count)), to_layout_1(1e-3))
    nothing = Memory(((0.0,),) * (count + 1), (), ((0.0,),) * (count + 1))
    assert presolve(Problem(choices, (link,), (), nothing, None), 1e-9, 10.0).bound == pytest.approx(1e-3)


def test_a_bound_that_is_too_high_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """If each sharer paid for itself, bounds would exceed optima."""

    def alone(prices: bounds.Pair, saves: list[bool], parts: list[numpy.ndarray], end: int) -> numpy.ndarray:
        price = prices[1]
        others = [(price + part).min(1) for number, part in enumerate(parts) if number not in (0, end)]
        if end == 0:
            return numpy.sum(others, 0)
        return (price + (parts[0] + numpy.sum(others, 0))[:, None]).min(0)

    monkeypatch.setattr(bounds, "_least", alone)
    wrong = 0
    for seed in range(12):
        problem = random_problem(seed)
        best = min(seconds_of(problem, chosen) for chosen in every_choice(problem))
        wrong += presolve(problem, 1e-9, 10.0).bound > best * (1 + 1e-9)
    assert wrong


def test_a_saved_tensor_counts_once() -> None:
    """Both consumers save layout 1 for 8 bytes; each has a slower strategy that saves nothing."""
    saved = Saved(0, (1, 2), numpy.array([[0.0, 8.0], [0.0, 0.0]]), numpy.full((2, 2), numpy.inf))
    choices = (Choice("p", (0.0,), (0,)), Choice("a", (0.0, 1.0), (0, 1)), Choice("b", (0.0, 1.0), (0, 1)))
    link = Link("t", 0, (0,), ((1, (1, 0)), (2, (1, 0))), to_layout_1(0.0))
    nothing = ((0.0,), (0.0, 0.0), (0.0, 0.0))
    problem = Problem(choices, (link,), (), Memory(nothing, (saved,), nothing), 8.0)
    assert presolve(problem, 1e-9, 10.0).chosen == (0, 0, 0)
    assert presolve(dataclasses.replace(problem, limit=7.0), 1e-9, 10.0).chosen == (0, 1, 1)
    again = dataclasses.replace(saved, again=numpy.full((2, 2), 0.5))  # an eighth of it is made again
    problem = dataclasses.replace(problem, memory=Memory(nothing, (again,), nothing), limit=7.0)
    found = presolve(problem, 1e-9, 10.0)
    assert (found.chosen, found.bound) == ((0, 0, 0), pytest.approx(0.5 / 8))
