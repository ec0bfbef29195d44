"""New tensors in clean-up: what takes another tensor only for its shape, dtype and device is made from nothing.

So made, a tensor neither waits for the other one nor asks for its layout, and carries no gradient.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from autotp.collector import Call, Collector, Rewrite, Rewritten

aten = torch.ops.aten


def _made(call: Call, target: Any, *args: Any) -> Call:
    """`target(*args)` in place of the call, with its dtype, on its device."""
    kwargs = {"dtype": call.outputs[0].dtype, "device": call.device}
    return replace(call, target=target, args=args, kwargs=kwargs)


def filled(value: float) -> Rewrite:
    """`zeros_like`, `new_ones` and the like."""

    def rewrite(nodes: Collector, call: Call) -> Rewritten:
        return _made(call, aten.full.default, list(call.outputs[0].shape), value)

    return rewrite


def full(nodes: Collector, call: Call) -> Rewritten:
    """`full_like`, `new_full`, `fill`: the value is the last positional argument."""
    return _made(call, aten.full.default, list(call.outputs[0].shape), call.args[-1])


def fill(nodes: Collector, call: Call) -> Rewritten:
    """A tensor filled with a scalar tensor, which may carry a gradient."""
    value, out = call.args[1], call.outputs[0]
    if nodes.type(value).dtype != out.dtype:
        kind = nodes.intern((), (), out.dtype, False)
        value = nodes.emit(replace(call, name=f"{call.name}_cast", target=aten.to.dtype, args=(value, out.dtype), outputs=(kind,)))
    return replace(call, target=aten.expand.default, args=(value, list(out.shape)), kwargs={})


def random_like(target: Any) -> Rewrite:
    """`rand_like` and the like: the arguments between the tensor and the options stand before the shape."""

    def rewrite(nodes: Collector, call: Call) -> Rewritten:
        return _made(call, target, *call.args[1:], list(call.outputs[0].shape))

    return rewrite


CREATION: dict[Any, Rewrite] = {
    **dict.fromkeys((aten.zeros_like.default, aten.new_zeros.default, aten.zero.default), filled(0)),
    **dict.fromkeys((aten.ones_like.default, aten.new_ones.default), filled(1)),
    **dict.fromkeys((aten.empty_like.default, aten.new_empty.default, aten.new_empty_strided.default), filled(0)),
    **dict.fromkeys((aten.full_like.default, aten.new_full.default, aten.fill.Scalar), full),
    aten.fill.Tensor: fill,
    aten.rand_like.default: random_like(aten.rand.default),
    aten.randn_like.default: random_like(aten.randn.default),
    aten.randint_like.default: random_like(aten.randint.default),
    aten.randint_like.low_dtype: random_like(aten.randint.low),
}
"""The rewrites of this file, by operator."""
