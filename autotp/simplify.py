"""Which operators clean-up drops or writes differently: one table.

A rewrite takes the collector of nodes and one call. It returns the `Ref` that the call amounts to (the call vanishes),
or a `Call`, the same or another, to append in its place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

import sympy
import torch

from autotp import losses
from autotp.program import Ref, TensorType

aten = torch.ops.aten


@dataclass(frozen=True)
class Call:
    """An operator call about to become a node; `outputs` do not require a gradient yet."""

    name: str
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[TensorType, ...]
    several: bool = False
    """Whether the operator returns a tuple or list."""
    path: str = ""
    source: str = ""

    @property
    def operand(self) -> Ref:
        """The first argument, a tensor."""
        operand: Ref = self.args[0]
        return operand


class Collector(Protocol):
    """What a rewrite may do: ask for types, append further calls."""

    def type(self, ref: Ref) -> TensorType: ...
    def emit(self, call: Call) -> Any: ...
    def intern(
        self, shape: tuple[Any, ...], hint: tuple[int, ...], dtype: torch.dtype, requires_grad: bool
    ) -> TensorType: ...


Rewrite = Callable[[Collector, Call], Ref | Call]


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


def detach(nodes: Collector, call: Call) -> Ref | Call:
    """Matters only where there is a gradient to stop."""
    return replace(call, target=aten.detach.default) if nodes.type(call.operand).requires_grad else call.operand


def dropout(nodes: Collector, call: Call) -> Ref | Call:
    """`dropout(x, p, train)` that drops nothing."""
    _, p, train = call.args
    return call if train and p > 0 else call.operand


NONE, MEAN, SUM = 0, 1, 2


def mean_loss(nodes: Collector, call: Call) -> Ref | Call:
    """A mean cross-entropy or NLL over rows as the sum over rows divided by their count.

    The count is that of the targets other than `ignore_index` (all ignored: 0/0 = NaN, as in PyTorch), or, for targets
    that are probabilities, of all rows. A 16-bit loss is divided in float32, and a float16 one also summed there, since
    the sum overflows where the mean does not. Means weighted by class are left alone.
    """
    options = _loss_options(call)
    if options["reduction"] != MEAN or options["weight"] is not None:
        return cross_entropy(nodes, call)
    inputs, target = call.args[:2]
    kind, labels, dtype = nodes.type(inputs), nodes.type(target), call.outputs[0].dtype
    wide, by_row = torch.float32 if dtype.itemsize < 4 else dtype, dtype == torch.float16
    smoothing = (options["label_smoothing"],) if call.target is aten.cross_entropy_loss.default else ()

    def emit(suffix: str, op: Any, args: tuple[Any, ...], like: TensorType, into: torch.dtype, **kwargs: Any) -> Ref:
        out = nodes.intern(like.shape, like.hint, into, False)
        result: Ref = nodes.emit(Call(f"{call.name}_{suffix}", op, args, kwargs, (out,), False, call.path, call.source))
        return result

    scalar, probabilities = call.outputs[0], labels.dtype.is_floating_point
    reduction = (None, NONE if by_row else SUM, options["ignore_index"], *smoothing)
    rows = _without(kind, 0 if len(kind.shape) == 1 else 1)
    total = emit("sum", call.target, (inputs, target, *reduction), rows if by_row else scalar, dtype)
    if by_row:
        total = emit("total", aten.sum.default, (total,), scalar, wide, dtype=wide)
    elif wide != dtype:
        total = emit("wide", aten.to.dtype, (total, wide), scalar, wide)
    count: Any
    if probabilities:
        count = sympy.Mul(*rows.shape)
        count = int(count) if count.is_Integer else count
    else:
        counted = emit("valid", aten.ne.Scalar, (target, options["ignore_index"]), labels, torch.bool)
        number = emit("number", aten.sum.default, (counted,), scalar, torch.int64)
        count = emit("count", aten.to.dtype, (number, wide), scalar, wide)
    if wide == dtype:
        return replace(call, target=aten.div.Tensor, args=(total, count), kwargs={})
    mean = emit("mean", aten.div.Tensor, (total, count), scalar, wide)
    return replace(call, target=aten.to.dtype, args=(mean, dtype), kwargs={})


def _loss_options(call: Call) -> dict[str, Any]:
    options = {"weight": None, "reduction": MEAN, "ignore_index": -100, "label_smoothing": 0.0}
    return options | dict(zip(options, call.args[2:], strict=False)) | call.kwargs


def cross_entropy(nodes: Collector, call: Call) -> Ref | Call:
    """A plain cross-entropy of (rows, classes) with class targets, in pieces that can be split by rows and classes.

    16-bit logits are widened first, as PyTorch does inside its own operator. Weights, label smoothing, probabilities as
    targets and further dims stay one operator.
    """
    options = _loss_options(call)
    inputs, target = call.args[:2]
    kind, labels, out = nodes.type(inputs), nodes.type(target), call.outputs[0]
    plain = options["weight"] is None and not options["label_smoothing"] and not labels.dtype.is_floating_point
    if call.target is not aten.cross_entropy_loss.default or not plain or len(kind.shape) != 2:
        return call

    def emit(suffix: str, op: Any, args: tuple[Any, ...], like: TensorType, into: torch.dtype) -> Ref:
        made = nodes.intern(like.shape, like.hint, into, False)
        result: Ref = nodes.emit(Call(f"{call.name}_{suffix}", op, args, {}, (made,), False, call.path, call.source))
        return result

    wide = torch.float32 if kind.dtype.itemsize < 4 else kind.dtype
    logits = inputs if wide == kind.dtype else emit("logits", aten.to.dtype, (inputs, wide), kind, wide)
    rows = _without(kind, 1)
    maximum = emit("maximum", losses.row_maximum, (logits,), rows, wide)
    sums = emit("sums", losses.sum_exp, (logits, maximum), rows, wide)
    picked = emit("picked", losses.pick, (logits, target), rows, wide)
    loss = emit("rows", losses.rows_of_loss, (sums, maximum, picked, target, options["ignore_index"], kind.shape[1]), rows, wide)
    if options["reduction"] != NONE:
        loss = emit("total", aten.sum.default, (loss,), replace(out, dtype=wide), wide)
    if wide == out.dtype:
        return loss
    return replace(call, target=aten.to.dtype, args=(loss, out.dtype), kwargs={})


def _without(kind: TensorType, dim: int) -> TensorType:
    """The type with one dimension less."""
    return replace(kind, shape=kind.shape[:dim] + kind.shape[dim + 1 :], hint=kind.hint[:dim] + kind.hint[dim + 1 :])


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
    aten.slice_scatter.default: slice_scatter,
    **dict.fromkeys((aten.detach.default, aten.detach_copy.default), detach),
    **dict.fromkeys((aten.dropout.default, aten.feature_dropout.default, aten.alpha_dropout.default), dropout),
    **dict.fromkeys((aten.cross_entropy_loss.default, aten.nll_loss_nd.default), mean_loss),
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

DIFFERENTIABLE_OUTPUTS = {aten._native_batch_norm_legit_functional.default: 1, aten._native_batch_norm_legit.default: 1}
"""Operators of which only the first so many outputs carry a gradient; the others are statistics."""
