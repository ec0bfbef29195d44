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

from autotp.functional import MARK, MEMORY, OWN_DIRECTORY, memory, site_of


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
        Inexact: something that passes of the export have done is in the way.
    """
    graph = exported.graph
    bodies = _bodies(graph, cut)
    state = {str(spec.target): spec.arg.name for spec in exported.graph_signature.input_specs if spec.target is not None}
    placeholders = {node.name: node for node in graph.nodes if node.op == "placeholder"}
    owner = {placeholders[name]: target for target, name in state.items()}
    found: dict[fx.Node, fx.Node] = {}
    places: dict[Any, Any] = {}
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
                found_in: fx.Node = placeholders[state[name]]
                return found_in

            results = _copied(graph, node, bodies[number], counterpart, cut.names[number], path)
            places.update((memory(result)[0], memory(new)[0]) for result, new in results.items())
            found |= results
    for node in graph.nodes:
        keys = memory(node)
        if not places.keys().isdisjoint(keys):
            node.meta[MEMORY] = [places.get(key, key) for key in keys]
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


def _copied(
    graph: fx.Graph, call: fx.Node, body: _Body, counterpart: Callable[[fx.Node], fx.Node], name: str, path: str
) -> dict[fx.Node, fx.Node]:
    """Copies a block's nodes before one call; gives what takes the place of each of the call's results."""
    operands: Any = call.args[0]
    if len(operands) - len(body.given) not in (0, 1) or site_of(call)[0] != path:
        raise Inexact
    inner: dict[fx.Node, fx.Node] = {node: operands[place] for place, node in body.given.items()}
    outside = call.meta.get("stack_trace") or ""
    shared: dict[Any, Any] = {}  # memory that the block did not make → that of its counterpart
    inside = set(body.nodes)
    for node in body.nodes:
        for item in node.all_input_nodes:
            if item not in inside:
                shared.update(zip(memory(item), memory(inner.get(item) or counterpart(item)), strict=True))
    with graph.inserting_before(call):
        for node in body.nodes:
            if not isinstance(node.meta.get("val"), (torch.Tensor, tuple, list)):
                continue  # sizes, which are the same in the copy, and what only checks
            new = graph.node_copy(node, lambda arg: inner.get(arg) or counterpart(arg))
            new.meta = {"val": node.meta["val"], "nn_module_stack": _renamed(node, name, path)}
            new.meta[MEMORY] = [shared.get(key, (call.name, key)) for key in memory(node)]
            if frames := node.meta.get("stack_trace"):
                new.meta["stack_trace"] = outside[: split_at(outside)] + frames[split_at(frames) :]
            inner[node] = new
    results = {user: body.made.get(user.args[1]) for user in call.users}  # type: ignore[arg-type, call-overload]
    if any(made is None or made not in inner for made in results.values()):
        raise Inexact
    return {user: inner[made] for user, made in results.items() if made is not None}


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
