"""Checks of values: `if labels.max() >= size: raise ValueError`, `assert (x > 0).all()`, `if not x.isfinite().all(): x = clamp(x)`.

A graph cannot branch on values. But a branch that does nothing except raise is no part of what the model computes: such a check
is taken to pass while the model is traced. And what a model does only about infinities and NaN is left out: values are taken to
be finite. Both are named in notes.
"""

from __future__ import annotations

import ast
import linecache
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from itertools import islice
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

MACHINERY = ("torch.overrides", "torch.fx.", "torch.export.", "torch._export.", "torch.utils.", "torch._tensor", "torch._ops")
"""Modules through which a question passes on its way here."""


@contextmanager
def passed_checks(notes: list[str]) -> Iterator[None]:
    """Inside, checks of tensor values that only raise pass; `notes` gets a sentence for each."""
    mode = _Passing()
    with mode:
        yield
    for place in dict.fromkeys(mode.places):
        notes.append(f"The check of values at {place} is no part of the parallel model.")
    for place in dict.fromkeys(mode.finite):
        notes.append(f"What the model does at {place} about infinite values or NaN is left out of the parallel model.")


FINITE: dict[Any, bool] = {
    function: truth
    for truth, names in ((True, "isfinite"), (False, "isinf isnan"))
    for name in names.split()
    for function in (getattr(torch, name), getattr(torch.Tensor, name))
}
"""What these tests say of finite values."""

KEEPING = frozenset(
    getattr(owner, name) for owner in (torch, torch.Tensor) for name in ("all", "any", "logical_or", "logical_and", "bitwise_or")
) | {torch.Tensor.__or__, torch.Tensor.__and__}
"""What leaves a truth that is everywhere the same (of two operands: the same in both) as it is."""

TURNING = frozenset({torch.logical_not, torch.Tensor.logical_not, torch.bitwise_not, torch.Tensor.bitwise_not, torch.Tensor.__invert__})


class _Passing(TorchFunctionMode):
    """Answers `bool(tensor)` where it decides about nothing but an error."""

    def __init__(self) -> None:
        super().__init__()
        self.places: list[str] = []
        self.finite: list[str] = []
        self.known: dict[int, tuple[torch.Tensor, bool]] = {}
        """Tensors (by id; kept, so that no other gets it) whose elements are all true, or all false, of finite values."""

    def truth(self, func: Any, args: Any) -> bool | None:
        """What all elements of a result are if values are finite; None if that is not known."""
        if func in FINITE:
            return FINITE[func]
        if func not in KEEPING and func not in TURNING:
            return None
        found = {self.known[id(arg)][1] if id(arg) in self.known else None for arg in args if isinstance(arg, torch.Tensor)}
        value = found.pop() if len(found) == 1 else None
        return value if value is None or func in KEEPING else not value

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = self.truth(func, args)
        if known is not None:
            result = func(*args, **(kwargs or {}))
            self.known[id(result)] = result, known
            return result
        if func is torch.Tensor.__bool__:
            frame = sys._getframe(1)
            while frame.f_back is not None and str(frame.f_globals.get("__name__")).startswith(MACHINERY):
                frame = frame.f_back
            position = next(islice(frame.f_code.co_positions(), frame.f_lasti // 2, None))
            answer = passing_answer(frame.f_code.co_filename, position)
            if answer is not None:
                self.places.append(f"{frame.f_code.co_filename}:{frame.f_lineno}")
                return answer
            if id(args[0]) in self.known:
                self.finite.append(f"{frame.f_code.co_filename}:{frame.f_lineno}")
                return self.known[id(args[0])][1]
        return func(*args, **(kwargs or {}))


Position = tuple[int | None, int | None, int | None, int | None]
"""First line, last line, first column, last column of an expression."""


@cache
def passing_answer(file: str, position: Position) -> bool | None:
    """What the truth value of the expression there must be for a check to pass; None if it is part of no mere check."""
    try:
        tree = ast.parse("".join(linecache.getlines(file)))
    except SyntaxError:
        return None
    for node in ast.walk(tree):
        if isinstance(node, ast.Assert):
            wanted = True
        elif isinstance(node, ast.If) and not node.orelse and all(isinstance(step, ast.Raise) for step in node.body):
            wanted = False
        else:
            continue
        operands = list(_operands(node.test, wanted))
        for operand, answer in operands:
            if _position(operand) == position:
                return answer
        if position in (_position(node), _position(node.test)):  # Python says only that it is this statement
            answers = {answer for operand, answer in operands if not isinstance(operand, (ast.BoolOp, ast.UnaryOp))}
            return answers.pop() if len(answers) == 1 else None
    return None


def _position(node: ast.stmt | ast.expr) -> Position:
    return node.lineno, node.end_lineno, node.col_offset, node.end_col_offset


def _operands(test: ast.expr, wanted: bool) -> Iterator[tuple[ast.expr, bool]]:
    """Every operand of `and`, `or` and `not`, and what it should be for the whole test to be `wanted`."""
    yield test, wanted
    if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
        yield from _operands(test.operand, not wanted)
    elif isinstance(test, ast.BoolOp):
        for operand in test.values:
            yield from _operands(operand, wanted)
