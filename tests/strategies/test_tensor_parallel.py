"""Tensor parallelism comes out of the search: Megatron's, with sequence parallelism, with a split vocabulary, and in two dims.

Every test names the model, mesh, cluster and sizes for which the strategy is the optimum, under the prices of a shipped cluster.
The very plan is then simulated at a small size of the same model, in float64, against one device.
"""

from __future__ import annotations

from functools import cache

import pytest
import torch

from tests.models import TOLERANCE
from tests.strategies.models import MLP
from tests.strategies.search import Build, Found, decoder, prices, search, tokens, worst_at

LAYERS = 2
GPT3 = {"width": 12288, "heads": 96, "groups": 96, "inner": 32768, "vocabulary": 51200}
"""The 175B shape (Brown et al. 2020), with gated MLPs."""
SMALL = {"width": 32, "heads": 8, "groups": 8, "inner": 64, "vocabulary": 64}
IN = ("q", "k", "v", "gate", "up")
OUT = ("o", "down")


def blocks(name: str) -> str:
    return f"p_blocks_0_{name}_weight"


def weights_are_column_and_row(found: Found, axis: int = 0) -> None:
    """Weights rest as they are used: what enters a block column-parallel, what leaves it row-parallel, heads between."""
    for names, dim in ((IN, "S(0)"), (OUT, "S(1)")):
        for name in names:
            assert found.weights[blocks(name)].split(", ")[axis] == dim, name
            assert found.used(blocks(name)) == {found.weights[blocks(name)]}, name
    assert found.words("blocks.0") == {"heads"}


@cache
def gpt3(batch: int, seq: int, tied: bool = False) -> Found:
    return search(decoder(LAYERS, tied, **GPT3), tokens(batch, seq), {"tp": 8}, "dgx-h100")


def small(tied: bool = False) -> Build:
    return decoder(LAYERS, tied, **SMALL)


@pytest.mark.parametrize("seq", [64, 512])
def test_megatron(seq: int) -> None:
    """Megatron-LM (Shoeybi et al. 2019): 2n all-reduces forward, 2n backward; wins for few tokens, where one start beats two."""
    found = gpt3(1, seq)
    weights_are_column_and_row(found)
    inside = [entry for entry in found.plan.conversions if entry.copies == LAYERS]
    assert sum(len(entry.forward) for entry in inside) == 4
    assert [entry.forward[0] for entry in inside].count("all_reduce over tp") == 2
    assert [entry.backward[0] for entry in inside].count("all_reduce over tp") == 2
    assert {word for entry in inside for word in (*entry.forward, *entry.backward)} == {"", "all_reduce over tp"}
    assert not found.moved("backward", weights=True)
    assert worst_at(found, small(), tokens(1, 16)) < TOLERANCE


def test_megatron_with_sequence_parallelism() -> None:
    """Korthikanti et al. 2022: an all-gather in and a reduce-scatter out of every half of a block; wins for many tokens.

    Between, activations are split by sequence, and norms have 1/8 of the work; only their small weights are all-reduced, in one bucket.
    """
    found = gpt3(1, 2048)
    weights_are_column_and_row(found)
    inside = [e for e in found.plan.conversions if e.copies == LAYERS and e.node not in found.weights]
    moves = sorted((e.shows[0], e.shows[-1], *e.forward, *e.backward) for e in inside)
    into = ("S(1)", "R", "all_gather over tp", "reduce_scatter over tp")
    out = ("P", "S(1)", "reduce_scatter over tp", "all_gather over tp")
    assert moves == [out, out, into, into]
    assert {name for name in found.weights if found.used(name) != {found.weights[name]}} == {n for n in found.weights if "norm" in n}
    assert found.plan.collectives["backward"]["all_reduce"] == LAYERS + 1  # a bucket of norms for each block and one for the root
    assert worst_at(found, small(), tokens(1, 16)) < TOLERANCE


