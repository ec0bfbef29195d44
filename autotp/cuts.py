"""Candidate cuts: in which pieces each dim of each tensor may be split.

A cut starts where a factor is one element per granule, and travels along the graph through the rules: the head dim of a view
becomes a cut of the projection before it in whole heads, the three outputs of a `split` become three segments of the fused one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from autotp.layouts import Cut, Segment, Segments, SortedCut, plain_cut, simplify_cut
from autotp.program import Ref, Size
from autotp.rules.language import Rule, Use, exact_quotient

Slots = Mapping[tuple[bool, int], Sequence[Ref]]
"""(is output, index) of a node → the tensors that stand there in its copies."""

MOST_CUTS = 6
"""Candidate cuts of each kind (plain, sorted by slot, by key) kept per dim; the first ones found, the coarsest and nearest, win."""


def _first(cuts: Iterable[Cut]) -> tuple[Cut, ...]:
    """The first few cuts of each kind."""
    count: Counter[str] = Counter()
    kept = []
    for cut in cuts:
        kind = cut.by if isinstance(cut, SortedCut) else "plain"
        count[kind] += 1
        if count[kind] <= MOST_CUTS:
            kept.append(cut)
    return tuple(kept)


def from_factor(cut: Cut, use: Use) -> Cut | None:
    """The cut of a dim when its factor has `cut`; None if the dim cannot be cut so."""
    if isinstance(cut, SortedCut):  # sorted rows stay whole rows: they are no part of another dim
        return cut if use.is_whole_dim else None
    if use.part is not None:
        return _stretch(cut, *use.part)
    scaled = tuple(Segment(repeat, count, granule * use.inner) for repeat, count, granule in cut)
    if use.rows is not None:
        return SortedCut(use.rows.by, scaled, use.rows.size, use.rows.order)
    if use.outer == 1:
        return scaled
    if len(scaled) == 1:
        return (scaled[0]._replace(repeat=scaled[0].repeat * use.outer),)
    return scaled * use.outer if isinstance(use.outer, int) and use.outer <= 64 else None


def to_factor(cut: Cut, use: Use) -> Cut | None:
    """The cut of the factor when a dim that is no part of it has `cut`; None if the cut does not go through."""
    if use.rows is not None:
        if not isinstance(cut, SortedCut) or (cut.by, cut.order) != (use.rows.by, use.rows.order):
            return None
        cut = cut.cut
    elif isinstance(cut, SortedCut):
        return cut if use.is_whole_dim else None
    segments = []
    for repeat, count, granule in cut:
        inner = exact_quotient(granule, use.inner)
        if inner is None:
            return None
        segments.append(Segment(repeat, count, inner))
    if use.outer == 1:
        return tuple(segments)
    if len(segments) == 1:
        repeat = exact_quotient(segments[0].repeat, use.outer)
        return None if repeat is None else (segments[0]._replace(repeat=repeat),)
    if isinstance(use.outer, int) and len(segments) % use.outer == 0:
        period = len(segments) // use.outer
        if segments == segments[:period] * use.outer:
            return tuple(segments[:period])
    return None


def _stretch(cut: Segments, start: Size, stop: Size) -> Segments | None:
    """The segments that cover exactly [start, stop) of a dim."""
    found: list[Segment] = []
    position: Size = 0
    for repeat, count, granule in cut:
        run = count * granule
        if isinstance(repeat, int) and all(isinstance(size, int) for size in (run, position, start, stop)):
            runs = [position + i * run for i in range(repeat)]
            inside = [at for at in runs if at >= start and at + run <= stop]  # type: ignore[operator]
            if any(at < stop and at + run > start and at not in inside for at in runs):  # type: ignore[operator]
                return None
            if inside:
                found.append(Segment(len(inside), count, granule))
        elif position == start and position + repeat * run == stop:
            found.append(Segment(repeat, count, granule))
        position = position + repeat * run
    covered: Size = 0
    for repeat, count, granule in found:
        covered = covered + repeat * count * granule
    return tuple(found) if found and covered == stop - start else None


def _stretches(size: Size, uses: Iterable[Use]) -> list[tuple[Size, Use | None]]:
    """The parts of a factor in order, each with its size, and what lies between them: elements that a slice leaves out."""
    found: list[tuple[Size, Use | None]] = []
    position: Size = 0
    parts = [use for use in uses if use.part is not None]
    for use in parts:
        start, stop = use.part or (0, 0)
        if isinstance(start, int) and isinstance(position, int) and start > position:
            found.append((start - position, None))
        found.append((stop - start, use))
        position = stop
    if parts and isinstance(size, int) and isinstance(position, int) and size > position:
        found.append((size - position, None))
    return found


def join_parts(choice: Cut, part: int, sizes: Sequence[Size], others: Sequence[Sequence[Cut]]) -> Cut | None:
    """The cut of a concatenation when its `part`-th stretch has cut `choice`: the others follow in the same pattern.

    A neighbour takes a candidate of its own with as many granules, else `choice` scaled to its size.
    """
    if isinstance(choice, SortedCut):
        return None
    shape = [(segment.repeat, segment.count) for segment in choice]
    joined: list[Segment] = []
    for index, size in enumerate(sizes):
        if index == part:
            joined.extend(choice)
            continue
        plain = (cut for cut in others[index] if not isinstance(cut, SortedCut))
        same = next((cut for cut in plain if [(s.repeat, s.count) for s in cut] == shape), None)
        if same is None:
            ratio = [exact_quotient(segment.granule * size, sizes[part]) for segment in choice]
            if any(granule is None for granule in ratio):
                return None
            same = tuple(s._replace(granule=granule) for s, granule in zip(choice, ratio, strict=True))
        joined.extend(same)
    return tuple(joined)


@dataclass
class CutTable:
    """Candidate cuts by (tensor, dim), grown until nothing changes. `parts` is the number of ranks of the mesh."""

    parts: int
    cuts: dict[tuple[Ref, int], dict[Cut, None]] = field(default_factory=dict)

    def of(self, ref: Ref, dim: int) -> tuple[Cut, ...]:
        """The candidates of one dim, in order of discovery."""
        return tuple(self.cuts.get((ref, dim), ()))

    def add(self, ref: Ref, dim: int, cut: Cut) -> bool:
        """Record a candidate; True if it is new."""
        known = self.cuts.setdefault((ref, dim), {})
        cut = simplify_cut(cut, self.parts)
        if cut in known or len(_first([*known, cut])) <= len(known):
            return False
        known[cut] = None
        return True

    def factor_cuts(
        self, rule: Rule, factor: str, tensors: Mapping[tuple[bool, int], Sequence[Ref]]
    ) -> tuple[Cut, ...]:
        """Every cut of `factor` that all its dims can take, from the candidates of those dims.

        `tensors` maps (is output, index) to the tensors that stand there in the copies of this node.
        """
        uses = rule.uses[factor]
        found: dict[Cut, None] = {}
        stretches = _stretches(rule.factors[factor], uses)
        sizes = [size for size, _ in stretches]
        if factor in rule.special or not stretches:
            found[simplify_cut(plain_cut(rule.factors[factor]), self.parts)] = None
        else:
            found[simplify_cut(tuple(segment for size in sizes for segment in plain_cut(size)), self.parts)] = None
        for use in uses:
            for ref in tensors[use.output, use.index]:
                for cut in self.of(ref, use.dim):
                    lifted: Cut | None
                    if use.part is None:
                        lifted = to_factor(cut, use)
                    else:
                        owners = [owner for _, owner in stretches]
                        others = [[c for r in tensors[p.output, p.index] for c in self.of(r, p.dim)] if p else [] for p in owners]
                        lifted = join_parts(cut, owners.index(use), sizes, others)
                    if lifted is not None:
                        found[simplify_cut(lifted, self.parts)] = None
        if factor in rule.special:  # rewritten with one offset: a single contiguous piece per rank
            found = {cut: None for cut in found if not isinstance(cut, SortedCut) and len(cut) == 1 and cut[0].repeat == 1}
        return _first(cut for cut in found if all(from_factor(cut, use) is not None for use in uses))

    def usable_cuts(self, rule: Rule, factor: str, tensors: Slots) -> tuple[Cut, ...]:
        """The cuts of `factor` that are candidates of every dim concerned (a full table may lack some)."""

        def known(cut: Cut, use: Use) -> bool:
            dim_cut = from_factor(cut, use)
            return dim_cut is not None and all(
                simplify_cut(dim_cut, self.parts) in self.of(ref, use.dim) for ref in tensors[use.output, use.index]
            )

        cuts = self.factor_cuts(rule, factor, tensors)
        return tuple(cut for cut in cuts if all(known(cut, use) for use in rule.uses[factor]))


def candidate_cuts(
    nodes: Iterable[tuple[Rule, Slots]], parts: int, border: Iterable[tuple[Ref, int, Cut]] = ()
) -> CutTable:
    """Let cuts travel through the rules of all nodes until no dim gains a candidate (at most eight sweeps).

    `border` lists (tensor, dim, cut) that users declared.
    """
    table = CutTable(parts)
    for ref, dim, cut in border:
        table.add(ref, dim, cut)
    order = list(nodes)
    for sweep in range(8):
        changed = False
        for rule, tensors in order if sweep % 2 == 0 else reversed(order):
            for factor in rule.splittable:
                for cut in table.factor_cuts(rule, factor, tensors):
                    for use in rule.uses[factor]:
                        dim_cut = from_factor(cut, use)
                        assert dim_cut is not None
                        for ref in tensors[use.output, use.index]:
                            changed |= table.add(ref, use.dim, dim_cut)
        if not changed:
            break
    return table
