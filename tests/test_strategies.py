"""What can be chosen: cuts that travel through the graph, and the strategies that follow from the rules."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from autotp.layouts import Segment
from autotp.planning import Request, prepare
from autotp.program import Program, Ref
from autotp.strategies import Space
from autotp.trace import trace
from tests.models import example


def space_of(program: Program, *mesh: int) -> Space:
    return prepare(program, Request({f"a{number}": size for number, size in enumerate(mesh)}))[0]


def traced(name: str, **changed: Any) -> Program:
    one = example(name, **changed)
    return trace(one.model, one.args, one.kwargs, dynamic=False)


def named(space: Space, op: str, path: str = "") -> int:
    return next(n for n in space.rules if space.program.nodes[n].op == op and space.program.nodes[n].path.endswith(path))


def test_a_fused_projection_is_cut_in_three_segments_of_whole_heads() -> None:
    program = traced("gpt2")
    space = space_of(program, 4)
    weight = program.by_name["p_transformer_h_0_attn_c_attn_weight"]
    assert (Segment(3, 14, 4),) in space.cuts.of(Ref(weight.index), 1)


def test_heads_that_do_not_divide_are_cut_unevenly_or_by_their_repeats() -> None:
    program = traced("llama")  # 14 heads on 2 key heads
    space = space_of(program, 4)
    query = program.by_name["p_model_layers_0_self_attn_q_proj_weight"]
    cuts = space.cuts.of(Ref(query.index), 0)
    assert (Segment(1, 2, 28),) in cuts  # whole groups: two ranks get one each
    assert (Segment(2, 7, 4),) in cuts  # 7 repeats of either group over all ranks
    attention = named(space, "aten.scaled_dot_product_attention.default")
    repeats = next(s for s in space.strategies[attention] if s.key == ("r",))
    assert [layout.kinds for layout in repeats.operands[:3]] == [("S",), ("R",), ("R",)]


def test_a_linear_offers_column_row_and_batch() -> None:
    space = space_of(trace(nn.Linear(6, 8), (torch.randn(4, 6, requires_grad=True),), dynamic=False), 2)
    node = named(space, "aten.linear.default")
    shown = {s.key[0]: ([str(layout) for layout in s.operands], str(s.outputs[0])) for s in space.strategies[node]}
    assert shown["o"] == (["R", "S(0)", "S(0)"], "S(1)")
    assert shown["i"] == (["S(1)", "S(1)", "P"], "P")
    assert next(found for key, found in shown.items() if key.startswith("dim")) == (["S(0)", "R", "R"], "S(0)")
    assert shown["I"] == (["I", "I", "I"], "I")
    assert shown["R"] == (["R", "R", "R"], "R")
    assert shown["P0"] == (["P", "R", "P"], "P")
    assert shown["P1"] == (["R", "P", "P"], "P")


def test_without_gradient_there_is_no_replicate() -> None:
    space = space_of(trace(nn.Linear(6, 8), (torch.randn(4, 6),), dynamic=False), 2)
    node = named(space, "aten.linear.default")
    assert all("R" not in strategy.operands[0].kinds for strategy in space.strategies[node])


class CountsTruth(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x > 0).sum(0) * x


def test_truth_values_have_no_summands() -> None:
    space = space_of(trace(CountsTruth(), (torch.randn(4, 6),), dynamic=False), 2)
    node = named(space, "aten.sum.dim_IntList")
    assert all("P" not in strategy.operands[0].kinds for strategy in space.strategies[node])
    assert any("P" in strategy.outputs[0].kinds for strategy in space.strategies[node])


def test_two_factors_of_one_merged_dim_are_not_split_at_once() -> None:
    program = traced("gpt2", batch=4)
    space = space_of(program, 2, 2)
    for strategies in space.strategies.values():
        for strategy in strategies:
            for layout in (*strategy.operands, *strategy.outputs):
                assert len({split.dim for split in layout.splits}) == len(layout.splits)


def test_parameters_rest_in_either_order_of_two_axes() -> None:
    space = space_of(trace(nn.Linear(8, 8), (torch.randn(4, 8),), dynamic=False), 2, 2)
    weight = space.program.by_name["p_weight"].index
    keys = {strategy.key for strategy in space.strategies[weight]}
    assert {("S0/0", "S0/1"), ("S0/1", "S0/0"), ("S0", "S1"), ("I", "S1")} <= keys
