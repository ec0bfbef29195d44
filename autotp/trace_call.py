"""One call of a block while its model is exported: what it is given, which nodes it appends, and whether two calls append the same."""

from __future__ import annotations

import operator
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import fx, nn

from autotp import _torch
from autotp.autograd_functions import FunctionCalls
from autotp.expand import split_at
from autotp.functional import is_write, memory, site_of, written
from autotp.trace_state import attributes, described, held_tensors, tensor_type

PROXY_SIDE = frozenset({torch._C._set_grad_enabled, torch.amp.autocast_mode._enter_autocast, torch.amp.autocast_mode._exit_autocast})
"""What a graph under construction holds besides operators."""


class Peculiar(Exception):
    """Something by which a block cannot be repeated."""


@dataclass(frozen=True)
class Body:
    """The traced nodes of one call.

    Attributes:
        name: the module's path.
        operands: the nodes of the tensors among the call's arguments.
        steps: the nodes that give tensors, in order.
        owned: the nodes of the module's parameters and buffers, in order.
        made: the tensors among the outputs that are new, each once; news: their nodes.
        results: per leaf of the output ("made" or "given", number of the tensor) or ("plain", value); spec: its structure.
    """

    name: str
    operands: list[fx.Node]
    steps: list[fx.Node]
    owned: list[fx.Node | None]
    made: list[torch.Tensor]
    news: list[fx.Node | None]
    results: list[tuple[str, Any]]
    spec: Any


def all_tensors(model: nn.Module) -> Iterator[torch.Tensor]:
    """Every parameter and buffer, once for each place that it has."""
    for _, part in _torch.plain_modules(model):
        for key in ("_parameters", "_buffers"):
            yield from (tensor for tensor in vars(part)[key].values() if tensor is not None)


class Call:
    """One call of a module while an export is under way."""

    def __init__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Describe the call before it runs.

        Raises:
            Unknown, Peculiar, LookupError: it cannot be described; nothing is being traced, or not as in training.
        """
        self.module = module
        self.given = args, kwargs
        self.recording = _torch.Recording()
        self.surroundings = _torch.surroundings()
        if not self.surroundings[0] or self.surroundings[1]:
            raise Peculiar  # no gradients, or autocast
        self.held = attributes(module)
        leaves, _ = _torch.tree_flatten(self.given)
        self.tensors = list({id(leaf): leaf for leaf in leaves if isinstance(leaf, torch.Tensor)}.values())
        nodes = [self.recording.node(tensor) for tensor in self.tensors]
        if not nodes or None in nodes:
            raise Peculiar
        self.operands: list[fx.Node] = [node for node in nodes if node is not None]
        if len(set(self.operands)) < len(self.operands) or set(self.operands) & set(self.owned()):
            raise Peculiar
        self.signature = self._signature(), self.surroundings

    def _signature(self) -> Any:
        """What a call can tell about its arguments: their structure, types, which of them are or share the same, other values."""
        leaves, spec = _torch.tree_flatten(self.given)
        numbers = {id(tensor): number for number, tensor in enumerate(self.tensors)}
        memory: dict[int, int] = {}
        seen: dict[int, tuple[int, Any]] = {}
        found: list[Any] = []
        for leaf in leaves:
            if isinstance(leaf, torch.Tensor):
                found.append((numbers[id(leaf)], tensor_type(leaf), memory.setdefault(_torch.storage_key(leaf), len(memory))))
            else:
                found.append(described(leaf, seen))
        return found, spec

    def state(self) -> list[torch.Tensor]:
        """The module's parameters and buffers."""
        return list(all_tensors(self.module))

    def owned(self) -> list[fx.Node | None]:
        """The nodes of the module's parameters and buffers."""
        return [self.recording.node(tensor) for tensor in self.state()]

    def run(self, run: Callable[..., Any]) -> Any:
        """Trace it."""
        self.start = self.recording.last()
        self.random = _random_state()
        self.tensors_held, self.nodes_held = held_tensors(self.module), self.owned()
        args, kwargs = self.given
        return run(*args, **kwargs)

    def new_nodes(self) -> list[fx.Node]:
        """What it appended to the graph."""
        nodes, node = [], self.start.next
        while node.op != "root":
            nodes.append(node)
            node = node.next
        return nodes

    def check_writes(self, steps: Sequence[fx.Node]) -> None:
        """Raises Peculiar if a step writes to memory that is neither made by the call nor a buffer of the module."""
        buffers = {_torch.storage_key(tensor) for tensor in self.state() if not isinstance(tensor, nn.Parameter)}
        inside = set(steps)
        outside = {key for node in steps for item in node.all_input_nodes if item not in inside for key in memory(item)} - buffers
        if any(key in outside for node in steps if is_write(node) for item in written(node) for key in memory(item)):
            raise Peculiar

    def check_unchanged(self) -> None:
        """Raises Peculiar if the call has changed what it was given, its module's attributes, or how PyTorch works."""
        same = (
            self._signature() == self.signature[0]
            and attributes(self.module) == self.held
            and held_tensors(self.module) == self.tensors_held
            and _torch.surroundings() == self.surroundings
            and _random_state() == self.random
        )
        if not same:
            raise Peculiar


