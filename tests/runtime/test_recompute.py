"""Blocks that make tensors again in backward: equal gradients, memory that is free in between, and every call made once."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.autograd.graph import saved_tensors_hooks

from autotp.allocations import Allocations
from autotp.errors import AutotpError
from autotp.runtime import recompute
from autotp.runtime.random import RandomCall, seed_module
from autotp.runtime.recompute import Recomputation, Recomputing

aten = torch.ops.aten
NAMES = ("hidden", "active", "dropped", "normal", "heads", "result")
"""The marked calls of `block` that make memory."""


def block() -> fx.GraphModule:
    """Everything that autograd saves: operands, results, views, masks and statistics that no graph node holds."""
    root, graph = nn.Module(), fx.Graph()
    root.drop = RandomCall(aten.dropout.default, 0)
    x, up, down, scale = (graph.placeholder(name) for name in ("x", "up", "down", "scale"))
    hidden = graph.call_function(aten.linear.default, (x, up), name="hidden")
    active = graph.call_function(aten.tanh.default, (hidden,), name="active")
    dropped = graph.create_node("call_module", "drop", (active, 0.3, True), {}, name="dropped")
    normal = graph.call_function(aten.layer_norm.default, (dropped, [8], scale), name="normal")
    heads = graph.call_function(aten.split.Tensor, (normal, 4, -1), name="heads")
    first, second = (graph.call_function(getitem, (heads, place)) for place in range(2))
    turned = graph.call_function(aten.transpose.int, (first, 0, 1), name="turned")
    turned = graph.call_function(aten.matmul.default, (turned, second), name="product")
    result = graph.call_function(aten.linear.default, (normal, down), name="result")
    total = graph.call_function(aten.add.Tensor, (x, result), name="total")
    graph.output((total, turned))
    return fx.GraphModule(root, graph)


def getitem(values: Any, place: int) -> Any:
    return values[place]


def tensors() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((5, 6), (8, 6), (6, 8), (8,))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


def gradients(module: nn.Module, given: Iterable[Tensor], backward: Callable[[Tensor], None] = torch.Tensor.backward) -> list[Tensor]:
    seed_module(module, 7)
    leaves = list(given)
    total, turned = module(*leaves)
    backward(total.square().sum() + turned.cos().sum())
    return [total.detach(), turned.detach(), *(leaf.grad for leaf in leaves)]  # type: ignore[list-item]


def marked(*names: str) -> dict[str, frozenset[int]]:
    return {name: frozenset({0, 1} if name == "heads" else {0}) for name in names}


EVERY = (*NAMES, "turned", "product", "total")
SETS = [(name,) for name in EVERY] + [NAMES, NAMES[::2], NAMES[1::2], EVERY]


@pytest.mark.parametrize("names", SETS, ids="+".join)
def test_gradients_are_those_of_the_block_itself(names: tuple[str, ...]) -> None:
    for found, wanted in zip(
        gradients(Recomputing(block(), marked(*names)), tensors()), gradients(block(), tensors()), strict=True
    ):
        assert torch.equal(found, wanted)


def left_by_forward(module: nn.Module) -> int:
    """Bytes that live after a forward beside what goes in and out. After backward there must be none, without any garbage collection."""
    with Allocations():
        gradients(module, tensors())  # the first use of an operator makes cycles of its own
    given = tensors()
    gc.collect()
    gc.disable()
    try:
        counter = Allocations()
        known = {counter.see(tensor) for tensor in given}
        with counter:
            results = module(*given)
            left = set(counter.sizes) - known - {counter.see(result) for result in results}
            bytes_left = sum(counter.sizes[number] for number in left)
            (results[0].sum() + results[1].sum()).backward()
            del results
            known |= {counter.see(tensor.grad) for tensor in given if tensor.grad is not None}
            assert set(counter.sizes) == known, "something is held beyond backward"
        return bytes_left
    finally:
        gc.enable()


def test_memory_is_free_between_forward_and_backward() -> None:
    kept = left_by_forward(block())
    some = left_by_forward(Recomputing(block(), marked("active", "dropped")))
    nothing = left_by_forward(Recomputing(block(), marked(*NAMES, "product")))
    assert nothing == 0 < some < kept


class Counting:
    """A function that notes when it is called."""

    __name__ = "counting"

    def __init__(self, function: Any, log: list[str], name: str) -> None:
        self.function, self.log, self.name = function, log, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.log.append(self.name)
        return self.function(*args, **kwargs)


def counted(names: tuple[str, ...]) -> tuple[Recomputing, list[str]]:
    module, log = Recomputing(block(), marked(*names)), list[str]()
    calls = module._remembering[1]
    numbered = [name for name in (node.name for node in module.body.graph.nodes) if name in names]
    calls[:] = [
        (call if isinstance(call, RandomCall) else Counting(call, log, name), pick)
        for name, (call, pick) in zip(numbered, calls, strict=True)
    ]
    return module, log


def test_each_call_is_made_again_once_and_only_if_it_is_needed() -> None:
    names = ("hidden", "active", "normal", "result", "total")
    module, log = counted(names)

    def backward(loss: Tensor) -> None:
        log.clear()
        loss.backward()

    gradients(module, tensors(), backward)
    assert log == ["normal", "hidden", "active"]  # nobody saves the result of the last product, nor the sum


def test_a_promise_that_is_not_remembered_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(self: Any, value: Tensor) -> None:
        self.value = value.detach()

    honest = recompute._Remade.tensor
    monkeypatch.setattr(recompute._Remade, "fill", forgetful)
    monkeypatch.setattr(recompute._Remade, "tensor", lambda self: (setattr(self, "value", None), honest(self))[1])
    monkeypatch.setattr(recompute._Call, "run", _run_and_keep_operands(recompute._Call.run))
    with pytest.raises(AssertionError):
        test_each_call_is_made_again_once_and_only_if_it_is_needed()


def _run_and_keep_operands(honest: Callable[[Any], None]) -> Callable[[Any], None]:
    def run(self: Any) -> None:
        args, kwargs, needs = self.args, self.kwargs, list(self.needs)
        honest(self)
        self.args, self.kwargs, self.needs = args, kwargs, needs

    return run


def test_memory_that_is_used_again_is_not_mistaken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Marked tensors die one after the other; an unmarked one that is saved may lie where one of them lay."""

    def run() -> None:
        root, graph = nn.Module(), fx.Graph()
        x = graph.placeholder("x")
        y, names = x, []
        for number in range(40):
            small = graph.call_function(aten.neg.default, (y,), name=f"marked_{number}")  # saved by nobody
            names.append(small.name)
            y = graph.call_function(aten.add.Tensor, (y, small), {"alpha": 0.1}, name=f"sum_{number}")
            y = graph.call_function(aten.sin.default, (y,), name=f"sine_{number}")
        graph.output(y)
        module = fx.GraphModule(root, graph)
        found, wanted = ((torch.ones(3, dtype=torch.float64) / 3).requires_grad_() for _ in range(2))
        Recomputing(module, marked(*names))(found).sum().backward()
        module(wanted).sum().backward()
        assert found.grad is not None and wanted.grad is not None and torch.equal(found.grad, wanted.grad)

    run()
    monkeypatch.setattr(Recomputation, "_watch", lambda self, tensor, key: None)
    with pytest.raises(AssertionError):
        run()


