"""Outputs that the user asked to leave split or partial: DTensors, so that nobody takes a rank's part for the whole; and a loss on them."""

from __future__ import annotations

from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from autotp import _torch
from autotp.errors import AutotpError
from autotp.interpret import evaluate
from autotp.layouts import Layout, Split, plain_cut
from autotp.piece_sizes import piece_start
from autotp.program import Size
from autotp.runtime.state import local_part, placements
from autotp.sharded import BorderSpec, Sharded


class Outputs:
    """Shows the outputs of a graph to the user.

    Args:
        sharded: what is given out, and in which layouts.
        device_mesh: that it runs on.
    """

    def __init__(self, sharded: Sharded, device_mesh: DeviceMesh) -> None:
        self.sharded, self.device_mesh = sharded, device_mesh
        self.declared = {number: spec for number, spec in enumerate(sharded.outputs) if set(spec.layout.kinds) != {"I"}}
        self.sources = _sources(sharded)
        self.shapes: dict[tuple[int, ...], dict[int, tuple[int, ...]]] = {}

    def shown(self, results: list[Tensor], inputs: list[Tensor]) -> list[Tensor]:
        """The graph's results, those in a declared layout as DTensors of their global shape.

        Raises:
            AutotpError: the ranks of several mesh axes share a dim unevenly, which no DTensor can say.
        """
        if not self.declared:
            return results
        sizes = tuple([size for given in inputs for size in given.shape])
        if sizes not in self.shapes:
            self.shapes[sizes] = self._global_shapes(inputs)
        for number, shape in self.shapes[sizes].items():
            stride = torch.empty(shape, device="meta").stride()
            found = placements(self.declared[number].layout)
            results[number] = DTensor.from_local(
                results[number], self.device_mesh, found, run_check=False, shape=torch.Size(shape), stride=stride
            )
        return results

    def _global_shapes(self, inputs: list[Tensor]) -> dict[int, tuple[int, ...]]:
        """The shape of each declared output for inputs of these sizes."""
        found = {}
        for number, spec in self.declared.items():
            found[number] = shape = tuple([self._size(size, inputs) for size in spec.type.shape])
            self._check(spec, shape)
        return found

    def _size(self, size: Size, inputs: list[Tensor]) -> int:
        if isinstance(size, int):
            return size
        if size in self.sources:  # without sympy, which torch.compile cannot trace
            place, dim, ranks = self.sources[size]
            return inputs[place].shape[dim] * ranks
        symbols = {known: self._size(known, inputs) for known in self.sources}
        return int(evaluate(size, symbols))

    def _check(self, spec: BorderSpec, shape: tuple[int, ...]) -> None:
        for split in spec.layout.splits:
            ranks = prod([self.sharded.mesh[axis] for axis in split.axes])
            if len(split.axes) > 1 and shape[split.dim] % ranks:
                raise AutotpError(
                    f"output '{spec.name}' has {shape[split.dim]} elements in dim {split.dim}, which {ranks} ranks of several mesh axes "
                    "share unevenly; declare it split over one axis, or make the size divisible"
                )


def _sources(sharded: Sharded) -> dict[Size, tuple[int, int, int]]:
    """Each size that is free → an input that has it, the dim, and among how many ranks it is split there: evenly."""
    found: dict[Size, tuple[int, int, int]] = {}
    for place, spec in enumerate(sharded.inputs):
        for dim, size in enumerate(spec.type.shape):
            split = spec.layout.split_at(dim)
            if not isinstance(size, int):
                found.setdefault(size, (place, dim, prod(sharded.mesh[axis] for axis in split.axes) if split else 1))
    return found


