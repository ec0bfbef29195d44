"""Layouts: how a tensor's value, and its gradient, lie across the ranks of a device mesh.

On each mesh axis a tensor has one of five kinds (the names follow `spmd_types` and DTensor's placements):

    kind            value on each rank         gradient on each rank
    I  invariant    the full tensor            the full gradient
    R  replicate    the full tensor            a partial sum of the gradient (a reduction is still owed)
    S  shard        its piece of one dim       its piece of the gradient
    P  partial      a summand of the value     the full gradient
    M  maximum      a candidate of a maximum   (tensors without gradient only)

A shard names which piece: its `Split` carries the dim, the mesh axes that split it (outer first) and the `Cut`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property
from itertools import permutations, product
from typing import Literal, NamedTuple

from autotp.program import Size

Coordinate = tuple[int, ...]
Range = tuple[int, int]


class Segment(NamedTuple):
    """`repeat` consecutive runs of `count` granules of `granule` elements; each run is dealt out over the ranks.

    GPT-2's fused qkv (12 heads of 64) is `Segment(3, 12, 64)`; a batch-major merge of batch 8 and sequence 100, split by
    sequence, is `Segment(8, 100, 1)`.
    """

    repeat: Size
    count: Size  # type: ignore[assignment]
    granule: Size


Segments = tuple[Segment, ...]


@dataclass(frozen=True)
class SortedCut:
    """The cut of a dim of `size` rows that are sorted by a key, such as the tokens of a mixture of experts by their expert.

    The rows come from numbered slots. A rank holds, in sorted order, the rows whose key (`by` "key") or slot ("slot") is in its
    piece of `cut`: all rows of its experts, or those of its own tokens. How many these are, only the keys tell.

    `order` is the node that made the order: a tensor of shape (2, size), the sorted keys and the slots that they come from.
    """

    by: Literal["key", "slot"]
    cut: Segments
    size: Size
    order: int


Cut = Segments | SortedCut


def plain_cut(size: Size) -> Segments:
    """The cut of a dim whose granule is one element."""
    return (Segment(1, size, 1),)


def simplify_cut(cut: Cut, parts: int) -> Cut:
    """The same cut in canonical form for a mesh of `parts` ranks, so that equal cuts compare equal."""
    if isinstance(cut, SortedCut):
        return replace(cut, cut=simplify_segments(cut.cut, parts))
    return simplify_segments(cut, parts)


def simplify_segments(segments: Iterable[Segment], parts: int) -> Segments:
    """Runs that divide evenly over the whole mesh get one granule per rank; equal neighbours become one repeated segment."""
    found: list[Segment] = []
    for repeat, count, granule in segments:
        if isinstance(count, int) and isinstance(granule, int) and count % parts == 0 and count:
            count, granule = parts, count // parts * granule
        if found and found[-1].count == count and found[-1].granule == granule:
            found[-1] = Segment(found[-1].repeat + repeat, count, granule)
        else:
            found.append(Segment(repeat, count, granule))
    return tuple(found)


@dataclass(frozen=True)
class Split:
    """Dim `dim` is split over the mesh axes `axes`, outer first, in the pieces that `cut` describes."""

    dim: int
    axes: tuple[int, ...]
    cut: Cut


@dataclass(frozen=True)
class Layout:
    """One kind per mesh axis ("I", "R", "S", "P" or "M"), and one `Split` per sharded dim, sorted by dim."""

    kinds: tuple[str, ...]
    splits: tuple[Split, ...] = ()

    @cached_property
    def _hash(self) -> int:
        return hash((self.kinds, self.splits))

    def __hash__(self) -> int:
        return self._hash

    def split_of(self, axis: int) -> Split | None:
        """The split that mesh axis `axis` takes part in, or None."""
        return next((split for split in self.splits if axis in split.axes), None)

    def split_at(self, dim: int) -> Split | None:
        """The split of dim `dim`, or None."""
        return next((split for split in self.splits if split.dim == dim), None)

    def without_gradient(self) -> Layout:
        """The layout of the same value when no gradient flows: I and R are then the same, written I."""
        if "R" not in self.kinds:
            return self
        return Layout(tuple("I" if kind == "R" else kind for kind in self.kinds), self.splits)

    def __str__(self) -> str:
        """One word per axis, e.g. `I` or `S(1)`; an uneven or segmented cut is spelled out as repeat×count×granule."""
        words = []
        for axis, kind in enumerate(self.kinds):
            split = self.split_of(axis)
            if split is None:
                words.append(kind)
                continue
            word = str(split.dim)
            if len(split.axes) > 1:
                word += f"; {split.axes.index(axis) + 1} of {len(split.axes)}"
            segments = split.cut
            if isinstance(segments, SortedCut):
                word += f"; by {segments.by}"
                segments = segments.cut
            if len(segments) > 1 or segments[0].repeat != 1:
                word += "; " + "+".join(f"{s.repeat}×{s.count}×{s.granule}" for s in segments)
            words.append(f"S({word})")
        return ", ".join(words)


Place = tuple[str, int, Cut | None]
"""What a layout does on one mesh axis: its kind there, and the dim and the cut that "S" splits (-1 and None for other kinds)."""


def place_on(layout: Layout, axis: int) -> Place:
    """What the layout does on this mesh axis."""
    split = layout.split_of(axis)
    return (layout.kinds[axis], -1, None) if split is None else ("S", split.dim, split.cut)


def uniform(kind: str, axes: int) -> Layout:
    """The layout that has the same kind, not "S", on every one of `axes` mesh axes."""
    return Layout((kind,) * axes)


# ---- pieces ---------------------------------------------------------------------------------------------------------


def chunk(count: int, parts: int, index: int) -> Range:
    """The `index`-th of `parts` pieces of `count` granules, in `torch.chunk`'s way: ceil-sized, the last ones may be empty."""
    size = -(-count // parts)
    start = min(index * size, count)
    return start, min(start + size, count)


def _runs(split: Split, mesh: Sequence[int], coordinate: Coordinate) -> list[tuple[Range, int]]:
    """Per run of the cut, the (global element range that this rank holds, length of the run)."""
    runs: list[tuple[Range, int]] = []
    base = 0
    assert not isinstance(split.cut, SortedCut), "the rows of a sorted dim depend on the keys: see runtime.sorted_rows"
    for repeat, count, granule in split.cut:
        low, high = 0, int(count)
        for axis in split.axes:
            start, stop = chunk(high - low, mesh[axis], coordinate[axis])
            low, high = low + start, low + stop
        length = int(count) * int(granule)
        for _ in range(int(repeat)):
            runs.append(((base + low * int(granule), base + high * int(granule)), length))
            base += length
    return runs


def merge_ranges(ranges: Iterable[Range]) -> tuple[Range, ...]:
    """The same ranges, empty ones dropped and touching ones joined."""
    merged: list[Range] = []
    for start, stop in ranges:
        if start == stop:
            continue
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], stop)
        else:
            merged.append((start, stop))
    return tuple(merged)


