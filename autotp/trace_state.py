"""What Python code depends on besides tensors, written down so that it can be compared later.

`described` turns plain values, containers and objects into nested tuples: equal descriptions mean that code which reads them sees the
same. `watched_reads` finds out what a call reads: attributes of modules, and the global variables that its functions name.
"""

from __future__ import annotations

import enum
import functools
import logging
import os
import sys
import threading
import types
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import nn

from autotp import _torch
from autotp.functional import OWN_DIRECTORY, TORCH_DIRECTORY


class Unknown(Exception):
    """A value whose state cannot be described."""


@dataclass(frozen=True, eq=False)
class Same:
    """An object that is compared by identity, and kept alive so that no other one gets its place."""

    thing: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.thing is other.thing

    def __hash__(self) -> int:
        return id(self.thing)


LIMIT = 20_000
"""How many values one description may hold: what reaches further is taken for unknown."""

LITERALS = (
    *(bool, int, str, bytes, type(None), range, type(...), enum.Enum),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
)
CONTAINERS = (list, tuple, set, frozenset, dict, types.MappingProxyType, deque)
INERT = (types.ModuleType, types.BuiltinFunctionType, types.MethodDescriptorType, torch.Tensor, nn.Module, logging.Logger)
"""What is compared by identity alone; modules' own attributes are watched where they are read."""
STATEFUL = (bytearray, memoryview, torch.Generator)
FOREIGN = frozenset({"torch", "numpy", "sympy", *sys.stdlib_module_names})
"""Packages whose objects, unless they are listed above, are compared by identity."""


def described(value: Any, seen: dict[int, tuple[int, Any]] | None = None) -> Any:
    """The value as nested tuples that compare equal if code cannot tell the values apart, but for the identity of plain objects.

    Args:
        value: anything; tensors, modules, functions and classes stand for themselves, functions with what they enclose and classes
            with their data attributes.
        seen: id → (number, object) of the objects met so far, by which shared and recursive ones are told.

    Raises:
        Unknown: it holds state that cannot be read without changing it (iterators, generators of random numbers), or too much.
    """
    return _described(value, {} if seen is None else seen)


def _described(value: Any, seen: dict[int, tuple[int, Any]]) -> Any:
    kind = type(value)
    if kind in (int, str, bool) or value is None:
        return kind, value
    if isinstance(value, LITERALS):
        return kind, value
    if isinstance(value, (float, complex)):
        return kind, repr(value)
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return kind, _torch.expression(value)
    if id(value) in seen:
        return "seen", seen[id(value)][0]
    if len(seen) >= LIMIT:
        raise Unknown
    seen[id(value)] = len(seen), value
    if isinstance(value, INERT):
        return Same(value)
    if isinstance(value, CONTAINERS):
        return kind, _items(value, seen), _fields(value, seen)
    if isinstance(value, types.FunctionType):
        return Same(value), _enclosed(value, seen), _described(value.__defaults__, seen), _described(value.__kwdefaults__, seen)
    if isinstance(value, types.MethodType):
        return Same(value.__func__), _enclosed(value.__func__, seen), _described(value.__self__, seen)
    if isinstance(value, functools.partial):
        return kind, tuple(_described(part, seen) for part in (value.func, value.args, value.keywords))
    if isinstance(value, type):
        return Same(value), *(_of_class(part, seen) for part in value.__mro__ if not _is_foreign(part))
    if isinstance(value, STATEFUL) or hasattr(kind, "__next__"):
        raise Unknown
    if isinstance(value, ContextVar):
        return Same(value), _described(value.get(None), seen)
    if isinstance(value, (types.SimpleNamespace, threading.local)) or not _is_foreign(kind):
        if not hasattr(value, "__dict__"):
            raise Unknown
        return kind, _fields(value, seen)
    if kind.__module__.partition(".")[0] == "numpy" or kind.__module__ in ("random", "array", "itertools"):
        raise Unknown
    return Same(value)


def _is_foreign(kind: type) -> bool:
    return kind.__module__.partition(".")[0] in FOREIGN


def _items(value: Any, seen: dict[int, tuple[int, Any]]) -> Any:
    if isinstance(value, (set, frozenset)):
        return frozenset(_described(item, seen) for item in value)
    if isinstance(value, (dict, types.MappingProxyType)):
        return tuple([(_described(key, seen), _described(item, seen)) for key, item in value.items()])
    return tuple([_described(item, seen) for item in value])


def _fields(value: Any, seen: dict[int, tuple[int, Any]]) -> Any:
    held = getattr(value, "__dict__", None)
    return tuple([(name, _described(item, seen)) for name, item in held.items()]) if held else ()


def _enclosed(function: Any, seen: dict[int, tuple[int, Any]]) -> Any:
    code = getattr(function, "__code__", None)
    if code is not None and code.co_filename.startswith(OWN_DIRECTORY):  # what an export has put in the place of another
        original = getattr(function, "__wrapped__", None)
        return () if original is None else _enclosed(original, seen)
    cells = getattr(function, "__closure__", None) or ()
    try:
        return tuple([_described(cell.cell_contents, seen) for cell in cells])
    except ValueError:  # a variable that is not assigned yet
        raise Unknown from None


