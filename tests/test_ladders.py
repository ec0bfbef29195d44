"""What the blocks of known models can make again, against the activation bytes per layer that the literature counts.

Korthikanti et al. 2022 (arXiv:2205.05198), for a GPT layer in 16 bits with dropout and attention's scores stored: s = sequence, b = batch,
h = hidden size, a = heads, t = tensor-parallel ranks.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from autotp.formulate import formulate
from autotp.memory_limit import Walked, walk
from autotp.planning import Request, make_plan, prepare, traced_sizes
from autotp.price.cluster import load_cluster
from autotp.price.conversion import ConversionPrices
from autotp.program import Program
from autotp.recompute import Ladder
from autotp.solve import solve
from autotp.trace import trace
from autotp.words import apply_pins

S, B, H, A = 1024, 4, 1024, 16
SBH, SCORES = S * B * H, 5 * A * S / H
LAYERS = 3


class Layer(nn.Module):
    """A GPT layer with attention written out."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(H), nn.LayerNorm(H)
        self.qkv, self.out, self.up, self.down = nn.Linear(H, 3 * H), nn.Linear(H, H), nn.Linear(H, 4 * H), nn.Linear(4 * H, H)
        self.drop1, self.drop2, self.drop3 = nn.Dropout(0.1), nn.Dropout(0.1), nn.Dropout(0.1)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).view(B, S, 3, A, H // A).permute(2, 0, 3, 1, 4).unbind(0)
        weights = self.drop1(torch.softmax(q @ k.transpose(-1, -2) * (H // A) ** -0.5 + mask, -1))
        x = x + self.drop2(self.out((weights @ v).transpose(1, 2).reshape(B, S, H)))
        return x + self.drop3(self.down(functional.gelu(self.up(self.norm2(x)))))


class GPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.norm = nn.Embedding(1000, H), nn.LayerNorm(H)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.register_buffer("mask", torch.full((S, S), -1e4).triu(1), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x, self.mask)
        return self.norm(x).float().mean()


@cache
def program() -> Program:
    with torch.device("meta"):
        model, ids = GPT().to(torch.bfloat16).train(), torch.zeros(B, S, dtype=torch.long)
    return trace(model, (ids,), {}, dynamic=False)


MEGATRON = {"*.qkv": "column", "*.out": "row", "*.up": "column", "*.down": "row"}


@cache
def walked(ranks: int, norms: str = "replicate") -> Walked:
    """The fastest plan with Megatron's layouts, walked."""
    space, border = prepare(program(), Request({"tp": ranks}))
    prices = ConversionPrices(load_cluster("dgx-h100"), (ranks,), True, traced_sizes(program()))
    pins = {**MEGATRON, "*.norm1": norms, "*.norm2": norms} if ranks > 1 else {}
    formulation = formulate(space, prices, border, apply_pins(space, pins))
    return walk(space, prices, border, formulation, solve(formulation.problem))


def only(found: Walked) -> Ladder:
    (ladder,) = found.ladders
    assert ladder.copies == LAYERS
    return ladder


def per_layer(found: Walked, again: float = 0) -> float:
    """Bytes that a layer keeps, its input included, in units of sbh, if it keeps `again` less; statistics of norms count little."""
    return (only(found).kept - again) / SBH


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_activation_bytes_per_layer_of_tensor_parallelism(ranks: int) -> None:
    expected = 34 + SCORES if ranks == 1 else 10 + 24 / ranks + SCORES / ranks
    assert per_layer(walked(ranks)) == pytest.approx(expected, abs=0.05)


@pytest.mark.parametrize("ranks", [2, 4])
def test_sequence_parallelism_keeps_a_share_of_all_once_norms_are_gathered_again(ranks: int) -> None:
    """The paper keeps this rank's part of a norm's output and gathers it again in backward; kept, the two gathered ones take 4 sbh."""
    found = walked(ranks, "sequence")
    gathered = [size for (_, layout), size in only(found).rungs[-1].tensors.items() if layout.kinds == ("R",) and size]
    assert gathered == [2 * SBH, 2 * SBH]
    assert per_layer(found, sum(gathered) - 2 * 2 * SBH // ranks) == pytest.approx((34 + SCORES) / ranks, abs=0.05)


@pytest.mark.parametrize("ranks", [1, 4])
def test_the_last_rung_keeps_a_layer_s_input_alone(ranks: int) -> None:
    found = walked(ranks)
    assert per_layer(found, only(found).rungs[-1].bytes) == pytest.approx(2, abs=1e-6)


def test_a_small_shortage_touches_attention_s_dropout_and_a_larger_one_its_softmax_and_the_mlp() -> None:
    """What costs least for its bytes comes first: elementwise work on scores, then that of the MLP, products last."""
    ladder = only(walked(1))
    nodes = program().nodes

    def operators(rung: int) -> set[str]:
        before = ladder.rungs[rung - 1].tensors if rung else {}
        return {nodes[ref.node].op.split(".")[1] for ref, _ in ladder.rungs[rung].tensors.keys() - before.keys()}

    scores = {ref for ref, _ in ladder.rungs[0].tensors}
    assert operators(0) == {"dropout"} and {nodes[ref.node].outputs[0].shape for ref in scores} == {(B, A, S, S)}
    first = {word: next(rung for rung in range(len(ladder.rungs)) if word in operators(rung)) for word in ("gelu", "layer_norm", "softmax")}
    products = next(rung for rung in range(len(ladder.rungs)) if operators(rung) & {"linear", "matmul"})
    assert first["gelu"] < products and first["layer_norm"] < products
    selective = ladder.rungs[first["softmax"]]
    assert per_layer(walked(1), selective.bytes) < 34  # what the paper's selective recomputation leaves


class Wide(nn.Module):
    """Layers whose weights are large and whose activations are small."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(4096, 16384, bias=False), nn.GELU(), nn.Linear(16384, 4096, bias=False)) for _ in range(6)
        )

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x.float().square().mean()


@cache
def wide() -> Program:
    with torch.device("meta"):
        return trace(Wide().to(torch.bfloat16), (torch.zeros(8192, 4096, dtype=torch.bfloat16),), {}, dynamic=False)


def test_gathered_weights_are_kept_with_room_and_gathered_again_without() -> None:
    """ZeRO-2, with weights split at rest and kept once gathered, becomes ZeRO-3 (Rajbhandari et al. 2020) copy by copy."""
    cluster = load_cluster("dgx-h100")
    weights = 6 * 2 * 4096 * 16384 * 2
    free = make_plan(wide(), Request({"dp": 8}, data=("dp",)), cluster, "wide")
    zero_2 = [entry for entry in free.conversions if entry.forward == ("all_gather over dp",)]
    assert sum(entry.copies for entry in zero_2) == 12 and free.recomputed == ()
    once = free.collectives["backward"].get("all_gather", 0)
    seen = []
    for share in (0.9, 0.6):
        limit = free.memory.total - (1 - share) * weights
        plan = make_plan(wide(), Request({"dp": 8}, data=("dp",), memory=limit), cluster, "wide", time_limit=4.0)
        assert plan.memory.total <= limit
        again = [entry for entry in plan.recomputed if entry.layout == "R"]
        seen.append(sum(entry.copies for entry in again))
        assert plan.collectives["backward"]["all_gather"] == once + seen[-1]
        assert plan.collectives["forward"] == free.collectives["forward"]
    assert 0 < seen[0] < seen[1] <= 12
