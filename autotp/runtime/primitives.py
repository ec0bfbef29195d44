"""The primitives of `layouts.MOVES` as pure local functions around at most one exchange.

A primitive converts one rank's local tensor on one mesh axis, `finish(exchange(prepare(x)))`. Exchanges act on dim 0:

    all_reduce, all_reduce_max   same shape on every rank; the sum, or the maximum, comes back
    all_gather                   equal shapes; the ranks' tensors come back concatenated along dim 0
    reduce_scatter               dim 0 is `n` equal chunks; the sum of everybody's chunk for this rank comes back
    all_to_all                   `send_sizes` rows for each rank; `receive_sizes` rows of each come back (None: equal)
    none, slice, pad, mask       nothing is exchanged; `prepare` is all

Who exchanges does not matter: `runtime.collectives` does it between processes, `simulate` on a list of tensors.
No primitive modifies its input. Results are contiguous, unless the primitive leaves the tensor as it is.
A primitive holds plain numbers and index tensors only, computed once; what runs per call is lean and can be compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from autotp.errors import AutotpError
from autotp.layouts import MOVES, Coordinate, Layout, Move, Range, inner_pieces, length, same_pieces


@dataclass(frozen=True, eq=False)
class Primitive:
    """One primitive on mesh axis `axis` as this rank runs it; the base class is "none" and the two all-reduces."""

    name: str
    axis: int

    @property
    def idle(self) -> bool:
        """Whether it leaves every tensor on this rank as it is."""
        return self.name == "none"

    def prepare(self, x: Tensor) -> Tensor:
        """The contiguous tensor to exchange; for a local primitive, the result."""
        return x if self.name == "none" else x.contiguous()

    def finish(self, received: Tensor) -> Tensor:
        """The local result, from what the exchange gave back."""
        return received


@dataclass(frozen=True, eq=False)
class Mask(Primitive):
    """The tensor on the first rank of the axis (`keep`), zeros elsewhere."""

    keep: bool

    @property
    def idle(self) -> bool:
        return self.keep

    def prepare(self, x: Tensor) -> Tensor:
        return x if self.keep else torch.zeros_like(x, memory_format=torch.contiguous_format)


@dataclass(frozen=True, eq=False)
class Slice(Primitive):
    """This rank's piece of dim `dim`: the elements `index`, or, where that is None, `size` elements from `start`."""

    dim: int
    start: int
    size: int
    index: Tensor | None

    def prepare(self, x: Tensor) -> Tensor:
        if self.index is not None:
            return x.index_select(self.dim, self.index)
        return x.narrow(self.dim, self.start, self.size).contiguous()


@dataclass(frozen=True, eq=False)
class Pad(Primitive):
    """The inverse of `Slice`: the whole dim, of `total` elements, with zeros where other ranks hold them."""

    dim: int
    start: int
    size: int
    index: Tensor | None
    total: int

    def prepare(self, x: Tensor) -> Tensor:
        if self.index is None:
            return _pad(x, self.dim, self.start, self.total - self.start - self.size).contiguous()
        whole = x.new_zeros((*x.shape[: self.dim], self.total, *x.shape[self.dim + 1 :]))
        return whole.index_copy(self.dim, self.index, x)


