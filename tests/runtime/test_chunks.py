"""The boxes that a rank tells checkpoints about are what it holds."""

from itertools import product
from math import prod

import pytest
import torch

from autotp.layouts import Layout, Segment, Split
from autotp.runtime.chunks import Chunks, boxes, cut_box
from autotp.runtime.state import local_part


def split(dim: int, axes: tuple[int, ...], *cut: Segment) -> Split:
    return Split(dim, axes, cut)


CASES = {
    "whole": ((4, 6), Layout(("I",)), (3,)),
    "a number": ((), Layout(("I", "I")), (2, 2)),
    "plain": ((7, 3), Layout(("S",), (split(0, (0,), Segment(1, 7, 1)),)), (3,)),
    "empty pieces": ((2, 3), Layout(("S",), (split(0, (0,), Segment(1, 2, 1)),)), (4,)),
    "heads": ((3, 56), Layout(("S",), (split(1, (0,), Segment(1, 14, 4)),)), (4,)),
    "fused qkv": ((5, 42), Layout(("S",), (split(1, (0,), Segment(3, 7, 2)),)), (4,)),
    "unlike segments": ((5, 22), Layout(("S",), (split(1, (0,), Segment(1, 7, 2), Segment(2, 2, 2)),)), (3,)),
    "two dims": ((6, 21), Layout(("S", "S"), (split(0, (1,), Segment(2, 3, 1)), split(1, (0,), Segment(3, 7, 1)))), (2, 2)),
    "inner axis first": ((24,), Layout(("S", "S"), (split(0, (1, 0), Segment(2, 6, 2)),)), (2, 3)),
    "replicated on one axis": ((9, 2), Layout(("I", "S"), (split(0, (1,), Segment(3, 3, 1)),)), (2, 2)),
    "no elements": ((0, 4), Layout(("S",), (split(1, (0,), Segment(1, 4, 1)),)), (3,)),
}


@pytest.mark.parametrize("name", CASES)
def test_boxes_are_what_the_rank_holds(name: str) -> None:
    shape, layout, mesh = CASES[name]
    full = torch.arange(prod(shape)).reshape(shape)
    counts = torch.zeros(shape, dtype=torch.int64)
    seen = set()
    for coordinate in product(*map(range, mesh)):
        local = local_part(full, layout, mesh, coordinate)
        found = boxes(shape, layout, mesh, coordinate)
        assert sum(prod(box.sizes) for box in found) == local.numel()
        for box in found:
            there = full[tuple(slice(start, start + size) for start, size in zip(box.start, box.sizes, strict=True))]
            assert torch.equal(cut_box(local, box), there), (coordinate, box)
            if box not in seen:  # ranks that hold the same elements hold the same boxes
                counts[tuple(slice(start, start + size) for start, size in zip(box.start, box.sizes, strict=True))] += 1
            seen.add(box)
        chunks = Chunks(local, shape, found)
        for item, chunk in zip(chunks.write_items("weight"), chunks.chunk_list(), strict=True):
            assert item.tensor_data is not None
            assert item.tensor_data.chunk == chunk
            assert chunks.shard(item.index).shape == chunk.sizes
    assert (counts == 1).all()
