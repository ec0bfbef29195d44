"""Patterns, einsum-style: the text of a rule, parsed once.

    linear        "... i, o i, +o -> ... o"
    layer_norm    "... d^, d^, d^ -> ... d^"
    embedding     "v! e, ... -> ... e"

    name      a factor: splitting it splits every dim that has it; operands without it are replicated, outputs without it partial
    name^     a factor that is never split
    name!     a factor that is split only through the rule's `local` function (a masked lookup, a sum over a global count)
    +a b      a summand: where the output becomes partial, this operand must be partial too (a bias that is added once)
    (a b)     a dim that merges factors, outermost first
    ...       any number of leading dims, aligned from the right; a dim of size 1 that broadcasts lacks the factor
    1         a dim without a factor
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

from autotp.errors import AutotpError

ELLIPSIS = "..."


class Term(NamedTuple):
    """One operand or output of a pattern: dims as tuples of factor names, `...` as the string."""

    dims: tuple[tuple[str, ...] | str, ...]
    summand: bool


class Pattern(NamedTuple):
    """A parsed pattern."""

    inputs: tuple[Term, ...]
    outputs: tuple[Term, ...]
    whole: frozenset[str]
    special: frozenset[str]


@cache
def parse(text: str) -> Pattern:
    """Parse a pattern such as `"... i, o i, +o -> ... o"`.

    Raises:
        AutotpError: the text is not a pattern; the message shows where.
    """
    if text.count("->") != 1:
        raise AutotpError(f"the rule {text!r} needs exactly one '->' between its operands and its outputs")
    whole: set[str] = set()
    special: set[str] = set()

    def name_of(token: str) -> str:
        name = token.rstrip("^!")
        if not name.isidentifier():
            raise AutotpError(f"the rule {text!r} has {token!r} where a factor name such as 'd', 'd^' or 'd!' should stand")
        if token.endswith("^"):
            whole.add(name)
        elif token.endswith("!"):
            special.add(name)
        return name

    def term(part: str) -> Term:
        part = part.strip()
        summand = part.startswith("+")
        dims: list[tuple[str, ...] | str] = []
        group: list[str] | None = None
        for token in part.lstrip("+").replace("(", " ( ").replace(")", " ) ").split():
            if token == "(" and group is None:
                group = []
            elif token == ")" and group is not None:
                dims.append(tuple(group))
                group = None
            elif token == ELLIPSIS and group is None:
                dims.append(ELLIPSIS)
            elif token == "1" and group is None:
                dims.append(())
            elif group is not None:
                group.append(name_of(token))
            else:
                dims.append((name_of(token),))
        if group is not None:
            raise AutotpError(f"the rule {text!r} opens a '(' that it never closes")
        return Term(tuple(dims), summand)

    left, right = text.split("->")
    return Pattern(
        tuple(term(part) for part in left.split(",")),
        tuple(term(part) for part in right.split(",")),
        frozenset(whole),
        frozenset(special),
    )
