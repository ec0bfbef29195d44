"""The layouts of a tensor and the moves between them, by number: found once for all tensors with as many candidate cuts of their dims."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy
from numpy.typing import NDArray

from autotp.layouts import MOVES, Cut, Layout, Move, all_layouts, moves_from, plain_cut, with_axis

Index = NDArray[numpy.int64]

PRIMITIVES = ("none", *sorted({name for pair in MOVES.values() for name in pair} - {"none"}))
"""What a move does with the value or the gradient, by number."""


@dataclass(frozen=True, eq=False)
class MoveGraph:
    """Single-axis moves between numbered layouts, sorted by start, then by stop.

    Attributes:
        count: of the layouts, as `layouts_of` lists them.
        start, stop, axis: of each move.
        forward, backward: what it does, as places in `PRIMITIVES`.
        renaming: those moves that keep kinds, dims and axes, and so may lead between two names of the same pieces.
    """

    count: int
    start: Index
    stop: Index
    axis: Index
    forward: Index
    backward: Index
    renaming: Index

    def within(self, kept: NDArray[numpy.bool_]) -> MoveGraph:
        """The moves between some of the layouts, which are numbered anew."""
        number = numpy.cumsum(kept) - 1
        some = kept[self.start] & kept[self.stop]
        place = numpy.cumsum(some) - 1
        return MoveGraph(
            int(kept.sum()),
            number[self.start[some]],
            number[self.stop[some]],
            self.axis[some],
            self.forward[some],
            self.backward[some],
            place[self.renaming[some[self.renaming]]],
        )


def layouts_of(cuts: Sequence[Sequence[Cut]], axes: int, gradient: bool, maximum: bool) -> list[Layout]:
    """Every layout of a tensor with these candidate cuts.

    Args:
        gradient: whether its gradient flows; else I and R are one.
        maximum: whether candidates of a maximum may be made of it.
    """
    found = all_layouts(cuts, axes, "IRPS" if gradient else "IPS")
    if maximum:
        found += [layout for layout in all_layouts(cuts, axes, "IPSM") if "M" in layout.kinds]
    return found


@cache
def move_graph(cuts: tuple[int, ...], axes: int, gradient: bool, maximum: bool) -> MoveGraph:
    """All moves of a tensor that has so many candidate cuts of each dim; what they are makes no difference."""
    names = [[plain_cut(number) for number in range(1, count + 1)] for count in cuts]
    layouts = layouts_of(names, axes, gradient, maximum)
    number = {layout: place for place, layout in enumerate(layouts)}
    rows = []
    for start, layout in enumerate(layouts):
        for move in [*moves_from(layout, names, gradient), *_maximum_moves(layout)]:
            stop = number.get(move.target)
            if stop is not None:
                primitives = PRIMITIVES.index(move.forward), PRIMITIVES.index(move.backward)
                rows.append((start, stop, move.axis, *primitives, _where(layout) == _where(move.target)))
    of: Index = numpy.array(sorted(rows), dtype=numpy.int64).reshape(-1, 6).T
    return MoveGraph(len(layouts), of[0], of[1], of[2], of[3], of[4], numpy.flatnonzero(of[5]))


def _where(layout: Layout) -> tuple[tuple[str, ...], tuple[tuple[int, tuple[int, ...]], ...]]:
    return layout.kinds, tuple((split.dim, split.axes) for split in layout.splits)


def _maximum_moves(layout: Layout) -> list[Move]:
    """A maximum is reduced to the full value; nothing else can be done with it."""
    found = []
    for axis, kind in enumerate(layout.kinds):
        if kind == "M":
            target = with_axis(layout, axis, "I")
            assert target is not None
            found.append(Move(axis, layout, target))
    return found
