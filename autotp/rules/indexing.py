"""Lookups: embedding, gather, index."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from autotp import _torch
from autotp.rules.language import Call, Local, LocalStart, Rule, bind
from autotp.rules.registry import rule_for


def masked_embedding(weight: Tensor, ids: Tensor, start: int, rows: int, padding_idx: int = -1) -> Tensor:
    """The rows of `weight`, which holds ids [start, start + len(weight)) of a table of `rows` rows; zeros for other ids.

    Raises:
        RuntimeError: an id is not in the table (on a GPU when the device is next synchronised).
    """
    _torch.assert_all((ids >= 0) & (ids < rows), "an id of the embedding is out of bounds")
    here = (ids >= start) & (ids < start + weight.shape[0])
    if weight.shape[0] == 0:
        return weight.new_zeros((*ids.shape, weight.shape[1])) + weight.sum()
    padding = padding_idx - start if start <= padding_idx < start + weight.shape[0] else None
    found = functional.embedding((ids - start).where(here, 0), weight, padding)
    return found * here.unsqueeze(-1)


def _local_embedding(local: Local) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    split = local.operand_split(0, 0)
    if split is None:
        return local.target, local.args, local.kwargs
    rows = local.call.tensors[0].shape[0]
    return masked_embedding, (*local.args[:2], LocalStart(split), rows, local.call.argument(2, "padding_idx", -1)), {}


@rule_for("aten.embedding.default")
def embedding(call: Call) -> Rule | None:
    """Split by the table's rows, every rank looks up the ids that it holds and the results are summed.

    Gradients scaled by the ids' frequency need all ids; sparse ones are not split.
    """
    if call.argument(4, "sparse"):
        return None
    if call.argument(3, "scale_grad_by_freq"):
        ids = " ".join(f"n{i}^" for i in range(len(call.tensors[1].shape)))
        return bind(f"v^ e, {ids} -> {ids} e", call, linear=((0,),))
    return bind("v! e, ... -> ... e", call, linear=((0,),), local=_local_embedding)


@rule_for("aten.gather.default")
def gather(call: Call) -> Rule | None:
    """Along one dim, which stays whole; the other dims agree where their sizes do."""
    source, index = call.tensors[0].shape, call.tensors[1].shape
    rank = len(source)
    if len(index) != rank:
        return None  # torch lets a scalar stand for one element
    dim = call.args[1] % max(rank, 1)
    free = [i != dim and source[i] == index[i] for i in range(rank)]
    left = " ".join(f"d{i}" if free[i] else f"a{i}^" for i in range(rank))
    right = " ".join(f"d{i}" if free[i] else f"b{i}^" for i in range(rank))
    return bind(f"{left}, {right} -> {right}", call, linear=((0,),))


@rule_for("aten.index.Tensor")
def index(call: Call) -> Rule | None:
    """x[i, :, j]: indexed dims stay whole; the others, and the dims of the indices, which broadcast together, are free.

    The indices' dims stand where the indexed dims were if those are neighbours, else first.
    """
    indices = call.operands[1:]
    places = [place for place, index in enumerate(indices) if index is not None]
    if any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices):
        return None
    source = [f"a{i}^" if i in places else f"d{i}" for i in range(len(call.tensors[0].shape))]
    free = [name for i, name in enumerate(source) if i not in places]
    wide = [f"n{i}" for i in reversed(range(max(len(index.shape) for index in indices if index is not None)))]
    start = places[0] if places[-1] - places[0] < len(places) else 0
    terms = [" ".join(wide[len(wide) - len(index.shape) :]) if index is not None else "" for index in indices]
    return bind(f"{', '.join([' '.join(source), *terms])} -> {' '.join([*free[:start], *wide, *free[start:]])}", call, linear=((0,),))


@rule_for("aten.index_select.default")
def index_select(call: Call) -> Rule:
    """The indexed dim of the source stays whole; the index's dim is free."""
    rank = len(call.tensors[0].shape)
    dim = call.args[1] % max(rank, 1)
    left = " ".join(f"a{i}^" if i == dim else f"d{i}" for i in range(rank))
    right = " ".join("n" if i == dim else f"d{i}" for i in range(rank))
    return bind(f"{left}, n -> {right}", call, linear=((0,),))


@rule_for("aten.tril.default aten.triu.default")
def triangle(call: Call) -> Rule:
    """The last two dims stay whole, the batch dims are free."""
    return bind("... i^ j^ -> ... i^ j^", call, linear=((0,),))
