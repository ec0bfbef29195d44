"""The planning problem as numbers: what can be chosen, what it costs, which limits hold. No torch, no graph."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Choice:
    """A node (standing for all its copies): the seconds of each of its strategies, and the strategies that pins allow."""

    name: str
    seconds: tuple[float, ...]
    allowed: tuple[int, ...]


@dataclass(frozen=True)
class Link:
    """A tensor between its producer and its consumers.

    Layouts are numbered per tensor. The producer's strategy s makes layout `made[s]`; strategy s of consumer (c, wanted)
    wants `wanted[s]`. `seconds[a, b]` is the price of the conversion from a to b, paid once however many consumers want it;
    a pair that is missing is impossible, equal layouts cost nothing.
    """

    name: str
    producer: int
    made: tuple[int, ...]
    consumers: tuple[tuple[int, tuple[int, ...]], ...]
    seconds: dict[tuple[int, int], float]


@dataclass(frozen=True)
class Bucket:
    """A fixed price, paid once if any of its members (link, from, to) is used: the start-up time of merged collectives."""

    name: str
    seconds: float
    members: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class Keep:
    """Bytes that are held once if any (choice, strategies) of `wanted` is chosen: a tensor saved by several consumers."""

    bytes: float
    wanted: tuple[tuple[int, tuple[int, ...]], ...]


@dataclass(frozen=True)
class Memory:
    """Bytes per device: `held` per (choice, strategy) and per conversion used, shared `keeps`, and the largest of `working`."""

    held: tuple[tuple[float, ...], ...]
    converted: dict[tuple[int, int, int], float]
    keeps: tuple[Keep, ...]
    working: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Problem:
    """Choose one strategy per node so that the total time is least and memory stays within `limit` bytes (None: no limit)."""

    choices: tuple[Choice, ...]
    links: tuple[Link, ...]
    buckets: tuple[Bucket, ...]
    memory: Memory
    limit: float | None


def conversions_of(problem: Problem, chosen: Sequence[int]) -> set[tuple[int, int, int]]:
    """Every (link, layout made, layout wanted) that differs, under one strategy per choice."""
    used = set()
    for number, link in enumerate(problem.links):
        source = link.made[chosen[link.producer]]
        used |= {(number, source, w) for consumer, wanted in link.consumers if (w := wanted[chosen[consumer]]) != source}
    return used


def seconds_of(problem: Problem, chosen: Sequence[int]) -> float:
    """The total time of one strategy per choice."""
    total = sum(choice.seconds[strategy] for choice, strategy in zip(problem.choices, chosen, strict=True))
    used = conversions_of(problem, chosen)
    total += sum(problem.links[link].seconds.get((source, target), float("inf")) for link, source, target in used)
    total += sum(bucket.seconds for bucket in problem.buckets if any(member in used for member in bucket.members))
    return total


def bytes_of(problem: Problem, chosen: Sequence[int]) -> float:
    """The peak bytes per device of one strategy per choice."""
    memory = problem.memory
    total = sum(held[strategy] for held, strategy in zip(memory.held, chosen, strict=True))
    total += sum(memory.converted.get(used, 0.0) for used in conversions_of(problem, chosen))
    total += sum(keep.bytes for keep in memory.keeps if any(chosen[c] in strategies for c, strategies in keep.wanted))
    return total + max(
        (working[strategy] for working, strategy in zip(memory.working, chosen, strict=True)), default=0.0
    )
