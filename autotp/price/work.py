"""What one node costs on one rank: time forward and backward at local shapes, and the bytes it keeps for backward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from autotp.layouts import Cut, Layout, SortedCut, Split, chunk, local_shape, local_size
from autotp.price.compute import attention_seconds, gemm_seconds, memory_seconds
from autotp.price.conversion import ConversionPrices
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


BACKWARD_ATTENTION = 2.5
"""Backward of flash attention does five matrix products where forward does two (Dao et al. 2022, algorithm 4)."""


def node_seconds(
    program: Program, node: Node, rule: Rule | None, strategy: Strategy, prices: ConversionPrices
) -> Seconds:
    """Time of one operator with one strategy at the traced sizes, on the rank that has most to do."""
    if rule is not None and rule.work == "none":
        return Seconds(0.0, 0.0)
    train = prices.train and any(output.requires_grad for output in node.outputs)
    types = [program.type_of(ref) for ref in node.inputs]
    wanting = [train and tensor.requires_grad for tensor in types]
    cluster = prices.cluster
    if rule is not None and rule.work == "grouped":
        return _grouped_seconds(node, types, strategy, wanting, prices)
    if rule is not None and rule.work == "convolution":
        return _convolution_seconds(node, types, rule, strategy, wanting, prices)
    if rule is not None and rule.work in ("gemm", "attention") and len(types) >= 2:
        sizes = _local_factors(rule, strategy, prices)
        dtype = str(node.outputs[0].dtype).removeprefix("torch.")
        if rule.work == "attention":
            q, k, v = (_product(sizes, rule, i) for i in range(3))
            inner, width = sizes.get("e", 1), sizes.get("f", 1)
            queries, keys = sizes.get("s", 1), sizes.get("t", 1)
            heads = max(1, q // max(queries * inner, 1))
            causal = bool(node.args[5] if len(node.args) > 5 else node.kwargs.get("is_causal", False))
            start = _local(rule.factors.get("s", 1), (), (), prices=prices) - queries  # the last queries see most keys
            forward = (
                attention_seconds(cluster, heads, queries, keys, inner, width, causal, dtype, start) if q and k and v else 0.0
            )
            return Seconds(forward, BACKWARD_ATTENTION * forward if any(wanting) else 0.0)
        first, second = (
            (1, 2) if len(rule.operands) == 3 and node.op in ("aten.addmm.default", "aten.baddbmm.default") else (0, 1)
        )
        a, b, out = rule.operands[first], rule.operands[second], rule.outputs[0]
        names = [factors_in(dims) for dims in (a, b, out)]
        batch = prod(sizes[name] for name in names[0] & names[1] & names[2])
        m = prod(sizes[name] for name in (names[0] & names[2]) - names[1])
        n = prod(sizes[name] for name in (names[1] & names[2]) - names[0])
        k = prod(sizes[name] for name in (names[0] & names[1]) - names[2])
        if not batch * m * n * k:
            return Seconds(0.0, 0.0)
        forward = gemm_seconds(cluster, m, n, k, dtype, batch)
        backward = gemm_seconds(cluster, m, k, n, dtype, batch) if wanting[first] else 0.0
        backward += gemm_seconds(cluster, k, n, m, dtype, batch) if wanting[second] else 0.0
        return Seconds(forward, backward)
    read = [prices.local_bytes(tensor, layout) for tensor, layout in zip(types, strategy.operands, strict=True)]
    if node.op == "aten.embedding.default":
        read[0] = 0  # only the rows looked up are read, as many bytes as are written
    written = sum(
        prices.local_bytes(tensor, layout) for tensor, layout in zip(node.outputs, strategy.outputs, strict=True)
    )
    forward = memory_seconds(cluster, sum(read) + written)
    gradients = sum(size for size, wants in zip(read, wanting, strict=True) if wants)
    return Seconds(forward, memory_seconds(cluster, sum(read) + written + gradients) if any(wanting) else 0.0)


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
    forward = gemm_seconds(prices.cluster, each, n, k, dtype, keys)
    backward = gemm_seconds(prices.cluster, each, k, n, dtype, keys) if wanting[0] else 0.0
    backward += gemm_seconds(prices.cluster, k, n, each, dtype, keys) if wanting[1] else 0.0
    return Seconds(forward, backward)


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

    def seconds(m: int, n: int, k: int) -> float:
        return gemm_seconds(prices.cluster, m, n, k, dtype, groups, traffic)

    backward = seconds(rows, depth, columns) if wanting[0] else 0.0
    backward += seconds(depth, columns, rows) if wanting[1] else 0.0
    return Seconds(seconds(rows, columns, depth), backward)


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
