"""The table of rules, and the two calls that fill it: `rule` for a pattern, `rule_for` for a small function."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, get_args

import torch

from autotp import _torch
from autotp.errors import AutotpError
from autotp.program import op_name
from autotp.rules.language import Call, Rule, Work, bind
from autotp.rules.pattern import Pattern, parse

RuleFunction = Callable[[Call], Rule | None]

Operators = str | Callable[..., Any] | Iterable[str | Callable[..., Any]]
"""One or several operators: names (blank-separated in one string), operators of `torch.ops`, custom operators, plain functions."""

RULES: dict[str, RuleFunction] = {}
"""Operator name (e.g. `aten.linear.default`, `mylib.my_op.default`) → the function that binds its rule to a call."""

OPTIONS = ("linear", "work", "random", "reduction", "local", "sizes")


def rule(ops: Operators, pattern: str, **options: Any) -> None:
    """Register one pattern for one or several operators.

    Args:
        ops: what `torch.library.custom_op` returned, `torch.ops.mylib.scan`, a function, or a name such as `"mylib::scan"` or
            `"mylib.scan.default"`; several names in one string, separated by blanks, or several of all these in a list.
        pattern: e.g. `"... i, o i -> ... o"`: one term for every tensor that the operator takes, optional ones too, and for every
            tensor that it returns. docs/rules.md explains the notation.
        linear: groups of operands in which the operator is linear together, by position: `((0,), (1,))` for a product.
        work: what its time goes into: "memory" (reading and writing its tensors), "gemm", "attention", "grouped" or "none".
        random: whether it draws random numbers.
        reduction: how an output is put together if a factor that it lacks is split: "P" (summed) or "M" (the maximum).
        local: how one rank calls it, a function of an `autotp.Local`; needed for factors marked `!`.
        sizes: sizes of factors that no dim has for itself.

    Raises:
        AutotpError: no such operator, a pattern that cannot be parsed or does not have the operator's number of tensors, an
            unknown option, or one that the pattern contradicts.

    Example:
        ```python
        autotp.rule("mylib::scan", "b t^ d, d -> b t^ d", linear=((0,),))
        ```
    """
    parsed = parse(pattern)
    settings = _checked(pattern, parsed, options)
    for op in _each(ops):
        name, target = identify(op)
        if isinstance(target, torch._ops.OpOverload):
            _check_tensors(pattern, parsed, name, target)
        RULES[name] = lambda call: bind(pattern, call, **settings)


def rule_for(ops: Operators) -> Callable[[RuleFunction], RuleFunction]:
    """Register a function `Call -> Rule` for one or several operators, given as for `rule`.

    The function sees the arguments and the tensors' types of each call, and returns `autotp.bind(pattern, call, ...)`, or None if
    it has no rule for these arguments: the call then runs replicated.

    Raises:
        AutotpError: no such operator.

    Example:
        ```python
        @autotp.rule_for("mylib::scan")
        def scan(call: autotp.Call) -> autotp.Rule | None:
            return None if call.argument(1, "reverse") else autotp.bind("b t^ d -> b t^ d", call)
        ```
    """
    names = [identify(op)[0] for op in _each(ops)]

    def register(function: RuleFunction) -> RuleFunction:
        RULES.update(dict.fromkeys(names, function))
        return function

    return register


def rule_of(call: Call) -> Rule | None:
    """The rule of a call, or None if its operator has none for these arguments.

    Raises:
        AutotpError: the pattern does not fit the call, or the operator's function fails; with the operator's module and line.
    """
    function = RULES.get(call.op)
    if function is None:
        return None
    place = f"{call.op}{call.where}"
    try:
        found = function(call)
    except AutotpError as error:
        raise AutotpError(f"{error}; at {place}") from error
    except Exception as error:
        raise AutotpError(f"the rule of {place} fails with {type(error).__name__}: {error}; correct its function") from error
    if found is not None and not isinstance(found, Rule):
        raise AutotpError(f"the rule of {place} gives a {type(found).__name__}; return autotp.bind(pattern, call), or None")
    return found


# ---- operators ------------------------------------------------------------------------------------------------------


def identify(op: str | Callable[..., Any]) -> tuple[str, Callable[..., Any] | None]:
    """The name by which the table knows an operator, and the operator itself; None for a name that PyTorch does not know (yet).

    Raises:
        AutotpError: several overloads to choose from, an overload that the operator lacks, or something that is no operator.
    """
    if not isinstance(op, str):
        op = _torch.overload_of_custom_op(op)
        if isinstance(op, torch._ops.OpOverloadPacket):
            op = _overload(op, "")
        if not callable(op):
            raise AutotpError(f"{op!r} is no operator; pass a name such as 'mylib::scan', torch.ops.mylib.scan, or a function")
        return op_name(op), op
    namespace, _, rest = op.replace("::", ".", 1).partition(".")
    packet, _, overload = rest.partition(".")
    if not (namespace and packet):
        raise AutotpError(f"{op!r} is no operator's name; write 'mylib::scan' or 'mylib.scan.default'")
    found = getattr(getattr(torch.ops, namespace), packet, None)
    if not isinstance(found, torch._ops.OpOverloadPacket):
        return f"{namespace}.{packet}.{overload or 'default'}" if "::" in op else op, None
    target = _overload(found, overload)
    return op_name(target), target


def _overload(packet: torch._ops.OpOverloadPacket, name: str) -> torch._ops.OpOverload:
    """An overload of an operator by its name; without one, the default or only overload among those that give new tensors."""
    overloads = {other: getattr(packet, other) for other in packet.overloads()}
    pure = {other: one for other, one in overloads.items() if _is_pure(one)} or overloads
    chosen = name or ("default" if "default" in pure or len(pure) > 1 else next(iter(pure)))
    if chosen not in (overloads if name else pure):
        what = f"has no overload {name!r}" if name else "has several overloads"
        raise AutotpError(f"{packet} {what}; name one of {', '.join(f'{packet}.{other}' for other in pure)}")
    found: torch._ops.OpOverload = overloads[chosen]
    return found


def _is_pure(overload: torch._ops.OpOverload) -> bool:
    return not overload._schema.is_mutable and any("Tensor" in str(found.type) for found in overload._schema.returns)


def _each(ops: Operators) -> list[str | Callable[..., Any]]:
    if isinstance(ops, str):
        return list(ops.split())
    return list(ops) if isinstance(ops, Iterable) and not callable(ops) else [ops]  # type: ignore[list-item]


# ---- checks ---------------------------------------------------------------------------------------------------------


def _checked(text: str, pattern: Pattern, options: dict[str, Any]) -> dict[str, Any]:
    """The options of a pattern, groups as tuples, if all are known and sensible."""

    def refuse(what: str) -> AutotpError:
        return AutotpError(f"the rule {text!r} {what}")

    for name in options:
        if name not in OPTIONS:
            raise refuse(f"has an unknown option {name!r}; the options are {', '.join(OPTIONS)}")
    groups = options.get("linear", ())
    try:
        linear = tuple(tuple(group) for group in groups)
    except TypeError:
        raise refuse(f"has linear={groups!r}; write groups of operands, each a tuple, e.g. ((0,), (1,))") from None
    operands = range(len(pattern.inputs))
    if any(operand not in operands for group in linear for operand in group):
        raise refuse(f"has linear={groups!r}, but its operands are numbered 0 to {len(operands) - 1}")
    if options.get("work", "memory") not in get_args(Work):
        raise refuse(f"has work={options['work']!r}; choose one of {', '.join(get_args(Work))}")
    if options.get("reduction", "P") not in ("P", "M"):
        raise refuse(f"has reduction={options['reduction']!r}; choose 'P' (a sum) or 'M' (a maximum)")
    local = options.get("local")
    if local is not None and not callable(local):
        raise refuse(f"has local={local!r}; pass a function of an autotp.Local")
    if pattern.special and local is None:
        raise refuse(f"marks {min(pattern.special)!r} with '!', which needs local=..., how one rank calls it; or mark it '^'")
    return {**options, "linear": linear}


def _check_tensors(text: str, pattern: Pattern, name: str, target: torch._ops.OpOverload) -> None:
    """That a pattern has as many terms as an operator has tensors; lists of tensors may have any length."""
    schema = target._schema
    operands = [argument for argument in schema.arguments if "Tensor" in str(argument.type)]
    sides = (
        ("operands", len(pattern.inputs), [argument.name for argument in operands], [argument.type for argument in operands]),
        ("outputs", len(pattern.outputs), ["its outputs"] * len(schema.returns), [found.type for found in schema.returns]),
    )
    for side, terms, names, types in sides:
        if any("List" in str(kind) or "[]" in str(kind) for kind in types) or not names:
            continue
        if terms != len(names):
            tensors = f" ({', '.join(names)})" if side == "operands" else ""
            raise AutotpError(f"the rule {text!r} has {terms} {side}, but {name} has {len(names)}{tensors}; write a term for each")
