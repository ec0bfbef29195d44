"""The parameters and buffers of a checkpoint that `autotp.save` wrote, of which each rank reads its pieces before there is a module."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from autotp.layouts import Coordinate, Layout, local_shape
from autotp.runtime import checkpoint_files as files
from autotp.runtime.chunks import Chunks, boxes
from autotp.runtime.weights import Weights

PREFIX = "model."
"""Of the keys of a model's tensors."""


@dataclass(frozen=True, eq=False)
class SavedTensor:
    """A tensor in a checkpoint of `torch.distributed.checkpoint`: its key there, its shape and its dtype."""

    folder: Path
    key: str
    metadata: Metadata
    shape: tuple[int, ...]
    dtype: torch.dtype

    def local_part(
        self, layout: Layout, mesh: tuple[int, ...], coordinate: Coordinate, dtype: torch.dtype, device: torch.device
    ) -> Tensor:
        """What the rank at `coordinate` holds of it, as `runtime.state.local_part` cuts it, in `dtype` on `device`."""
        local = torch.empty(local_shape(self.shape, layout, mesh, coordinate), dtype=dtype, device=device)
        chunks = Chunks(local, self.shape, boxes(self.shape, layout, mesh, coordinate))
        stored = self.metadata.state_dict_metadata[self.key]
        assert isinstance(stored, TensorStorageMetadata)
        reader = FileSystemReader(self.folder)
        reader.set_up_storage_reader(self.metadata, is_coordinator=True)
        items = create_read_items_for_chunk_list(self.key, stored, chunks.chunk_list())
        reader.read_data(LoadPlan(items), _Into(chunks)).wait()
        return local


class _Into(DefaultLoadPlanner):
    """Has what is read written into the chunks of one tensor."""

    def __init__(self, chunks: Chunks) -> None:
        super().__init__()
        self.chunks = chunks

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        """The memory of a chunk."""
        return self.chunks.shard(index)


def open_saved(path: str | Path) -> Weights:
    """The newest complete checkpoint in `path`. Reads no values.

    Raises:
        AutotpError: there is none, or a file of it is missing or cut off.
    """
    folder = files.complete(path)
    files.verify(folder, -1)  # the sizes alone
    metadata = FileSystemReader(folder).read_metadata()
    found = {
        key.removeprefix(PREFIX): SavedTensor(folder, key, metadata, tuple(stored.size), stored.properties.dtype)
        for key, stored in metadata.state_dict_metadata.items()
        if key.startswith(PREFIX) and isinstance(stored, TensorStorageMetadata)
    }
    return Weights(folder, found, (folder / files.MANIFEST,))
