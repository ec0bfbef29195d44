"""Rewrite a program into the graph that one rank runs: local operators, and conversions wherever layouts differ.

Each distinct repeated block becomes one submodule, used by all its copies. Inside it, tensors are converted where they are
made; parameters of the block are converted at its entrance, small gradients merged into one bucket. Conversions of what a block
takes and gives stand in the root graph, between the blocks. There also stands what begins the conversions of a block's parameters
early: ahead of the block before it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import sympy
import torch
from torch import fx, nn

from autotp import _torch
from autotp.decisions import Decisions
from autotp.errors import AutotpError
from autotp.exact import Form, exact_form, layout_of_numbers
from autotp.in_place import in_place_variant, writes_in_place
from autotp.layouts import COLLECTIVES, Layout, Move, SortedCut, Split, local_size, uniform
from autotp.piece_sizes import PieceSize, piece_start, size_node, symbols_of
from autotp.price.storage import storage_of
from autotp.program import Node, Ref, Size, map_refs
from autotp.rules.language import Local, LocalElements, LocalSize, LocalStart, call_of
from autotp.runtime.collectives import Bucket, Convert
from autotp.runtime.exact_random import ExactCall, Piece
from autotp.runtime.prefetch import Prefetch
from autotp.runtime.random import RandomCall
from autotp.runtime.recompute import Recomputing
from autotp.runtime.sorted_rows import HeldElements, orders_in
from autotp.sharded import BorderSpec, Sharded, StateSpec
from autotp.strategies import Space

Version = tuple[Ref, Layout]
"""A tensor of the program in one of its layouts."""


def rewrite(
    space: Space,
    decisions: Decisions,
    coordinate: tuple[int, ...],
    *,
    gradient: bool,
    device: str | torch.device = "cpu",
    exact: bool = False,
) -> Sharded:
    """The program as the rank at `coordinate` runs it.

    Args:
        space, decisions: the program's rules and strategies, and what the plan chose.
        coordinate: the rank's place on the mesh.
        gradient: whether conversions carry gradients back (training).
        device: where constructors such as `arange` make their tensors.
        exact: let random operators draw what one device draws (`runtime.exact_random`).

    Raises:
        AutotpError: `exact`, and the plan splits a random operator that cannot draw so.
    """
    return _Rewriter(space, decisions, coordinate, gradient, torch.device(device), exact).rewrite()


@dataclass
class _Scope:
    """One graph under construction: the root, or a block. `versions` are the tensors that exist in it, by layout."""

    is_block: bool = False
    graph: fx.Graph = field(default_factory=fx.Graph)
    modules: dict[str, nn.Module] = field(default_factory=dict)
    versions: dict[Version, fx.Node] = field(default_factory=dict)
    sizes: dict[sympy.Basic, Any] = field(default_factory=dict)
    prefetches: list[_Prefetch] = field(default_factory=list)
    elements: dict[tuple[fx.Node, Split], fx.Node] = field(default_factory=dict)

    def call(self, name: str, module: nn.Module, args: Sequence[Any], kwargs: dict[str, Any] | None = None) -> fx.Node:
        """Add a submodule under a fresh name and call it."""
        number = 1 + sum(key.rsplit("_", 1)[0] == name for key in self.modules)
        self.modules[f"{name}_{number}"] = module
        return self.graph.call_module(f"{name}_{number}", tuple(args), kwargs)


@dataclass(frozen=True)
class _Prefetch:
    """A conversion of a block's parameters that begins before the block is called: what it takes, as tensors of the first copy."""

    module: Prefetch
    takes: tuple[Version, ...]
    symbols: tuple[sympy.Symbol, ...] = ()


@dataclass(frozen=True)
class _Block:
    """A rewritten block: what it takes and gives, as tensors of its first copy, the sizes it needs, and what begins before it."""

    module: fx.GraphModule
    takes: tuple[Version, ...]
    gives: tuple[Version, ...]
    symbols: tuple[sympy.Symbol, ...]
    prefetches: tuple[_Prefetch, ...]
    nodes: dict[Version, fx.Node]
    """The graph nodes of all tensors in it."""


