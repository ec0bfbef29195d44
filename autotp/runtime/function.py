"""The sharded graph as one plain function: the same operators in the same order, called as cheaply as Python can."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from types import MethodType, SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule
from torch.nn import functional

aten = torch.ops.aten

BINDINGS: dict[Any, Callable[..., Any]] = {
    aten.add.Tensor: torch.add,
    aten.cat.default: torch.cat,
    aten.div.Tensor: torch.div,
    aten.embedding.default: torch.embedding,
    aten.gelu.default: functional.gelu,
    aten.layer_norm.default: torch.layer_norm,
    aten.linear.default: functional.linear,
    aten.matmul.default: torch.matmul,
    aten.mul.Tensor: torch.mul,
    aten.neg.default: torch.neg,
    aten.permute.default: torch.permute,
    aten.pow.Tensor_Scalar: torch.pow,
    aten.reshape.default: torch.reshape,
    aten.rsqrt.default: torch.rsqrt,
    aten.scaled_dot_product_attention.default: functional.scaled_dot_product_attention,
    aten.sub.Tensor: torch.sub,
    aten.sym_size.int: torch.Tensor.size,
    aten.transpose.int: torch.transpose,
    aten.unsqueeze.default: torch.unsqueeze,
}
"""Operators of every transformer → the generated Python function that calls the very same operator with the same arguments.

Through `torch.ops` a call is checked against its schema first, which takes about a microsecond more.
"""


def plain_function(module: nn.Module) -> Callable[..., Any]:
    """What `module` computes, as a function that calls the `forward` of its submodules directly.

    PyTorch's module hooks, and tools built on them, so see one module per call of the whole. A block runs several times before
    its first backward, which such tools (`CommDebugMode`) do not expect of a module, and `nn.Module.__call__` costs time.

    Args:
        module: a graph that reads nothing but submodules from its module, nested in the same way; or any other module, whose
            `forward` it is then. It is not modified; submodules are shared, and later changes of their attributes seen.
    """
    if not isinstance(module, GraphModule):
        return module.forward
    graph = deepcopy(module.graph)
    for node in graph.nodes:
        if node.op == "call_function":
            node.target = BINDINGS.get(node.target, node.target)
    called = dict.fromkeys(node.target for node in graph.nodes if node.op == "call_module")
    children = {name: plain_function(module.get_submodule(name)) for name in called}
    return MethodType(type(GraphModule(module, graph)).forward, SimpleNamespace(**children))