def test_other_random_numbers_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RandomCall, "drawn", lambda self: self)
    monkeypatch.setattr(
        RandomCall, "forward", lambda self, *args: self._sample((self.stream.next() + self.shard) % 2**63, *args)
    )
    with pytest.raises(AssertionError):
        test_gradients_are_those_of_the_block_itself(("dropped", "active"))


def test_backward_twice() -> None:
    def twice(loss: Tensor) -> None:
        loss.backward(retain_graph=True)
        loss.backward()

    found = gradients(Recomputing(block(), marked(*NAMES)), tensors(), twice)
    assert all(torch.equal(a, b) for a, b in zip(found, gradients(block(), tensors(), twice), strict=True))


def test_two_forwards_before_their_backwards() -> None:
    def step(module: nn.Module) -> list[Tensor]:
        seed_module(module, 3)
        given = tensors()
        losses = [sum(result.square().sum() for result in module(*given)) for _ in range(2)]
        for loss in losses:
            loss.backward()  # type: ignore[union-attr]
        return [tensor.grad for tensor in given]  # type: ignore[misc]

    found = step(Recomputing(block(), marked(*NAMES)))
    assert all(torch.equal(a, b) for a, b in zip(found, step(block()), strict=True))


def test_without_gradients_nothing_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Recomputation, "__init__", None)
    with torch.no_grad():
        Recomputing(block(), marked(*NAMES))(*tensors())


