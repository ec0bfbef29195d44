"""Sizes at run time: symbolic sizes are computed from the inputs, pieces of split dims from the rank's coordinate."""

from __future__ import annotations

import math
import operator
from functools import cache
from typing import Any

import sympy
from torch import fx, nn

from autotp import _torch
from autotp.errors import AutotpError
from autotp.layouts import Layout, Split, at_sizes, cut_sizes, local_size, piece
from autotp.program import Size


class PieceSize(nn.Module):
    """This rank's number of elements along a split dim (or the index of the first), from the run-time sizes of `symbols`."""

    def __init__(
        self, split: Split, mesh: tuple[int, ...], coordinate: tuple[int, ...], symbols: tuple[sympy.Symbol, ...], start: bool
    ) -> None:
        super().__init__()
        layout = Layout(("I",) * len(mesh), (split,))

        @cache
        def value(*sizes: int) -> int:
            here = at_sizes(layout, dict(zip(symbols, sizes, strict=True))).splits[0]
            return piece_start(here, mesh, coordinate) if start else local_size(here, mesh, coordinate)

        self.value = value

    def number(self, *sizes: int) -> int:
        """The number for these sizes, plain ints."""
        return self.value(*sizes)

    def forward(self, *sizes: int) -> int:
        """The number for these sizes."""
        return self.number(*map(operator.index, sizes))


_torch.constant_when_compiled(PieceSize.number)  # its arithmetic is no part of a compiled graph


def piece_start(split: Split, mesh: tuple[int, ...], coordinate: tuple[int, ...]) -> int:
    """Global index of the first element that this rank holds (0 if it holds none)."""
    ranges = piece(split, mesh, coordinate)
    return ranges[0][0] if ranges else 0


def symbols_of(sizes: Any) -> tuple[sympy.Symbol, ...]:
    """The symbols in sizes, cuts or layouts, by name."""
    found: set[sympy.Symbol] = set()

    def walk(item: Any) -> None:
        if isinstance(item, sympy.Basic):
            found.update(item.free_symbols)
        elif isinstance(item, Layout):
            walk(item.splits)
        elif isinstance(item, Split):
            walk(tuple(cut_sizes(item.cut)))
        elif isinstance(item, (tuple, list)):
            for part in item:
                walk(part)

    walk(sizes)
    return tuple(sorted(found, key=str))


OPERATORS: dict[str, Any] = {
    "Add": operator.add,
    "Mul": operator.mul,
    "Pow": operator.pow,
    "FloorDiv": operator.floordiv,
    "CleanDiv": operator.floordiv,
    "Mod": operator.mod,
    "PythonMod": operator.mod,
    "Max": max,
    "Min": min,
    "PowByNatural": operator.pow,
    "FloatPow": operator.pow,
    "FloatTrueDiv": operator.truediv,
    "IntTrueDiv": operator.truediv,
    "CeilDiv": lambda a, b: -(-a // b),
    "ToFloat": float,
    "TruncToInt": int,
    "FloorToInt": math.floor,
    "CeilToInt": math.ceil,
    "RoundToInt": round,
    "OpaqueUnaryFn_sqrt": math.sqrt,
    "OpaqueUnaryFn_log": math.log,
    "OpaqueUnaryFn_log2": math.log2,
    "OpaqueUnaryFn_exp": math.exp,
}
"""sympy's (and torch's) functions of sizes, as Python computes them."""


def size_node(graph: fx.Graph, size: Size, values: dict[sympy.Basic, Any]) -> Any:
    """The graph node (or int) that computes `size`; `values` holds the nodes of symbols and of what was computed before.

    Raises:
        AutotpError: the expression uses a function that is not known here.
    """
    if isinstance(size, int):
        return size
    if size.is_Integer:
        return int(size)
    if size.is_number:
        return float(size)
    if size not in values:
        function = OPERATORS.get(type(size).__name__)
        if function is None:
            raise AutotpError(f"the size {size} cannot be computed at run time; trace with fixed sizes (dynamic=False)")
        operands = [size_node(graph, part, values) for part in size.args]
        result = operands[0] if len(operands) > 1 else graph.call_function(function, tuple(operands))
        for operand in operands[1:]:
            result = graph.call_function(function, (result, operand))
        values[size] = result
    return values[size]
