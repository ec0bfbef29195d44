"""Reductions. Only sums may be split on a reduced dim; their output is then partial."""

from __future__ import annotations

from typing import Any

import torch

from autotp.rules.language import Call, Local, Rule, bind
from autotp.rules.registry import rule_for

REDUCE_ALL = ("aten.sum.default", "aten.mean.default")
POSITION_OF_DIM = {"aten.linalg_vector_norm.default": 2}


def reduced_dims(call: Call) -> list[int]:
    """The dims that the call reduces: its `dim` argument, all dims if that is empty or missing."""
    rank = len(call.tensors[0].shape)
    dims = call.argument(POSITION_OF_DIM.get(call.op, 1), "dim")
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
    aten.amax.default aten.amin.default aten.max.dim aten.min.dim aten.argmax.default aten.argmin.default aten.var.dim
    aten.var.correction aten.std.dim aten.std.correction aten.logsumexp.default aten.any.dim aten.all.dim aten.prod.dim_int
    aten.linalg_vector_norm.default
""")
def whole(call: Call) -> Rule:
    """Other reductions: the reduced dims are never split."""
    return bind(reduction_pattern(call, reduced_dims(call), "^"), call)


@rule_for("aten.cumsum.default aten.cumprod.default aten.sort.default aten.topk.default aten.logcumsumexp.default")
def along(call: Call) -> Rule:
    """Operators along one dim, which is never split (and changes its size in topk)."""
    rank = len(call.tensors[0].shape)
    place = {"aten.topk.default": 2}.get(call.op, 1)
    dim = call.argument(place, "dim", -1) % max(rank, 1)
    left = " ".join(f"a{i}^" if i == dim else f"d{i}" for i in range(rank))
    right = " ".join(f"b{i}^" if i == dim else f"d{i}" for i in range(rank))
    outputs = ", ".join([right] * len(call.outputs))
    return bind(f"{left} -> {outputs}", call, linear=((0,),) if call.op == "aten.cumsum.default" else ())
