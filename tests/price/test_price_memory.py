"""Optimizers: the table's bytes are those that torch.optim allocates. Operators: the table of what autograd keeps is what it keeps."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from autotp.allocations import Allocations
from autotp.price.memory import OPTIMIZERS, saved_by, update_bytes

MAKE: dict[str, Callable[[list[Tensor]], torch.optim.Optimizer]] = {
    "adamw": lambda tensors: torch.optim.AdamW(tensors, foreach=False),
    "adafactor": lambda tensors: torch.optim.Adafactor(tensors, foreach=False),
    "momentum": lambda tensors: torch.optim.SGD(tensors, momentum=0.9, foreach=False),
    "sgd": lambda tensors: torch.optim.SGD(tensors, foreach=False),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "shape"), [*((name, (256, 512)) for name in MAKE), ("adamw", (1024,)), ("momentum", (1024,))])
def test_state_and_temporaries_are_those_of_torch(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    parameter = torch.zeros(shape, dtype=dtype, requires_grad=True)
    parameter.grad = torch.ones_like(parameter)
    optimizer = MAKE[name]([parameter])
    optimizer.step()
    state = [value for value in optimizer.state[parameter].values() if isinstance(value, Tensor) and value.ndim]
    assert sum(value.nbytes for value in state) == OPTIMIZERS[name].state_bytes(shape, dtype.itemsize)
    counter = Allocations()
    for tensor in (parameter, parameter.grad, *state):
        counter.see(tensor)
    before = counter.bytes
    with counter:
        optimizer.step()
    expected = OPTIMIZERS[name].temporary_bytes(shape, dtype.itemsize)
    assert counter.peak - before == pytest.approx(expected, rel=0.01, abs=64)  # beside rows, columns and numbers


def test_master_copies_are_for_short_dtypes_alone() -> None:
    master, plain = OPTIMIZERS["adamw-master"], OPTIMIZERS["adamw"]
    assert plain.state_bytes((10,), 2) == 40
    assert master.state_bytes((10,), 2) == 120
    assert master.state_bytes((10,), 4) == plain.state_bytes((10,), 4) == 80
    assert master.temporary_bytes((10,), 2) == 80
    assert update_bytes(10, 4) == 10 * 4 * 3 + 2 * 80


aten = torch.ops.aten
KEPT = {
    "aten.linear.default": lambda x: aten.linear.default(x, torch.ones(4, 4)),
    "aten.exp.default": aten.exp.default,
    "aten.add.Tensor": lambda x: aten.add.Tensor(x, torch.ones(4, 4)),
    "aten.silu.default": aten.silu.default,
    "aten.softmax.int": lambda x: aten.softmax.int(x, -1),
    "aten.transpose.int": lambda x: aten.transpose.int(x, 0, 1),
}


@pytest.mark.parametrize("op", KEPT)
def test_the_table_of_kept_tensors_agrees_with_autograd(op: str) -> None:
    x = torch.ones(4, 4, requires_grad=True) * 1
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.untyped_storage().data_ptr()) or t, lambda t: t):
        y = KEPT[op](x)
    operands, outputs = saved_by(op, 2 if op in ("aten.linear.default", "aten.add.Tensor") else 1)
    assert (y.untyped_storage().data_ptr() in kept) == (0 in outputs)
    if 0 not in operands:
        assert x.untyped_storage().data_ptr() not in kept