class _Rewriter:
    def __init__(
        self, space: Space, decisions: Decisions, coordinate: tuple[int, ...], gradient: bool, device: torch.device, exact: bool
    ) -> None:
        self.space, self.program, self.folding = space, space.program, space.folding
        self.decisions, self.coordinate, self.gradient, self.device = decisions, coordinate, gradient, device
        self.exact = exact
        self.mesh = space.mesh
        self.whole = uniform("I", len(space.mesh))
        self.copy_of: dict[int, tuple[int, int]] = {
            node: (number, copy)
            for number, repeat in enumerate(self.folding.repeats)
            for copy in range(repeat.count)
            for node in repeat.instance(copy)
        }

    # ---- what the plan says ----

    def owner(self, ref: Ref) -> Ref:
        """The representative of a tensor."""
        return Ref(self.folding.representative[ref.node], ref.output)

    def made(self, ref: Ref) -> Layout:
        """The layout in which a tensor is made (or rests)."""
        owner = self.owner(ref)
        node = self.program.nodes[owner.node]
        if node.kind == "input":
            return self.decisions.inputs.get(owner.node, self.whole)
        return self.decisions.chosen[owner.node].outputs[owner.output]

    def wanted(self, node: Node) -> tuple[Version, ...]:
        """What a node consumes."""
        strategy = self.decisions.chosen[self.folding.representative[node.index]]
        return tuple(zip(node.inputs, strategy.operands, strict=True))

    def path(self, version: Version) -> tuple[Move, ...]:
        """The moves that bring a tensor into a layout."""
        ref, layout = version
        return () if layout == self.made(ref) else self.decisions.paths[self.owner(ref), layout]

    @cached_property
    def in_place(self) -> dict[int, int]:
        """Operators that write into a buffer, which each takes, makes and leaves in the layout in which it rests; and the buffers."""
        possible, found = writes_in_place(self.program), {}
        for node, buffer in possible.items():
            alike = self.folding.members[self.folding.representative[node]]
            strategy, rests = self.decisions.chosen[self.folding.representative[node]], self.made(Ref(buffer))
            new = self.program.updated[buffer]
            if all(copy in possible for copy in alike) and strategy.operands[0] == strategy.outputs[0] == rests == self.made(new):
                found[node] = buffer
        return found

    def order_of(self, order: int, ref: Ref) -> Version:
        """The order of the rows of a tensor: that of the tensor's own copy of the block, if the order is made in each copy."""
        here = self.copy_of.get(ref.node)
        if here is not None and order in self.folding.repeats[here[0]].instance(0):
            order = order + here[1] * self.folding.repeats[here[0]].period
        return Ref(order), self.whole

    def orders(self, node: Node) -> list[Version]:
        """The orders that a node needs to hold, or to be given, sorted rows."""
        rows = Ref(node.index)
        strategy = self.decisions.chosen[self.folding.representative[node.index]]
        found = {order: rows for layout in (*strategy.operands, *strategy.outputs) for order in orders_in(layout)}
        for ref, layout in self.wanted(node):
            found |= {order: ref for move in self.path((ref, layout)) for order in orders_in(move.source, move.target)}
        return [self.order_of(order, ref) for order, ref in found.items()]

    def belongs_to_block(self, ref: Ref) -> bool:
        """Whether a parameter or buffer is used by one copy of a block only, and rests there."""
        node = self.program.nodes[ref.node]
        return node.kind in ("parameter", "buffer", "constant") and len(self.folding.members[self.owner(ref).node]) > 1

    # ---- graphs ----

    def rewrite(self) -> Sharded:
        root = _Scope()
        state = [node for node in self.program.nodes if node.kind in ("parameter", "buffer", "constant")]
        inputs = [node for node in self.program.nodes if node.kind == "input"]
        for node in (*state, *inputs):
            ref = Ref(node.index)
            root.versions[ref, self.made(ref)] = root.graph.placeholder(node.name.replace(".", "_"))
        self._global_sizes(root)
        self._state_conversions(root, self._uses_of_root(), (Ref(n.index) for n in state if not self.belongs_to_block(Ref(n.index))))
        blocks = {number: self._block(number) for number in range(len(self.folding.repeats))}
        modules = {number: self._modules(number, blocks[number]) for number in blocks}
        calls = iter(sorted(dict.fromkeys(self.copy_of.values()), key=lambda place: self.folding.repeats[place[0]].instance(place[1])[0]))
        begun = self._prefetch(root, blocks, next(calls, None), ())
        for node in self.program.nodes:
            if node.kind != "op":
                continue
            place = self.copy_of.get(node.index)
            if place is None:
                self._emit(root, node)
            elif node.index == self.folding.repeats[place[0]].instance(place[1])[0]:
                again = begun if isinstance(modules[place[0]][place[1]][1], Recomputing) else ()
                mine, begun = begun, self._prefetch(root, blocks, next(calls, None), again)
                self._call_block(root, blocks[place[0]], modules[place[0]][place[1]], *place, mine)
        outputs, constants = [], {}
        for position, value in enumerate(self.program.outputs):
            if isinstance(value, Ref):
                layout = self.decisions.outputs.get(position, self.whole)
                outputs.append(BorderSpec(f"output {position}", position, self.program.type_of(value), layout))
            else:
                constants[position] = value
        results = [self._get(root, (self.program.outputs[spec.position], spec.layout)) for spec in outputs]
        results += [self._get(root, (ref, self.made(Ref(buffer)))) for buffer, ref in self.program.updated.items()]
        root.graph.output(tuple(results))
        leaves = [leaf for leaf in range(len(self.program.in_names)) if leaf not in self.program.in_constants]
        return Sharded(
            graph=_module(root),
            state=tuple(self._state_spec(node) for node in state),
            inputs=tuple(
                BorderSpec(self.program.in_names[leaf], leaf, node.outputs[0], self.made(Ref(node.index)))
                for leaf, node in zip(leaves, inputs, strict=True)
            ),
            outputs=tuple(outputs),
            updates=tuple(str(self.program.nodes[buffer].target) for buffer in self.program.updated),
            in_place=frozenset(str(self.program.nodes[buffer].target) for buffer in self.in_place.values()),
            mesh=self.mesh,
            coordinate=self.coordinate,
            in_spec=self.program.in_spec,
            out_spec=self.program.out_spec,
            in_names=self.program.in_names,
            in_constants=self.program.in_constants,
            out_constants=constants,
        )

    def _state_spec(self, node: Node) -> StateSpec:
        return StateSpec(str(node.target), node.kind, node.outputs[0], self.made(Ref(node.index)))  # type: ignore[arg-type]

    def _global_sizes(self, root: _Scope) -> None:
        """Read every symbolic size off an input. An input that the user passes split is taken to be split evenly."""
        for symbol, source in self.program.symbols.items():
            ref = Ref(source.node)
            layout = self.made(ref)
            size = root.graph.call_function(torch.ops.aten.sym_size.int, (root.versions[ref, layout], source.dim))
            split = layout.split_at(source.dim)
            for axis in split.axes if split else ():
                size = root.graph.call_function(_times, (size, self.mesh[axis]))
            root.sizes[symbol] = size

    def _uses_of_root(self) -> set[Version]:
        """Every version of a tensor that the root graph must have: wanted by its own nodes, by several blocks, or at the border."""
        return {
            version
            for node in self.program.nodes
            for version in (*self.wanted(node), *self.orders(node))
            if node.index not in self.copy_of or not self.belongs_to_block(version[0])
        }

    def _state_conversions(self, scope: _Scope, wanted: set[Version], refs: Iterable[Ref]) -> None:
        """Convert parameters at the entrance, those that only owe a gradient reduction over the same mesh axes together."""
        merged: dict[tuple[int, ...], list[Version]] = {}
        for ref in refs:
            for layout in dict.fromkeys(layout for other, layout in sorted(wanted, key=_order) if other == ref):
                path = self.path((ref, layout))
                if path and all(move.kinds == ("I", "R") for move in path):
                    merged.setdefault(tuple(move.axis for move in path), []).append((ref, layout))
        for versions in merged.values():
            if len(versions) > 1:
                takes = [(ref, self.made(ref)) for ref, _ in versions]
                module = Bucket(self.path(versions[0]), len(versions))
                early = self._begin_early(scope, _Prefetch(Prefetch(module), tuple(takes)))
                bucket = scope.call("bucket", module, [scope.versions[version] for version in takes], early)
                for place, version in enumerate(versions):
                    scope.versions[version] = scope.graph.call_function(_item, (bucket, place))

    def _get(self, scope: _Scope, version: Version) -> fx.Node:
        """The node that holds a tensor in a layout, converted on first use."""
        if version not in scope.versions:
            ref, path = version[0], self.path(version)
            symbols = symbols_of([(move.source, move.target) for move in path])
            carries = self.gradient and self.program.type_of(ref).requires_grad
            module = Convert(path, self.mesh, self.coordinate, symbols, carries)
            sizes = [size_node(scope.graph, symbol, scope.sizes) for symbol in symbols]
            orders = dict.fromkeys(order for move in path for order in orders_in(move.source, move.target))
            needed = [self._get(scope, self.order_of(order, ref)) for order in orders]
            source, early = (ref, self.made(ref)), {}
            if self.belongs_to_block(ref) and not needed and _exchanges(path, carries):
                early = self._begin_early(scope, _Prefetch(Prefetch(module), (source,), symbols))
            scope.versions[version] = scope.call(_name(path), module, [scope.versions[source], *needed, *sizes], early)
            scope.versions[version].meta["local"] = ((self.program.type_of(ref), version[1]),)
            scope.versions[version].meta["versions"] = (version,)
        return scope.versions[version]

    def _begin_early(self, scope: _Scope, prefetch: _Prefetch) -> dict[str, fx.Node]:
        """Let the block take a conversion that has begun before; the keyword argument to pass on to it. Nothing in the root graph."""
        if not scope.is_block:
            return {}
        *_, last = (node for node in scope.graph.nodes if node.op == "placeholder")
        with scope.graph.inserting_after(last):
            begun = scope.graph.placeholder(f"begun{len(scope.prefetches)}")
        scope.prefetches.append(prefetch)
        return {"prefetched": begun}

    def _emit(self, scope: _Scope, node: Node) -> None:
        """One operator on local tensors."""
        owner = self.folding.representative[node.index]
        strategy, rule = self.decisions.chosen[owner], self.space.rules[owner]
        wanted = iter([self._get(scope, version) for version in self.wanted(node)])

        def leaf(value: Any) -> Any:
            return next(wanted) if isinstance(value, Ref) else value

        args, kwargs = map_refs((node.args, node.kwargs), leaf)
        target = node.target
        if "device" in kwargs:
            kwargs = {**kwargs, "device": self.device}
        drawn = rule.random if rule is not None else _torch.is_random(target)
        form = None
        if rule is not None and ((self.exact and drawn) or rule.local is not None):
            call = call_of(node, self.program.type_of)
            operands = tuple(strategy.operands[place] if place is not None else None for place in call.positions)
            local = Local(call, target, tuple(args), kwargs, operands, strategy.outputs)
            if self.exact and drawn:
                form = exact_form(local)
            if form is not None:
                target, args, kwargs = form.target, form.args, {**form.kwargs, **self._whole(form.shape, strategy.outputs[0])}
            elif rule.local is not None:
                target, args, kwargs = rule.local(local)
        if node.index in self.in_place:
            target = in_place_variant(target) or target
        args, kwargs = self._numbers(scope, tuple(args), node), self._numbers(scope, kwargs, node)
        if drawn:
            module = RandomCall(target, self._shard(strategy.outputs[0]))
            if self.exact:
                module = ExactCall(target, self._piece(form, node, strategy.outputs[0]) if form is not None else None)
            result = scope.call("random", module, args, kwargs)
        else:
            result = scope.graph.call_function(target, args, kwargs)
        result.meta["local"] = tuple(zip(node.outputs, strategy.outputs, strict=True))
        result.meta["versions"] = tuple((Ref(node.index, place), layout) for place, layout in enumerate(strategy.outputs))
        several = len(node.outputs) > 1 or _returns_list(node.target)
        for place, layout in enumerate(strategy.outputs):
            scope.versions[Ref(node.index, place), layout] = (
                scope.graph.call_function(_item, (result, place)) if several else result
            )

    def _numbers(self, scope: _Scope, tree: Any, node: Node) -> Any:
        """Replace symbolic and local sizes in the arguments of `node` by numbers, or by nodes that compute them."""
        if isinstance(tree, LocalElements) or (isinstance(tree, LocalSize) and isinstance(tree.split.cut, SortedCut)):
            held = self._elements(scope, tree.split, node)
            return held if isinstance(tree, LocalElements) else scope.graph.call_function(torch.ops.aten.sym_size.int, (held, 0))
        if isinstance(tree, (LocalSize, LocalStart)):
            start = isinstance(tree, LocalStart)
            symbols = symbols_of(tree.split)
            if not symbols:
                return (piece_start if start else local_size)(tree.split, self.mesh, self.coordinate)
            key = sympy.Symbol(f"{tree}")
            if key not in scope.sizes:
                sizes = [size_node(scope.graph, symbol, scope.sizes) for symbol in symbols]
                scope.sizes[key] = scope.call("piece", PieceSize(tree.split, self.mesh, self.coordinate, symbols, start), sizes)
            return scope.sizes[key]
        if isinstance(tree, sympy.Basic):
            return size_node(scope.graph, tree, scope.sizes)
        if isinstance(tree, torch.device):  # that of the trace
            return self.device
        if isinstance(tree, (tuple, list)):
            return type(tree)(self._numbers(scope, item, node) for item in tree)
        if isinstance(tree, dict):
            return {key: self._numbers(scope, item, node) for key, item in tree.items()}
        return tree

    def _elements(self, scope: _Scope, split: Split, node: Node) -> fx.Node:
        """The graph node that lists the elements of a split dim of one of `node`'s tensors that this rank holds."""
        cut, first = split.cut, self.wanted(node)[0]
        like = self._get(scope, self.order_of(cut.order, Ref(node.index)) if isinstance(cut, SortedCut) else first)
        key = (like, Split(0, split.axes, split.cut))
        if key not in scope.elements:
            symbols = symbols_of(split)
            sizes = [size_node(scope.graph, symbol, scope.sizes) for symbol in symbols]
            module = HeldElements(split, self.mesh, self.coordinate, symbols)
            scope.elements[key] = scope.call("held", module, [like, *sizes])
        return scope.elements[key]

    def _whole(self, shape: tuple[Size, ...], layout: Layout) -> dict[str, Any]:
        """What an `ExactCall` must know of the sizes and of the rows that this rank holds, as keyword arguments."""
        held = [LocalElements(split) for split in layout.splits if isinstance(split.cut, SortedCut)]
        return {"whole": list(shape), "sizes": list(symbols_of(layout)), "held": held}

    def _piece(self, form: Form, node: Node, layout: Layout) -> Piece:
        """This rank's part of the numbers that a split random operator draws."""
        order = tuple(range(len(form.shape)))
        strides = self.strides.get(Ref(node.index)) if form.like_output else None
        if strides is not None:
            order = tuple(sorted(order, key=lambda dim: (-strides[dim], dim)))
        return Piece(form.draw, order, layout_of_numbers(layout), symbols_of(layout), self.mesh, self.coordinate)

    @cached_property
    def strides(self) -> Mapping[Ref, tuple[int, ...]]:
        """How tensors lie in memory on one device, where their elements do not lie in order."""
        return storage_of(self.program).strides

    def _shard(self, layout: Layout) -> int:
        """The number of the piece of a tensor that this rank holds, equal where ranks hold the same piece."""
        number = 0
        for axis, kind in enumerate(layout.kinds):
            number = number * self.mesh[axis] + (self.coordinate[axis] if kind == "S" else 0)
        return number

    # ---- blocks ----

    def _block(self, number: int) -> _Block:
        """Rewrite the first copy of a repeated block."""
        repeat = self.folding.repeats[number]
        inside = set(repeat.instance(0))
        nodes = [self.program.nodes[index] for index in repeat.instance(0)]
        wanted = [version for node in nodes for version in (*self.wanted(node), *self.orders(node))]
        takes: dict[Version, None] = {}
        for ref, layout in wanted:
            if ref.node not in inside:
                takes[(ref, self.made(ref)) if self.belongs_to_block(ref) else (ref, layout)] = None
        symbols = tuple(
            symbol
            for symbol in sorted(self.program.symbols, key=str)
            if any(symbol in _all_symbols(node, self) for node in nodes)
        )
        scope = _Scope(is_block=True)
        for place, version in enumerate(takes):
            node = self.program.nodes[version[0].node]
            words = str(node.target).rsplit(".", 2)[-2:] if node.kind != "op" else [node.name]
            scope.versions[version] = scope.graph.placeholder(f"in{place}_{'_'.join(words)}")
        for symbol in symbols:
            scope.sizes[symbol] = scope.graph.placeholder(f"size_{symbol}")
        self._state_conversions(scope, set(wanted), dict.fromkeys(ref for ref, _ in takes if self.belongs_to_block(ref)))
        for node in nodes:
            self._emit(scope, node)
        gives = self._given(number, scope)
        scope.graph.output(tuple(scope.versions[version] for version in gives))
        return _Block(_module(scope), tuple(takes), gives, symbols, tuple(scope.prefetches), scope.versions)

    def _modules(self, number: int, block: _Block) -> list[tuple[str, nn.Module]]:
        """The module that runs each copy, by name: copies that make the same tensors again share one."""
        name = f"block_{number + 1}"
        found: list[tuple[str, nn.Module]] = []
        for pattern in (entry for entry in self.decisions.recomputed if entry.repeat == number):
            same = (f"{name}_recomputing_{len(found) + 1}", self._recomputing(block, pattern.versions))
            found += [same] * pattern.copies
        return found + [(name, block.module)] * (self.folding.repeats[number].count - len(found))

    def _recomputing(self, block: _Block, versions: Iterable[Version]) -> nn.Module:
        """The same block, which does not keep some of its tensors (the block itself if these are none).

        Raises:
            AutotpError: it does not make one of them.
        """
        alive = set(block.module.graph.nodes)
        marked: dict[str, frozenset[int]] = {}
        for version in versions:
            node = block.nodes.get(version)
            if node is None or node.op == "placeholder":
                name = self.program.nodes[version[0].node].name
                raise AutotpError(f"the plan recomputes `{name}` as ({version[1]}), which its block does not make: plan this model again")
            if node in alive:
                call, place = node.args if node.target is _item else (node, 0)
                assert isinstance(call, fx.Node) and isinstance(place, int)
                marked[call.name] = marked.get(call.name, frozenset()) | {place}
        return Recomputing(block.module, marked) if marked else block.module

    def _given(self, number: int, scope: _Scope) -> tuple[Version, ...]:
        """What any copy's outside needs from the block: as made, or as converted inside anyway. Named after the first copy."""
        repeat = self.folding.repeats[number]
        outgoing = {v for v in self.program.outputs if isinstance(v, Ref)}
        updating = {ref: self.made(Ref(buffer)) for buffer, ref in self.program.updated.items()}
        found: dict[Version, None] = {}
        for copy in range(repeat.count):
            span = repeat.instance(copy)
            orders = self._orders_outside(number, copy)
            for index in span:
                for output in range(len(self.program.nodes[index].outputs)):
                    ref = Ref(index, output)
                    first = Ref(index - copy * repeat.period, output)
                    layouts = [
                        self.wanted(self.program.nodes[user])[place][1]
                        for user, place in self.program.users.get(ref, ())
                        if user not in span
                    ]
                    layouts += [self.whole] if ref in outgoing or ref.node in orders else []
                    layouts += [updating[ref]] if ref in updating else []
                    for layout in layouts:
                        converted = (first, layout)
                        found[converted if converted in scope.versions else (first, self.made(ref))] = None
        return tuple(sorted(found, key=_order))

    def _orders_outside(self, number: int, copy: int) -> set[int]:
        """Nodes of a copy that made orders which nodes outside it need."""
        span = self.folding.repeats[number].instance(copy)
        return {ref.node for ref, users in self._order_users.items() if ref.node in span and any(user not in span for user in users)}

    @cached_property
    def _order_users(self) -> dict[Ref, set[int]]:
        """Order → the nodes that need it."""
        found: dict[Ref, set[int]] = {}
        for node in self.program.nodes:
            for ref, _ in self.orders(node):
                found.setdefault(ref, set()).add(node.index)
        return found

    def _counterparts(self, number: int, copy: int) -> dict[Ref, Ref]:
        """What the first copy of a block takes → what another takes in its place."""
        repeat = self.folding.repeats[number]
        found: dict[Ref, Ref] = {}
        for first, here in zip(repeat.instance(0), repeat.instance(copy), strict=True):
            nodes = self.program.nodes[first], self.program.nodes[here]
            found.update(zip(*(node.inputs for node in nodes), strict=True))
            found.update(zip(*([ref for ref, _ in self.orders(node)] for node in nodes), strict=True))
        return found

    def _prefetch(
        self, root: _Scope, blocks: Mapping[int, _Block], place: tuple[int, int] | None, before: tuple[fx.Node, ...]
    ) -> tuple[fx.Node, ...]:
        """Begin the conversions of the parameters of one copy, if there is one; `before` are those that its backward begins again."""
        if place is None:
            return ()
        counterpart, begun = self._counterparts(*place), []
        for number, prefetch in enumerate(blocks[place[0]].prefetches):
            name = f"prefetch_{place[0] + 1}_{number + 1}"
            root.modules[name] = prefetch.module
            args = [self._get(root, (counterpart[ref], layout)) for ref, layout in prefetch.takes]
            args += [size_node(root.graph, symbol, root.sizes) for symbol in prefetch.symbols]
            begun.append(root.graph.call_module(name, tuple(args), {"before": before} if before else {}))
        return tuple(begun)

    def _call_block(
        self, root: _Scope, block: _Block, module: tuple[str, nn.Module], number: int, copy: int, begun: Sequence[fx.Node]
    ) -> None:
        """One copy: pass what its block takes, and what has `begun` for it; name what it gives."""
        repeat, counterpart = self.folding.repeats[number], self._counterparts(number, copy)
        args = [self._get(root, (counterpart[ref], layout)) for ref, layout in block.takes]
        args += [*(root.sizes[symbol] for symbol in block.symbols), *begun]
        name, root.modules[name] = module[0], module[1]
        result = root.graph.call_module(name, tuple(args))
        result.meta["repeat"] = number
        for place, (ref, layout) in enumerate(block.gives):
            given = Ref(ref.node + copy * repeat.period, ref.output)
            root.versions[given, layout] = root.graph.call_function(_item, (result, place))


