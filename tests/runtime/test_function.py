"""`plain_function`: the same computation as the graph, operator by operator, without module calls."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils._python_dispatch import TorchDispatchMode

from autotp.runtime.function import BINDINGS, plain_function
from autotp.runtime.random import RandomCall

aten = torch.ops.aten
X, Y = torch.linspace(0.1, 2, 12).view(3, 4), torch.linspace(1, 3, 12).view(3, 4)
HEADS = torch.linspace(0, 1, 48).view(1, 2, 6, 4)

CALLS: dict[Any, tuple[tuple[Any, ...], dict[str, Any]]] = {
    aten.add.Tensor: ((X, 2.5), {"alpha": 3}),
    aten.cat.default: (([X, Y], 1), {}),
    aten.div.Tensor: ((X, Y), {}),
    aten.embedding.default: ((X, torch.tensor([[0, 2]]), 1), {}),
    aten.gelu.default: ((X,), {"approximate": "tanh"}),
    aten.layer_norm.default: ((X, [4], X[0], X[1], 1e-3, False), {}),
    aten.linear.default: ((X, Y, None), {}),
    aten.matmul.default: ((X, Y.T), {}),
    aten.mul.Tensor: ((X, 2), {}),
    aten.neg.default: ((X,), {}),
    aten.permute.default: ((X, [1, 0]), {}),
    aten.pow.Tensor_Scalar: ((X, 2), {}),
    aten.reshape.default: ((X, [2, -1]), {}),
    aten.rsqrt.default: ((X,), {}),
    aten.scaled_dot_product_attention.default: (
        (HEADS, HEADS[:, :1], HEADS[:, :1], None, 0.0, True),
        {"scale": 0.3, "enable_gqa": True},
    ),
    aten.sub.Tensor: ((X, Y), {}),
    aten.sym_size.int: ((X, 1), {}),
    aten.transpose.int: ((X, 0, 1), {}),
    aten.unsqueeze.default: ((X, -1), {}),
}


class Recorded(TorchDispatchMode):
    """The operators that run, with everything passed that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append((func, [arg for arg in args if not isinstance(arg, Tensor)], kwargs))
        return func(*args, **(kwargs or {}))


def recorded(function: Callable[..., Any], args: Any, kwargs: Any) -> tuple[Any, Any]:
    with Recorded() as record:
        result = function(*args, **kwargs)
    return result, record.calls


@pytest.mark.parametrize("operator", BINDINGS, ids=str)
def test_bindings_run_the_very_operator(operator: Any) -> None:
    (mine, calls), (wanted, expected) = (recorded(f, *CALLS[operator]) for f in (BINDINGS[operator], operator))
    assert repr(calls) == repr(expected)
    assert torch.equal(torch.as_tensor(mine), torch.as_tensor(wanted))


class Scale(nn.Module):
    factor = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return x * self.factor


def nested() -> tuple[fx.GraphModule, Scale]:
    """x → block(block(x)) with one block in both places, as copies of a layer have it."""
    scale, inner, outer = Scale(), fx.Graph(), fx.Graph()
    x = inner.placeholder("x")
    inner.output(inner.call_function(aten.add.Tensor, (inner.call_module("scale", (x,)), x)))
    block = fx.GraphModule({"scale": scale}, inner)
    y = outer.placeholder("x")
    outer.output((outer.call_module("block", (outer.call_module("block", (y,)),)),))
    return fx.GraphModule({"block": block}, outer), scale


def test_it_computes_what_the_module_does() -> None:
    module, scale = nested()
    function = plain_function(module)
    scale.factor = 3.0
    assert torch.equal(function(X)[0], module(X)[0]) and torch.equal(function(X)[0], 16 * X)
    assert [node.target for node in module.block.graph.nodes][2] is aten.add.Tensor


def test_a_block_used_twice_can_be_watched() -> None:
    """Module hooks, on which CommDebugMode relies, cannot follow a module called twice before its backward."""
    function = plain_function(nested()[0])
    x = X.clone().requires_grad_()
    with CommDebugMode():
        function(x.sin())[0].sum().backward()
    torch.testing.assert_close(x.grad, 4 * X.cos())


def test_random_calls_leave_the_global_state_alone() -> None:
    torch.manual_seed(0)
    wanted = torch.rand(2)
    torch.manual_seed(0)
    first, same, other = (RandomCall(aten.dropout.default, shard) for shard in (0, 0, 1))
    masks = [call(torch.ones(50), 0.5, True) for call in (first, same, other)]
    again = first(torch.ones(50), 0.5, True)
    made = RandomCall(aten.rand.default, 0)([3], device="cpu")
    assert torch.equal(torch.rand(2), wanted)
    assert torch.equal(masks[0], masks[1]) and not torch.equal(masks[0], masks[2]) and not torch.equal(masks[0], again)
    assert made.shape == (3,)
