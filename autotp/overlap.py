"""What runs beside compute: a repeated block's gathers of weights and reductions of their gradients, one block ahead or behind.

The emitted module begins them a block early and waits for them a block late (`runtime/prefetch.py`), so that the shorter of both, compute
and these exchanges, is hidden: a step takes the larger one. The first copy to run has no block before it to hide behind.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy

from autotp.formulate_memory import Tensor, home_of
from autotp.price.conversion import ConversionPrices
from autotp.price.work import Seconds
from autotp.problem import Link, Matrix, Overlap
from autotp.program import Ref
from autotp.strategies import Space

WAYS = ("forward", "backward")


def overlaps(
    space: Space,
    prices: ConversionPrices,
    nodes: Sequence[int | None],
    links: Sequence[Link],
    tensors: Sequence[Tensor],
    times: Mapping[int, Sequence[Seconds]],
) -> tuple[Overlap, ...]:
    """For each repeated block and direction, the seconds of all its copies that may run beside each other.

    Args:
        nodes: the representative node of each choice, None for outputs.
        times: representative node → the seconds of one copy with each of its strategies.
    """
    found = []
    places, members = space.folding.places, space.folding.members
    homes = [
        home_of(space, tensor.copies[0]) if space.program.nodes[tensor.ref.node].kind == "parameter" else -1 for tensor in tensors
    ]
    for number, repeat in enumerate(space.folding.repeats):
        exchanges: dict[str, dict[int, Matrix]] = {way: {} for way in WAYS}
        for place, (link, tensor) in enumerate(zip(links, tensors, strict=True)):
            if homes[place] != number:
                continue
            table = prices.table(space.program.type_of(tensor.ref), space.dim_cuts(tensor.ref))
            forward = numpy.minimum(table.between(tensor.layouts, forward=True) * len(tensor.copies), link.seconds)
            with numpy.errstate(invalid="ignore"):
                backward = numpy.where(numpy.isfinite(link.seconds), link.seconds - forward, 0.0)
            forward = numpy.where(numpy.isfinite(forward), forward, 0.0)
            for way, seconds in zip(WAYS, (forward, backward), strict=True):
                exchanges[way][place] = seconds * hideable(repeat.count)
        inside = {choice: node for choice, node in enumerate(nodes) if node is not None and _is_inside(space, places, node, number)}
        for way in WAYS:
            if any(seconds.any() for seconds in exchanges[way].values()):
                compute = {
                    choice: tuple(getattr(time, way) * len(members[node]) for time in times[node]) for choice, node in inside.items()
                }
                found.append(Overlap(f"block {number} {way}", compute, exchanges[way]))
    return tuple(found)


def hidden_seconds(space: Space, compute: Mapping[int, Seconds], exchanges: Sequence[tuple[Ref, float, float]]) -> float:
    """The same counted on the unfolded program: seconds of a step that are hidden.

    Args:
        compute: representative node → its seconds, of one copy.
        exchanges: every conversion of a parameter: its forward and backward seconds.
    """
    total = 0.0
    homes = [(home_of(space, ref), pair) for ref, *pair in exchanges]
    for number, repeat in enumerate(space.folding.repeats):
        copies = [index for copy in range(repeat.count) for index in repeat.instance(copy)]
        own = [compute[space.folding.representative[index]] for index in copies]
        moved = [pair for home, pair in homes if home == number]
        for way, name in enumerate(WAYS):
            total += min(sum(getattr(time, name) for time in own), sum(pair[way] for pair in moved) * hideable(repeat.count))
    return total


def hideable(count: int) -> float:
    """The share of a repeat's exchanges that has a block to run beside."""
    return (count - 1) / count


def _is_inside(space: Space, places: Mapping[int, Any], node: int, number: int) -> bool:
    place = places.get(node)
    return space.program.nodes[node].kind == "op" and place is not None and place[0] == number
