"""What a rewrite of clean-up sees: one call, and the collector of nodes to which it may append others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from autotp.program import Node, Ref, TensorType


@dataclass(frozen=True)
class Call:
    """An operator call about to become a node; `outputs` do not require a gradient yet."""

    name: str
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outputs: tuple[TensorType, ...]
    several: bool = False
    """Whether the operator returns a tuple or list."""
    path: str = ""
    source: str = ""
    device: torch.device | None = None
    """Where the trace has the result."""

    @property
    def operand(self) -> Ref:
        """The first argument, a tensor."""
        operand: Ref = self.args[0]
        return operand


class Collector(Protocol):
    """What a rewrite may do: ask for nodes and types, append further calls."""

    @property
    def nodes(self) -> Sequence[Node]: ...
    def type(self, ref: Ref) -> TensorType: ...
    def emit(self, call: Call) -> Any: ...
    def intern(self, shape: tuple[Any, ...], hint: tuple[int, ...], dtype: torch.dtype, requires_grad: bool) -> TensorType: ...


Rewritten = Ref | tuple[Ref, ...] | Call
"""What a call amounts to (one tensor, or one for each of its results), or the call to append in its place."""

Rewrite = Callable[[Collector, Call], Rewritten]
