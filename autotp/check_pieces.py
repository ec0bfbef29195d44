"""Do the pieces that ranks hold of a node's tensors belong together? The element-wise part of the type check."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from autotp.layouts import Range, SortedCut, Split, merge_ranges, piece
from autotp.rules.language import Use

Ranges = tuple[Range, ...]
Coordinate = tuple[int, ...]


def is_sorted_split(split: Split) -> bool:
    """Whether the dim holds sorted rows."""
    return isinstance(split.cut, SortedCut)


def unsorted(split: Split) -> Split:
    """The split of the slots or keys by which rows are split."""
    return replace(split, cut=split.cut.cut) if isinstance(split.cut, SortedCut) else split


def sorted_fault(uses: Sequence[tuple[Use, Split, str]]) -> str | None:
    """Which dim's rows are not those that its factor, or the factor's other dims, say; None if all are."""
    plain = {split.cut for use, split, _ in uses if use.is_whole_dim and is_sorted_split(split)}
    for use, split, words in uses:
        found = (split.cut.by, split.cut.order) if isinstance(split.cut, SortedCut) else None
        wanted = (use.rows.by, use.rows.order) if use.rows else None
        if plain and (use.rows or {split.cut} != plain):
            return f"{words} does not hold the same sorted rows as the other tensors"
        if not plain and found != wanted:
            return f"{words} holds rows of {found or 'no order'}, expected {wanted or 'no order'}"
    return None


def rank_fault(
    uses: Sequence[tuple[Use, Split, str]], size: int, mesh: Sequence[int], coordinate: Coordinate, contiguous: bool
) -> str | None:
    """What is wrong with the pieces that one rank holds of a factor of `size` elements, or None."""
    held = [piece(split, mesh, coordinate) for _, split, _ in uses]
    if not uses:
        return None
    share = _share([use for use, _, _ in uses], held, size)
    if contiguous and len(share) > 1:
        return f"{uses[0][2]} holds elements {_show(share)}, expected one contiguous piece"
    for (use, split, words), found in zip(uses, held, strict=True):
        expected = _spread(share, use, size)
        if found != expected:
            return f"{words} holds elements {_show(found)} of dim {split.dim}, expected {_show(expected)}"
    return None


def _share(uses: Sequence[Use], held: Sequence[Ranges], size: int) -> Ranges:
    """A rank's elements of a factor: read off the first dim that has the factor whole, else joined from the parts."""
    for use, ranges in zip(uses, held, strict=True):
        if use.part is None:
            return merge_ranges((a // use.inner, -(-b // use.inner)) for a, b in _clip(ranges, 0, size * use.inner))
    parts = [
        (a + use.part[0], b + use.part[0])
        for use, ranges in zip(uses, held, strict=True)
        if use.part
        for a, b in ranges
    ]
    return merge_ranges(sorted(parts))


def _spread(share: Ranges, use: Use, size: int) -> Ranges:
    """The elements of a dim that belong to `share` of its factor: dim = outer × factor × inner, or a part of it."""
    if use.part is not None:
        return merge_ranges((a - use.part[0], b - use.part[0]) for a, b in _clip(share, *use.part))
    run = size * use.inner
    return merge_ranges((o * run + a * use.inner, o * run + b * use.inner) for o in range(use.outer) for a, b in share)


def _clip(ranges: Ranges, low: int, high: int) -> Ranges:
    return tuple((max(a, low), min(b, high)) for a, b in ranges if a < high and b > low)


def _show(ranges: Ranges) -> str:
    return (", ".join(f"{a}–{b - 1}" for a, b in ranges[:4]) + (", …" if len(ranges) > 4 else "")) or "none"
