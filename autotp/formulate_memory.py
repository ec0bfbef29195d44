"""The bytes of a planning problem: of state, of what is saved for backward, of what is in work; and what making it again costs."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy

from autotp.in_place import writes_in_place
from autotp.layouts import Layout, local_shape
from autotp.price.conversion import ConversionPrices
from autotp.price.memory import saved_for
from autotp.price.storage import is_view
from autotp.price.work import Seconds
from autotp.problem import Link, Matrix, Memory, Saved
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
    times: Mapping[int, Sequence[Seconds]],
) -> Memory:
    """Bytes of state, of what is saved for backward, and of what is in work.

    Args:
        strategies: of each choice; nodes: the representative node of each choice, None for outputs.
        times: representative node → the seconds of one copy with each of its strategies.
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
    found = _saved(space, prices, nodes, links, tensors, times)
    return Memory(tuple(map(tuple, held)), found, tuple(map(tuple, working)))


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


# ---- what is saved --------------------------------------------------------------------------------------------------


def _saved(
    space: Space,
    prices: ConversionPrices,
    nodes: Sequence[int | None],
    links: Sequence[Link],
    tensors: Sequence[Tensor],
    times: Mapping[int, Sequence[Seconds]],
) -> tuple[Saved, ...]:
    """What operators save for backward, and weights that are gathered. A compiler decides itself what is made again."""
    program, may = space.program, prices.train and not prices.compiled
    views = {index for index, options in times.items() if is_view(program.nodes[index]) and not any(time.forward for time in options)}
    kept = _saved_tensors(space, views)
    kept_by = [_savers(space, link, tensor.ref, nodes, kept, views) for link, tensor in zip(links, tensors, strict=True)]
    of_saved = {index for index in views if (index, 0) in kept}
    savable = {tensor.ref for tensor, savers in zip(tensors, kept_by, strict=True) if savers or tensor.ref.node in of_saved}
    chain = _chains(space, savable, times)
    found = []
    for number, (link, tensor, savers) in enumerate(zip(links, tensors, kept_by, strict=True)):
        kind, of = program.nodes[tensor.ref.node].kind, program.type_of(tensor.ref)
        sizes = numpy.array([float(prices.local_bytes(of, layout)) for layout in tensor.layouts])
        if kind == "parameter":
            forward = _forward(space, prices, tensor)
            gathered = (forward > 0) & (sizes[None, :] >= sizes[:, None])  # else it is a part of what is there
            folded = home_of(space, tensor.copies[0]) >= 0
            held = len(tensor.copies) if prices.train or not folded else 1  # without backward, one copy's after the other's
            again = forward if folded and may else _never(gathered.shape)
            found.append(Saved(number, tuple(range(1, len(link.consumers) + 1)), gathered * sizes * held, again))
        elif prices.train and kind == "op" and savers:
            size = numpy.broadcast_to(sizes * len(tensor.copies), link.seconds.shape)
            found.append(Saved(number, savers, size, _again(space, prices, link, tensor, savers, chain, times)))
    return tuple(found)


def _saved_tensors(space: Space, views: Collection[int]) -> set[tuple[int, int]]:
    """(representative node, operand position; -1 - number for its outputs) of all that is saved; a view is its operand's memory."""
    program, found = space.program, set[tuple[int, int]]()
    for index in space.folding.members:
        node = program.nodes[index]
        if node.kind == "op" and index not in views and any(output.requires_grad for output in node.outputs):
            operands, results = saved_for(node, [program.type_of(ref).requires_grad for ref in node.inputs])
            found |= {(index, place) for place in operands}
            found |= {(index, -1 - place) for place in results if node.outputs[place].requires_grad}
    before = -1
    while before != len(found):  # views of views, and of the copy before
        before = len(found)
        for index in sorted(views, reverse=True):
            outputs = [Ref(index, output) for output in range(len(program.nodes[index].outputs))]
            users = [use for ref in outputs for use in program.users.get(ref, ())]
            if any((space.folding.representative[user], place) in found for user, place in users):
                found.add((index, 0))
    return found


