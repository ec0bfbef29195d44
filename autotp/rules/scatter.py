"""Writes into a part of a tensor: scatter, index_put, index_add, slices that are overwritten.

What is written selects: the operators are linear in the tensor and what is written to it, together. Where values are added, the
added ones may be split, and the tensor itself is a summand that is added once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from autotp import _torch
from autotp.rules.indexing import LocalResult, index_terms
from autotp.rules.language import Call, Local, LocalStart, Rule, bind
from autotp.rules.registry import rule_for

aten = torch.ops.aten


def masked_add(x: Tensor, dim: int, index: Tensor, source: Tensor, start: int, rows: int, along: bool, alpha: float) -> Tensor:
    """`scatter_add` (along a dim) or `index_add` into a dim of `rows` elements; what goes to other ranks is left out.

    Args:
        x: holds the elements [start, start + x.shape[dim]) of that dim.
        along: whether this is `scatter_add`.

    Raises:
        RuntimeError: an index is out of bounds (on a GPU when the device is next synchronised).
    """
    _torch.assert_all((index >= 0) & (index < rows), "an index is out of bounds")
    here = (index >= start) & (index < start + x.shape[dim])
    if x.shape[dim] == 0:
        return x + 0 * source.sum()
    index = (index - start).where(here, 0)
    if along:
        return x.scatter_add(dim, index, source.where(here, 0))
    mask = here.reshape(here.shape + (1,) * (x.dim() - dim - 1))
    return x.index_add(dim, index, source.where(mask, 0), alpha=alpha)


def _local_add(dim: int, along: bool) -> Any:
    def local_call(local: Local) -> LocalResult:
        split = local.operand_split(0, dim)
        if split is None:
            return local.target, local.args, local.kwargs
        rows, alpha = local.call.tensors[0].shape[dim], local.kwargs.get("alpha", 1)
        x, _, index, source = local.args[:4]
        return masked_add, (x, dim, index, source, LocalStart(split), rows, along, alpha), {}

    return local_call


def _same(*shapes: tuple[Any, ...]) -> list[bool]:
    """For every dim, whether all shapes have the same size there."""
    return [len(set(sizes)) == 1 for sizes in zip(*shapes, strict=True)]


@rule_for("aten.scatter_add.default")
def scatter_add(call: Call) -> Rule | None:
    """The written dim may be split, and so may the values, if all of them are written."""
    return _scatter(call, adds=True)


@rule_for("aten.scatter_reduce.two")
def scatter_reduce(call: Call) -> Rule | None:
    """A sum on top of what is there is `scatter_add`; other sums and means are linear; all else is not."""
    kind, keeps = call.args[4], call.kwargs.get("include_self", True)
    if kind == "sum" and keeps:
        return _scatter(call, adds=True, masked=False)
    return _scatter(call, linear=((0, 2),) if kind in ("sum", "mean") else ())


@rule_for("aten.scatter.src aten.scatter.reduce")
def scatter(call: Call) -> Rule | None:
    """The written dim stays whole."""
    if call.op == "aten.scatter.reduce":
        return _scatter(call, adds=call.kwargs.get("reduce") == "add", masked=False)
    return _scatter(call, linear=((0, 2),))


@rule_for("aten.scatter.value aten.scatter.value_reduce")
def scatter_value(call: Call) -> Rule | None:
    """Linear where the value is zero and nothing is multiplied."""
    return _scatter(call, linear=((0,),) if call.args[3] == 0 and "reduce" not in call.kwargs else ())


def _scatter(call: Call, adds: bool = False, masked: bool = True, linear: tuple[tuple[int, ...], ...] = ()) -> Rule | None:
    """`adds`: values are added to the tensor; `masked`: by an operator that can leave out what goes to other ranks."""
    shapes = [tensor.shape for tensor in call.tensors]
    x, index = shapes[:2]
    if not x or any(len(shape) != len(x) for shape in shapes):
        return None
    dim, last = call.args[1] % len(x), shapes[-1]
    agree, all_written = _same(*shapes), index == last
    free = [i != dim and agree[i] for i in range(len(x))]
    spreads, masks = adds and all_written, adds and masked and all_written

    def term(shape: tuple[Any, ...], name: str, along: str) -> str:
        return " ".join(f"d{i}" if free[i] else along if i == dim else f"{name}{i}^" for i in range(len(shape)))

    left = term(x, "a", "a!" if masks else "a^")
    added = "n" if spreads else "n^" if index[dim] == last[dim] else ""
    terms = [f"+{left}" if adds else left, term(index, "b", added or "b^"), term(last, "c", added or "c^")]
    local = _local_add(dim, True) if masks else None
    return bind(f"{', '.join(terms[: len(shapes)])} -> {left}", call, linear=((0, 2),) if adds else linear, local=local)


@rule_for("aten.index_add.default")
def index_add(call: Call) -> Rule | None:
    """The written dim and the values may be split."""
    rank = len(call.tensors[0].shape)
    if not rank or len(call.tensors[2].shape) != rank:
        return None
    dim = call.args[1] % rank
    x, source = (" ".join(name if i == dim else f"d{i}" for i in range(rank)) for name in ("a!", "n"))
    return bind(f"+{x}, n, {source} -> {x}", call, linear=((0, 2),), local=_local_add(dim, False))


@rule_for("aten.index_copy.default aten.index_fill.int_Scalar aten.index_fill.int_Tensor aten.index_reduce.default")
def index_copy(call: Call) -> Rule | None:
    """The written dim stays whole."""
    rank, fills = len(call.tensors[0].shape), "fill" in call.op
    if not rank or (len(call.tensors) > 2 and not fills and len(call.tensors[2].shape) != rank):
        return None
    dim = call.args[1] % rank
    x, source = (" ".join(name if i == dim else f"d{i}" for i in range(rank)) for name in ("a^", "n^"))
    linear: tuple[tuple[int, ...], ...] = ((0, 2),)
    if call.op == "aten.index_fill.int_Scalar":
        linear = ((0,),) if call.args[3] == 0 else ()
    elif "reduce" in call.op:
        linear = ()
    return bind(f"{x}, {'n^' if call.tensors[1].shape else ''}, {'' if fills else source} -> {x}", call, linear=linear)


@rule_for("aten.index_put.default aten._unsafe_index_put.default")
def index_put(call: Call) -> Rule | None:
    """x[i, :, j] = values: indexed dims stay whole, the others are free; added values may be split."""
    count = len(call.args[1])
    indices, values = call.operands[1 : 1 + count], call.operands[1 + count]
    if values is None or any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices):
        return None
    adds = bool(call.argument(3, "accumulate", False))
    places = [place for place, index in enumerate(indices) if index is not None]
    x = [f"a{i}^" if i in places else f"d{i}" for i in range(len(call.tensors[0].shape))]
    free = [name for i, name in enumerate(x) if i not in places]
    terms, wide = index_terms(call, "" if adds else "^")
    start = places[0] if places[-1] - places[0] < len(places) else 0
    written = [*free[:start], *wide, *free[start:]]
    if len(values.shape) > len(written):
        return None
    target, given = " ".join(x), " ".join(written[len(written) - len(values.shape) :])
    summed = f"+{target}" if adds else target
    return bind(f"{', '.join([summed, *terms, given])} -> {target}", call, linear=((0, 1 + count),))


@rule_for("aten.masked_scatter.default")
def masked_scatter(call: Call) -> Rule | None:
    """Values are taken in order, so dims stay whole, but for last ones that the mask and the order of values do not tell apart."""
    x, mask, source = (tensor.shape for tensor in call.tensors)
    free = 0
    while free < min(len(x), len(source)) - 1 and x[-1 - free] == source[-1 - free] and (len(mask) <= free or mask[-1 - free] == 1):
        free += 1

    def term(name: str, shape: tuple[Any, ...]) -> str:
        from_end = range(len(shape), 0, -1)
        return " ".join(f"e{place}" if place <= free else f"{name}{place}^" for place in from_end)

    masked = " ".join("1" if size == 1 else f"d{len(mask) - place}^" for place, size in enumerate(mask))
    return bind(f"{term('d', x)}, {masked}, {term('s', source)} -> {term('d', x)}", call, linear=((0, 2),))


@rule_for("aten.select_scatter.default aten.slice_scatter.default")
def overwrite(call: Call) -> Rule:
    """The overwritten dim stays whole."""
    rank, selects = len(call.tensors[0].shape), "select" in call.op
    dim = call.argument(2, "dim", 0) % rank
    x = " ".join("a^" if i == dim else f"d{i}" for i in range(rank))
    source = " ".join("b^" if i == dim else f"d{i}" for i in range(rank) if i != dim or not selects)
    return bind(f"{x}, {source} -> {x}", call, linear=((0, 1),))
