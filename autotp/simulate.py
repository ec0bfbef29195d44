"""A sharded model on `n` virtual ranks in ONE process.

`Simulation` interprets the ranks' graphs in lockstep; conversions and buckets act across the list of ranks, with the
same local code as between processes, and gradients flow from rank to rank.

An output in layout `I` on every rank is ONE value. To differentiate, seed each rank's output with the local part of the
output's gradient, `scatter(gradient, gradient_layout(layout), …)`, in one `torch.autograd.backward` over all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.fx import GraphModule, Node

from autotp.definitions import Mesh, coordinates
from autotp.errors import AutotpError
from autotp.layouts import COLLECTIVES
from autotp.program import op_name
from autotp.runtime.collectives import Bucket, Convert, flatten, unflatten
from autotp.runtime.comm import Steps
from autotp.runtime.exact_random import drawn_together
from autotp.runtime.prefetch import Prefetch
from autotp.runtime.primitives import AllToAll, Primitive
from autotp.runtime.random import RandomCall
from autotp.runtime.recompute import Recomputation, Recomputing, picked
from autotp.sharded import Sharded

# ---- exchanges across the list of ranks -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Record:
    """One collective of a run, in which every rank took part, in its group along mesh axis `axis`.

    `bytes` is the larger of what goes in and what comes out, fill included, on the rank where it is largest.
    """

    primitive: str
    axis: int
    bytes: int
    phase: Literal["forward", "backward"]


Log = Callable[[str, int, int], None]


def _run(steps: Sequence[Steps], tensors: Sequence[Tensor], mesh: Mesh, log: Log) -> list[Tensor]:
    """`runtime.comm.run` for all ranks: `steps[r]` on `tensors[r]`."""
    values = list(tensors)
    for step in zip(*steps, strict=True):
        values = _finish(step, _receive(step, values, mesh, log))
    return values


def _receive(step: Sequence[Primitive], tensors: Sequence[Tensor], mesh: Mesh, log: Log) -> list[Tensor]:
    """One primitive up to the end of its exchange."""
    sent = [one.prepare(value) for one, value in zip(step, tensors, strict=True)]
    received = _exchange(step, sent, mesh)
    if step[0].name in COLLECTIVES:
        sizes = (x.numel() * x.element_size() for x in (*sent, *received))
        log(step[0].name, step[0].axis, max(sizes))
    return received


def _finish(step: Sequence[Primitive], received: Sequence[Tensor]) -> list[Tensor]:
    return [one.finish(value) for one, value in zip(step, received, strict=True)]


def _exchange(step: Sequence[Primitive], sent: Sequence[Tensor], mesh: Mesh) -> list[Tensor]:
    """What each rank receives when every rank sends `sent[rank]`, as `runtime.primitives` describes the exchanges."""
    name, axis = step[0].name, step[0].axis
    if name not in COLLECTIVES:
        return list(sent)
    ranks = {coordinate: rank for rank, coordinate in enumerate(coordinates(mesh))}
    received: list[Tensor] = []
    for coordinate in ranks:
        group = [ranks[*coordinate[:axis], member, *coordinate[axis + 1 :]] for member in range(mesh[axis])]
        place = coordinate[axis]
        if name == "all_reduce":
            received.append(_sum([sent[rank] for rank in group]))
        elif name == "all_reduce_max":
            received.append(torch.stack([sent[rank] for rank in group]).amax(0))
        elif name == "all_gather":
            received.append(torch.cat([sent[rank] for rank in group]))
        elif name == "reduce_scatter":
            received.append(_sum([sent[rank].chunk(len(group))[place] for rank in group]))
        else:
            received.append(torch.cat([_rows(step[rank], sent[rank], len(group))[place] for rank in group]))
    return received


def _sum(tensors: Sequence[Tensor]) -> Tensor:
    total = tensors[0].clone()
    for tensor in tensors[1:]:
        total += tensor
    return total


def _rows(primitive: Primitive, sent: Tensor, members: int) -> Sequence[Tensor]:
    """The rows that a rank sends to each member in an all-to-all."""
    sizes = primitive.send_sizes if isinstance(primitive, AllToAll) else None
    return sent.chunk(members) if sizes is None else sent.split(list(sizes))


Forward = Callable[[Sequence[Tensor]], list[Tensor]]
"""From each rank's tensor to its converted one."""


