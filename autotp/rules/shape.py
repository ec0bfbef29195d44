"""Views: operators that give the elements of a tensor other dims, or repeat them. All are linear."""

from __future__ import annotations

import math
from typing import Any

import torch

from autotp.program import Size
from autotp.rules.language import Call, Dim, Local, Rule, bind, exact_quotient
from autotp.rules.registry import rule, rule_for

aten = torch.ops.aten


def rearrange(call: Call, pattern: str, **options: Any) -> Rule:
    """A pattern whose operands are jointly linear and which moves no data."""
    together = tuple(range(len(call.operands)))
    return bind(pattern, call, **{"linear": (together,), "work": "none", **options})


def names(rank: int) -> list[str]:
    """d0 … d(rank−1)."""
    return [f"d{i}" for i in range(rank)]


# ---- views ----------------------------------------------------------------------------------------------------------


def common_factors(left: tuple[Size, ...], right: tuple[Size, ...]) -> tuple[list[Dim], list[Dim], dict[str, Size], set[str]]:
    """Write two shapes of equal size as products of common factors, outermost first.

    Returns what each dim of either side is made of, the factors' sizes, and the factors that must stay whole because the two
    shapes cut across each other there. (6, 4) → (3, 8) gives (f0 f1)(f2) and (f0)(f1 f2); of (5, 4, 9) → (5, 6, 6) the 5 alone is
    common, and 4, 9, 6, 6 stay whole.
    """
    sides: tuple[list[list[str]], list[list[str]]] = ([[] for _ in left], [[] for _ in right])
    sizes: dict[str, Size] = {}
    whole: set[str] = set()

    def name(size: Size, *places: tuple[int, int]) -> None:
        """One factor for the dims at these places, (side, dim) each; a place of its own is whole."""
        if size != 1:
            factor = f"f{len(sizes)}"
            sizes[factor] = size
            whole.update([factor] if len(places) == 1 else [])
            for side, dim in places:
                sides[side][dim].append(factor)

    a, b = [*reversed([*enumerate(left)])], [*reversed([*enumerate(right)])]  # what is left of either shape, next dim last
    while a and b:
        (i, p), (j, q) = a.pop(), b.pop()
        if p == q:
            name(p, (0, i), (1, j))
        elif p == 1:
            b.append((j, q))
        elif q == 1:
            a.append((i, p))
        elif (quotient := exact_quotient(p, q)) is not None:
            name(q, (0, i), (1, j))
            a.append((i, quotient))
        elif (quotient := exact_quotient(q, p)) is not None:
            name(p, (0, i), (1, j))
            b.append((j, quotient))
        else:
            across, opposite = _until_they_meet([(i, p), *reversed(a)], [(j, q), *reversed(b)])
            for side, dims in enumerate((across, opposite)):
                for dim, size in dims:
                    name(size, (side, dim))
            del a[len(a) + 1 - len(across) :], b[len(b) + 1 - len(opposite) :]
    return [tuple(dim) for dim in sides[0]], [tuple(dim) for dim in sides[1]], sizes, whole


Place = tuple[int, Size]
"""A dim, and its size or what is left of it."""


def _until_they_meet(left: list[Place], right: list[Place]) -> tuple[list[Place], list[Place]]:
    """The shortest starts of two shapes that hold equally many elements; where no products are known to be equal, all but
    their equal ends."""
    sizes = [[size for _, size in side] for side in (left, right)]
    for i in range(1, len(left) + 1):
        for j in range(1, len(right) + 1):
            if math.prod(sizes[0][:i]) == math.prod(sizes[1][:j]):
                return left[:i], right[:j]
    tail = 0
    while tail < min(len(left), len(right)) - 1 and sizes[0][-1 - tail] == sizes[1][-1 - tail]:
        tail += 1
    return left[: len(left) - tail], right[: len(right) - tail]


def _resize(target: Any, position: int) -> Any:
    """A local call that passes the output's local shape at argument `position`."""

    def local_call(local: Local) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
        return target, (*local.args[:position], local.output_shape()), {}

    return local_call


@rule_for("aten.reshape.default aten.flatten.using_ints aten.unflatten.int")
def reshape(call: Call) -> Rule:
    """Merged and split dims become products of common factors."""
    left, right, sizes, whole = common_factors(call.tensors[0].shape, call.outputs[0].shape)
    return Rule(
        factors=sizes,
        operands=(tuple(left),),
        outputs=(tuple(right),),
        whole=frozenset(whole),
        linear=((0,),),
        work="none",
        local=_resize(aten.reshape.default, 1),
    )


