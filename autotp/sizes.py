"""Symbolic sizes of a trace: where they are read from, what they were in the example, which are the same."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import sympy
import torch
from torch import fx

from autotp import _torch
from autotp.program import InputSize, Size

LEAST = 2
"""A size that varies is at least this: an export fixes sizes 0 and 1."""


def settled(expr: sympy.Basic) -> sympy.Basic:
    """The expression without every `Max` and `Min` that is settled because all symbols are at least `LEAST`."""
    extremes = {"Max": sympy.Max, "Min": sympy.Min}
    atoms = [part for part in sympy.postorder_traversal(expr) if type(part).__name__ in extremes]
    if not atoms:
        return expr
    excess = {symbol: sympy.Dummy(str(symbol), integer=True, nonnegative=True) for symbol in expr.free_symbols}
    back = {dummy: symbol - LEAST for symbol, dummy in excess.items()}
    found: dict[sympy.Basic, sympy.Basic] = {}
    for atom in atoms:
        function = extremes[type(atom).__name__]
        shifted = [arg.xreplace(found).xreplace({s: dummy + LEAST for s, dummy in excess.items()}) for arg in atom.args]
        value = function(*(sympy.expand(arg) for arg in shifted))
        if not value.has(sympy.Max, sympy.Min):
            found[atom] = sympy.expand(value.xreplace(back))
    return expr.xreplace(found)


class Sizes:
    """The sizes of one exported graph as the program writes them.

    Two inputs of the same example shape, whose sizes the trace relates by an equation (as the loss does for logits and
    labels), are taken to have the same shape.

    Attributes:
        places: symbol → (user input, dimension) where its value is read.
        cache: every traced size met so far → (global size, size in the example).
    """

    def __init__(self, inputs: list[fx.Node]) -> None:
        """Read the symbols from the user inputs of the graph."""
        self.places: dict[sympy.Symbol, tuple[fx.Node, int]] = {}
        self.cache: dict[Any, tuple[Size, int]] = {}
        self.hints: dict[sympy.Symbol, sympy.Integer] = {}
        self.same: dict[sympy.Symbol, sympy.Expr] = {}
        values = [(node, node.meta["val"]) for node in inputs if isinstance(node.meta.get("val"), torch.Tensor)]
        dynamic: torch.SymInt | None = None
        for node, value in values:
            for dim, number in enumerate(value.shape):
                if isinstance(number, torch.SymInt):
                    dynamic, expr = number, _torch.expression(number)
                    if isinstance(expr, sympy.Symbol):
                        self.places.setdefault(expr, (node, dim))
                        self.hints[expr] = sympy.Integer(number.node.hint)
        if dynamic is not None:
            self._unify([value for _, value in values], _torch.equations(dynamic))

    def _unify(self, values: list[torch.Tensor], equations: list[sympy.Eq]) -> None:
        """Give inputs of equal example shape the same sizes where that makes an equation of the trace hold."""
        shapes = [[sympy.sympify(_torch.expression(number)) for number in value.shape] for value in values]
        for equation in equations:
            for first, second in itertools.combinations(shapes, 2):
                pairs = [(a.xreplace(self.same), b.xreplace(self.same)) for a, b in zip(first, second, strict=False)]
                if len(first) != len(second) or any(a.xreplace(self.hints) != b.xreplace(self.hints) for a, b in pairs):
                    continue
                joined = {b: a for a, b in pairs if a != b and b.is_Symbol}
                joined |= {a: b for a, b in pairs if a.is_Symbol and b.is_Integer}
                before = equation.xreplace(self.same)
                if joined and before != sympy.true and before.xreplace(joined) == sympy.true:
                    self.same = {old: new.xreplace(joined) for old, new in self.same.items()} | joined
                    for symbol in joined:
                        self.places.pop(symbol, None)

    def size(self, number: Any) -> tuple[Size, int]:
        """(global size, size in the example) of a traced dimension."""
        if type(number) is int:
            return number, number
        expr = _torch.expression(number)
        found = self.cache.get(expr)
        if found is None:
            resolved = self.resolve(expr)
            value = resolved.xreplace(self.hints) if isinstance(resolved, sympy.Basic) else resolved
            is_known = isinstance(value, (int, sympy.Integer))  # not where it depends on tensor values: refused later
            self.cache[expr] = found = (resolved, int(value) if is_known else 1)
        return found

    def resolve(self, number: Any) -> Any:
        """A traced number, plain or symbolic, over the program's symbols."""
        expr = _torch.expression(number)
        if not isinstance(expr, sympy.Basic):
            return expr
        expr = settled(expr.xreplace(self.same))
        return int(expr) if isinstance(expr, sympy.Integer) else expr

    def symbols(self, node_of: Mapping[fx.Node, int]) -> dict[sympy.Symbol, InputSize]:
        """Symbol → where it is read from, given the program's node for every input of the graph."""
        return {symbol: InputSize(node_of[node], dim) for symbol, (node, dim) in self.places.items()}

    def ranges(self, allowed: Mapping[sympy.Symbol, Any]) -> dict[sympy.Symbol, tuple[int, int | None]]:
        """Symbol → (least, greatest) value, from the exported program's range constraints."""
        ranges: dict[sympy.Symbol, tuple[int, int | None]] = {}
        for symbol in self.places:
            members = [symbol, *(old for old, new in self.same.items() if new == symbol)]
            bounds = [allowed[member] for member in members if member in allowed]
            highs = [int(bound.upper) for bound in bounds if isinstance(bound.upper, sympy.Integer)]
            ranges[symbol] = (max((int(bound.lower) for bound in bounds), default=0), min(highs, default=None))
        return ranges
