"""The type check of a plan: is every layout explained by a rule, and every change of layout by a conversion?

It shares no code with the search or the rewriter and works the other way round. The search derives layouts from chosen
factors; the check is given layouts and looks, on every mesh axis, for one explanation of all tensors of a node:

    all I, all R                   the operator runs whole on every rank
    linear in a group of operands  the group and the outputs are P, the other operands R
    a factor is split              S where a tensor has the factor; else operands R, outputs P (a sum) or M (a maximum)

with summands P where an output is P, and I in the place of R wherever no gradient flows. That the pieces fit is checked
on the elements that every rank holds. Conversions are checked on the unfolded program, because the copies of a repeated
block may differ in their consumers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise, product
from math import prod
from typing import NamedTuple, NoReturn

import sympy
import torch

from autotp.check_pieces import is_sorted_split, rank_fault, sorted_fault, unsorted
from autotp.check_recomputed import recomputed_fault
from autotp.errors import AutotpError
from autotp.layouts import MOVES, Layout, at_sizes, cut_size, uniform
from autotp.mesh import output_names
from autotp.plans import ConversionPlan, NodePlan, Plan, code_of, layout_of
from autotp.program import Node, Program, Ref, Size, TensorType, map_refs
from autotp.rules import Rule, call_of, rule_of
from autotp.rules.language import Part, SortedRows
from autotp.strategies import Space

Place = tuple[str, int]
"""What one tensor does on one mesh axis: its kind, and the dim that the axis splits (-1 if none)."""


def check(program: Program, space: Space, plan: Plan) -> None:
    """Check that a plan is type-correct: legal layouts, each tensor converted to what its consumers want, nothing else.

    What is recomputed must be made inside repeated blocks.

    Args:
        program: the model that the plan is for.
        space: gives the mesh, the folding, and the candidate cuts that layout codes count; its strategies are not read.
        plan: what is checked, apart from prices. `inputs` and `outputs` declare layouts of the border; the rest is I.

    Raises:
        AutotpError: the first error found; it names node, tensor, mesh axis, and the layouts expected and found.
    """
    if tuple(plan.mesh.values()) != space.mesh:
        _fail(f"the plan is for the mesh {dict(plan.mesh)}, but the model is laid out on {space.mesh}")
    context = _Context(program, space, plan)
    layouts = _decode(context)
    inputs, outputs = _declared(context)
    for index in space.folding.members:
        node = program.nodes[index]
        if node.kind == "op":
            _check_operator(context, node, layouts[index])
        else:
            _check_rest(context, node, layouts[index].outputs[0], inputs.get(index))
    _check_conversions(context, layouts, _wanted(context, layouts, outputs))
    fault = recomputed_fault(program, space.folding, plan, layouts, context.layout)
    if fault is not None:
        _fail(fault)


def _fail(sentence: str) -> NoReturn:
    raise AutotpError(f"{sentence}; correct the plan, or plan this model again")


class _Layouts(NamedTuple):
    """The layouts of one node."""

    operands: tuple[Layout, ...]
    outputs: tuple[Layout, ...]


@dataclass(frozen=True)
class _Context:
    """What is checked, and how to speak of it."""

    program: Program
    space: Space
    plan: Plan

    @cached_property
    def whole(self) -> Layout:
        """I on every axis."""
        return uniform("I", len(self.space.mesh))

    @cached_property
    def valuations(self) -> list[dict[Size, int]]:
        """Values of the symbolic sizes to check at: the traced ones, and larger, uneven ones if the model allows."""
        nodes, symbols = self.program.nodes, self.program.symbols
        traced: dict[Size, int] = {symbol: nodes[at.node].outputs[0].hint[at.dim] for symbol, at in symbols.items()}
        types = {tensor for node in nodes for tensor in node.outputs}
        sizes = {size for tensor in types for size in tensor.shape if isinstance(size, sympy.Expr)}
        parts = prod(self.space.mesh)
        for step in range(1, 2 * parts + 1) if traced else ():
            other = {symbol: value + step for symbol, value in traced.items()}
            uneven = step > parts or all(value % parts for value in other.values())
            within = all(most is None or other.get(s, 0) <= most for s, (_, most) in self.program.ranges.items())
            if uneven and within and all(size.subs(other).is_Integer for size in sizes) and self.fits(other):
                return [traced, other]
        return [traced]

    def fits(self, values: Mapping[Size, int]) -> bool:
        """Whether the operators take these sizes: every dim is as large as its factors (a trace may hold for even sizes alone)."""
        for index, rule in self.space.rules.items():
            if rule is None:
                continue
            node = self.program.nodes[index]
            tensors = (*map(self.program.type_of, node.inputs), *node.outputs)
            for tensor, dims in zip(tensors, (*rule.operands, *rule.outputs), strict=True):
                for size, content in zip(tensor.shape, dims, strict=True):
                    if isinstance(content, (Part, SortedRows)):
                        continue
                    if _value(size, values) != prod(_value(rule.factors[name], values) for name in content):
                        return False
        return True

    def owner(self, ref: Ref) -> Ref:
        """The tensor that stands for this one."""
        return Ref(self.space.folding.representative[ref.node], ref.output)

    def gradient(self, tensor: TensorType) -> bool:
        """Whether a gradient flows to this tensor."""
        return tensor.requires_grad and self.plan.mode == "train"

    def axis(self, *axes: int) -> str:
        """Mesh axes by name."""
        names = list(self.plan.mesh)
        return f"mesh {'axis' if len(axes) == 1 else 'axes'} {', '.join(f'`{names[axis]}`' for axis in axes)}"

    def tensor(self, ref: Ref) -> str:
        """A tensor by its node, and by its number if the node has several."""
        node = self.program.nodes[ref.node]
        return f"tensor `{node.name}`" + (f" (output {ref.output})" if len(node.outputs) > 1 else "")

    def between(self, found: Layout, expected: Layout) -> str:
        """` on mesh axis …`: where two layouts differ."""
        axes = range(len(self.space.mesh))
        differing = [axis for axis in axes if _place(found, axis) != _place(expected, axis)]
        differing = differing or [axis for axis in axes if found.split_of(axis) != expected.split_of(axis)]
        return f" on {self.axis(*differing)}" if differing else ""

    def layout(self, code: str, ref: Ref, where: str) -> Layout:
        """The layout that a code names: no R without gradient, no M with one, no partial bool, cuts as long as dims."""
        cuts, tensor = self.space.dim_cuts(ref), self.program.type_of(ref)
        try:
            layout = layout_of(code, cuts)
            valid = len(layout.kinds) == len(self.space.mesh) and code_of(layout, cuts) == code
            valid = valid and all(split.dim >= 0 for split in layout.splits)
        except (AutotpError, ValueError, LookupError):
            valid = False
        if not valid:
            _fail(f"{where} has the layout {code!r}, expected {len(cuts)} dims on {len(self.space.mesh)} mesh axes")
        for axis, kind in enumerate(layout.kinds):
            if kind == "R" and not self.gradient(tensor):
                _fail(f"{where} is R on {self.axis(axis)}, expected I, because it has no gradient")
            if kind == "M" and self.gradient(tensor):
                _fail(f"{where} is M on {self.axis(axis)}, expected I, R, S or P, because a maximum has no gradient")
            if kind in "PM" and tensor.dtype == torch.bool:
                _fail(f"{where} is {kind} on {self.axis(axis)}, expected I or S, because booleans cannot be reduced")
        for split, values in product(layout.splits, self.valuations):
            covered = cut_size(at_sizes(Layout(layout.kinds, (split,)), values).splits[0].cut)
            size = _value(tensor.shape[split.dim], values)
            if covered != size:
                _fail(f"{where} is {layout}, whose cut covers {covered} elements of dim {split.dim}, expected {size}")
        return layout


# ---- what the plan says ---------------------------------------------------------------------------------------------


def _decode(context: _Context) -> dict[int, _Layouts]:
    """The layouts of every representative, which has exactly one entry and is equal to its copies."""
    program, members = context.program, context.space.folding.members
    entries: dict[str, NodePlan] = {}
    for entry in context.plan.nodes:
        if entry.node in entries:
            _fail(f"the plan has two entries for node `{entry.node}`, expected one")
        entries[entry.node] = entry
    layouts = {}
    for index, copies in members.items():
        node = program.nodes[index]
        found = entries.pop(node.name, None)
        if found is None:
            _fail(f"the plan says nothing about {_title(node)}")
        told = (found.op, found.copies, len(found.operands), len(found.outputs))
        actual = (node.op, len(copies), len(node.inputs), len(node.outputs))
        if told != actual:
            show = "{1} copies of {0} with {2} operands and {3} outputs".format
            _fail(f"the plan has {show(*told)} as {_title(node)}, expected {show(*actual)}")
        operands, outputs = [], []
        for place, (ref, code) in enumerate(zip(node.inputs, found.operands, strict=True)):
            words = f"operand {place} (`{program.nodes[ref.node].name}`) of {_title(node)}"
            operands.append(context.layout(code, context.owner(ref), words))
        for place, code in enumerate(found.outputs):
            outputs.append(context.layout(code, Ref(index, place), f"output {place} of {_title(node)}"))
        layouts[index] = _Layouts(tuple(operands), tuple(outputs))
        for copy in copies[1:]:
            if _signature(program, program.nodes[copy]) != _signature(program, node):
                _fail(f"{_title(program.nodes[copy])} shares the layouts of {_title(node)}, but the two are not equal")
    if entries:
        _fail(f"the plan decides about node `{next(iter(entries))}`, which the model lacks or folds into another")
    return layouts


def _declared(context: _Context) -> tuple[dict[int, Layout], dict[int, Layout]]:
    """The declared layouts of inputs by node and of outputs by position."""
    program, plan = context.program, context.plan
    inputs = {str(node.target): (node.index, Ref(node.index)) for node in program.nodes if node.kind == "input"}
    places = enumerate(zip(output_names(program), program.outputs, strict=True))
    outputs = {name: (place, value) for place, (name, value) in places if isinstance(value, Ref)}
    return _border(context, "input", inputs, plan.inputs), _border(context, "output", outputs, plan.outputs)


def _border(
    context: _Context, side: str, known: Mapping[str, tuple[int, Ref]], declared: Mapping[str, str]
) -> dict[int, Layout]:
    """One side of the border, which neither R nor a maximum crosses."""
    found = {}
    for name, code in declared.items():
        if name not in known:
            _fail(f"the plan declares a layout for the {side} `{name}`, expected one of {', '.join(known)}")
        place, ref = known[name]
        found[place] = context.layout(code, context.owner(ref), f"{side} `{name}`")
        for axis, kind in enumerate(found[place].kinds):
            if kind in "RM":
                _fail(f"{side} `{name}` is declared {kind} on {context.axis(axis)}, expected I, S or P at the border")
    return found


def _check_rest(context: _Context, node: Node, layout: Layout, declared: Layout | None) -> None:
    """Parameters and buffers rest as I or S, constants as I, inputs are as declared."""
    expected = declared or context.whole
    if node.kind in ("parameter", "buffer"):
        for axis, kind in enumerate(layout.kinds):
            if kind not in "IS":
                _fail(f"{_title(node)} rests as {kind} on {context.axis(axis)}, expected I or S")
    elif layout != expected:
        why = "as declared" if declared else "as nothing else is declared" if node.kind == "input" else "as at rest"
        _fail(f"{_title(node)} is ({layout}){context.between(layout, expected)}, expected ({expected}) {why}")


# ---- operators ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Slot:
    """One operand or output of a node."""

    output: bool
    index: int
    words: str
    gradient: bool
    layout: Layout


@dataclass(frozen=True)
class _Explanation:
    """Why a node's tensors are as they are on one mesh axis: in words, the factor split there, each slot's place."""

    words: str
    factor: str | None
    places: tuple[Place, ...]


def _check_operator(context: _Context, node: Node, layouts: _Layouts) -> None:
    """One explanation per mesh axis, and pieces that fit it."""
    program, slots = context.program, []
    for index, (ref, layout) in enumerate(zip(node.inputs, layouts.operands, strict=True)):
        words = f"operand {index} (`{program.nodes[ref.node].name}`)"
        slots.append(_Slot(False, index, words, context.gradient(program.type_of(ref)), layout))
    for index, (tensor, layout) in enumerate(zip(node.outputs, layouts.outputs, strict=True)):
        slots.append(_Slot(True, index, f"output {index}", context.gradient(tensor), layout))
    rule = rule_of(call_of(node, program.type_of))
    options = list(_explanations(rule, slots))
    fitting = []
    for axis in range(len(context.space.mesh)):
        found = tuple(_place(slot.layout, axis) for slot in slots)
        fitting.append([option for option in options if option.places == found])
        if not fitting[-1]:
            near = max(options, key=lambda option: sum(a == b for a, b in zip(option.places, found, strict=True)))
            triples = zip(slots, found, near.places, strict=True)
            slot, place, expected = next(triple for triple in triples if triple[1] != triple[2])
            shown = ", ".join(f"{s.words} {_word(place)}" for s, place in zip(slots, found, strict=True))
            never = place[1] >= 0 and all(option.places[slots.index(slot)] != place for option in options)
            reason = ", a dim that this operator never splits" if never else ""
            _fail(
                f"no rule explains {_title(node)} on {context.axis(axis)}: {slot.words} is {_word(place)}{reason}, "
                f"expected {_word(expected)} if {near.words} (found {shown})"
            )
    if rule is not None:
        choices = {tuple(option.factor for option in choice) for choice in product(*fitting)}
        faults = [_pieces_fault(context, rule, slots, choice) for choice in sorted(choices, key=str)]
        if all(faults):
            _fail(f"the pieces of {_title(node)} do not fit: {faults[0]}")


def _explanations(rule: Rule | None, slots: Sequence[_Slot]) -> Iterator[_Explanation]:
    """Everything that one mesh axis can do at a node."""

    def made(words: str, factor: str | None, places: Sequence[Place]) -> _Explanation:
        partial = any(slot.output and place[0] == "P" for slot, place in zip(slots, places, strict=True))
        final = []
        for slot, (kind, dim) in zip(slots, places, strict=True):
            if rule and partial and not slot.output and slot.index in rule.summands and kind != "S":
                kind = "P"
            final.append(("I" if kind == "R" and not slot.gradient else kind, dim))
        return _Explanation(words, factor, tuple(final))

    yield made("all tensors are I there", None, [("I", -1)] * len(slots))
    yield made("all tensors with a gradient are R there", None, [("R", -1)] * len(slots))
    if rule is None:
        return
    for group in rule.linear:
        kinds = ["P" if slot.output or slot.index in group else "R" for slot in slots]
        words = f"the operator runs on summands of operand {' and '.join(map(str, group))}"
        yield made(words, None, [(kind, -1) for kind in kinds])
    for factor in (name for name in rule.factors if name not in rule.whole):
        dims = {(use.output, use.index): use.dim for use in rule.uses[factor]}
        if len(dims) < len(rule.uses[factor]):
            continue  # one tensor has the factor twice: no layout says that
        places = []
        for slot in slots:
            dim = dims.get((slot.output, slot.index), -1)
            places.append(("S" if dim >= 0 else rule.reduction if slot.output else "R", dim))
        yield made(f"factor `{factor}` is split there", factor, places)


# ---- pieces ---------------------------------------------------------------------------------------------------------


def _pieces_fault(context: _Context, rule: Rule, slots: Sequence[_Slot], choice: Sequence[str | None]) -> str | None:
    """Which tensor's pieces are not those of the factors that the axes split; None if all fit on every rank."""
    mesh, by_place = context.space.mesh, {(slot.output, slot.index): slot for slot in slots}
    for factor, values in product(dict.fromkeys(name for name in choice if name), context.valuations):
        axes = [axis for axis, name in enumerate(choice) if name == factor]
        uses = []
        for use in rule.uses[factor]:
            slot = by_place[use.output, use.index]
            split = at_sizes(slot.layout, values).split_at(use.dim)
            if split is None or sorted(split.axes) != axes:
                return f"{slot.words} is ({slot.layout}), where dim {use.dim} is split by two factors at once"
            part = use.part and (_value(use.part[0], values), _value(use.part[1], values))
            use = use._replace(outer=_value(use.outer, values), inner=_value(use.inner, values), part=part)
            uses.append((use, split, slot.words))
        size = _value(rule.factors[factor], values)
        sorted_words = sorted_fault(uses)
        if sorted_words is not None:
            return f"with factor `{factor}` split on {context.axis(*axes)}, {sorted_words}"
        uses = [(use, unsorted(split), words) for use, split, words in uses if not (use.is_whole_dim and is_sorted_split(split))]
        for coordinate in product(*(range(count) if axis in axes else (0,) for axis, count in enumerate(mesh))):
            fault = rank_fault(uses, size, mesh, coordinate, factor in rule.special)
            if fault:
                return f"with factor `{factor}` split on {context.axis(*axes)}, {fault} on the rank at {coordinate}"
    return None


