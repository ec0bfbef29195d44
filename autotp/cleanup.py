"""From an exported graph to a `Program`: pure operators, sizes as expressions, no no-ops.

`Builder` walks the graph once. Every value of the graph is kept as what it is in the program: a `Ref`, a tuple of them
(operators with several outputs), or a plain or symbolic number. `simplify.REWRITES` says which operators vanish or
become others.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterable, Mapping, Set
from typing import Any, Literal

import sympy
import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind

from autotp import _torch
from autotp.autograd_functions import FunctionCalls
from autotp.collector import Call
from autotp.composites import write_out
from autotp.errors import AutotpError
from autotp.expand import Cut, expand
from autotp.functional import inline_regions, make_functional, running_statistics, site_of, where
from autotp.grouping import group_by_key
from autotp.program import Node, Program, Ref, Size, TensorType, collect_refs, map_refs
from autotp.simplify import REWRITES, STOPS_GRADIENT
from autotp.sizes import Sizes

Kind = Literal["parameter", "buffer", "constant", "input", "op"]

KINDS: Mapping[InputKind, Kind] = {
    InputKind.PARAMETER: "parameter",
    InputKind.BUFFER: "buffer",
    InputKind.CONSTANT_TENSOR: "constant",
    InputKind.USER_INPUT: "input",
}


def to_program(
    exported: ExportedProgram,
    model: torch.nn.Module,
    leaves: list[Any],
    names: tuple[str, ...],
    functions: FunctionCalls | None = None,
    cut: Cut | None = None,
) -> Program:
    """Clean up an exported model.

    Args:
        exported: what `torch.export.export(model, ...)` gave, in the training IR. It is consumed: its graph may change.
        model: the exported model, for the names of its parameters and buffers, their ties and `requires_grad`.
        leaves: the flattened example inputs, in the order of `exported.call_spec.in_spec`.
        names: their names.
        functions: the custom autograd Functions among the operators.
        cut: what the export has cut short.

    Raises:
        Inexact: that cannot be undone exactly.
        AutotpError: a size that depends on tensor values, an operator that is not an ordinary one, a parameter that is
            overwritten.
    """
    write_out(exported.graph)
    inline_regions(exported.graph_module)
    if cut is not None and cut.calls:
        expand(exported, cut)
    exported, renamed = make_functional(exported)
    builder = Builder(exported, model, names, renamed, functions or FunctionCalls())
    builder.add_inputs(leaves)
    builder.add_left_out()
    for node in exported.graph.nodes:
        if node.op == "call_function":
            builder.add(node)
    return builder.finish()


def named_state(model: torch.nn.Module) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    """(name → first name of the same tensor, first name → tensor) for all parameters and buffers of a model."""
    first: dict[int, str] = {}
    aliases: dict[str, str] = {}
    state: dict[str, torch.Tensor] = {}
    parameters, buffers = model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
    for name, tensor in [*parameters, *buffers]:
        aliases[name] = first.setdefault(id(tensor), name)
        state.setdefault(aliases[name], tensor)
    return aliases, state


class Builder:
    """Collects the nodes of one `Program`. Used by `to_program` alone."""

    def __init__(
        self,
        exported: ExportedProgram,
        model: torch.nn.Module,
        names: tuple[str, ...],
        renamed: dict[fx.Node, list[fx.Node]] | None,
        functions: FunctionCalls,
    ) -> None:
        self.exported = exported
        self.functions = functions
        self.names = names
        self.renamed = renamed or {}
        self.merged: dict[Any, Any] | None = {} if renamed is None else None
        self.aliases, self.state = named_state(model)
        buffers = {name for name, _ in model.named_buffers(remove_duplicate=False)}
        self.persistent = frozenset(buffers.intersection(model.state_dict(keep_vars=True)))
        placeholders = [node for node in exported.graph.nodes if node.op == "placeholder"]
        self.inputs = list(zip(placeholders, exported.graph_signature.input_specs, strict=True))
        self.sizes = Sizes([node for node, spec in self.inputs if spec.kind is InputKind.USER_INPUT])
        self.types: dict[Any, TensorType] = {}
        self.nodes: list[Node] = []
        self.taken: set[str] = set()
        self.env: dict[fx.Node, Any] = {}
        self.input_index: dict[fx.Node, int] = {}
        self.in_constants: dict[int, Any] = {}
        self.notes: list[str] = []

    # Types

    def type_of(self, tensor: torch.Tensor, requires_grad: bool = False) -> TensorType:
        """The type of a traced tensor."""
        pairs = [(number, number) if type(number) is int else self.sizes.size(number) for number in tensor.shape]
        shape, hint = tuple(pair[0] for pair in pairs), tuple(pair[1] for pair in pairs)
        return self.intern(shape, hint, tensor.dtype, requires_grad)

    def intern(
        self, shape: tuple[Size, ...], hint: tuple[int, ...], dtype: torch.dtype, requires_grad: bool
    ) -> TensorType:
        """One `TensorType` object for equal types."""
        key = (shape, dtype, requires_grad)
        found = self.types.get(key)
        if found is None:
            self.types[key] = found = TensorType(shape, hint, dtype, requires_grad)
        return found

    def type(self, ref: Ref) -> TensorType:
        """The type of a collected tensor."""
        return self.nodes[ref.node].outputs[ref.output]

    # Nodes

    def append(
        self, name: str, kind: Kind, target: Any, outputs: tuple[TensorType, ...], call: Call | None = None
    ) -> int:
        """Append a node under a free name; returns its index."""
        base, number = name, 0
        while name in self.taken:
            number += 1
            name = f"{base}_{number}"
        self.taken.add(name)
        index = len(self.nodes)
        if call is None:
            self.nodes.append(Node(index, name, kind, target, (), {}, outputs))
        else:
            self.nodes.append(Node(index, name, kind, target, call.args, call.kwargs, outputs, call.path, call.source))
        return index

    def add_inputs(self, leaves: list[Any]) -> None:
        """Collect parameters, buffers, constants and user inputs."""
        known: dict[str, Ref] = {}
        position = 0
        for node, spec in self.inputs:
            kind = KINDS.get(spec.kind)
            target, needs_grad = self.aliases.get(str(spec.target), str(spec.target)), False
            if kind is None:
                raise AutotpError(f"the model holds `{target}`, which is not a tensor and cannot be split; remove it.")
            if kind == "input":
                target, leaf, position = self.names[position], leaves[position], position + 1
                if isinstance(spec.arg, ConstantArgument) or not isinstance(leaf, torch.Tensor):
                    self.in_constants[position - 1] = self.env[node] = leaf
                    continue
                needs_grad = leaf.requires_grad
                self.input_index[node] = len(self.nodes)
            elif kind != "constant":
                if target in known:
                    self.env[node] = known[target]
                    continue
                needs_grad = self.state[target].requires_grad
            self.env[node] = ref = Ref(
                self.append(node.name, kind, target, (self.type_of(node.meta["val"], needs_grad),))
            )
            if kind in ("parameter", "buffer"):
                known[target] = ref

    def add_left_out(self) -> None:
        """Collect the parameters and buffers that the export left out."""
        known = {node.target for node in self.nodes if node.kind in ("parameter", "buffer")}
        for name, tensor in self.state.items():
            if name not in known:
                kind: Kind = "parameter" if isinstance(tensor, torch.nn.Parameter) else "buffer"
                type_ = self.type_of(tensor, tensor.requires_grad)
                self.append(f"{kind[0]}_{name.replace('.', '_')}", kind, name, (type_,))

    def add(self, node: fx.Node) -> None:
        """Collect one operator of the graph."""
        value = node.meta.get("val")
        if node.target is operator.getitem and isinstance(node.args[0], fx.Node):
            source = self.env.get(node.args[0])
            if isinstance(source, (tuple, list)):
                self.env[node] = source[node.args[1]]  # type: ignore[index]
                return
        if not isinstance(value, (torch.Tensor, tuple, list)):
            self.env[node] = self.sizes.resolve(value)
            return
        target, aliases = node.target, self.renamed.get(node)
        if not isinstance(target, torch._ops.OpOverload):
            raise AutotpError(f"`{target}`{where(node)} is not a PyTorch operator; use ordinary tensor operations.")
        if aliases is not None:
            functional = _torch.functional_variant(target)
            assert functional is not None
            target = functional
        args, kwargs = tuple(self.convert(arg) for arg in node.args), self.convert(node.kwargs)
        target, args, kwargs = self.functions.call_of(target, args) or (target, args, kwargs)
        path, line = site_of(node)
        if not path and "nn_module_stack" not in node.meta:
            first = next((arg for arg in args if isinstance(arg, Ref)), None)
            path = self.nodes[first.node].path if first is not None else ""
        several = not isinstance(value, torch.Tensor)
        outputs = tuple(self.output(item) for item in (value if several else (value,)))
        device = value.device if isinstance(value, torch.Tensor) else None
        result = self.emit(Call(node.name, target, args, kwargs, outputs, several, path, line, device))
        if written := running_statistics(node):
            result, *statistics = result
            self.env.update(self.rebound(written, statistics))
        self.env[node] = result
        for alias in aliases or ():
            if alias in self.env:
                self.env[alias] = result

    def rebound(self, written: tuple[fx.Node, ...], values: list[Ref]) -> dict[fx.Node, Ref]:
        """What names tensors that an operator has updated on the side, and the inputs tied to them, from there on."""
        named = dict(zip(written, values, strict=True))
        tied = [(node, value) for item, value in named.items() for node, _ in self.inputs if self.env[node] == self.env[item]]
        return named | dict(tied)

    def output(self, value: Any) -> TensorType:
        """The type of an output before its gradient is known; of an empty tensor for an output that is no tensor."""
        return self.type_of(value) if isinstance(value, torch.Tensor) else self.intern((0,), (0,), torch.uint8, False)

    def convert(self, tree: Any) -> Any:
        """Arguments of the graph as arguments of the program."""
        if isinstance(tree, fx.Node):
            found = self.env[tree]
            return list(found) if type(found) is tuple else found
        if isinstance(tree, (list, tuple)):
            items = [self.convert(item) for item in tree]
            return items if isinstance(tree, list) else tuple(items)
        if isinstance(tree, dict):
            return {key: self.convert(item) for key, item in tree.items() if not _is_default(key, item)}
        return tree

    def emit(self, call: Call) -> Any:
        """Append an operator, simplified; returns a `Ref`, or a tuple of them for several outputs."""
        rewrite = REWRITES.get(call.target)
        if rewrite is not None:
            simpler = rewrite(self, call)
            if isinstance(simpler, (Ref, tuple)):
                return simpler
            call = simpler
        key = None
        if self.merged is not None and not _torch.is_random(call.target):
            key = (call.target, _freeze(call.args), _freeze(call.kwargs))
            if key in self.merged:
                return self.merged[key]
        outputs = call.outputs
        if call.target not in STOPS_GRADIENT and any(self.type(ref).requires_grad for ref in _refs(call)):
            can = getattr(call.target, "differentiable", [True] * len(outputs))
            outputs = tuple(self.with_gradient(out) if yes else out for out, yes in zip(outputs, can, strict=True))
        index = self.append(call.name, "op", call.target, outputs, call)
        result = tuple(Ref(index, output) for output in range(len(outputs))) if call.several else Ref(index)
        if self.merged is not None and key is not None:
            self.merged[key] = result
        return result

    def with_gradient(self, out: TensorType) -> TensorType:
        """The type that requires a gradient, if its dtype can have one."""
        return self.intern(out.shape, out.hint, out.dtype, out.dtype.is_floating_point or out.dtype.is_complex)

    # The end

    def finish(self) -> Program:
        """Read outputs and updates, drop dead nodes, number the rest."""
        outputs, updates = self.results()
        self.nodes = group_by_key(self.nodes)
        live = self.live([item for item in outputs if isinstance(item, Ref)] + [ref for _, ref in updates])
        self.check_sizes(live)
        order = self.order(live)
        number = {old: new for new, old in enumerate(order)}

        def renumber(leaf: Any) -> Any:
            return Ref(number[leaf.node], leaf.output) if isinstance(leaf, Ref) else leaf

        nodes = []
        calls = Counter(self.nodes[old].name for old in order if self.nodes[old].kind != "op")
        for new, old in enumerate(order):
            node = self.nodes[old]
            name = node.name
            if node.kind == "op":  # by operator and occurrence: a trace with symbolic sizes gives the same names as one without
                base = node.op.split(".")[1] if isinstance(node.target, torch._ops.OpOverload) else node.target.__name__
                name, calls[base] = f"{base}_{calls[base]}" if calls[base] else base, calls[base] + 1
            args, kwargs = map_refs(node.args, renumber), map_refs(node.kwargs, renumber)
            nodes.append(
                Node(new, name, node.kind, node.target, args, kwargs, node.outputs, node.path, node.source)
            )
        return Program(
            nodes=tuple(nodes),
            outputs=tuple(renumber(item) for item in outputs),
            updates=tuple((name, renumber(ref)) for name, ref in updates),
            in_spec=self.exported.call_spec.in_spec,
            out_spec=self.exported.call_spec.out_spec,
            in_names=self.names,
            in_constants=self.in_constants,
            symbols=self.sizes.symbols({node: number[index] for node, index in self.input_index.items()}),
            ranges=self.sizes.ranges(self.exported.range_constraints),
            aliases={alias: name for alias, name in self.aliases.items() if alias != name},
            persistent=self.persistent,
            constants={node.target: self.exported.constants[node.target] for node in nodes if node.kind == "constant"},
            notes=tuple(self.notes),
        )

    def results(self) -> tuple[list[Any], list[tuple[str, Ref]]]:
        """The flattened outputs, and the new values of buffers."""
        returned = next(node for node in reversed(self.exported.graph.nodes) if node.op == "output").args[0]
        outputs: list[Any] = []
        written: list[tuple[Any, str | None, Ref]] = []
        for item, out in zip(returned, self.exported.graph_signature.output_specs, strict=True):
            value = self.convert(item)
            if out.kind is OutputKind.USER_OUTPUT:
                if not _free([value]) <= self.sizes.places.keys():
                    raise AutotpError(
                        "the model returns a number that depends on the values of a tensor, as `item` gives; return the tensor."
                    )
                outputs.append(value)
            else:
                written.append((out.kind, out.target, value))
        for node, spec in self.inputs:
            ref = self.env[node]
            if isinstance(ref, Ref) and self.nodes[ref.node].kind == "op":
                written.append((spec.kind, spec.target or node.name, ref))
        updates: dict[str, Ref] = {}
        for kind, target, ref in written:
            if kind in (OutputKind.BUFFER_MUTATION, InputKind.BUFFER):
                updates[self.aliases[str(target)]] = self.detached(ref)
            elif kind in (OutputKind.USER_INPUT_MUTATION, InputKind.USER_INPUT):
                self.notes.append(
                    f"The model writes to its input `{target}`; the parallel model leaves the caller's tensor as it is."
                )
            else:
                raise AutotpError(f"the forward overwrites `{target}`, which is no buffer; register it as a buffer.")
        return outputs, list(updates.items())

    def detached(self, ref: Ref) -> Ref:
        """The tensor without its gradient."""
        out, node = self.type(ref), self.nodes[ref.node]
        plain = (self.intern(out.shape, out.hint, out.dtype, False),)
        target = torch.ops.aten.detach.default
        result: Ref = self.emit(Call(f"{node.name}_detach", target, (ref,), {}, plain, False, node.path, node.source))
        return result

    def live(self, roots: list[Ref]) -> set[int]:
        """Indices of the nodes that the roots depend on."""
        live: set[int] = set()
        pending = [ref.node for ref in roots]
        while pending:
            index = pending.pop()
            if index not in live:
                live.add(index)
                pending.extend(ref.node for ref in self.nodes[index].inputs)
        return live

    def order(self, live: set[int]) -> list[int]:
        """Old indices in new order: parameters, buffers (used ones first), live constants, inputs, live operators."""
        order: list[int] = []
        for kind in ("parameter", "buffer", "constant", "input", "op"):
            indices = [node.index for node in self.nodes if node.kind == kind]
            order.extend(index for index in indices if index in live or kind == "input")
            if kind in ("parameter", "buffer"):
                order.extend(index for index in indices if index not in live)
        return order

    def check_sizes(self, live: set[int]) -> None:
        """Refuse sizes and numbers that are known only from tensor values."""
        known = self.sizes.places.keys()
        for index in sorted(live):
            node = self.nodes[index]
            numbers = _flat((*(out.shape for out in node.outputs), *node.args, *node.kwargs.values()))
            if not _free(numbers) <= known:
                line = f" ({node.source})" if node.source else ""
                raise AutotpError(
                    f"`{node.op}` in module `{node.path or '(root)'}`{line} needs a size or number that depends on the "
                    "values of a tensor (as `item`, `nonzero` and boolean indexing give); use a fixed size or a mask."
                )


def _is_default(key: str, value: Any) -> bool:
    """Whether a keyword says nothing: `pin_memory=False`, `layout=torch.strided`, or either of them None."""
    return (key == "pin_memory" and not value) or (key == "layout" and value in (None, torch.strided))


def _flat(items: Iterable[Any]) -> list[Any]:
    """Arguments with their lists opened, one level deep (operators' schemas nest no deeper)."""
    flat: list[Any] = []
    for item in items:
        if isinstance(item, (list, tuple)):
            flat.extend(item)
        else:
            flat.append(item)
    return flat


def _refs(call: Call) -> list[Ref]:
    """Every tensor operand of a call."""
    found: list[Ref] = []
    collect_refs((call.args, call.kwargs), found)
    return found


def _free(items: Iterable[Any]) -> Set[sympy.Symbol]:
    """The symbols in sizes and numbers."""
    return {symbol for item in items if isinstance(item, sympy.Basic) for symbol in item.free_symbols}


def _freeze(tree: Any) -> Any:
    """A hashable copy of arguments; numbers keep their type (1 is not True)."""
    if isinstance(tree, (list, tuple)):
        return tuple(_freeze(item) for item in tree)
    if isinstance(tree, dict):
        return tuple((key, _freeze(item)) for key, item in tree.items())
    return type(tree), tree
