"""How a program's tensors lie in memory: which views are free, which must copy, and what a stretched tensor really holds.

Strides are those of one device at the traced sizes. A piece of a tensor has other numbers but the same order of dims, and it is
the order that decides whether a reshape is a view.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

import torch

from autotp.program import Node, Program, Ref, Size, map_refs, op_name

RESHAPES = frozenset(("aten.reshape", "aten.flatten", "aten.unflatten"))
UNSAFE = ("aten.unsafe_split", "aten.unsafe_chunk")
"""Operators whose results are views although their schemas do not say so."""

Strides = tuple[int, ...]


@dataclass(frozen=True)
class Storage:
    """Attributes:
    strides: tensor → its strides, for tensors whose elements do not lie in order.
    copies: (node, operand) → the operand must be copied before it can be used: by a reshape, or by a product of more than two dims.
    """

    strides: Mapping[Ref, Strides]
    copies: frozenset[tuple[int, int]]

    def share(self, program: Program, ref: Ref) -> float:
        """The share of a tensor's elements that are really in memory: less than 1 where `expand` repeats them."""
        strides = self.strides.get(ref)
        if strides is None:
            return 1.0
        return 1.0 / prod(size for size, stride in zip(program.type_of(ref).hint, strides, strict=True) if stride == 0 and size > 1)


def is_view(node: Node) -> bool:
    """Whether an operator only gives the elements of its operand other dims, so far as strides can express them."""
    return node.kind == "op" and _gives_view(node.target)


@lru_cache(maxsize=1 << 12)
def _gives_view(target: Any) -> bool:
    schema, op = getattr(target, "_schema", None), op_name(target)
    returned = schema.returns[0].alias_info if schema is not None and schema.returns else None
    return op.startswith(UNSAFE) or (returned is not None and not returned.is_write and not op.startswith("aten.to."))


def storage_of(program: Program) -> Storage:
    """Follow the strides of every tensor through the program, from parameters and inputs that lie in order."""
    strides: dict[Ref, Strides] = {}
    copies: set[tuple[int, int]] = set()
    sizes: dict[Size, int] = {symbol: program.nodes[at.node].outputs[0].hint[at.dim] for symbol, at in program.symbols.items()}
    with torch.no_grad():
        for node in program.nodes:
            if node.kind != "op":
                continue
            name = name_of(node.target)
            if is_view(node):
                made = _viewed(program, node, strides, sizes) if name not in RESHAPES else []
                if name in RESHAPES and node.inputs[0] in strides:
                    reshaped = _reshaped(program, node.inputs[0], node.outputs[0].hint, strides)
                    made = [] if reshaped is None else [reshaped]
                    copies |= {(node.index, 0)} if reshaped is None else set()
            else:
                made = _computed(program, node, strides)
                if name == "aten.matmul":
                    copies |= {(node.index, place) for place, ref in enumerate(node.inputs) if _must_be_packed(program, ref, strides)}
            for output, one in enumerate(made):
                if one != _in_order(node.outputs[output].hint):
                    strides[Ref(node.index, output)] = one
    return Storage(strides, frozenset(copies))


def _viewed(program: Program, node: Node, strides: Mapping[Ref, Strides], sizes: Mapping[Size, int]) -> list[Strides]:
    """The strides of a view, which PyTorch itself computes on tensors without data."""

    def leaf(value: Any) -> Any:
        if isinstance(value, Ref):
            return _empty(program, value, strides)
        return int(value.subs(sizes))

    try:
        made = node.target(*map_refs(node.args, leaf), **map_refs(node.kwargs, leaf))
    except RuntimeError:  # a view that these strides do not allow: whatever runs instead lies in order
        return []
    return [tensor.stride() for tensor in (made if isinstance(made, (tuple, list)) else [made])]


def _reshaped(program: Program, ref: Ref, shape: tuple[int, ...], strides: Mapping[Ref, Strides]) -> Strides | None:
    """The strides of a reshape; None if it must copy."""
    try:
        return _empty(program, ref, strides).view(shape).stride()
    except RuntimeError:
        return None


def _computed(program: Program, node: Node, strides: Mapping[Ref, Strides]) -> list[Strides]:
    """Pointwise results lie like their operand; fused attention writes [batch, sequence, heads, width]; all others in order."""
    hint = node.outputs[0].hint
    if name_of(node.target) == "aten.scaled_dot_product_attention" and len(hint) == 4:
        _, h, s, e = hint
        return [(s * h * e, e, h * e, 1)]
    if is_pointwise(node) and all(output.hint == hint for output in node.outputs):
        for ref in node.inputs:
            found = strides.get(ref)
            if found is not None and program.type_of(ref).hint == hint and found == _in_order_of(hint, found):
                return [found] * len(node.outputs)
    return []


def is_pointwise(node: Node) -> bool:
    """Whether every element of the result depends on one element of each operand (smaller ones broadcast)."""
    return node.kind == "op" and _acts_pointwise(node.target)


@lru_cache(maxsize=1 << 12)
def _acts_pointwise(target: Any) -> bool:
    return torch.Tag.pointwise in getattr(target, "tags", ()) or name_of(target) in POINTWISE


@lru_cache(maxsize=1 << 12)
def name_of(target: Any) -> str:
    """An operator without its overload: `aten.add` of `aten.add.Tensor`; other functions keep their name."""
    op = op_name(target)
    return op.rpartition(".")[0] if op.startswith("aten.") else op


POINTWISE = frozenset(
    "aten.to aten.dropout aten.native_dropout aten.hardswish aten.log_sigmoid aten.floor_divide aten.polar aten.complex aten.where "
    "aten.multiply aten.masked_fill aten.prelu aten.rsub aten.__and__ aten.__or__ aten.tril aten.triu".split()
)
"""Pointwise operators that PyTorch does not mark as such, without the overload's name."""


def _must_be_packed(program: Program, ref: Ref, strides: Mapping[Ref, Strides]) -> bool:
    """Whether `matmul` copies an operand: it wants all batch dims as one."""
    hint = program.type_of(ref).hint
    return len(hint) > 3 and ref in strides and _reshaped(program, ref, (prod(hint[:-2]), *hint[-2:]), strides) is None


def _empty(program: Program, ref: Ref, strides: Mapping[Ref, Strides]) -> torch.Tensor:
    tensor = program.type_of(ref)
    return torch.empty_strided(tensor.hint, strides.get(ref) or _in_order(tensor.hint), dtype=tensor.dtype, device="meta")


def _in_order(shape: tuple[int, ...]) -> Strides:
    return tuple(prod(max(size, 1) for size in shape[dim + 1 :]) for dim in range(len(shape)))


def _in_order_of(shape: tuple[int, ...], strides: Strides) -> Strides:
    """The strides that a tensor without gaps has if its dims stand in memory in the order of these strides."""
    order = sorted(range(len(shape)), key=lambda dim: (-strides[dim], dim))
    dense = _in_order(tuple(shape[dim] for dim in order))
    return tuple(dense[order.index(dim)] for dim in range(len(shape)))
