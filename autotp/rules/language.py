"""The rule language: a pattern (`autotp.rules.pattern`) names the factors, or loop indices, of an operator.

It is bound to the shapes of each call; the result is a `Rule`, from which strategies are derived.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import sympy
import torch

from autotp.errors import AutotpError
from autotp.layouts import Layout, Split
from autotp.program import Node, Ref, Size, TensorType
from autotp.rules.pattern import ELLIPSIS, Term, parse


class Part(NamedTuple):
    """A dim that is the stretch [start, stop) of factor `name` (an output of `split`, an operand of `cat`)."""

    name: str
    start: Size
    stop: Size


class SortedRows(NamedTuple):
    """A dim of `size` rows sorted by a key; `order` is the node that made the order (see `autotp.experts`).

    Splitting factor `slot` (each of its elements stands for `repeat` slots) leaves a rank the rows of its slots, splitting factor
    `key` those of its keys.
    """

    slot: str
    repeat: Size
    key: str
    size: Size
    order: int


Dim = tuple[str, ...] | Part | SortedRows
"""What one dim is made of: the product of factors, outermost first (empty for size 1), a part of one factor, or sorted rows."""


def factors_in(dims: tuple[Dim, ...]) -> set[str]:
    """The factors whose products a tensor's dims are; parts and sorted rows do not count."""
    return {name for dim in dims if not isinstance(dim, (Part, SortedRows)) for name in dim}


class RowsOf(NamedTuple):
    """That a dim holds the sorted rows of a factor's slots or keys."""

    by: Literal["key", "slot"]
    size: Size
    order: int


class Use(NamedTuple):
    """One dim that has a factor: dim = `outer` × factor × `inner`, the stretch `part` of the factor, or `rows` sorted by it."""

    output: bool
    index: int  # type: ignore[assignment]
    dim: int
    outer: Size
    inner: Size
    part: tuple[Size, Size] | None = None
    rows: RowsOf | None = None

    @property
    def is_whole_dim(self) -> bool:
        """Whether the dim is the factor and nothing else."""
        return self.outer == 1 and self.inner == 1 and self.part is None and self.rows is None


@dataclass(frozen=True)
class Call:
    """One operator call as rules see it: arguments, and the types of tensor operands and outputs.

    `operands` follow the operator's schema (an omitted optional tensor is None), lists flattened; `positions` gives each
    one's place among the node's tensor inputs.
    """

    op: str
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    operands: tuple[TensorType | None, ...]
    positions: tuple[int | None, ...]
    outputs: tuple[TensorType, ...]
    where: str = ""
    """For messages: ` in module `x` (file:line)`."""

    def argument(self, position: int, name: str, default: Any = None) -> Any:
        """The argument at `position`, or called `name`, or the default."""
        return self.args[position] if len(self.args) > position else self.kwargs.get(name, default)

    @property
    def tensors(self) -> tuple[TensorType, ...]:
        """The operands that are present."""
        return tuple(operand for operand in self.operands if operand is not None)


@dataclass(frozen=True)
class Local:
    """What a rule's `local` function sees when its node is emitted for one rank.

    It returns (target, args, kwargs) of the local call. Sizes may be ints, expressions, or the classes below, which the
    rewriter turns into numbers for this rank.
    """

    call: Call
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    operands: tuple[Layout | None, ...]
    outputs: tuple[Layout, ...]

    def output_shape(self, index: int = 0) -> list[Any]:
        """The local shape of an output."""
        return local_sizes(self.call.outputs[index].shape, self.outputs[index])

    def operand_split(self, index: int, dim: int) -> Split | None:
        """How dim `dim` of operand `index` is split, or None."""
        layout = self.operands[index]
        return None if layout is None else layout.split_at(dim)


class LocalSize(NamedTuple):
    """The number of elements of a split dim that this rank holds."""

    split: Split


class LocalStart(NamedTuple):
    """The global index of the first element of a split dim that this rank holds."""

    split: Split


class LocalElements(NamedTuple):
    """The global indices of all elements of a split dim that this rank holds, as a tensor; of sorted rows, their places."""

    split: Split


def local_sizes(shape: tuple[Size, ...], layout: Layout) -> list[Any]:
    """The local shape that `layout` gives a tensor of global `shape`, split dims as `LocalSize`."""
    sizes: list[Any] = list(shape)
    for split in layout.splits:
        sizes[split.dim] = LocalSize(split)
    return sizes


Work = Literal["gemm", "grouped", "convolution", "attention", "memory", "none"]

LocalCall = Callable[[Local], tuple[Any, tuple[Any, ...], dict[str, Any]]]