@rule_for("aten.expand.default aten.broadcast_to.default")
def expand(call: Call) -> Rule:
    """New and stretched dims are factors that the operand lacks."""
    shape, out = call.tensors[0].hint, call.outputs[0].hint
    right = names(len(out))
    extra = len(out) - len(shape)
    left = [right[i + extra] if shape[i] == out[i + extra] else "1" for i in range(len(shape))]
    return bind(
        " ".join(left) + " -> " + " ".join(right),
        call,
        linear=((0,),),
        work="none",
        local=_resize(aten.expand.default, 1),
    )


@rule_for("aten.transpose.int aten.t.default aten.permute.default aten.numpy_T.default aten.movedim.int")
def permute(call: Call) -> Rule:
    """A permutation of dims."""
    rank = len(call.outputs[0].shape)
    order = list(range(rank))
    if call.op == "aten.permute.default":
        order = [dim % rank for dim in call.args[1]]
    elif call.op == "aten.transpose.int" and rank > 1:
        a, b = call.args[1] % rank, call.args[2] % rank
        order[a], order[b] = order[b], order[a]
    elif call.op == "aten.movedim.int" and rank > 1:
        order.insert(call.args[2] % rank, order.pop(call.args[1] % rank))
    else:
        order.reverse()
    dims = names(rank)
    return rearrange(call, " ".join(dims) + " -> " + " ".join(dims[i] for i in order))


rule("aten.view_as_complex.default", "... c^ -> ...", linear=((0,),), work="none")
rule("aten.view_as_real.default", "... -> ... c^", linear=((0,),), work="none")


@rule_for("aten.unsqueeze.default")
def unsqueeze(call: Call) -> Rule:
    """A new dim of size 1."""
    rank = len(call.outputs[0].shape)
    right = names(rank)
    dim = call.args[1] % rank
    return rearrange(call, " ".join(right[:dim] + right[dim + 1 :]) + " -> " + " ".join([*right[:dim], "1", *right[dim + 1 :]]))


@rule_for("aten.squeeze.dim aten.squeeze.dims aten.squeeze.default")
def squeeze(call: Call) -> Rule:
    """Dims of size 1 leave."""
    shape, rank = call.tensors[0].shape, len(call.tensors[0].shape)
    dims = call.argument(1, "dim")
    chosen = range(rank) if dims is None else [d % max(rank, 1) for d in (dims if isinstance(dims, (list, tuple)) else [dims])]
    gone = {i for i in chosen if i < rank and call.tensors[0].hint[i] == 1}
    left = [f"d{i}^" if i in gone and shape[i] != 1 else f"d{i}" for i in range(rank)]  # a size that only turns out to be 1

    def local_call(local: Local) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
        # a split dim may have a local size of 1: name the dims that leave
        return aten.squeeze.dims, (local.args[0], sorted(gone)), {}

    return rearrange(call, " ".join(left) + " -> " + " ".join(d for i, d in enumerate(left) if i not in gone), local=local_call)


@rule_for("aten.repeat.default")
def repeat(call: Call) -> Rule | None:
    """Tiling: a tiled dim is (copy, element), copy outermost."""
    shape, out = call.tensors[0].shape, call.outputs[0].shape
    counts = list(call.args[1])
    extra = len(out) - len(shape)
    right = []
    for i, count in enumerate(counts):
        if i < extra:
            right.append(f"n{i}^")
        elif count == 1:
            right.append(f"d{i}")
        else:
            right.append(f"(n{i}^ d{i})" if shape[i - extra] != 1 else f"n{i}^")
    if 0 in counts:
        return None
    left = ["1" if shape[i - extra] == 1 else f"d{i}" for i in range(extra, len(out))]
    right = ["1" if out[i] == 1 else name for i, name in enumerate(right)]
    return rearrange(call, " ".join(left) + " -> " + " ".join(right), work="memory")


@rule_for("aten.repeat_interleave.self_int")
def repeat_interleave(call: Call) -> Rule:
    """A repeated dim is (element, copy), element outermost; without a dim, all dims are merged first."""
    dim = call.argument(2, "dim")
    rank = len(call.tensors[0].shape)
    copies = call.argument(1, "repeats")
    left = names(rank)
    if dim is None or rank == 0:
        right = [" ".join(["(", *left, "n^", ")"])]
    else:
        right = [f"({d} n^)" if i == dim % rank else d for i, d in enumerate(left)]

    def local_call(local: Local) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
        return local.target, (local.args[0], copies, dim), {}

    known = {"n": copies} if isinstance(copies, int) else {}
    return rearrange(call, " ".join(left) + " -> " + " ".join(right), work="memory", sizes=known, local=local_call)
