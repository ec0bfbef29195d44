"""Lookups: embedding, gather, index. A table that is split is looked up in masked form, and the results are summed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from autotp import _torch, lookups
from autotp.rules.language import Call, Local, LocalStart, Rule, bind
from autotp.rules.registry import rule, rule_for

aten = torch.ops.aten

LocalResult = tuple[Any, tuple[Any, ...], dict[str, Any]]


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
    return found.where(here.unsqueeze(-1), 0)


def _local_embedding(local: Local) -> LocalResult:
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


def _local_bags(local: Local) -> LocalResult:
    split = local.operand_split(0, 0)
    if split is None:
        return local.target, local.args, local.kwargs
    weight, ids, offsets, _, _, weights, last, _ = local.args
    return lookups.sums_of_held_rows, (weight, ids, offsets, weights, last, LocalStart(split), local.call.tensors[0].shape[0]), {}


@rule_for("autotp.lookups.bags")
def bags(call: Call) -> Rule:
    """The features are free; of sums, a rank may hold a part of the rows. Which ids belong to a bag needs all of them."""
    scale, mode, *_, padding = call.args[3:8]
    mark = "!" if mode == lookups.SUM_OF_BAG and not scale and padding == -1 else "^"
    weighed = ", i^" if len(call.operands) > 3 else ""
    linear = () if mode == lookups.MAXIMUM_OF_BAG else ((0,),)
    return bind(f"v{mark} e, i^, o^{weighed} -> b^ e", call, linear=linear, local=_local_bags)


def _whole(name: str, rank: int) -> str:
    return " ".join(f"{name}{i}^" for i in range(rank))


# ---- gather, index --------------------------------------------------------------------------------------------------


def masked_lookup(source: Tensor, dim: int, index: Tensor, start: int, rows: int, along: bool) -> Tensor:
    """`gather` (along a dim) or `x[..., index]` of a dim of `rows` elements, zeros for elements that are not here.

    Args:
        source: holds the elements [start, start + source.shape[dim]) of that dim.
        index: of any shape, for `gather` of the source's rank; elements may be counted from the end, but not by `gather`.
        along: whether this is `gather`.

    Raises:
        RuntimeError: an index is out of bounds (on a GPU when the device is next synchronised).
    """
    _torch.assert_all((index >= (0 if along else -rows)) & (index < rows), "an index is out of bounds")
    size, index = source.shape[dim], index.where(index >= 0, index + rows) - start
    here = (index >= 0) & (index < size)
    shape = (*source.shape[:dim], *index.shape, *source.shape[dim + 1 :])
    if size == 0:
        return source.new_zeros(index.shape if along else shape) + source.sum()
    if along:
        return source.gather(dim, index.where(here, 0)).where(here, 0)
    found = source.index_select(dim, index.where(here, 0).flatten()).reshape(shape)
    return found.where(here.reshape(here.shape + (1,) * (source.dim() - dim - 1)), 0)


def _local_lookup(dim: int, position: int, along: bool) -> Any:
    """The `local` function of a lookup along `dim`, whose index is the operand at `position`."""

    def local_call(local: Local) -> LocalResult:
        split = local.operand_split(0, dim)
        if split is None:
            return local.target, local.args, local.kwargs
        index = local.args[position][dim] if local.call.op == "aten.index.Tensor" else local.args[position]
        return masked_lookup, (local.args[0], dim, index, LocalStart(split), local.call.tensors[0].shape[dim], along), {}

    return local_call


@rule_for("aten.gather.default")
def gather(call: Call) -> Rule | None:
    """Along one dim, of which a rank may hold a part; the other dims agree where their sizes do."""
    source, index = call.tensors[0].shape, call.tensors[1].shape
    rank = len(source)
    if len(index) != rank or not rank:
        return None  # torch lets a scalar stand for one element
    dim = call.args[1] % rank
    free = [i != dim and source[i] == index[i] for i in range(rank)]
    left = " ".join(f"d{i}" if free[i] else "a!" if i == dim else f"a{i}^" for i in range(rank))
    right = " ".join(f"d{i}" if free[i] else "n" if i == dim else f"b{i}^" for i in range(rank))
    return bind(f"{left}, {right} -> {right}", call, linear=((0,),), local=_local_lookup(dim, 2, True))


@rule_for("aten.index.Tensor")
def index(call: Call) -> Rule | None:
    """x[i, :, j]: of several indexed dims each stays whole, of a single one a rank may hold a part.

    The others, and the dims of the indices, which broadcast together, are free. The indices' dims stand where the indexed
    dims were if those are neighbours, else first.
    """
    indices = call.operands[1:]
    places = [place for place, index in enumerate(indices) if index is not None]
    if any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in indices):
        return None
    mark = "!" if len(places) == 1 else "^"
    source = [f"a{i}{mark}" if i in places else f"d{i}" for i in range(len(call.tensors[0].shape))]
    free = [name for i, name in enumerate(source) if i not in places]
    terms, wide = index_terms(call)
    start = places[0] if places[-1] - places[0] < len(places) else 0
    return bind(
        f"{', '.join([' '.join(source), *terms])} -> {' '.join([*free[:start], *wide, *free[start:]])}",
        call,
        linear=((0,),),
        local=_local_lookup(places[0], 1, False) if len(places) == 1 else None,
    )


def index_terms(call: Call, mark: str = "") -> tuple[list[str], list[str]]:
    """The pattern of every index of `x[i, :, j]`, which follow operand 0, and the dims that they broadcast to."""
    indices = call.operands[1 : 1 + len(call.args[1])]
    ranks = [len(index.shape) for index in indices if index is not None]
    wide = [f"n{i}{mark}" for i in reversed(range(max(ranks)))]
    return [" ".join(wide[len(wide) - len(index.shape) :]) if index is not None else "" for index in indices], wide


@rule_for("aten.index_select.default")
def index_select(call: Call) -> Rule:
    """Of the indexed dim a rank may hold a part; the index's dim is free."""
    rank = len(call.tensors[0].shape)
    dim = call.args[1] % max(rank, 1)
    left = " ".join("a!" if i == dim else f"d{i}" for i in range(rank))
    right = " ".join("n" if i == dim else f"d{i}" for i in range(rank))
    return bind(f"{left}, {'n' if rank else '...'} -> {right}", call, linear=((0,),), local=_local_lookup(dim, 2, False))


