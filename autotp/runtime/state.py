"""Parameters and buffers on the ranks: cutting full tensors, showing pieces as DTensors, rejoining them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from math import prod
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from autotp._torch import dtensor_wrapper, local_of
from autotp.errors import AutotpError
from autotp.layouts import Coordinate, Layout, Range, Split, inner_pieces, length, local_shape, piece
from autotp.runtime.chunks import described
from autotp.sharded import StateSpec


def local_part(full: Tensor, layout: Layout, mesh: tuple[int, ...], coordinate: Coordinate) -> Tensor:
    """What the rank at `coordinate` holds of `full`: a contiguous copy without gradient.

    The shape is `local_shape(full.shape, layout, mesh, coordinate)`: the whole tensor where the layout is I or R, the
    rank's piece (in one run or several, possibly empty) of every dim that it splits.

    Raises:
        AutotpError: the layout has a partial axis, which no full tensor determines.
    """
    _refuse_partial(layout)
    part = full.detach()
    for split in layout.splits:
        part = _take(part, split.dim, piece(split, mesh, coordinate))
    return part.contiguous() if layout.splits else part.clone(memory_format=torch.contiguous_format)


def placements(layout: Layout) -> tuple[Placement, ...]:
    """The layout in DTensor's terms, one entry per mesh axis.

    A segmented or uneven cut is shown as the plain `Shard` of its dim: DTensor has no word for it. The global shape,
    every element-wise operation and every norm stay true; what assumes `torch.chunk`'s pieces (`DTensor.full_tensor`,
    redistribution) does not, hence `gather_full`.
    """
    shown: dict[str, Placement] = {"I": Replicate(), "R": Replicate(), "P": Partial(), "M": Partial("max")}
    found = []
    for axis, kind in enumerate(layout.kinds):
        split = layout.split_of(axis)
        found.append(shown[kind] if split is None else Shard(split.dim))
    return tuple(found)


def as_dtensor(local: Tensor, spec: StateSpec, device_mesh: DeviceMesh) -> DTensor:
    """`local` shown as a DTensor of the global shape and (contiguous) strides of `spec`, on the same storage.

    Raises:
        AutotpError: `local` has not the shape that `spec` gives this rank.
    """
    coordinate = _coordinate(device_mesh)
    expected = local_shape(spec.type.hint, spec.layout, tuple(device_mesh.shape), coordinate)
    if tuple(local.shape) != expected:
        raise AutotpError(
            f"the local part of {spec.kind} '{spec.name}' has shape {tuple(local.shape)}, but layout {spec.layout} "
            f"gives the rank at {coordinate} the shape {expected}; cut it with local_part"
        )
    shown = dtensor_wrapper(device_mesh, placements(spec.layout), spec.type.hint, spec.type.dtype)(local.detach())
    assert isinstance(shown, DTensor)
    return shown


def gather_full(local: Tensor, spec: StateSpec, device_mesh: DeviceMesh) -> Tensor:
    """The global tensor, on every rank, from the ranks' local parts; right for every cut. A fresh plain tensor.

    All ranks of the mesh must call it. One all-gather per mesh axis that splits the tensor, innermost first.

    Raises:
        AutotpError: the layout has a partial axis.
    """
    _refuse_partial(spec.layout)
    mesh, coordinate = tuple(device_mesh.shape), _coordinate(device_mesh)
    whole = local.detach()
    for split in spec.layout.splits:
        for depth in range(len(split.axes), 0, -1):
            inner = Split(split.dim, split.axes[:depth], split.cut)
            pieces = inner_pieces(inner, mesh, coordinate)
            whole = _gather(whole, split.dim, pieces, device_mesh.get_group(inner.axes[-1]))
    return whole if spec.layout.splits else whole.clone()


class Container(nn.Module):
    """A module of the original model as far as its state goes: it holds tensors under their names and computes nothing.

    `load_state_dict`, on it or on any module around it, accepts for every sharded tensor either the full plain tensor,
    of which this rank keeps its part, or what `state_dict` returned. Missing and unexpected keys and wrong shapes are
    torch's own errors.
    """

    def __init__(self) -> None:
        super().__init__()
        self._shown: dict[str, tuple[StateSpec, DeviceMesh]] = {}
        module: Any = self  # the methods have no annotations
        module.register_load_state_dict_pre_hook(_cut_values)
        module.register_state_dict_post_hook(_describe_values)

    def place(
        self, key: str, tensor: nn.Parameter | Tensor, spec: StateSpec, device_mesh: DeviceMesh, persistent: bool
    ) -> None:
        """Register `tensor` as parameter (an `nn.Parameter`) or buffer `key`, even where a method has that name."""
        self._shown[key] = (spec, device_mesh)
        if isinstance(tensor, nn.Parameter):
            self._parameters[key] = tensor
            return
        self._buffers[key] = tensor
        if not persistent:
            self._non_persistent_buffers_set.add(key)

    def child(self, key: str) -> Container:
        """The container called `key`, made at its first mention."""
        if key not in self._modules:
            self._modules[key] = Container()
        found = self._modules[key]
        assert isinstance(found, Container)
        return found

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Let `to`, `half`, `cuda` and their like pass where they change nothing, and refuse where they would."""
        for name, tensor in chain(self.named_parameters(), self.named_buffers()):
            probe = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
            moved = fn(probe)
            if (moved.dtype, moved.device) != (probe.dtype, probe.device):
                raise AutotpError(
                    f"a parallel module cannot change '{name}' from {probe.dtype} on {probe.device} to "
                    f"{moved.dtype} on {moved.device}, its graph was planned for the former; convert the model "
                    f"before making it parallel"
                )
        return self

    def extra_repr(self) -> str:
        """Global shape and layout of every tensor held here, e.g. `weight: 64×256 S(0)`."""
        held = []
        for key, (spec, _) in self._shown.items():
            held.append(f"{key}: {'×'.join(map(str, spec.type.hint)) or 'scalar'} {spec.layout}")
        return "; ".join(held)


