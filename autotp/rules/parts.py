"""Stretches of a dim: slices, splits, concatenations, padding. All but padding with a number are linear."""

from __future__ import annotations

import math
from typing import Any

import torch

from autotp.layouts import Cut, Segment, Segments, SortedCut, Split
from autotp.program import Size
from autotp.rules.empty import unless_empty
from autotp.rules.language import Call, Dim, Local, LocalSize, Part, Rule, bind
from autotp.rules.registry import rule_for
from autotp.rules.shape import rearrange

aten = torch.ops.aten


# ---- slices ---------------------------------------------------------------------------------------------------------


@rule_for("aten.slice.Tensor aten.narrow.default")
def slice_(call: Call) -> Rule:
    """A stretch of a dim is a part of its factor: q, k and v cut out of a fused projection stay split.

    Every other element, too, is a factor (element, step). What has no common granule, as a shift by one, leaves the dim whole:
    the cuts at its borders would stand beside those of every dim that the tensor came from.
    """
    rank = len(call.tensors[0].shape)
    dim = call.argument(1, "dim", 0) % rank
    whole, kept = call.tensors[0].shape[dim], call.outputs[0].shape[dim]
    start, step = call.argument(2, "start", 0) or 0, call.argument(4, "step", 1)
    if not all(isinstance(size, int) for size in (whole, kept, start)):
        return rearrange(call, _changed(call, {dim}))
    start = max(start + whole, 0) if start < 0 else min(start, whole)
    if step > 1 and whole == kept * step and start < step:
        return _every_other(call, dim, start, step)
    if step > 1 or kept < 2 or math.gcd(start, kept, whole) == 1:
        return rearrange(call, _changed(call, {dim}))

    def local_call(local: Local) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
        split = local.operand_split(0, dim)
        before: Any = start
        if split is not None:
            before = LocalSize(Split(dim, split.axes, _first(split.cut, start)))
        return aten.narrow.default, (local.args[0], dim, before, local.output_shape()[dim]), {}

    base, factors = _others(call.outputs[0].shape, dim)
    return Rule(
        factors={"c": whole, **factors},
        operands=(tuple(("c",) if i == dim else base[i] for i in range(rank)),),
        outputs=(tuple(Part("c", start, start + kept) if i == dim else base[i] for i in range(rank)),),
        linear=((0,),),
        work="none",
        local=local_call,
    )


def _every_other(call: Call, dim: int, start: int, step: int) -> Rule:
    """Every `step`-th element of a dim, from `start`."""

    def local_call(local: Local) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
        return aten.slice.Tensor, (local.args[0], dim, start, None, step), {}

    left = [f"(d{i} n^)" if i == dim else f"d{i}" for i in range(len(call.tensors[0].shape))]
    right = " ".join(f"d{i}" for i in range(len(left)))
    return rearrange(call, f"{' '.join(left)} -> {right}", sizes={"n": step}, local=local_call)


