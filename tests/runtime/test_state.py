"""Cutting full tensors and putting the pieces together again, for every kind of cut."""

from collections.abc import Iterator
from itertools import product
from math import prod
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from autotp.errors import AutotpError
from autotp.layouts import Layout, Segment, Split, local_shape
from autotp.program import TensorType
from autotp.runtime.state import as_dtensor, gather_full, local_part, placements
from autotp.sharded import StateSpec


def full_tensor(shape: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.arange(prod(shape)).reshape(shape).to(dtype)


def split(dim: int, axes: tuple[int, ...], *cut: Segment) -> Split:
    return Split(dim, axes, cut)


def make_spec(full: Tensor, layout: Layout) -> StateSpec:
    return StateSpec("weight", "parameter", TensorType(tuple(full.shape), tuple(full.shape), full.dtype, False), layout)


def test_invariant_and_replicated_parts_are_copies_of_the_whole() -> None:
    full = full_tensor((4, 6)).t()
    for kind in "IR":
        part = local_part(full, Layout((kind,)), (2,), (1,))
        assert torch.equal(part, full) and part.is_contiguous()
        assert part.untyped_storage().data_ptr() != full.untyped_storage().data_ptr()
    assert not local_part(full.requires_grad_(), Layout(("I",)), (2,), (1,)).requires_grad


def test_a_segmented_part_takes_its_run_of_every_segment() -> None:
    full = full_tensor((24, 2))
    part = local_part(full, Layout(("S",), (split(0, (0,), Segment(3, 2, 4)),)), (2,), (1,))
    assert torch.equal(part, full[[4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23]])
    assert part.is_contiguous()


def test_uneven_and_empty_parts() -> None:
    full = full_tensor((5, 3))
    rows = [local_part(full, Layout(("S",), (split(0, (0,), Segment(1, 5, 1)),)), (4,), (rank,)) for rank in range(4)]
    assert [len(part) for part in rows] == [2, 2, 1, 0]
    assert torch.equal(torch.cat(rows), full)


def test_two_dims_and_an_ordered_pair_of_axes() -> None:
    full = full_tensor((8, 6))
    both = Layout(("S", "S"), (split(0, (1,), Segment(1, 8, 1)), split(1, (0,), Segment(1, 6, 1))))
    assert torch.equal(local_part(full, both, (2, 2), (0, 1)), full[4:, :3])
    nested = Layout(("S", "S"), (split(0, (1, 0), Segment(1, 8, 1)),))
    assert torch.equal(local_part(full, nested, (2, 2), (0, 1)), full[4:6])


def test_a_partial_layout_has_no_part() -> None:
    with pytest.raises(AutotpError, match="layout P is a partial result"):
        local_part(full_tensor((2,)), Layout(("P",)), (2,), (0,))


def test_layouts_in_terms_of_dtensor() -> None:
    layout = Layout(("I", "R", "P", "S"), (split(1, (3,), Segment(3, 2, 4)),))
    assert placements(layout) == (Replicate(), Replicate(), Partial(), Shard(1))
    assert placements(Layout(("M",))) == (Partial("max"),)


LAYOUTS: list[tuple[tuple[int, ...], tuple[int, ...], Layout]] = [
    ((4,), (5, 3), Layout(("S",), (split(0, (0,), Segment(1, 5, 1)),))),
    ((4,), (2, 3), Layout(("S",), (split(0, (0,), Segment(1, 2, 1)),))),
    ((4,), (0, 3), Layout(("S",), (split(0, (0,), Segment(1, 0, 1)),))),
    ((4,), (3, 0), Layout(("S",), (split(0, (0,), Segment(1, 3, 1)),))),
    ((4,), (2, 24), Layout(("S",), (split(1, (0,), Segment(3, 2, 4)),))),
    ((4,), (6,), Layout(("I",))),
    ((2, 2), (24, 2), Layout(("I", "S"), (split(0, (1,), Segment(3, 2, 4)),))),
    (
        (2, 2),
        (26, 5),
        Layout(("S", "S"), (split(0, (1,), Segment(3, 2, 4), Segment(1, 2, 1)), split(1, (0,), Segment(1, 5, 1)))),
    ),
    ((2, 2), (2, 21, 2), Layout(("S", "S"), (split(1, (0, 1), Segment(3, 7, 1)),))),
    ((2, 2), (21, 2), Layout(("S", "S"), (split(0, (1, 0), Segment(3, 7, 1)),))),
]


def check_every_layout() -> None:
    """What each rank holds is its part; all ranks gather the whole; DTensors show the global shape and norm."""
    sizes: list[tuple[int, ...]] = [(4,), (2, 2)]
    meshes = {mesh: init_device_mesh("cpu", mesh) for mesh in sizes}
    for (mesh, shape, layout), dtype in product(LAYOUTS, (torch.float64, torch.bfloat16, torch.bool, torch.int64)):
        device_mesh, full = meshes[mesh], full_tensor(shape, dtype)
        spec, coordinate = make_spec(full, layout), tuple(device_mesh.get_coordinate() or ())
        local = local_part(full, layout, mesh, coordinate)
        assert tuple(local.shape) == local_shape(shape, layout, mesh, coordinate)
        whole = gather_full(local, spec, device_mesh)
        assert type(whole) is Tensor and whole.dtype == dtype and torch.equal(whole, full), (mesh, layout)
        shown = as_dtensor(local, spec, device_mesh)
        assert (shown.shape, shown.stride(), shown.dtype) == (full.shape, full.stride(), dtype)
        assert shown.to_local().data_ptr() == local.data_ptr()
        if dtype == torch.float64:
            norm = torch.linalg.vector_norm(shown)
            assert isinstance(norm, DTensor)
            torch.testing.assert_close(norm.full_tensor(), full.norm())


def run_rank(rank: int, world: int, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world)
    try:
        check_every_layout()
    finally:
        dist.destroy_process_group()


def test_every_cut_is_gathered_right(tmp_path: Path) -> None:
    mp.spawn(run_rank, (4, str(tmp_path / "store")), nprocs=4)


@pytest.fixture
def one() -> Iterator[DeviceMesh]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_a_wrong_part_is_not_shown(one: DeviceMesh) -> None:
    full = full_tensor((4, 6))
    spec = make_spec(full, Layout(("I",)))
    with pytest.raises(
        AutotpError, match=r"'weight' has shape \(3, 6\), but layout I gives the rank at \(0,\) the shape \(4, 6\)"
    ):
        as_dtensor(full[:3], spec, one)
    gathered = gather_full(full, spec, one)
    assert torch.equal(gathered, full) and gathered.data_ptr() != full.data_ptr()
    with pytest.raises(AutotpError, match="partial result"):
        gather_full(full, make_spec(full, Layout(("P",))), one)