def test_what_is_kept_and_changed_before_backward_is_refused() -> None:
    for names in (("hidden",), NAMES):
        given = tensors()
        total, turned = Recomputing(block(), marked(*names))(*given)
        with torch.no_grad():
            given[1].add_(1)  # as an optimizer's step does
        with pytest.raises(AutotpError, match=r"float64 tensor of shape \((8, 6|6, 8)\) that backward needs was changed in place"):
            (total.sum() + turned.sum()).backward()


def test_hooks_around_the_block_see_what_is_kept() -> None:
    seen: list[Tensor] = []
    given = tensors()
    with saved_tensors_hooks(lambda tensor: (seen.append(tensor), tensor.clone())[1], lambda tensor: tensor):
        total, turned = Recomputing(block(), marked(*NAMES))(*given)
    inside = {tensor.untyped_storage().data_ptr() for tensor in given}
    assert seen and all(tensor.untyped_storage().data_ptr() in inside for tensor in seen if tensor.shape != turned.shape)
    (total.sum() + turned.sum()).backward()
    assert all(tensor.grad is not None for tensor in given)


def test_autocast_reaches_backward() -> None:
    def step(module: nn.Module) -> list[Tensor]:
        given = [tensor.detach().float().requires_grad_() for tensor in tensors()]
        seed_module(module, 1)
        with torch.autocast("cpu", torch.bfloat16):
            total, turned = module(*given)
        (total.float().sum() + turned.float().sum()).backward()
        return [tensor.grad for tensor in given]  # type: ignore[misc]

    found = step(Recomputing(block(), marked("hidden", "active", "result")))
    assert all(torch.equal(a, b) for a, b in zip(found, step(block()), strict=True))


def test_a_long_chain_needs_no_deep_stack() -> None:
    graph = fx.Graph()
    x = y = graph.placeholder("x")
    names = []
    for number in range(3000):
        y = graph.call_function(aten.sin.default, (y,), name=f"sine_{number}")
        names.append(y.name)
    graph.output(y)
    given = torch.ones(2, dtype=torch.float64, requires_grad=True)
    assert x is not y
    Recomputing(fx.GraphModule(nn.Module(), graph), marked(*names))(given).sum().backward()
    assert given.grad is not None and given.grad.isfinite().all()


def test_compiled_it_is_the_block_itself() -> None:
    plain = [tensor.detach().requires_grad_() for tensor in tensors()]

    def loss(first: Tensor, up: Tensor) -> Tensor:
        return torch.tanh(first) @ up

    graph = fx.Graph()
    x, up = graph.placeholder("x"), graph.placeholder("up")
    hidden = graph.call_function(aten.tanh.default, (x,), name="hidden")
    graph.output(graph.call_function(aten.matmul.default, (hidden, up), name="product"))
    module = Recomputing(fx.GraphModule(nn.Module(), graph), marked("hidden"))
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    found = compiled(plain[0], plain[2])
    found.sum().backward()
    again = [tensor.detach().requires_grad_() for tensor in tensors()]
    loss(again[0], again[2]).sum().backward()
    assert torch.allclose(plain[0].grad, again[0].grad)  # type: ignore[arg-type]