def piece(split: Split, mesh: Sequence[int], coordinate: Coordinate) -> tuple[Range, ...]:
    """The element ranges of the global dim that the rank at `coordinate` holds. The cut's sizes must be plain ints."""
    return merge_ranges(span for span, _ in _runs(split, mesh, coordinate))


def inner_pieces(split: Split, mesh: Sequence[int], coordinate: Coordinate) -> tuple[tuple[Range, ...], ...]:
    """What each member of the innermost axis of `split` holds, as ranges of the tensor before that axis split it.

    `coordinate` fixes the other axes. The result has one entry for each coordinate along `split.axes[-1]`.
    """
    axis = split.axes[-1]
    outer = _runs(Split(split.dim, split.axes[:-1], split.cut), mesh, coordinate)
    offsets, position = [], 0
    for (start, stop), _ in outer:
        offsets.append(position - start)
        position += stop - start
    pieces = []
    for member in range(mesh[axis]):
        at = (*coordinate[:axis], member, *coordinate[axis + 1 :])
        runs = _runs(split, mesh, at)
        pieces.append(merge_ranges((a + shift, b + shift) for ((a, b), _), shift in zip(runs, offsets, strict=True)))
    return tuple(pieces)


def length(ranges: Iterable[Range]) -> int:
    """Number of elements that the ranges cover."""
    return sum(stop - start for start, stop in ranges)


