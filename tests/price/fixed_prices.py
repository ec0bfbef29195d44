"""A device on which seconds are bytes, or kernels, and programs of plain functions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from autotp.planning import Request, prepare, traced_sizes
from autotp.price.cluster import Cluster, load_cluster
from autotp.price.conversion import ConversionPrices
from autotp.price.work import Seconds, node_seconds
from autotp.program import Program
from autotp.trace import trace


def counting(what: str) -> Cluster:
    """A cluster on which a kernel bound by memory takes one second per byte ("bytes"), or one second ("kernels")."""
    cluster = load_cluster("dgx-h100")
    bandwidth, launch = (1.0, 0.0) if what == "bytes" else (1e30, 1.0)
    device = replace(
        cluster.accelerator, bandwidth=bandwidth, bandwidth_efficiency=1.0, launch_seconds=launch, host_launch_seconds=launch
    )
    return replace(cluster, accelerator=device)


class Function(nn.Module):
    """A function of parameters, which want gradients, and then of inputs, which do not."""

    def __init__(self, function: Callable[..., Tensor], parameters: tuple[Tensor, ...]) -> None:
        super().__init__()
        self.function = function
        self.values = nn.ParameterList(parameters)

    def forward(self, *inputs: Tensor) -> Tensor:
        """What the function gives."""
        return self.function(*self.values, *inputs)


def program_of(function: Callable[..., Tensor], *parameters: Tensor, inputs: tuple[Tensor, ...] = ()) -> Program:
    """The traced function."""
    return trace(Function(function, parameters), inputs, dynamic=False)


def spent(program: Program, what: str = "bytes", *, compiled: bool = False, train: bool = True) -> dict[str, Seconds]:
    """Operator (without namespace and overload) → bytes or kernels of all its nodes, forward and backward, on one device."""
    request = Request({"tp": 2}, "train" if train else "inference", compiled=compiled)
    space, _ = prepare(program, request)
    prices = ConversionPrices(counting(what), (2,), train, traced_sizes(program), compiled=compiled)
    found: dict[str, Seconds] = {}
    for node in program.nodes:
        if node.kind == "op":
            owner = space.folding.representative[node.index]
            seconds = node_seconds(program, node, space.rules[owner], space.strategies[owner][0], prices)
            name: Any = node.op.split(".")[1 if node.op.startswith("aten.") else -1]
            before = found.get(name, Seconds(0.0, 0.0))
            found[name] = Seconds(before.forward + seconds.forward, before.backward + seconds.backward)
    return found
