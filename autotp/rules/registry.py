"""The table of rules, and the two calls that fill it: `rule` for a pattern, `rule_for` for a small function."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from autotp.rules.language import Call, Rule, bind, parse

RuleFunction = Callable[[Call], Rule | None]

RULES: dict[str, RuleFunction] = {}
"""Operator name (e.g. `aten.linear.default`, `mylib.my_op.default`) → the function that binds its rule to a call."""


def rule(ops: str | Iterable[str], pattern: str, **options: Any) -> None:
    """Register one pattern for one or several operators.

    Args:
        ops: operator names, e.g. `"mylib.scan.default"` or several, blank-separated or in a list.
        pattern: e.g. `"... i, o i -> ... o"`; see `autotp.rules.language`.
        options: `linear` (groups of operands that may be partial together), `work`, `random`, `reduction`, `local`; see `Rule`.

    Raises:
        AutotpError: the pattern cannot be parsed.
    """
    parse(pattern)
    for op in ops.split() if isinstance(ops, str) else ops:
        RULES[op] = lambda call: bind(pattern, call, **options)


def rule_for(ops: str) -> Callable[[RuleFunction], RuleFunction]:
    """Register a function `Call -> Rule` (or None: no rule for these arguments) for blank-separated operators."""

    def register(function: RuleFunction) -> RuleFunction:
        for op in ops.split():
            RULES[op] = function
        return function

    return register


def rule_of(call: Call) -> Rule | None:
    """The rule of a call, or None if its operator has none for these arguments."""
    function = RULES.get(call.op)
    return function(call) if function else None
