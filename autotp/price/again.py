"""What it costs to make a tensor again in backward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from autotp.layouts import Layout, Move
from autotp.price.conversion import ConversionPrices
from autotp.price.work import node_seconds
from autotp.program import Ref
from autotp.strategies import Space, Strategy


@dataclass(frozen=True)
class Again:
    """Seconds of one tensor made again: of its operator, or of the conversion to its layout, local moves included."""

    compute: float = 0.0
    communication: float = 0.0

    @property
    def total(self) -> float:
        """Both together."""
        return self.compute + self.communication


def again(
    space: Space,
    prices: ConversionPrices,
    chosen: Mapping[int, Strategy],
    paths: Mapping[tuple[Ref, Layout], tuple[Move, ...]],
    version: tuple[Ref, Layout],
) -> Again:
    """Forward seconds of what makes a tensor of a repeated block in a layout, for one copy.

    Args:
        chosen: representative node → its strategy.
        paths: (representative tensor, layout) → the moves from the layout in which it is made.
        version: the tensor, of any copy, and its layout.
    """
    ref, layout = version
    owner = Ref(space.folding.representative[ref.node], ref.output)
    strategy = chosen[owner.node]
    if layout != strategy.outputs[owner.output]:
        return Again(communication=prices.forward_seconds(paths[owner, layout], space.program.type_of(owner)))
    node = space.program.nodes[owner.node]
    return Again(compute=node_seconds(space.program, node, space.rules[owner.node], strategy, prices).forward)
