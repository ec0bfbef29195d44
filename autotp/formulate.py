"""From strategies and prices to the planning problem in numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy

from autotp.formulate_memory import Tensor, home_of, memory_of
from autotp.formulate_saved import saved_of
from autotp.layouts import Layout, uniform
from autotp.overlap import overlaps
from autotp.price.conversion import ConversionPrices
from autotp.price.work import Seconds, node_seconds, update_seconds
from autotp.problem import Bucket, Choice, Link, Matrix, Problem
from autotp.program import Ref, map_refs
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
        tensors: what each link stands for.
    """

    problem: Problem
    nodes: tuple[int | None, ...]
    tensors: tuple[Tensor, ...]


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
        limit: peak bytes per device, or None; only with one may anything be made again.
    """
    program, members = space.program, space.folding.members
    nodes: list[int | None] = list(members)
    number = {node: place for place, node in enumerate(members)}
    strategies: list[tuple[Strategy, ...]] = [space.strategies[node] for node in members]
    times = _times(space, prices)
    choices = []
    for node in members:
        seconds = tuple(time.total * len(members[node]) for time in times[node])
        pinned = (allowed or {}).get(node, tuple(range(len(seconds))))
        choices.append(Choice(program.nodes[node].name, seconds, pinned))
    ends: dict[Ref, list[Wanted]] = {}
    for ref, layout in outgoing_tensors(space, border):
        ends.setdefault(ref, []).append((len(choices), 0))
        choices.append(Choice(f"output {len(choices) - len(members)}", (0.0,), (0,)))
        nodes.append(None)
        strategies.append((Strategy((), (), (layout,), ()),))
    links: list[Link] = []
    tensors: list[Tensor] = []
    for ref, consumers, copies in _groups(space, number, ends):
        producer = number[ref.node]
        made = [strategy.outputs[ref.output] for strategy in strategies[producer]]
        wanted = [(choice, [_consumed(strategy, place) for strategy in strategies[choice]]) for choice, place in consumers]
        tensor = Tensor(ref, copies, tuple(dict.fromkeys([*made, *(layout for _, layouts in wanted for layout in layouts)])))
        place = {layout: row for row, layout in enumerate(tensor.layouts)}
        ends_of = tuple((choice, tuple(place[layout] for layout in layouts)) for choice, layouts in wanted)
        rows = tuple(place[layout] for layout in made)
        links.append(Link(program.nodes[ref.node].name, producer, rows, ends_of, _conversions(space, prices, tensor)))
        tensors.append(tensor)
    buckets = _buckets(space, prices, links, tensors)
    saved = saved_of(space, prices, space.strategies, nodes, links, tensors, times, anew=limit is not None)
    memory = memory_of(space, prices, strategies, nodes, links, tensors, saved)
    beside = overlaps(space, prices, nodes, links, tensors, times) if prices.overlap else ()
    problem = Problem(tuple(choices), tuple(links), buckets, memory, limit, beside)
    return Formulation(problem, tuple(nodes), tuple(tensors))


def _consumed(strategy: Strategy, place: int) -> Layout:
    return strategy.outputs[0] if place == UPDATE else strategy.operands[place]


def _conversions(space: Space, prices: ConversionPrices, tensor: Tensor) -> Matrix:
    """Seconds of the conversions between a tensor's layouts, of all copies."""
    program, ref, layouts = space.program, tensor.ref, tensor.layouts
    table = prices.table(program.type_of(ref), space.dim_cuts(ref))
    seconds = table.between(layouts)
    if prices.breaks_chain(program, ref):
        for (row, source), (column, target) in product(enumerate(layouts), repeat=2):
            if row != column and seconds[row, column] < numpy.inf:
                seconds[row, column] += prices.broken_seconds(program, ref, table, source, target)
    return seconds * len(tensor.copies)


def outgoing_tensors(space: Space, border: Border) -> list[tuple[Ref, Layout]]:
    """Every output, as the representative tensor and the layout in which it leaves."""
    program, stands_for = space.program, space.folding.representative
    whole = uniform("I", len(space.mesh))
    found = []
    for position, value in enumerate(program.outputs):
        if isinstance(value, Ref):
            found.append((value, border.outputs.get(position, whole)))
    return [(Ref(stands_for[ref.node], ref.output), layout) for ref, layout in found]


def _times(space: Space, prices: ConversionPrices) -> dict[int, list[Seconds]]:
    """Representative node → the seconds of one copy with each of its strategies; nodes that do the same share them."""
    program, known = space.program, dict[Any, list[Seconds]]()
    found = {}
    for index in space.folding.members:
        node, strategies = program.nodes[index], space.strategies[index]
        arguments = repr(map_refs((node.args, node.kwargs), lambda leaf: "·" if isinstance(leaf, Ref) else leaf))
        types = tuple(program.type_of(ref) for ref in node.inputs)
        key = (node.kind, node.op, arguments, types, node.outputs, prices.accesses(program)[index], strategies)
        if key not in known:
            known[key] = [_seconds(space, prices, index, strategy) for strategy in strategies]
        found[index] = known[key]
    return found


def _seconds(space: Space, prices: ConversionPrices, index: int, strategy: Strategy) -> Seconds:
    """Forward and backward of an operator; the update of a parameter counts as backward."""
    node = space.program.nodes[index]
    if node.kind == "op":
        return node_seconds(space.program, node, space.rules[index], strategy, prices)
    if node.kind == "parameter" and prices.train and node.outputs[0].requires_grad:
        return Seconds(0.0, update_seconds(prices, node.outputs[0], strategy.outputs[0]))
    return Seconds(0.0, 0.0)


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


def _buckets(space: Space, prices: ConversionPrices, links: list[Link], tensors: list[Tensor]) -> tuple[Bucket, ...]:
    """Gradient all-reduces of the parameters of one block are merged: each pays for its bytes, the bucket once for the start.

    Takes the start-up time out of the prices of the links concerned.
    """
    members: dict[tuple[int, tuple[int, ...]], list[tuple[int, int, int]]] = {}
    for place, tensor in enumerate(tensors):
        if space.program.nodes[tensor.ref.node].kind != "parameter":
            continue
        table = prices.table(space.program.type_of(tensor.ref), space.dim_cuts(tensor.ref))
        rows = {layout: row for row, layout in enumerate(tensor.layouts)}
        for source, target in _owed(rows):
            path = table.path(tensor.layouts[source], tensor.layouts[target])
            if not all(move.kinds == ("I", "R") for move in path):
                continue
            axes = tuple(move.axis for move in path)
            start = sum(prices.latency(axis) for axis in axes) * len(tensor.copies)
            links[place].seconds[source, target] = max(links[place].seconds[source, target] - start, 0.0)
            members.setdefault((home_of(space, tensor.copies[0]), axes), []).append((place, source, target))
    buckets = []
    for (home, axes), used in members.items():
        count = space.folding.repeats[home].count if home >= 0 else 1
        name = f"block {home} axes {axes}"
        buckets.append(Bucket(name, sum(prices.latency(axis) for axis in axes) * count, tuple(used)))
    return tuple(buckets)


def _owed(rows: Mapping[Layout, int]) -> list[tuple[int, int]]:
    """Pairs of layouts of which the second has R where the first has I, on at least one axis, and is like it otherwise."""
    found = []
    for layout, source in rows.items():
        for kinds in product(*(("I", "R") if kind == "I" else (kind,) for kind in layout.kinds)):
            target = rows.get(Layout(kinds, layout.splits))
            if target is not None and target != source:
                found.append((source, target))
    return found