@rule_for("aten.take.default")
def take(call: Call) -> Rule:
    """Of the flattened tensor, which stays whole."""
    return bind(f"{_whole('a', len(call.tensors[0].shape))}, ... -> ...", call, linear=((0,),))


@rule_for("aten.tril.default aten.triu.default")
def triangle(call: Call) -> Rule:
    """The last two dims stay whole, the batch dims are free."""
    return bind("... i^ j^ -> ... i^ j^", call, linear=((0,),))


# ---- diagonals ------------------------------------------------------------------------------------------------------


@rule_for("aten.diagonal.default aten.diagonal_copy.default aten.diag_embed.default aten.diagonal_scatter.default")
def diagonal(call: Call) -> Rule:
    """The two dims of a diagonal, and its elements, stay whole; the others are free."""
    embeds, scatters = "embed" in call.op, "scatter" in call.op
    matrix = call.outputs[0] if embeds else call.tensors[0]
    offset = 1 if scatters else 0
    first, second = (-2, -1) if embeds else (0, 1)
    dims = [call.argument(place + offset, f"dim{place - 1}", default) for place, default in ((2, first), (3, second))]
    touched = {dim % len(matrix.shape) for dim in dims}
    full = " ".join(f"a{i}^" if i in touched else f"d{i}" for i in range(len(matrix.shape)))
    line = " ".join([*(f"d{i}" for i in range(len(matrix.shape)) if i not in touched), "e^"])
    if scatters:
        return bind(f"{full}, {line} -> {full}", call, linear=((0, 1),))
    return bind(f"{line} -> {full}" if embeds else f"{full} -> {line}", call, linear=((0,),))


# ---- searches -------------------------------------------------------------------------------------------------------

rule("aten.bucketize.Tensor", "..., b -> ...")


@rule_for("aten.one_hot.default")
def one_hot(call: Call) -> Rule | None:
    """Without a number of classes, that depends on the largest value anywhere."""
    return bind("... -> ... c^", call) if call.argument(1, "num_classes", -1) > 0 else None


@rule_for("aten.searchsorted.Tensor")
def searchsorted(call: Call) -> Rule:
    """One sorted sequence for all values, or one for every row of them; a row's values are free.

    A place is a count of smaller elements, so those of a piece are summands of it, unless the order is given apart.
    """
    sequence = call.tensors[0].shape
    rows = " ".join(f"d{i}" for i in range(len(sequence) - 1))
    values = "..." if len(sequence) == 1 else f"{rows} n"
    mark = "" if call.operands[2] is None else "^"
    return bind(f"{rows} s{mark}, {values}, {rows} s{mark} -> {values}", call)


@rule_for("aten.isin.Tensor_Tensor")
def isin(call: Call) -> Rule:
    """Every value is looked for among all the others."""
    return bind(f"..., {_whole('t', len(call.tensors[1].shape))} -> ...", call)


rule("aten.isin.Tensor_Scalar", "... -> ...")


@rule_for("aten.histc.default")
def histogram(call: Call) -> Rule:
    """Counts of a piece are summands of the counts, unless the bins depend on the least and greatest value."""
    low, high = call.argument(2, "min", 0), call.argument(3, "max", 0)
    mark = "" if low != high else "^"
    return bind(" ".join(f"d{i}{mark}" for i in range(len(call.tensors[0].shape))) + " -> b^", call)