# ---- conversions ----------------------------------------------------------------------------------------------------

Needed = tuple[Ref, Layout, Layout]
"""A representative tensor, the layout in which it is made, and another in which it is wanted."""


def _wanted(
    context: _Context, layouts: Mapping[int, _Layouts], outputs: Mapping[int, Layout]
) -> dict[Needed, dict[Ref, str]]:
    """Every needed conversion → the tensors of the unfolded program that need it, each with its first such consumer."""
    program, found = context.program, dict[Needed, dict[Ref, str]]()

    def want(ref: Ref, layout: Layout, consumer: str) -> None:
        owner = context.owner(ref)
        made = layouts[owner.node].outputs[owner.output]
        if made != layout:
            found.setdefault((owner, made, layout), {}).setdefault(ref, consumer)

    for node in program.nodes:
        operands = layouts[context.space.folding.representative[node.index]].operands
        for place, (ref, layout) in enumerate(zip(node.inputs, operands, strict=True)):
            want(ref, layout, f"operand {place} of {_title(node)}")
    for place, value in enumerate(program.outputs):
        if isinstance(value, Ref):
            want(value, outputs.get(place, context.whole), f"output {place} of the model")
    for buffer, ref in program.updated.items():
        rests = layouts[context.space.folding.representative[buffer]].outputs[0]
        want(ref, rests, f"the update of buffer `{program.nodes[buffer].target}`")
    return found


