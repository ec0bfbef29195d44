"""Make an exported graph functional, before it becomes a `Program`.

Two ideas: regions under `no_grad` are inlined behind `aten.detach`, and operators that write in place are made pure. A
write to a tensor that nothing else shares memory with is a mere renaming, done while the nodes are collected
(`renamings`), and so is the update of running statistics. Only if a view is written through is the whole graph
functionalised by PyTorch (which costs about as much as the export).
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from autotp import _torch
from autotp.errors import AutotpError
from autotp.program import op_name

aten = torch.ops.aten

MARK = "autotp_block"
"""Under this key, a node's `meta` says what it is to which traced block (`autotp.expand`)."""

MEMORY = "autotp_memory"
"""Under this key, where it is not that of the `meta`'s tensors, the memory of what a node gives (`memory`)."""

STATISTICS = {aten.batch_norm.default: (3, 5), aten.instance_norm.default: (3, 5)}
"""Operators that update running statistics, which their schema hides: position of those and of the flag for it."""


def site_of(node: fx.Node) -> tuple[str, str]:
    """(module path, `file:line` of the innermost frame outside PyTorch) of a traced node; "" where unknown."""
    stack = node.meta.get("nn_module_stack")
    path = ""
    if stack:
        key, (path, _) = next(reversed(stack.items()))
        path = (
            ""
            if key.startswith("_empty_nn_module_stack")
            else ".".join(part.partition("@")[0] for part in path.split("."))
        )
    return path, _user_frame(node.meta.get("stack_trace") or "")


def _user_frame(trace: str) -> str:
    """`file:line` of the last frame of a printed stack that is neither PyTorch's nor ours; of the last frame if all are."""
    innermost, end = "", len(trace)
    while (start := trace.rfind('File "', 0, end)) >= 0:
        file, _, rest = trace[start + 6 : start + 600].partition('", line ')
        frame = f"{file}:{rest[: len(rest) - len(rest.lstrip('0123456789'))]}"
        if not file.startswith((TORCH_DIRECTORY, OWN_DIRECTORY, "<")):
            return frame
        innermost, end = innermost or frame, start
    return innermost


TORCH_DIRECTORY = torch.__file__.removesuffix("__init__.py")
OWN_DIRECTORY = __file__.removesuffix("functional.py")


def where(node: fx.Node) -> str:
    """` in module `x` (file:line)` for error messages."""
    path, source = site_of(node)
    return f" in module `{path or '(root)'}`" + (f" ({source})" if source else "")


def make_functional(exported: ExportedProgram) -> tuple[ExportedProgram, dict[fx.Node, list[fx.Node]] | None]:
    """Find out how the writes of a graph without regions become pure.

    Returns the program to read, and for every in-place node the nodes that share its memory: each of them names the new
    value from there on. None instead of that table if PyTorch has functionalised the graph, which then holds no writes
    and no `torch.vmap` (but repeats views).

    """
    if any(_torch.is_vmap(node.target) for node in exported.graph.nodes):
        return exported.run_decompositions({}), None
    writes = [node for node in exported.graph.nodes if node.op == "call_function" and is_write(node)]
    if not writes:
        return exported, {}
    renamed = renamings(exported.graph, writes)
    if renamed is not None:
        return exported, renamed
    copy_detached(exported.graph, writes)
    return exported.run_decompositions({}), None


def running_statistics(node: fx.Node) -> tuple[fx.Node, ...]:
    """The running statistics that a batch or instance norm updates; of other operators none."""
    target: Any = node.target
    if target not in STATISTICS:
        return ()
    first, flag = STATISTICS[target]
    found = (node.args[first], node.args[first + 1])
    return tuple(item for item in found if isinstance(item, fx.Node)) if node.args[flag] else ()


def is_write(node: fx.Node) -> bool:
    return bool(running_statistics(node)) or _torch.is_mutable(node.target)