@dataclass(frozen=True)
class Rule:
    """A bound rule.

    Attributes:
        factors: factor → global size; factors of size 1 are left out.
        operands, outputs: for every tensor input and output of the node, what each dim is made of.
        whole: factors that are never split; special: factors split only through `local`.
        summands: operands that must be partial where an output is.
        linear: groups of operands in which the operator is jointly linear: such a group may be partial.
        work: what the operator's time goes into: "gemm" (a matrix product over the factors), "grouped" (one for every key),
            "convolution", "attention", "memory" (reading the operands and writing the outputs), or "none" (a view).
        random: whether the operator draws random numbers.
        reduction: the kind of an output whose factor is split away: "P" (a sum) or "M" (a maximum, without gradient).
        local: how the node is called on one rank, if not simply with its local operands.
    """

    factors: dict[str, Size]
    operands: tuple[tuple[Dim, ...], ...]
    outputs: tuple[tuple[Dim, ...], ...]
    whole: frozenset[str] = frozenset()
    special: frozenset[str] = frozenset()
    summands: frozenset[int] = frozenset()
    linear: tuple[tuple[int, ...], ...] = ()
    work: Work = "memory"
    random: bool = False
    reduction: str = "P"
    local: LocalCall | None = None

    @cached_property
    def uses(self) -> dict[str, tuple[Use, ...]]:
        """Factor → every operand and output dim that has it."""
        found: dict[str, list[Use]] = {name: [] for name in self.factors}
        for output, tensors in ((False, self.operands), (True, self.outputs)):
            for index, dims in enumerate(tensors):
                for dim, content in enumerate(dims):
                    if isinstance(content, Part):
                        found[content.name].append(Use(output, index, dim, 1, 1, (content.start, content.stop)))
                        continue
                    if isinstance(content, SortedRows):
                        slot, key = (RowsOf(by, content.size, content.order) for by in ("slot", "key"))
                        found[content.slot].append(Use(output, index, dim, 1, content.repeat, None, slot))
                        found[content.key].append(Use(output, index, dim, 1, 1, None, key))
                        continue
                    for place, name in enumerate(content):
                        outer = math.prod(self.factors[other] for other in content[:place])
                        inner = math.prod(self.factors[other] for other in content[place + 1 :])
                        found[name].append(Use(output, index, dim, outer, inner, None))
        return {name: tuple(uses) for name, uses in found.items()}

    @cached_property
    def splittable(self) -> tuple[str, ...]:
        """The factors that may be split, in order of appearance."""
        return tuple(name for name in self.factors if name not in self.whole)


@dataclass
class _Binding:
    """Sizes of the factors, found while a pattern is bound to shapes: as expressions, and as they were in the example.

    Where a factor has several dims whose expressions differ, the operator itself wants them equal: the example decides.
    """

    text: str
    sizes: dict[str, Size]
    hints: dict[str, int]

    def named_dims(self, term: Term, tensor: TensorType) -> list[tuple[str, ...]]:
        """Expand `...` and line the term's dims up with the tensor's."""
        dims: list[tuple[str, ...]] = []
        extra = len(tensor.shape) - len(term.dims) + 1
        if (ELLIPSIS in term.dims and extra < 0) or (ELLIPSIS not in term.dims and extra != 1):
            raise AutotpError(f"the rule {self.text!r} does not fit a tensor of shape {tuple(tensor.shape)}")
        for dim in term.dims:
            if isinstance(dim, str):
                dims.extend((f"dim{-place}",) for place in range(extra, 0, -1))
            else:
                dims.append(dim)
        for names, size, hint in zip(dims, tensor.shape, tensor.hint, strict=True):
            if len(names) == 1 and self.sizes.get(names[0], 1) == 1:
                self.sizes[names[0]], self.hints[names[0]] = size, hint
        return dims

    def infer(self, names: tuple[str, ...], size: Size, hint: int) -> None:
        """Find the one unknown factor of a merged dim by division."""
        known = [name for name in names if name in self.sizes]
        quotient = exact_quotient(size, math.prod(self.sizes[name] for name in known))
        if len(known) == len(names) - 1 and quotient is not None:
            (unknown,) = set(names) - set(known)
            self.sizes[unknown], self.hints[unknown] = quotient, hint // math.prod(self.hints[name] for name in known)

    def content(self, names: tuple[str, ...], size: Size, hint: int) -> tuple[str, ...]:
        """What a dim is made of: nothing where it broadcasts, and factors of size 1 left out."""
        if size == 1:
            return ()
        unknown = [name for name in names if name not in self.hints]
        if unknown:
            raise AutotpError(
                f"the rule {self.text!r} does not tell the size of {unknown[0]!r} in ({' '.join(names)}); name it in a dim of its "
                f"own, or pass sizes={{{unknown[0]!r}: ...}}"
            )
        if math.prod(self.hints[name] for name in names) != hint:
            expected = math.prod(self.sizes[name] for name in names)
            raise AutotpError(f"the rule {self.text!r} expects a dim of size {expected}, but the operand has {size}")
        return tuple(name for name in names if self.sizes[name] != 1)


