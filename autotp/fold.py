"""Find repeated blocks, so that planning and rewriting treat each distinct block once.

The operators of a program stand in execution order, so a stack of equal layers is a tandem repeat of that sequence: the same
operators, arguments and types again and again, wired in the same way. Nothing depends on how the model names its layers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy

from autotp.program import Node, Program, Ref, map_refs


@dataclass(frozen=True)
class Repeat:
    """`count` copies of a block of `period` nodes; the first copy starts at node `start`."""

    start: int
    period: int
    count: int

    def instance(self, copy: int) -> range:
        """The node indices of one copy."""
        return range(self.start + copy * self.period, self.start + (copy + 1) * self.period)


@dataclass(frozen=True)
class Folding:
    """Which nodes are the same.

    Attributes:
        repeats: the repeated blocks, in program order.
        representative: for every node, the node that stands for it (the one in the first copy, or itself).
    """

    repeats: tuple[Repeat, ...]
    representative: tuple[int, ...]

    @cached_property
    def members(self) -> dict[int, tuple[int, ...]]:
        """Representative → every node that it stands for, itself first, in program order of representatives."""
        found: dict[int, list[int]] = {}
        for node, representative in enumerate(self.representative):
            found.setdefault(representative, []).append(node)
        return {representative: tuple(nodes) for representative, nodes in sorted(found.items())}

    @cached_property
    def places(self) -> dict[int, tuple[int, int]]:
        """Node of a repeated block → (number of the repeat, copy)."""
        return {
            node: (number, copy)
            for number, repeat in enumerate(self.repeats)
            for copy in range(repeat.count)
            for node in repeat.instance(copy)
        }


def unfolded(program: Program) -> Folding:
    """The folding in which every node stands for itself."""
    return Folding((), tuple(range(len(program.nodes))))


def fold(program: Program) -> Folding:
    """Find the repeated blocks of a program."""
    ops = [node.index for node in program.nodes if node.kind == "op"]
    if not ops:
        return unfolded(program)
    first = ops[0]
    signatures = _signatures(program)
    repeats: list[Repeat] = []
    position = 0
    while position < len(ops):
        repeat = _longest_repeat(program, signatures, position, first)
        if repeat is None:
            position += 1
        else:
            repeats.append(repeat)
            position = repeat.start + repeat.period * repeat.count - first
    representative = list(range(len(program.nodes)))
    for repeat in repeats:
        for copy in range(1, repeat.count):
            for offset, node in enumerate(repeat.instance(copy)):
                representative[node] = repeat.start + offset
    _fold_state(program, repeats, representative)
    return Folding(tuple(repeats), tuple(representative))


def _signatures(program: Program) -> Any:
    """One integer per operator: equal for equal operators with equal arguments and types at the same place of a module."""
    numbers: dict[Any, int] = {}
    found = []
    for node in program.nodes:
        if node.kind == "op":
            arguments = repr(map_refs((node.args, node.kwargs), lambda leaf: "·" if isinstance(leaf, Ref) else leaf))
            types = tuple(program.type_of(ref) for ref in node.inputs)
            key = (node.op, arguments, types, node.outputs, re.sub(r"\d+", "*", node.path))
            found.append(numbers.setdefault(key, len(numbers)))
    return numpy.asarray(found)


def _longest_repeat(program: Program, signatures: Any, position: int, first: int) -> Repeat | None:
    """The repeat that starts at `position` and covers most operators; the shortest period among equals."""
    best: Repeat | None = None
    periods = numpy.flatnonzero(signatures[position + 1 :] == signatures[position]) + 1
    for period in periods[:64].tolist():
        end = position + period
        if end + period > len(signatures):
            break
        differs = numpy.flatnonzero(signatures[end:] != signatures[position : len(signatures) - period])
        equal = int(differs[0]) if len(differs) else len(signatures) - end
        copies = 1 + equal // period
        if copies < 2 or (best and copies * period <= best.count * best.period):
            continue
        copies = _same_wiring(program, first + position, period, copies)
        if copies >= 2 and (best is None or copies * period > best.count * best.period):
            best = Repeat(first + position, period, copies)
    return _in_pairs(program, best) if best and best.period > 1 else None


def _in_pairs(program: Program, repeat: Repeat) -> Repeat | None:
    """Copies with one matrix each, two to a block, or None where this leaves one block.

    Copies share their decisions, but two matrices in a row want different ones: column-parallel, then row-parallel.
    """

    def is_matrix(ref: Ref) -> bool:
        return program.nodes[ref.node].kind == "parameter" and len(program.type_of(ref).shape) > 1

    if sum(any(map(is_matrix, program.nodes[node].inputs)) for node in repeat.instance(0)) != 1:
        return repeat
    return Repeat(repeat.start, 2 * repeat.period, repeat.count // 2) if repeat.count > 3 else None


def _same_wiring(program: Program, start: int, period: int, copies: int) -> int:
    """How many of the copies are wired alike: the same edges inside, the same pattern of shared edges from outside."""

    def wiring(begin: int) -> list[tuple[int, int]]:
        outside: dict[Ref, int] = {}
        edges = []
        for node in program.nodes[begin : begin + period]:
            for ref in node.inputs:
                if ref.node >= begin:
                    edges.append((ref.node - begin, ref.output))
                else:
                    edges.append((-1, outside.setdefault(ref, len(outside))))
        return edges

    pattern = wiring(start)
    for copy in range(1, copies):
        if wiring(start + copy * period) != pattern:
            return copy
    return copies


def _fold_state(program: Program, repeats: Sequence[Repeat], representative: list[int]) -> None:
    """Parameters, buffers and constants that one copy uses alone fold with their counterparts in the other copies."""
    home: dict[int, set[tuple[int, int]]] = {}
    for number, repeat in enumerate(repeats):
        for copy in range(repeat.count):
            for node in repeat.instance(copy):
                for ref in program.nodes[node].inputs:
                    home.setdefault(ref.node, set()).add((number, copy))
    covered = {node for repeat in repeats for copy in range(repeat.count) for node in repeat.instance(copy)}
    for outside in program.nodes:
        if outside.index not in covered:
            for ref in outside.inputs:
                home.setdefault(ref.node, set()).add((-1, outside.index))
    outputs = {value.node for value in program.outputs if isinstance(value, Ref)}
    for repeat in repeats:
        blocks = [[program.nodes[node] for node in repeat.instance(copy)] for copy in range(repeat.count)]
        for places in zip(*blocks, strict=True):
            for refs in zip(*(node.inputs for node in places), strict=True):
                nodes = [program.nodes[ref.node] for ref in refs]
                if len({node.index for node in nodes}) == repeat.count and all(
                    _foldable(node, nodes[0]) and len(home[node.index]) == 1 and node.index not in outputs
                    and (node.index in program.updated) == (nodes[0].index in program.updated)
                    for node in nodes
                ):
                    for node in nodes[1:]:
                        representative[node.index] = nodes[0].index


def _foldable(node: Node, other: Node) -> bool:
    return (
        node.kind == other.kind and node.kind in ("parameter", "buffer", "constant") and node.outputs == other.outputs
    )
