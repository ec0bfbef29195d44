"""Mesh axes of two kinds: data-parallel ones, which split the batch and nothing else, and the others, which never do.

A user says "data parallel 2 × tensor parallel 4", where the planner is free to mix. What the batch is, is read off the graph: it is
dim 0 of the inputs that have it, and travels through the rules: a dim of an output that shares its factor with the batch dim of an
operand is the batch there, whatever its place. Where it ends (a loss, a sum over everything), the choice is free again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from autotp.layouts import Cut, Layout, Place, place_on
from autotp.mesh import output_names
from autotp.price.conversion import Places
from autotp.program import Program, Ref, TensorType
from autotp.rules import Rule, call_of, rule_of
from autotp.strategies import Space, Strategy


def batch_size(program: Program) -> int | None:
    """Dim 0 of the first input, as traced; None if there is no input, or it has no dims."""
    first = next((node.outputs[0].hint for node in program.nodes if node.kind == "input"), ())
    return first[0] if first else None


def sizes_of(program: Program) -> tuple[int | None, int | None]:
    """Batch and sequence of the first input, as traced; the sequence is None unless it is a matrix of tokens."""
    first = next((node.outputs[0] for node in program.nodes if node.kind == "input"), None)
    of_tokens = first is not None and len(first.hint) == 2 and not first.dtype.is_floating_point
    return batch_size(program), first.hint[1] if first and of_tokens else None


def batch_factors(program: Program, rules: Mapping[int, Rule | None]) -> tuple[dict[Ref, int], dict[int, str]]:
    """Where the batch is: tensor → its dim, and operator → its factor, for every tensor and operator that has it.

    Args:
        rules: node → its rule, for every operator.
    """
    size = batch_size(program)
    dims: dict[Ref, int] = {}
    factors: dict[int, str] = {}
    for node in program.nodes:
        if node.kind == "input" and node.outputs[0].hint[:1] == (size,):
            dims[Ref(node.index)] = 0
        rule = rules.get(node.index) if node.kind == "op" else None
        if rule is None:
            continue
        here = (_outermost(rule.operands[place][dims[ref]]) for place, ref in enumerate(node.inputs) if ref in dims)
        factor = next((name for name in here if name in rule.splittable), None)
        if factor is None:
            continue
        factors[node.index] = factor
        for output, content in enumerate(rule.outputs):
            found = next((dim for dim, names in enumerate(content) if _outermost(names) == factor), None)
            if found is not None:
                dims[Ref(node.index, output)] = found
    return dims, factors


def batch_border(program: Program, axes: Sequence[str]) -> tuple[dict[str, dict[str, int]], dict[str, dict[str, int]]]:
    """Inputs and outputs that have the batch, declared split by it over these mesh axes: each rank passes and gets its samples."""
    rules = {node.index: rule_of(call_of(node, program.type_of)) for node in program.nodes if node.kind == "op"}
    dims, _ = batch_factors(program, rules)
    names = output_names(program)

    def declared(dim: int) -> dict[str, int]:
        return dict.fromkeys(axes, dim)

    inputs = {str(node.target): declared(0) for node in program.nodes if node.kind == "input" and Ref(node.index) in dims}
    outputs = {names[place]: declared(dims[ref]) for place, ref in enumerate(program.outputs) if isinstance(ref, Ref) and ref in dims}
    return inputs, outputs


def keep_to_batch(
    space: Space, data_axes: Sequence[int], allowed: Mapping[int, tuple[int, ...]] | None = None
) -> dict[int, tuple[int, ...]]:
    """Representative node → the strategies in which the batch is split on these mesh axes, and on no other.

    Args:
        data_axes: positions of the data-parallel axes.
        allowed: what pins leave already; a node where nothing would be left keeps what it had.
    """
    rules = {node.index: space.rules.get(space.folding.representative[node.index]) for node in space.program.nodes}
    _, factors = batch_factors(space.program, rules)
    kept = dict(allowed or {})
    for index, factor in factors.items():
        if index not in space.strategies:
            continue
        before = kept.get(index, tuple(range(len(space.strategies[index]))))
        wanted = tuple(number for number in before if _axes_of(factor, space.strategies[index][number]) == set(data_axes))
        kept[index] = wanted or before
    return kept


def narrowed(space: Space, allowed: Mapping[int, tuple[int, ...]]) -> tuple[Space, dict[int, tuple[int, ...]]]:
    """The space with the allowed strategies alone, and their numbers in it: what is not listed needs no price.

    A node's first strategy, all whole, stays listed, since it says what one device would do.
    """
    strategies = dict(space.strategies)
    numbers = {}
    for node, kept in allowed.items():
        strategies[node] = tuple(space.strategies[node][number] for number in dict.fromkeys((0, *kept)))
        numbers[node] = tuple(range(len(strategies[node])))[0 if 0 in kept else 1 :]
    return replace(space, strategies=strategies), numbers


def layouts_in_use(space: Space, leaving: Iterable[tuple[Ref, Layout]]) -> Places:
    """For every kind of tensor, what some strategy makes or wants on each mesh axis.

    Args:
        leaving: outputs, as representative tensors, and the layouts in which they leave.
    """
    found: dict[tuple[TensorType, tuple[tuple[Cut, ...], ...]], list[set[Place]]] = {}

    def note(ref: Ref, layout: Layout) -> None:
        kind = (space.program.type_of(ref), tuple(space.dim_cuts(ref)))
        for axis, places in enumerate(found.setdefault(kind, [set() for _ in space.mesh])):
            places.add(place_on(layout, axis))

    for index, strategies in space.strategies.items():
        for strategy in strategies:
            for number, layout in enumerate(strategy.outputs):
                note(Ref(index, number), layout)
            for number, layout in enumerate(strategy.operands):
                for ref in space.tensors[index, False, number]:
                    note(ref, layout)
    for ref, layout in leaving:
        note(ref, layout)
    stands_for = space.folding.representative
    for buffer, ref in space.program.updated.items():  # a new value goes where the buffer rests
        for strategy in space.strategies[stands_for[buffer]]:
            note(Ref(stands_for[ref.node], ref.output), strategy.outputs[0])
    return {kind: tuple(map(frozenset, places)) for kind, places in found.items()}


def _axes_of(factor: str, strategy: Strategy) -> set[int]:
    """The mesh axes on which a strategy splits the factor."""
    return {axis for name, axes, _ in strategy.factors if name == factor for axis in axes}


def _outermost(content: object) -> str | None:
    """The first factor of a dim: the one that splitting the dim into few pieces splits."""
    if isinstance(content, tuple):
        return next((part for part in content if isinstance(part, str)), None)
    return content if isinstance(content, str) else None