def written(node: fx.Node) -> list[fx.Node]:
    """What an operator that writes writes to."""
    target: Any = node.target
    if target in STATISTICS:
        return list(running_statistics(node))
    found = []
    for position in _torch.mutated_positions(target):
        item = node.args[position] if position < len(node.args) else node.kwargs.get(target._schema.arguments[position].name)
        found += [part for part in (item if isinstance(item, (tuple, list)) else (item,)) if isinstance(part, fx.Node)]
    return found


def memory(node: fx.Node) -> list[Any]:
    """What stands for the memory of each tensor that a node gives: equal where it is shared."""
    if MEMORY in node.meta:
        return list(node.meta[MEMORY])
    value = node.meta.get("val")
    several = value if isinstance(value, (tuple, list)) else (value,)
    return [_torch.storage_key(tensor) for tensor in several if isinstance(tensor, torch.Tensor)]


def renamings(graph: fx.Graph, writes: list[fx.Node]) -> dict[fx.Node, list[fx.Node]] | None:
    """In-place node → all nodes with the same memory, if every write is a plain renaming; otherwise None.

    A write is a renaming if the operator has a functional twin that computes in the same dtype, and if no view shared
    the tensor's memory before: only the tensor itself, what it is called once detached, and results of earlier in-place
    operators on it. (Views taken after the last write are harmless.)
    """
    groups, place = _sharing(graph), _places(graph)
    table: dict[fx.Node, list[fx.Node]] = {}
    writing = set(writes)
    for node in writes:
        target: Any = node.target
        if target in STATISTICS:  # written out by clean-up, unless something else has the memory of what is updated
            shared = [groups[memory(item)[0]] for item in running_statistics(node)]
            if any(item.op != "placeholder" for group in shared for item in group):
                return None
            continue
        if not _torch.returns_its_input(target) or _torch.functional_variant(target) is None:
            return None
        group = groups[memory(node)[0]]
        earlier = group[1 : group.index(node)]
        if not all(item in writing or _renames(item, group, place[node], place) for item in earlier) or not _keeps_dtype(node):
            return None
        table[node] = group
    return table


def copy_detached(graph: fx.Graph, writes: list[fx.Node]) -> None:
    """Copy what is detached and then written to, where the detached tensor is the only name left.

    PyTorch's functionalisation writes to the original and reads it back through the detach, which loses the gradient.
    """
    groups, place = _sharing(graph), _places(graph)
    last = {memory(node)[0]: node for node in reversed(writes) if isinstance(node.meta.get("val"), torch.Tensor)}
    for key, write in last.items():
        for node in groups[key]:
            if place[node] < place[write] and _renames(node, groups[key], place[write], place):
                with graph.inserting_after(node):
                    copy = graph.call_function(aten.clone.default, (node,))
                copy.meta = dict(node.meta)
                node.replace_all_uses_with(copy, delete_user_cb=lambda user, copy=copy: user is not copy)  # type: ignore[misc]


def _sharing(graph: fx.Graph) -> dict[int, list[fx.Node]]:
    """Memory → the nodes whose tensors lie there, in execution order."""
    groups: dict[int, list[fx.Node]] = {}
    for node in graph.nodes:
        for key in memory(node):
            groups.setdefault(key, []).append(node)
    return groups


def _places(graph: fx.Graph) -> dict[fx.Node, int]:
    return {node: number for number, node in enumerate(graph.nodes)}


def _renames(node: fx.Node, group: list[fx.Node], write: int, place: dict[fx.Node, int]) -> bool:
    """Whether a node only detaches a tensor that is not used itself after the write: the detached one is then its only name."""
    before = group[: group.index(node)]
    return node.target is aten.detach.default and all(place[user] <= write for item in before for user in item.users)


def _keeps_dtype(node: fx.Node) -> bool:
    """Whether the functional twin gives the dtype of the written tensor (`add` would promote in `half.add_(float)`)."""
    written = node.meta["val"].dtype
    others = {
        arg.meta["val"].dtype for arg in node.all_input_nodes if isinstance(arg.meta.get("val"), torch.Tensor)
    } - {written}
    return all(written.is_floating_point and not (other.is_floating_point or other.is_complex) for other in others)