def bind(
    text: str,
    call: Call,
    *,
    sizes: Mapping[str, int] | None = None,
    linear: tuple[tuple[int, ...], ...] = (),
    work: Work = "memory",
    random: bool = False,
    reduction: str = "P",
    local: LocalCall | None = None,
) -> Rule:
    """Bind a pattern to a call's shapes. `linear` and summands count the pattern's operands; absent ones are skipped.

    `sizes` gives the size of factors that the shapes alone do not tell.

    Raises:
        AutotpError: the pattern does not fit the shapes.
    """
    pattern = parse(text)
    if len(pattern.inputs) < len(call.operands) or len(pattern.outputs) < len(call.outputs):
        raise AutotpError(
            f"the rule {text!r} has {len(pattern.inputs)} operands and {len(pattern.outputs)} outputs, but {call.op} was "
            f"called with {len(call.operands)} and {len(call.outputs)}"
        )
    binding = _Binding(text, dict(sizes or {}), dict(sizes or {}))
    present = [(term, operand) for term, operand in zip(pattern.inputs, call.operands) if operand is not None]
    tensors = [*present, *zip(pattern.outputs, call.outputs)]
    named = [binding.named_dims(term, tensor) for term, tensor in tensors]
    places = [list(zip(dims, tensor.shape, tensor.hint, strict=True)) for dims, (_, tensor) in zip(named, tensors, strict=True)]
    for dims in places:
        for names, size, hint in dims:
            if len(names) > 1:
                binding.infer(names, size, hint)
    contents = [tuple(binding.content(*dim) for dim in dims) for dims in places]
    used = {name for dims in contents for dim in dims for name in dim}
    kept = {name: size for name, size in binding.sizes.items() if name in used}
    flat = [[name for dim in dims for name in dim] for dims in contents]
    twice = {name for names in flat for name in names if names.count(name) > 1}  # no layout splits two dims of one tensor alike
    order = [position for position in call.positions if position is not None]
    operands: list[tuple[Dim, ...]] = [()] * len(order)
    for content, position in zip(contents, order):
        operands[position] = content
    summands = {p for term, p in zip(pattern.inputs, call.positions) if term.summand and p is not None}
    groups = []
    for group in linear:
        found = [(p, operand) for i, (p, operand) in enumerate(zip(call.positions, call.operands)) if i in group and operand is not None]
        if found and all(operand.dtype != torch.bool for _, operand in found):  # a truth value has no summands
            groups.append(tuple(p for p, _ in found if p is not None))
    return Rule(
        factors=kept,
        operands=tuple(operands),
        outputs=tuple(contents[len(order) :]),
        whole=(pattern.whole | twice) & kept.keys(),
        special=pattern.special & kept.keys(),
        summands=frozenset(summands),
        linear=tuple(dict.fromkeys(groups)),
        work=work,
        random=random,
        reduction=reduction,
        local=local,
    )


def exact_quotient(size: Size, divisor: Size) -> Size | None:
    """size / divisor where that is a whole number or a polynomial with whole coefficients, else None."""
    if isinstance(size, int) and isinstance(divisor, int):
        return size // divisor if divisor and size % divisor == 0 else None
    if size == divisor:
        return 1
    quotient = sympy.cancel(sympy.sympify(size) / divisor)
    if quotient.is_number:
        return int(quotient) if quotient.is_Integer else None
    numerator, denominator = quotient.as_numer_denom()
    return quotient if denominator == 1 and sympy.Poly(numerator).domain.is_ZZ else None


# ---- calls ----------------------------------------------------------------------------------------------------------


def call_of(node: Node, types: Callable[[Ref], TensorType]) -> Call:
    """The call that a program node makes, its operands in schema order."""
    slots: list[Ref | None] = []
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        slots = list(node.inputs)
    else:
        for place, argument in enumerate(schema.arguments):
            value = node.args[place] if place < len(node.args) else node.kwargs.get(argument.name)
            if "Tensor" not in str(argument.type):
                continue
            slots.extend(value if isinstance(value, (list, tuple)) else [value if isinstance(value, Ref) else None])
    order = list(node.inputs)
    positions: list[int | None] = []
    taken: set[int] = set()
    for ref in slots:
        position = next((i for i, other in enumerate(order) if other == ref and i not in taken), None) if ref else None
        positions.append(position)
        taken.update(() if position is None else (position,))
    operands = tuple(types(ref) if ref is not None else None for ref in slots)
    where = f" in module `{node.path or '(root)'}`" + (f" ({node.source})" if node.source else "")
    return Call(node.op, node.args, node.kwargs, operands, tuple(positions), node.outputs, where)
