"""Which operators clean-up drops or writes differently: one table.

A rewrite takes the collector of nodes and one call. It returns the `Ref` that the call amounts to, or one for each of its
results (the call vanishes), or a `Call`, the same or another, to append in its place.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from autotp import experts, losses
from autotp.collector import Call, Collector, Rewrite, Rewritten
from autotp.program import Ref
from autotp.simplify_creation import CREATION
from autotp.simplify_indexing import INDEXING
from autotp.simplify_losses import LOSSES
from autotp.simplify_reductions import REDUCTIONS
from autotp.simplify_statistics import STATISTICS

aten = torch.ops.aten


def drop(nodes: Collector, call: Call) -> Ref | Call:
    """Values are pure: a copy is the original."""
    return call.operand


def drop_if_same_shape(nodes: Collector, call: Call) -> Ref | Call:
    """A change of shape that changes nothing."""
    return call.operand if nodes.type(call.operand).shape == call.outputs[0].shape else call


def reshape(nodes: Collector, call: Call) -> Ref | Call:
    """`view` needs strides that the dropped copies no longer guarantee; `reshape` does not."""
    if nodes.type(call.operand).shape == call.outputs[0].shape:
        return call.operand
    return replace(call, target=aten.reshape.default)


def reshape_as(nodes: Collector, call: Call) -> Ref | Call:
    """The other operand lends its shape alone."""
    return reshape(nodes, replace(call, args=(call.args[0], list(call.outputs[0].shape)), kwargs={}))


def expand_as(nodes: Collector, call: Call) -> Ref | Call:
    """The other operand lends its shape alone."""
    args = (call.args[0], list(call.outputs[0].shape))
    return drop_if_same_shape(nodes, replace(call, target=aten.expand.default, args=args, kwargs={}))


def cast(nodes: Collector, call: Call) -> Ref | Call:
    """Every conversion is `to.dtype`; to the dtype that the tensor has (or to another device) it is none."""
    dtype = call.outputs[0].dtype
    if nodes.type(call.operand).dtype == dtype:
        return call.operand
    return replace(call, target=aten.to.dtype, args=(call.args[0], dtype), kwargs={})


def slice_scatter(nodes: Collector, call: Call) -> Ref | Call:
    """Overwriting all of a tensor, which gives the new values."""
    new, out = nodes.type(call.args[1]), call.outputs[0]
    return call.args[1] if (new.shape, new.dtype) == (out.shape, out.dtype) else call


def copy(nodes: Collector, call: Call) -> Ref | Call:
    """`copy_` made pure: the source, in the shape and dtype of what it overwrites."""
    source, out = call.args[1], call.outputs[0]
    if nodes.type(source).shape != out.shape:
        wide = nodes.intern(out.shape, out.hint, nodes.type(source).dtype, False)
        args = (source, list(out.shape))
        name, target = f"{call.name}_expand", aten.expand.default
        source = nodes.emit(replace(call, name=name, target=target, args=args, kwargs={}, outputs=(wide,)))
    return cast(nodes, replace(call, args=(source,), kwargs={}))


def sort(nodes: Collector, call: Call) -> Rewritten:
    """Ascending sorts of a vector of integers, which mixtures of experts begin with: always stable, in one spelling."""
    keys = nodes.type(call.operand)
    options = [*call.args[1:], *call.kwargs.values()]
    dim = next((option for option in options if type(option) is int), -1)
    descending = call.kwargs.get("descending", call.args[-1] if type(call.args[-1]) is bool else False)
    if len(keys.shape) != 1 or keys.dtype.is_floating_point or keys.dtype == torch.bool or descending or dim not in (0, -1):
        return call
    pair = nodes.intern((2, *keys.shape), (2, *keys.hint), torch.int64, False)
    row = nodes.intern(keys.shape, keys.hint, torch.int64, False)
    order = nodes.emit(replace(call, target=experts.sort_by_key, args=call.args[:1], kwargs={}, outputs=(pair,), several=False))

    def half(place: int) -> Any:
        args = (order, 0, place)
        return nodes.emit(replace(call, target=aten.select.int, args=args, kwargs={}, outputs=(row,), several=False))

    slots = half(1)
    if not call.several:
        return slots  # type: ignore[no-any-return]
    values = half(0)
    if keys.dtype != torch.int64:
        cast_to = replace(call, target=aten.to.dtype, args=(values, keys.dtype), kwargs={}, outputs=(keys,), several=False)
        values = nodes.emit(cast_to)
    return (values, slots)


def detach(nodes: Collector, call: Call) -> Ref | Call:
    """Matters only where there is a gradient to stop."""
    return replace(call, target=aten.detach.default) if nodes.type(call.operand).requires_grad else call.operand


def dropout(nodes: Collector, call: Call) -> Ref | Call:
    """`dropout(x, p, train)` that drops nothing."""
    _, p, train = call.args
    return call if train and p > 0 else call.operand


COPIES = (
    aten.alias.default, aten.clone.default, aten.contiguous.default, aten.lift.default, aten.lift_fresh.default,
    aten.lift_fresh_copy.default, aten.positive.default, aten.resolve_conj.default, aten.resolve_neg.default,
)  # fmt: skip
MAYBE_SAME_SHAPE = (
    aten.expand.default, aten.broadcast_to.default, aten.slice.Tensor, aten.narrow.default, aten.squeeze.default,
    aten.squeeze.dim, aten.squeeze.dims, aten.flatten.using_ints, aten.unflatten.int, aten.repeat.default,
)  # fmt: skip
CASTS = (
    aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other, aten.type_as.default, aten._to_copy.default,
)  # fmt: skip

REWRITES: dict[Any, Rewrite] = {
    **dict.fromkeys(COPIES, drop),
    **dict.fromkeys(MAYBE_SAME_SHAPE, drop_if_same_shape),
    **dict.fromkeys(
        (aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.view_copy.default), reshape
    ),
    **dict.fromkeys((aten.view_as.default, aten.reshape_as.default), reshape_as),
    aten.expand_as.default: expand_as,
    **dict.fromkeys(CASTS, cast),
    aten.copy.default: copy,
    **dict.fromkeys((aten.sort.default, aten.sort.stable, aten.argsort.default, aten.argsort.stable), sort),
    aten.slice_scatter.default: slice_scatter,
    **dict.fromkeys((aten.detach.default, aten.detach_copy.default), detach),
    **dict.fromkeys((aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default), dropout),
    **CREATION,
    **INDEXING,
    **LOSSES,
    **REDUCTIONS,
    **STATISTICS,
}

STOPS_GRADIENT = frozenset(
    overload
    for name in (
        "detach", "zeros_like", "ones_like", "empty_like", "full_like", "rand_like", "randn_like", "randint_like",
        "new_zeros", "new_ones", "new_empty", "new_full", "new_empty_strided",
    )
    for overload in (getattr(getattr(aten, name), kind) for kind in getattr(aten, name).overloads())
) | {losses.row_maximum}  # fmt: skip
"""Operators whose results never require a gradient, whatever their operands do."""
