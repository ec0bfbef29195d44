"""Moves by number are the moves of layouts, whatever the cuts are."""

from __future__ import annotations

import numpy
import pytest

from autotp.layouts import Cut, Segment, moves_from, plain_cut
from autotp.price.moves import PRIMITIVES, layouts_of, move_graph

CUTS: list[tuple[Cut, ...]] = [(plain_cut(8),), (), (plain_cut(12), (Segment(2, 6, 1),))]


@pytest.mark.parametrize("gradient", [True, False])
@pytest.mark.parametrize("axes", [1, 2])
def test_the_graph_holds_every_move(axes: int, gradient: bool) -> None:
    graph, layouts = move_graph((1, 0, 2), axes, gradient, False), layouts_of(CUTS, axes, gradient, False)
    assert graph.count == len(layouts)
    columns = zip(graph.start, graph.stop, graph.axis, graph.forward, graph.backward, strict=True)
    found = {(layouts[a], layouts[b], int(axis), PRIMITIVES[one], PRIMITIVES[two]) for a, b, axis, one, two in columns}
    real = [move for layout in layouts for move in moves_from(layout, CUTS, gradient)]
    assert found == {(move.source, move.target, move.axis, move.forward, move.backward) for move in real}
    for move in graph.renaming:
        one, two = layouts[graph.start[move]], layouts[graph.stop[move]]
        assert one.kinds == two.kinds and [split.dim for split in one.splits] == [split.dim for split in two.splits]


def test_some_layouts_alone() -> None:
    layouts, graph = layouts_of(CUTS, 2, True, False), move_graph((1, 0, 2), 2, True, False)
    kept = [all(split.axes != (0,) for split in layout.splits) for layout in layouts]
    some, few = graph.within(numpy.array(kept)), [one for one, keep in zip(layouts, kept, strict=True) if keep]
    whole = {(layouts[a], layouts[b]) for a, b in zip(graph.start, graph.stop, strict=True)}
    assert some.count == len(few)
    assert {(few[a], few[b]) for a, b in zip(some.start, some.stop, strict=True)} == {
        (one, two) for one, two in whole if one in few and two in few
    }
    assert [(few[some.start[m]], few[some.stop[m]]) for m in some.renaming] == [
        (layouts[graph.start[m]], layouts[graph.stop[m]])
        for m in graph.renaming
        if kept[graph.start[m]] and kept[graph.stop[m]]
    ]
