"""What autograd keeps for backward, operator by operator, and what a parameter costs in training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from autotp.program import Node

SAVES_NOTHING = frozenset(
    "add sub neg mean sum expand reshape view transpose permute t unsqueeze squeeze slice select split split_with_sizes chunk cat "
    "stack to type_as clone contiguous alias detach unbind pad flatten unflatten repeat roll flip".split()
)
PRODUCTS = frozenset("mul mm bmm matmul linear addmm baddbmm conv1d conv2d conv3d convolution".split())
"""What the gradient of one operand needs is the other one."""
SAVES_OUTPUT = frozenset("exp tanh sigmoid rsqrt sqrt softmax log_softmax relu reciprocal".split())


def saved(node: Node) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(operands, outputs) that a node keeps for its backward, by position."""
    return saved_by(node.op, len(node.inputs))


def saved_for(node: Node, wanting: Sequence[bool]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The same where only some operands want a gradient (`wanting`, by position): the only factor that wants one is not kept."""
    operands, outputs = saved(node)
    if node.op.split(".")[1:2] and node.op.split(".")[1] in PRODUCTS:
        operands = tuple(place for place in operands if any(wanting[other] for other in operands if other != place))
    return operands, outputs


def saved_by(op: str, count: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The same for an operator, as rules spell it, with `count` operands; read off torch's derivatives.yaml."""
    name = op.split(".")[1] if op.startswith("aten.") else op
    operands = tuple(range(count))
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


@dataclass(frozen=True)
class Optimizer:
    """What an optimizer of `torch.optim` needs beside parameters and gradients.

    Attributes:
        moments: tensors of the parameter's shape and dtype that it keeps for each.
        temporaries: most tensors of a parameter's size that its step holds at once; it goes parameter by parameter, as
            `torch.optim` does with DTensors.
        master: whether parameters below 32 bits have a float32 copy, and float32 moments (Micikevicius et al. 2018).
        factored: whether matrices have a moment for each row and column in place of each element (Shazeer & Stern 2018).
    """

    moments: int
    temporaries: int
    master: bool = False
    factored: bool = False

    def state_bytes(self, shape: Sequence[int], itemsize: int) -> int:
        """Bytes that it keeps for a parameter of this local shape and bytes per element."""
        low, elements = self.master and itemsize < 4, prod(shape)
        each = prod(shape[:-1]) + prod((*shape[:-2], shape[-1])) if self.factored and len(shape) > 1 else self.moments * elements
        return each * (4 if low else itemsize) + (4 * elements if low else 0)

    def temporary_bytes(self, shape: Sequence[int], itemsize: int) -> int:
        """Most bytes that its step holds for a while, for a parameter of this local shape and bytes per element."""
        return self.temporaries * prod(shape) * (4 if self.master and itemsize < 4 else itemsize)


OPTIMIZERS = {
    "adamw": Optimizer(2, 2),
    "adamw-master": Optimizer(2, 2, master=True),
    "adafactor": Optimizer(1, 1, factored=True),
    "momentum": Optimizer(1, 0),
    "sgd": Optimizer(0, 0),
}
"""Optimizers by name: `adamw` is Adam too (Kingma & Ba 2015; two moments, and the root of one of them twice in the step)."""


def update_bytes(elements: int, itemsize: int, optimizer: Optimizer = OPTIMIZERS["adamw"]) -> int:
    """Bytes that one fused step reads and writes: gradient, parameter, and twice the optimizer's state."""
    return elements * itemsize * 3 + 2 * optimizer.state_bytes((elements,), itemsize)
