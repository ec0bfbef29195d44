"""Most of a planning problem is solved before the solver starts: a good plan, a bound of all plans, and strategies that cannot win.

Plans are made in view of the bounds (`autotp.bounds`), choice by choice; a strategy whose bound exceeds what a plan already found
costs goes. Whether a bucket is paid, and whether a choice takes few or many bytes, is decided by branching, always where the bound is
lowest; the price per byte of a memory limit is searched.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import count

import numpy

from autotp.bounds import TIE, Ascent, Index, Mask, State
from autotp.dual import Line, Multipliers, highest, line
from autotp.problem import Matrix, Problem, bytes_of, fits, seconds_of

SWEEPS = 4
"""Sweeps there and back over the choices between two looks at the bound."""
DEAREST = 1e-3
"""Seconds per byte at which nothing counts but bytes."""
MANY = 0.9
"""The problem is made smaller before branching if no more than this part of its strategies is left."""
PRICES = 10
"""How many multipliers are tried at most between two decisions."""
PROGRESS = 0.02
"""The part of the distance between bound and plan that a look, or another price, must gain for it to go on."""


def most(problem: Problem) -> float:
    """Seconds that no plan exceeds: a higher bound means that there is none."""

    def largest(table: Matrix) -> float:
        return float(table.max(initial=0.0, where=numpy.isfinite(table)))

    conversions = sum(largest(link.seconds) * len(link.consumers) for link in problem.links)
    again = sum(largest(one.again) * len(one.savers) for one in problem.memory.saved)
    return sum(max(choice.seconds) for choice in problem.choices) + conversions + again + sum(bucket.seconds for bucket in problem.buckets)


@dataclass(frozen=True)
class Presolved:
    """What is known before the solver starts.

    Attributes:
        problem: the same problem, without strategies that are in no better plan than `chosen`.
        chosen: the best plan found, one strategy per choice; None if none keeps the memory limit.
        bound: seconds that no plan within the limit beats.
    """

    problem: Problem
    chosen: tuple[int, ...] | None
    bound: float


def smallest(problem: Problem) -> tuple[int, ...]:
    """A choice with a small peak, near the smallest where no solver can say it: found at a price at which nothing counts but bytes."""
    search = _Search(replace(problem, limit=0.0), 0.0, numpy.inf, 0)
    parts = Ascent(search.problem, search.allowed)
    search.climb(parts.at(replace(parts.multipliers, per_byte=DEAREST), {}), parts.start())
    return min(search.lines, key=lambda chosen: bytes_of(search.problem, chosen))


def presolve(problem: Problem, gap: float, time_limit: float, branches: int = 24) -> Presolved:
    """Bound, plan and reduce a problem.

    Stops when the plan is within `gap` of the bound, or after `time_limit` seconds or so many `branches` tried.
    """
    search = _Search(problem, gap, time.monotonic() + time_limit, branches)
    search.run()
    reduced = replace(
        problem,
        choices=tuple(
            replace(choice, allowed=tuple(int(s) for s in strategies))
            for choice, strategies in zip(problem.choices, search.kept, strict=True)
        ),
    )
    ties = TIE * sum(int(strategies.max()) for strategies in search.allowed)
    return Presolved(reduced, search.chosen, search.bound - ties)


@dataclass
class _Node:
    """A part of the search: some strategies barred, some buckets decided; its bound, and the prices and moved amounts that prove it."""

    bound: float
    multipliers: Multipliers
    barred: dict[int, Mask]
    state: State


@dataclass
class _Search:
    """Multipliers and branching, with the best plan and the bound so far."""

    problem: Problem
    gap: float
    deadline: float
    branches: int
    allowed: list[Index] = field(init=False)
    kept: list[Index] = field(init=False)
    parts: Ascent = field(init=False)
    chosen: tuple[int, ...] | None = None
    seconds: float = numpy.inf
    bound: float = 0.0
    lines: dict[tuple[int, ...], Line] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.allowed = [numpy.array(choice.allowed, dtype=numpy.int64) for choice in self.problem.choices]
        self.kept = list(self.allowed)

    def run(self) -> None:
        """Find bound and plan, and leave out what cannot win."""
        self.parts = Ascent(self.problem, self.allowed)
        root = _Node(0.0, self.parts.multipliers, {}, self.parts.start())
        root.bound = self.climb(self.parts, root.state)
        if self.problem.limit is not None and self.chosen is None:  # can it be kept?
            dear = self.parts.at(replace(root.multipliers, per_byte=DEAREST), {})
            least = self.climb(dear, dear.start())
            if least > most(self.problem):
                self.bound = least
                return
        looks = [root, *self.tune(root)]
        while self.drop(looks) and not self.over():
            self.bound = root.bound
            self.allowed = list(self.kept)
            self.parts = Ascent(self.problem, self.allowed)
            root.state = self.parts.start()
            root.bound = max(root.bound, self.climb(self.at(root), root.state))
            looks = [root, *self.tune(root)]
        self.bound = root.bound
        self.branch(root)

    def at(self, node: _Node) -> Ascent:
        """The parts of the problem as a node has them."""
        return self.parts.at(node.multipliers, node.barred)

    def has(self, node: _Node, chosen: tuple[int, ...]) -> bool:
        """Whether a plan belongs to a node."""
        if any(strategy not in places for strategy, places in zip(chosen, self.parts.places, strict=True)):
            return False
        return not any(barred[self.parts.places[choice][chosen[choice]]] for choice, barred in node.barred.items())

    def closed(self, bound: float) -> bool:
        """Whether plans above this bound need no more search."""
        return bound >= self.seconds * (1 - self.gap)

    def over(self) -> bool:
        """Whether the time is up."""
        return time.monotonic() > self.deadline

    def climb(self, ascent: Ascent, state: State) -> float:
        """Raise the bound of a state until that no longer pays, making plans on the way."""
        found, least = -numpy.inf, numpy.inf
        while True:
            for _ in range(SWEEPS):
                ascent.sweep(state)
            before, found = found, max(found, ascent.bound(state))
            least = min(least, self.offer(ascent, state))
            if self.closed(found) or self.over():
                return found
            if found - before <= self.worth(found, least):
                return found

    def worth(self, bound: float, ceiling: float = numpy.inf) -> float:
        """Seconds that a bound must still gain for the ascent to go on; where no plan is known, in view of a ceiling of the bound."""
        ceiling = self.seconds if self.chosen else ceiling
        return max(PROGRESS * (ceiling - bound) if ceiling < numpy.inf else 0.0, 1e-6 * abs(bound))

    def offer(self, ascent: Ascent, state: State) -> float:
        """Make plans from a state and keep the best; what the cheapest of them costs at the multipliers of the ascent."""
        order, least = range(len(self.allowed)), numpy.inf
        for one in (order, order[::-1]):
            chosen = tuple(int(some[place]) for some, place in zip(self.allowed, ascent.plan(state, one), strict=True))
            if chosen not in self.lines:
                self.lines[chosen] = line(self.problem, chosen)
                found = seconds_of(self.problem, chosen)
                if found < self.seconds and fits(self.problem, chosen):
                    self.chosen, self.seconds = chosen, found
            least = min(least, self.lines[chosen].at(ascent.multipliers))
        return least

    def tune(self, node: _Node) -> list[_Node]:
        """Raise a node's bound by other multipliers: on the way to where the plans known cost most (Kelley 1960).

        Half the way where the bound is lower there: plans made in view of bounds need not be the cheapest, and say less than they should.
        Returns the node at all multipliers that were tried.
        """
        step = 1.0
        tried: list[_Node] = []
        while len(tried) < PRICES and (self.problem.limit is not None or self.problem.overlaps):
            if self.closed(node.bound) or self.over():
                break
            lines = [one for one in self.lines.values() if self.has(node, one.chosen)]
            if not lines:
                break
            point, top = highest(lines, node.multipliers, 8 * node.multipliers.per_byte + self.first_price())
            if top - node.bound <= self.worth(node.bound):
                break
            multipliers, state = node.multipliers.towards(point, step), node.state.copy()
            if any(multipliers.near(other) for other in (node.multipliers, *(one.multipliers for one in tried))):
                break
            found = self.climb(self.parts.at(multipliers, node.barred), state)
            tried.append(replace(node, bound=found, multipliers=multipliers, state=state))
            if found > node.bound:
                node.bound, node.multipliers, node.state, step = found, multipliers, state, min(1.0, 2 * step)
            else:
                step /= 2
        return tried

    def first_price(self) -> float:
        """Seconds per byte to begin with: all that can be gained for all the bytes there are."""
        spread = sum(max(choice.seconds) - min(choice.seconds) for choice in self.problem.choices)
        return max(self.bound + spread, 1e-9) / max(self.problem.limit or 0.0, 1.0)

    def drop(self, looks: Sequence[_Node]) -> bool:
        """Leave out the strategies whose bound, at any multipliers that were tried, exceeds the plan found; whether these are many."""
        if self.chosen is None or self.closed(self.bound):
            return False
        keep = [strategies == strategy for strategies, strategy in zip(self.allowed, self.chosen, strict=True)]
        wins = [numpy.ones(len(strategies), dtype=bool) for strategies in self.allowed]
        for node in looks:
            ascent = self.at(node)
            for may, bounds in zip(wins, ascent.bounds(node.state.copy(), ascent.bound(node.state)), strict=True):
                may &= bounds <= self.seconds * (1 + 1e-9)
        self.kept = [strategies[one | may] for strategies, one, may in zip(self.allowed, keep, wins, strict=True)]
        return sum(map(len, self.kept)) < MANY * sum(map(len, self.allowed))

    def branch(self, root: _Node) -> None:
        """Decide what the bound knows least of, always in the node with the lowest bound."""
        numbers = count()
        heap = [(root.bound, next(numbers), root)]
        while heap:
            bound, number, node = heapq.heappop(heap)
            self.bound = max(self.bound, bound)
            if self.closed(bound) or self.over() or number > self.branches:
                return
            children = self.children(node)
            if not children:
                return
            for child in children:
                child.bound = max(bound, self.climb(self.at(child), child.state))
                self.tune(child)
                heapq.heappush(heap, (child.bound, next(numbers), child))

    def children(self, node: _Node) -> list[_Node]:
        """The node with a bucket paid or not, or with a choice held to little or to much of what is priced; none if nothing is worth it."""
        ascent = self.at(node)
        missing, bucket = self.undecided_bucket(ascent, node.state)
        spread, choice, few = self.undecided_amount(node, ascent)
        if max(missing, spread) <= 1e-3 * self.gap * abs(node.bound):
            return []
        if missing >= spread:
            found = []
            for due in (True, False):
                start = node.state.copy()
                start.due[bucket], start.paid[bucket] = due, [0.0] * len(start.paid[bucket])
                found.append(replace(node, state=start))
            return found
        barred = node.barred.get(choice, numpy.zeros(len(few), dtype=bool))
        return [replace(node, barred={**node.barred, choice: barred | mask}, state=node.state.copy()) for mask in (few, ~few)]

    def undecided_bucket(self, ascent: Ascent, state: State) -> tuple[float, int]:
        """The bucket with the largest part of its price that no member pays; that part and its number."""
        open_ = [
            (bucket.seconds - sum(paid), number)
            for number, (bucket, paid, due) in enumerate(zip(ascent.buckets, state.paid, state.due, strict=True))
            if due is None and bucket.members
        ]
        return max(open_, default=(0.0, -1))

    def undecided_amount(self, node: _Node, ascent: Ascent) -> tuple[float, int, Mask]:
        """The choice whose strategies that can still win differ most in an amount that the multipliers price: that difference in seconds,
        the choice, and which of its strategies have little.
        """
        best = (0.0, -1, numpy.zeros(0, dtype=bool))
        bounds = ascent.bounds(node.state.copy(), ascent.bound(node.state))
        near = [one <= max(self.seconds, float(one.min())) for one in bounds]
        amounts = [(node.multipliers.per_byte, choice, size) for choice, size in enumerate(ascent.bytes)]
        for choice, number, side in ascent.sides(near):
            share = node.multipliers.shares[number]
            amounts.append((min(share, 1 - share), choice, side))
        for price, choice, amount in amounts:
            low, high = float(amount[near[choice]].min()), float(amount[near[choice]].max())
            if price * (high - low) > best[0]:
                best = price * (high - low), choice, amount <= (low + high) / 2
        return best
