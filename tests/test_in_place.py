"""Which buffers are written where they lie, and that nobody sees the difference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autotp.equality import compare, emitted
from autotp.in_place import writes_in_place
from autotp.planning import Request, adopt, for_mode, make_plan
from autotp.trace import trace
from tests.models import TOLERANCE, splitting_pays


class Memory(nn.Module):
    """Writes rows into a buffer; `reads` says what it then gives."""

    def __init__(self, reads: str) -> None:
        super().__init__()
        self.reads, self.weight = reads, nn.Linear(8, 8)
        self.register_buffer("rows", torch.arange(40.0).reshape(5, 8))
        self.register_buffer("copy", torch.zeros(5, 8))

    def forward(self, x: Tensor, places: Tensor) -> Any:
        before = self.rows.clone()
        self.rows.index_copy_(0, places, self.weight(x))
        if self.reads == "old":
            return self.rows.sum(0) + before.sum(0)
        if self.reads == "itself":
            return self.rows
        if self.reads == "view":
            return self.rows[1:3]
        if self.reads == "other buffer":
            self.copy.copy_(self.rows)
        return self.rows * 2


KEPT = ("old", "itself", "view", "other buffer")


@pytest.mark.parametrize("reads", ["new", *KEPT])
@pytest.mark.parametrize("mesh", [{"tp": 2}, {"a": 2, "b": 2}])
def test_buffers(reads: str, mesh: dict[str, int]) -> None:
    """In place exactly where nothing else holds the memory; outputs and buffers are those of one device either way."""
    torch.manual_seed(0)
    model = Memory(reads).double().eval()
    args = (torch.randn(2, 8, dtype=torch.float64), torch.tensor([3, 1]))
    program = trace(model, args)
    assert not writes_in_place(program), "a program with gradients writes nothing in place"
    found = writes_in_place(for_mode(program, "inference"))
    assert [program.nodes[buffer].target for buffer in found.values()] == ([] if reads in KEPT else ["rows"])
    plan = make_plan(program, Request(mesh, "inference"), splitting_pays(), "memory")
    space, decisions = adopt(program, Request(mesh, "inference"), plan)
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    result = compare(space, decisions, state, args, {}, gradient=False)
    assert result.worst < TOLERANCE, result.where
    rank = emitted(space, decisions, gradient=False)[0]
    assert rank.in_place == (frozenset() if reads in KEPT else {"rows"})
    assert ("index_copy_.default" in rank.graph.code) == bool(rank.in_place)
