"""The planning problem as numbers: what can be chosen, what it costs, which limits hold. No torch, no graph."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy
from numpy.typing import NDArray

Matrix = NDArray[numpy.float64]


@dataclass(frozen=True)
class Choice:
    """A node (standing for all its copies): the seconds of each of its strategies, and the strategies that pins allow."""

    name: str
    seconds: tuple[float, ...]
    allowed: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Link:
    """A tensor between its producer and its consumers.

    Layouts are numbered per link. The producer's strategy s makes layout `made[s]`; strategy s of consumer (c, wanted)
    wants `wanted[s]`. `seconds[a, b]` is the price of the conversion from a to b, paid once however many consumers want it;
    infinite where it is impossible, 0 between equal layouts.
    """

    name: str
    producer: int
    made: tuple[int, ...]
    consumers: tuple[tuple[int, tuple[int, ...]], ...]
    seconds: Matrix


@dataclass(frozen=True)
class Bucket:
    """A fixed price, paid once if any of its members (link, from, to) is used: the start-up time of merged collectives."""

    name: str
    seconds: float
    members: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True, eq=False)
class Saved:
    """What is held of a link's tensor: a version of it in every layout in which a saver has it. Any share of that may be made again.

    Where some bytes of a version are dearer to make again than others, there are several of these, with the same savers.

    Attributes:
        link: number of the link.
        savers: places among the link's ends, of which the producer is 0 and the consumers follow.
        bytes: [a, b] are held once if the tensor is made in layout a and saved in b.
        again: [a, b] are the seconds of making all of that again instead; infinite where it must be kept.
    """

    link: int
    savers: tuple[int, ...]
    bytes: Matrix
    again: Matrix


@dataclass(frozen=True)
class Memory:
    """Bytes per device: `held` for good per (choice, strategy), what is `saved`, and the largest of `working`."""

    held: tuple[tuple[float, ...], ...]
    saved: tuple[Saved, ...]
    working: tuple[tuple[float, ...], ...]


@dataclass(frozen=True, eq=False)
class Overlap:
    """What may run at the same time: compute, and conversions beside it. The shorter of the two is hidden.

    Attributes:
        compute: choice → the seconds of each of its strategies that count here.
        conversions: link → the seconds [a, b] of its conversions that count here, no more than they cost.
    """

    name: str
    compute: dict[int, tuple[float, ...]]
    conversions: dict[int, Matrix]


@dataclass(frozen=True)
class Problem:
    """Choose one strategy per node so that the total time is least and memory stays within `limit` bytes (None: no limit).

    What is saved is kept, unless the limit asks for bytes: then the shares that cost the fewest seconds per byte are made again.
    """

    choices: tuple[Choice, ...]
    links: tuple[Link, ...]
    buckets: tuple[Bucket, ...]
    memory: Memory
    limit: float | None
    overlaps: tuple[Overlap, ...] = ()


@dataclass(frozen=True)
class Version:
    """A saved version of a tensor under one strategy per choice: link, layout made, layout saved; its bytes, its seconds again."""

    link: int
    made: int
    layout: int
    bytes: float
    again: float


def everything_kept(problem: Problem) -> Problem:
    """The same problem, in which nothing may be made again."""
    saved = tuple(replace(one, again=numpy.full_like(one.bytes, numpy.inf)) for one in problem.memory.saved)
    return replace(problem, memory=replace(problem.memory, saved=saved))


def conversions_of(problem: Problem, chosen: Sequence[int]) -> set[tuple[int, int, int]]:
    """Every (link, layout made, layout wanted) that differs, under one strategy per choice."""
    used = set()
    for number, link in enumerate(problem.links):
        source = link.made[chosen[link.producer]]
        used |= {(number, source, w) for consumer, wanted in link.consumers if (w := wanted[chosen[consumer]]) != source}
    return used


def versions_of(problem: Problem, chosen: Sequence[int]) -> Iterator[Version]:
    """What is saved under one strategy per choice."""
    for one in problem.memory.saved:
        link = problem.links[one.link]
        made = link.made[chosen[link.producer]]
        ends = (link.consumers[place - 1] for place in one.savers if place)
        layouts = {wanted[chosen[choice]] for choice, wanted in ends} | ({made} if 0 in one.savers else set())
        for layout in sorted(layouts):
            if size := float(one.bytes[made, layout]):
                yield Version(one.link, made, layout, size, float(one.again[made, layout]))


def made_again(problem: Problem, chosen: Sequence[int]) -> tuple[tuple[Version, float], ...]:
    """What the limit asks not to keep, and which share of it: fewest seconds per byte first (a fractional knapsack; Dantzig 1957)."""
    if problem.limit is None:
        return ()
    versions = list(versions_of(problem, chosen))
    missing = _fixed_bytes(problem, chosen) + sum(version.bytes for version in versions) - problem.limit
    found = []
    for version in sorted(versions, key=lambda version: version.again / version.bytes):
        if missing <= 0 or version.again == numpy.inf:
            break
        found.append((version, min(1.0, missing / version.bytes)))
        missing -= version.bytes
    return tuple(found)


def seconds_of(problem: Problem, chosen: Sequence[int]) -> float:
    """The total time of one strategy per choice."""
    total = sum(choice.seconds[strategy] for choice, strategy in zip(problem.choices, chosen, strict=True))
    used = conversions_of(problem, chosen)
    total += sum(float(problem.links[link].seconds[source, target]) for link, source, target in used)
    total += sum(bucket.seconds for bucket in problem.buckets if any(member in used for member in bucket.members))
    total -= sum(min(sides_of(overlap, chosen, used)) for overlap in problem.overlaps)
    return total + sum(share * version.again for version, share in made_again(problem, chosen))


def sides_of(overlap: Overlap, chosen: Sequence[int], used: set[tuple[int, int, int]]) -> tuple[float, float]:
    """Seconds of compute, and of conversions, that may run at the same time."""
    compute = sum(seconds[chosen[choice]] for choice, seconds in overlap.compute.items())
    return compute, sum(float(overlap.conversions[link][source, target]) for link, source, target in used if link in overlap.conversions)


def bytes_of(problem: Problem, chosen: Sequence[int]) -> float:
    """The peak bytes per device of one strategy per choice."""
    total = _fixed_bytes(problem, chosen) + sum(version.bytes for version in versions_of(problem, chosen))
    return total - sum(share * version.bytes for version, share in made_again(problem, chosen))


def fits(problem: Problem, chosen: Sequence[int]) -> bool:
    """Whether one strategy per choice keeps the limit, up to rounding."""
    return problem.limit is None or bytes_of(problem, chosen) <= problem.limit * (1 + 1e-12)


def _fixed_bytes(problem: Problem, chosen: Sequence[int]) -> float:
    """Bytes of what is held for good and of what is in work."""
    memory = problem.memory
    total = sum(held[strategy] for held, strategy in zip(memory.held, chosen, strict=True))
    return total + max((working[strategy] for working, strategy in zip(memory.working, chosen, strict=True)), default=0.0)
