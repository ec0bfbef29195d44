"""Reductions. Only sums may be split on a reduced dim; their output is then partial."""

from __future__ import annotations

from typing import Any

import torch

from autotp.rules.empty import unless_empty
from autotp.rules.language import Call, Local, Rule, bind
from autotp.rules.registry import rule, rule_for

REDUCE_ALL = ("aten.sum.default", "aten.mean.default")
POSITION_OF_DIM = {"aten.linalg_vector_norm.default": 2, "aten.kthvalue.default": 2}

LAST_DIM = ("aten.kthvalue.default", "aten.mode.default")
"""Operators that reduce the last dim unless told otherwise."""


def reduced_dims(call: Call) -> list[int]:
    """The dims that the call reduces: its `dim` argument, all dims if that is empty or missing."""
    rank = len(call.tensors[0].shape)
    dims = call.argument(POSITION_OF_DIM.get(call.op, 1), "dim", -1 if call.op in LAST_DIM else None)
    if dims is None or dims == [] or call.op in REDUCE_ALL:
        return list(range(rank))
    return [dim % max(rank, 1) for dim in (dims if isinstance(dims, (list, tuple)) else [dims])]


def reduction_pattern(call: Call, dims: list[int], mark: str = "") -> str:
    """`d0 d1 -> d0` and the like, with `mark` after each reduced factor."""
    rank, kept = len(call.tensors[0].shape), len(call.outputs[0].shape)
    left = [f"d{i}{mark}" if i in dims else f"d{i}" for i in range(rank)]
    right = ["1" if i in dims else f"d{i}" for i in range(rank) if kept == rank or i not in dims]
    return " ".join(left) + " -> " + ", ".join([" ".join(right)] * len(call.outputs))


@rule_for("aten.sum.dim_IntList aten.sum.default")
def sum_(call: Call) -> Rule:
    """A sum over a split dim is partial."""
    return bind(reduction_pattern(call, reduced_dims(call)), call, linear=((0,),))


@rule_for("aten.nansum.default aten.count_nonzero.default aten.count_nonzero.dim_IntList")
def counted(call: Call) -> Rule:
    """Sums of something that is not linear."""
    return bind(reduction_pattern(call, reduced_dims(call)), call)


def _local_mean(local: Local) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """Where a reduced dim is split: the local sum over the global count."""
    dims = reduced_dims(local.call)
    if not any(local.operand_split(0, dim) for dim in dims):
        return local.target, local.args, local.kwargs
    count: Any = 1
    for dim in dims:
        count = count * local.call.tensors[0].shape[dim]
    keepdim = len(local.call.outputs[0].shape) == len(local.call.tensors[0].shape)
    return mean_of_piece, (local.args[0], dims, keepdim, count, local.call.outputs[0].dtype), {}


def mean_of_piece(x: torch.Tensor, dims: list[int], keepdim: bool, count: int, dtype: torch.dtype) -> torch.Tensor:
    """This rank's share of a mean over `count` elements in all: a summand of it. Summed, as by PyTorch, in at least float32."""
    wide = torch.float32 if dtype.itemsize < 4 else dtype
    return (torch.sum(x, dims, keepdim=keepdim, dtype=wide) / count).to(dtype)


@rule_for("aten.mean.dim aten.mean.default")
def mean(call: Call) -> Rule:
    """A mean over a split dim is the partial sum over the global count."""
    return bind(reduction_pattern(call, reduced_dims(call), "!"), call, linear=((0,),), local=_local_mean)


@rule_for("""
    aten.amin.default aten.max.dim aten.min.dim aten.aminmax.default
    aten.argmax.default aten.argmin.default aten.var.dim aten.var.correction aten.std.dim aten.std.correction
    aten.var_mean.correction aten.std_mean.correction aten.logsumexp.default aten.any.dim aten.any.dims aten.all.dim
    aten.all.dims aten.prod.dim_int aten.linalg_vector_norm.default aten.median.dim aten.nanmedian.dim aten.mode.default
    aten.kthvalue.default
""")
def whole(call: Call) -> Rule:
    """Other reductions: the reduced dims are never split."""
    return bind(reduction_pattern(call, reduced_dims(call), "^"), call)


