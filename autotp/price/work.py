"""What one node costs on one rank: time forward and backward at local shapes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from autotp.layouts import Cut, Layout, SortedCut, Split, chunk, local_shape, local_size
from autotp.price.compute import attention_seconds, gemm_seconds, memory_seconds
from autotp.price.conversion import ConversionPrices
from autotp.price.memory import update_bytes
from autotp.price.traffic import Traffic, backward_traffic, forward_traffic, product_traffic
from autotp.program import Node, Program, Size, TensorType
from autotp.rules import Rule
from autotp.rules.language import factors_in
from autotp.strategies import Strategy


@dataclass(frozen=True)
class Seconds:
    """Time of a node on one rank."""

    forward: float
    backward: float

    @property
    def total(self) -> float:
        """Forward plus backward."""
        return self.forward + self.backward


UPDATE_KERNELS = 8
"""Kernels of an AdamW step for a parameter: decay, first moment, second moment (2), root, correction, epsilon, update. The parameters
are DTensors, for which `torch.optim` goes parameter by parameter unless told otherwise (`torch/optim/adamw.py`, single tensor)."""


def node_seconds(
    program: Program, node: Node, rule: Rule | None, strategy: Strategy, prices: ConversionPrices
) -> Seconds:
    """Time of one operator with one strategy at the traced sizes, on the rank that has most to do.

    Matrix products and attention are priced by `autotp.price.compute`; everything else by the bytes that its kernels read and write
    (`autotp.price.traffic`), eager or compiled as `prices.compiled` says.
    """
    train = prices.train and any(output.requires_grad for output in node.outputs)
    types = [program.type_of(ref) for ref in node.inputs]
    wanting = [train and tensor.requires_grad for tensor in types]
    access = prices.accesses(program)[node.index]
    operands = [prices.local_bytes(tensor, layout) for tensor, layout in zip(types, strategy.operands, strict=True)]
    outputs = [prices.local_bytes(tensor, layout) for tensor, layout in zip(node.outputs, strategy.outputs, strict=True)]
    product = _product_seconds(node, types, rule, strategy, wanting, prices) if rule is not None and len(types) >= 2 else None
    if product is not None:
        beside = product_traffic(node, access, operands, outputs, wanting)
        return Seconds(product.forward + _seconds(prices, beside[0]), product.backward + _seconds(prices, beside[1]))
    forward = forward_traffic(node, access, operands, outputs)
    backward = backward_traffic(node, access, operands, outputs, wanting)
    return Seconds(_seconds(prices, forward), _seconds(prices, backward))


def update_seconds(prices: ConversionPrices, tensor: TensorType, layout: Layout) -> float:
    """Time of the optimizer's step for one parameter of this layout, on the rank that holds most of it.

    The bytes are those of one fused pass; the launches, in eager, those of `UPDATE_KERNELS` kernels for each parameter.
    """
    elements = prices.local_bytes(tensor, layout) // tensor.dtype.itemsize
    moved = update_bytes(elements, tensor.dtype.itemsize, prices.optimizer)
    return _seconds(prices, Traffic(moved, 1 if prices.compiled else UPDATE_KERNELS))


def _seconds(prices: ConversionPrices, traffic: Traffic) -> float:
    return memory_seconds(prices.cluster, traffic.bytes, traffic.kernels, eager=not prices.compiled)


def _product_seconds(
    node: Node, types: Sequence[TensorType], rule: Rule, strategy: Strategy, wanting: Sequence[bool], prices: ConversionPrices
) -> Seconds | None:
    """Matrix products in all forms; None for whatever multiplies no matrices."""
    if rule.work == "grouped":
        return _grouped_seconds(node, types, strategy, wanting, prices)
    if rule.work == "convolution":
        return _convolution_seconds(node, types, rule, strategy, wanting, prices)
    if rule.work not in ("gemm", "attention"):
        return None
    cluster = prices.cluster
    sizes = _local_factors(rule, strategy, prices)
    dtype = str(node.outputs[0].dtype).removeprefix("torch.")
    if rule.work == "attention":
        q, k, v = (_product(sizes, rule, i) for i in range(3))
        inner, width = sizes.get("e", 1), sizes.get("f", 1)
        queries, keys = sizes.get("s", 1), sizes.get("t", 1)
        heads, shared = max(1, q // max(queries * inner, 1)), max(1, k // max(keys * inner, 1))
        causal = bool(node.args[5] if len(node.args) > 5 else node.kwargs.get("is_causal", False))
        start = _local(rule.factors.get("s", 1), (), (), prices=prices) - queries  # the last queries see most keys
        if not (q and k and v):
            return Seconds(0.0, 0.0)

        def attention(backward: bool) -> float:
            shape = (heads, queries, keys, inner, width, causal, dtype, start)
            return attention_seconds(cluster, *shape, kv_batch_heads=shared, backward=backward, eager=not prices.compiled)

        return Seconds(attention(False), attention(True) if any(wanting) else 0.0)
    added = len(rule.operands) == 3 and node.op in ("aten.addmm.default", "aten.baddbmm.default")
    first, second = (1, 2) if added else (0, 1)
    a, b, out = rule.operands[first], rule.operands[second], rule.outputs[0]
    names = [factors_in(dims) for dims in (a, b, out)]
    batch = prod(sizes[name] for name in names[0] & names[1] & names[2])
    m = prod(sizes[name] for name in (names[0] & names[2]) - names[1])
    n = prod(sizes[name] for name in (names[1] & names[2]) - names[0])
    k = prod(sizes[name] for name in (names[0] & names[1]) - names[2])
    if not batch * m * n * k:
        return Seconds(0.0, 0.0)
    return _three_products(prices, m, n, k, dtype, batch, (wanting[first], wanting[second]))


def _three_products(
    prices: ConversionPrices,
    m: int,
    n: int,
    k: int,
    dtype: str,
    batch: int,
    wanting: tuple[bool, bool],
    traffic: float | None = None,
) -> Seconds:
    """A product (m, k) @ (k, n), and in backward one more for each operand that wants a gradient."""

    def seconds(m: int, n: int, k: int) -> float:
        return gemm_seconds(prices.cluster, m, n, k, dtype, batch, traffic, eager=not prices.compiled)

    backward = (seconds(m, k, n) if wanting[0] else 0.0) + (seconds(k, n, m) if wanting[1] else 0.0)
    return Seconds(seconds(m, n, k), backward)


def _grouped_seconds(
    node: Node, types: Sequence[TensorType], strategy: Strategy, wanting: Sequence[bool], prices: ConversionPrices
) -> Seconds:
    """A product for each key, of as many rows for every key."""
    first = (0,) * len(prices.mesh)
    shapes = [local_shape(types[i].hint, prices.hint(strategy.operands[i]), prices.mesh, first) for i in range(2)]
    (rows, k), (keys, _, n) = shapes
    if not rows * k * keys * n:
        return Seconds(0.0, 0.0)
    dtype = str(node.outputs[0].dtype).removeprefix("torch.")
    each = -(-rows // keys)
    return _three_products(prices, each, n, k, dtype, keys, (wanting[0], wanting[1]))


def _convolution_seconds(
    node: Node, types: Sequence[TensorType], rule: Rule, strategy: Strategy, wanting: Sequence[bool], prices: ConversionPrices
) -> Seconds:
    """A product over input channels and places of the kernel, for each output place (input place, if transposed) and group.

    Every place of the input is read once from memory, not once for every place of the kernel.
    """
    sizes = _local_factors(rule, strategy, prices)
    x, weight, out = (
        {name for dim in dims for name in dim if isinstance(name, str)} for dims in (*rule.operands[:2], rule.outputs[0])
    )

    def size(names: set[str]) -> int:
        return prod(sizes[name] for name in names)

    groups = size(x & weight & out)
    rows = size((x & out) - weight) * min(size(x - weight - out), size(out - x - weight))
    columns, depth = size((weight & out) - x), size((x & weight) - out) * size(weight - x - out)
    if not groups * rows * columns * depth:
        return Seconds(0.0, 0.0)
    tensors = zip((*types[:2], node.outputs[0]), (*strategy.operands[:2], strategy.outputs[0]), strict=True)
    traffic = float(sum(prices.local_bytes(tensor, layout) for tensor, layout in tensors))
    dtype = str(node.outputs[0].dtype).removeprefix("torch.")
    return _three_products(prices, rows, columns, depth, dtype, groups, (wanting[0], wanting[1]), traffic)


def _local_factors(rule: Rule, strategy: Strategy, prices: ConversionPrices) -> dict[str, int]:
    """Every factor's size on the first rank."""
    split = {name: (axes, cut) for name, axes, cut in strategy.factors}
    return {name: _local(size, *split.get(name, ((), ())), prices=prices) for name, size in rule.factors.items()}


def _local(size: Size, axes: tuple[int, ...], cut: Cut, *, prices: ConversionPrices) -> int:
    def value(expression: Size) -> int:
        return expression if isinstance(expression, int) else int(expression.subs(prices.symbols))

    if not axes:
        return value(size)
    if isinstance(cut, SortedCut):
        split = prices.hint(Layout(("I",) * len(prices.mesh), (Split(0, axes, cut),))).splits[0]
        return local_size(split, prices.mesh, (0,) * len(prices.mesh))
    total = 0
    for repeat, count, granule in cut:
        low, high = 0, value(count)
        for axis in axes:
            _, high = chunk(high - low, prices.mesh[axis], 0)
        total += value(repeat) * high * value(granule)
    return total


def _product(sizes: dict[str, int], rule: Rule, operand: int) -> int:
    return prod(sizes[name] for dim in rule.operands[operand] for name in dim if isinstance(name, str))
