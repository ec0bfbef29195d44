"""What `parallelize` needs to know of the running ranks: who they are, their mesh, and the mode of the graph that they run."""

from __future__ import annotations

from collections.abc import Callable
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from autotp import _torch
from autotp.errors import AutotpError
from autotp.mesh import parse_mesh
from autotp.plans import Plan, installed_version
from autotp.program import Program
from autotp.runtime.agreement import Group, together

T = TypeVar("T")


def ranks_of(mesh: Any) -> Group:
    """The ranks that take part: those of a `DeviceMesh`, by default all that run. Nothing is exchanged.

    Raises:
        AutotpError: there is no process group, this rank is not on the mesh, or PyTorch's process groups, which sort their ranks, have
            them in another order than the mesh.
    """
    if not dist.is_initialized():
        raise AutotpError(
            "there is no process group: start the script with `torchrun --nproc-per-node N script.py` and call "
            "torch.distributed.init_process_group() before autotp.parallelize()"
        )
    if not isinstance(mesh, DeviceMesh):
        return None
    if mesh.get_coordinate() is None:
        raise AutotpError(f"rank {dist.get_rank()} is not on the device mesh {mesh}: call this on the ranks of the mesh alone")
    if any(bool((mesh.mesh.diff(dim=axis) < 0).any()) for axis in range(mesh.ndim)):
        raise AutotpError(
            f"the device mesh {mesh} does not number its ranks in ascending order along every axis, as PyTorch's process groups do: "
            "sort them"
        )
    return None if mesh.size() == dist.get_world_size() else mesh


def facts(model: Any, args: Any, kwargs: Any, mesh: Any, plan: Any = None) -> dict[str, str | None]:
    """What every rank must start from alike, in words: software, model, example inputs, mesh and plan; None where it is not known."""
    axes = attempt(lambda: parse_mesh(mesh))
    saved = attempt(lambda: Plan.load(plan)) if isinstance(plan, (str, Path)) else plan
    inputs = {f"argument {place}": value for place, value in enumerate(args if isinstance(args, tuple) else (args,))} | dict(kwargs or {})
    return {
        "the version of autotp": installed_version(),
        "the version of PyTorch": str(torch.__version__),
        "the model": _model_in_words(model),
        "the example input": ", ".join(f"{name} {_in_words(leaf)}" for name, leaf in _torch.named_leaves(inputs)),
        "the mesh": None if isinstance(axes, BaseException) else str(axes),
        "the plan": saved.hash if isinstance(saved, Plan) else None,
    }


def _model_in_words(model: Any) -> str:
    if not isinstance(model, nn.Module):
        return type(model).__name__
    state = [*model.named_parameters(), *model.named_buffers()]
    digest = sha256("\n".join(f"{name} {_in_words(tensor)}" for name, tensor in state).encode()).hexdigest()
    count, mode = sum(tensor.numel() for _, tensor in state), "train" if model.training else "eval"
    return f"{type(model).__name__} of {count:,} numbers in {mode} mode (names and shapes {digest[:8]})"


def _in_words(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{tuple(value.shape)} {value.dtype}"
    return repr(value) if value is None or isinstance(value, (bool, int, float, str)) else type(value).__name__


def device_mesh_of(mesh: Any) -> DeviceMesh:
    """The `DeviceMesh` for what the user gave; by default all ranks on one axis. Its exchanges time out as those of all ranks do.

    Raises:
        AutotpError: the mesh does not have as many places as there are ranks.
    """
    if isinstance(mesh, DeviceMesh):
        return mesh
    world = dist.get_world_size()
    axes = together(lambda: _axes_of(mesh, world))
    device = "cuda" if "nccl" in str(dist.get_backend()) else "cpu"
    made = init_device_mesh(device, tuple(axes.values()), mesh_dim_names=tuple(axes))
    for axis in range(made.ndim):
        _torch.inherit_timeout(made.get_group(axis))
    return made


def _axes_of(mesh: Any, world: int) -> dict[str, int]:
    axes = parse_mesh(world if mesh is None else mesh)
    places = prod(axes.values())
    if places != world:
        raise AutotpError(f"the mesh {axes} has {places} places, but {world} ranks are running: the two must be equal")
    return axes


def attempt(step: Callable[[], T]) -> T | BaseException:
    """The result, or the exception: something that can be shared with other ranks either way."""
    try:
        return step()
    except Exception as error:
        return error


def mode_of_graph(model: nn.Module, program: Program) -> bool | None:
    """The mode (`training`) in which alone the graph is right; None if a training graph has nothing random and updates nothing."""
    random = any(
        node.kind == "op" and isinstance(node.target, torch._ops.OpOverload) and _may_differ(node.target, node.args)
        for node in program.nodes
    )
    return None if model.training and not random and not program.updates else model.training


def _may_differ(target: torch._ops.OpOverload, args: tuple[Any, ...]) -> bool:
    if target is torch.ops.aten.scaled_dot_product_attention.default:
        return len(args) > 4 and bool(args[4])
    return torch.Tag.nondeterministic_seeded in target.tags
