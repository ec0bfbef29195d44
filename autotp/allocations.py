"""Counting memory: every storage that operators allocate while a mode is on, from its birth to its death."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from autotp._torch import local_of


def storage_of(tensor: Tensor) -> torch.UntypedStorage:
    """The memory behind a tensor; behind its local part, if it is a DTensor."""
    return (local_of(tensor) if isinstance(tensor, DTensor) else tensor).untyped_storage()


class Allocations(TorchDispatchMode):
    """Sees the results of every operator that runs under it, forward, backward and in optimizers, on real or meta tensors.

    What a kernel allocates and frees within one call is not seen; views count once, with their base.

    Args:
        grown: called with this object whenever memory has grown.

    Attributes:
        sizes: live storages by number, in order of birth → bytes; `bytes`: their sum; `peak`: its highest value.
    """

    def __init__(self, grown: Callable[[Allocations], None] | None = None) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.bytes = self.peak = 0
        self.grown = grown
        self._live: dict[int, tuple[int, weakref.ref[torch.UntypedStorage]]] = {}
        self._born = 0

    def see(self, tensor: Tensor) -> int:
        """Count the tensor's storage, if it is new; its number, which no other storage ever has."""
        storage = storage_of(tensor)
        key: int = storage._cdata
        if key not in self._live:
            number, self._born = self._born, self._born + 1
            self._live[key] = number, weakref.ref(storage, lambda _: self._forget(key))
            self.sizes[number] = storage.nbytes()
            self.bytes += self.sizes[number]
            if self.bytes > self.peak:
                self.peak = self.bytes
                if self.grown is not None:
                    self.grown(self)
        return self._live[key][0]

    def _forget(self, key: int) -> None:
        self.bytes -= self.sizes.pop(self._live.pop(key)[0])

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(item, Tensor):
                self.see(item)
        return result