class _Lockstep(torch.autograd.Function):
    """A `Convert` on all ranks at once: `tensors[r]` is rank `r`'s."""

    @staticmethod
    def forward(
        ctx: Any, forward: Forward, backward: list[Steps], simulation: Simulation, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.way = backward, simulation
        ctx.set_materialize_grads(False)
        return tuple(forward(tensors))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Any, ...]:
        backward, simulation = ctx.way
        missing = [rank for rank, gradient in enumerate(gradients) if gradient is None]
        if len(missing) == len(gradients):
            return (None,) * (3 + len(gradients))
        if missing:
            raise AutotpError(
                f"virtual ranks {missing} have no gradient for a conversion for which others have one, so that as processes "
                f"they would wait for each other; let every local operator keep its result connected on an empty piece"
            )
        found = [gradient for gradient in gradients if gradient is not None]
        return None, None, None, *_run(backward, found, simulation.mesh, simulation.log)


class _LockstepMerge(torch.autograd.Function):
    """A `Bucket` on all ranks at once: `tensors` are the first rank's, then the second's, …"""

    @staticmethod
    def forward(ctx: Any, steps: Steps, ranks: int, simulation: Simulation, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.way = steps, ranks, simulation
        return tensors

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        steps, ranks, simulation = ctx.way
        count = len(gradients) // ranks
        needed = [i for i in range(count) if ctx.needs_input_grad[3 + i]]
        found: list[Tensor | None] = [None] * len(gradients)
        per_rank = [[gradients[rank * count + i] for i in needed] for rank in range(ranks)]
        buffers = zip(*map(flatten, per_rank), strict=True)
        reduced = [_run([steps] * ranks, buffer, simulation.mesh, simulation.log) for buffer in buffers]
        for rank in range(ranks):
            parts = unflatten([buffer[rank] for buffer in reduced], per_rank[rank])
            for i, part in zip(needed, parts, strict=True):
                found[rank * count + i] = part
        return None, None, None, *found


Lanes = Callable[[Sequence[Any], Sequence[Any]], Sequence[Any]]
"""From the positional and the keyword arguments of every rank to their results."""


@dataclass(frozen=True)
class _Marks:
    """What a block makes again, in one run of it on all ranks."""

    recomputation: Recomputation
    marked: Mapping[str, frozenset[int]]

    def call(self, function: Lanes, name: str, args: list[Any], kwargs: list[Any]) -> Sequence[Any]:
        """A marked call on all ranks."""

        def pick(results: Sequence[Any]) -> list[Any]:
            return [tensor for mine in results for tensor in picked(self.marked[name], mine)]

        results: Sequence[Any] = self.recomputation.call(function, pick, (args, kwargs), {})
        return results


# ---- the interpreter ------------------------------------------------------------------------------------------------


class Simulation:
    """The ranks of a mesh in one process.

    Args:
        ranks: what each rank runs, for all coordinates of the mesh in row-major order. The graphs must have the same
            nodes, else AutotpError; they may differ in numbers and in the tensors' sizes.

    Attributes:
        mesh: size of each mesh axis.
        records: the collectives since the last call of `forward`, backward ones included, in the order of running.
    """

    def __init__(self, ranks: Sequence[Sharded]) -> None:
        if not ranks or [rank.coordinate for rank in ranks] != coordinates(ranks[0].mesh):
            found = [rank.coordinate for rank in ranks]
            raise AutotpError(
                f"a simulation takes one Sharded for every coordinate of the mesh in row-major order, not {found}; "
                f"rewrite the plan for each coordinate of the mesh"
            )
        self.ranks = tuple(ranks)
        self.mesh = ranks[0].mesh
        self.records: list[Record] = []
        self.phase: Literal["forward", "backward"] = "backward"
        _check_alike([rank.graph for rank in ranks], "")

    def forward(
        self, state: Sequence[Sequence[Tensor]], inputs: Sequence[Sequence[Tensor]]
    ) -> list[tuple[Tensor, ...]]:
        """For every rank the flat tuple that its graph returns: outputs, then updates.

        `state[r]` and `inputs[r]` are rank `r`'s local tensors in the order of `Sharded.state` and `Sharded.inputs`.
        """
        self.records = []
        arguments = [[*mine, *given] for mine, given in zip(state, inputs, strict=True)]
        for rank, found in zip(self.ranks, arguments, strict=True):
            expected = sum(node.op == "placeholder" for node in rank.graph.graph.nodes)
            if len(found) != expected:
                raise AutotpError(
                    f"the graph of rank {rank.coordinate} takes {expected} tensors, but {len(found)} were given; "
                    f"pass one for each entry of Sharded.state, then of Sharded.inputs"
                )
        self.phase = "forward"
        try:
            return [tuple(output) for output in self._interpret([rank.graph for rank in self.ranks], arguments)]
        finally:
            self.phase = "backward"

    def log(self, primitive: str, axis: int, size: int) -> None:
        """Note a collective."""
        self.records.append(Record(primitive, axis, size, self.phase))

    def _interpret(
        self, graphs: Sequence[GraphModule], arguments: Sequence[Sequence[Any]], recomputing: _Marks | None = None
    ) -> list[Any]:
        environments: list[dict[Node, Any]] = [{} for _ in graphs]
        pending = [iter(given) for given in arguments]
        for nodes in zip(*(graph.graph.nodes for graph in graphs), strict=True):
            if nodes[0].op == "placeholder":
                results: Sequence[Any] = [next(given) for given in pending]
            elif nodes[0].op == "get_attr":
                results = [_attribute(graph, node) for graph, node in zip(graphs, nodes, strict=True)]
            else:
                args, kwargs = [], []
                for node, values in zip(nodes, environments, strict=True):
                    args.append(torch.fx.map_arg(node.args, values.__getitem__))
                    kwargs.append(torch.fx.map_arg(node.kwargs, values.__getitem__))
                if nodes[0].op == "output":
                    return [given[0] for given in args]
                function = self._function(graphs, nodes)
                if recomputing is not None and nodes[0].name in recomputing.marked:
                    results = recomputing.call(function, nodes[0].name, args, kwargs)
                else:
                    results = function(args, kwargs)
            for node, values, result in zip(nodes, environments, results, strict=True):
                values[node] = result
        raise AutotpError("a graph has no output node; only graphs that return their results can be simulated")

    def _function(self, graphs: Sequence[GraphModule], nodes: Sequence[Node]) -> Lanes:
        """What the nodes, one of each rank, do with their arguments; whenever it is called with the same, it gives the same."""
        functions: Sequence[Any] = [node.target for node in nodes]
        if nodes[0].op == "call_module":
            modules: list[Any] = [_module(graph, node) for graph, node in zip(graphs, nodes, strict=True)]
            if isinstance(modules[0], Prefetch):
                return lambda args, kwargs: self._begin([module.conversion for module in modules], args)
            if isinstance(modules[0], Convert):
                return lambda args, kwargs: self._convert(modules, args, kwargs[0].get("prefetched"))
            if isinstance(modules[0], Bucket):
                return lambda args, kwargs: self._merge(modules, args)
            if isinstance(modules[0], Recomputing):
                return lambda args, kwargs: self._recompute(modules, args)
            if isinstance(modules[0], GraphModule):
                return lambda args, kwargs: self._interpret(modules, args)
            functions = drawn_together(modules) if isinstance(modules[0], RandomCall) else modules
        elif nodes[0].op == "call_method":
            functions = [partial(_method, str(node.target)) for node in nodes]
        return partial(self._apply, nodes, functions)

    def _apply(self, nodes: Sequence[Node], functions: Sequence[Any], args: Sequence[Any], kwargs: Sequence[Any]) -> list[Any]:
        results = []
        for rank, (function, given, named) in enumerate(zip(functions, args, kwargs, strict=True)):
            try:
                results.append(function(*given, **named))
            except Exception as error:
                error.add_note(f"at node {nodes[rank].name} of virtual rank {coordinates(self.mesh)[rank]}")
                raise
        return results

    def _recompute(self, modules: Sequence[Recomputing], args: Sequence[Any]) -> list[Any]:
        """A call of a block that is made again is one of all ranks: what one of them needs, all make."""
        bodies = [module.body for module in modules]
        if not torch.is_grad_enabled():
            return self._interpret(bodies, args)
        with Recomputation(args[0]) as recomputation:
            return self._interpret(bodies, args, _Marks(recomputation, modules[0].marked))

    def _begin(self, modules: Sequence[Any], args: Sequence[Any]) -> Sequence[_Begun | None]:
        """The last exchange of a conversion, one block early; None where nothing is exchanged."""
        nothing = [None] * len(modules)
        if isinstance(modules[0], Bucket):
            return nothing
        forward = [module.steps(given[1:], given[0].device)[0] for module, given in zip(modules, args, strict=True)]
        place = _last_exchange(forward[0])
        if place is None:
            return nothing
        values = _run([steps[:place] for steps in forward], [given[0].detach() for given in args], self.mesh, self.log)
        return [_Begun(_receive([steps[place] for steps in forward], values, self.mesh, self.log))] * len(modules)

    def _convert(self, modules: Sequence[Convert], args: Sequence[Any], begun: _Begun | None) -> Sequence[Any]:
        tensors = [given[0] for given in args]
        steps = [module.steps(given[1:], given[0].device) for module, given in zip(modules, args, strict=True)]
        ways, backward = [one[0] for one in steps], [one[1] for one in steps]

        def forward(values: Sequence[Tensor]) -> list[Tensor]:
            place, received = _last_exchange(ways[0]), None if begun is None else begun.take()
            if received is None or place is None:
                return _run(ways, values, self.mesh, self.log)
            ended = _finish([way[place] for way in ways], received)
            return _run([way[place + 1 :] for way in ways], ended, self.mesh, self.log)

        if not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)):
            return forward(tensors)
        if not modules[0].gradient:
            return forward([tensor.detach() for tensor in tensors])
        results: Sequence[Any] = _Lockstep.apply(forward, backward, self, *tensors)
        return results

    def _merge(self, modules: Sequence[Bucket], args: Sequence[Any]) -> Sequence[Any]:
        count = len(args[0])
        results = _LockstepMerge.apply(modules[0].steps, len(modules), self, *(x for given in args for x in given))
        return [tuple(results[rank * count : (rank + 1) * count]) for rank in range(len(modules))]


