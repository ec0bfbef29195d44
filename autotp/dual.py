"""Multipliers of what the parts of a planning problem share, and what plans cost at them.

A memory limit enters the bounds as a price per byte, and compute beside which conversions run as shares in which both are paid for
(Lagrange multipliers). At any prices the cheapest plan bounds all plans within the limit (weak duality). What a plan costs is concave
in the prices, so the cheapest of the plans known so far bounds the bound from above, and is highest where to look next: cutting planes
(Kelley 1960).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy
import pulp
from numpy.typing import NDArray

from autotp.integer import engine_of
from autotp.problem import Problem, bytes_of, conversions_of, seconds_of, sides_of, versions_of

Vector = NDArray[numpy.float64]

NEAR = 0.02
"""Prices per byte that differ by less than this part, and shares that differ by a tenth of it, are not tried both."""
CUTS = 50
"""Tangents at most in a search for the highest point."""
LARGEST = 1e9
"""Of the coefficients there, with a step as 1: solvers take no numbers as large as prices become where no plan keeps the limit."""


@dataclass(frozen=True)
class Multipliers:
    """Lagrange multipliers: seconds per byte, and the share in which each overlap pays for its conversions; the rest is compute's."""

    per_byte: float
    shares: tuple[float, ...]

    @property
    def vector(self) -> Vector:
        """The price per byte, then the shares."""
        return numpy.array([self.per_byte, *self.shares])

    def near(self, other: Multipliers) -> bool:
        """Whether bounds hardly differ between these."""
        same = abs(self.per_byte - other.per_byte) <= NEAR * self.per_byte
        return same and all(abs(one - two) <= NEAR / 10 for one, two in zip(self.shares, other.shares, strict=True))

    def towards(self, other: Multipliers, part: float) -> Multipliers:
        """A part of the way to other prices."""
        shares = tuple((1 - part) * one + part * two for one, two in zip(self.shares, other.shares, strict=True))
        return Multipliers((1 - part) * self.per_byte + part * other.per_byte, shares)


@dataclass(frozen=True, eq=False)
class Line:
    """What a plan costs at any prices.

    Attributes:
        chosen: the plan; seconds: its time if nothing is hidden; beyond: bytes beyond the limit, without what may be made again.
        sizes, again: of each tensor that may be made again its bytes, and the seconds of that.
        compute, moved: of each overlap the seconds of both sides.
    """

    chosen: tuple[int, ...]
    seconds: float
    beyond: float
    sizes: Vector
    again: Vector
    compute: Vector
    moved: Vector

    def at(self, prices: Multipliers) -> float:
        """Seconds at these prices: of what runs at the same time, the weighted mean; of what is saved, the cheaper of bytes and seconds."""
        shares = numpy.array(prices.shares)
        paid = self.seconds - float(shares @ self.compute + (1 - shares) @ self.moved)
        return paid + prices.per_byte * self.beyond + float(numpy.minimum(prices.per_byte * self.sizes, self.again).sum())

    def slope(self, prices: Multipliers) -> Vector:
        """How these seconds grow with the price per byte, then with each share."""
        kept = self.sizes[prices.per_byte * self.sizes < self.again]
        return numpy.concatenate([[self.beyond + float(kept.sum())], self.moved - self.compute])


def line(problem: Problem, chosen: tuple[int, ...]) -> Line:
    """What a plan costs at any prices; without a limit bytes cost nothing."""
    used = conversions_of(problem, chosen)
    sides = numpy.array([sides_of(overlap, chosen, used) for overlap in problem.overlaps]).reshape(-1, 2)
    free = Problem(problem.choices, problem.links, problem.buckets, problem.memory, None)
    versions = list(versions_of(problem, chosen)) if problem.limit is not None else []
    sizes, again = numpy.array([v.bytes for v in versions]), numpy.array([v.again for v in versions])
    beyond = bytes_of(free, chosen) - float(sizes.sum()) - problem.limit if problem.limit is not None else 0.0
    return Line(chosen, seconds_of(free, chosen), beyond, sizes, again, sides[:, 0], sides[:, 1])


def highest(lines: Iterable[Line], start: Multipliers, dearest: float) -> tuple[Multipliers, float]:
    """The prices at which the cheapest of some plans costs most, and that cost.

    Args:
        start: where to begin; dearest: no price per byte is higher.
    """
    lines = list(lines)
    unit = 1 / (max(one.seconds for one in lines) or 1.0)
    bytes_at_most = max(abs(one.beyond) + float(one.sizes.sum()) for one in lines)
    dearest = min(dearest, LARGEST / (unit * max(bytes_at_most, 1.0)))
    program, engine = pulp.LpProblem("prices", pulp.LpMaximize), engine_of(None, 10.0, 0.0)[0]
    top = pulp.LpVariable("top")
    prices = [pulp.LpVariable("per_byte", 0, 1), *(pulp.LpVariable(f"share{number}", 0, 1) for number in range(len(start.shares)))]
    scale = numpy.array([dearest, *(1.0 for _ in start.shares)])
    program.setObjective(top)
    point, bound, cuts = start, numpy.inf, lines
    for _ in range(CUTS):
        for one in cuts:
            slope = one.slope(point)
            level = one.at(point) - float(slope @ point.vector)
            tangent = zip([top, *prices], [1.0, *(-unit * slope * scale)], strict=True)
            program.addConstraint(pulp.LpAffineExpression(list(tangent)) <= unit * level)
        program.solve(engine)
        point, bound = Multipliers(prices[0].value() * dearest, tuple(share.value() for share in prices[1:])), top.value() / unit
        cuts = [min(lines, key=lambda one: one.at(point))]
        if cuts[0].at(point) >= bound - 1e-6 / unit:
            break
    return point, bound
