"""Data-parallel decisions made by hand: DP, FSDP and HSDP of any traced model, whatever a search would pick; and their modules."""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from autotp.decisions import Decisions
from autotp.describe import conversions
from autotp.initial import state_values
from autotp.layouts import COLLECTIVES
from autotp.planning import Request, prepare, traced_sizes
from autotp.price.cluster import Link, load_cluster
from autotp.price.conversion import ConversionPrices
from autotp.program import Program, Ref
from autotp.ranks import mode_of_graph
from autotp.rewrite import rewrite
from autotp.runtime.function import plain_function
from autotp.runtime.module import ParallelModule
from autotp.runtime.prefetch import Prefetch
from autotp.runtime.random import seed_module
from autotp.strategies import Space, Strategy


def data_parallel(program: Program, mesh: dict[str, int], rests: str, mode: str = "train") -> tuple[Space, Decisions]:
    """Every operator on each rank's part of the batch, which all mesh axes split.

    `rests` has a letter for each mesh axis: "I" if every rank holds whole parameters there, "S" if they are split where they can be:
    "I" is data parallelism, "S" fully sharded, "IS" hybrid sharded data parallelism.
    """
    space, border = prepare(program, Request(mesh, mode))
    bytes_alone = replace(load_cluster("dgx-h100"), links=(Link("wire", None, 1e9, 1.0, 1e-9, 1e-9),))
    prices = ConversionPrices(bytes_alone, space.mesh, mode == "train", traced_sizes(program))
    chosen: dict[int, Strategy] = {}
    for index in space.folding.members:
        options, node = space.strategies[index], program.nodes[index]
        if node.kind == "parameter":
            wanted = tuple(rests)
            chosen[index] = min(options, key=lambda option: _distance(option.outputs[0].kinds, wanted))
        else:
            chosen[index] = min(options, key=lambda option: _exchanged(space, prices, index, option, chosen))
    stands_for = space.folding.representative
    paths = {
        (Ref(stands_for[found.ref.node], found.ref.output), found.target): found.path
        for found in conversions(space, chosen, border, prices)
    }
    return space, Decisions(chosen, paths, dict(border.inputs), dict(border.outputs))


def _distance(kinds: tuple[str, ...], wanted: tuple[str, ...]) -> int:
    return sum(kind != other for kind, other in zip(kinds, wanted, strict=True))


def _exchanged(
    space: Space, prices: ConversionPrices, index: int, option: Strategy, chosen: dict[int, Strategy]
) -> tuple[int, int, int, int]:
    """How little a strategy is data parallel: exchanges of activations, axes that do not split the first dim, layouts changed."""
    exchanges = changed = 0
    for place, wanted in enumerate(option.operands):
        ref = space.tensors[index, False, place][0]
        kind = space.program.nodes[ref.node].kind
        if kind in ("parameter", "input") or ref.node not in chosen:
            continue
        made = chosen[ref.node].outputs[ref.output]
        if made == wanted:
            continue
        table = prices.table(space.program.type_of(ref), space.dim_cuts(ref))
        if table.seconds(made, wanted) == float("inf"):
            return 1000, 0, 0, 0
        path = table.path(made, wanted)
        exchanges += sum((move.forward in COLLECTIVES) + (move.backward in COLLECTIVES) for move in path)
        changed += 1
    split = sum(
        len(found.axes) if (found := layout.split_at(0)) else 0
        for layout, tensor in zip(option.outputs, space.program.nodes[index].outputs, strict=True)
        if tensor.shape
    )
    return exchanges, -split, changed, len(option.outputs[0].splits)


def parallel_module(model: nn.Module, space: Space, decisions: Decisions, device_mesh: DeviceMesh, mode: str = "train") -> ParallelModule:
    """This rank's module, as `autotp.parallelize` makes it from a plan."""
    program = space.program
    sharded = rewrite(space, decisions, tuple(device_mesh.get_coordinate() or ()), gradient=mode == "train")
    seed_module(sharded.graph, 0)
    values: Any = state_values(model, program)
    return ParallelModule(
        sharded, device_mesh, values, program.aliases, program.persistent, device_mesh.device_type,
        signature=inspect.signature(model.forward), trained_mode=mode_of_graph(model, program),
    )  # fmt: skip


def without_prefetch(module: ParallelModule) -> None:
    """Let every conversion run at its place: nothing begins early."""
    graph = module._sharded.graph
    for name, child in graph.named_children():
        if isinstance(child, Prefetch):
            setattr(graph, name, Nothing())
    module._run = plain_function(graph)


class Nothing(nn.Module):
    """Begins nothing."""

    def forward(self, *args: Any) -> None:
        """None."""