@dataclass(frozen=True, eq=False)
class Grid:
    """A dim of `repeat` runs, in each of which every one of `members` ranks holds the next `granule` elements."""

    dim: int
    members: int
    repeat: int
    granule: int

    def split(self, x: Tensor) -> Tensor:
        """The members' pieces of the whole dim, concatenated along dim 0; no copy if that is what `x` is."""
        dim, members = self.dim, self.members
        if self.repeat > 1:
            x = x.unflatten(dim, (self.repeat, members, self.granule)).movedim(dim + 1, 0)
            return x.flatten(dim + 1, dim + 2).flatten(0, 1).contiguous()
        if dim:
            x = x.unflatten(dim, (members, self.granule)).movedim(dim, 0).flatten(0, 1)
        return x.contiguous()

    def join(self, x: Tensor) -> Tensor:
        """The inverse of `split`."""
        dim, members = self.dim, self.members
        if self.repeat > 1:
            x = x.unflatten(0, (members, x.shape[0] // members)).unflatten(dim + 1, (self.repeat, self.granule))
            return x.movedim(0, dim + 1).flatten(dim, dim + 2).contiguous()
        return torch.cat(x.chunk(members), dim) if dim else x


@dataclass(frozen=True, eq=False)
class AllGather(Primitive):
    """The whole dim from every rank's piece, which is first filled up with `fill` elements to the size of the largest.

    Afterwards the fill is dropped: by `order`, the place of every element among those gathered, or by the `lengths`.
    """

    grid: Grid
    fill: int
    lengths: tuple[int, ...] | None
    order: Tensor | None

    def prepare(self, x: Tensor) -> Tensor:
        return _pad(x, self.grid.dim, 0, self.fill).contiguous()

    def finish(self, received: Tensor) -> Tensor:
        dim = self.grid.dim
        if self.order is not None:
            return self.grid.join(received).index_select(dim, self.order)
        if self.lengths is None:
            return self.grid.join(received)
        if dim == 0:
            return received.narrow(0, 0, sum(self.lengths))
        chunks = received.chunk(self.grid.members)
        return torch.cat([chunk.narrow(dim, 0, size) for chunk, size in zip(chunks, self.lengths, strict=True)], dim)


@dataclass(frozen=True, eq=False)
class ReduceScatter(Primitive):
    """This rank's `size` elements of the sum of the ranks' whole dims.

    The pieces are made equal first: by `order`, the elements of every piece then fill, or by `fill` at the end.
    """

    grid: Grid
    fill: int
    size: int
    order: Tensor | None

    def prepare(self, x: Tensor) -> Tensor:
        dim = self.grid.dim
        return self.grid.split(_pad(x, dim, 0, self.fill) if self.order is None else x.index_select(dim, self.order))

    def finish(self, received: Tensor) -> Tensor:
        dim = self.grid.dim
        return received if self.size == received.shape[dim] else received.narrow(dim, 0, self.size).contiguous()


@dataclass(frozen=True, eq=False)
class AllToAll(Primitive):
    """From pieces of one dim to pieces of another, or to other pieces of the same dim.

    `send_sizes` and `receive_sizes` are the numbers of rows that go to and come from each rank; None if all are equal.
    """

    send_sizes: tuple[int, ...] | None
    receive_sizes: tuple[int, ...] | None


@dataclass(frozen=True, eq=False)
class Swap(AllToAll):
    """From equal pieces of the source's dim to equal pieces of the target's dim. Rows are those of the local tensor."""

    source: Grid
    target: Grid

    def prepare(self, x: Tensor) -> Tensor:
        return self.target.split(x)

    def finish(self, received: Tensor) -> Tensor:
        return self.source.join(received)


@dataclass(frozen=True, eq=False)
class UnevenSwap(AllToAll):
    """From any pieces of dim `source` to any pieces of dim `target`.

    Rows are pairs (target's element, source's element): `out` lists the target's elements piece by piece, `back` sorts
    the source's elements that arrive piece by piece. The source's pieces have sizes `lengths`, this rank's new piece
    has `size`.
    """

    source: int
    target: int
    out: Tensor
    back: Tensor
    lengths: tuple[int, ...]
    size: int

    def prepare(self, x: Tensor) -> Tensor:
        return x.movedim((self.target, self.source), (0, 1)).index_select(0, self.out).flatten(0, 1).contiguous()

    def finish(self, received: Tensor) -> Tensor:
        parts = received.split([self.size * length for length in self.lengths])
        blocks = [part.unflatten(0, (self.size, length)) for part, length in zip(parts, self.lengths, strict=True)]
        whole = torch.cat(blocks, 1).index_select(1, self.back)
        return whole.movedim((0, 1), (self.target, self.source)).contiguous()


@dataclass(frozen=True, eq=False)
class Recut(AllToAll):
    """From any pieces of dim `dim` to any other pieces of it. Rows are elements of that dim.

    `out` lists the local elements receiver by receiver, `back` sorts those that arrive sender by sender.
    """

    dim: int
    out: Tensor
    back: Tensor

    def prepare(self, x: Tensor) -> Tensor:
        return x.index_select(self.dim, self.out).movedim(self.dim, 0).contiguous()

    def finish(self, received: Tensor) -> Tensor:
        return received.index_select(0, self.back).movedim(0, self.dim).contiguous()


def _pad(x: Tensor, dim: int, before: int, after: int) -> Tensor:
    """`x` with zeros before and after it along `dim`."""
    return pad(x, (0, 0) * (x.ndim - 1 - dim) + (before, after)) if before or after else x


# ---- from moves to primitives ---------------------------------------------------------------------------------------

Pieces = tuple[tuple[Range, ...], ...]
"""For each rank of an axis, the element ranges of the dim that it holds."""


def forward_primitive(move: Move, mesh: tuple[int, ...], coordinate: Coordinate, device: torch.device) -> Primitive:
    """What converts the value of a tensor on `device`.

    `mesh` holds the size of each axis, `coordinate` this rank's place on it; the layouts' cuts must be plain ints
    (`layouts.at_sizes`). Raises AutotpError if MOVES has no such move.
    """
    return _primitive(move, move.source, move.target, 0, mesh, coordinate, device)


def backward_primitive(move: Move, mesh: tuple[int, ...], coordinate: Coordinate, device: torch.device) -> Primitive:
    """What converts the gradient back; the arguments are those of `forward_primitive`."""
    return _primitive(move, move.target, move.source, 1, mesh, coordinate, device)


def whole_primitive(
    name: str, axis: int, source: Layout, target: Layout, mesh: tuple[int, ...], rank: int
) -> Primitive | None:
    """The primitive of a move that leaves every rank's tensor in one piece; None if it cuts or joins tensors."""
    if mesh[axis] == 1 or (name == "all_to_all" and same_pieces(source, target, mesh)):
        return Primitive("none", axis)
    if name == "mask":
        return Mask(name, axis, rank == 0)
    return Primitive(name, axis) if name in ("none", "all_reduce", "all_reduce_max") else None


def _primitive(
    move: Move,
    source: Layout,
    target: Layout,
    way: int,
    mesh: tuple[int, ...],
    coordinate: Coordinate,
    device: torch.device,
) -> Primitive:
    """The primitive from `source` to `target`; `way` 0 is for the value and 1 for the gradient of `move`."""
    if move.kinds not in MOVES:
        raise AutotpError(
            f"no single move on mesh axis {move.axis} leads from {move.source} to {move.target}; "
            f"go by way of other layouts, with moves of layouts.MOVES only"
        )
    name, axis = MOVES[move.kinds][way], move.axis
    rank = coordinate[axis]
    if (whole := whole_primitive(name, axis, source, target, mesh, rank)) is not None:
        return whole

    def index(elements: Sequence[int]) -> Tensor:
        return torch.tensor(elements, dtype=torch.int64, device=device)

    splits = [split for split in (source.split_of(axis), target.split_of(axis)) if split is not None]
    dims = [split.dim for split in splits]
    pieces = [inner_pieces(split, mesh, coordinate) for split in splits]
    if name == "all_to_all":
        if dims[0] == dims[1]:
            return _recut(name, axis, dims[0], pieces[0], pieces[1], rank, index)
        return _swap(name, axis, dims[0], dims[1], pieces[0], pieces[1], rank, index)
    if name == "all_gather":
        return _all_gather(name, axis, dims[0], pieces[0], rank, index)
    if name == "reduce_scatter":
        return _reduce_scatter(name, axis, dims[0], pieces[0], rank, index)
    mine = pieces[0][rank]
    start = mine[0][0] if mine else 0
    selected = index(_elements(mine)) if len(mine) > 1 else None
    if name == "slice":
        return Slice(name, axis, dims[0], start, length(mine), selected)
    return Pad(name, axis, dims[0], start, length(mine), selected, sum(map(length, pieces[0])))


Index = Callable[[Sequence[int]], Tensor]


def _all_gather(name: str, axis: int, dim: int, pieces: Pieces, rank: int, index: Index) -> AllGather:
    grid = _grid(dim, pieces)
    if grid is not None:
        return AllGather(name, axis, grid, 0, None, None)
    sizes = tuple(map(length, pieces))
    largest = max(sizes)
    grid, fill = Grid(dim, len(pieces), 1, largest), largest - sizes[rank]
    if _is_chunked(pieces):
        return AllGather(name, axis, grid, fill, sizes, None)
    place: dict[int, int] = {}
    for member, ranges in enumerate(pieces):
        place.update((element, member * largest + i) for i, element in enumerate(_elements(ranges)))
    return AllGather(name, axis, grid, fill, None, index([place[element] for element in range(len(place))]))


def _reduce_scatter(name: str, axis: int, dim: int, pieces: Pieces, rank: int, index: Index) -> ReduceScatter:
    grid = _grid(dim, pieces)
    if grid is not None:
        return ReduceScatter(name, axis, grid, 0, grid.repeat * grid.granule, None)
    sizes = tuple(map(length, pieces))
    largest = max(sizes)
    grid = Grid(dim, len(pieces), 1, largest)
    if _is_chunked(pieces):
        return ReduceScatter(name, axis, grid, len(pieces) * largest - sum(sizes), sizes[rank], None)
    order: list[int] = []
    for ranges, size in zip(pieces, sizes, strict=True):
        order += _elements(ranges) + [0] * (largest - size)
    return ReduceScatter(name, axis, grid, 0, sizes[rank], index(order))


def _swap(
    name: str, axis: int, source: int, target: int, held: Pieces, wanted: Pieces, rank: int, index: Index
) -> AllToAll:
    before, after = _grid(source, held), _grid(target, wanted)
    if before is not None and after is not None:
        return Swap(name, axis, None, None, before, after)
    lengths, sizes = tuple(map(length, held)), tuple(map(length, wanted))
    send = tuple(size * lengths[rank] for size in sizes)
    receive = tuple(sizes[rank] * size for size in lengths)
    out = index([element for ranges in wanted for element in _elements(ranges)])
    back = index(_sorting([element for ranges in held for element in _elements(ranges)]))
    return UnevenSwap(name, axis, send, receive, source, target, out, back, lengths, sizes[rank])


def _recut(name: str, axis: int, dim: int, held: Pieces, wanted: Pieces, rank: int, index: Index) -> Recut:
    def shared(a: tuple[Range, ...], b: tuple[Range, ...]) -> list[int]:
        return sorted(set(_elements(a)) & set(_elements(b)))

    local = {element: i for i, element in enumerate(_elements(held[rank]))}
    sent = [shared(held[rank], ranges) for ranges in wanted]
    received = [shared(ranges, wanted[rank]) for ranges in held]
    out = index([local[element] for elements in sent for element in elements])
    back = index(_sorting([element for elements in received for element in elements]))
    return Recut(name, axis, tuple(map(len, sent)), tuple(map(len, received)), dim, out, back)


def _elements(ranges: Sequence[Range]) -> list[int]:
    return [element for start, stop in ranges for element in range(start, stop)]


def _sorting(elements: Sequence[int]) -> list[int]:
    """The places of the smallest, the next, … element."""
    return sorted(range(len(elements)), key=elements.__getitem__)


def _grid(dim: int, pieces: Pieces) -> Grid | None:
    """The grid that `pieces` are, or None if they are unequal or irregular."""
    members, repeat = len(pieces), len(pieces[0])
    if repeat == 0:
        return None if any(pieces) else Grid(dim, members, 1, 0)
    granule = pieces[0][0][1] - pieces[0][0][0]
    for member, ranges in enumerate(pieces):
        starts = [(run * members + member) * granule for run in range(repeat)]
        if ranges != tuple((start, start + granule) for start in starts):
            return None
    return Grid(dim, members, repeat, granule)


def _is_chunked(pieces: Pieces) -> bool:
    """Whether the pieces are those of `torch.chunk`: one range each, in order, only the last ones smaller or empty."""
    largest = max(map(length, pieces))
    total = sum(map(length, pieces))
    spans = [(min(member * largest, total), min((member + 1) * largest, total)) for member in range(len(pieces))]
    return all(ranges == (span,) or span[0] == span[1] for ranges, span in zip(pieces, spans, strict=True))
