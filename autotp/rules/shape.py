"""Operators that only rearrange: views, splits, concatenations. All are linear."""

from __future__ import annotations

from typing import Any

import torch

from autotp.program import Size
from autotp.rules.language import Call, Dim, Local, Part, Rule, bind, exact_quotient
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

    Returns what each dim of either side is made of, the factors' sizes, and the factors that must stay whole because
    the two shapes cut across each other there. (6, 4) → (3, 8) gives (f0 f1)(f2) and (f0)(f1 f2).
    """
    sides: tuple[list[list[str]], list[list[str]]] = ([[] for _ in left], [[] for _ in right])
    sizes: dict[str, Size] = {}
    whole: set[str] = set()
    i = j = 0
    rest_left: Size | None = None
    rest_right: Size | None = None

    def share(size: Size) -> None:
        if size != 1:
            name = f"f{len(sizes)}"
            sizes[name] = size
            sides[0][i].append(name)
            sides[1][j].append(name)

    while i < len(left) and j < len(right):
        a = left[i] if rest_left is None else rest_left
        b = right[j] if rest_right is None else rest_right
        if a == b:
            share(a)
            i, j, rest_left, rest_right = i + 1, j + 1, None, None
        elif a == 1:
            i, rest_left = i + 1, None
        elif b == 1:
            j, rest_right = j + 1, None
        elif (quotient := exact_quotient(a, b)) is not None:
            share(b)
            rest_left, j, rest_right = quotient, j + 1, None
        elif (quotient := exact_quotient(b, a)) is not None:
            share(a)
            rest_right, i, rest_left = quotient, i + 1, None
        else:
            return _opaque(left, right)
    return [tuple(dim) for dim in sides[0]], [tuple(dim) for dim in sides[1]], sizes, whole


def _opaque(left: tuple[Size, ...], right: tuple[Size, ...]) -> tuple[list[Dim], list[Dim], dict[str, Size], set[str]]:
    """Shapes that cut across each other: equal leading and trailing dims are shared, the rest stays whole."""
    head = 0
    while head < min(len(left), len(right)) and left[head] == right[head]:
        head += 1
    tail = 0
    while tail < min(len(left), len(right)) - head and left[-1 - tail] == right[-1 - tail]:
        tail += 1
    sizes: dict[str, Size] = {}
    whole: set[str] = set()

    def dims(shape: tuple[Size, ...], side: str) -> list[Dim]:
        found: list[Dim] = []
        for place, size in enumerate(shape):
            from_end = len(shape) - place
            if size == 1:
                found.append(())
                continue
            shared = place < head or from_end <= tail
            name = (f"h{place}" if place < head else f"t{from_end}") if shared else f"{side}{place}"
            sizes[name] = size
            if not shared:
                whole.add(name)
            found.append((name,))
        return found

    return dims(left, "l"), dims(right, "r"), sizes, whole


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
    shape, out = call.tensors[0].shape, call.outputs[0].shape
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
    left = names(rank)
    gone = {i for i in chosen if i < rank and shape[i] == 1}

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
def repeat_interleave(call: Call) -> Rule | None:
    """A repeated dim is (element, copy), element outermost."""
    dim = call.argument(2, "dim")
    rank = len(call.tensors[0].shape)
    if dim is None or rank == 0:
        return None
    dim %= rank
    left = names(rank)
    right = [f"({d} n^)" if i == dim else d for i, d in enumerate(left)]

    def local_call(local: Local) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
        return local.target, (local.args[0], local.call.argument(1, "repeats"), dim), {}

    return rearrange(call, " ".join(left) + " -> " + " ".join(right), work="memory", local=local_call)


# ---- stretches of a dim ---------------------------------------------------------------------------------------------


@rule_for("aten.slice.Tensor aten.roll.default aten.flip.default aten.unfold.default")
def along_dims(call: Call) -> Rule:
    """Whatever a slice, roll, flip or unfold changes stays whole; the other dims are free."""
    rank = len(call.tensors[0].shape)
    if call.op == "aten.slice.Tensor":
        touched = {call.argument(1, "dim", 0) % rank}
    elif call.op == "aten.unfold.default":
        touched = {call.args[1] % max(rank, 1), rank}
    else:
        dims = call.argument(2 if call.op == "aten.roll.default" else 1, "dims", [])
        touched = {dim % max(rank, 1) for dim in dims} or set(range(rank))
    return rearrange(call, _changed(call, touched), work="none" if call.op == "aten.slice.Tensor" else "memory")


@rule_for("aten.pad.default aten.constant_pad_nd.default")
def pad(call: Call) -> Rule:
    """Padded dims stay whole; filling with a number other than zero is not linear. Other modes refuse an empty dim but the batch."""
    rank, amounts = len(call.tensors[0].shape), call.args[1]
    mode = call.argument(2, "mode", "constant") if call.op == "aten.pad.default" else "constant"
    if mode != "constant":
        return rearrange(call, _changed(call, set(range(rank > len(amounts) // 2 + 1, rank))), work="memory")
    value = call.argument(3 if call.op == "aten.pad.default" else 2, "value") or 0
    touched = {rank - 1 - i // 2 for i, amount in enumerate(amounts) if amount != 0}
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


@rule_for("aten.split.Tensor aten.split_with_sizes.default aten.chunk.default aten.tensor_split.sections")
def split(call: Call) -> Rule:
    """The split dim is one factor, each output a part of it: q, k and v of a fused projection."""
    shape = call.tensors[0].shape
    rank = len(shape)
    dim = call.argument(2, "dim", 0) % rank
    sizes = [output.shape[dim] for output in call.outputs]
    base = [() if size == 1 else (f"d{i}",) for i, size in enumerate(shape)]
    left: list[Dim] = [("c",) if i == dim else base[i] for i in range(rank)]
    factors = {f"d{i}": size for i, size in enumerate(shape) if i != dim and size != 1}

    def local_call(local: Local) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
        pieces = [local.output_shape(index)[dim] for index in range(len(sizes))]
        return aten.split_with_sizes.default, (local.args[0], pieces, dim), {}

    return Rule(
        factors={"c": shape[dim], **factors},
        operands=(tuple(left),),
        outputs=tuple(tuple(part if i == dim else base[i] for i in range(rank)) for part in _parts(sizes)),
        whole=frozenset(["c"] if any(size == 1 for size in sizes) else []),
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
    base = [() if size == 1 else (f"d{i}",) for i, size in enumerate(call.outputs[0].shape)]
    operands: list[tuple[Dim, ...]] = [()] * len(tensors)
    for part, position in zip(_parts(sizes), call.positions, strict=True):
        assert position is not None
        operands[position] = tuple(part if i == dim else base[i] for i in range(rank))
    factors = {f"d{i}": size for i, size in enumerate(call.outputs[0].shape) if i != dim and size != 1}
    return Rule(
        factors={"c": call.outputs[0].shape[dim], **factors},
        operands=tuple(operands),
        outputs=(tuple(("c",) if i == dim else base[i] for i in range(rank)),),
        whole=frozenset(["c"] if any(size == 1 for size in sizes) else []),
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
