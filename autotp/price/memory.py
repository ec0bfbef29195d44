"""What autograd keeps for backward, operator by operator, and what a parameter costs in training."""

from __future__ import annotations

from autotp.program import Node

SAVES_NOTHING = frozenset(
    "add sub neg mean sum expand reshape view transpose permute t unsqueeze squeeze slice select split split_with_sizes chunk cat "
    "stack to type_as clone contiguous alias detach unbind pad flatten unflatten repeat roll flip".split()
)
SAVES_OUTPUT = frozenset("exp tanh sigmoid rsqrt sqrt softmax log_softmax relu reciprocal".split())


def saved(node: Node) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(operands, outputs) that the operator keeps for its backward, by position; read off torch's derivatives.yaml."""
    name = node.op.split(".")[1] if node.op.startswith("aten.") else node.op
    operands = tuple(range(len(node.inputs)))
    if name in ("autotp.experts.dispatch", "autotp.experts.combine"):
        return (1,), ()
    if name in SAVES_NOTHING:
        return (), ()
    if name in SAVES_OUTPUT:
        return (), (0,)
    if name in ("addmm", "baddbmm"):
        return (1, 2), ()
    if name.startswith(("upsample_", "_upsample_", "pixel_")):
        return (), ()
    if name == "linear" or name.startswith("conv"):
        return (0, 1), ()
    if name in ("mul", "div") and len(operands) < 2:
        return (), ()
    if name == "embedding":
        return (1,), ()
    if name == "scaled_dot_product_attention":
        return operands, (0,)
    if name in ("where", "masked_fill"):
        return (0,) if name == "where" else (1,) if len(operands) > 1 else (), ()
    if name == "dropout":
        return (), (0,)  # the mask, of the output's shape
    return operands, ()


OPTIMIZER_STATE_BYTES = 8
"""Adam's two moments in float32, per parameter element (Kingma & Ba 2015)."""

MASTER_BYTES = 4
"""A float32 master copy, per element of a parameter in a 16-bit dtype (Micikevicius et al. 2018)."""


def optimizer_bytes(elements: int, itemsize: int) -> int:
    """Bytes that Adam keeps for `elements` parameters of `itemsize` bytes: two moments, and a master copy below 32 bits."""
    return elements * (OPTIMIZER_STATE_BYTES + (MASTER_BYTES if itemsize < 4 else 0))


def update_bytes(elements: int, itemsize: int) -> int:
    """Bytes that one fused Adam step reads and writes: gradient, parameter, moments and master copy."""
    return elements * itemsize * 3 + 2 * optimizer_bytes(elements, itemsize)
