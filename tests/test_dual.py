"""What plans cost at multipliers: never more than their time within the limit; and where the cheapest of them costs most."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from random import Random

import numpy
import pytest

from autotp.dual import Line, Multipliers, highest, line
from autotp.problem import Problem, fits, seconds_of
from tests.test_overlap import with_overlaps
from tests.test_solve import every_choice, least_bytes


def tight(seed: int) -> Problem:
    """A problem with overlaps whose limit an eighth of all plans keeps."""
    free = with_overlaps(seed)
    sizes = sorted(least_bytes(free, chosen) for chosen in every_choice(free))
    return replace(free, limit=sizes[len(sizes) // 8] * 1.01)


@pytest.mark.parametrize("seed", range(8))
def test_no_plan_within_the_limit_costs_more_than_its_time(seed: int) -> None:
    draw, problem = Random(seed), tight(seed)
    for chosen in every_choice(problem):
        known = line(problem, chosen)
        for _ in range(4):
            at = Multipliers(draw.random() * 1e-11, (draw.random(), draw.random()))
            assert not fits(problem, chosen) or known.at(at) <= seconds_of(problem, chosen) + 1e-12


@pytest.mark.parametrize("seed", range(8))
def test_slopes_lie_above(seed: int) -> None:
    """A plan's cost is concave: its tangents are nowhere below it."""
    draw, problem = Random(seed), tight(seed)
    known = line(problem, draw.choice(every_choice(problem)))
    points = [Multipliers(draw.random() * 1e-12, (draw.random(), draw.random())) for _ in range(12)]
    for one, two in product(points, repeat=2):
        assert known.at(two) <= known.at(one) + float(known.slope(one) @ (two.vector - one.vector)) + 1e-12


@pytest.mark.parametrize("seed", range(8))
def test_the_highest_point_is_that_of_a_grid(seed: int) -> None:
    problem, dearest = tight(seed), 1e-11
    lines = [line(problem, chosen) for chosen in every_choice(problem)[::3]]

    def cheapest(at: Multipliers) -> float:
        return min(one.at(at) for one in lines)

    point, top = highest(lines, Multipliers(0.0, (0.5, 0.5)), dearest)
    grid = numpy.linspace(0.0, 1.0, 9)
    assert top >= max(cheapest(Multipliers(price * dearest, (one, two))) for price, one, two in product(grid, grid, grid)) - 1e-9
    assert cheapest(point) == pytest.approx(top, rel=1e-5)


def test_a_share_pays_for_one_side_and_the_rest_for_the_other() -> None:
    nothing = numpy.zeros(0)
    one = Line((0,), 10.0, -2.0, nothing, nothing, numpy.array([4.0]), numpy.array([3.0]))
    assert [one.at(Multipliers(0.0, (share,))) for share in (0.0, 0.5, 1.0)] == [7.0, 6.5, 6.0]
    assert one.at(Multipliers(0.5, (0.0,))) == 6.0
    assert one.slope(Multipliers(0.5, (0.0,))).tolist() == [-2.0, -1.0]


def test_a_price_beyond_all_measure_breaks_no_solver() -> None:
    """Where no plan keeps the limit the price per byte grows without end; solvers refuse rows with such numbers."""
    none = numpy.zeros(0)
    lines = [Line((number,), 260.0 + number, 4e3, numpy.array([80.0]), numpy.array([numpy.inf]), none, none) for number in range(2)]
    point, top = highest(lines, Multipliers(1e13, ()), 1e14)
    assert top > 1e6 * lines[0].seconds and numpy.isfinite(point.per_byte)
