"""Strategies: the legal ways to run each node on the mesh, derived from its rule by one sentence.

A factor split on a mesh axis: operands that have it are S there, operands that lack it are R, an output is S if it has it and
P if it was summed away. Besides, every operator may run with all tensors I, with all R, or, where it is linear, on partials.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from math import prod

import torch

from autotp.cuts import CutTable, candidate_cuts, from_factor
from autotp.fold import Folding
from autotp.layouts import Cut, Layout, Split, all_layouts, simplify_cut, uniform
from autotp.program import Node, Program, Ref, TensorType
from autotp.rules import Rule, call_of, rule_of


@dataclass(frozen=True)
class Strategy:
    """One way to run a node.

    Attributes:
        key: one word per mesh axis: "I", "R", "P" + group number, or the factor that is split; a factor cut in another way
            than its first candidate carries that candidate's number, as in `o:1`.
        factors: (factor, mesh axes that split it outer first, its cut).
        operands, outputs: the layout that each tensor input must have and each output gets.
    """

    key: tuple[str, ...]
    factors: tuple[tuple[str, tuple[int, ...], Cut], ...]
    operands: tuple[Layout, ...]
    outputs: tuple[Layout, ...]


@dataclass(frozen=True)
class Space:
    """Everything that can be chosen for a program on a mesh.

    Attributes:
        program, folding, mesh: what it was made for.
        rules: representative node → its rule (None: no rule, always replicated).
        strategies: representative node → its strategies; the first is replication (`I` on every axis).
        cuts: candidate cuts of every dim.
    """

    program: Program
    folding: Folding
    mesh: tuple[int, ...]
    rules: dict[int, Rule | None]
    strategies: dict[int, tuple[Strategy, ...]]
    cuts: CutTable

    @cached_property
    def tensors(self) -> dict[tuple[int, bool, int], tuple[Ref, ...]]:
        """(representative, is output, index) → the representative tensors that stand there in its copies."""
        return _slots(self.program, self.folding)

    def dim_cuts(self, ref: Ref) -> list[tuple[Cut, ...]]:
        """Candidate cuts of every dim of a (representative) tensor."""
        return [self.cuts.of(ref, dim) for dim in range(len(self.program.type_of(ref).shape))]


def build_space(
    program: Program, folding: Folding, mesh: tuple[int, ...], declared: Mapping[Ref, Layout] | None = None
) -> Space:
    """Bind every representative node's rule, find candidate cuts, and list its strategies.

    `declared` gives the layouts of inputs (by their tensor) and outputs that the user passes or receives split, and of parameters and
    buffers that rest as another plan has them.
    """
    declared = declared or {}
    slots = _slots(program, folding)
    rules: dict[int, Rule | None] = {}
    bound = []
    for index in folding.members:
        node = program.nodes[index]
        if node.kind != "op":
            continue
        rule = rule_of(call_of(node, program.type_of))
        rules[index] = rule
        if rule is not None:
            places = {(False, i): slots[index, False, i] for i in range(len(node.inputs))}
            places |= {(True, i): slots[index, True, i] for i in range(len(node.outputs))}
            bound.append((rule, places))
    border = [
        (Ref(folding.representative[ref.node], ref.output), split.dim, split.cut)
        for ref, layout in declared.items()
        for split in layout.splits
    ]
    cuts = candidate_cuts(bound, prod(mesh), border)
    strategies = {}
    listed: dict[_Kind, tuple[Strategy, ...]] = {}
    for index in folding.members:
        node = program.nodes[index]
        if node.kind == "op":
            places = {(output, i): refs for (owner, output, i), refs in _of_node(slots, node)}
            kind = _kind_of(node, program, rules[index], cuts, places)
            if kind not in listed:
                listed[kind] = _op_strategies(kind, rules[index], cuts.parts, len(mesh))
            strategies[index] = listed[kind]
        elif (node.kind == "parameter" or index in program.updated) and Ref(index) not in declared:
            strategies[index] = _resting_strategies(node, cuts, len(mesh))
        else:
            layout = declared.get(Ref(index), uniform("I", len(mesh)))
            strategies[index] = (Strategy(layout.kinds, (), (), (layout,)),)
    return Space(program, folding, mesh, rules, strategies, cuts)


def _of_node(
    slots: dict[tuple[int, bool, int], tuple[Ref, ...]], node: Node
) -> list[tuple[tuple[int, bool, int], tuple[Ref, ...]]]:
    keys = [(node.index, False, i) for i in range(len(node.inputs))] + [
        (node.index, True, i) for i in range(len(node.outputs))
    ]
    return [(key, slots[key]) for key in keys]


def _slots(program: Program, folding: Folding) -> dict[tuple[int, bool, int], tuple[Ref, ...]]:
    found: dict[tuple[int, bool, int], dict[Ref, None]] = {}
    stands_for = folding.representative
    for node in program.nodes:
        owner = stands_for[node.index]
        for position, ref in enumerate(node.inputs):
            found.setdefault((owner, False, position), {})[Ref(stands_for[ref.node], ref.output)] = None
        if owner == node.index:
            for output in range(len(node.outputs)):
                found.setdefault((owner, True, output), {})[Ref(owner, output)] = None
    return {key: tuple(refs) for key, refs in found.items()}


def _resting_strategies(node: Node, cuts: CutTable, axes: int) -> tuple[Strategy, ...]:
    """A parameter, or a buffer that the forward changes, rests whole or split.

    Tiny dims that some rank would get nothing of are allowed, and cost what they cost.
    """
    ref = Ref(node.index)
    dims = [cuts.of(ref, dim) for dim in range(len(node.outputs[0].shape))]
    found = []
    for layout in all_layouts(dims, axes, "IS"):
        key = []
        for axis in range(axes):
            split = layout.split_of(axis)
            if split is None:
                key.append("I")
            else:
                number = dims[split.dim].index(split.cut)
                order = f"/{split.axes.index(axis)}" if len(split.axes) > 1 else ""
                key.append(f"S{split.dim}" + (f":{number}" if number else "") + order)
        found.append(Strategy(tuple(key), (), (), (layout,)))
    return tuple(sorted(found, key=lambda strategy: sum(kind != "I" for kind in strategy.outputs[0].kinds)))


@dataclass(frozen=True)
class _Kind:
    """All that the strategies of an operator depend on, beside the mesh: nodes of one kind have the same.

    Attributes:
        content: what the rule says of operands and outputs; None without a rule.
        cuts: the factors that may be split, with their cuts.
        operands, outputs: of every tensor, whether it has a gradient, and whether it holds truth values.
    """

    content: tuple[object, ...] | None
    cuts: tuple[tuple[str, tuple[Cut, ...]], ...]
    operands: tuple[_Tensor, ...]
    outputs: tuple[_Tensor, ...]


@dataclass(frozen=True)
class _Tensor:
    requires_grad: bool
    may_be_partial: bool
    """Truth values have no summands."""


def _kind_of(node: Node, program: Program, rule: Rule | None, cuts: CutTable, places: dict[tuple[bool, int], tuple[Ref, ...]]) -> _Kind:
    def tensor(one: TensorType) -> _Tensor:
        return _Tensor(one.requires_grad, one.dtype != torch.bool)

    operands = tuple(tensor(program.type_of(ref)) for ref in node.inputs)
    outputs = tuple(map(tensor, node.outputs))
    if rule is None:
        return _Kind(None, (), operands, outputs)
    content = (tuple(rule.factors.items()), rule.operands, rule.outputs, rule.linear, rule.summands, rule.reduction)
    return _Kind(content, tuple((name, cuts.usable_cuts(rule, name, places)) for name in rule.splittable), operands, outputs)


def _op_strategies(kind: _Kind, rule: Rule | None, parts: int, axes: int) -> tuple[Strategy, ...]:
    if rule is None:
        layout = uniform("I", axes)
        return (Strategy(("I",) * axes, (), (layout,) * len(kind.operands), (layout,) * len(kind.outputs)),)
    factor_cuts = dict(kind.cuts)
    groups = [
        f"P{number}"
        for number, group in enumerate(rule.linear)
        if all(tensor.may_be_partial for tensor in (*kind.outputs, *(kind.operands[place] for place in group)))
    ]
    options = ["I", "R", *groups, *rule.splittable]
    found: dict[tuple[tuple[Layout, ...], tuple[Layout, ...]], Strategy] = {}
    for choice in product(options, repeat=axes):
        split_on: dict[str, tuple[int, ...]] = {}
        for axis, option in enumerate(choice):
            if option in factor_cuts:
                split_on[option] = (*split_on.get(option, ()), axis)
        for chosen in product(*(range(len(factor_cuts[name])) for name in split_on)):
            numbers = dict(zip(split_on, chosen, strict=True))
            factors = tuple((name, on, factor_cuts[name][numbers[name]]) for name, on in split_on.items())
            strategy = _derive(choice, numbers, factors, rule, kind, parts)
            if strategy is not None:
                found.setdefault((strategy.operands, strategy.outputs), strategy)
    return tuple(found.values())


def _derive(
    choice: tuple[str, ...],
    numbers: dict[str, int],
    factors: tuple[tuple[str, tuple[int, ...], Cut], ...],
    rule: Rule,
    kind: _Kind,
    parts: int,
) -> Strategy | None:
    """The layouts that one option per mesh axis implies, or None where an output cannot be partial."""
    out_layouts, in_layouts = [], []
    for index, tensor in enumerate(kind.outputs):
        layout = _layout(choice, factors, rule, True, index, rule.reduction, parts)
        if layout is None:
            return None
        if "P" in layout.kinds and not tensor.may_be_partial:
            return None
        if "M" in layout.kinds and tensor.requires_grad:
            return None
        out_layouts.append(layout if tensor.requires_grad else layout.without_gradient())
    summed = [axis for axis in range(len(choice)) if any(layout.kinds[axis] == "P" for layout in out_layouts)]
    for index, tensor in enumerate(kind.operands):
        layout = _layout(choice, factors, rule, False, index, "R", parts)
        if layout is None:
            return None
        if index in rule.summands:
            kinds = [
                "P" if axis in summed and word == "R" and choice[axis] != "R" else word
                for axis, word in enumerate(layout.kinds)
            ]
            layout = Layout(tuple(kinds), layout.splits)
        in_layouts.append(layout if tensor.requires_grad else layout.without_gradient())
    key = tuple(f"{option}:{numbers[option]}" if numbers.get(option) else option for option in choice)
    return Strategy(key, factors, tuple(in_layouts), tuple(out_layouts))


def _layout(
    choice: tuple[str, ...],
    factors: tuple[tuple[str, tuple[int, ...], Cut], ...],
    rule: Rule,
    output: bool,
    index: int,
    lacking: str,
    parts: int,
) -> Layout | None:
    """The layout of one operand or output: S where it has the axis's factor, else `lacking`."""
    kinds = []
    for option in choice:
        if option in ("I", "R"):
            kinds.append(option)
        elif option[0] == "P" and option[1:].isdigit():
            kinds.append("P" if output or index in rule.linear[int(option[1:])] else "R")
        else:
            kinds.append(lacking)
    splits = []
    for name, axes, cut in factors:
        for use in rule.uses[name]:
            if use.output == output and use.index == index:
                dim_cut = from_factor(cut, use)
                assert dim_cut is not None
                splits.append(Split(use.dim, axes, simplify_cut(dim_cut, parts)))
                for axis in axes:
                    kinds[axis] = "S"
    if len({split.dim for split in splits}) < len(splits):
        return None  # two factors of one merged dim: no single cut describes the pieces
    return Layout(tuple(kinds), tuple(sorted(splits, key=lambda split: split.dim)))
