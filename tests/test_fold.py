from __future__ import annotations

import torch
from torch import nn

from autotp.fold import fold, unfolded
from autotp.trace import trace
from tests.models import example


def test_layers_fold_with_their_parameters() -> None:
    one = example("llama", num_hidden_layers=5)
    program = trace(one.model, one.args, one.kwargs, dynamic=False)
    folding = fold(program)
    (repeat,) = folding.repeats
    assert repeat.count == 5
    assert program.nodes[repeat.start].path == "model.layers.0.input_layernorm"
    weight = program.by_name["p_model_layers_3_mlp_up_proj_weight"]
    assert program.nodes[folding.representative[weight.index]].target == "model.layers.0.mlp.up_proj.weight"
    assert len(folding.members[folding.representative[weight.index]]) == 5


def test_layers_that_differ_by_their_mask_alone_fold_together() -> None:
    one = example("gemma2", num_hidden_layers=6)  # sliding and full attention in turn: the mask comes from outside
    program = trace(one.model, one.args, one.kwargs, dynamic=False)
    assert fold(program).repeats[-1].count == 6


def test_alternating_layers_fold_in_pairs() -> None:
    layers = [nn.Sequential(nn.Linear(8, 8), nn.Tanh()), nn.Sequential(nn.Linear(8, 8), nn.ReLU())] * 3
    model = nn.Sequential(nn.Linear(8, 8), *(nn.Sequential(*layer) for layer in layers))
    program = trace(model, (torch.randn(3, 8),), dynamic=False)
    assert [(repeat.period, repeat.count) for repeat in fold(program).repeats] == [(4, 3)]


def test_layers_of_one_matrix_fold_in_pairs() -> None:
    """Else all would be column-parallel, or all row-parallel."""

    def repeats(depth: int) -> list[tuple[int, int]]:
        layers = [nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(depth)]
        program = trace(nn.Sequential(*layers), (torch.randn(3, 8, requires_grad=True),), dynamic=False)
        return [(repeat.period, repeat.count) for repeat in fold(program).repeats]

    assert [repeats(depth) for depth in (3, 4, 5, 8)] == [[], [(4, 2)], [(4, 2)], [(4, 4)]]


class Stack(nn.Module):
    """Layers without a common container; the third is wired differently."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three, self.four = (nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.one(x).relu()
        second = self.two(first).relu()
        return self.four(self.three(second).relu() + first).relu()


def test_what_is_not_equal_is_not_folded() -> None:
    program = trace(Stack(), (torch.randn(3, 8),), dynamic=False)
    folding = fold(program)
    stands_for = {program.nodes[node].path: program.nodes[rep].path for node, rep in enumerate(folding.representative)}
    assert stands_for["three"] == "three"
    for node, representative in enumerate(folding.representative):
        assert program.nodes[node].outputs == program.nodes[representative].outputs
        assert program.nodes[node].op == program.nodes[representative].op


class Shared(nn.Module):
    """One layer called again and again: the same weight in every copy."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(8):
            x = torch.tanh(self.layer(x))
        return x


def test_a_shared_weight_stands_for_itself() -> None:
    program = trace(Shared(), (torch.randn(3, 8),), dynamic=False)
    folding = fold(program)
    assert folding.repeats[0].count == 3  # in pairs; the first copy reads an input without gradient
    weight = program.by_name["p_layer_weight"].index
    assert folding.members[weight] == (weight,)


def test_unfolded_is_the_identity() -> None:
    program = trace(Shared(), (torch.randn(3, 8),), dynamic=False)
    assert unfolded(program).representative == tuple(range(len(program.nodes)))
