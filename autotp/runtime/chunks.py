"""The boxes of a global tensor that a rank holds, told to `torch.distributed.checkpoint`.

A DTensor has words for `torch.chunk`'s pieces alone. A cut may be in segments (GPT-2's fused qkv: a rank's heads of q, of k and of v),
in whole heads, or by several mesh axes in any order: what a rank holds are then several boxes of the global tensor, packed in its
local tensor one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from torch import Size, Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from autotp._torch import describe_chunks, local_of, own_chunks
from autotp.errors import AutotpError
from autotp.layouts import Coordinate, Layout, chunk, local_shape, piece


@dataclass(frozen=True)
class Box:
    """A box of the global tensor: where it begins there (`start`) and in the local tensor (`local`), and its `sizes`; per dim."""

    start: tuple[int, ...]
    local: tuple[int, ...]
    sizes: tuple[int, ...]


def boxes(shape: Sequence[int], layout: Layout, mesh: tuple[int, ...], coordinate: Coordinate) -> tuple[Box, ...]:
    """The boxes of a global tensor of this shape that the rank at `coordinate` holds; none is empty unless the whole tensor is.

    Every element of the local tensor is in exactly one. Ranks that hold the same elements get the same boxes.
    """
    dims: list[list[tuple[int, int, int]]] = []
    for dim, size in enumerate(shape):
        split = layout.split_at(dim)
        ranges = ((0, size),) if split is None or not size else piece(split, mesh, coordinate)
        found, offset = [], 0
        for start, stop in ranges:
            found.append((start, offset, stop - start))
            offset += stop - start
        dims.append(found)
    return tuple(Box(*(tuple(part[i] for part in parts) for i in range(3))) for parts in product(*dims))


def cut_box(local: Tensor, box: Box) -> Tensor:
    """The view of the local tensor that is this box."""
    for dim, (start, size) in enumerate(zip(box.local, box.sizes, strict=True)):
        local = local.narrow(dim, start, size)
    return local


@dataclass(frozen=True)
class Chunks:
    """What `torch.distributed.checkpoint` asks of a tensor: its chunks, what to write of each, and the memory of one."""

    local: Tensor
    shape: tuple[int, ...]
    boxes: tuple[Box, ...]

    def write_items(self, name: str, _: Tensor | None = None) -> list[WriteItem]:
        """One entry for each box."""
        properties = TensorProperties.create_from_tensor(self.local)
        return [
            WriteItem(
                index=MetadataIndex(name, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=Size(self.shape)),
            )
            for chunk in self.chunk_list()
        ]

    def chunk_list(self) -> list[ChunkStorageMetadata]:
        """Where each box lies in the global tensor."""
        return [ChunkStorageMetadata(Size(box.start), Size(box.sizes)) for box in self.boxes]

    def shard(self, index: MetadataIndex) -> Tensor:
        """The local memory of the box that begins at `index.offset`."""
        found = next((box for box in self.boxes if box.start == tuple(index.offset or ())), None)
        if found is None:
            starts = [box.start for box in self.boxes]
            raise AutotpError(f"'{index.fqn}' has no chunk at {index.offset} on this rank, whose chunks begin at {starts}")
        return cut_box(self.local, found)


def narrowed(found: tuple[Box, ...], dim: int, start: int, stop: int) -> tuple[Box, ...]:
    """What of the boxes is in `[start, stop)` of dim `dim` of the local tensor, as boxes of a local tensor that has only that."""
    kept = []
    for box in found:
        low, high = max(box.local[dim], start), min(box.local[dim] + box.sizes[dim], stop)
        if low < high:
            shift = low - box.local[dim]
            kept.append(
                Box(
                    (*box.start[:dim], box.start[dim] + shift, *box.start[dim + 1 :]),
                    (*box.local[:dim], low - start, *box.local[dim + 1 :]),
                    (*box.sizes[:dim], high - low, *box.sizes[dim + 1 :]),
                )
            )
    return tuple(kept)


def described(tensor: DTensor, layout: Layout, mesh: DeviceMesh) -> DTensor:
    """Make a DTensor, which lies in `layout` on `mesh`, tell checkpoints its true chunks. The tensor itself is marked and returned.

    If it lies on outer axes besides, as `fully_shard` makes it, these split what a rank of `mesh` holds, in `torch.chunk`'s pieces.
    A tensor that lies as DTensor says is left as it is.
    """
    whole, coordinate, place = tensor.device_mesh, mesh.get_coordinate(), tensor.device_mesh.get_coordinate()
    if coordinate is None or place is None:
        return tensor
    local, shape = local_of(tensor).detach(), tuple(tensor.shape)
    found = boxes(shape, layout, tuple(mesh.shape), tuple(coordinate))
    sizes = list(local_shape(shape, layout, tuple(mesh.shape), tuple(coordinate)))
    for axis in range(whole.ndim - mesh.ndim):
        placement: Any = tensor.placements[axis]
        if not placement.is_replicate():
            start, stop = chunk(sizes[placement.dim], whole.size(axis), place[axis])
            found, sizes[placement.dim] = narrowed(found, placement.dim, start, stop), stop - start
    if tuple(sizes) != tuple(local.shape):
        raise AutotpError(f"a tensor of shape {shape} has the local shape {tuple(local.shape)}, and {tuple(sizes)} by its layout {layout}")
    chunks = Chunks(local, shape, found)
    if chunks.chunk_list() != own_chunks(tensor):
        describe_chunks(tensor, chunks.write_items, chunks.chunk_list, chunks.shard)
    return tensor
