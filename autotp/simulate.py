"""A sharded model on `n` virtual ranks in ONE process.

`Simulation` interprets the ranks' graphs in lockstep; conversions and buckets act across the list of ranks, with the
same local code as between processes, and gradients flow from rank to rank. `scatter`, `gather` and `gather_gradient`
are the definitions of the layouts (see `layouts.py`), by which a result is judged.

An output in layout `I` on every rank is ONE value. To differentiate, seed each rank's output with the local part of the
output's gradient, `scatter(gradient, gradient_layout(layout), …)`, in one `torch.autograd.backward` over all ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product, zip_longest
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.fx import GraphModule, Node

from autotp.errors import AutotpError
from autotp.layouts import COLLECTIVES, Coordinate, Layout, SortedCut, Split, cut_size, piece
from autotp.program import op_name
from autotp.runtime.collectives import Bucket, Convert, Steps, flatten, unflatten
from autotp.runtime.primitives import AllToAll, Primitive
from autotp.runtime.sorted_rows import held_elements
from autotp.sharded import Sharded

Mesh = tuple[int, ...]


def coordinates(mesh: Mesh) -> list[Coordinate]:
    """Every coordinate of the mesh, in row-major order: the order of the ranks."""
    return list(product(*map(range, mesh)))


# ---- the definitions ------------------------------------------------------------------------------------------------


def gradient_layout(layout: Layout) -> Layout:
    """How the gradient of a tensor in `layout` lies: that of R is partial, of P full, those of I and S as the value."""
    dual = {"R": "P", "P": "I", "M": "I"}
    return Layout(tuple(dual.get(kind, kind) for kind in layout.kinds), layout.splits)


def scatter(
    full: Tensor,
    layout: Layout,
    mesh: Mesh,
    coordinate: Coordinate,
    generator: torch.Generator | None = None,
    order: Tensor | None = None,
) -> Tensor:
    """The local value, at `coordinate`, of the tensor `full`.

    On `P` axes the summands are random numbers that add up to `full`, and on `M` axes every element is lowered on all
    ranks but one; they come from a copy of `generator`, so that calls with the same generator for every rank fit
    together. Without generator the first rank of a `P` axis holds the value and the others zeros. Sorted rows need
    their `order`.
    """
    random = generator.clone_state() if generator is not None else None
    value = full
    for axis, kind in enumerate(layout.kinds):
        if kind == "P":
            value = _summand(value, mesh[axis], coordinate[axis], random)
        elif kind == "M" and random is not None:
            drop = torch.rand((mesh[axis], *full.shape), generator=random).to(full)
            drop -= drop.amin(0)
            value = value - drop[coordinate[axis]]
    for split in layout.splits:
        value = value.index_select(split.dim, _elements(split, mesh, coordinate, order).to(value.device))
    return value.clone()


def _elements(split: Split, mesh: Mesh, coordinate: Coordinate, order: Tensor | None) -> Tensor:
    """Every index of the global dim that the rank at `coordinate` holds."""
    if isinstance(split.cut, SortedCut):
        assert order is not None
        return held_elements(split, mesh, coordinate, order)
    held = [index for span in piece(split, mesh, coordinate) for index in range(*span)]
    return torch.tensor(held, dtype=torch.int64)


def _summand(value: Tensor, members: int, member: int, random: torch.Generator | None) -> Tensor:
    if random is None:
        return value if member == 0 else torch.zeros_like(value)
    shape = (members - 1, *value.shape)
    if value.dtype.is_floating_point or value.dtype.is_complex:
        others = torch.randn(shape, generator=random, dtype=value.dtype).to(value.device)
    else:
        others = torch.randint(-3, 4, shape, generator=random).to(value)
    return value - others.sum(0) if member == members - 1 else others[member]


def gather(
    locals: Sequence[Tensor], layout: Layout, mesh: Mesh, tolerance: float | None = None, order: Tensor | None = None
) -> Tensor:
    """The full tensor from the local values of all ranks, in row-major order.

    Along `I` and `R` axes the values must agree to `tolerance` relative to their greatest magnitude (by default the
    square root of the dtype's epsilon), else AutotpError. `P` axes are summed, of `M` axes the maximum is taken.
    """
    values = dict(zip(coordinates(mesh), locals, strict=True))
    for axis, kind in enumerate(layout.kinds):
        if kind != "S":
            values = _reduce_axis(values, axis, kind, layout, mesh, tolerance)
    first = next(iter(values.values()))
    if not layout.splits:
        return first
    shape = list(first.shape)
    for split in layout.splits:
        shape[split.dim] = cut_size(split.cut)
    full = first.new_zeros(shape)
    for coordinate, value in values.items():
        index: list[Tensor] = [torch.arange(size) for size in shape]
        for split in layout.splits:
            index[split.dim] = _elements(split, mesh, coordinate, order)
        expected = tuple(map(len, index))
        if tuple(value.shape) != expected:
            raise AutotpError(
                f"the rank at {coordinate} holds a tensor of shape {tuple(value.shape)} where layout {layout} of shape "
                f"{tuple(shape)} gives it {expected}; check that the tensor and the layout belong together"
            )
        if value.numel():
            grid = torch.meshgrid(*(part.to(value.device) for part in index), indexing="ij")
            full[grid] = value
    return full


def gather_gradient(
    locals: Sequence[Tensor], layout: Layout, mesh: Mesh, tolerance: float | None = None, order: Tensor | None = None
) -> Tensor:
    """The full gradient of a tensor in `layout` from those of its local values on all ranks, in row-major order.

    It must be equal along `I` and `P` axes, else AutotpError; it is summed along `R` and put together along `S` axes.
    """
    return gather(locals, gradient_layout(layout), mesh, tolerance, order)


def _reduce_axis(
    values: dict[Coordinate, Tensor], axis: int, kind: str, layout: Layout, mesh: Mesh, tolerance: float | None
) -> dict[Coordinate, Tensor]:
    """The values with `axis` reduced to its first coordinate."""
    found = {}
    for coordinate, first in values.items():
        if coordinate[axis]:
            continue
        group = [values[*coordinate[:axis], member, *coordinate[axis + 1 :]] for member in range(mesh[axis])]
        if kind in "PM":
            found[coordinate] = torch.stack(group).sum(0) if kind == "P" else torch.stack(group).amax(0)
            found[coordinate] = found[coordinate].to(first.dtype)
            continue
        for member, other in enumerate(group):
            if not _equal(first, other, tolerance):
                raise AutotpError(
                    f"layout {layout} wants equal tensors along mesh axis {axis}, but from {coordinate} those of ranks "
                    f"0 and {member} differ; look for a conversion that is missing or wrong before this tensor"
                )
        found[coordinate] = first
    return found


def _equal(a: Tensor, b: Tensor, tolerance: float | None) -> bool:
    a, b = a.detach(), b.detach()
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    if not (a.dtype.is_floating_point or a.dtype.is_complex) or not a.numel():
        return torch.equal(a, b)
    epsilon = torch.finfo(a.dtype).eps
    relative = epsilon**0.5 if tolerance is None else tolerance
    magnitude = float(torch.where(torch.isfinite(a), a.abs(), 0).max())
    return torch.allclose(a, b, rtol=0, atol=relative * magnitude + epsilon, equal_nan=True)


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
    """`runtime.collectives.run` for all ranks: `steps[r]` on `tensors[r]`."""
    values = list(tensors)
    for step in zip(*steps, strict=True):
        sent = [one.prepare(value) for one, value in zip(step, values, strict=True)]
        received = _exchange(step, sent, mesh)
        if step[0].name in COLLECTIVES:
            sizes = (x.numel() * x.element_size() for x in (*sent, *received))
            log(step[0].name, step[0].axis, max(sizes))
        values = [one.finish(value) for one, value in zip(step, received, strict=True)]
    return values


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


class _Lockstep(torch.autograd.Function):
    """A `Convert` on all ranks at once: `tensors[r]` is rank `r`'s."""

    @staticmethod
    def forward(
        ctx: Any, forward: list[Steps], backward: list[Steps], simulation: Simulation, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.way = backward, simulation
        ctx.set_materialize_grads(False)
        return tuple(_run(forward, tensors, simulation.mesh, simulation.log_forward))

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
        return None, None, None, *_run(backward, found, simulation.mesh, simulation.log_backward)


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
        reduced = [_run([steps] * ranks, buffer, simulation.mesh, simulation.log_backward) for buffer in buffers]
        for rank in range(ranks):
            parts = unflatten([buffer[rank] for buffer in reduced], per_rank[rank])
            for i, part in zip(needed, parts, strict=True):
                found[rank * count + i] = part
        return None, None, None, *found


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
        return [tuple(output) for output in self._interpret([rank.graph for rank in self.ranks], arguments)]

    def log_forward(self, primitive: str, axis: int, size: int) -> None:
        """Note a collective of the forward pass."""
        self.records.append(Record(primitive, axis, size, "forward"))

    def log_backward(self, primitive: str, axis: int, size: int) -> None:
        """Note a collective of the backward pass."""
        self.records.append(Record(primitive, axis, size, "backward"))

    def _interpret(self, graphs: Sequence[GraphModule], arguments: Sequence[Sequence[Any]]) -> list[Any]:
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
                results = self._call(graphs, nodes, args, kwargs)
            for node, values, result in zip(nodes, environments, results, strict=True):
                values[node] = result
        raise AutotpError("a graph has no output node; only graphs that return their results can be simulated")

    def _call(
        self, graphs: Sequence[GraphModule], nodes: Sequence[Node], args: list[Any], kwargs: list[Any]
    ) -> Sequence[Any]:
        """What the nodes, one of each rank, return."""
        functions: list[Any]
        if nodes[0].op == "call_module":
            modules: list[Any] = [_module(graph, node) for graph, node in zip(graphs, nodes, strict=True)]
            if isinstance(modules[0], Convert):
                return self._convert(modules, args)
            if isinstance(modules[0], Bucket):
                return self._merge(modules, args)
            if isinstance(modules[0], GraphModule):
                return self._interpret(modules, args)
            functions = modules
        elif nodes[0].op == "call_method":
            functions = [getattr(given[0], str(node.target)) for node, given in zip(nodes, args, strict=True)]
            args = [given[1:] for given in args]
        else:
            functions = [node.target for node in nodes]
        results = []
        for rank, (function, given, named) in enumerate(zip(functions, args, kwargs, strict=True)):
            try:
                results.append(function(*given, **named))
            except Exception as error:
                error.add_note(f"at node {nodes[rank].name} of virtual rank {coordinates(self.mesh)[rank]}")
                raise
        return results

    def _convert(self, modules: Sequence[Convert], args: Sequence[Any]) -> Sequence[Any]:
        tensors = [given[0] for given in args]
        steps = [module.steps(given[1:], given[0].device) for module, given in zip(modules, args, strict=True)]
        forward, backward = [one[0] for one in steps], [one[1] for one in steps]
        if not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)):
            return _run(forward, tensors, self.mesh, self.log_forward)
        if not modules[0].gradient:
            return _run(forward, [tensor.detach() for tensor in tensors], self.mesh, self.log_forward)
        results: Sequence[Any] = _Lockstep.apply(forward, backward, self, *tensors)
        return results

    def _merge(self, modules: Sequence[Bucket], args: Sequence[Any]) -> Sequence[Any]:
        count = len(args[0])
        results = _LockstepMerge.apply(modules[0].steps, len(modules), self, *(x for given in args for x in given))
        return [tuple(results[rank * count : (rank + 1) * count]) for rank in range(len(modules))]


def _module(graph: GraphModule, node: Node) -> nn.Module:
    return graph.get_submodule(str(node.target))


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
        blocks = [module for module in modules if isinstance(module, GraphModule)]
        if blocks:
            _check_alike(blocks, f"{path}{nodes[0].name}.")
        elif not isinstance(modules[0], (Convert, Bucket)) and _communicates(modules[0]):
            raise AutotpError(
                f"node {path + nodes[0].name} calls a {type(modules[0]).__name__} that communicates inside; only "
                f"GraphModules, Convert and Bucket can be simulated, so let the graph call those directly"
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
    if isinstance(module, Convert):
        return node.op, node.name, inputs, "Convert", module.path, module.symbols, module.gradient
    if isinstance(module, Bucket):
        return node.op, node.name, inputs, "Bucket", module.axis_path
    return node.op, node.name, inputs, type(module).__name__
