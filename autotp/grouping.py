"""Find mixtures of experts in a program: sorting, counting and indexing become the functions of `autotp.experts`.

What an integer tensor means is read off how it is made, whatever names and spellings a model uses: sorted keys, the slots that
they come from, their tokens, the way back, the end of each key's rows. A grouped matrix product whose rows are counted from
sorted keys is the proof that rows are sorted for it; only then anything is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch

from autotp import experts
from autotp.program import Node, Ref, Size, TensorType, op_name

aten = torch.ops.aten

GROUPED_PRODUCTS = frozenset({"aten._grouped_mm.default", "transformers.grouped_mm_fallback.default"})
"""Operators `(rows, weight, ends) -> rows`, with the end of each key's rows in `ends`."""

SAME = frozenset({aten.to.dtype, aten.reshape.default, aten.unsqueeze.default, aten.expand.default, aten.detach.default})
"""Operators that keep the rows of a vector, one by one: they cast it, or repeat its elements along further dims."""

GATHERS: dict[Any, Callable[[Node], Any]] = {
    aten.index.Tensor: lambda node: node.args[1][0] if len(node.args[1]) == 1 else None,
    aten.index_select.default: lambda node: node.args[2] if node.args[1] == 0 else None,
    aten.gather.default: lambda node: node.args[2] if node.args[1] == 0 else None,
}
"""Operators that look rows up in dim 0 → the index, a vector or one that is repeated along the other dims."""

ADDERS = frozenset({aten.index_add.default, aten.scatter_add.default})
"""Operators `(base, 0, index, rows)` that add rows up in dim 0."""

REPEATED = frozenset({aten.gather.default, aten.scatter_add.default})
"""Those of them whose index has the shape of the rows: repeated along all other dims. The others' is a vector."""


@dataclass(frozen=True)
class Meaning:
    """What an integer tensor holds, with respect to the order that node `order` made.

    `word` is "keys" (sorted), "unsorted" (keys by slot), "slots", "tokens" (slots // number), "back" (the row of each slot),
    "counts" (rows of each of `number` keys) or "ends".
    """

    word: str
    order: int
    number: Size = 1


def group_by_key(nodes: Sequence[Node]) -> list[Node]:
    """The same nodes, in which what dispatches rows to a grouped product is called by its name in `autotp.experts`."""
    if not any(op_name(node.target) in GROUPED_PRODUCTS for node in nodes if node.kind == "op"):
        return list(nodes)
    meanings = _meanings(nodes)
    keys: dict[int, Size] = {}
    for node in nodes:
        if _is_product(node):
            ends, weight = meanings.get(node.args[2]), _type(nodes, node.args[1])
            if ends is not None and ends.word == "ends" and ends.number == weight.shape[0]:
                keys[ends.order] = weight.shape[0]
    return [_named(node, nodes, meanings, keys) for node in nodes]


def _type(nodes: Sequence[Node], ref: Ref) -> TensorType:
    return nodes[ref.node].outputs[ref.output]


def _is_product(node: Node) -> bool:
    plain = node.kind == "op" and op_name(node.target) in GROUPED_PRODUCTS and len(node.args) >= 3
    return plain and isinstance(node.args[2], Ref) and all(value is None for value in (*node.args[3:], *node.kwargs.values()))


def _named(node: Node, nodes: Sequence[Node], meanings: dict[Ref, Meaning], keys: dict[int, Size]) -> Node:
    """A lookup or product of sorted rows by its new name; any other node as it is."""
    if _is_product(node) and (ends := meanings.get(node.args[2])) is not None and ends.order in keys and ends.word == "ends":
        args = (*node.args[:2], Ref(ends.order), node.target)
        return replace(node, target=experts.grouped_product, args=args, kwargs={})
    if node.kind != "op" or node.target not in {*GATHERS, *ADDERS}:
        return node
    index = GATHERS[node.target](node) if node.target in GATHERS else node.args[2] if node.args[1] == 0 else None
    if not isinstance(index, Ref) or (meaning := meanings.get(index)) is None or meaning.order not in keys:
        return node
    source = _type(nodes, node.args[0])
    if _type(nodes, index).shape[1:] != (source.shape[1:] if node.target in REPEATED else ()):
        return node
    slots = nodes[meaning.order].outputs[0].shape[1]
    order, count = Ref(meaning.order), keys[meaning.order]
    if node.target in ADDERS:
        rows = _type(nodes, node.args[3])
        whole = _equal(rows.shape[0], slots) and rows.shape[1:] == source.shape[1:]  # a scatter may take part of its rows
        plain = whole and not node.kwargs and len(node.args) == 4 and _is_zero(nodes[node.args[0].node])
        if plain and meaning.word in ("slots", "tokens") and _equal(source.shape[0] * meaning.number, slots):
            return replace(node, target=experts.collect, args=(node.args[3], order, meaning.number, count), kwargs={})
        return node
    if meaning.word in ("slots", "tokens") and _equal(source.shape[0] * meaning.number, slots):
        return replace(node, target=experts.dispatch, args=(node.args[0], order, meaning.number, count), kwargs={})
    if meaning.word == "back" and _equal(source.shape[0], slots):
        return replace(node, target=experts.combine, args=(node.args[0], order, count), kwargs={})
    return node