def _cut_values(
    module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *_: Any
) -> None:
    """Put DTensors of this rank's parts in the place of full values; torch's own loading checks and copies them."""
    assert isinstance(module, Container)
    for key, (spec, device_mesh) in module._shown.items():
        name = prefix + key
        if name not in state_dict:
            continue
        if local_metadata.get("assign_to_params_buffers"):
            raise AutotpError(
                f"load_state_dict(assign=True) would put '{name}' outside the memory that the forward reads; "
                f"leave assign=False, the values are then copied"
            )
        value, held = state_dict[name], module._parameters.get(key, module._buffers.get(key))
        if not isinstance(held, DTensor) or not isinstance(value, Tensor) or tuple(value.shape) != spec.type.hint:
            continue
        if held.device_mesh != device_mesh:  # fully_shard has it
            if isinstance(value, DTensor) and value.device_mesh == held.device_mesh:
                continue
            raise AutotpError(f"fully_shard has the parameter '{name}' now; load full values before it, or what this state_dict() gave")
        if not isinstance(value, DTensor):
            local = local_part(value, spec.layout, tuple(device_mesh.shape), _coordinate(device_mesh))
            state_dict[name] = dtensor_wrapper(device_mesh, held.placements, spec.type.hint, value.dtype)(local)
        elif (value.device_mesh, value.placements) != (device_mesh, held.placements) or (
            local_of(value).shape != local_of(held).shape
        ):
            raise AutotpError(
                f"the value given for '{name}' is a DTensor that lies otherwise ({value.placements} on "
                f"{value.device_mesh}) than the parameter ({held.placements} on {device_mesh}); load a full tensor, "
                f"e.g. from full_state_dict()"
            )


def _describe_values(module: nn.Module, state_dict: dict[str, Any], prefix: str, _: Any) -> None:
    """Let the sharded tensors of a state dict tell `torch.distributed.checkpoint` which pieces they are."""
    assert isinstance(module, Container)
    for key, (spec, device_mesh) in module._shown.items():
        value = state_dict.get(prefix + key)
        if isinstance(value, DTensor) and not isinstance(value, nn.Parameter):
            described(value, spec.layout, device_mesh)


def specs_of(module: nn.Module) -> dict[str, tuple[StateSpec, DeviceMesh]]:
    """What every parameter and buffer on a mesh is, and the mesh, under each of its names in `module`."""
    return {
        f"{path}.{key}".lstrip("."): shown
        for path, part in module.named_modules(remove_duplicate=False)
        if isinstance(part, Container)
        for key, shown in part._shown.items()
    }


def shown_like(parameter: DTensor, local: Tensor, shown: tuple[StateSpec, DeviceMesh] | None) -> DTensor:
    """`local` as a DTensor that lies as `parameter` does, and tells checkpoints so; None: in DTensor's own way."""
    wrap = dtensor_wrapper(parameter.device_mesh, parameter.placements, tuple(parameter.shape), local.dtype)
    made = wrap(local)
    assert isinstance(made, DTensor)
    return made if shown is None else described(made, shown[0].layout, shown[1])


def _refuse_partial(layout: Layout) -> None:
    if set(layout.kinds) & {"P", "M"}:
        raise AutotpError(
            f"a tensor in layout {layout} is a partial result, not a stored value; use I, R or S for state"
        )


def _coordinate(device_mesh: DeviceMesh) -> Coordinate:
    found = device_mesh.get_coordinate()
    if found is None:
        raise AutotpError(
            f"this process (rank {dist.get_rank()}) is not on {device_mesh}; run only the ranks of the mesh"
        )
    return tuple(found)


def _take(tensor: Tensor, dim: int, ranges: tuple[Range, ...]) -> Tensor:
    """A copy of the given ranges of `dim`, one after the other."""
    return torch.cat([tensor.narrow(dim, start, stop - start) for start, stop in ranges or ((0, 0),)], dim)


def _gather(local: Tensor, dim: int, pieces: tuple[tuple[Range, ...], ...], group: dist.ProcessGroup) -> Tensor:
    """The tensor of which member i of `group` holds `pieces[i]` of `dim`. Sent as bytes, padded to the largest."""
    sizes = [length(ranges) for ranges in pieces]
    shape = list(local.shape)
    width = prod(shape[:dim] + shape[dim + 1 :]) * local.element_size()
    sent = local.new_zeros(max(sizes) * width, dtype=torch.uint8)
    sent[: local.numel() * local.element_size()] = local.contiguous().flatten().view(torch.uint8)
    received = [torch.empty_like(sent) for _ in pieces]
    dist.all_gather(received, sent, group=group)
    whole = local.new_empty([*shape[:dim], sum(sizes), *shape[dim + 1 :]])
    for part, size, ranges in zip(received, sizes, pieces, strict=True):
        values = part[: size * width].view(local.dtype).view([*shape[:dim], size, *shape[dim + 1 :]])
        offset = 0
        for start, stop in ranges:
            whole.narrow(dim, start, stop - start).copy_(values.narrow(dim, offset, stop - start))
            offset += stop - start
    return whole