def _check_conversions(
    context: _Context, layouts: Mapping[int, _Layouts], wanted: dict[Needed, dict[Ref, str]]
) -> None:
    """Exactly one conversion for each pair of layouts that a tensor needs, and none besides."""
    seen: set[Needed] = set()
    stray = ""
    for entry in context.plan.conversions:
        ref, source, target = key = _ends(context, entry)
        title, made = context.tensor(ref), layouts[ref.node].outputs[ref.output]
        path = f"the plan converts {title} from ({source}) to ({target})"
        if key in seen:
            _fail(f"{path}{context.between(source, target)} twice, expected once")
        seen.add(key)
        if source != made:
            _fail(f"{path}, but it is made as ({made}), which differs{context.between(source, made)}")
        tensors = wanted.get(key, {})
        if tensors and entry.copies != len(tensors):
            _fail(f"{path}{context.between(source, target)} for {entry.copies} copies, expected {len(tensors)}")
        if not tensors:
            stray = stray or f"{path}{context.between(source, target)}, but no consumer wants that"
    for (ref, made, layout), tensors in wanted.items():
        if (ref, made, layout) not in seen:
            tensor, consumer = next(iter(tensors.items()))
            where = context.between(made, layout)
            _fail(
                f"{context.tensor(tensor)} is made as ({made}), but {consumer} expects ({layout}){where}, unconverted"
            )
    if stray:
        _fail(stray)


