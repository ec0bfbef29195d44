"""What the rewriter hands to the runtime: a graph for one rank, and how each of its tensors lies on the mesh."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from autotp.layouts import Layout
from autotp.program import TensorType


@dataclass(frozen=True)
class StateSpec:
    """A parameter, buffer or constant: its name in the model, its global type, and the layout in which it rests."""

    name: str
    kind: Literal["parameter", "buffer", "constant"]
    type: TensorType
    layout: Layout


@dataclass(frozen=True)
class BorderSpec:
    """An input or output tensor of the model: its name, its global type, and the layout that crosses the border.

    `position` is its leaf number in the flattened `(args, kwargs)` or output.
    """

    name: str
    position: int
    type: TensorType
    layout: Layout


@dataclass(frozen=True)
class Sharded:
    """The model as one rank of the mesh runs it.

    Attributes:
        graph: an `fx.GraphModule`, a pure function but for `in_place`. It takes the local tensors of `state` in order, then the local
            tensors of `inputs` in order; it returns a flat tuple: the local tensors of `outputs`, then the new value of each of `updates`.
            Its `call_module` targets are `Convert`/`Bucket` modules (the only places that communicate) and block `GraphModule`s,
            which are nested in the same way, or stand in a `Recomputing` module.
        state, inputs, outputs: what lies where.
        updates: names of the buffers that the forward changes (their layout is that of the buffer).
        in_place: those of them into which the graph itself writes; what it returns as their new value is the tensor that it was given.
        mesh: size of each mesh axis; `coordinate`: this rank's place on it.
    """

    graph: torch.fx.GraphModule
    state: tuple[StateSpec, ...]
    inputs: tuple[BorderSpec, ...]
    outputs: tuple[BorderSpec, ...]
    updates: tuple[str, ...]
    mesh: tuple[int, ...]
    coordinate: tuple[int, ...]
    in_spec: Any
    out_spec: Any
    in_names: tuple[str, ...]
    in_constants: dict[int, Any]
    out_constants: dict[int, Any]
    in_place: frozenset[str] = frozenset()