def _random_state() -> Any:
    """The state of Python's and numpy's global generators."""
    kind, words, *rest = numpy.random.get_state()
    return random.getstate(), kind, words.tobytes(), rest  # type: ignore[attr-defined]


def is_number(node: fx.Node) -> bool:
    """Whether a node gives a size or another number, or nothing: the same for all copies of a block."""
    value = node.meta.get("val")
    return not isinstance(value, (torch.Tensor, tuple, list))


def is_step(node: fx.Node) -> bool:
    """Whether a node of a body gives tensors.

    Raises:
        Peculiar: a copy of it would not do.
    """
    target: Any = node.target
    if node.op != "call_function":
        raise Peculiar
    if is_number(node):
        tensors = any(not is_number(operand) for operand in node.all_input_nodes)
        if target in PROXY_SIDE or not tensors:
            return False
        if isinstance(target, torch._ops.OpOverload) and (target._schema.name.startswith("aten::sym_") or not target._schema.returns):
            return False
        raise Peculiar  # a number that depends on values
    if target is not operator.getitem and not isinstance(target, torch._ops.OpOverload):
        raise Peculiar
    return True


# ---- are two bodies the same? ---------------------------------------------------------------------------------------


def same_body(one: Body, other: Body, functions: FunctionCalls) -> bool:
    """Whether two traced calls have the same nodes, each with its own operands, parameters and buffers."""
    results = [[(kind, type(value), _torch.expression(value)) for kind, value in body.results] for body in (one, other)]
    if len(one.steps) != len(other.steps) or results[0] != results[1] or one.spec != other.spec:
        return False
    if list(map(tensor_type, one.made)) != list(map(tensor_type, other.made)) or len(one.owned) != len(other.owned):
        return False
    lists: list[tuple[Sequence[Any], Sequence[Any]]] = [(one.operands, other.operands), (one.owned, other.owned), (one.steps, other.steps)]
    counterpart = {first: second for ours, theirs in lists for first, second in zip(ours, theirs, strict=True)}
    if [counterpart.get(node) for node in one.news] != other.news:
        return False
    return all(
        _target(first, functions) == _target(second, functions)
        and _same_arguments((first.args, first.kwargs), (second.args, second.kwargs), counterpart)
        and _value(first) == _value(second)
        and _place(first, one.name) == _place(second, other.name)
        for first, second in zip(one.steps, other.steps, strict=True)
    )


def _target(node: fx.Node, functions: FunctionCalls) -> Any:
    return functions.calls.get(node.target, node.target)


def _same_arguments(one: Any, other: Any, counterpart: Mapping[Any, fx.Node | None]) -> bool:
    if isinstance(one, fx.Node):
        if not isinstance(other, fx.Node):
            return False
        if is_number(one):
            return is_number(other) and bool(_torch.expression(one.meta.get("val")) == _torch.expression(other.meta.get("val")))
        return counterpart.get(one, one) is other
    if type(one) is not type(other):
        return False
    if isinstance(one, (tuple, list)):
        return len(one) == len(other) and all(_same_arguments(a, b, counterpart) for a, b in zip(one, other, strict=True))
    if isinstance(one, dict):
        return list(one) == list(other) and all(_same_arguments(one[key], other[key], counterpart) for key in one)
    if isinstance(one, slice):
        return _same_arguments((one.start, one.stop, one.step), (other.start, other.stop, other.step), counterpart)
    return repr(one) == repr(other) if isinstance(one, float) else bool(one == other)


def _value(node: fx.Node) -> Any:
    value = node.meta["val"]
    several = value if isinstance(value, (tuple, list)) else (value,)
    return type(value), [tensor_type(item)[1:7] if isinstance(item, torch.Tensor) else item for item in several]


def _place(node: fx.Node, name: str) -> Any:
    """Where in the block's code and modules a node comes from."""
    path, _ = site_of(node)
    inner = path.removeprefix("_export_root").lstrip(".")
    text = node.meta.get("stack_trace") or ""
    return inner.removeprefix(name) if f"{inner}.".startswith(f"{name}.") else f"/{inner}", text[split_at(text) :]