@rule_for("""
    aten.cumsum.default aten.cumprod.default aten.cummax.default aten.cummin.default aten.logcumsumexp.default
    aten.sort.default aten.sort.stable aten.argsort.default aten.argsort.stable aten.topk.default
""")
def along(call: Call) -> Rule:
    """Operators along one dim, which is never split (and changes its size in topk)."""
    place = {"aten.topk.default": 2}.get(call.op, 1)
    dims = {call.argument(place, "dim", -1) % max(len(call.tensors[0].shape), 1)}
    return bind(_unsplit(call, dims), call, linear=((0,),) if call.op == "aten.cumsum.default" else ())


def maximum_of_piece(x: torch.Tensor, dims: list[int], keepdim: bool) -> torch.Tensor:
    """A candidate of the maximum over `dims`: that of this rank's piece, or the least number of the dtype for an empty one."""
    if all(x.shape[dim] for dim in dims):
        return torch.amax(x, dims, keepdim=keepdim)
    least = -torch.inf if x.dtype.is_floating_point else False if x.dtype == torch.bool else torch.iinfo(x.dtype).min
    shape = [1 if place in dims else size for place, size in enumerate(x.shape) if keepdim or place not in dims]
    return x.new_full(shape, least)


def _local_maximum(local: Local) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    dims = reduced_dims(local.call)
    if not any(local.operand_split(0, dim) for dim in dims):
        return local.target, local.args, local.kwargs
    keepdim = len(local.call.outputs[0].shape) == len(local.call.tensors[0].shape)
    return maximum_of_piece, (local.args[0], dims, keepdim), {}


@rule_for("aten.amax.default")
def maximum(call: Call) -> Rule:
    """Without gradient, and of numbers, the maximum of a piece is a candidate of the maximum."""
    numbers = call.outputs[0].dtype != torch.bool
    pattern = reduction_pattern(call, reduced_dims(call), "" if numbers else "^")
    return bind(pattern, call, reduction="M", local=_local_maximum)


@rule_for("aten._fft_r2c.default aten._fft_c2c.default aten._fft_c2r.default")
def fourier(call: Call) -> Rule:
    """Transformed dims stay whole (and change their size)."""
    return bind(_unsplit(call, {dim % len(call.tensors[0].shape) for dim in call.args[1]}), call, linear=((0,),), local=unless_empty)


def _unsplit(call: Call, dims: set[int]) -> str:
    """A pattern in which `dims` stay whole and may change their size, and the others are free."""
    rank = range(len(call.tensors[0].shape))
    left = " ".join(f"a{i}^" if i in dims else f"d{i}" for i in rank)
    right = " ".join(f"b{i}^" if i in dims else f"d{i}" for i in rank)
    return f"{left} -> {', '.join([right] * len(call.outputs))}"


@rule_for("aten.stft.default aten.stft.center")
def short_time_fourier(call: Call) -> Rule:
    """The rows of a batch are free."""
    batch = "n" if len(call.tensors[0].shape) == 2 else ""
    rest = " ".join(f"o{i}^" for i in range(len(call.outputs[0].shape) - len(batch)))
    return bind(f"{batch} t^, w^ -> {batch} {rest}", call, linear=((0,),), local=unless_empty)


@rule_for("aten.renorm.default")
def renorm(call: Call) -> Rule:
    """Slices along one dim, each with its own norm."""
    dim, rank = call.args[2] % len(call.tensors[0].shape), range(len(call.tensors[0].shape))
    dims = " ".join(f"d{i}" if i == dim else f"d{i}^" for i in rank)
    return bind(f"{dims} -> {dims}", call)


rule("aten._cdist_forward.default", "... m d^, ... n d^ -> ... m n")
rule("aten._euclidean_dist.default", "... m d^, ... n d^ -> ... m n")


@rule_for("aten.linalg_cross.default")
def cross(call: Call) -> Rule:
    """Vectors along one dim, which stays whole; linear in each factor."""
    rank = len(call.outputs[0].shape)
    dim = call.kwargs.get("dim", -1) % rank
    dims = ["v^" if i == dim else f"d{i}" for i in range(rank)]
    left = ", ".join(" ".join(dims[rank - len(operand.shape) :]) for operand in call.tensors)
    return bind(f"{left} -> {' '.join(dims)}", call, linear=((0,), (1,)))
