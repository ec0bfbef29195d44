"""Batch and instance norms in clean-up: training statistics over global counts, running statistics as explicit updates.

PyTorch's operators take the mean and variance of the rows that they are given, and update the running statistics on the side.
Here the mean, the variance and the normalisation (`autotp.statistics`) are operators of their own, so that a batch may be split,
and so are the updates. The rewrite of an operator with running statistics gives the output and the new values of these.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

import sympy
import torch

from autotp import statistics
from autotp.collector import Call, Collector, Rewrite, Rewritten
from autotp.program import Ref, Size, TensorType
from autotp.simplify_losses import Emitter

aten = torch.ops.aten


class _Norm(NamedTuple):
    """The arguments of a batch or instance norm; `training` means by the statistics of the input."""

    x: Ref
    weight: Ref | None
    bias: Ref | None
    running_mean: Ref | None
    running_var: Ref | None
    training: bool
    momentum: float
    eps: float


def batch_norm(nodes: Collector, call: Call) -> Rewritten:
    """`batch_norm`: the output, with the new running statistics if there are any."""
    norm, emit = _Norm(*call.args[:8]), Emitter(nodes, call)
    if not norm.training:
        return _evaluated(emit, norm)
    out, _, _, *updated = _trained(emit, norm)
    return (out, *updated) if updated else out


def batch_norm_without_effects(nodes: Collector, call: Call) -> Rewritten:
    """What PyTorch's own functionalisation makes of a batch norm: the statistics, too, are results."""
    args, emit = list(call.args), Emitter(nodes, call)
    if call.target is aten._native_batch_norm_legit.no_stats:
        args[3:3] = [None, None]
    elif call.target is aten._native_batch_norm_legit_no_training.default:
        args.insert(5, False)
    norm = _Norm(*args)
    if not norm.training:
        out = _evaluated(emit, norm)
        return out, out, out  # the statistics that it saves are empty, and only its backward reads them
    out, mean, variance, *updated = _trained(emit, norm)
    rstd = emit("rstd", aten.rsqrt.default, (emit.binary("shifted", aten.add.Tensor, variance, norm.eps),), nodes.type(variance))
    return out, mean, rstd, *updated


def instance_norm(nodes: Collector, call: Call) -> Rewritten:
    """Split by rows and channels as it is; only the running statistics, averages over the rows, are written out."""
    norm, emit = _Norm(*call.args[:8]), Emitter(nodes, call)
    if not norm.training:
        return _evaluated(emit, norm)
    if norm.running_mean is None or norm.running_var is None:
        return call
    kind = nodes.type(norm.x)
    places, channels = list(range(2, len(kind.shape))), _of_dims(kind, 1)
    x = emit.cast(_detached(emit, norm.x), channels.dtype)
    variances = emit("variances", aten.var.correction, (x, places), _of_dims(kind, 0, 1), correction=1)
    mean = emit("mean", aten.mean.dim, (x, [0, *places]), channels)
    variance = emit("variance", aten.mean.dim, (variances, [0]), channels)
    out = emit("normal", call.target, (norm.x, norm.weight, norm.bias, None, None, *call.args[5:]), kind)
    return out, *_updated(emit, norm, mean, variance)


def _evaluated(emit: Emitter, norm: _Norm) -> Ref:
    """The norm by running statistics."""
    return _normalized(emit, norm, norm.running_mean, norm.running_var)


def _trained(emit: Emitter, norm: _Norm) -> tuple[Ref, ...]:
    """The batch norm by the statistics of the batch, these statistics, and the new running ones if there are any."""
    kind = emit.nodes.type(norm.x)
    channels, others = _of_dims(kind, 1), [dim for dim in range(len(kind.shape)) if dim != 1]
    count = _product(kind.shape[dim] for dim in others)
    options = {} if channels.dtype == kind.dtype else {"dtype": channels.dtype}
    mean = emit("mean", aten.mean.dim, (norm.x, others), channels, **options)
    variance = emit("variance", statistics.variance, (norm.x, mean, count), channels)
    out = _normalized(emit, norm, mean, variance)
    if norm.running_mean is None or norm.running_var is None:
        return out, mean, variance
    squares = emit.binary("squares", aten.mul.Tensor, _detached(emit, variance), count)
    unbiased = emit.binary("unbiased", aten.div.Tensor, squares, count - 1)
    return out, mean, variance, *_updated(emit, norm, _detached(emit, mean), unbiased)


def _normalized(emit: Emitter, norm: _Norm, mean: Ref | None, variance: Ref | None) -> Ref:
    args = (norm.x, mean, variance, norm.weight, norm.bias, norm.eps)
    return emit("normal", statistics.normalize, args, emit.nodes.type(norm.x))


def _updated(emit: Emitter, norm: _Norm, mean: Ref, variance: Ref) -> list[Ref]:
    """running + momentum · (new − running) for both statistics, computed in the dtype of the new ones."""
    found = []
    for running, new in ((norm.running_mean, mean), (norm.running_var, variance)):
        assert running is not None
        kind = emit.nodes.type(new)
        moved = emit("running", aten.lerp.Scalar, (emit.cast(running, kind.dtype), new, norm.momentum), kind)
        found.append(emit.cast(moved, emit.nodes.type(running).dtype))
    return found


def _detached(emit: Emitter, ref: Ref) -> Ref:
    """The tensor without its gradient."""
    return emit("detach", aten.detach.default, (ref,), emit.nodes.type(ref))


def _of_dims(kind: TensorType, *dims: int) -> TensorType:
    """The type of statistics with these dims of a tensor; they are taken in at least float32, as by PyTorch."""
    dtype = torch.float32 if kind.dtype.itemsize < 4 else kind.dtype
    shape, hint = (tuple(sizes[dim] for dim in dims) for sizes in (kind.shape, kind.hint))
    return replace(kind, shape=shape, hint=hint, dtype=dtype)


def _product(sizes: Iterable[Size]) -> Size:
    """A product of sizes, as a plain int where it is one."""
    product = sympy.Mul(*sizes)
    return int(product) if product.is_Integer else product


WITHOUT_EFFECTS = (
    aten._native_batch_norm_legit_functional.default,
    aten._native_batch_norm_legit.no_stats,
    aten._native_batch_norm_legit_no_training.default,
)

STATISTICS: dict[torch._ops.OpOverload, Rewrite] = {
    aten.batch_norm.default: batch_norm,
    aten.instance_norm.default: instance_norm,
    **dict.fromkeys(WITHOUT_EFFECTS, batch_norm_without_effects),
}
"""What clean-up writes differently, for the table in `autotp.simplify`."""