@cache
def local_size(split: Split, mesh: tuple[int, ...], coordinate: Coordinate) -> int:
    """Number of elements of the split dim that the rank at `coordinate` holds; of sorted rows, if every key has as many."""
    if isinstance(split.cut, SortedCut):
        inner = replace(split, cut=split.cut.cut)
        return -(-int(split.cut.size) * length(piece(inner, mesh, coordinate)) // max(1, cut_size(split.cut.cut)))
    return length(piece(split, mesh, coordinate))


def cut_size(cut: Cut) -> int:
    """Number of elements that a cut covers. Its sizes must be plain ints."""
    if isinstance(cut, SortedCut):
        return int(cut.size)
    return sum(int(repeat) * int(count) * int(granule) for repeat, count, granule in cut)


@cache
def local_shape(
    shape: tuple[int, ...], layout: Layout, mesh: tuple[int, ...], coordinate: Coordinate
) -> tuple[int, ...]:
    """The shape of the local tensor; `shape` and the layout's cuts must be plain ints."""
    if not layout.splits:
        return shape
    sizes = list(shape)
    for split in layout.splits:
        sizes[split.dim] = local_size(split, mesh, coordinate)
    return tuple(sizes)


def at_sizes(layout: Layout, values: Mapping[Size, int]) -> Layout:
    """The layout with every symbolic size in its cuts replaced by its value."""

    def value(size: Size) -> int:
        return size if isinstance(size, int) else int(size.subs(values))

    def at(segments: Segments) -> Segments:
        return tuple(Segment(*map(value, segment)) for segment in segments)

    def cut_at(cut: Cut) -> Cut:
        return replace(cut, cut=at(cut.cut), size=value(cut.size)) if isinstance(cut, SortedCut) else at(cut)

    if not layout.splits or all(isinstance(size, int) for split in layout.splits for size in cut_sizes(split.cut)):
        return layout
    return Layout(layout.kinds, tuple(Split(s.dim, s.axes, cut_at(s.cut)) for s in layout.splits))


def cut_sizes(cut: Cut) -> Iterator[Size]:
    """Every number in a cut."""
    if isinstance(cut, SortedCut):
        yield cut.size
        cut = cut.cut
    for segment in cut:
        yield from segment


# ---- moves ----------------------------------------------------------------------------------------------------------

MOVES: dict[tuple[str, str], tuple[str, str]] = {
    # (from, to): (what the value needs, what the gradient needs on the way back)
    ("I", "R"): ("none", "all_reduce"),  # Megatron's f; the data-parallel all-reduce when the tensor is a weight
    ("P", "I"): ("all_reduce", "none"),  # Megatron's g
    ("P", "R"): ("all_reduce", "all_reduce"),
    ("P", "S"): ("reduce_scatter", "all_gather"),
    ("S", "R"): ("all_gather", "reduce_scatter"),
    ("S", "I"): ("all_gather", "slice"),
    ("I", "S"): ("slice", "all_gather"),
    ("R", "S"): ("slice", "pad"),
    ("S", "S"): ("all_to_all", "all_to_all"),
    ("S", "P"): ("pad", "slice"),
    ("R", "I"): ("none", "mask"),
    ("R", "P"): ("mask", "mask"),
    ("I", "P"): ("mask", "none"),
    ("M", "I"): ("all_reduce_max", "none"),
}
"""Changing the kind of one mesh axis: the primitive for the value, and the one for its gradient.

`mask` keeps the tensor on the first rank of the axis and zeroes it elsewhere; `slice` and `pad` are local too.
"""

COLLECTIVES = ("all_reduce", "all_reduce_max", "all_gather", "reduce_scatter", "all_to_all")


@dataclass(frozen=True)
class Move:
    """A conversion between two layouts that differ on one mesh axis only."""

    axis: int
    source: Layout
    target: Layout

    @property
    def kinds(self) -> tuple[str, str]:
        """The axis's kind before and after."""
        return self.source.kinds[self.axis], self.target.kinds[self.axis]

    @property
    def forward(self) -> str:
        """The primitive that converts the value."""
        return MOVES[self.kinds][0]

    @property
    def backward(self) -> str:
        """The primitive that converts the gradient back."""
        return MOVES[self.kinds][1]


def with_axis(layout: Layout, axis: int, kind: str, dim: int = -1, cut: Cut = ()) -> Layout | None:
    """`layout` with `axis` changed to `kind` (for "S": splitting `dim` by `cut`), or None if one move cannot do that.

    Only the innermost axis of a split may change, and a dim that is split already is split further by its own cut.
    """
    splits = []
    for split in layout.splits:
        if axis in split.axes:
            if split.axes[-1] != axis:
                return None
            if len(split.axes) > 1:
                splits.append(Split(split.dim, split.axes[:-1], split.cut))
        else:
            splits.append(split)
    if kind == "S":
        present = next((split for split in splits if split.dim == dim), None)
        if present is None:
            splits.append(Split(dim, (axis,), cut))
        elif present.cut == cut:
            splits[splits.index(present)] = Split(dim, (*present.axes, axis), cut)
        else:
            return None
    kinds = (*layout.kinds[:axis], kind, *layout.kinds[axis + 1 :])
    return Layout(kinds, tuple(sorted(splits, key=lambda split: split.dim)))


def moves_from(layout: Layout, cuts: Sequence[Sequence[Cut]], gradient: bool) -> list[Move]:
    """Every single-axis move that starts at `layout`; `cuts[d]` are the candidate cuts of dim `d`."""
    found = []
    for axis, kind in enumerate(layout.kinds):
        for target in "IRPS":
            if (kind, target) not in MOVES or (target == "R" and not gradient):
                continue
            choices: Iterable[tuple[int, Cut]] = [(-1, ())]
            if target == "S":
                choices = ((dim, cut) for dim, options in enumerate(cuts) for cut in options)
            for dim, cut in choices:
                changed = with_axis(layout, axis, target, dim, cut)
                if changed is not None and changed != layout:
                    found.append(Move(axis, layout, changed))
    return found


def same_pieces(a: Layout, b: Layout, mesh: tuple[int, ...]) -> bool:
    """Whether two layouts of one tensor put the same elements on every rank and differ in name only (plain-int cuts)."""
    if a.kinds != b.kinds or [(s.dim, s.axes) for s in a.splits] != [(s.dim, s.axes) for s in b.splits]:
        return False
    return all(_same_split(one, other, mesh) for one, other in zip(a.splits, b.splits, strict=True))


@cache
def _same_split(one: Split, other: Split, mesh: tuple[int, ...]) -> bool:
    if isinstance(one.cut, SortedCut) or isinstance(other.cut, SortedCut):
        return one.cut == other.cut
    coordinates = product(*(range(n) if i in one.axes else (0,) for i, n in enumerate(mesh)))
    return all(piece(one, mesh, coordinate) == piece(other, mesh, coordinate) for coordinate in coordinates)


def all_layouts(cuts: Sequence[Sequence[Cut]], axes: int, kinds: str) -> list[Layout]:
    """Every layout over `axes` mesh axes that uses the given kinds and, for "S", the candidate cuts of each dim.

    Axes that share a dim share its cut; every order of such axes is listed.
    """
    plain = [(kind, -1) for kind in kinds if kind != "S"]
    dims = [("S", dim) for dim, options in enumerate(cuts) if options] if "S" in kinds else []
    found: list[Layout] = []
    for choice in product(plain + dims, repeat=axes):
        groups: dict[int, list[int]] = {}
        for axis, (kind, dim) in enumerate(choice):
            if kind == "S":
                groups.setdefault(dim, []).append(axis)
        names = tuple(kind for kind, _ in choice)
        per_dim = [
            [Split(dim, order, cut) for order in permutations(members) for cut in cuts[dim]]
            for dim, members in sorted(groups.items())
        ]
        found.extend(Layout(names, splits) for splits in product(*per_dim))
    return found