def _ends(context: _Context, entry: ConversionPlan) -> Needed:
    """The tensor, the first and the last layout of a conversion, if each step is a legal move with its primitives."""
    node = context.program.by_name.get(entry.node)
    if node is None or node.index not in context.space.folding.members or not 0 <= entry.output < len(node.outputs):
        where = f"output {entry.output} of node `{entry.node}`"
        _fail(f"the plan converts {where}, which the model lacks or folds into another")
    ref = Ref(node.index, entry.output)
    title = f"the conversion of {context.tensor(ref)}"
    stations = [context.layout(code, ref, title) for code in entry.layouts]
    if len(stations) < 2 or not len(entry.forward) == len(entry.backward) == len(stations) - 1:
        _fail(
            f"{title} has {len(stations)} layouts and {len(entry.forward)} steps, expected one step less than layouts"
        )
    gradient = context.gradient(context.program.type_of(ref))
    for (source, target), forward, backward in zip(pairwise(stations), entry.forward, entry.backward, strict=True):
        axis = _moved_axis(context, source, target, title)
        value, grad = MOVES[source.kinds[axis], target.kinds[axis]]
        for way, word, primitive in (("forward", forward, value), ("backward", backward, grad if gradient else "none")):
            expected = "" if primitive == "none" else f"{primitive} over {list(context.plan.mesh)[axis]}"
            if word != expected:
                move = f"{title} from ({source}) to ({target}) on {context.axis(axis)}"
                _fail(f"{move} runs {word or 'nothing'!r} {way}, expected {expected or 'nothing'!r}")
    return ref, stations[0], stations[-1]