def _of_class(kind: type, seen: dict[int, tuple[int, Any]]) -> Any:
    """The data attributes of a class, and what its methods enclose."""
    found = []
    for name, value in vars(kind).items():
        if isinstance(value, types.FunctionType):
            if value.__closure__:
                found.append((name, _described(value, seen)))
        elif not name.startswith("__") and name != "_abc_impl" and not hasattr(type(value), "__get__"):
            found.append((name, _described(value, seen)))
    return tuple(found)


# ---- what a module holds --------------------------------------------------------------------------------------------

TABLES = ("_parameters", "_buffers", "_modules")


def attributes(module: nn.Module) -> dict[tuple[str, str], Any]:
    """(name of a module inside, attribute) → its description, for a module and all inside it.

    Parameters and buffers are described by their types, not their identity.

    Raises:
        Unknown: an attribute cannot be described.
    """
    seen: dict[int, tuple[int, Any]] = {}
    found: dict[tuple[str, str], Any] = {}
    for name, part in _torch.plain_modules(module):
        held = vars(part)
        found[name, "class"] = described(type(part), seen), type(part)
        for key, value in held.items():
            if key not in TABLES:
                found[name, key] = described(value, seen)
        for key in ("_parameters", "_buffers"):
            found[name, key] = tuple((label, tensor_type(tensor)) for label, tensor in held[key].items())
        found[name, "_modules"] = tuple((label, child is None) for label, child in held["_modules"].items())
    return found


def tensor_type(tensor: torch.Tensor | None) -> Any:
    """What code can ask a tensor for without reading its values; sizes as numbers or expressions."""
    if tensor is None:
        return None
    shape, strides = (tuple(map(_torch.expression, sizes)) for sizes in (tensor.shape, tensor.stride()))
    offset = _torch.expression(tensor.storage_offset())
    return type(tensor), tensor.dtype, tensor.device, shape, strides, offset, tensor.requires_grad, tensor.is_leaf


def held_tensors(module: nn.Module) -> list[int]:
    """The identities of all parameters and buffers that a module holds now."""
    parts = [vars(part) for _, part in _torch.plain_modules(module)]
    return [id(tensor) for held in parts for key in ("_parameters", "_buffers") for tensor in held[key].values()]


# ---- what a call reads ----------------------------------------------------------------------------------------------


@dataclass
class Reads:
    """What a call has read.

    Attributes:
        attributes: (identity of a module's `__dict__`, attribute), for every module attribute asked for.
        holders: that identity → the `__dict__`.
        codes: the code that ran, outside PyTorch and this library → its global variables.
        opened: whether such code looked at a module's `__dict__` as a whole.
    """

    attributes: set[tuple[int, str]] = field(default_factory=set)
    holders: dict[int, dict[str, Any]] = field(default_factory=dict)
    codes: dict[types.CodeType, dict[str, Any]] = field(default_factory=dict)
    opened: bool = False

    def roots(self, inside: set[int]) -> list[tuple[Any, str]]:
        """(mapping, key) of every global variable named, also in modules of Python, and attribute read of modules not `inside`."""
        found: dict[tuple[int, str], tuple[Any, str]] = {}
        for code, variables in self.codes.items():
            for name in code.co_names:
                value = variables.get(name)
                found[id(variables), name] = variables, name
                if isinstance(value, types.ModuleType) and value.__name__.partition(".")[0] not in FOREIGN:
                    held = vars(value)
                    found |= {(id(held), other): (held, other) for other in code.co_names if other in held}
        for holder, name in self.attributes:
            if holder not in inside and name not in TABLES:
                found[holder, name] = self.holders[holder], name
        return list(found.values())


@contextmanager
def watched_reads() -> Iterator[Reads]:
    """Yields what is read inside, filled in as it is; where a profiler runs already, which cannot be asked to wait, as if all were."""
    if sys.getprofile() is not None:
        yield Reads(opened=True)
        return
    reads, plain = Reads(), object.__getattribute__

    def watch(module: nn.Module, name: str) -> Any:
        held = plain(module, "__dict__")
        if name == "__dict__":
            reads.opened |= not sys._getframe(1).f_code.co_filename.startswith((TORCH_DIRECTORY, OWN_DIRECTORY))
        reads.holders[id(held)] = held
        reads.attributes.add((id(held), name))
        return plain(module, name)

    def profile(frame: Any, event: str, _: Any) -> None:
        if event == "call" and not _is_library((code := frame.f_code).co_filename):
            reads.codes[code] = frame.f_globals

    nn.Module.__getattribute__ = watch  # type: ignore[method-assign, assignment]
    sys.setprofile(profile)
    try:
        yield reads
    finally:
        sys.setprofile(None)
        del nn.Module.__getattribute__


STANDARD = os.path.join(os.path.dirname(os.__file__), "")
SYMPY = os.path.join(os.path.dirname(sympy.__file__), "")


@functools.cache
def _is_library(file: str) -> bool:
    """Whether code is of PyTorch, sympy, Python itself or this library: its global state is no model's."""
    standard = file.startswith((STANDARD, "<frozen ")) and "site-packages" not in file
    return standard or file.startswith((TORCH_DIRECTORY, OWN_DIRECTORY, SYMPY))
