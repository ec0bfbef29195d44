"""The bytes of a planning problem: of state, and of what is in work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from autotp.in_place import writes_in_place
from autotp.layouts import Layout, local_shape
from autotp.price.conversion import ConversionPrices
from autotp.problem import Link, Memory, Saved
from autotp.program import Node, Ref
from autotp.strategies import Space, Strategy


@dataclass(frozen=True)
class Tensor:
    """What a link stands for: its representative tensor, the tensors of the program (copies), and its layouts by number."""

    ref: Ref
    copies: tuple[Ref, ...]
    layouts: tuple[Layout, ...]


def memory_of(
    space: Space,
    prices: ConversionPrices,
    strategies: Sequence[tuple[Strategy, ...]],
    nodes: Sequence[int | None],
    links: Sequence[Link],
    tensors: Sequence[Tensor],
    saved: tuple[Saved, ...],
) -> Memory:
    """Bytes of state, of what is saved for backward, and of what is in work.

    Args:
        strategies: of each choice; nodes: the representative node of each choice, None for outputs.
        saved: what is saved (`formulate_saved`).
    """
    program, members, in_place = space.program, space.folding.members, writes_in_place(space.program)
    held = [[0.0] * len(options) for options in strategies]
    working = [[0.0] * len(options) for options in strategies]
    for place, node_index in enumerate(nodes):
        if node_index is None:  # outputs: below, with their tensors
            continue
        node = program.nodes[node_index]
        for choice, strategy in enumerate(strategies[place]):
            if node.kind == "op":
                working[place][choice] = float(_in_work(space, prices, node, strategy, node_index in in_place))
            elif node.kind != "input":
                state = sum(state_bytes(prices, node, strategy.outputs[0]).values())
                held[place][choice] = float(state * len(members[node_index]))
    for link, tensor in zip(links, tensors, strict=True):
        for choice, layouts in link.consumers:
            if nodes[choice] is None:
                working[choice][0] = float(prices.local_bytes(program.type_of(tensor.ref), tensor.layouts[layouts[0]]))
    return Memory(tuple(map(tuple, held)), saved, tuple(map(tuple, working)))


def _in_work(space: Space, prices: ConversionPrices, node: Node, strategy: Strategy, in_place: bool) -> int:
    """Bytes alive while a node runs and not counted elsewhere: forward its operands and outputs, backward their gradients too.

    In training, operands are mostly saved anyway and counted there; their gradients are not. Parameters and buffers count on their own.
    """
    program = space.program
    outputs = sum(prices.local_bytes(tensor, layout) for tensor, layout in zip(node.outputs, strategy.outputs, strict=True))
    outputs = 0 if in_place else outputs
    backward = prices.train and node.outputs[0].requires_grad
    operands = 0
    for ref, layout in zip(node.inputs, strategy.operands, strict=True):
        tensor = program.type_of(ref)
        if program.nodes[ref.node].kind not in ("parameter", "buffer") and (tensor.requires_grad or not prices.train):
            operands += prices.local_bytes(tensor, layout)
    return 2 * outputs + operands if backward else outputs + (0 if prices.train else operands)


def state_bytes(prices: ConversionPrices, node: Node, layout: Layout) -> dict[str, int]:
    """Bytes per device of one parameter or buffer: itself, its gradient, its optimizer state."""
    tensor = node.outputs[0]
    own = prices.local_bytes(tensor, layout)
    if not (prices.train and tensor.requires_grad):
        return {"parameters": own, "gradients": 0, "optimizer": 0}
    shape = local_shape(tensor.hint, prices.hint(layout), prices.mesh, (0,) * len(prices.mesh))
    return {"parameters": own, "gradients": own, "optimizer": prices.optimizer.state_bytes(shape, tensor.dtype.itemsize)}


def home_of(space: Space, ref: Ref) -> int:
    """The repeat that holds the only users of a folded parameter, or -1."""
    members = space.folding.members[space.folding.representative[ref.node]]
    if len(members) == 1:
        return -1
    user = space.program.users[ref][0][0]
    return next(n for n, r in enumerate(space.folding.repeats) if r.start <= user < r.start + r.period * r.count)
