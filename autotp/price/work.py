"""What one node costs on one rank: time forward and backward at local shapes, and the bytes it keeps for backward."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from autotp.layouts import Cut, chunk
from autotp.price.compute import attention_seconds, gemm_seconds, memory_seconds
from autotp.price.conversion import ConversionPrices
from autotp.program import Node, Program, Size
from autotp.rules import Rule
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
    if rule is not None and rule.work in ("gemm", "attention") and len(types) >= 2:
        sizes = _local_factors(rule, strategy, prices)
        dtype = str(node.outputs[0].dtype).removeprefix("torch.")
        if rule.work == "attention":
            q, k, v = (_product(sizes, rule, i) for i in range(3))
            inner, width = sizes.get("e", 1), sizes.get("f", 1)
            queries, keys = sizes.get("s", 1), sizes.get("t", 1)
            heads = max(1, q // max(queries * inner, 1))
            causal = len(node.args) > 5 and bool(node.args[5])
            forward = (
                attention_seconds(cluster, heads, queries, keys, inner, width, causal, dtype) if q and k and v else 0.0
            )
            return Seconds(forward, BACKWARD_ATTENTION * forward if any(wanting) else 0.0)
        first, second = (
            (1, 2) if len(rule.operands) == 3 and node.op in ("aten.addmm.default", "aten.baddbmm.default") else (0, 1)
        )
        a, b, out = rule.operands[first], rule.operands[second], rule.outputs[0]
        names = [{name for dim in dims for name in (dim if not hasattr(dim, "start") else [])} for dims in (a, b, out)]
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


def _local_factors(rule: Rule, strategy: Strategy, prices: ConversionPrices) -> dict[str, int]:
    """Every factor's size on the first rank."""
    split = {name: (axes, cut) for name, axes, cut in strategy.factors}
    return {name: _local(size, *split.get(name, ((), ())), prices=prices) for name, size in rule.factors.items()}


def _local(size: Size, axes: tuple[int, ...], cut: Cut, *, prices: ConversionPrices) -> int:
    def value(expression: Size) -> int:
        return expression if isinstance(expression, int) else int(expression.subs(prices.symbols))

    if not axes:
        return value(size)
    total = 0
    for repeat, count, granule in cut:
        low, high = 0, value(count)
        for axis in axes:
            _, high = chunk(high - low, prices.mesh[axis], 0)
        total += value(repeat) * high * value(granule)
    return total


def _product(sizes: dict[str, int], rule: Rule, operand: int) -> int:
    return prod(sizes[name] for dim in rule.operands[operand] for name in dim if isinstance(name, str))
