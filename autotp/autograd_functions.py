"""Custom `torch.autograd.Function`s as operators of the program, each with its own backward.

An export runs a Function's forward operator by operator and forgets its backward: gradients would silently become those of the
forward. During a trace every call therefore becomes one opaque operator, and clean-up puts a `FunctionCall` in its place.
"""

from __future__ import annotations

import inspect
import linecache
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from autotp import _torch
from autotp.errors import AutotpError

__all__ = ["FunctionCall", "FunctionCalls"]

LITERALS = (bool, int, float, str, type(None), torch.dtype, torch.device)
"""Arguments that stand in the program as they are; other objects are held by the `FunctionCall`."""


@dataclass(frozen=True, eq=False)
class FunctionCall:
    """A custom autograd Function as the target of a node: called with the arguments of its `apply`, it gives its tensors.

    Attributes:
        function: the class.
        held: arguments that are neither tensors nor literals, by the text that stands for them in the node's arguments.
        differentiable: per output tensor, whether it can carry a gradient.
        random: whether its forward draws random numbers.

    The program spells the operator `module.Class`; a rule may be registered for it.
    """

    function: type[torch.autograd.Function]
    held: Mapping[str, Any]
    differentiable: tuple[bool, ...]
    random: bool

    def __post_init__(self) -> None:
        """Show the names of the class where those of a function are asked for."""
        for name in ("__module__", "__name__", "__qualname__"):
            object.__setattr__(self, name, getattr(self.function, name))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The output tensors of one call: a tuple, or the tensor itself if there is one."""
        if self.held:
            args, kwargs = _torch.tree_map_only(str, lambda leaf: self.held.get(leaf, leaf), (args, kwargs))
        tensors = tuple(leaf for leaf in _torch.tree_flatten(self.function.apply(*args, **kwargs))[0] if isinstance(leaf, Tensor))
        return tensors[0] if len(tensors) == 1 else tensors


@dataclass(frozen=True)
class _Recorded:
    """One call in the export: its target, and the arguments with the place of every tensor and symbolic size."""

    target: FunctionCall
    spec: Any
    leaves: tuple[Any, ...]

    def arguments(self, tensors: list[Any], sizes: list[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments of `apply`, with these in the places of tensors and symbolic sizes."""
        given = {Tensor: iter(tensors), torch.SymInt: iter(sizes)}
        leaves = [next(given[leaf]) if isinstance(leaf, type) and leaf in given else leaf for leaf in self.leaves]
        args, kwargs = _torch.tree_unflatten(leaves, self.spec)
        return tuple(args), kwargs


