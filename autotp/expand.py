"""Put a block's nodes in the place of every operator that stands for a copy of it, in an exported graph.

While the model is exported, the nodes of a block are marked (`mark_body`); the marks come through all passes of the export, so that the
block is found again in what they made of it. The graph is then the one of a full export, but for the names of nodes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from autotp import _torch
from autotp.functional import MARK, OWN_DIRECTORY, is_write, site_of


class Inexact(Exception):
    """The graph cannot be expanded to exactly what a full export would give."""


@dataclass(frozen=True)
class Cut:
    """What an export has cut short.

    Attributes:
        names: per block, the path of the module whose nodes were kept.
        operators: per block, what stands for a call of a copy.
        calls: per such call, the number of the block and the path of the module called.
    """

    names: Sequence[str]
    operators: Sequence[Any]
    calls: Sequence[tuple[int, str]]


def mark_body(number: int, given: Sequence[fx.Node], steps: Sequence[fx.Node], made: Sequence[fx.Node | None]) -> None:
    """Write into the nodes of a traced block what they are to it."""
    for role, nodes in (("given", given), ("step", steps), ("made", made)):
        for place, node in enumerate(nodes):
            if node is not None:
                node.meta.setdefault(MARK, []).append((number, role, place))


@dataclass
class _Body:
    """A block in the finished graph: number → node for what it is given and makes, and its nodes in order."""

    given: dict[int, fx.Node] = field(default_factory=dict)
    made: dict[int, fx.Node] = field(default_factory=dict)
    marked: list[fx.Node] = field(default_factory=list)
    nodes: list[fx.Node] = field(default_factory=list)


def expand(exported: ExportedProgram, cut: Cut) -> None:
    """Replace every call that was cut short by copies of its block's nodes; the program is changed.

    The graph has no regions (`inline_regions`).

    Raises:
        Inexact: something that passes of the export have done, or a write into a block's results, is in the way.
    """
    graph = exported.graph
    bodies = _bodies(graph, cut)
    _check_writes(graph, cut, bodies)
    state = {str(spec.target): spec.arg.name for spec in exported.graph_signature.input_specs if spec.target is not None}
    placeholders = {node.name: node for node in graph.nodes if node.op == "placeholder"}
    owner = {placeholders[name]: target for target, name in state.items()}
    found: dict[fx.Node, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op == "call_function" and node.target in cut.operators:
            number, path = cut.calls[node.args[1][0]]
            prefix = f"{cut.names[number]}."

            def counterpart(item: fx.Node, prefix: str = prefix, path: str = path) -> fx.Node:
                target = owner.get(item, "")
                if not target.startswith(prefix):
                    return item
                if (name := f"{path}.{target.removeprefix(prefix)}") not in state:
                    raise Inexact
                return placeholders[state[name]]

            found |= _copied(graph, node, bodies[number], counterpart, cut.names[number], path)
    for result, new in found.items():  # not before all are copied: bodies are found by the nodes they are given
        result.replace_all_uses_with(new)
    for result in found:
        call: Any = result.args[0]
        graph.erase_node(result)
        if not call.users:
            graph.erase_node(call)


def _bodies(graph: fx.Graph, cut: Cut) -> list[_Body]:
    """The blocks of the finished graph."""
    bodies = [_Body() for _ in cut.names]
    for node in graph.nodes:
        for number, role, place in node.meta.get(MARK, ()):
            body = bodies[number]
            if role == "step":
                body.marked.append(node)
                continue
            if (body.given if role == "given" else body.made).setdefault(place, node) is not node:
                raise Inexact
    for body, name in zip(bodies, cut.names, strict=True):
        keys = {_key(node, name) for node in body.marked}
        if len(keys) != 1 or None in keys:
            raise Inexact
        key = keys.pop()
        body.nodes = [node for node in graph.nodes if key in node.meta.get("nn_module_stack", ())]
        if not set(body.marked) <= set(body.nodes):
            raise Inexact
    return bodies


def _key(node: fx.Node, name: str) -> str | None:
    """The entry of a node's module stack that is the call of the module `name`."""
    stack = node.meta.get("nn_module_stack") or {}
    found = [key for key, (path, _) in stack.items() if ".".join(part.partition("@")[0] for part in path.split(".")) == name]
    return found[0] if len(found) == 1 else None


def _check_writes(graph: fx.Graph, cut: Cut, bodies: Sequence[_Body]) -> None:
    """Raise Inexact if something writes, once blocks have run, to memory that copies of their nodes would seem to share."""
    touched: set[int] = set()
    members = {node for body in bodies for node in body.nodes}
    calls = set(cut.operators)
    for node in graph.nodes:
        if node.op == "call_function" and is_write(node) and (node in members or _memory(node, *node.all_input_nodes) & touched):
            raise Inexact
        if node in members or node.target in calls:
            touched |= _memory(node, *node.all_input_nodes)


def _memory(*nodes: fx.Node) -> set[int]:
    values = [node.meta.get("val") for node in nodes]
    tensors = [item for value in values for item in (value if isinstance(value, (tuple, list)) else (value,))]
    return {_torch.storage_key(item) for item in tensors if isinstance(item, torch.Tensor)}


def _copied(
    graph: fx.Graph, call: fx.Node, body: _Body, counterpart: Callable[[fx.Node], fx.Node], name: str, path: str
) -> dict[fx.Node, fx.Node]:
    """Copies a block's nodes before one call; gives what takes the place of each of the call's results."""
    operands: Any = call.args[0]
    if len(operands) - len(body.given) not in (0, 1) or site_of(call)[0] != path:
        raise Inexact
    inner: dict[fx.Node, fx.Node] = {node: operands[place] for place, node in body.given.items()}
    outside = call.meta.get("stack_trace") or ""
    with graph.inserting_before(call):
        for node in body.nodes:
            if not isinstance(node.meta.get("val"), (torch.Tensor, tuple, list)):
                continue  # sizes, which are the same in the copy, and what only checks
            new = graph.node_copy(node, lambda arg: inner.get(arg) or counterpart(arg))
            new.meta = {"val": node.meta["val"], "nn_module_stack": _renamed(node, name, path)}
            if inside := node.meta.get("stack_trace"):
                new.meta["stack_trace"] = outside[: split_at(outside)] + inside[split_at(inside) :]
            inner[node] = new
    if any(body.made.get(user.args[1]) not in inner for user in call.users):  # type: ignore[arg-type, call-overload]
        raise Inexact
    return {user: inner[body.made[user.args[1]]] for user in call.users}  # type: ignore[index]


def _renamed(node: fx.Node, name: str, path: str) -> dict[str, Any]:
    """The module stack of a copied node: its innermost module, inside the copy."""
    key, (_, kind) = next(reversed(node.meta["nn_module_stack"].items()))
    inner, _ = site_of(node)
    inside = f"{inner}.".startswith(f"{name}.")
    return {f"copy_{key}": (path + inner.removeprefix(name) if inside else inner, kind)}


def split_at(text: str) -> int:
    """Where in a printed stack the frames inside a block begin: after the last line of `trace_once`."""
    start = text.rfind(FRAME)
    return 0 if start < 0 else text.find("\n", text.find("\n", start) + 1) + 1 or len(text)


FRAME = f'File "{os.path.join(OWN_DIRECTORY, "trace_once.py")}"'