def _savers(
    space: Space, link: Link, ref: Ref, nodes: Sequence[int | None], kept: Collection[tuple[int, int]], views: Collection[int]
) -> tuple[int, ...]:
    """Which of a link's ends keep its tensor for backward: 0 for the producer, then its consumers; none if it is a view."""
    if ref.node in views:
        return ()
    found = [0] if (ref.node, -1 - ref.output) in kept else []
    for place, (choice, _) in enumerate(link.consumers, 1):
        index = nodes[choice]
        if index is not None:
            operands = range(len(space.program.nodes[index].inputs))
            if any((index, operand) in kept and ref in space.tensors[index, False, operand] for operand in operands):
                found.append(place)
    return tuple(found)


# ---- making it again: lower bounds, which take whatever is saved anyway to be there ---------------------------------


def _forward(space: Space, prices: ConversionPrices, tensor: Tensor) -> Matrix:
    """Forward seconds of the conversions between a tensor's layouts, of all copies."""
    table = prices.table(space.program.type_of(tensor.ref), space.dim_cuts(tensor.ref))
    return table.between(tensor.layouts, forward=True) * len(tensor.copies)


def _never(shape: tuple[int, ...]) -> Matrix:
    return numpy.broadcast_to(numpy.inf, shape)


def _again(
    space: Space,
    prices: ConversionPrices,
    link: Link,
    tensor: Tensor,
    savers: Sequence[int],
    chain: Mapping[Ref, float],
    times: Mapping[int, Sequence[Seconds]],
) -> Matrix:
    """Seconds of making a tensor's versions again, of all copies, never more than it takes; infinite outside repeated blocks.

    As it is made: its operator once more. Converted: the conversion's forward, and the operator too where nobody can have saved the
    tensor as it is made. A conversion that moves nothing is the same memory under another name.
    """
    count = len(tensor.layouts)
    if prices.compiled or not all(_stays_inside(space, ref) for ref in tensor.copies):
        return _never((count, count))
    node = space.program.nodes[tensor.ref.node]
    before = sum(chain.get(ref, 0.0) for ref in node.inputs)
    operator = numpy.full(count, numpy.inf)
    numpy.minimum.at(operator, list(link.made), [time.forward + before for time in times[node.index]])
    operator *= len(tensor.copies) / len(node.outputs)
    as_saved = {layout for place in savers if place for layout in link.consumers[place - 1][1]} | (set(link.made) if 0 in savers else set())
    unsaved = numpy.array([layout not in as_saved for layout in range(count)])
    again = _forward(space, prices, tensor)
    same = again == 0
    again += numpy.where(unsaved, operator / len(link.consumers), 0.0)[:, None]
    again[same] = numpy.broadcast_to(operator[:, None], again.shape)[same]
    return again


def _chains(space: Space, savable: set[Ref], times: Mapping[int, Sequence[Seconds]]) -> dict[Ref, float]:
    """Tensor of a block's first copy that nobody saves → each consumer's share of the seconds of making it again.

    The shares of all consumers add up to its operator and the shares of what that reads: whoever is made again, all of it runs.
    """
    found: dict[Ref, float] = {}
    for index, options in times.items():
        node = space.program.nodes[index]
        if node.kind != "op":
            continue
        for output in range(len(node.outputs)):
            ref = Ref(index, output)
            users = space.program.users.get(ref, ())
            if users and ref not in savable and _stays_inside(space, ref):
                seconds = min(time.forward for time in options) + sum(found.get(read, 0.0) for read in node.inputs)
                found[ref] = seconds / len(node.outputs) / len({user for user, _ in users})
    return found


def _stays_inside(space: Space, ref: Ref) -> bool:
    """Whether a tensor is made and used inside one copy of a repeated block, and nowhere else."""
    places = space.folding.places
    home = places.get(ref.node)
    if home is None or ref in space.program.outgoing:
        return False
    users = {user for user, _ in space.program.users.get(ref, ())}
    return all(places.get(user) == home for user in users) and all(
        _stays_inside(space, Ref(user, output))
        for user in users
        if is_view(space.program.nodes[user])
        for output in range(len(space.program.nodes[user].outputs))
    )
