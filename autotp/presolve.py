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

from autotp.bounds import TIE, Ascent, Index, Mask, State, Vector
from autotp.problem import Matrix, Problem, bytes_of, conversions_of, fits, seconds_of, sides_of, versions_of

SWEEPS = 4
"""Sweeps there and back over the choices between two looks at the bound."""
DEAREST = 1e-3
"""Seconds per byte at which nothing counts but bytes."""
MANY = 0.8
"""The problem is made smaller before branching if no more than this part of its strategies is left."""
PRICES = 10
"""How many prices per byte are tried at most between two decisions."""
TRIES = 8
"""How often the shares of overlaps are halved."""
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
    search.climb(parts.at(DEAREST, {}, parts.shares), parts.start())
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


@dataclass(frozen=True, eq=False)
class _Line:
    """What a plan costs at a price per byte: its time, what is made again because that is cheaper, and all bytes beyond the limit."""

    chosen: tuple[int, ...]
    seconds: float
    beyond: float
    sizes: Vector
    again: Vector

    def at(self, per_byte: float) -> float:
        """Seconds at a price per byte."""
        return self.seconds + per_byte * self.beyond + float(numpy.minimum(per_byte * self.sizes, self.again).sum())

    def slope(self, per_byte: float) -> float:
        """Bytes beyond the limit that are paid for at a price."""
        return self.beyond + float(self.sizes[per_byte * self.sizes < self.again].sum())


@dataclass
class _Node:
    """A part of the search: some strategies barred, some buckets decided; its bound, and the prices and moved amounts that prove it."""

    bound: float
    per_byte: float
    barred: dict[int, Mask]
    state: State
    shares: tuple[float, ...]


