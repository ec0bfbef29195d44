"""What a repeated block keeps for backward, and what it makes again there instead: the fastest choice for any number of bytes.

Keeping costs bytes, making again costs the seconds of the call that made it, and whatever that call reads is kept or made again in turn.
At a price per byte the best choice is a minimum cut. Prices from zero up give a ladder of choices, each of which makes again all that
the one before does, with the fewest seconds for its bytes (the lower convex hull). Copies of a block need not stand on the same rung:
just so many climb as the bytes ask for.

The problem is that of Checkmate (Jain et al. 2020, arXiv:1910.02653), which orders arbitrary recomputations by an integer program; here
everything is made again at most once, in backward, which is what makes it a cut. A rung that makes softmax and dropout of attention
again is the selective recomputation of Korthikanti et al. 2022 (arXiv:2205.05198); one that gathers weights again is ZeRO-3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import networkx

from autotp.decisions import Recomputed
from autotp.layouts import Layout
from autotp.program import Ref

FEMTOSECONDS = 10**15
"""Prices are whole numbers here, so that cuts are exact."""


@dataclass(frozen=True)
class Stored:
    """Memory that one copy of a block makes or reads.

    Attributes:
        bytes: what keeping it takes; 0 if it is there anyway.
        saved: whether autograd needs it in backward.
        maker: the number of the call that can make it again; None if it can only be kept.
    """

    bytes: int
    saved: bool
    maker: int | None


@dataclass(frozen=True)
class Maker:
    """A call that can run again: its seconds, and the memory that it reads, by number."""

    seconds: float
    reads: tuple[int, ...]


@dataclass(frozen=True)
class Block:
    """One copy of a repeated block, as backward sees it."""

    stored: tuple[Stored, ...]
    makers: tuple[Maker, ...]


def made_again(block: Block, marked: frozenset[int]) -> frozenset[int]:
    """Those of the marked memory that backward asks for: what is saved, and what is read to make that again."""
    asked: set[int] = set()
    open_ = [number for number, stored in enumerate(block.stored) if stored.saved]
    while open_:
        number = open_.pop()
        if number not in asked:
            asked.add(number)
            maker = block.stored[number].maker
            open_ += block.makers[maker].reads if number in marked and maker is not None else ()
    return marked & asked


def bytes_kept(block: Block, made: frozenset[int]) -> int:
    """Bytes that a copy keeps for backward if it makes `made` again: what is saved, and what the calls read that run again."""
    needed = {number for number, stored in enumerate(block.stored) if stored.saved}
    needed.update(number for maker in _makers(block, made) for number in block.makers[maker].reads)
    return sum(block.stored[number].bytes for number in needed - made)


def seconds_again(block: Block, made: frozenset[int]) -> float:
    """Seconds of the calls that make `made` again; a call with several results runs once."""
    return sum(block.makers[maker].seconds for maker in sorted(_makers(block, made)))


def _makers(block: Block, made: frozenset[int]) -> set[int]:
    return {maker for number in made if (maker := block.stored[number].maker) is not None}


def cheapest(block: Block, per_byte: int, per_femtosecond: int) -> frozenset[int]:
    """The memory to make again so that `per_byte` · bytes kept + `per_femtosecond` · time is least; the largest of equal sets.

    A minimum cut. On the source's side stand, for every memory, "needed" and "made again", and the calls that run again. Cut are: needed
    but not made again, at its bytes; a call that runs, at its time. What is made again needs its call, and that what it reads.
    """
    graph = networkx.DiGraph()
    graph.add_nodes_from("st")
    for number, stored in enumerate(block.stored):
        needed, made = ("needed", number), ("made", number)
        if stored.saved:
            graph.add_edge("s", needed)  # an edge without capacity is never cut
        if stored.maker is None or not stored.bytes:
            graph.add_edge(needed, "t", capacity=stored.bytes * per_byte)
            continue
        graph.add_edge(needed, made, capacity=stored.bytes * per_byte)
        graph.add_edge(made, needed)
        graph.add_edge(made, ("call", stored.maker))
    for number, maker in enumerate(block.makers):
        if ("call", number) in graph:
            graph.add_edge(("call", number), "t", capacity=round(maker.seconds * FEMTOSECONDS) * per_femtosecond)
            graph.add_edges_from((("call", number), ("needed", read)) for read in maker.reads)
    _, (source_side, _) = networkx.minimum_cut(graph, "s", "t", flow_func=networkx.algorithms.flow.boykov_kolmogorov)
    return made_again(block, frozenset(node[1] for node in source_side if node[0] == "made"))


def rungs(block: Block) -> tuple[frozenset[int], ...]:
    """What to make again, for ever higher prices of a byte: from nothing to the fewest bytes; each set contains the one before.

    That they are nested: let A be best at one price and B at a higher one. The cut is submodular, so A ∪ B costs no more than B at A's
    price; it takes no less time, so it keeps no more bytes, so it costs no more than B at B's price either, and is B, the largest of
    equals.
    """

    def point(made: frozenset[int]) -> tuple[int, int]:
        return bytes_kept(block, made), sum(round(block.makers[m].seconds * FEMTOSECONDS) for m in _makers(block, made))

    def between(low: frozenset[int], high: frozenset[int]) -> list[frozenset[int]]:
        (most, least_time), (fewest, most_time) = point(low), point(high)
        per_byte, per_femtosecond = most_time - least_time, most - fewest
        if per_femtosecond <= 0:
            return []
        found = cheapest(block, per_byte, per_femtosecond)
        size, time = point(found)
        if size * per_byte + time * per_femtosecond >= most * per_byte + least_time * per_femtosecond:
            return []
        return [*between(low, found), found, *between(found, high)]

    none: frozenset[int] = frozenset()
    whole = 1 + sum(round(maker.seconds * FEMTOSECONDS) for maker in block.makers)
    all_ = cheapest(block, whole, 1)
    if bytes_kept(block, all_) == bytes_kept(block, none):
        return (none,)
    return (none, *between(none, all_), all_)


@dataclass(frozen=True)
class Rung:
    """One choice for a copy of a block: what it makes again, the seconds that takes, and the bytes that it keeps less for it."""

    versions: frozenset[tuple[Ref, Layout]]
    seconds: float
    bytes: int


@dataclass(frozen=True)
class Ladder:
    """The choices for the copies of a repeat, from the fewest bytes saved to the most; each makes again what the one before does."""

    repeat: int
    copies: int
    rungs: tuple[Rung, ...]


@dataclass(frozen=True)
class Recomputation:
    """What is made again in a whole model, in seconds a step and bytes that a rank keeps less for backward."""

    recomputed: tuple[Recomputed, ...] = ()
    seconds: float = 0.0
    bytes: int = 0


def recomputation(ladders: Sequence[Ladder], bytes: float) -> Recomputation:
    """The fastest way to keep so many bytes less; all that can be saved if that is not enough.

    Copies climb one by one, the step of most bytes per second first: no way is faster for the very bytes that it saves. What the last
    step saves too much, earlier ones need not.
    """
    steps: list[tuple[float, int, int, int, float]] = []
    for place, ladder in enumerate(ladders):
        for level, (low, high) in enumerate(pairwise((Rung(frozenset(), 0.0, 0), *ladder.rungs))):
            saved, seconds = high.bytes - low.bytes, high.seconds - low.seconds
            steps.append((seconds / saved, place, level, saved, seconds))
    steps.sort()
    climbed = [[0] * len(ladder.rungs) for ladder in ladders]
    missing: float = bytes
    for _, place, level, saved, _ in steps:
        if missing <= 0:
            break
        climbed[place][level] = count = min(ladders[place].copies, int(-(-missing // saved)))
        missing -= count * saved
    for _, place, level, saved, _ in reversed(steps):
        above = climbed[place][level + 1] if level + 1 < len(climbed[place]) else 0
        less = min(int(-missing // saved), climbed[place][level] - above) if missing < 0 else 0
        climbed[place][level] -= less
        missing += less * saved
    found = [entry for ladder, counts in zip(ladders, climbed, strict=True) for entry in _entries(ladder, counts)]
    taken = [(climbed[place][level], saved, seconds) for _, place, level, saved, seconds in steps]
    return Recomputation(
        tuple(found), sum(count * seconds for count, _, seconds in taken), sum(count * saved for count, saved, _ in taken)
    )


def _entries(ladder: Ladder, climbed: Sequence[int]) -> list[Recomputed]:
    """How many copies stand on each rung, the highest first."""
    above = 0
    found = []
    for rung, count in reversed(list(zip(ladder.rungs, climbed, strict=True))):
        if count > above:
            found.append(Recomputed(ladder.repeat, count - above, rung.versions))
            above = count
    return found
