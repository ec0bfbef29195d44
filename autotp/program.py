"""A traced model as frozen data: what every later pass reads.

A `Program` is a list of `Node`s in execution order. Every node is a parameter, a buffer, a constant, a user input, or a pure
operator. Views of sizes are gone: a symbolic size (a batch or sequence length that may change between calls) stands in the
arguments as a sympy expression over the sizes of the inputs, so no node produces a number.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, TypeAlias

import sympy
import torch

Size: TypeAlias = int | sympy.Expr
"""A global size: a plain int, or an expression over input sizes when the dimension is dynamic."""


@dataclass(frozen=True)
class TensorType:
    """Shape, dtype and differentiability of one tensor.

    `shape` holds global sizes and `hint` the same sizes as plain ints, as they were in the traced example.
    """

    shape: tuple[Size, ...]
    hint: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool

    @cached_property
    def numel(self) -> int:
        """Number of elements at the traced sizes."""
        total = 1
        for size in self.hint:
            total *= size
        return total

    @property
    def bytes(self) -> int:
        """Bytes of the whole tensor at the traced sizes."""
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class Ref:
    """The `output`-th tensor that node number `node` produces."""

    node: int
    output: int = 0


@dataclass(frozen=True)
class Node:
    """One step of the program.

    `args`/`kwargs` are those of `target`, with every tensor replaced by a `Ref` and every dynamic size by a sympy expression.
    For kinds other than "op", `target` is the parameter, buffer, constant or input name.
    """

    index: int
    name: str
    kind: Literal["parameter", "buffer", "constant", "input", "op"]
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[TensorType, ...]
    path: str = ""
    """Path of the module that ran this operator, e.g. `model.layers.0.mlp.up_proj`."""
    source: str = ""
    """`file:line` of the user's code that called it."""

    @property
    def op(self) -> str:
        """The operator's name as rules spell it, e.g. `aten.linear.default`."""
        return op_name(self.target) if self.kind == "op" else self.kind

    @cached_property
    def inputs(self) -> tuple[Ref, ...]:
        """Every tensor operand, in order of appearance in args, then kwargs (duplicates kept)."""
        found: list[Ref] = []
        collect_refs((self.args, self.kwargs), found)
        return tuple(found)


def op_name(target: Any) -> str:
    """`aten.add.Tensor` for `torch.ops.aten.add.Tensor`; `module.function` for a plain Python function."""
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    return f"{getattr(target, '__module__', '')}.{getattr(target, '__name__', target)}"


def collect_refs(tree: Any, found: list[Ref]) -> None:
    """Append every `Ref` in nested tuples, lists and dicts to `found`, in order."""
    if isinstance(tree, Ref):
        found.append(tree)
    elif isinstance(tree, (tuple, list)):
        for item in tree:
            collect_refs(item, found)
    elif isinstance(tree, dict):
        for item in tree.values():
            collect_refs(item, found)


def map_refs(tree: Any, fn: Any) -> Any:
    """The same nested structure with `fn` applied to every `Ref` and sympy expression; other leaves unchanged."""
    if isinstance(tree, (Ref, sympy.Expr)):
        return fn(tree)
    if isinstance(tree, tuple):
        return tuple(map_refs(item, fn) for item in tree)
    if isinstance(tree, list):
        return [map_refs(item, fn) for item in tree]
    if isinstance(tree, dict):
        return {key: map_refs(item, fn) for key, item in tree.items()}
    return tree


@dataclass(frozen=True)
class InputSize:
    """Where a symbolic size is read from at run time: dimension `dim` of the tensor of input node `node`."""

    node: int
    dim: int


@dataclass(frozen=True)
class Program:
    """A cleaned-up trace of a model.

    Attributes:
        nodes: execution order; parameters, buffers, constants and inputs first.
        outputs: the flattened outputs: `Ref`s, or constants (None, numbers) as they were.
        updates: (buffer name, new value) for every buffer that the forward changes.
        in_spec, out_spec: `torch.utils._pytree` specs of `(args, kwargs)` and of the output.
        in_names: the flattened inputs' names, one for each leaf of `in_spec` (e.g. `input_ids`, `kwargs.mask`).
        in_constants: leaf position → the value baked in by the trace, for inputs that are not tensors.
        symbols: symbolic size → where it is read from.
        ranges: symbolic size → (least, greatest) value that the trace allows; greatest may be None.
        aliases: every parameter or buffer name that is a second name of a tied tensor → its first name.
        persistent: names of buffers that belong to the `state_dict`.
        constants: constant name → its tensor (lifted from the model's code).
        notes: sentences about what tracing changed or assumed, for the user.
    """

    nodes: tuple[Node, ...]
    outputs: tuple[Any, ...]
    updates: tuple[tuple[str, Ref], ...]
    in_spec: Any
    out_spec: Any
    in_names: tuple[str, ...]
    in_constants: dict[int, Any]
    symbols: dict[sympy.Symbol, InputSize]
    ranges: dict[sympy.Symbol, tuple[int, int | None]]
    aliases: dict[str, str]
    persistent: frozenset[str]
    constants: dict[str, torch.Tensor]
    notes: tuple[str, ...] = field(default=())

    def type_of(self, ref: Ref) -> TensorType:
        """The type of the tensor that `ref` names."""
        return self.nodes[ref.node].outputs[ref.output]

    @cached_property
    def by_name(self) -> dict[str, Node]:
        """Node name → node."""
        return {node.name: node for node in self.nodes}

    @cached_property
    def updated(self) -> dict[int, Ref]:
        """Buffer that the forward changes (its node) → its new value."""
        values = dict(self.updates)
        return {node.index: values[node.target] for node in self.nodes if node.kind == "buffer" and node.target in values}

    @cached_property
    def outgoing(self) -> frozenset[Ref]:
        """Tensors that leave the program: outputs and new values of buffers."""
        return frozenset([value for value in self.outputs if isinstance(value, Ref)] + [ref for _, ref in self.updates])

    @cached_property
    def users(self) -> dict[Ref, tuple[tuple[int, int], ...]]:
        """Tensor → its consumers as (node index, operand position in that node's `inputs`)."""
        users: dict[Ref, list[tuple[int, int]]] = {}
        for node in self.nodes:
            for position, ref in enumerate(node.inputs):
                users.setdefault(ref, []).append((node.index, position))
        return {ref: tuple(found) for ref, found in users.items()}