@dataclass
class _Search:
    """Prices per byte and branching, with the best plan and the bound so far."""

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
    lines: dict[tuple[int, ...], _Line] = field(default_factory=dict)
    last: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        self.allowed = [numpy.array(choice.allowed, dtype=numpy.int64) for choice in self.problem.choices]
        self.kept = list(self.allowed)

    def run(self) -> None:
        """Find bound and plan, and leave out what cannot win."""
        self.parts = Ascent(self.problem, self.allowed)
        root = _Node(0.0, 0.0, {}, self.parts.start(), self.parts.shares)
        root.bound = self.climb(self.parts, root.state)
        if self.problem.limit is not None and self.chosen is None:  # can it be kept?
            dear = self.parts.at(DEAREST, {}, root.shares)
            least = self.climb(dear, dear.start())
            if least > most(self.problem):
                self.bound = least
                return
        self.balance(root)
        self.tune(root)
        self.bound = root.bound
        if self.drop(root) and not self.closed(root.bound):
            self.allowed = list(self.kept)
            self.parts = Ascent(self.problem, self.allowed)
            root.state = self.parts.start()
            root.bound = max(root.bound, self.climb(self.at(root), root.state))
            self.tune(root)
        self.branch(root)
        self.drop(root)

    def at(self, node: _Node) -> Ascent:
        """The parts of the problem as a node has them."""
        return self.parts.at(node.per_byte, node.barred, node.shares)

    def has(self, node: _Node, chosen: tuple[int, ...]) -> bool:
        """Whether a plan belongs to a node."""
        return not any(barred[self.parts.places[choice].get(chosen[choice], 0)] for choice, barred in node.barred.items())

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
            if found - before <= self.worth(found):
                return found

    def worth(self, bound: float) -> float:
        """Seconds that a bound must still gain for the ascent to go on."""
        return max(PROGRESS * (self.seconds - bound) if self.chosen else 0.0, 1e-6 * abs(bound))

    def offer(self, ascent: Ascent, state: State) -> None:
        """Make plans from a state and keep the best."""
        order = range(len(self.allowed))
        for one in (order, order[::-1]):
            chosen = tuple(int(some[place]) for some, place in zip(self.allowed, ascent.plan(state, one), strict=True))
            self.last = chosen
            if chosen in self.lines:
                continue
            self.lines[chosen] = self.line(chosen)
            found = seconds_of(self.problem, chosen)
            if found < self.seconds and fits(self.problem, chosen):
                self.chosen, self.seconds = chosen, found

    def line(self, chosen: tuple[int, ...]) -> _Line:
        """What a plan costs at any price per byte."""
        free = replace(self.problem, limit=None)
        versions = list(versions_of(free, chosen)) if self.problem.limit is not None else []
        sizes, again = numpy.array([v.bytes for v in versions]), numpy.array([v.again for v in versions])
        beyond = bytes_of(free, chosen) - float(sizes.sum()) - (self.problem.limit or 0.0)
        return _Line(chosen, seconds_of(free, chosen), beyond, sizes, again)

    def tune(self, node: _Node) -> None:
        """Raise a node's bound by the price per byte: the next one to try is where the plans known cost most (Kelley 1960)."""
        if self.problem.limit is None:
            return
        tried, too_dear = [node.per_byte], numpy.inf
        for _ in range(PRICES):
            if self.closed(node.bound) or self.over():
                return
            price, top = self.dearest(node)
            if top - node.bound <= self.worth(node.bound):
                return
            if price >= too_dear:  # the plans known do not tell that: no plan made so far is as small as the bounds allow
                price = (node.per_byte * too_dear) ** 0.5 or too_dear / 8
            if any(abs(price - other) <= 0.02 * price for other in tried):
                return
            tried.append(price)
            before, state = node.per_byte, node.state.copy()
            found = self.climb(self.parts.at(price, node.barred, node.shares), state)
            if found > node.bound:
                node.bound, node.per_byte, node.state = found, price, state
            elif price > before:
                too_dear = price

    def balance(self, node: _Node) -> None:
        """Raise a node's bound by the shares of overlaps: halving between those at which plans convert too much, and too little."""
        shares, state = node.shares, node.state
        low, high = [0.0] * len(shares), [1.0] * len(shares)
        for _ in range(TRIES):
            if not self.last or self.closed(node.bound) or self.over():
                return
            used = conversions_of(self.problem, self.last)
            for place, overlap in enumerate(self.problem.overlaps):
                compute, moved = sides_of(overlap, self.last, used)
                (low if moved > compute else high)[place] = shares[place]
            halved = tuple((least + most) / 2 for least, most in zip(low, high, strict=True))
            if halved == shares:
                return
            shares, state = halved, state.copy()
            found = self.climb(self.parts.at(node.per_byte, node.barred, shares), state)
            if found > node.bound:
                node.bound, node.shares, node.state = found, shares, state

    def dearest(self, node: _Node) -> tuple[float, float]:
        """The price per byte at which the cheapest of the plans known costs most, and that cost."""
        lines = [line for line in self.lines.values() if self.has(node, line.chosen)]
        if not lines:
            return node.per_byte, node.bound

        def cheapest(price: float) -> tuple[float, _Line]:
            return min(((line.at(price), line) for line in lines), key=lambda pair: pair[0])

        low, high = 0.0, node.per_byte or self.first_price()
        while cheapest(high)[1].slope(high) > 0:
            if high >= 8 * node.per_byte + self.first_price():  # so far no plan is small enough
                return high, numpy.inf
            low, high = high, 4 * high
        for _ in range(40):
            price = (low + high) / 2
            low, high = (price, high) if cheapest(price)[1].slope(price) > 0 else (low, price)
        return high, cheapest(high)[0]

    def first_price(self) -> float:
        """Seconds per byte to begin with: all that can be gained for all the bytes there are."""
        spread = sum(max(choice.seconds) - min(choice.seconds) for choice in self.problem.choices)
        return max(self.bound + spread, 1e-9) / max(self.problem.limit or 0.0, 1.0)

    def drop(self, node: _Node) -> bool:
        """Leave out the strategies whose bound exceeds the plan found; whether these are many."""
        if self.chosen is None:
            return False
        ascent = self.at(node)
        bounds_of = ascent.bounds(node.state.copy(), ascent.bound(node.state))
        for choice, (strategies, bounds) in enumerate(zip(self.allowed, bounds_of, strict=True)):
            keep = (bounds <= self.seconds * (1 + 1e-9)) | (strategies == self.chosen[choice])
            self.kept[choice] = strategies[keep]
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
        """The node with a bucket paid or not, or with a choice held to few or to many bytes; none if nothing is worth it."""
        ascent = self.at(node)
        missing, bucket = self.undecided_bucket(ascent, node.state)
        spread, choice, few = self.undecided_bytes(node, ascent)
        if max(missing, spread) < 1e-3 * self.gap * abs(node.bound):
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

    def undecided_bytes(self, node: _Node, ascent: Ascent) -> tuple[float, int, Mask]:
        """The choice whose strategies that can still win differ most in bytes: their price, the choice, and which have few."""
        best = (0.0, -1, numpy.zeros(0, dtype=bool))
        if not node.per_byte:
            return best
        for choice, bounds in enumerate(ascent.bounds(node.state.copy(), node.bound)):
            size = ascent.bytes[choice]
            near = size[bounds <= max(self.seconds, float(bounds.min()))]
            low, high = float(near.min()), float(near.max())
            if node.per_byte * (high - low) > best[0]:
                best = node.per_byte * (high - low), choice, size <= (low + high) / 2
        return best