@dataclass
class FunctionCalls:
    """The Functions that one trace met: as a context around exports, it makes operators of their calls.

    Attributes:
        calls: operator of the export → what it stands for.
        inlined: sentences about Functions that are not kept, since they read tensors that are not among their arguments.
        targets: one target for equal calls; held: what they hold, by the text that stands for it.
    """

    calls: dict[Any, _Recorded] = field(default_factory=dict)
    inlined: dict[str, None] = field(default_factory=dict)
    targets: dict[Any, FunctionCall] = field(default_factory=dict)
    held: dict[str, Any] = field(default_factory=dict)

    def call_of(self, target: Any, args: tuple[Any, ...]) -> tuple[Any, tuple[Any, ...], dict[str, Any]] | None:
        """(target, args, kwargs) in the program for an operator of the export; None for operators that are no Function."""
        recorded = self.calls.get(target)
        return None if recorded is None else (recorded.target, *recorded.arguments(*args))

    @contextmanager
    def intercepted(self) -> Iterator[None]:
        """Inside, `Function.apply` on traced tensors appends one operator to the graph."""
        original = torch.autograd.Function.__dict__["apply"]
        inside = False

        def apply(cls: type[torch.autograd.Function], *args: Any, **kwargs: Any) -> Any:
            nonlocal inside
            eager: Callable[..., Any] = original.__get__(None, cls)
            leaves, spec = _torch.tree_flatten((args, kwargs))
            if inside or cls.__module__.startswith("torch.") or not _torch.is_traced(leaves):
                return eager(*args, **kwargs)
            inside = True
            try:
                return self._recorded(cls, eager, leaves, spec, library, sys._getframe(1))
            finally:
                inside = False

        with _torch.operator_library() as library:
            torch.autograd.Function.apply = classmethod(apply)  # type: ignore[assignment, method-assign]
            try:
                yield
            finally:
                torch.autograd.Function.apply = original  # type: ignore[method-assign]

    def _recorded(self, cls: Any, eager: Callable[..., Any], leaves: list[Any], spec: Any, library: Any, frame: Any) -> Any:
        """Run the forward outside the graph to learn its outputs, then append one operator that gives such."""
        name = f"the autograd.Function `{cls.__name__}` ({_place(frame)})"
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        with _torch.untraced():
            plain = [leaf.detach().requires_grad_(leaf.is_floating_point() or leaf.is_complex()) for leaf in tensors]
        given = iter(plain)
        args, kwargs = _torch.tree_unflatten([next(given) if isinstance(leaf, Tensor) else leaf for leaf in leaves], spec)
        versions = [tensor._version for tensor in plain]
        watch = _torch.OperandWatch(plain)
        try:
            with _torch.untraced(), torch.enable_grad(), watch:
                result = eager(*args, **kwargs)
        except Exception as error:
            reason = str(error).strip().partition("\n")[0].rstrip(".")
            raise AutotpError(
                f"{name} cannot run on tensors without values ({type(error).__name__}: {reason}); define it as a "
                "torch.library.custom_op with register_fake and register_autograd instead."
            ) from error
        if versions != [tensor._version for tensor in plain]:
            raise AutotpError(f"{name} writes to its input, which a trace cannot keep; return a new tensor instead.")
        if watch.foreign:
            self.inlined.setdefault(
                f"{name[0].upper()}{name[1:]} reads tensors that are not among its arguments: its gradients are those of its "
                "forward, not of its own backward; pass such tensors to apply() to keep that."
            )
            args, kwargs = _torch.tree_unflatten(leaves, spec)
            return eager(*args, **kwargs)
        found, shape = _torch.tree_flatten(result)
        outputs = [leaf for leaf in found if isinstance(leaf, Tensor)]
        if not outputs:
            return result
        target, places = self._target(cls, leaves, outputs, watch.random, name)
        operator = _torch.define_operator(library, len(self.calls), outputs)
        self.calls[operator] = _Recorded(target, spec, places)
        made = iter(operator(tensors, [leaf for leaf in leaves if isinstance(leaf, torch.SymInt)]))
        return _torch.tree_unflatten([next(made) if isinstance(leaf, Tensor) else leaf for leaf in found], shape)

    def _target(
        self, cls: Any, leaves: list[Any], outputs: list[Tensor], random: bool, name: str
    ) -> tuple[FunctionCall, tuple[Any, ...]]:
        """The target of a call, one object for equal ones, and the call's leaves as the program shows them."""
        held: dict[str, Any] = {}
        places: list[Any] = []
        for leaf in leaves:
            if isinstance(leaf, (Tensor, torch.SymInt)):
                places.append(Tensor if isinstance(leaf, Tensor) else torch.SymInt)
            elif isinstance(leaf, (torch.SymFloat, torch.SymBool)):
                raise AutotpError(f"{name} is given a number computed from sizes; pass the size itself, or plain numbers.")
            elif isinstance(leaf, LITERALS):
                places.append(leaf)
            else:
                text = next((text for text, other in self.held.items() if other is leaf), f"<object {len(self.held)}>")
                self.held[text] = held[text] = leaf
                places.append(text)
        differentiable = tuple(output.requires_grad for output in outputs)
        key = (cls, *held, differentiable, random)
        if key not in self.targets:
            self.targets[key] = FunctionCall(cls, held, differentiable, random)
        return self.targets[key], tuple(places)


def _place(frame: Any) -> str:
    """`file:line` of the call, and its code."""
    file, line = inspect.getsourcefile(frame.f_code) or frame.f_code.co_filename, frame.f_lineno
    code = linecache.getline(file, line).strip()
    return f"{file}:{line}" + (f", `{code}`" if code else "")
