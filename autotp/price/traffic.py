"""Bytes and kernels of operators bound by memory, forward and backward, on one rank.

Eager, what an operator's kernels read and write is read off PyTorch's CUDA kernels and derivatives.yaml: backward reads the
gradients of the results and what autograd keeps, and writes a gradient for every operand that wants one; that of an operand
which was stretched over the result is reduced first. In a compiled chain (`autotp.price.fusion`) only what enters and leaves the
chain counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from autotp.price.fusion import SUMS, Access
from autotp.price.memory import saved
from autotp.price.storage import is_pointwise, is_view, name_of
from autotp.program import Node


@dataclass(frozen=True)
class Traffic:
    """`bytes` read and written in all, by `kernels` kernels."""

    bytes: float = 0.0
    kernels: float = 0.0

    def __add__(self, other: Traffic) -> Traffic:
        """Both, one after the other."""
        return Traffic(self.bytes + other.bytes, self.kernels + other.kernels)


NOTHING = Traffic()

LOOKUPS = frozenset(
    "aten.embedding aten.gather aten.index aten.index_select aten.take aten._unsafe_index autotp.losses.pick autotp.losses.weight_of_rows "
    "autotp.experts.dispatch".split()
)
"""Operators that read of their first operand (the table) only as much as they write; its gradient is as large as the table."""

WRITES_PART = frozenset(
    "aten.scatter aten.scatter_add aten.scatter_reduce aten.index_put aten._unsafe_index_put aten.index_add aten.index_copy "
    "aten.index_reduce aten.index_fill aten.masked_scatter aten.slice_scatter aten.select_scatter aten.diagonal_scatter".split()
)
"""Operators that copy their first operand and then write a part of the copy, unless they write in place (`autotp.in_place`)."""

PIECES = frozenset("aten.slice aten.select aten.narrow aten.diagonal aten.unfold".split())
"""Views of a part: their gradient is written into zeros."""

SPLITS = frozenset(
    "aten.split aten.split_with_sizes aten.chunk aten.tensor_split aten.unbind aten.unsafe_split aten.unsafe_split_with_sizes "
    "aten.unsafe_chunk".split()
)
"""Views in pieces: their gradients are concatenated."""

REPEATS = frozenset(("aten.expand", "aten.broadcast_to"))

SUMMED = frozenset(("aten.sum", "aten.cat", "aten.stack", "aten.concat", "aten.concatenate"))
"""Operators whose gradients are views."""

LINEAR = frozenset(("aten.mul", "aten.multiply", "aten.div"))
"""Operators whose gradient for an operand needs the others alone."""

NORMS = frozenset(
    "aten.layer_norm aten.rms_norm aten.group_norm aten.instance_norm aten.native_layer_norm aten._fused_rms_norm aten.batch_norm".split()
)
"""Operators whose parameters' gradients take a second pass over their operand."""

STEPS = {
    "aten.pow": 3, "aten.rsqrt": 3, "aten.sqrt": 2, "aten.sin": 2, "aten.cos": 3, "aten.abs": 2, "aten.clamp": 4,
    "aten.clamp_min": 2, "aten.clamp_max": 2, "aten.maximum": 3, "aten.minimum": 3, "aten.log1p": 2, "aten.expm1": 2,
    "aten.amax": 4, "aten.amin": 4, "aten.var": 3, "aten.std": 4, "aten.var_mean": 4, "aten.std_mean": 5, "aten.logsumexp": 4,
    "aten.cumsum": 3, "aten.prod": 4,
}  # fmt: skip
"""Pointwise kernels in the backward of operators that have no kernel of their own for it (derivatives.yaml), per operand."""

COMPOSED = {
    "autotp.losses.sum_exp": ((3, 5), (3, 6)),
    "autotp.losses.log_of_sum": ((6, 12), (6, 12)),
    "autotp.losses.kept_rows": ((10, 12), (2, 4)),
    "autotp.losses.rows_of_loss": ((13, 18), (5, 10)),
    "autotp.statistics.variance": ((3, 5), (2, 5)),
    "autotp.statistics.normalize": ((1, 2), (7, 12)),
}
"""Functions of autotp that are several kernels in eager: (kernels, passes over their first operand), forward and backward."""


def forward_traffic(node: Node, access: Access, operands: Sequence[int], outputs: Sequence[int]) -> Traffic:
    """What a node reads and writes in forward.

    Args:
        operands, outputs: local bytes.
    """
    name = name_of(node.target)
    packed = sum((Traffic(2.0 * size, 1) for size, copied in zip(operands, access.copies, strict=True) if copied), NOTHING)
    if is_view(node):
        return packed if access.kernel else NOTHING
    if name in COMPOSED and not access.fused:
        kernels, passes = COMPOSED[name][0]
        return Traffic(float(passes * operands[0]), kernels)
    read = [share * size for share, size in zip(access.reads, operands, strict=True)]
    written = sum(float(size) for size, reaches in zip(outputs, access.writes, strict=True) if reaches)
    if name in LOOKUPS:
        read[0] = min(read[0], float(sum(outputs)))
    extra = _mask_bytes(node, outputs)
    if name in WRITES_PART:
        extra += read[-1]
    return Traffic(sum(read) + written + extra, access.kernel * (2.0 if name in WRITES_PART and any(access.writes) else 1.0))