def _meanings(nodes: Sequence[Node]) -> dict[Ref, Meaning]:
    """What every integer tensor means that has to do with an order. (Twice over: keys may be counted before they are sorted.)"""
    found: dict[Ref, Meaning] = {}
    for node in (*nodes, *nodes):
        if node.kind != "op":
            continue
        if node.target is experts.sort_by_key:
            keys = node.args[0]
            before = found.get(keys)
            if before is not None and before.word == "slots":  # sorting the slots gives the way back
                found[Ref(node.index)] = Meaning("way back", before.order)
                continue
            found[Ref(node.index)] = Meaning("order", node.index)
            while True:
                found[keys] = Meaning("unsorted", node.index)
                maker = nodes[keys.node]
                if maker.target is not aten.to.dtype or _type(nodes, maker.args[0]).dtype.is_floating_point:
                    break  # what is rounded to a key is not the key
                keys = maker.args[0]
            continue
        meaning = _meaning(node, nodes, found)
        if meaning is not None:
            found[Ref(node.index)] = meaning
    return found


def _meaning(node: Node, nodes: Sequence[Node], found: dict[Ref, Meaning]) -> Meaning | None:
    """The meaning of one node's output, from those of its operands."""
    first = found.get(node.args[0]) if node.args and isinstance(node.args[0], Ref) else None
    target, args = node.target, node.args
    if target is aten.index_put.default:
        index = args[1][0] if len(args[1]) == 1 else None
        slots = found.get(index) if isinstance(index, Ref) else None
        counting = isinstance(args[2], Ref) and _counts_up(nodes[args[2].node])
        accumulates = len(args) > 3 and args[3]
        return Meaning("back", slots.order) if slots and slots.word == "slots" and counting and not accumulates else None
    if target is aten.scatter.src and args[1] in (0, -1):
        slots = found.get(args[2])
        counting = isinstance(args[3], Ref) and _counts_up(nodes[args[3].node])
        return Meaning("back", slots.order) if slots and slots.word == "slots" and counting else None
    if first is None:
        return None
    if target in GATHERS and first.word == "unsorted":
        index = GATHERS[target](node)
        by = found.get(index) if isinstance(index, Ref) else None
        return Meaning("keys", first.order) if by == Meaning("slots", first.order) else None
    if target is aten.select.int and first.word in ("order", "way back"):
        words = ("keys", "slots") if first.word == "order" else (None, "back")
        word = words[args[2]] if args[1] == 0 and args[2] in (0, 1) else None
        return Meaning(word, first.order) if word else None
    if target in SAME and _keeps_rows(node, nodes):
        return first
    if first.word == "slots" and _floors(node) and isinstance(args[1], (int, sympy.Expr)):
        return Meaning("tokens", first.order, args[1])
    if target is aten.eq.Tensor and first.word in ("keys", "unsorted") and _counts_up(nodes[args[1].node]):
        return Meaning("one-hot", first.order, node.outputs[0].shape[-1]) if len(node.outputs[0].shape) == 2 else None
    if first.word == "one-hot":
        if target is aten.sum.dim_IntList and args[1] in ([0], 0) and len(node.outputs[0].shape) == 1:
            return Meaning("counts", first.order, first.number)
        return first if target is aten.to.dtype else None
    if first.word in ("keys", "unsorted") and (number := _counted_keys(node)) is not None:
        return Meaning("counts", first.order, number)
    if first.word == "counts" and target is aten.cumsum.default and args[1] in (0, -1):
        return Meaning("ends", first.order, first.number)
    return None


def _keeps_rows(node: Node, nodes: Sequence[Node]) -> bool:
    """Whether an operator leaves its operand's rows in dim 0, repeated along further dims or not at all."""
    before, after = _type(nodes, node.args[0]).shape, node.outputs[0].shape
    if node.outputs[0].dtype.itemsize < 4:
        return False  # large numbers would wrap around
    ones = all(size == 1 for size in before[1:])
    return before == after or (ones and bool(before) and bool(after) and after[0] == before[0] and _fits(node, after))


def _fits(node: Node, after: tuple[Size, ...]) -> bool:
    return node.target is aten.expand.default or all(size == 1 for size in after[1:])


def _floors(node: Node) -> bool:
    if node.target is aten.floor_divide.default:
        return True
    return node.target is aten.div.Tensor_mode and node.kwargs.get("rounding_mode") in ("floor", "trunc")


def _counted_keys(node: Node) -> Size | None:
    """How many keys a node counts, from 0 up; None if it does something else."""
    if node.target is aten.histc.default:
        given = {"bins": 100, "min": 0, "max": 0} | dict(zip(("bins", "min", "max"), node.args[1:], strict=False)) | node.kwargs
        bins, low, high = given["bins"], given["min"], given["max"]
        return int(bins) if low == 0 and high in (bins - 1, bins) else None
    return None


def _is_zero(node: Node) -> bool:
    """Whether a node makes zeros (clean-up spells `zeros` and its kin as `full`)."""
    return node.target is aten.full.default and node.args[1] == 0


def _counts_up(node: Node) -> bool:
    """Whether a node is `arange(n)`."""
    return node.target is aten.arange.default or (node.target is aten.arange.start and node.args[0] == 0)


def _equal(a: Size, b: Size) -> bool:
    return bool(a == b) or sympy.simplify(a - b) == 0
