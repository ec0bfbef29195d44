"""An optimizer's state under the names of its parameters, so that it can be put back on another mesh, or on one device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from autotp._torch import local_of
from autotp.errors import AutotpError
from autotp.runtime.optimizers import BesideOptimizer
from autotp.runtime.state import shown_like, specs_of
from autotp.sharded import StateSpec

PREFIX = "optimizer.state."
Specs = Mapping[str, tuple[StateSpec, DeviceMesh]]
OWN = ("params", "param_names")
"""What of a parameter group is not an option."""


def pack(optimizer: Optimizer, module: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors of the state, as `optimizer.state.<parameter>.<key>`, and everything else of it in plain types.

    A tensor that follows a parameter (the same shape, the same pieces) lies and is described as the parameter; others are equal on
    all ranks.

    Raises:
        AutotpError: a parameter is not of `module`, or a state is split in another way than its parameter.
    """
    names, packed = _names(optimizer, module), optimizer.state_dict()
    parameters, specs = dict(module.named_parameters()), specs_of(module)
    tensors: dict[str, Tensor] = {}
    keys: dict[str, list[str]] = {name: [] for name in names.values()}
    values: dict[str, dict[str, Any]] = {name: {} for name in names.values()}
    for number, name in names.items():
        for key, value in packed["state"].get(number, {}).items():
            if not isinstance(value, Tensor):
                values[name][key] = value
                continue
            found = value.detach()
            if isinstance(found, DTensor):
                found = _sharded(found, name, key, parameters[name], specs)
            tensors[f"{PREFIX}{name}.{key}"] = found
            keys[name].append(key)
    groups = [
        {"options": {key: value for key, value in group.items() if key not in OWN}, "names": [names[n] for n in group["params"]]}
        for group in packed["param_groups"]
    ]
    rest = {key: value for key, value in packed.items() if key not in ("state", "param_groups")}
    common = {key: value for key, value in packed["state"].items() if key not in names}
    return tensors, {"kind": _kind(optimizer), "groups": groups, "keys": keys, "values": values, "rest": rest, "common": common}


def targets(optimizer: Optimizer, module: nn.Module, plain: Mapping[str, Any], saved: Mapping[str, Any]) -> dict[str, Tensor]:
    """Memory for the tensors of a saved state, in which each lies as the parameter does now, if it has its shape.

    `plain` is what `pack` gave; `saved` the type of every tensor in the checkpoint.

    Raises:
        AutotpError: it was another class of optimizer, or its groups of parameters are not those of `optimizer`.
    """
    _check_groups(optimizer, module, plain)
    parameters, specs = dict(module.named_parameters()), specs_of(module)
    whole = isinstance(optimizer, BesideOptimizer) and optimizer.whole  # every rank has all of its state
    found: dict[str, Tensor] = {}
    for name, keys in plain["keys"].items():
        for key in keys:
            stored = saved[f"{PREFIX}{name}.{key}"]
            assert isinstance(stored, TensorStorageMetadata)
            parameter, shape, dtype = parameters[name], tuple(stored.size), stored.properties.dtype
            follows = shape == tuple(parameter.shape) and key != "step"  # which torch's optimizers count in a tensor without dims
            if follows and isinstance(parameter, DTensor) and not whole:
                local = torch.empty_like(local_of(parameter), dtype=dtype)
                found[f"{PREFIX}{name}.{key}"] = shown_like(parameter, local, specs.get(name))
            else:
                found[f"{PREFIX}{name}.{key}"] = torch.empty(shape, dtype=dtype, device=parameter.device if follows else "cpu")
    return found


def unpack(optimizer: Optimizer, module: nn.Module, plain: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Give the optimizer a saved state: `tensors` as `targets` made them, now filled."""
    names, packed = _names(optimizer, module), optimizer.state_dict()
    numbers = {name: number for number, name in names.items()}
    state: dict[Any, Any] = dict(plain["common"])
    for name, keys in plain["keys"].items():
        held = {key: tensors[f"{PREFIX}{name}.{key}"] for key in keys} | plain["values"][name]
        if held:
            state[numbers[name]] = held
    groups = [
        {**saved["options"], **{key: group[key] for key in OWN if key in group}}
        for saved, group in zip(plain["groups"], packed["param_groups"], strict=True)
    ]
    optimizer.load_state_dict({**plain["rest"], "state": state, "param_groups": groups})


def _names(optimizer: Optimizer, module: nn.Module) -> dict[int, str]:
    """The number under which the optimizer's `state_dict` has a parameter → its name."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    found = {}
    for group, packed in zip(optimizer.param_groups, optimizer.state_dict()["param_groups"], strict=True):
        for parameter, number in zip(group["params"], packed["params"], strict=True):
            if id(parameter) not in names:
                raise AutotpError(
                    f"the optimizer trains a tensor of shape {tuple(parameter.shape)} that is no parameter of the module; "
                    "make it of the parameters of the very module that is saved or loaded"
                )
            found[number] = names[id(parameter)]
    return found


def _sharded(value: DTensor, name: str, key: str, parameter: nn.Parameter, specs: Specs) -> Tensor:
    """A state tensor on the mesh, telling its chunks: those of its parameter, or all of it on every rank."""
    if isinstance(parameter, DTensor) and value.shape == parameter.shape and local_of(value).shape == local_of(parameter).shape:
        return shown_like(parameter, local_of(value), specs.get(name))
    if all(placement.is_replicate() for placement in value.placements):
        return local_of(value)
    raise AutotpError(
        f"the optimizer's state '{key}' of '{name}' has shape {tuple(value.shape)} and is split as {value.placements}, while the parameter "
        f"has shape {tuple(parameter.shape)}; only state that follows its parameter, or is whole on every rank, can be saved"
    )


def _kind(optimizer: Optimizer) -> str:
    """The name of its class; of one that gathers, of the class that steps."""
    return type(optimizer.inner if isinstance(optimizer, BesideOptimizer) else optimizer).__qualname__


def _check_groups(optimizer: Optimizer, module: nn.Module, plain: Mapping[str, Any]) -> None:
    if plain["kind"] != _kind(optimizer):
        raise AutotpError(f"the saved optimizer is {plain['kind']}, this one is {_kind(optimizer)}; load it into one of the same class")
    names = _names(optimizer, module)
    saved = [set(group["names"]) for group in plain["groups"]]
    groups = [{names[number] for number in group["params"]} for group in optimizer.state_dict()["param_groups"]]
    if len(saved) != len(groups):
        raise AutotpError(f"the saved optimizer has {len(saved)} parameter groups, this one has {len(groups)}; group the parameters alike")
    for number, (there, here) in enumerate(zip(saved, groups, strict=True)):
        differ = sorted(there ^ here)
        if differ:
            whose = "the saved optimizer's alone" if differ[0] in there else "this optimizer's alone"
            raise AutotpError(
                f"'{differ[0]}' is in parameter group {number} of {whose} ({len(differ)} differ); "
                "make the optimizer of the parameters that it was saved with"
            )


