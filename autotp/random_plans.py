"""Random legal plans, for tests: a planner hides wrong rules because it rarely picks them; a random plan finds them."""

from __future__ import annotations

from dataclasses import replace
from random import Random

from autotp.decisions import Decisions, Recomputed, recomputable
from autotp.describe import conversions
from autotp.formulate import Border
from autotp.layouts import Layout, SortedCut, Split
from autotp.price.conversion import ConversionPrices
from autotp.program import Ref
from autotp.strategies import Space, Strategy


def random_plan(space: Space, border: Border, prices: ConversionPrices, seed: int) -> Decisions:
    """A random strategy for every representative node, and the cheapest conversions between them.

    Each node first draws a kind of strategy, so that the rare ones come often: replicated, partial, split evenly, split
    unevenly or in several segments. Strategies that no conversion connects to what is drawn already are left out.

    Args:
        space: the strategies; border: the declared inputs and outputs.
        prices: which of several conversion paths is the cheapest.
        seed: the same seed draws the same plan.
    """
    random = Random(seed)
    readers: dict[Ref, list[tuple[int, int]]] = {}
    for (node, output, place), refs in space.tensors.items():
        for ref in refs if not output else ():
            readers.setdefault(ref, []).append((node, place))
    chosen: dict[int, Strategy] = {}
    for node in space.folding.members:
        options = [s for s in space.strategies[node] if _connects(space, prices, node, s, chosen, readers)]
        chosen[node] = _draw(random, options or [space.strategies[node][0]], space.mesh)
    stands_for = space.folding.representative
    paths = {
        (Ref(stands_for[found.ref.node], found.ref.output), found.target): found.path
        for found in conversions(space, chosen, border, prices)
    }
    return Decisions(chosen, paths, dict(border.inputs), dict(border.outputs))


def random_recomputed(space: Space, decisions: Decisions, seed: int) -> Decisions:
    """The same decisions with random sets of tensors made again in backward, other ones by different copies of a block."""
    random = Random(seed)
    found = []
    for number, repeat in enumerate(space.folding.repeats):
        versions = recomputable(space, decisions, number)
        left = repeat.count
        while left and versions:
            copies, share = random.randint(1, left), random.choice((0.1, 0.5, 1.0))
            drawn = {version for version in versions if random.random() < share} | {random.choice(versions)}
            found.append(Recomputed(number, copies, frozenset(drawn)))
            left -= copies
    return replace(decisions, recomputed=tuple(found))


def _connects(
    space: Space,
    prices: ConversionPrices,
    node: int,
    strategy: Strategy,
    chosen: dict[int, Strategy],
    readers: dict[Ref, list[tuple[int, int]]],
) -> bool:
    """Whether every tensor between the node and those already chosen can be converted."""

    def finite(ref: Ref, made: Layout, wanted: Layout) -> bool:
        if made == wanted:
            return True
        table = prices.table(space.program.type_of(ref), space.dim_cuts(ref))
        return table.seconds(made, wanted) < float("inf")

    for place, wanted in enumerate(strategy.operands):
        for ref in space.tensors[node, False, place]:
            producer = strategy if ref.node == node else chosen.get(ref.node)
            if producer is not None and not finite(ref, producer.outputs[ref.output], wanted):
                return False
    for output, made in enumerate(strategy.outputs):
        ref = Ref(node, output)
        for reader, place in readers.get(ref, ()):
            if reader in chosen and not finite(ref, made, chosen[reader].operands[place]):
                return False
    return True


def _draw(random: Random, options: list[Strategy], mesh: tuple[int, ...]) -> Strategy:
    kinds: dict[str, list[Strategy]] = {}
    for option in options:
        kinds.setdefault(_kind(option, mesh), []).append(option)
    return random.choice(kinds[random.choice(sorted(kinds))])


def _kind(strategy: Strategy, mesh: tuple[int, ...]) -> str:
    layouts = (*strategy.operands, *strategy.outputs)
    if any(kind in "PM" for layout in layouts for kind in layout.kinds):
        return "partial"
    splits = [split for layout in layouts for split in layout.splits]
    if not splits:
        return "replicated"
    return "uneven" if any(_uneven(split, [mesh[axis] for axis in split.axes]) for split in splits) else "even"


def _uneven(split: Split, sizes: list[int]) -> bool:
    """Whether a cut has sorted rows, several segments, or granules that the ranks cannot share equally."""
    cut = split.cut
    if isinstance(cut, SortedCut):
        return True
    ranks = 1
    for size in sizes:
        ranks *= size
    repeat, count, _ = cut[0]
    return len(cut) > 1 or repeat != 1 or not isinstance(count, int) or count % ranks != 0
