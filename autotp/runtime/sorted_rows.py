"""Rows that are sorted by a key (`layouts.SortedCut`): which of them a rank holds, and the primitives that move them.

Only the keys tell, so that all this is computed anew in every call, from the order: sorted keys and slots, shape (2, rows).
"""

from __future__ import annotations

from dataclasses import replace

import sympy
import torch
from torch import Tensor, nn

from autotp.layouts import MOVES, Coordinate, Layout, Move, Range, SortedCut, Split, at_sizes, inner_pieces, piece
from autotp.runtime.primitives import (
    AllGather,
    Grid,
    Pad,
    Primitive,
    Recut,
    ReduceScatter,
    Slice,
    UnevenSwap,
    whole_primitive,
)

Mesh = tuple[int, ...]


class HeldElements(nn.Module):
    """The places, in the whole dim, of the elements of a split dim that this rank holds, ascending; int64.

    `forward(like, *sizes)` takes the order if the dim is sorted (else any tensor on the right device), and the values of `symbols`.
    """

    def __init__(self, split: Split, mesh: Mesh, coordinate: Coordinate, symbols: tuple[sympy.Symbol, ...]) -> None:
        super().__init__()
        self.layout = Layout(("I",) * len(mesh), (split,))
        self.mesh, self.coordinate, self.symbols = mesh, coordinate, symbols

    def forward(self, like: Tensor, *sizes: int) -> Tensor:
        """The places."""
        split = at_sizes(self.layout, dict(zip(self.symbols, map(int, sizes), strict=True))).splits[0]
        return held_elements(split, self.mesh, self.coordinate, like)


def held_elements(split: Split, mesh: Mesh, coordinate: Coordinate, like: Tensor) -> Tensor:
    """The elements of a dim that the rank at `coordinate` holds; the cut's sizes must be plain ints.

    `like` is the order if the cut is a `SortedCut`; else any tensor on the device wanted.
    """
    if not isinstance(split.cut, SortedCut):
        return _places(piece(split, mesh, coordinate), like.device)
    ranges = piece(replace(split, cut=split.cut.cut), mesh, coordinate)
    of = like[0] if split.cut.by == "key" else like[1]
    chosen = torch.zeros_like(of, dtype=torch.bool)
    for start, stop in ranges:
        chosen |= (of >= start) & (of < stop)
    return chosen.nonzero().squeeze(1)


def _places(ranges: tuple[Range, ...], device: torch.device) -> Tensor:
    parts = [torch.arange(start, stop, device=device) for start, stop in ranges]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64, device=device)


def _inner_elements(split: Split, mesh: Mesh, coordinate: Coordinate, order: Tensor) -> list[Tensor]:
    """What each member of the innermost axis holds, as places in the tensor before that axis split it."""
    if not isinstance(split.cut, SortedCut):
        return [_places(ranges, order.device) for ranges in inner_pieces(split, mesh, coordinate)]
    axis = split.axes[-1]
    members = [(*coordinate[:axis], member, *coordinate[axis + 1 :]) for member in range(mesh[axis])]
    held = [held_elements(split, mesh, member, order) for member in members]
    if len(split.axes) == 1:
        return held
    outer = held_elements(replace(split, axes=split.axes[:-1]), mesh, coordinate, order)
    return [torch.searchsorted(outer, places) for places in held]


def is_sorted(layout: Layout) -> bool:
    """Whether a dim of the layout is split by sorted rows."""
    return any(isinstance(split.cut, SortedCut) for split in layout.splits)


def orders_in(*layouts: Layout) -> set[int]:
    """The orders of the sorted rows in some layouts."""
    return {split.cut.order for layout in layouts for split in layout.splits if isinstance(split.cut, SortedCut)}


def sorted_primitive(move: Move, backward: bool, mesh: Mesh, coordinate: Coordinate, order: Tensor) -> Primitive:
    """The primitive of a move (or of its gradient) between layouts of which one at least has sorted rows.

    The layouts' sizes must be plain ints.
    """
    source, target = (move.target, move.source) if backward else (move.source, move.target)
    name, axis = MOVES[move.kinds][1 if backward else 0], move.axis
    rank = coordinate[axis]
    if (whole := whole_primitive(name, axis, source, target, mesh, rank)) is not None:
        return whole
    splits = [split for split in (source.split_of(axis), target.split_of(axis)) if split is not None]
    pieces = [_inner_elements(split, mesh, coordinate, order) for split in splits]
    dim, held = splits[0].dim, pieces[0]
    if name == "all_to_all":
        if dim == splits[1].dim:
            return _recut(name, axis, dim, held, pieces[1], rank)
        return _swap(name, axis, dim, splits[1].dim, held, pieces[1], rank)
    lengths = [len(places) for places in held]
    mine, total, largest = held[rank], sum(lengths), max(lengths)
    if name == "slice":
        return Slice(name, axis, dim, 0, lengths[rank], mine)
    if name == "pad":
        return Pad(name, axis, dim, 0, lengths[rank], mine, total)
    grid = Grid(dim, mesh[axis], 1, largest)
    if name == "all_gather":
        gathered = mine.new_empty(total)
        for member, places in enumerate(held):
            gathered[places] = torch.arange(member * largest, member * largest + len(places), device=mine.device)
        return AllGather(name, axis, grid, largest - lengths[rank], None, gathered)
    filled = torch.cat([torch.cat((places, places.new_zeros(largest - len(places)))) for places in held])
    return ReduceScatter(name, axis, grid, 0, lengths[rank], filled)


def _owners(pieces: list[Tensor]) -> Tensor:
    """For each place, the member that holds it."""
    owner = pieces[0].new_empty(sum(len(places) for places in pieces))
    for member, places in enumerate(pieces):
        owner[places] = member
    return owner


def _recut(name: str, axis: int, dim: int, held: list[Tensor], wanted: list[Tensor], rank: int) -> Recut:
    """Rows go to whoever wants them, in ascending order for each receiver."""
    receivers, senders = _owners(wanted)[held[rank]], _owners(held)[wanted[rank]]
    send = tuple(torch.bincount(receivers, minlength=len(held)).tolist())
    receive = tuple(torch.bincount(senders, minlength=len(held)).tolist())
    out = torch.argsort(receivers, stable=True)
    back = torch.argsort(torch.argsort(senders, stable=True))
    return Recut(name, axis, send, receive, dim, out, back)


def _swap(name: str, axis: int, source: int, target: int, held: list[Tensor], wanted: list[Tensor], rank: int) -> UnevenSwap:
    lengths, sizes = tuple(map(len, held)), tuple(map(len, wanted))
    send = tuple(size * lengths[rank] for size in sizes)
    receive = tuple(sizes[rank] * length for length in lengths)
    back = torch.argsort(torch.cat(held))
    return UnevenSwap(name, axis, send, receive, source, target, torch.cat(wanted), back, lengths, sizes[rank])