def _moved_axis(context: _Context, source: Layout, target: Layout, title: str) -> int:
    """The one mesh axis on which two layouts differ, if a single move leads from one to the other."""
    where = f"{title} goes from ({source}) to ({target}){context.between(source, target)}"
    axes = [axis for axis in range(len(source.kinds)) if _without(source, axis) == _without(target, axis)]
    if source == target or not axes:
        _fail(f"{where}, but a move changes exactly one mesh axis and keeps the cut of every other")
    for axis in axes:
        if all(split is None or split.axes[-1] == axis for split in (source.split_of(axis), target.split_of(axis))):
            if (source.kinds[axis], target.kinds[axis]) not in MOVES:
                _fail(f"{where}, which no primitive does")
            return axis
    _fail(f"{where}, but only the innermost axis of a split may be changed")


# ---- small helpers --------------------------------------------------------------------------------------------------


def _value(size: Size, values: Mapping[Size, int]) -> int:
    return size if isinstance(size, int) else int(size.subs(values))


def _place(layout: Layout, axis: int) -> Place:
    split = layout.split_of(axis)
    return layout.kinds[axis], -1 if split is None else split.dim


def _without(layout: Layout, axis: int) -> Layout:
    """The layout as if `axis` were not there, to compare the other axes."""
    splits = (replace(split, axes=tuple(other for other in split.axes if other != axis)) for split in layout.splits)
    return Layout((*layout.kinds[:axis], "", *layout.kinds[axis + 1 :]), tuple(split for split in splits if split.axes))


def _signature(program: Program, node: Node) -> tuple[object, ...]:
    """What must be equal for two nodes to share their layouts."""
    arguments = map_refs((node.args, node.kwargs), lambda leaf: "·" if isinstance(leaf, Ref) else leaf)
    return node.op, repr(arguments), node.outputs, tuple(program.type_of(ref) for ref in node.inputs)


def _title(node: Node) -> str:
    if node.kind != "op":
        return f"{node.kind} `{node.target}`"
    return f"node `{node.name}` ({node.op}{f' in {node.path}' if node.path else ''})"


def _word(place: Place) -> str:
    return place[0] if place[1] < 0 else f"{place[0]}({place[1]})"
