"""The definitions of the layouts, by which every result is judged: `scatter`, `gather` and `gather_gradient`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor

from autotp.errors import AutotpError
from autotp.layouts import Coordinate, Layout, SortedCut, Split, cut_size, piece
from autotp.runtime.sorted_rows import held_elements

Mesh = tuple[int, ...]


def coordinates(mesh: Mesh) -> list[Coordinate]:
    """Every coordinate of the mesh, in row-major order: the order of the ranks."""
    return list(product(*map(range, mesh)))


def gradient_layout(layout: Layout) -> Layout:
    """How the gradient of a tensor in `layout` lies: that of R is partial, of P full, those of I and S as the value."""
    dual = {"R": "P", "P": "I", "M": "I"}
    return Layout(tuple(dual.get(kind, kind) for kind in layout.kinds), layout.splits)


def scatter(
    full: Tensor,
    layout: Layout,
    mesh: Mesh,
    coordinate: Coordinate,
    generator: torch.Generator | None = None,
    order: Tensor | None = None,
) -> Tensor:
    """The local value, at `coordinate`, of the tensor `full`.

    On `P` axes the summands are random numbers that add up to `full`, and on `M` axes every element is lowered on all
    ranks but one; they come from a copy of `generator`, so that calls with the same generator for every rank fit
    together. Without generator the first rank of a `P` axis holds the value and the others zeros. Sorted rows need
    their `order`.
    """
    random = generator.clone_state() if generator is not None else None
    value = full
    for axis, kind in enumerate(layout.kinds):
        if kind == "P":
            value = _summand(value, mesh[axis], coordinate[axis], random)
        elif kind == "M" and random is not None:
            drop = torch.rand((mesh[axis], *full.shape), generator=random).to(full)
            drop -= drop.amin(0)
            value = value - drop[coordinate[axis]]
    for split in layout.splits:
        value = value.index_select(split.dim, _elements(split, mesh, coordinate, order).to(value.device))
    return value.clone()


def _elements(split: Split, mesh: Mesh, coordinate: Coordinate, order: Tensor | None) -> Tensor:
    """Every index of the global dim that the rank at `coordinate` holds."""
    if isinstance(split.cut, SortedCut):
        assert order is not None
        return held_elements(split, mesh, coordinate, order)
    held = [index for span in piece(split, mesh, coordinate) for index in range(*span)]
    return torch.tensor(held, dtype=torch.int64)


def _summand(value: Tensor, members: int, member: int, random: torch.Generator | None) -> Tensor:
    if random is None:
        return value if member == 0 else torch.zeros_like(value)
    shape = (members - 1, *value.shape)
    if value.dtype.is_floating_point or value.dtype.is_complex:
        others = torch.randn(shape, generator=random, dtype=value.dtype).to(value.device)
    else:
        others = torch.randint(-3, 4, shape, generator=random).to(value)
    return value - others.sum(0) if member == members - 1 else others[member]


def gather(
    locals: Sequence[Tensor], layout: Layout, mesh: Mesh, tolerance: float | None = None, order: Tensor | None = None
) -> Tensor:
    """The full tensor from the local values of all ranks, in row-major order.

    Along `I` and `R` axes the values must agree to `tolerance` relative to their greatest magnitude (by default the
    square root of the dtype's epsilon), else AutotpError. `P` axes are summed, of `M` axes the maximum is taken.
    """
    values = dict(zip(coordinates(mesh), locals, strict=True))
    for axis, kind in enumerate(layout.kinds):
        if kind != "S":
            values = _reduce_axis(values, axis, kind, layout, mesh, tolerance)
    first = next(iter(values.values()))
    if not layout.splits:
        return first
    shape = list(first.shape)
    for split in layout.splits:
        shape[split.dim] = cut_size(split.cut)
    full = first.new_zeros(shape)
    for coordinate, value in values.items():
        index: list[Tensor] = [torch.arange(size) for size in shape]
        for split in layout.splits:
            index[split.dim] = _elements(split, mesh, coordinate, order)
        expected = tuple(map(len, index))
        if tuple(value.shape) != expected:
            raise AutotpError(
                f"the rank at {coordinate} holds a tensor of shape {tuple(value.shape)} where layout {layout} of shape "
                f"{tuple(shape)} gives it {expected}; check that the tensor and the layout belong together"
            )
        if value.numel():
            grid = torch.meshgrid(*(part.to(value.device) for part in index), indexing="ij")
            full[grid] = value
    return full


def gather_gradient(
    locals: Sequence[Tensor], layout: Layout, mesh: Mesh, tolerance: float | None = None, order: Tensor | None = None
) -> Tensor:
    """The full gradient of a tensor in `layout` from those of its local values on all ranks, in row-major order.

    It must be equal along `I` and `P` axes, else AutotpError; it is summed along `R` and put together along `S` axes.
    """
    return gather(locals, gradient_layout(layout), mesh, tolerance, order)


def _reduce_axis(
    values: dict[Coordinate, Tensor], axis: int, kind: str, layout: Layout, mesh: Mesh, tolerance: float | None
) -> dict[Coordinate, Tensor]:
    """The values with `axis` reduced to its first coordinate."""
    found = {}
    for coordinate, first in values.items():
        if coordinate[axis]:
            continue
        group = [values[*coordinate[:axis], member, *coordinate[axis + 1 :]] for member in range(mesh[axis])]
        if kind in "PM":
            found[coordinate] = torch.stack(group).sum(0) if kind == "P" else torch.stack(group).amax(0)
            found[coordinate] = found[coordinate].to(first.dtype)
            continue
        for member, other in enumerate(group):
            if not _equal(first, other, tolerance):
                raise AutotpError(
                    f"layout {layout} wants equal tensors along mesh axis {axis}, but from {coordinate} those of ranks "
                    f"0 and {member} differ; look for a conversion that is missing or wrong before this tensor"
                )
        found[coordinate] = first
    return found


def _equal(a: Tensor, b: Tensor, tolerance: float | None) -> bool:
    a, b = a.detach(), b.detach()
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not (a.dtype.is_floating_point or a.dtype.is_complex) or not a.numel():
        return torch.equal(a, b)
    epsilon = torch.finfo(a.dtype).eps
    relative = epsilon**0.5 if tolerance is None else tolerance
    magnitude = float(torch.where(torch.isfinite(a), a.abs(), 0).max())
    return torch.allclose(a, b, rtol=0, atol=relative * magnitude + epsilon, equal_nan=True)
