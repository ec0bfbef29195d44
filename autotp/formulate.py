"""From strategies and prices to the planning problem in numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from autotp.in_place import writes_in_place
from autotp.layouts import Layout, local_shape, uniform
from autotp.price.conversion import ConversionPrices
from autotp.price.memory import saved
from autotp.price.work import node_seconds, update_seconds
from autotp.problem import Bucket, Choice, Keep, Link, Memory, Problem
from autotp.program import Node, Ref
from autotp.strategies import Space, Strategy


@dataclass(frozen=True)
class Border:
    """The layouts in which the user passes inputs (by node) and receives outputs (by position); I where nothing is declared."""

    inputs: Mapping[int, Layout]
    outputs: Mapping[int, Layout]


@dataclass(frozen=True)
class Formulation:
    """A problem, and which program part each of its numbers stands for.

    Attributes:
        problem: the numbers.
        nodes: the representative node of each choice; outputs come after, as None.
        tensors: the representative tensor of each link, and the tensors of the program that it stands for.
    """

    problem: Problem
    nodes: tuple[int | None, ...]
    tensors: tuple[tuple[Ref, tuple[Ref, ...]], ...]


Wanted = tuple[int, int]
"""A consumer: (number of its choice, operand position); a buffer consumes its new value, at `UPDATE`, in the layout in which it rests."""

UPDATE = -1


def formulate(
    space: Space,
    prices: ConversionPrices,
    border: Border,
    allowed: Mapping[int, tuple[int, ...]] | None = None,
    limit: float | None = None,
) -> Formulation:
    """Write the planning problem of a program.

    Args:
        allowed: representative node → the strategies that pins leave; all where it is missing.
        limit: peak bytes per device, or None.
    """
    program, members = space.program, space.folding.members
    nodes: list[int | None] = list(members)
    number = {node: place for place, node in enumerate(members)}
    strategies: list[tuple[Strategy, ...]] = [space.strategies[node] for node in members]
    choices = []
    for node in members:
        seconds = tuple(_seconds(space, prices, node, strategy) * len(members[node]) for strategy in space.strategies[node])
        pinned = (allowed or {}).get(node, tuple(range(len(seconds))))
        choices.append(Choice(program.nodes[node].name, seconds, pinned))
    ends: dict[Ref, list[Wanted]] = {}
    for ref, layout in outgoing_tensors(space, border):
        ends.setdefault(ref, []).append((len(choices), 0))
        choices.append(Choice(f"output {len(choices) - len(members)}", (0.0,), (0,)))
        nodes.append(None)
        strategies.append((Strategy((), (), (layout,), ()),))
    links: list[Link] = []
    tensors: list[tuple[Ref, tuple[Ref, ...]]] = []
    for ref, consumers, copies in _groups(space, number, ends):
        table = prices.table(program.type_of(ref), space.dim_cuts(ref))
        producer = number[ref.node]
        made = tuple(table.number[strategy.outputs[ref.output]] for strategy in strategies[producer])
        wanted = [
            (choice, tuple(table.number[_consumed(strategy, place)] for strategy in strategies[choice])) for choice, place in consumers
        ]
        cost = {}
        for source in set(made):
            for target in {layout for _, layouts in wanted for layout in layouts}:
                if source != target and table.cost[source, target] < float("inf"):
                    broken = prices.broken_seconds(program, ref, table, table.layouts[source], table.layouts[target])
                    cost[source, target] = float(table.cost[source, target] + broken) * len(copies)
        links.append(Link(program.nodes[ref.node].name, producer, made, tuple(wanted), cost))
        tensors.append((ref, copies))
    buckets = _buckets(space, prices, links, tensors)
    memory = _memory(space, prices, strategies, nodes, links, tensors)
    problem = Problem(tuple(choices), tuple(links), buckets, memory, limit)
    return Formulation(problem, tuple(nodes), tuple(tensors))


def _consumed(strategy: Strategy, place: int) -> Layout:
    return strategy.outputs[0] if place == UPDATE else strategy.operands[place]


def outgoing_tensors(space: Space, border: Border) -> list[tuple[Ref, Layout]]:
    """Every output, as the representative tensor and the layout in which it leaves."""
    program, stands_for = space.program, space.folding.representative
    whole = uniform("I", len(space.mesh))
    found = []
    for position, value in enumerate(program.outputs):
        if isinstance(value, Ref):
            found.append((value, border.outputs.get(position, whole)))
    return [(Ref(stands_for[ref.node], ref.output), layout) for ref, layout in found]


def _seconds(space: Space, prices: ConversionPrices, index: int, strategy: Strategy) -> float:
    node = space.program.nodes[index]
    if node.kind == "op":
        return node_seconds(space.program, node, space.rules[index], strategy, prices).total
    if node.kind == "parameter" and prices.train and node.outputs[0].requires_grad:
        return update_seconds(prices, node.outputs[0], strategy.outputs[0])
    return 0.0


def _groups(
    space: Space, number: Mapping[int, int], ends: Mapping[Ref, list[Wanted]]
) -> list[tuple[Ref, tuple[Wanted, ...], tuple[Ref, ...]]]:
    """(representative tensor, its consumers, the tensors it stands for): copies with other consumers form a group of their own."""
    program, stands_for = space.program, space.folding.representative
    outgoing = {value for value in program.outputs if isinstance(value, Ref)}
    updating: dict[Ref, set[Wanted]] = {}
    for buffer, ref in program.updated.items():
        if stands_for[buffer] != stands_for[ref.node]:  # else its new value is a buffer of the same layout
            updating.setdefault(ref, set()).add((number[stands_for[buffer]], UPDATE))
    found: dict[tuple[Ref, tuple[Wanted, ...]], list[Ref]] = {}
    for ref in dict.fromkeys((*program.users, *outgoing, *updating)):
        owner = Ref(stands_for[ref.node], ref.output)
        consumers = {(number[stands_for[user]], position) for user, position in program.users.get(ref, ())} | updating.get(ref, set())
        if ref in outgoing:
            consumers |= set(ends[owner])
        found.setdefault((owner, tuple(sorted(consumers))), []).append(ref)
    order = sorted(found, key=lambda key: (key[0].node, key[0].output, key[1]))
    return [(owner, consumers, tuple(found[owner, consumers])) for owner, consumers in order]


def home_of(space: Space, ref: Ref) -> int:
    """The repeat that holds the only users of a folded parameter, or -1."""
    members = space.folding.members[space.folding.representative[ref.node]]
    if len(members) == 1:
        return -1
    user = space.program.users[ref][0][0]
    return next(n for n, r in enumerate(space.folding.repeats) if r.start <= user < r.start + r.period * r.count)


def _buckets(
    space: Space, prices: ConversionPrices, links: list[Link], tensors: list[tuple[Ref, tuple[Ref, ...]]]
) -> tuple[Bucket, ...]:
    """Gradient all-reduces of the parameters of one block are merged: each pays for its bytes, the bucket once for the start.

    Takes the start-up time out of the prices of the links concerned.
    """
    members: dict[tuple[int, tuple[int, ...]], list[tuple[int, int, int]]] = {}
    for place, (ref, copies) in enumerate(tensors):
        if space.program.nodes[ref.node].kind != "parameter":
            continue
        table = prices.table(space.program.type_of(ref), space.dim_cuts(ref))
        for source, target in list(links[place].seconds):
            path = table.path(table.layouts[source], table.layouts[target])
            if not all(move.kinds == ("I", "R") for move in path):
                continue
            axes = tuple(move.axis for move in path)
            start = sum(prices.latency(axis) for axis in axes) * len(copies)
            links[place].seconds[source, target] = max(links[place].seconds[source, target] - start, 0.0)
            members.setdefault((home_of(space, copies[0]), axes), []).append((place, source, target))
    buckets = []
    for (home, axes), used in members.items():
        count = space.folding.repeats[home].count if home >= 0 else 1
        name = f"block {home} axes {axes}"
        buckets.append(Bucket(name, sum(prices.latency(axis) for axis in axes) * count, tuple(used)))
    return tuple(buckets)


def _memory(
    space: Space,
    prices: ConversionPrices,
    strategies: list[tuple[Strategy, ...]],
    nodes: list[int | None],
    links: list[Link],
    tensors: list[tuple[Ref, tuple[Ref, ...]]],
) -> Memory:
    """Bytes of state, of what is saved for backward, and of what is in work."""
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
                held[place][choice] = float(
                    sum(state_bytes(prices, node, strategy.outputs[0]).values()) * len(members[node_index])
                )
    keeps: list[Keep] = []
    converted: dict[tuple[int, int, int], float] = {}
    for place, (ref, copies) in enumerate(tensors):
        tensor = program.type_of(ref)
        table = prices.table(tensor, space.dim_cuts(ref))
        for choice, layouts in links[place].consumers:
            if nodes[choice] is None:
                working[choice][0] = float(prices.local_bytes(tensor, table.layouts[layouts[0]]))
        if program.nodes[ref.node].kind == "parameter":
            for source, target in links[place].seconds:
                if len(table.layouts[target].splits) < len(table.layouts[source].splits):
                    size = float(prices.local_bytes(tensor, table.layouts[target]) * len(copies))
                    converted[place, source, target] = size
            continue
        if not prices.train or program.nodes[ref.node].kind != "op":
            continue
        by_layout: dict[int, list[tuple[int, tuple[int, ...]]]] = {}
        for choice, layouts in savers(space, links[place], ref, nodes):
            for layout in set(layouts):
                wanting = tuple(n for n, other in enumerate(layouts) if other == layout)
                by_layout.setdefault(layout, []).append((choice, wanting))
        for layout, wanted in by_layout.items():
            size = float(prices.local_bytes(tensor, table.layouts[layout]) * len(copies))
            if len(wanted) > 1:
                keeps.append(Keep(size, tuple(wanted)))
            else:
                for strategy_number in wanted[0][1]:
                    held[wanted[0][0]][strategy_number] += size
    return Memory(tuple(map(tuple, held)), converted, tuple(keeps), tuple(map(tuple, working)))


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


def savers(space: Space, link: Link, ref: Ref, nodes: list[int | None] | tuple[int | None, ...]) -> list[tuple[int, tuple[int, ...]]]:
    """Who keeps a tensor for backward: (choice, layout number per strategy), the producer itself included."""
    program = space.program
    found = []
    producer = program.nodes[ref.node]
    if producer.kind == "op" and producer.outputs[ref.output].requires_grad and ref.output in saved(producer)[1]:
        found.append((link.producer, link.made))
    for choice, layouts in link.consumers:
        index = nodes[choice]
        if index is None:
            continue
        consumer = program.nodes[index]
        if not any(output.requires_grad for output in consumer.outputs):
            continue
        places = [p for p in saved(consumer)[0] if ref in space.tensors[index, False, p]]
        if places:
            found.append((choice, layouts))
    return found


def state_bytes(prices: ConversionPrices, node: Node, layout: Layout) -> dict[str, int]:
    """Bytes per device of one parameter or buffer: itself, its gradient, its optimizer state."""
    tensor = node.outputs[0]
    own = prices.local_bytes(tensor, layout)
    if not (prices.train and tensor.requires_grad):
        return {"parameters": own, "gradients": 0, "optimizer": 0}
    shape = local_shape(tensor.hint, prices.hint(layout), prices.mesh, (0,) * len(prices.mesh))
    return {"parameters": own, "gradients": own, "optimizer": prices.optimizer.state_bytes(shape, tensor.dtype.itemsize)}