def backward_traffic(
    node: Node, access: Access, operands: Sequence[int], outputs: Sequence[int], wanting: Sequence[bool]
) -> Traffic:
    """What a node reads and writes in backward, where a result carries a gradient; `wanting`: the operands that want one."""
    total = NOTHING
    for size, wants, added in zip(operands, wanting, access.adds, strict=True):
        if wants and added:
            total += Traffic(float(size)) if access.fused else Traffic(3.0 * size, 1)
    if not any(wanting):
        return total
    if is_view(node):
        return total + (NOTHING if access.fused else _view_backward(node, operands, outputs))
    if access.fused:
        return total + _chain_backward(node, access, operands, outputs, wanting)
    return total + _eager_backward(node, access, operands, outputs, wanting)


def product_traffic(node: Node, access: Access, operands: Sequence[int], outputs: Sequence[int], wanting: Sequence[bool]) -> tuple[
    Traffic, Traffic
]:
    """What goes beside a matrix product or attention, forward and backward: copies of operands whose strides do not fit, the
    gradient of a bias, and the sum of gradients. (Adding the bias is part of the product's kernel.)"""
    forward = backward = NOTHING
    for place, (size, wants) in enumerate(zip(operands, wanting, strict=True)):
        if access.copies[place]:
            forward += Traffic(2.0 * size, 1)
        if wants and access.adds[place]:
            backward += Traffic(3.0 * size, 1)
    bias = {"aten.linear": 2, "aten.addmm": 0, "aten.baddbmm": 0}.get(name_of(node.target), -1)
    if 0 <= bias < len(operands) and wanting[bias]:
        backward += Traffic(float(outputs[0] + operands[bias]), 1)
    return forward, backward


def _view_backward(node: Node, operands: Sequence[int], outputs: Sequence[int]) -> Traffic:
    name = name_of(node.target)
    if name in SPLITS:
        return Traffic(2.0 * sum(outputs), 1)
    if name in PIECES:
        return Traffic(operands[0] + 2.0 * outputs[0], 2)
    if name in REPEATS:
        return Traffic(float(outputs[0] + operands[0]), 1)
    return NOTHING


def _eager_backward(
    node: Node, access: Access, operands: Sequence[int], outputs: Sequence[int], wanting: Sequence[bool]
) -> Traffic:
    name, gradients = name_of(node.target), float(sum(outputs))
    if name in COMPOSED:
        kernels, passes = COMPOSED[name][1]
        return Traffic(float(passes * operands[0]), kernels)
    if name in SUMMED:
        return NOTHING
    if name in LOOKUPS:  # zeros as large as the table, then rows read, added and written
        return Traffic(operands[0] + 3.0 * outputs[0], 2)
    if name.endswith("dropout"):
        return Traffic(gradients + operands[0] + _mask_bytes(node, outputs), 1)
    kept_operands, kept_outputs = saved(node)
    results = float(sum(outputs[place] for place in kept_outputs))
    if name in NORMS:
        kept = results + operands[0]
        total = Traffic(gradients + kept + operands[0], 1) if wanting[0] else NOTHING
        return total + (Traffic(gradients + kept, 1) if any(wanting[1:]) else NOTHING)
    total = NOTHING
    for place, wants in enumerate(wanting):
        if not wants:
            continue
        own, stretched = float(operands[place]), is_pointwise(node) and access.stretched[place]
        full = max(own, float(outputs[0])) if stretched else own
        if name in SUMS and not (name == "aten.sub" and place == 1):
            total += Traffic(full + own, 1) if stretched else NOTHING
            continue
        needed = sum(access.reads[k] * operands[k] for k in kept_operands if k != place or name not in LINEAR)
        steps = STEPS.get(name, 1)
        total += Traffic(gradients + results + needed + full + 2 * full * (steps - 1), steps)
        if stretched:
            total += Traffic(full + own, 1)
        if not is_pointwise(node) and name not in STEPS:
            others = [operands[k] for k in range(place + 1, len(wanting)) if wanting[k]]
            return total + Traffic(float(sum(others)))
    return total


def _chain_backward(
    node: Node, access: Access, operands: Sequence[int], outputs: Sequence[int], wanting: Sequence[bool]
) -> Traffic:
    read = sum(float(size) for size, reaches in zip(outputs, access.writes, strict=True) if reaches)
    read += sum(share * size for share, size in zip(access.rereads, operands, strict=True))
    total = Traffic(read + _mask_bytes(node, outputs), float(access.gradient_kernel))
    for size, wants, gives, stretched in zip(operands, wanting, access.gives, access.stretched, strict=True):
        if wants and gives:
            reduced = stretched and (is_pointwise(node) or name_of(node.target) in NORMS)
            total += Traffic(float(size + outputs[0]), 1) if reduced else Traffic(float(size))
    return total


def _mask_bytes(node: Node, outputs: Sequence[int]) -> float:
    """Dropout's mask: a byte for each element."""
    return outputs[0] / node.outputs[0].dtype.itemsize if node.op == "aten.dropout.default" else 0.0