def _item(values: Sequence[Any], place: int) -> Any:
    return values[place]


def _times(size: int, factor: int) -> int:
    return size * factor


def _order(version: Version) -> tuple[int, int, str]:
    return version[0].node, version[0].output, str(version[1])


def _name(path: tuple[Move, ...]) -> str:
    """What a conversion is called in the graph: its first primitive that communicates in either direction."""
    words = [word for move in path for word in (move.forward, move.backward)]
    return next((word for word in words if word not in ("none", "slice", "pad", "mask")), "local")


def _exchanges(path: tuple[Move, ...], carries: bool) -> bool:
    """Whether ranks exchange anything on the way, or, if it carries gradients, on the way back."""
    return any(move.forward in COLLECTIVES or (carries and move.backward in COLLECTIVES) for move in path)


def _returns_list(target: Any) -> bool:
    schema = getattr(target, "_schema", None)
    return schema is not None and (len(schema.returns) > 1 or isinstance(schema.returns[0].type, torch.ListType))


def _all_symbols(node: Node, rewriter: _Rewriter) -> set[sympy.Symbol]:
    """Every symbol that emitting a node may need: in its arguments, its tensors' sizes and their cuts."""
    found: set[sympy.Symbol] = set()
    tensors = [rewriter.program.type_of(ref) for ref in node.inputs] + list(node.outputs)
    for tensor in tensors:
        found.update(symbols_of(tensor.shape))
    map_refs((node.args, node.kwargs), lambda leaf: found.update(symbols_of(leaf)) if isinstance(leaf, sympy.Basic) else None)
    for version in rewriter.wanted(node):
        for move in rewriter.path(version):
            found.update(symbols_of([move.source, move.target]))
    return found


def _module(scope: _Scope) -> fx.GraphModule:
    """Wrap a finished graph; dead operators are dropped (conversions stay: every rank must take part in them)."""
    graph = scope.graph
    for node in reversed(graph.nodes):
        if node.op == "call_function" and not node.users:
            graph.erase_node(node)
    return fx.GraphModule(scope.modules, graph)
