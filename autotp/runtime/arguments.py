"""What `forward` was called with → the input tensors of the graph, or one sentence that says what does not fit."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, NoReturn

import sympy
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from autotp._torch import TreeSpec, tree_flatten
from autotp.errors import AutotpError
from autotp.layouts import local_size
from autotp.sharded import BorderSpec, Sharded


@dataclass(frozen=True)
class _TensorCheck:
    """What one input tensor must be. `sizes` are local, None where the size may change; `shape` is set if none may."""

    position: int
    name: str
    dtype: torch.dtype
    sizes: tuple[int | None, ...]
    shape: torch.Size | None
    requires_grad: bool
    device: torch.device

    def accepts(self, value: Any) -> bool:
        """Whether `value` may be given to the graph; quick, for every call."""
        if not isinstance(value, Tensor) or isinstance(value, DTensor) or value.dtype is not self.dtype:
            return False
        shape = value.shape
        if shape != self.shape:
            if self.shape is not None or len(shape) != len(self.sizes):
                return False
            for size, expected in zip(shape, self.sizes, strict=True):
                if expected is not None and size != expected:
                    return False
        if value.requires_grad and not self.requires_grad and torch.is_grad_enabled():
            return False
        return value.device == self.device or not self.sizes

    def complaint(self, value: Any) -> str:
        """Why `value` was not accepted, in one sentence."""
        given = f"input '{self.name}'"
        if not isinstance(value, Tensor):
            return f"{given} is {_shown(value)}, but it was a tensor in the example; pass a tensor of {self.dtype}"
        if isinstance(value, DTensor):
            return f"{given} is a DTensor; pass this rank's plain tensor, e.g. its to_local()"
        if value.dtype is not self.dtype:
            return (
                f"{given} is {value.dtype}, but it was {self.dtype} in the example; convert it with .to({self.dtype})"
            )
        if value.dim() != len(self.sizes):
            return f"{given} has {value.dim()} dims, but it had {len(self.sizes)} in the example; pass that many"
        for dim, (size, expected) in enumerate(zip(value.shape, self.sizes, strict=True)):
            if expected is not None and size != expected:
                return (
                    f"{given} has size {size} in dim {dim}, which the example fixed at {expected}; pass that size, "
                    f"or parallelize the model with an example of size {size}"
                )
        if value.device != self.device and self.sizes:
            return (
                f"{given} is on {value.device}, but the module is on {self.device}; move it with .to('{self.device}')"
            )
        return f"{given} requires grad, but it did not in the example; detach it, or trace with an input that does"


class Arguments:
    """Binds the arguments of a call to the inputs of the graph: flattened as in the trace, and checked."""

    def __init__(self, sharded: Sharded, device: torch.device, signature: inspect.Signature | None) -> None:
        self.spec: TreeSpec = sharded.in_spec
        self.names, self.constants, self.signature = sharded.in_names, sharded.in_constants, signature
        self.tensors = tuple(_check_of(spec, sharded, device) for spec in sharded.inputs)
        self.positions = tuple(spec.position for spec in sharded.inputs)
        self.ties = _tied_sizes(sharded)
        positional, keywords = self.spec.children()
        self.keywords: list[str] = keywords.context
        self.positional = self._positional_names(positional.num_children)
        self.parts: list[TreeSpec] = [*positional.children(), *keywords.children()]
        self.flat = all(part.is_leaf() for part in self.parts)

    def match(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        """The graph's input tensors, in order."""
        leaves = self._leaves(args, kwargs)
        for check in self.tensors:
            value = leaves[check.position]
            if not check.accepts(value):
                raise AutotpError(check.complaint(value))
        for position, constant in self.constants.items():
            if leaves[position] is not constant and not _equal(leaves[position], constant):
                raise AutotpError(
                    f"input '{self.names[position]}' is {_shown(leaves[position])}, but the example had "
                    f"{_shown(constant)}, which is part of the graph; pass that, or parallelize the model with this value"
                )
        for one, dim, other, at in self.ties:
            if leaves[one].shape[dim] != leaves[other].shape[at]:
                raise AutotpError(
                    f"input '{self.names[one]}' has size {leaves[one].shape[dim]} in dim {dim}, where input "
                    f"'{self.names[other]}' has {leaves[other].shape[at]} in dim {at}, but the model needs one size "
                    f"for both; pass equal sizes"
                )
        return [leaves[position] for position in self.positions]

    def _leaves(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
        """The arguments, flattened as in the trace."""
        if self.flat and len(args) == len(self.positional) and list(kwargs) == self.keywords:
            leaves = [*args, *kwargs.values()]
            if not any(isinstance(leaf, (tuple, list, dict)) for leaf in leaves):
                return leaves
        leaves, spec = tree_flatten((args, kwargs))
        if spec != self.spec:
            leaves, spec = tree_flatten(self._as_in_trace(args, kwargs))
            if spec != self.spec:
                self._raise_structure(spec)
        return leaves

    def _positional_names(self, count: int) -> list[str | int]:
        """What the example's positional arguments are called: parameter names, or numbers where there is no name."""
        names: list[str | int] = list(range(count))
        if self.signature is not None:
            kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
            known = [p.name for p in self.signature.parameters.values() if p.kind in kinds]
            names[: len(known)] = known[:count]
        return names

    def _as_in_trace(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The same call, its arguments passed by position and by keyword as they were in the example."""
        given: dict[str | int, Any] = dict(zip(self._positional_names(len(args)), args, strict=True))
        twice = [name for name in kwargs if name in given]
        if twice:
            raise AutotpError(f"argument '{twice[0]}' is passed by position and by keyword; pass it once")
        given.update(kwargs)
        parameters = self.signature.parameters if self.signature is not None else {}
        defaults: dict[Any, Any] = {name: p.default for name, p in parameters.items() if p.default is not p.empty}
        defaults = {**dict.fromkeys(self._nones()), **defaults}
        wanted = (*self.positional, *self.keywords)
        for name in wanted:
            if name not in given:
                if name not in defaults:
                    raise AutotpError(f"argument {_quoted(name)} is missing, but the example passed it; pass it too")
                given[name] = defaults[name]
        for name in [name for name in given if name not in wanted]:
            value = given[name]
            if value is not None and not (name in defaults and _equal(value, defaults[name])):
                raise AutotpError(
                    f"argument {_quoted(name)} is {_shown(value)}, but the example did not pass it; leave it out, or "
                    f"parallelize the model with it"
                )
        return tuple(given[name] for name in self.positional), {name: given[name] for name in self.keywords}

    def _nones(self) -> list[str | int]:
        """The arguments that were None in the example."""
        found, position = [], 0
        for name, part in zip((*self.positional, *self.keywords), self.parts, strict=True):
            if part.num_leaves == 1 and position in self.constants and self.constants[position] is None:
                found.append(name)
            position += part.num_leaves
        return found

    def _raise_structure(self, spec: TreeSpec) -> NoReturn:
        """Name the first argument whose nesting differs from the example's."""
        parts = [part for side in spec.children() for part in side.children()]
        for name, part, expected in zip((*self.positional, *self.keywords), parts, self.parts, strict=True):
            if part != expected:
                raise AutotpError(
                    f"argument {_quoted(name)} is nested otherwise ({part}) than in the example ({expected}); pass the "
                    f"same structure, or parallelize the model with it"
                )
        raise AssertionError("specs differ only in their parts")


def _check_of(spec: BorderSpec, sharded: Sharded, device: torch.device) -> _TensorCheck:
    sizes: list[int | None] = []
    for dim, size in enumerate(spec.type.shape):
        split = spec.layout.split_at(dim)
        if not isinstance(size, int):
            sizes.append(None)
        elif split is None:
            sizes.append(size)
        else:
            sizes.append(local_size(split, sharded.mesh, sharded.coordinate))
    fixed = [size for size in sizes if size is not None]
    shape = torch.Size(fixed) if len(fixed) == len(sizes) else None
    return _TensorCheck(spec.position, spec.name, spec.type.dtype, tuple(sizes), shape, spec.type.requires_grad, device)


def _tied_sizes(sharded: Sharded) -> tuple[tuple[int, int, int, int], ...]:
    """(position, dim, other position, its dim) of input sizes that are one symbol, apart from split dims."""
    first: dict[sympy.Symbol, tuple[int, int]] = {}
    ties = []
    for spec in sharded.inputs:
        for dim, size in enumerate(spec.type.shape):
            if isinstance(size, sympy.Symbol) and spec.layout.split_at(dim) is None:
                position, at = first.setdefault(size, (spec.position, dim))
                if (position, at) != (spec.position, dim):
                    ties.append((spec.position, dim, position, at))
    return tuple(ties)


def _equal(value: Any, constant: Any) -> bool:
    """Whether a value that is no tensor equals the traced one."""
    if isinstance(value, Tensor) or isinstance(constant, Tensor):
        return value is constant
    try:
        return bool(value == constant)
    except Exception:
        return False


def _shown(value: Any) -> str:
    """A value as errors show it."""
    return f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)


def _quoted(name: str | int) -> str:
    return f"'{name}'" if isinstance(name, str) else f"number {name}"