@pytest.mark.parametrize("seq", [512, 2048])
def test_vocabulary_parallel_embedding_and_loss(seq: int) -> None:
    """Megatron-LM too: the tied table rests in rows of the vocabulary, looked up with a mask, and logits are never whole.

    The loss takes three all-reduces of a number per token (maximum, sum of exponentials, the target's logit).
    """
    found = gpt3(1, seq, tied=True)
    assert found.weights["p_embedding_weight"] == "S(0)" and found.used("p_embedding_weight") == {"S(0)"}
    assert found.words("embedding") == {"vocab"} and found.words("head") == {"column"}
    ends = {entry.node: entry for entry in found.plan.conversions}
    assert ends["embedding"].shows[0] == "P"
    assert ends["row_maximum"].forward == ("all_reduce_max over tp",)
    assert ends["sum_exp"].forward == ends["pick"].forward == ("all_reduce over tp",)
    assert not any(name.startswith("linear") and entry.shows[0] == "S(2)" for name, entry in ends.items())  # no logits move
    assert worst_at(found, small(tied=True), tokens(1, 16)) < TOLERANCE


def test_two_dimensional_tensor_parallelism() -> None:
    """Two mesh axes split two dims of one weight, which nobody ever gathers (weight-stationary 2-D, Pope et al. 2022, section 3.2.2).

    Wins where tokens are few and the weights are large: 4 × 2048 tokens on 16 devices of four nodes.
    """
    mesh = {"nodes": 4, "gpus": 4}
    found = search(decoder(LAYERS, **GPT3), tokens(4, 2048), mesh, "derecho")
    matrices = [blocks(name) for name in (*IN, *OUT)]
    assert all("I" not in found.weights[name] for name in matrices)
    in_two_dims = [name for name in matrices if {word[2] for word in found.weights[name].split(", ")} == {"0", "1"}]
    assert len(in_two_dims) >= 5
    assert all(found.used(name) == {found.weights[name]} for name in matrices)
    moved = found.moved("forward", weights=False) + found.moved("backward", weights=False)
    assert {word.partition(" over ")[2] for word in moved} == {"nodes", "gpus"}
    assert worst_at(found, decoder(LAYERS, **{**SMALL, "width": 64, "heads": 16, "groups": 16}), tokens(4, 16)) < TOLERANCE


@pytest.mark.parametrize(("q", "wins_at"), [(2, 8), (4, 1.6), (8, 0.6154)])
@pytest.mark.parametrize("side", [0.5, 1.05, 2.1])
def test_two_dims_against_summa(q: int, wins_at: float, side: float) -> None:
    """Words per device of an MLP forward, T tokens, width h, inner 4h, on P = q² devices: SUMMA (1−1/q)(5Th+8h²)/q (van de Geijn &
    Watts 1997), Megatron 2(1−1/P)Th. SUMMA wins beyond T = 8h at P = 4, 1.6h at 16, 0.62h at 64.

    Prices of bytes alone (training moves everything twice, as every move has its mirror image). The search never moves more than
    either: where SUMMA beats Megatron, splitting tokens on one axis and both weights on the other moves (1−1/q)(2Th+8h²)/q.
    """
    h = 2048
    count = int(side * wins_at * h) // (q * q) * q * q
    x = torch.zeros(count, h, requires_grad=True)
    lies = {"x": 0, "y": 1}  # activations rest split in two dims, as SUMMA's do
    asked = {"inputs": {"x": lies}, "outputs": {"output": lies}}
    found = search(lambda: MLP(h, 4 * h), (x,), {"x": q, "y": q}, prices((1.0,), (None,), flops=1e-2), **asked)
    words = found.plan.time.communication_s / 4  # two ways, two bytes
    summa = (1 - 1 / q) * (5 * count * h + 8 * h * h) / q
    megatron = 2 * (1 - 1 / q**2) * count * h
    assert (summa < megatron) == (side > 1)
    assert words < 1.001 * min(summa, megatron)
    mixed = (1 - 1 / q) * (2 * count * h + 8 * h * h) / q
    assert words < 1.001 * mixed
    if side == (1.05 if q == 2 else 2.1):  # further up, weights gathered whole move less on four devices
        assert words == pytest.approx(mixed, rel=1e-3)
        assert set(found.plan.strategies.values()) == {"batch+column", "batch+row"}
    if q == 2:
        example = torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        assert worst_at(found, lambda: MLP(4, 16), (example.requires_grad_(),)) < TOLERANCE
