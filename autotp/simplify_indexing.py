"""Lookups and writes in clean-up: masks instead of indices of unknown number, and only the results that are used."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from autotp import lookups
from autotp.collector import Call, Collector, Rewrite, Rewritten
from autotp.program import Ref, TensorType

aten = torch.ops.aten


def index_put(nodes: Collector, call: Call) -> Rewritten:
    """`x[mask] = value`, with one value for all rows that the mask selects, is a choice for every element."""
    x, indices, values = call.args[:3]
    given = [(place, index) for place, index in enumerate(indices) if index is not None]
    if len(given) != 1 or nodes.type(given[0][1]).dtype not in (torch.bool, torch.uint8):
        return call
    (place, mask), target = given[0], nodes.type(x)
    kind, rest = nodes.type(mask), len(target.shape) - place - len(nodes.type(mask).shape)
    if len(nodes.type(values).shape) > rest or kind.dtype != torch.bool:
        return call  # values for every selected row
    if rest:
        wide = replace(kind, shape=kind.shape + (1,) * rest, hint=kind.hint + (1,) * rest)
        mask = _emit(nodes, call, "mask", aten.reshape.default, (mask, list(wide.shape)), wide)
    if len(call.args) > 3 and call.args[3]:
        values = _emit(nodes, call, "added", aten.add.Tensor, (x, values), target)
    return replace(call, target=aten.where.self, args=(mask, values, x), kwargs={})


def masked_scatter(nodes: Collector, call: Call) -> Rewritten:
    """A mask that was stretched over the last dims is taken as it was: then those dims can be split."""
    x, mask, source = call.args
    node = nodes.nodes[mask.node]
    if node.target is not aten.expand.default or nodes.type(x).shape != call.outputs[0].shape:
        return call
    narrow = nodes.type(node.inputs[0])
    return replace(call, args=(x, node.inputs[0], source)) if narrow.shape[-1:] == (1,) else call


def embedding_bag(nodes: Collector, call: Call) -> Rewritten:
    """The bags apart from the other results, which are bookkeeping and mostly unused."""
    defaults: list[Any] = [False, lookups.SUM_OF_BAG, False, None, False, None]
    scale, mode, sparse, weights, last, padding = [*call.args[3:], *defaults[len(call.args) - 3 :]]
    if sparse:
        return call
    if padding is None:
        padding = -1  # none
    elif padding < 0:
        padding += nodes.type(call.operand).shape[0]
    bags = _emit(nodes, call, "bags", lookups.bags, (*call.args[:3], scale, mode, weights, last, padding), call.outputs[0])
    args = (*call.args[:3], scale, mode, sparse, weights, last, padding)
    others = nodes.emit(replace(call, target=aten._embedding_bag.default, args=args))
    return (bags, *others[1:])


def _emit(nodes: Collector, call: Call, suffix: str, target: Any, args: tuple[Any, ...], kind: TensorType) -> Ref:
    out = nodes.intern(kind.shape, kind.hint, kind.dtype, False)
    name = f"{call.name}_{suffix}"
    made: Ref = nodes.emit(replace(call, name=name, target=target, args=args, kwargs={}, outputs=(out,), several=False))
    return made


INDEXING: dict[Any, Rewrite] = {
    aten.index_put.default: index_put,
    aten._unsafe_index_put.default: index_put,
    aten.masked_scatter.default: masked_scatter,
    aten.embedding_bag.default: embedding_bag,
    aten.embedding_bag.padding_idx: embedding_bag,
}
"""The rewrites of this file, by operator."""