def _first(cut: Cut, length: int) -> Segments:
    """The runs of a cut that make up the first `length` elements of its dim. Sizes are plain ints."""
    found = []
    assert not isinstance(cut, SortedCut)
    for repeat, count, granule in cut:
        run = int(count) * int(granule)
        runs = min(int(repeat), length // run) if run else 0
        length -= runs * run
        found.append(Segment(runs, count, granule))
    return tuple(segment for segment in found if segment.repeat)


def _others(shape: tuple[Size, ...], dim: int) -> tuple[list[Dim], dict[str, Size]]:
    """What the dims other than `dim` are made of, and the sizes of their factors."""
    base: list[Dim] = [() if size == 1 else (f"d{i}",) for i, size in enumerate(shape)]
    return base, {f"d{i}": size for i, size in enumerate(shape) if i != dim and size != 1}


@rule_for("aten.roll.default aten.flip.default aten.rot90.default aten.unfold.default")
def along_dims(call: Call) -> Rule:
    """Whatever a roll, flip, rotation or unfold changes stays whole; the other dims are free."""
    rank = len(call.tensors[0].shape)
    if call.op == "aten.unfold.default":
        touched = {call.args[1] % max(rank, 1), rank}
    else:
        place, default = (1, []) if call.op == "aten.flip.default" else (2, [] if call.op == "aten.roll.default" else [0, 1])
        touched = {dim % max(rank, 1) for dim in call.argument(place, "dims", default)} or set(range(rank))
    return rearrange(call, _changed(call, touched), work="memory")


@rule_for("aten.pad.default aten.constant_pad_nd.default")
def pad(call: Call) -> Rule:
    """Padded dims stay whole; filling with a number other than zero is not linear."""
    rank, amounts = len(call.tensors[0].shape), call.args[1]
    mode = call.argument(2, "mode", "constant") if call.op == "aten.pad.default" else "constant"
    touched = {rank - 1 - i // 2 for i, amount in enumerate(amounts) if amount != 0}
    if mode != "constant":
        return rearrange(call, _changed(call, touched), work="memory", local=unless_empty)
    value = call.argument(3 if call.op == "aten.pad.default" else 2, "value") or 0
    return bind(_changed(call, touched), call, linear=() if value else ((0,),))


def _changed(call: Call, touched: set[int]) -> str:
    """A pattern in which the dims `touched` stay whole and may change their size."""
    left = " ".join(f"a{i}^" if i in touched else f"d{i}" for i in range(len(call.tensors[0].shape)))
    right = " ".join(f"b{i}^" if i in touched else f"d{i}" for i in range(len(call.outputs[0].shape)))
    return f"{left} -> {right}"


@rule_for("aten.select.int")
def select(call: Call) -> Rule:
    """The selected dim leaves and stays whole."""
    rank = len(call.tensors[0].shape)
    dim = call.args[1] % rank
    left = [f"a{i}^" if i == dim else f"d{i}" for i in range(rank)]
    return rearrange(call, " ".join(left) + " -> " + " ".join(f"d{i}" for i in range(rank) if i != dim))


@rule_for("aten.unbind.int")
def unbind(call: Call) -> Rule:
    """The unbound dim leaves and stays whole."""
    rank = len(call.tensors[0].shape)
    dim = call.argument(1, "dim", 0) % rank
    left = " ".join(f"a{i}^" if i == dim else f"d{i}" for i in range(rank))
    right = " ".join(f"d{i}" for i in range(rank) if i != dim)
    return rearrange(call, f"{left} -> " + ", ".join([right] * len(call.outputs)))


def _parts(sizes: list[Size]) -> list[Part]:
    parts, start = [], 0
    for size in sizes:
        parts.append(Part("c", start, start + size))
        start = start + size
    return parts


# ---- splits and concatenations --------------------------------------------------------------------------------------


@rule_for("""
    aten.split.Tensor aten.split.sizes aten.split_with_sizes.default aten.chunk.default aten.tensor_split.sections
    aten.tensor_split.indices aten.unsafe_split.Tensor aten.unsafe_split_with_sizes.default aten.unsafe_chunk.default
""")
def split(call: Call) -> Rule:
    """The split dim is one factor, each output a part of it: q, k and v of a fused projection."""
    shape = call.tensors[0].shape
    rank = len(shape)
    dim = call.argument(2, "dim", 0) % rank
    sizes = [output.shape[dim] for output in call.outputs]
    base, factors = _others(shape, dim)
    left: list[Dim] = [("c",) if i == dim else base[i] for i in range(rank)]

    def local_call(local: Local) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
        pieces = [local.output_shape(index)[dim] for index in range(len(sizes))]
        return aten.split_with_sizes.default, (local.args[0], pieces, dim), {}

    return Rule(
        factors={"c": shape[dim], **factors},
        operands=(tuple(left),),
        outputs=tuple(tuple(part if i == dim else base[i] for i in range(rank)) for part in _parts(sizes)),
        whole=frozenset(["c"] if any(size in (0, 1) for size in sizes) else []),
        linear=((0,),),
        work="none",
        local=local_call,
    )


@rule_for("aten.cat.default aten.concat.default aten.concatenate.default")
def cat(call: Call) -> Rule | None:
    """The joined dim is one factor, each operand a part of it."""
    tensors = call.tensors
    rank = len(call.outputs[0].shape)
    dim = call.argument(1, "dim", 0) % rank
    if any(len(tensor.shape) != rank for tensor in tensors):
        return None  # torch lets an empty 1-D tensor join anything
    sizes = [tensor.shape[dim] for tensor in tensors]
    base, factors = _others(call.outputs[0].shape, dim)
    operands: list[tuple[Dim, ...]] = [()] * len(tensors)
    for part, position in zip(_parts(sizes), call.positions, strict=True):
        assert position is not None
        operands[position] = tuple(part if i == dim else base[i] for i in range(rank))
    return Rule(
        factors={"c": call.outputs[0].shape[dim], **factors},
        operands=tuple(operands),
        outputs=(tuple(("c",) if i == dim else base[i] for i in range(rank)),),
        whole=frozenset(["c"] if any(size in (0, 1) for size in sizes) else []),
        linear=(tuple(range(len(tensors))),),
    )


@rule_for("aten.stack.default")
def stack(call: Call) -> Rule:
    """The new dim stays whole."""
    rank = len(call.outputs[0].shape)
    dim = call.argument(1, "dim", 0) % rank
    right = [f"n{i}^" if i == dim else f"d{i}" for i in range(rank)]
    left = " ".join(f"d{i}" for i in range(rank) if i != dim)
    return rearrange(call, ", ".join([left] * len(call.operands)) + " -> " + " ".join(right), work="memory")


@rule_for("aten.block_diag.default")
def block_diag(call: Call) -> Rule | None:
    """Matrices along the diagonal of one: each gives a part of the rows and of the columns."""
    shapes = [tensor.shape for tensor in call.tensors]
    if any(len(shape) != 2 or shape[0] in (0, 1) or shape[1] in (0, 1) for shape in shapes):
        return None
    rows, columns = (_parts([shape[side] for shape in shapes]) for side in (0, 1))
    operands: list[tuple[Dim, ...]] = [()] * len(shapes)
    for row, column, position in zip(rows, columns, call.positions, strict=True):
        assert position is not None
        operands[position] = (row._replace(name="rows"), column._replace(name="columns"))
    out = call.outputs[0].shape
    return Rule(
        factors={"rows": out[0], "columns": out[1]},
        operands=tuple(operands),
        outputs=((("rows",), ("columns",)),),
        linear=(tuple(range(len(shapes))),),
    )
