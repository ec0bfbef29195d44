"""Beside `fully_shard`, on another axis of the same `DeviceMesh`: having the parameters as the graph needs them.

`fully_shard` keeps a piece of each local tensor, and puts the gathered one in its place for the time of forward and backward.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor


@contextmanager
def unsharded(module: nn.Module) -> Iterator[None]:
    """A context in which `module` has the parameters that it computes with. All ranks of the outer axis must enter it."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None or not isinstance(module, fsdp.FSDPModule):
        yield
        return
    wrapped: Any = module
    wrapped.unshard()
    try:
        yield
    finally:
        wrapped.reshard()


def lies_alike(one: Any, other: Any) -> bool:
    """Whether two DTensors are of one type and shape, and lie alike on one mesh."""
    if not isinstance(one, DTensor) or not isinstance(other, DTensor):
        return False
    return _place(one) == _place(other)


def _place(tensor: DTensor) -> tuple[Any, ...]:
    local: Tensor = tensor.to_local()
    return tensor.device_mesh, tensor.placements, tensor.shape, tensor.dtype, local.shape, local.device
