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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import networkx

from autotp.decisions import Recomputed
from autotp.layouts import Layout
from autotp.program import Ref


@dataclass(frozen=True)
class Stored:
    """Memory that one copy of a block makes or reads.

    Attributes:
        bytes: what keeping it takes; 0 if it is there anyway.
        saved: whether autograd needs it in backward.
        maker: the number of the call that makes it again when it runs again; None if it can only be kept.
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


def asked_for(block: Block, marked: frozenset[int]) -> frozenset[int]:
    """Those of the marked calls that run in backward: they make what is saved, or what one of them reads."""
    saved = (stored.maker for stored in block.stored if stored.saved)
    running, waiting = set[int](), [maker for maker in saved if maker in marked]
    while waiting:
        call = waiting.pop()
        if call is not None and call not in running:
            running.add(call)
            waiting += [maker for number in block.makers[call].reads if (maker := block.stored[number].maker) in marked]
    return frozenset(running)


def bytes_kept(block: Block, running: frozenset[int]) -> int:
    """Bytes that a copy keeps for backward if these calls run again: of what is saved, and of what the calls read, all that they do not
    make.
    """
    needed = {number for number, stored in enumerate(block.stored) if stored.saved}
    needed.update(number for call in running for number in block.makers[call].reads)
    return sum(block.stored[number].bytes for number in needed if block.stored[number].maker not in running)


def seconds_again(block: Block, running: frozenset[int]) -> float:
    """Seconds of calls that run again."""
    return sum(block.makers[call].seconds for call in sorted(running))


def cheapest(block: Block, per_byte: int, per_femtosecond: int) -> frozenset[int]:
    """The calls to run again so that `per_byte` · bytes kept + `per_femtosecond` · time is least; the largest of equal sets.

    A minimum cut. On the source's side stand the memory that is needed and the calls that run again. Cut are the edge from needed memory
    to a maker that does not run, at its bytes, and the edge from a call that runs to the sink, at its time. A call needs what it reads.
    """
    graph = networkx.DiGraph()
    graph.add_nodes_from("st")
    for number, stored in enumerate(block.stored):
        needed = ("needed", number)
        if stored.saved:
            graph.add_edge("s", needed)  # an edge without capacity is never cut
        if stored.bytes:
            graph.add_edge(needed, "t" if stored.maker is None else ("call", stored.maker), capacity=stored.bytes * per_byte)
    for number, maker in enumerate(block.makers):
        graph.add_edge(("call", number), "t", capacity=femtoseconds(maker) * per_femtosecond)
        graph.add_edges_from((("call", number), ("needed", read)) for read in maker.reads)
    _, (source_side, _) = networkx.minimum_cut(graph, "s", "t", flow_func=networkx.algorithms.flow.boykov_kolmogorov)
    return asked_for(block, frozenset(node[1] for node in source_side if node[0] == "call"))


def rungs(block: Block) -> tuple[frozenset[int], ...]:
    """The calls that run again, for ever higher prices of a byte: from none to the fewest bytes; each set contains the one before.

    That they are nested: let A be best at one price and B at a higher one. The cut is submodular, so A ∪ B costs no more than B at A's
    price; it takes no less time, so it keeps no more bytes, so it costs no more than B at B's price either, and is B, the largest of
    equals.
    """

    def point(running: frozenset[int]) -> tuple[int, int]:
        return bytes_kept(block, running), sum(femtoseconds(block.makers[call]) for call in running)

    def between(low: frozenset[int], high: frozenset[int]) -> list[frozenset[int]]:
        (most, short), (fewest, long) = point(low), point(high)
        found = cheapest(block, long - short, most - fewest)
        size, time = point(found)
        if size * (long - short) + time * (most - fewest) >= most * (long - short) + short * (most - fewest):
            return []
        return [*between(low, found), found, *between(found, high)]

    none: frozenset[int] = frozenset()
    most = cheapest(block, 1 + sum(map(femtoseconds, block.makers)), 1)
    return (none, *between(none, most), most) if bytes_kept(block, most) < bytes_kept(block, none) else (none,)


def bytes_freed(block: Block, running: frozenset[int]) -> dict[int, int]:
    """What each call that runs again spares: the bytes that it makes and backward needs, less what is kept only for calls to read.

    The latter count against the calls that follow; no number is negative. Together that is what keeping everything takes more.
    """
    seen: set[int] = set()
    found, debt = dict.fromkeys(sorted(running), 0), 0
    for call in found:
        reads = {number for number in block.makers[call].reads if not block.stored[number].saved} - seen
        seen |= reads
        debt += sum(block.stored[number].bytes for number in reads if block.stored[number].maker not in running)
        found[call] = sum(stored.bytes for stored in block.stored if stored.saved and stored.maker == call)
        paid = min(debt, found[call])
        found[call], debt = found[call] - paid, debt - paid
    for call in reversed(found):
        paid = min(debt, found[call])
        found[call], debt = found[call] - paid, debt - paid
    return found


def femtoseconds(maker: Maker) -> int:
    """The time of a call as a whole number, so that cuts are exact."""
    return round(maker.seconds * 1e15)


@dataclass(frozen=True)
class Rung:
    """One choice for a copy of a block: what it makes again, with the bytes that each of these spares, and the seconds that takes."""

    tensors: Mapping[tuple[Ref, Layout], int]
    seconds: float

    @property
    def bytes(self) -> int:
        """What the copy keeps less for backward."""
        return sum(self.tensors.values())


@dataclass(frozen=True)
class Ladder:
    """The choices for the copies of a repeat, from the fewest bytes spared to the most; each makes again what the one before does.

    `kept` are the bytes that a copy keeps if it makes nothing again, its input included.
    """

    repeat: int
    copies: int
    rungs: tuple[Rung, ...]
    kept: int = 0


@dataclass(frozen=True)
class Recomputation:
    """What is made again in a whole model: copies of repeated blocks on their rungs, and the seconds that adds to a step."""

    groups: tuple[tuple[Recomputed, Rung], ...] = ()
    seconds: float = 0.0

    @property
    def recomputed(self) -> tuple[Recomputed, ...]:
        """What runs."""
        return tuple(group for group, _ in self.groups)

    @property
    def bytes(self) -> int:
        """What a rank keeps less for backward."""
        return sum(group.copies * rung.bytes for group, rung in self.groups)


def recomputation(ladders: Sequence[Ladder], bytes: float) -> Recomputation:
    """The fastest way to keep so many bytes less; all that can be saved if that is not enough.

    Copies climb one by one, the step of most bytes per second first: no way is faster for the very bytes that it saves. What the last
    step saves too much, earlier ones need not.
    """
    steps: list[tuple[float, int, int, int, float]] = []
    for place, ladder in enumerate(ladders):
        for level, (low, high) in enumerate(pairwise((Rung({}, 0.0), *ladder.rungs))):
            saved, seconds = high.bytes - low.bytes, high.seconds - low.seconds
            steps.append((seconds / saved, place, level, saved, seconds))
    steps.sort()
    climbed = [[0] * len(ladder.rungs) for ladder in ladders]
    missing = min(bytes, sum(ladders[place].copies * saved for _, place, _, saved, _ in steps))
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
    groups = [group for ladder, counts in zip(ladders, climbed, strict=True) for group in _groups(ladder, counts)]
    return Recomputation(tuple(groups), sum(climbed[place][level] * seconds for _, place, level, _, seconds in steps))


def _groups(ladder: Ladder, climbed: Sequence[int]) -> list[tuple[Recomputed, Rung]]:
    """How many copies stand on each rung, the highest first."""
    above = 0
    found = []
    for rung, count in reversed(list(zip(ladder.rungs, climbed, strict=True))):
        if count > above:
            found.append((Recomputed(ladder.repeat, count - above, frozenset(rung.tensors)), rung))
            above = count
    return found
