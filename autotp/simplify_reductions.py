"""Reductions in clean-up, in one spelling: those of all elements name their dims, norms are vector norms."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from autotp.collector import Call, Collector, Rewrite, Rewritten
from autotp.program import Ref, TensorType

aten = torch.ops.aten


def all_dims(target: Any) -> Rewrite:
    """`target` over all dims."""

    def rewrite(nodes: Collector, call: Call) -> Rewritten:
        rank = len(nodes.type(call.operand).shape)
        return replace(call, target=target, args=(call.operand, list(range(rank))), kwargs={}) if rank else call

    return rewrite


def norm(nodes: Collector, call: Call) -> Rewritten:
    """`x.norm(p, dim, keepdim)`."""
    if not nodes.type(call.operand).dtype.is_floating_point:
        return call
    order = call.args[1] if len(call.args) > 1 and call.args[1] is not None else 2
    return replace(call, target=aten.linalg_vector_norm.default, args=(call.operand, order, *call.args[2:]))


def weight_norm(nodes: Collector, call: Call) -> Rewritten:
    """v · g / √(Σ v²), the sum over all dims but one: written out, every dim can be split. (16-bit norms need a wider sum.)"""
    direction, magnitude = (nodes.type(ref) for ref in call.args[:2])
    dim = call.args[2] if len(call.args) > 2 else 0
    if dim < 0 or direction.dtype.itemsize < 4 or not magnitude.shape:
        return call

    def emit(suffix: str, op: Any, args: tuple[Any, ...], like: TensorType) -> Ref:
        out = nodes.intern(like.shape, like.hint, like.dtype, False)
        result: Ref = nodes.emit(replace(call, name=f"{call.name}_{suffix}", target=op, args=args, kwargs={}, outputs=(out,)))
        return result

    others = [i for i in range(len(direction.shape)) if i != dim]
    squares = emit("squares", aten.mul.Tensor, (call.operand, call.operand), direction)
    length = emit("length", aten.sqrt.default, (emit("total", aten.sum.dim_IntList, (squares, others, True), magnitude),), magnitude)
    factor = emit("factor", aten.div.Tensor, (call.args[1], length), magnitude)
    return replace(call, target=aten.mul.Tensor, args=(call.operand, factor), kwargs={})


REDUCTIONS: dict[Any, Rewrite] = {
    aten.max.default: all_dims(aten.amax.default),
    aten.min.default: all_dims(aten.amin.default),
    **dict.fromkeys((aten.any.default, aten._is_any_true.default), all_dims(aten.any.dims)),
    **dict.fromkeys((aten.all.default, aten._is_all_true.default), all_dims(aten.all.dims)),
    aten.norm.Scalar: norm,
    aten.norm.ScalarOpt_dim: norm,
    aten.norm.ScalarOpt_dtype: norm,
    aten.norm.ScalarOpt_dim_dtype: norm,
    aten._weight_norm.default: weight_norm,
}
"""The rewrites of this file, by operator."""