def inline_regions(module: fx.GraphModule) -> None:
    """Put the bodies of `no_grad`, `enable_grad` and disabled `autocast` regions in their place in `module.graph`.

    What enters a `no_grad` region goes through `aten.detach`, so that nothing inside needs a gradient.

    Raises:
        AutotpError: an autocast region that is on; any other higher-order operator (`cond`, `while_loop`, ...).
    """
    graph = module.graph
    for node in list(graph.nodes):
        if node.op != "call_function" or not isinstance(node.target, torch._ops.HigherOrderOperator):
            continue
        detached = False
        if node.target is _torch.GRAD_REGION:
            enabled, body, *operands = node.args
            detached = not enabled
        elif node.target is _torch.AUTOCAST_REGION and not node.args[2]:
            body, *operands = node.args[4:]
        elif node.target is _torch.AUTOCAST_REGION:
            inside = getattr(module, node.args[4].target).graph.nodes
            first = next((item for item in inside if item.op == "call_function"), node)
            raise AutotpError(
                f"torch.autocast is switched on{where(first)}, which cannot be split; convert the model to the dtype "
                "it should run in (`model.bfloat16()`) and remove the autocast."
            )
        else:
            name = op_name(node.target).rpartition(".")[2]
            raise AutotpError(
                f"the higher-order operator `{name}`{where(node)} cannot be split; use ordinary tensor operations."
            )
        assert isinstance(body, fx.Node)
        region = getattr(module, str(body.target))
        inline_regions(region)
        results = _inline(graph, region.graph, node, operands, detached)
        for user in list(node.users):
            assert user.target is operator.getitem
            user.replace_all_uses_with(results[user.args[1]])
            graph.erase_node(user)
        graph.erase_node(node)
        if not body.users:
            graph.erase_node(body)


def _inline(graph: fx.Graph, body: fx.Graph, node: fx.Node, operands: list[Any], detached: bool) -> Any:
    """Copy `body` before `node`; returns its outputs as nodes of `graph`."""
    inner: dict[fx.Node, fx.Node] = {}
    outer: dict[fx.Node, fx.Node] = {}
    results: Any = ()
    inputs = iter(operands)
    with graph.inserting_before(node):
        for item in body.nodes:
            if item.op == "placeholder":
                outer[item] = inner[item] = operand = next(inputs)
                if detached and _may_need_gradient(operand):
                    inner[item] = graph.call_function(aten.detach.default, (operand,))
                    inner[item].meta = {**node.meta, "val": operand.meta["val"]}
            elif item.op == "output":
                results = fx.map_arg(item.args[0], lambda arg: outer.get(arg, inner[arg]))
            else:
                inner[item] = graph.node_copy(item, lambda arg: inner[arg])
                if _returns_itself(item) and item.args[0] in outer:
                    outer[item] = outer[item.args[0]]  # the very tensor that entered, which keeps its gradient
    return results


CONVERSIONS = frozenset({aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.to.other, aten.type_as.default, aten.contiguous.default})


def _returns_itself(node: fx.Node) -> bool:
    """Whether a conversion has nothing to convert: it then returns its operand, not a copy or view."""
    if node.target not in CONVERSIONS or not isinstance(node.args[0], fx.Node):
        return False
    before, after = node.args[0].meta.get("val"), node.meta.get("val")
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor) or before.dtype != after.dtype:
        return False
    return _torch.storage_key(before) == _torch.storage_key(after)


def _may_need_gradient(operand: Any) -> bool:
    """Whether a tensor that enters a region could depend on something trainable."""
    value = operand.meta.get("val") if isinstance(operand, fx.Node) else None
    if not isinstance(value, torch.Tensor) or not (value.is_floating_point() or value.is_complex()):
        return False
    return operand.op != "placeholder" or value.requires_grad