def _method(name: str, owner: Any, *args: Any, **kwargs: Any) -> Any:
    return getattr(owner, name)(*args, **kwargs)


class _Begun:
    """What every rank has received early; a second time nothing, so that a conversion that is made again exchanges again."""

    def __init__(self, received: list[Tensor]) -> None:
        self.received: list[Tensor] | None = received

    def take(self) -> list[Tensor] | None:
        received, self.received = self.received, None
        return received


def _last_exchange(steps: Steps) -> int | None:
    return max((place for place, step in enumerate(steps) if step.name in COLLECTIVES), default=None)


def _module(graph: GraphModule, node: Node) -> nn.Module:
    return graph.get_submodule(str(node.target))


def _body(module: GraphModule | Recomputing) -> GraphModule:
    return module.body if isinstance(module, Recomputing) else module


def _attribute(module: nn.Module, node: Node) -> Any:
    path, _, name = str(node.target).rpartition(".")
    return getattr(module.get_submodule(path), name)


def _check_alike(graphs: Sequence[GraphModule], path: str) -> None:
    """Raise AutotpError, naming the first node that differs, unless the graphs and their blocks have the same nodes."""
    for nodes in zip_longest(*(graph.graph.nodes for graph in graphs)):
        wanted = _signature(graphs[0], nodes[0])
        for rank, (graph, node) in enumerate(zip(graphs, nodes, strict=True)):
            if _signature(graph, node) != wanted:
                names = [path + found.name if found else "nothing" for found in (node, nodes[0])]
                raise AutotpError(
                    f"virtual rank {rank} runs {names[0]} ({node and node.format_node()}) where rank 0 runs {names[1]} "
                    f"({nodes[0] and nodes[0].format_node()}); emit the same nodes for every coordinate of the mesh"
                )
        if nodes[0].op != "call_module":
            continue
        modules = [_module(graph, node) for graph, node in zip(graphs, nodes, strict=True)]
        blocks = [_body(module) for module in modules if isinstance(module, (GraphModule, Recomputing))]
        if blocks:  # of every rank, as the signatures are equal
            _check_alike(blocks, f"{path}{nodes[0].name}.")
        elif not isinstance(modules[0], (Convert, Bucket, Prefetch)) and _communicates(modules[0]):
            raise AutotpError(
                f"node {path + nodes[0].name} calls a {type(modules[0]).__name__} that communicates inside; only "
                f"GraphModules, Recomputing, Convert, Bucket and Prefetch can be simulated, so let the graph call those directly"
            )


def _communicates(module: nn.Module) -> bool:
    return any(isinstance(child, (Convert, Bucket)) for child in module.modules())


def _signature(graph: GraphModule, node: Node | None) -> tuple[Any, ...]:
    """What must be the same on every rank."""
    if node is None:
        return ()
    inputs = tuple(operand.name for operand in node.all_input_nodes)
    if node.op != "call_module":
        return node.op, node.name, op_name(node.target), inputs
    module = _module(graph, node)
    what: Any = module.conversion if isinstance(module, Prefetch) else module
    kinds = [type(module).__name__, type(what).__name__]
    if isinstance(what, Convert):
        return node.op, node.name, inputs, *kinds, what.path, what.symbols, what.gradient
    if isinstance(what, Bucket):
        return node.op, node.name, inputs, *kinds, what.axis_path
    if isinstance(what, Recomputing):
        return node.op, node.name, inputs, *kinds, tuple(sorted(what.marked.items()))
    return node.op, node.name, inputs, *kinds
