"""Most of a planning problem is solved before the solver starts: a good plan, a bound of all plans, and strategies that cannot win.

Plans are made in view of the bounds (`autotp.bounds`), choice by choice; a strategy whose bound exceeds what a plan already found
costs goes. Whether a bucket is paid, and whether a choice takes few or many bytes, is decided by branching, always where the bound is
lowest; the price per byte of a memory limit is searched.
"""

from __future__ import annotations

import heapq
import time
from dataclasses import dataclass, field, replace
from itertools import count

import numpy

from autotp.bounds import TIE, Ascent, Index, Mask, State
from autotp.problem import Problem, bytes_of, seconds_of

SWEEPS = 6
"""Sweeps there and back over the choices between two looks at the bound."""
FIRST_PRICES, PRICES = 12, 4
"""How many prices per byte are tried at first, and after each decision."""
BRANCHES = 24
"""Decisions tried at most."""
PROGRESS = 0.02
"""The part of the distance between bound and plan that a look must gain for the ascent to go on."""


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


def presolve(problem: Problem, gap: float, time_limit: float) -> Presolved:
    """Bound, plan and reduce a problem; stops when the plan is within `gap` of the bound, or after `time_limit` seconds."""
    search = _Search(problem, gap, time.monotonic() + time_limit)
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
class _Search:
    """Prices per byte first, then branching on buckets, with the best plan and the bound so far."""

    problem: Problem
    gap: float
    deadline: float
    allowed: list[Index] = field(init=False)
    kept: list[Index] = field(init=False)
    chosen: tuple[int, ...] | None = None
    seconds: float = numpy.inf
    bound: float = 0.0

    def __post_init__(self) -> None:
        self.allowed = [numpy.array(choice.allowed, dtype=numpy.int64) for choice in self.problem.choices]
        self.kept = list(self.allowed)

    def run(self) -> None:
        """Find bound and plan, and leave out what cannot win."""
        ascent = Ascent(self.problem, self.allowed)
        state = ascent.start()
        self.bound = self.climb(ascent, state)
        if self.problem.limit is not None and not self.closed(self.bound):
            self.bound, ascent, state = self.tune(self.bound, ascent, state, self.first_price(), FIRST_PRICES)
        self.branch(ascent, state)
        self.drop(ascent, state)

    def closed(self, bound: float) -> bool:
        """Whether plans above this bound need no more search."""
        return bound >= self.seconds * (1 - self.gap)

    def over(self) -> bool:
        """Whether the time is up."""
        return time.monotonic() > self.deadline

    def climb(self, ascent: Ascent, state: State) -> float:
        """Raise the bound of a state until that no longer pays, making plans on the way."""
        found = -numpy.inf
        while True:
            for _ in range(SWEEPS):
                ascent.sweep(state)
            before, found = found, max(found, ascent.bound(state))
            self.offer(ascent, state)
            if self.closed(found) or self.over():
                return found
            if found - before <= max(PROGRESS * (self.seconds - found) if self.chosen else 0.0, 1e-6 * abs(found)):
                return found

    def offer(self, ascent: Ascent, state: State) -> float:
        """Make plans from a state and keep the best; bytes of the last one."""
        order, size = range(len(self.allowed)), 0.0
        for one in (order, order[::-1]):
            chosen = tuple(int(some[place]) for some, place in zip(self.allowed, ascent.plan(state, one), strict=True))
            found, size = seconds_of(self.problem, chosen), bytes_of(self.problem, chosen)
            if found < self.seconds and (self.problem.limit is None or size <= self.problem.limit):
                self.chosen, self.seconds = chosen, found
        return size

    def first_price(self) -> float:
        """Seconds per byte to begin with: all that can be gained for all the bytes there are."""
        spread = sum(max(choice.seconds) - min(choice.seconds) for choice in self.problem.choices)
        return (self.bound + spread) / max(self.problem.limit or 0.0, 1.0)

    def tune(
        self, bound: float, ascent: Ascent, state: State, price: float, tries: int
    ) -> tuple[float, Ascent, State]:
        """The price per byte with the best bound: bisected between prices at which the plan is too large and at which it fits."""
        limit = self.problem.limit
        assert limit is not None
        best = bound, ascent, state
        low, high = 0.0, numpy.inf
        for _ in range(tries):
            ascent = ascent.at(price, ascent.barred)
            state = best[2].copy()
            found = self.climb(ascent, state)
            if found > best[0]:
                best = found, ascent, state
            if self.closed(best[0]) or self.over():
                break
            if self.offer(ascent, state) > limit:
                low = price
            else:
                high = price
            step = 4.0 if tries == FIRST_PRICES else 2.0
            price = price * step if high == numpy.inf else (low * high) ** 0.5 if low else high / step
        return best

    def drop(self, ascent: Ascent, state: State) -> None:
        """Leave out the strategies whose bound exceeds the plan found."""
        if self.chosen is None:
            return
        bounds_of = ascent.bounds(state.copy(), ascent.bound(state))
        for choice, (strategies, bounds) in enumerate(zip(self.allowed, bounds_of, strict=True)):
            keep = (bounds <= self.seconds * (1 + 1e-9)) | (strategies == self.chosen[choice])
            self.kept[choice] = strategies[keep]

    def branch(self, ascent: Ascent, state: State) -> None:
        """Decide what the bound knows least of, always in the branch with the lowest bound."""
        numbers = count()
        heap = [(self.bound, next(numbers), ascent, state)]
        while heap:
            bound, number, ascent, state = heapq.heappop(heap)
            self.bound = max(self.bound, bound)
            if self.closed(bound) or self.over() or number > BRANCHES:
                return
            children = self.children(bound, ascent, state)
            if not children:
                return
            for child, start in children:
                found = max(bound, self.climb(child, start))
                if child.per_byte and not self.closed(found):
                    found, child, start = self.tune(found, child, start, child.per_byte * 1.4, PRICES)
                heapq.heappush(heap, (found, next(numbers), child, start))

    def children(self, bound: float, ascent: Ascent, state: State) -> list[tuple[Ascent, State]]:
        """The state with a bucket paid or not, or with a choice held to few or to many bytes; none if nothing is worth it."""
        missing, bucket = self.undecided_bucket(ascent, state)
        spread, choice, few = self.undecided_bytes(bound, ascent, state)
        if max(missing, spread) < 1e-3 * self.gap * abs(bound):
            return []
        if missing >= spread:
            found = []
            for due in (True, False):
                start = state.copy()
                start.due[bucket], start.paid[bucket] = due, [0.0] * len(start.paid[bucket])
                found.append((ascent, start))
            return found
        barred = ascent.barred.get(choice, numpy.zeros(len(few), dtype=bool))
        return [(ascent.at(ascent.per_byte, {**ascent.barred, choice: barred | mask}), state.copy()) for mask in (few, ~few)]

    def undecided_bucket(self, ascent: Ascent, state: State) -> tuple[float, int]:
        """The bucket with the largest part of its price that no member pays; that part and its number."""
        open_ = [
            (bucket.seconds - sum(paid), number)
            for number, (bucket, paid, due) in enumerate(zip(ascent.buckets, state.paid, state.due, strict=True))
            if due is None and bucket.members
        ]
        return max(open_, default=(0.0, -1))

    def undecided_bytes(self, bound: float, ascent: Ascent, state: State) -> tuple[float, int, Mask]:
        """The choice whose strategies that can still win differ most in bytes: their price, the choice, and which have few."""
        best = (0.0, -1, numpy.zeros(0, dtype=bool))
        if not ascent.per_byte:
            return best
        for choice, bounds in enumerate(ascent.bounds(state.copy(), bound)):
            size = ascent.bytes[choice]
            near = size[bounds <= max(self.seconds, float(bounds.min()))]
            low, high = float(near.min()), float(near.max())
            if ascent.per_byte * (high - low) > best[0]:
                best = ascent.per_byte * (high - low), choice, size <= (low + high) / 2
        return best
