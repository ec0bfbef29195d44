"""Bounds of all plans: amounts are moved between the parts of a planning problem until the least of each part adds up to much.

What a plan costs is a sum over its choices, its links (the conversions of one tensor) and its buckets. Moving amounts between these
leaves every plan's sum as it was (block-coordinate ascent on the dual of the linear relaxation; Kolmogorov 2015, "A new look at
reweighted message passing for probabilistic energy minimization"). The least of each part then adds up to a bound that no plan beats;
with one strategy held fixed it bounds the plans that use it. Where compute and conversions run at the same time, a step takes the longer of
both, hence at least any weighted mean of them: they are priced by such shares. A memory limit enters as a price per byte (a Lagrange
multiplier), for any value of which the bounds hold.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, reduce

import numpy
from numpy.typing import NDArray

from autotp.dual import Multipliers
from autotp.problem import Link, Problem, Saved

Vector = NDArray[numpy.float64]
Index = NDArray[numpy.int64]
Mask = NDArray[numpy.bool_]

IMPOSSIBLE = 1e9
"""Seconds in place of infinity, so that differences stay numbers."""
TIE = 1e-13
"""Seconds added per strategy number, so that equal plans are resolved in favour of the first listed."""
SHARERS = 4
"""Consumers whose shared conversions are bounded together; more are bounded in groups, each with its part of the price."""


# ---- the parts of a problem -----------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Star:
    """Conversions of one tensor for up to `SHARERS` consumers.

    Attributes:
        seconds: price of every pair (layout made, layout wanted).
        saved: parts of what a saver holds of every pair, in bytes, and the seconds of making that again; none if no consumer saves.
        saves: for each end, whether it is a saver. A producer that is one pays for itself.
        ends: the choices that it joins, the producer first.
        at: for each end, the place of each strategy's layout in the rows (producer) or columns (consumers).
        offered: for each end, the places that occur.
        beside: number of an overlap → the seconds of every pair that may run beside its compute.
    """

    seconds: Vector
    saved: tuple[tuple[Vector, Vector], ...]
    saves: tuple[bool, ...]
    ends: tuple[int, ...]
    at: tuple[Index, ...]
    offered: tuple[Index, ...]
    beside: tuple[tuple[int, Vector], ...] = ()

    def prices(self, per_byte: float, shares: Sequence[float]) -> Pair:
        """The price of every pair for those who do not save it, and for those who do."""
        seconds = self.seconds
        for overlap, hidden in self.beside:
            seconds = seconds - (1 - shares[overlap]) * hidden
        if not self.saved or not per_byte:
            return seconds, seconds
        saved = seconds + sum(numpy.minimum(per_byte * size, again) for size, again in self.saved)
        return (saved, saved) if all(self.saves[1:]) else (seconds, saved)


Pair = tuple[Vector, Vector]


def _stars(problem: Problem, allowed: Sequence[Index]) -> tuple[list[_Star], list[list[int]]]:
    """The stars of all links, and for each link the numbers of its stars."""
    stars: list[_Star] = []
    of_link: list[list[int]] = []
    saved: dict[int, list[Saved]] = {}
    for part in problem.memory.saved if problem.limit is not None else ():
        saved.setdefault(part.link, []).append(part)
    for number, link in enumerate(problem.links):
        starts = range(0, len(link.consumers), SHARERS)
        of_link.append(list(range(len(stars), len(stars) + len(starts))))
        for start in starts:
            beside = tuple((place, one.conversions[number]) for place, one in enumerate(problem.overlaps) if number in one.conversions)
            chunk = range(start, min(start + SHARERS, len(link.consumers)))
            stars.append(_star(allowed, link, saved.get(number, []), chunk, len(starts), beside))
    return stars, of_link


def _star(
    allowed: Sequence[Index], link: Link, saved: Sequence[Saved], chunk: Sequence[int], parts: int, beside: Sequence[tuple[int, Vector]]
) -> _Star:
    ends = ((link.producer, link.made), *(link.consumers[place] for place in chunk))
    layouts = [numpy.array(of, dtype=numpy.int64)[allowed[choice]] for choice, of in ends]
    rows, columns = numpy.unique(layouts[0]), numpy.unique(numpy.concatenate(layouts[1:]))
    pairs = numpy.ix_(rows, columns)
    seconds = numpy.minimum(link.seconds[pairs] / parts, IMPOSSIBLE)
    savers = saved[0].savers if saved else ()
    saves = (False, *(place + 1 in savers for place in chunk))
    held = []
    for part in saved if any(saves) else ():
        size = part.bytes[pairs] / parts
        if 0 in savers:
            size = numpy.where(rows[:, None] == columns[None, :], 0.0, size)
        held.append((size, part.again[pairs] / parts))
    at = tuple(numpy.searchsorted(rows if end == 0 else columns, one) for end, one in enumerate(layouts))
    hidden = tuple((place, one[pairs] / parts) for place, one in beside)
    return _Star(seconds, tuple(held), saves, tuple(choice for choice, _ in ends), at, tuple(numpy.unique(one) for one in at), hidden)


@dataclass(frozen=True, eq=False)
class _Merged:
    """A bucket: its seconds, and the conversions (star, pairs) of which any one makes it due."""

    seconds: float
    members: tuple[tuple[int, Mask], ...]


def _merged(problem: Problem, stars: Sequence[_Star], of_link: Sequence[Sequence[int]], allowed: Sequence[Index]) -> list[_Merged]:
    """Every bucket, with those of its members that have one consumer; leaving members out keeps the bound a bound."""
    found = []
    for bucket in problem.buckets:
        pairs: dict[int, list[tuple[int, int]]] = {}
        for number, made, wanted in bucket.members:
            if len(problem.links[number].consumers) == 1:
                pairs.setdefault(number, []).append((made, wanted))
        members = []
        for number, wanted_pairs in pairs.items():
            link, star = problem.links[number], stars[of_link[number][0]]
            rows = dict(zip((link.made[s] for s in allowed[link.producer]), star.at[0].tolist(), strict=True))
            choice, layouts = link.consumers[0]
            columns = dict(zip((layouts[s] for s in allowed[choice]), star.at[1].tolist(), strict=True))
            mask = numpy.zeros(star.seconds.shape, dtype=bool)
            for made, wanted in wanted_pairs:
                if made in rows and wanted in columns:
                    mask[rows[made], columns[wanted]] = True
            if mask.any():
                members.append((of_link[number][0], mask))
        found.append(_Merged(bucket.seconds, tuple(members)))
    return found


@cache
def _groups(items: tuple[int, ...]) -> tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]:
    """Every nonempty subset, smaller ones first, with what is left of `items`."""
    found: list[tuple[int, ...]] = [()]
    for item in items:
        found += [(*subset, item) for subset in found]
    ordered = sorted(found, key=len)
    return tuple((subset, tuple(item for item in items if item not in subset)) for subset in ordered if subset)


def _least(price: Pair, saves: Sequence[bool], parts: Sequence[Vector], end: int) -> Vector:
    """The least that a star costs for every layout of one end, whatever the others are; `parts[end]` is left out.

    Consumers that want the same layout share its conversion: the others are parted into groups that share one.
    """
    if len(parts) == 2:
        alone: Vector = (price[1] + parts[1]).min(1) if end == 0 else (price[1] + parts[0][:, None]).min(0)
        return alone
    others = tuple(number for number in range(1, len(parts)) if number != end)
    together = {group: (price[any(saves[number] for number in group)] + _sum(parts, group)).min(1) for group, _ in _groups(others)}
    best: dict[tuple[int, ...], Vector] = {(): numpy.zeros(len(parts[0]))}
    for group, _ in _groups(others):
        best[group] = reduce(
            numpy.minimum, (together[first] + best[rest] for first, rest in _groups(group) if first[0] == group[0])
        )
    if end == 0:
        return best[others]
    found: Vector = (price[saves[end]] + (parts[0] + best[others])[:, None]).min(0)
    for group, rest in _groups(others):  # these share this end's conversion
        paid = price[saves[end] or any(saves[number] for number in group)]
        found = numpy.minimum(found, (paid + (parts[0] + best[rest])[:, None]).min(0) + _sum(parts, group))
    return found


def _sum(parts: Sequence[Vector], numbers: tuple[int, ...]) -> Vector:
    total: Vector = reduce(numpy.add, (parts[number] for number in numbers))
    return total


# ---- the ascent -----------------------------------------------------------------------------------------------------


@dataclass
class State:
    """What has been moved: from every star to each of its ends (by layout), and from every bucket to its members.

    `due` says of a bucket that it is paid (True), that its members are forbidden (False), or neither (None).
    """

    moved: list[list[Vector]]
    paid: list[list[float]]
    due: list[bool | None]

    def copy(self) -> State:
        """The same, to be changed on its own."""
        return State([[one.copy() for one in ends] for ends in self.moved], [list(row) for row in self.paid], list(self.due))


class Ascent:
    """A problem's parts at some multipliers, and the moves between them."""

    def __init__(self, problem: Problem, allowed: Sequence[Index]) -> None:
        self.problem, self.allowed = problem, allowed
        self.places = [{int(strategy): place for place, strategy in enumerate(some)} for some in allowed]
        self.stars, of_link = _stars(problem, allowed)
        self.buckets = _merged(problem, self.stars, of_link, allowed)
        self.ends_of: list[list[tuple[int, int]]] = [[] for _ in allowed]
        for number, star in enumerate(self.stars):
            for end, choice in enumerate(star.ends):
                self.ends_of[choice].append((number, end))
        self.onward, self.backward = self._neighbours(1), self._neighbours(-1)
        self.seconds = [
            numpy.array([choice.seconds[s] for s in some]) + TIE * some for choice, some in zip(problem.choices, allowed, strict=True)
        ]
        memory = problem.memory
        self.bytes = [numpy.array([held[s] for s in some]) for held, some in zip(memory.held, allowed, strict=True)]
        self.own_saved: dict[int, list[tuple[Vector, Vector]]] = {}
        for saved in memory.saved:
            if 0 in saved.savers:
                link = problem.links[saved.link]
                made = numpy.array(link.made, dtype=numpy.int64)[allowed[link.producer]]
                self.own_saved.setdefault(link.producer, []).append((saved.bytes[made, made], saved.again[made, made]))
        working = zip(memory.working, allowed, strict=True)
        self.least_working = max((min(row[s] for s in some) for row, some in working), default=0.0)
        self.beside: list[list[tuple[int, Vector]]] = [[] for _ in allowed]
        for place, overlap in enumerate(problem.overlaps):
            for choice, one in overlap.compute.items():
                self.beside[choice].append((place, numpy.array([one[s] for s in allowed[choice]])))
        self.multipliers = Multipliers(0.0, (0.5,) * len(problem.overlaps))
        self.barred: dict[int, Mask] = {}
        self.set_prices()

    def at(self, multipliers: Multipliers, barred: dict[int, Mask]) -> Ascent:
        """The same parts at other multipliers, without the strategies barred of some choices."""
        other = copy.copy(self)
        other.multipliers, other.barred = multipliers, barred
        other.set_prices()
        return other

    def set_prices(self) -> None:
        """Seconds of choices and conversions, with what their bytes cost."""
        per_byte, shares = self.multipliers.per_byte, self.multipliers.shares
        self.price: list[Pair] = [star.prices(per_byte, shares) for star in self.stars]
        self.own = [seconds + per_byte * size for seconds, size in zip(self.seconds, self.bytes, strict=True)]
        for choice, beside in enumerate(self.beside):
            for overlap, hidden in beside:
                self.own[choice] -= shares[overlap] * hidden
        for choice, saved in self.own_saved.items():
            self.own[choice] += sum(numpy.minimum(per_byte * size, again) for size, again in saved)
        for choice, barred in self.barred.items():
            self.own[choice] = self.own[choice] + IMPOSSIBLE * barred
        limit = self.problem.limit
        self.constant = per_byte * (self.least_working - limit) if limit is not None else 0.0

    def _neighbours(self, sign: int) -> list[list[tuple[int, int]]]:
        """For every choice, its stars that reach a choice which comes later (earlier, for sign -1)."""
        return [
            [(number, end) for number, end in ends if any(sign * other > sign * choice for other in self.stars[number].ends)]
            for choice, ends in enumerate(self.ends_of)
        ]

    def start(self) -> State:
        """Nothing moved yet; what an end does not offer is impossible for it."""
        moved = []
        for star in self.stars:
            rows, columns = star.seconds.shape
            ends = [numpy.full(rows if end == 0 else columns, -IMPOSSIBLE) for end in range(len(star.ends))]
            for one, offered in zip(ends, star.offered, strict=True):
                one[offered] = 0.0
            moved.append(ends)
        return State(moved, [[0.0] * len(bucket.members) for bucket in self.buckets], [None] * len(self.buckets))

    def prices(self, state: State) -> list[Pair]:
        """The price of every star's pairs, with what buckets have moved there."""
        prices = list(self.price)
        for bucket, paid, due in zip(self.buckets, state.paid, state.due, strict=True):
            for (number, mask), amount in zip(bucket.members, paid, strict=True):
                extra = 0.0 if due else IMPOSSIBLE if due is False else amount
                if extra:
                    added = prices[number][1] + extra * mask  # such a star has one consumer
                    prices[number] = added, added
        return prices

    def total(self, state: State, choice: int) -> Vector:
        """What each strategy of a choice costs with all that was moved there."""
        found: Vector = self.own[choice].copy()
        for number, end in self.ends_of[choice]:
            found += state.moved[number][end][self.stars[number].at[end]]
        return found

    def collect(self, state: State, prices: Sequence[Pair], choice: int) -> None:
        """Move to a choice the least that its stars cost with each of its strategies."""
        for number, end in self.ends_of[choice]:
            moved = state.moved[number]
            offered = self.stars[number].offered[end]
            gained = _least(prices[number], self.stars[number].saves, [-one for one in moved], end) - moved[end]
            moved[end][offered] += gained[offered]

    def hand_on(self, state: State, choice: int, links: Sequence[tuple[int, int]], share: int) -> None:
        """Move to each of some stars a part, 1 / share, of what a choice costs."""
        total = self.total(state, choice)
        for number, end in links:
            star = self.stars[number]
            by_layout = numpy.full(len(state.moved[number][end]), numpy.inf)
            numpy.minimum.at(by_layout, star.at[end], total)
            state.moved[number][end][star.offered[end]] -= by_layout[star.offered[end]] / share

    def sweep(self, state: State) -> None:
        """One pass over the choices there, one back, one over the buckets."""
        prices = self.prices(state)
        for order, links, others in ((1, self.onward, self.backward), (-1, self.backward, self.onward)):
            for choice in range(len(self.own))[::order]:
                self.collect(state, prices, choice)
                self.hand_on(state, choice, links[choice], max(len(links[choice]), len(others[choice]), 1))
        for number, bucket in enumerate(self.buckets):
            if state.due[number] is None:
                self.share_out(state, bucket, state.paid[number])

    def share_out(self, state: State, bucket: _Merged, paid: list[float]) -> None:
        """Let those members pay for a bucket that would use it nevertheless."""
        for place, (number, mask) in enumerate(bucket.members):
            star, moved = self.stars[number], state.moved[number]
            for end, choice in enumerate(star.ends):
                self.hand_on(state, choice, [(number, end)], 1)
            table = self.price[number][1] + paid[place] * mask - moved[0][:, None] - moved[1][None, :]
            otherwise = table[~mask].min() if not mask.all() else IMPOSSIBLE
            gain = float(otherwise - table[mask].min())
            paid[place] += min(gain, bucket.seconds - sum(paid)) if gain > 0 else -min(paid[place], -gain)

    def least_of(self, state: State, prices: Sequence[Pair], number: int) -> float:
        """The least that is left on a star."""
        parts = [-one for one in state.moved[number]]
        return float((parts[0] + _least(prices[number], self.stars[number].saves, parts, 0)).min())

    def bound(self, state: State) -> float:
        """No plan costs less."""
        prices = self.prices(state)
        found = self.constant + sum(float(self.total(state, choice).min()) for choice in range(len(self.own)))
        found += sum(self.least_of(state, prices, number) for number in range(len(self.stars)))
        return found + sum(bucket.seconds for bucket, due in zip(self.buckets, state.due, strict=True) if due)

    def bounds(self, state: State, found: float) -> list[Vector]:
        """For every choice, the bound with each of its strategies held fixed; `found` is the bound as it is. Changes the state."""
        prices = self.prices(state)
        result = []
        for choice in range(len(self.own)):
            stars = {number for number, _ in self.ends_of[choice]}
            before = float(self.total(state, choice).min()) + sum(self.least_of(state, prices, number) for number in stars)
            self.collect(state, prices, choice)
            total = self.total(state, choice)
            found += float(total.min()) + sum(self.least_of(state, prices, number) for number in stars) - before
            result.append(found - total.min() + total)
        return result

    def sides(self, near: Sequence[Mask]) -> Iterator[tuple[int, int, Vector]]:
        """A choice, an overlap, and what each strategy adds to one of its sides: compute, or the least conversions.

        Args:
            near: of each choice the strategies that others may meet.
        """
        for choice, beside in enumerate(self.beside):
            for overlap, seconds in beside:
                yield choice, overlap, seconds
        for star in self.stars:
            wanted = numpy.unique(numpy.concatenate([at[near[choice]] for choice, at in zip(star.ends[1:], star.at[1:], strict=True)]))
            for overlap, moved in star.beside:
                yield star.ends[0], overlap, moved[:, wanted].min(1)[star.at[0]]

    def plan(self, state: State, order: Sequence[int]) -> list[int]:
        """Places of strategies: choice by choice, the best in view of what is chosen already and of the bounds for what is not."""
        prices = self.prices(state)
        fixed: dict[int, int] = {}
        for choice in order:
            cost = self.own[choice].copy()
            for number, end in self.ends_of[choice]:
                star, parts = self.stars[number], [-one for one in state.moved[number]]
                for other, owner in enumerate(star.ends):
                    if owner in fixed:
                        place = star.at[other][fixed[owner]]
                        parts[other] = numpy.full(len(parts[other]), IMPOSSIBLE)
                        parts[other][place] = 0.0
                cost += _least(prices[number], star.saves, parts, end)[star.at[end]]
            fixed[choice] = int(cost.argmin())
        return [fixed[choice] for choice in range(len(self.own))]
