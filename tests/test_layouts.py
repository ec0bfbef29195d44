from __future__ import annotations

from itertools import product

import pytest

from autotp.layouts import (
    MOVES,
    Layout,
    Segment,
    Split,
    all_layouts,
    chunk,
    inner_pieces,
    length,
    local_shape,
    moves_from,
    piece,
    plain_cut,
    same_pieces,
    simplify_cut,
    uniform,
    with_axis,
)

CUTS = [
    (Segment(1, 12, 1),),
    (Segment(1, 14, 64),),
    (Segment(3, 12, 4),),
    (Segment(1, 2, 3), Segment(1, 5, 2)),
    (Segment(4, 3, 1),),
    (Segment(1, 1, 7),),
]
MESHES = [(2,), (3,), (4,), (2, 2), (2, 3)]


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("cut", CUTS)
def test_pieces_partition_the_dim(cut: tuple[Segment, ...], mesh: tuple[int, ...]) -> None:
    total = sum(s.repeat * s.count * s.granule for s in cut)
    for axes in [tuple(range(len(mesh))), tuple(reversed(range(len(mesh))))]:
        split = Split(0, axes, cut)
        held = [
            index
            for coordinate in product(*map(range, mesh))
            for start, stop in piece(split, mesh, coordinate)
            for index in range(start, stop)
        ]
        assert sorted(held) == list(range(total))


@pytest.mark.parametrize("cut", CUTS)
def test_inner_pieces_refine_the_outer_one(cut: tuple[Segment, ...]) -> None:
    mesh, split = (2, 3), Split(0, (0, 1), cut)
    for outer in range(2):
        before = [i for start, stop in piece(Split(0, (0,), cut), mesh, (outer, 0)) for i in range(start, stop)]
        for member, ranges in enumerate(inner_pieces(split, mesh, (outer, 0))):
            local = [before[i] for start, stop in ranges for i in range(start, stop)]
            assert local == [i for start, stop in piece(split, mesh, (outer, member)) for i in range(start, stop)]


def test_chunk_is_torch_chunk() -> None:
    assert [chunk(14, 4, i) for i in range(4)] == [(0, 4), (4, 8), (8, 12), (12, 14)]
    assert [chunk(2, 4, i) for i in range(4)] == [(0, 1), (1, 2), (2, 2), (2, 2)]


def test_equal_cuts_have_one_form() -> None:
    assert simplify_cut((Segment(1, 32, 128),), 8) == simplify_cut(plain_cut(4096), 8)
    assert simplify_cut((Segment(1, 12, 64),) * 3, 4) == simplify_cut((Segment(3, 768, 1),), 4)
    assert simplify_cut((Segment(1, 14, 64),), 4) != simplify_cut(plain_cut(896), 4)


def test_local_shape_of_the_first_rank_is_the_largest() -> None:
    layout = Layout(("S", "S"), (Split(0, (0,), plain_cut(5)), Split(1, (1,), (Segment(1, 3, 2),))))
    shapes = [local_shape((5, 6), layout, (2, 2), c) for c in product(range(2), range(2))]
    assert shapes == [(3, 4), (3, 2), (2, 4), (2, 2)]
    assert length(piece(layout.splits[1], (2, 2), (0, 1))) == 2


def test_only_the_innermost_axis_moves() -> None:
    nested = Layout(("S", "S"), (Split(0, (0, 1), plain_cut(8)),))
    assert with_axis(nested, 0, "R") is None
    outer = with_axis(nested, 1, "R")
    assert outer == Layout(("S", "R"), (Split(0, (0,), plain_cut(8)),))
    assert with_axis(outer, 1, "S", 0, plain_cut(8)) == nested
    assert with_axis(outer, 1, "S", 0, (Segment(1, 4, 2),)) is None


def test_every_move_changes_one_axis_legally() -> None:
    cuts = [[plain_cut(8)], [plain_cut(6), (Segment(1, 3, 2),)]]
    for layout in all_layouts(cuts, 2, "IRPS"):
        for move in moves_from(layout, cuts, gradient=True):
            assert move.kinds in MOVES
            other = 1 - move.axis
            assert move.source.kinds[other] == move.target.kinds[other]


def test_layouts_of_one_tensor() -> None:
    cuts = [[plain_cut(4)], [plain_cut(4)], [plain_cut(4)]]
    assert len(all_layouts(cuts, 1, "IRPS")) == 6
    assert len(all_layouts(cuts, 2, "IRPS")) == 36 + 3  # both orders of two axes on one dim
    assert uniform("I", 2) in all_layouts(cuts, 2, "IS")


def test_names_that_differ_for_equal_pieces() -> None:
    one, other = (Layout(("S", "I"), (Split(0, (0,), cut),)) for cut in (plain_cut(12), (Segment(1, 6, 2),)))
    assert one != other
    assert same_pieces(one, other, (2, 4))
    assert not same_pieces(one, other, (5, 1))


def test_without_gradient_replicate_is_invariant() -> None:
    assert Layout(("R", "P")).without_gradient() == Layout(("I", "P"))


def test_layouts_read_well() -> None:
    assert str(uniform("R", 2)) == "R, R"
    assert str(Layout(("S",), (Split(2, (0,), (Segment(3, 12, 64),)),))) == "S(2; 3×12×64)"
