"""Tensors of a repeated block that are not kept for backward, but made again there.

While a block runs, autograd hands every tensor that it wants to save to a hook. If a marked call made the tensor (or the memory that it is
a view of), the hook gives autograd a promise instead: the call, and what it was called with, held in the same way. A promise is kept when
backward asks for it, with all promises that it rests on; it then forgets what it was made of. So reference counts alone decide how long a
tensor lives: one that is made again as long as something may ask for it, an operand as long as a promise may need it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property, partial
from typing import Any, Protocol, Self

import torch
from torch import Tensor, fx, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.fx import GraphModule

from autotp import _torch
from autotp.errors import AutotpError
from autotp.runtime.function import BINDINGS, plain_function
from autotp.runtime.random import RandomCall

Pick = Callable[[Any], Sequence[Any]]
"""From the results of a call to those that are not kept, in a fixed order."""
Context = Callable[[], AbstractContextManager[Any]]


class Recomputing(nn.Module):
    """A block whose marked calls are made again in backward.

    Without gradients it is the block itself, and under `torch.compile` too: there Inductor decides what is kept.

    Args:
        body: the block.
        marked: the name of each marked call in `body.graph`, with the numbers of those of its results that are not kept (0 if it has one).
            What autograd wants to save of such a call beside its results (a dropout mask, attention's log-sum-exp) is not kept either.
    """

    def __init__(self, body: GraphModule, marked: Mapping[str, frozenset[int]]) -> None:
        super().__init__()
        self.body, self.marked = body, dict(marked)

    def forward(self, *args: Any) -> Any:
        """What the block returns."""
        if torch.compiler.is_compiling():
            return self.body(*args)
        if not torch.is_grad_enabled():
            return self._plain(*args)
        function, calls = self._remembering
        with Recomputation(args, calls) as recomputation:
            return function(recomputation, *args)

    @cached_property
    def _plain(self) -> Callable[..., Any]:
        return plain_function(self.body)

    @cached_property
    def _remembering(self) -> tuple[Callable[..., Any], list[tuple[Any, Pick]]]:
        """The body as a function whose first argument, a `Recomputation`, makes the marked calls; and these."""
        graph, calls = fx.Graph(), list[tuple[Any, Pick]]()
        made: dict[fx.Node, fx.Node] = {}
        recomputation = graph.placeholder("recomputation")
        for node in self.body.graph.nodes:
            if node.name not in self.marked:
                made[node] = graph.node_copy(node, made.__getitem__)
                continue
            args, kwargs = fx.map_arg(node.args, made.__getitem__), fx.map_arg(node.kwargs, made.__getitem__)
            made[node] = graph.call_method("call_number", (recomputation, len(calls), *args), kwargs)  # type: ignore[misc]
            calls.append((self._function(node), partial(picked, self.marked[node.name])))
        return plain_function(GraphModule(self.body, graph)), calls

    def _function(self, node: fx.Node) -> Any:
        if node.op == "call_module":
            module = self.body.get_submodule(str(node.target))
            return module if isinstance(module, RandomCall) else module.forward
        return BINDINGS.get(node.target, node.target)

    def extra_repr(self) -> str:
        """How many calls are made again."""
        return f"{len(self.marked)} calls made again in backward"


def picked(places: frozenset[int], results: Any) -> list[Any]:
    """Some of the results of a call, by their numbers."""
    listed = results if isinstance(results, (tuple, list)) else (results,)
    return [listed[place] for place in sorted(places)]


class _Promise(Protocol):
    """What stands for a tensor that autograd or a call needs later."""

    requires_grad: bool

    def tensor(self) -> Tensor:
        """The tensor, without its history."""


class Recomputation:
    """One run of a block: a context in which autograd saves promises in place of what the marked calls make.

    What is kept goes through the saved-tensor hooks around it, if there are any (`torch.autograd.graph.save_on_cpu`).
    """

    def __init__(self, args: Sequence[Any], calls: Sequence[tuple[Any, Pick]] = ()) -> None:
        self.calls, self.count = calls, 0
        self.outer = _torch.saved_tensor_hooks()
        self.made: dict[int, tuple[_Remade, weakref.ref[Any]]] = {}
        """Memory that a marked call made, while it lives; a new tensor may later lie at the same address."""
        self.running: tuple[_Call, set[int]] | None = None
        self.autocast = _autocast(next((arg.device.type for arg in args if isinstance(arg, Tensor)), "cpu"))
        self.hooks: saved_tensors_hooks | None = None

    def __enter__(self) -> Self:
        self.hooks = saved_tensors_hooks(self.pack, _unpacked)
        self.hooks.__enter__()
        return self

    def __exit__(self, *_: Any) -> None:
        assert self.hooks is not None
        self.hooks.__exit__()
        self.hooks = None
        self.made.clear()

    def call_number(self, number: int, /, *args: Any, **kwargs: Any) -> Any:
        """Run the marked call of this number."""
        function, pick = self.calls[number]
        return self.call(function.drawn() if isinstance(function, RandomCall) else function, pick, args, kwargs)

    def call(self, function: Callable[..., Any], pick: Pick, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a function whose picked results are not kept. It must give the same whenever it is called with the same."""
        operands = set[int]()

        def hold(tensor: Tensor) -> _Promise:
            operands.add(_key(tensor))
            return self.pack(tensor)

        held_args, held_kwargs = _mapped((args, kwargs), Tensor, hold)
        call = _Call(self.count, function, pick, held_args, held_kwargs, self.autocast)
        self.count += 1
        self.running = call, operands
        try:
            results = function(*args, **kwargs)
        finally:
            self.running = None
        for place, tensor in enumerate(pick(results)):
            key = _key(tensor)
            if key and key not in operands and key not in self.made:
                self.made[key] = call.result(place, tensor.requires_grad), self._watch(tensor, key)
        return results

    def _watch(self, tensor: Tensor, key: int) -> weakref.ref[Any]:
        made = self.made
        return weakref.ref(tensor.untyped_storage(), lambda _: made.pop(key, None))

    def pack(self, tensor: Tensor) -> _Promise:
        """What is held of a tensor that is needed in backward."""
        key = _key(tensor)
        if self.running is not None:
            call, operands = self.running
            place, call.saved = call.saved, call.saved + 1
            if key and key not in operands and key not in self.made:
                return call.save(place)
        if key in self.made:
            return _View(self.made[key][0], tensor)
        return _Kept(tensor, self.outer)


def _unpacked(promise: _Promise) -> Tensor:
    return promise.tensor()


class _Kept:
    """A tensor that is kept."""

    __slots__ = ("packed", "requires_grad", "unpack", "version")

    def __init__(self, tensor: Tensor, outer: tuple[Callable[..., Any], Callable[..., Any]] | None) -> None:
        self.requires_grad = tensor.requires_grad
        self.packed: Any = tensor.detach()  # with its history it would be part of a cycle
        self.unpack = self.version = None
        if outer is not None:
            self.packed, self.unpack = outer[0](self.packed), outer[1]
        elif not tensor.is_inference():
            self.version = tensor._version

    def tensor(self) -> Tensor:
        """The tensor.

        Raises:
            AutotpError: it was changed after it was packed.
        """
        if self.unpack is not None:
            unpacked: Tensor = self.unpack(self.packed)
            return unpacked
        if self.version is not None and self.packed._version != self.version:
            raise AutotpError(
                f"a {self.packed.dtype} tensor of shape {tuple(self.packed.shape)} that backward needs was changed in place after the "
                f"forward; call backward() before the parameters or inputs are changed"
            )
        kept: Tensor = self.packed
        return kept


class _Remade:
    """A tensor that is made when it is asked for, and there until nobody can ask any more."""

    __slots__ = ("__weakref__", "call", "requires_grad", "value")

    def __init__(self, call: _Call, requires_grad: bool) -> None:
        self.call: _Call | None = call
        self.value: Tensor | None = None
        self.requires_grad = requires_grad

    def tensor(self) -> Tensor:
        """The tensor; all calls that it rests on run first, in the order of the forward, on every rank alike."""
        if self.value is not None:
            return self.value
        pending: dict[int, _Call] = {}
        stack = [self.call]
        while stack:
            call = stack.pop()
            if call is not None and call.number not in pending:
                pending[call.number] = call
                stack += [remade.call for remade in call.needs]
        stack.clear()
        for number in sorted(pending):
            pending.pop(number).run()
        assert self.value is not None
        return self.value

    def fill(self, value: Tensor) -> None:
        """Here it is."""
        self.value, self.call = value.detach(), None


class _View:
    """A tensor on the memory of one that is made again; usually just that one."""

    __slots__ = ("dtype", "of", "offset", "requires_grad", "shape", "stride")

    def __init__(self, of: _Remade, tensor: Tensor) -> None:
        self.of, self.requires_grad = of, tensor.requires_grad
        self.shape, self.stride, self.offset, self.dtype = tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype

    def tensor(self) -> Tensor:
        """The view of the tensor made again, whose memory is laid out as it was."""
        base = self.of.tensor()
        if (base.shape, base.stride(), base.storage_offset(), base.dtype) == (self.shape, self.stride, self.offset, self.dtype):
            return base
        with torch.no_grad():
            return base.new_empty(0, dtype=self.dtype).set_(base.untyped_storage(), self.offset, self.shape, self.stride)


class _Call:
    """A call that may have to be made again: it holds its operands, those who want its results hold it."""

    __slots__ = ("args", "autocast", "function", "kwargs", "needs", "number", "pick", "results", "saved", "saves")

    def __init__(
        self, number: int, function: Callable[..., Any], pick: Pick, args: Any, kwargs: Any, autocast: Context
    ) -> None:
        self.number, self.function, self.pick, self.autocast = number, function, pick, autocast
        self.args, self.kwargs = args, kwargs
        self.needs: list[_Remade] = []
        _mapped((args, kwargs), _View, lambda view: self.needs.append(view.of))
        self.results: dict[int, weakref.ref[_Remade]] = {}
        self.saves: dict[int, weakref.ref[_Remade]] = {}
        self.saved = 0

    def result(self, place: int, requires_grad: bool) -> _Remade:
        """Stands for a picked result."""
        remade = _Remade(self, requires_grad)
        self.results[place] = weakref.ref(remade)
        return remade

    def save(self, place: int) -> _Remade:
        """Stands for a tensor that autograd saves while the call runs, by its number among these."""
        remade = _Remade(self, False)
        self.saves[place] = weakref.ref(remade)
        return remade

    def run(self) -> None:
        """Make the call again, and give its results to all who wait for them."""
        kinds = (_Kept, _View)
        with self.autocast():
            if any(wanted() is not None for wanted in self.saves.values()):
                args, kwargs = _mapped((self.args, self.kwargs), kinds, _differentiable)
                count = 0

                def keep(tensor: Tensor) -> None:
                    nonlocal count
                    waiting = self.saves.get(count, _nobody)()
                    count += 1
                    if waiting is not None:
                        waiting.fill(tensor)

                with torch.enable_grad(), saved_tensors_hooks(keep, _unpacked):
                    results = self.function(*args, **kwargs)
            else:
                args, kwargs = _mapped((self.args, self.kwargs), kinds, _unpacked)
                with torch.no_grad():
                    results = self.function(*args, **kwargs)
        for place, tensor in enumerate(self.pick(results)):
            waiting = self.results.get(place, _nobody)()
            if waiting is not None:
                waiting.fill(tensor)
        self.args = self.kwargs = None
        self.needs.clear()


def _autocast(device: str) -> Context:
    """Brings back the autocast of this moment, which does not reach backward."""
    if not torch.amp.is_autocast_available(device):
        return nullcontext
    return partial(torch.autocast, device, dtype=torch.get_autocast_dtype(device), enabled=torch.is_autocast_enabled(device))


def _nobody() -> None:
    """A reference to nobody who waits."""


def _differentiable(promise: _Promise) -> Tensor:
    """The tensor as a leaf of a graph of its own."""
    tensor = promise.tensor().detach()
    return tensor.requires_grad_() if promise.requires_grad else tensor


def _key(tensor: Any) -> int:
    """Says which memory a tensor lies on; 0 where a view could not be made again from that memory alone."""
    if not isinstance(tensor, Tensor) or tensor.layout is not torch.strided or tensor.is_conj() or tensor.is_neg():
        return 0
    return _torch.storage_key(tensor)


def _mapped(tree: Any, kinds: Any, change: Callable[[Any], Any]) -> Any:
    """Arguments with every leaf of some kinds changed."""
    if isinstance(tree, kinds):
        return change(tree)
    if isinstance(tree, (tuple, list)):
        return (list if isinstance(tree, list) else tuple)(_mapped(item, kinds, change) for item in tree)
    if isinstance(tree, dict):
        return {key: _mapped(item, kinds, change) for key, item in tree.items()}
    return tree
