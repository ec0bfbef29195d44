"""A tensor that a checkpoint has in parts: stacked or concatenated while it is read, each rank's pieces of each part alone."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from autotp.errors import AutotpError
from autotp.layouts import Coordinate, Layout, local_shape
from autotp.runtime.chunks import Box, boxes
from autotp.runtime.weights import SafeTensor, opened


@dataclass(frozen=True)
class Part:
    """A stored tensor and where it lies in the assembled one: its first element there (`start`), its extent there (`sizes`), and the dims
    that the stored tensor lacks (`stacked`), in each of which it takes one place."""

    stored: SafeTensor
    start: tuple[int, ...]
    sizes: tuple[int, ...]
    stacked: tuple[int, ...] = ()

    def overlap(self, box: Box) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
        """What this part has of a box: in the stored tensor, and in the local tensor that has the box (without stacked dims); or None."""
        here, there = [], []
        for dim, (start, size) in enumerate(zip(self.start, self.sizes, strict=True)):
            low, high = max(start, box.start[dim]), min(start + size, box.start[dim] + box.sizes[dim])
            if low >= high:
                return None
            shift = box.local[dim] - box.start[dim]
            there.append(slice(low + shift, high + shift))
            if dim not in self.stacked:
                here.append(slice(low - start, high - start))
        return tuple(here), tuple(there)


@dataclass(frozen=True)
class Assembled:
    """A tensor of several stored ones, which together cover it."""

    parts: tuple[Part, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype

    def local_part(
        self, layout: Layout, mesh: tuple[int, ...], coordinate: Coordinate, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """See `StoredTensor`."""
        local = torch.empty(local_shape(self.shape, layout, mesh, coordinate), dtype=dtype, device=device)
        found = boxes(self.shape, layout, mesh, coordinate)
        with ExitStack() as stack:
            files = {}
            for part in self.parts:
                for overlap in filter(None, map(part.overlap, found)):
                    if part.stored.file not in files:
                        files[part.stored.file] = stack.enter_context(opened(part.stored.file))
                    here, there = overlap
                    target = local[there]
                    for dim in reversed(part.stacked):
                        target = target.squeeze(dim)
                    target.copy_(files[part.stored.file].get_slice(part.stored.key)[here])
        return local


def single(stored: SafeTensor) -> Assembled:
    """One stored tensor as it is."""
    return Assembled((Part(stored, (0,) * len(stored.shape), stored.shape),), stored.shape, stored.dtype)


def stack(tensors: Sequence[Assembled], dim: int) -> Assembled:
    """As `torch.stack`.

    Raises:
        AutotpError: shapes or dtypes differ.
    """
    return concatenate([_unsqueezed(tensor, dim) for tensor in tensors], dim)


def concatenate(tensors: Sequence[Assembled], dim: int) -> Assembled:
    """As `torch.cat`.

    Raises:
        AutotpError: shapes or dtypes differ.
    """
    first = tensors[0]
    if len({(tensor.dtype, _without(tensor.shape, dim)) for tensor in tensors}) > 1:
        keys = [tensor.parts[0].stored.key for tensor in tensors]
        raise AutotpError(f"'{keys[0]}' to '{keys[-1]}' are put together in the model, but their shapes or dtypes differ in the checkpoint")
    parts, offset = [], 0
    for tensor in tensors:
        for part in tensor.parts:
            parts.append(replace(part, start=(*part.start[:dim], part.start[dim] + offset, *part.start[dim + 1 :])))
        offset += tensor.shape[dim]
    return Assembled(tuple(parts), (*first.shape[:dim], offset, *first.shape[dim + 1 :]), first.dtype)


def _unsqueezed(tensor: Assembled, dim: int) -> Assembled:
    parts = [
        replace(
            part,
            start=(*part.start[:dim], 0, *part.start[dim:]),
            sizes=(*part.sizes[:dim], 1, *part.sizes[dim:]),
            stacked=tuple(sorted((dim, *(old + (old >= dim) for old in part.stacked)))),
        )
        for part in tensor.parts
    ]
    return Assembled(tuple(parts), (*tensor.shape[:dim], 1, *tensor.shape[dim:]), tensor.dtype)


def _without(shape: tuple[int, ...], dim: int) -> tuple[int, ...]:
    return (*shape[:dim], *shape[dim + 1 :])