def cross_entropy(logits: Tensor, labels: Tensor, *, ignore_index: int = -100, reduction: str = "mean") -> Tensor:
    """The cross-entropy of logits that lie split over the ranks, vocabulary and rows alike, without gathering them.

    It is `torch.nn.functional.cross_entropy` over the last dim, the same number on every rank, and its gradient is that of one device.
    Each row costs three numbers exchanged over the axes that split the vocabulary (Shoeybi et al. 2019, section 3).

    Args:
        logits: (..., vocabulary), a DTensor, as a module gives an output that was declared split; or a plain tensor, whole.
        labels: (...) int64, the labels of all rows on every rank; or a DTensor split like the rows of `logits`.
        ignore_index: rows of this label do not count.
        reduction: "mean" over the rows that count, or "sum".

    Returns:
        A plain scalar in the dtype of `logits`, computed in float32 at least.

    Raises:
        AutotpError: logits are partial, shapes or dtypes do not fit, or the reduction is another.
        RuntimeError: a label is out of bounds.
    """
    if reduction not in ("mean", "sum"):
        raise AutotpError(f"reduction is {reduction!r}; give 'mean' or 'sum'")
    if tuple(labels.shape) != tuple(logits.shape[:-1]):
        shapes = f"labels of shape {tuple(labels.shape)} do not fit logits of shape {tuple(logits.shape)}"
        raise AutotpError(f"{shapes}; give a label for each row")
    if labels.dtype not in (torch.int64, torch.int32):
        raise AutotpError(f"labels are {labels.dtype}; give class numbers as int64")
    if not isinstance(logits, DTensor):
        loss: Tensor = torch.nn.functional.cross_entropy(
            logits.flatten(0, -2), labels.flatten(), ignore_index=ignore_index, reduction=reduction
        )
        return loss
    mesh, layout = logits.device_mesh, _layout_of(logits)
    local = logits.to_local()
    dtype, local = local.dtype, local if local.dtype.itemsize >= 4 else local.float()
    last, vocabulary = logits.ndim - 1, logits.shape[-1]
    columns = layout.split_at(last)
    kinds = tuple("I" if columns and axis in columns.axes else kind for axis, kind in enumerate(layout.kinds))
    rows = Layout(kinds, tuple(split for split in layout.splits if split.dim != last))
    mine = _labels_of(labels, rows, mesh)
    counts = mine != ignore_index
    known = (mine >= 0) & (mine < vocabulary)
    _torch.assert_all(known | ~counts, f"a label is out of bounds: neither below {vocabulary} nor {ignore_index}")
    across = tuple(columns.axes) if columns else ()
    along = tuple(axis for axis, kind in enumerate(rows.kinds) if kind == "S")

    highest = local.detach().amax(-1) if local.shape[-1] else local.new_full(local.shape[:-1], float("-inf"))
    highest = _reduced(highest, mesh, across, dist.ReduceOp.MAX)
    total = _Summed.apply((local - highest.unsqueeze(-1)).exp().sum(-1), mesh, across)
    places = mine.masked_fill(~counts, 0) - _first(columns, mesh)
    here = (places >= 0) & (places < local.shape[-1])
    if local.shape[-1]:
        picked = local.gather(-1, places.masked_fill(~here, 0).unsqueeze(-1)).squeeze(-1).masked_fill(~here, 0.0)
    else:
        picked = local.sum(-1)
    picked = _Summed.apply(picked, mesh, across)
    summed = _Summed.apply((total.log() + highest - picked).masked_fill(~counts, 0.0).sum(), mesh, along)
    if reduction == "mean":
        summed = summed / _reduced(counts.sum(), mesh, along, dist.ReduceOp.SUM)
    result: Tensor = summed.to(dtype)
    return result


def _layout_of(logits: DTensor) -> Layout:
    """The layout that the placements say; ranks share dims as `torch.chunk` does."""
    dims: dict[int, list[int]] = {}
    for axis, placement in enumerate(logits.placements):
        if isinstance(placement, Shard):
            dims.setdefault(placement.dim % logits.ndim, []).append(axis)
        elif not isinstance(placement, Replicate):
            raise AutotpError("these logits are partial sums; declare them whole or split, not 'partial'")
    kinds = tuple("S" if isinstance(placement, Shard) else "I" for placement in logits.placements)
    return Layout(kinds, tuple(Split(dim, tuple(axes), plain_cut(logits.shape[dim])) for dim, axes in sorted(dims.items())))


def _labels_of(labels: Tensor, rows: Layout, mesh: DeviceMesh) -> Tensor:
    if isinstance(labels, DTensor):
        if tuple(labels.placements) != placements(rows):
            raise AutotpError(f"the labels lie as {labels.placements}, and the rows of the logits as {placements(rows)}; make them equal")
        return labels.to_local()
    return local_part(labels, rows, tuple(mesh.shape), tuple(mesh.get_coordinate() or ()))


def _first(columns: Split | None, mesh: DeviceMesh) -> int:
    """The first column that this rank holds."""
    return piece_start(columns, tuple(mesh.shape), tuple(mesh.get_coordinate() or ())) if columns else 0


def _reduced(x: Tensor, mesh: DeviceMesh, axes: tuple[int, ...], op: Any) -> Tensor:
    x = x.clone()
    for axis in axes:
        dist.all_reduce(x, op, group=mesh.get_group(axis))
    return x


class _Summed(torch.autograd.Function):
    """P → I: the sum over mesh axes, on every rank; the gradient is whole already."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mesh: DeviceMesh, axes: tuple[int, ...]) -> Tensor:
        return _reduced(x, mesh, axes, dist.ReduceOp.SUM)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return gradient, None, None
