"""Data parallelism and what shards its state come out of the search: DDP, ZeRO-2 and -3, HSDP, FSDP × TP inside nodes; or nothing."""

from __future__ import annotations

from tests.models import TOLERANCE
from tests.strategies.search import Found, decoder, search, tokens, worst_at

LAYERS = 2
SMALL = {"width": 32, "heads": 8, "groups": 8, "inner": 64, "vocabulary": 64}


def small_error(found: Found, batch: int = 16, **sizes: int) -> float:
    return worst_at(found, decoder(LAYERS, **{**SMALL, **sizes}), tokens(batch, 16))


def everything_by_batch(found: Found) -> None:
    assert {word for module, word in found.plan.strategies.items() if module.startswith("blocks")} == {"batch"}


def matrices(found: Found) -> dict[str, str]:
    return {name: layout for name, layout in found.weights.items() if "norm" not in name}


def test_plain_replication() -> None:
    """Where one device is best, the plan splits nothing and says so: a decoder of 100,000 parameters and 16 tokens."""
    found = search(decoder(LAYERS, width=64, heads=4, groups=4, inner=128, vocabulary=256), tokens(1, 16), {"tp": 8}, "dgx-h100")
    assert not found.split_axes and not found.plan.conversions
    assert found.plan.collectives == {"forward": {}, "backward": {}}
    assert any("splits nothing" in note for note in found.plan.notes)
    assert worst_at(found, decoder(LAYERS, **{**SMALL, "heads": 4, "groups": 4}), tokens(1, 16)) < TOLERANCE


def test_data_parallelism() -> None:
    """Weights whole, tokens split by batch, gradients all-reduced in a bucket per block and one for the root (Li et al. 2020).

    Wins over split state where weights are so small that two collectives for each cost more than its share of the update.
    """
    found = search(decoder(LAYERS, width=512, heads=8, groups=8, inner=1408, vocabulary=1024), tokens(256, 512), {"dp": 8}, "dgx-h100")
    everything_by_batch(found)
    assert set(found.weights.values()) == {"I"}
    assert {layout for name in found.weights for layout in found.used(name)} == {"R"}
    assert found.plan.collectives["backward"] == {"all_reduce": LAYERS + 1}
    assert found.moved("forward", weights=False).keys() <= {"all_gather over dp", "all_reduce over dp"}  # of the loss's rows or sum
    assert sum(found.moved("forward", weights=False).values()) == 1
    assert small_error(found) < TOLERANCE


def test_zero_2() -> None:
    """Weights and optimizer state rest split, are gathered once a step and kept; gradients are reduce-scattered (Rajbhandari et al. 2020).

    Wins for large weights: as many bytes as the all-reduce, and each rank updates 1/8 of the parameters.
    """
    sizes = {"width": 8192, "heads": 64, "groups": 64, "inner": 22016, "vocabulary": 32000}
    found = search(decoder(LAYERS, **sizes), tokens(32, 4096), {"dp": 8}, "dgx-h100")
    everything_by_batch(found)
    inside = {name: layout for name, layout in matrices(found).items() if "embedding" not in name}
    assert set(inside.values()) == {"S(0)"} and {layout for name in inside for layout in found.used(name)} == {"R"}
    gathered = found.moved("forward", weights=True)
    assert gathered == {"all_gather over dp": 7 * LAYERS + 1}
    assert found.moved("backward", weights=True)["reduce_scatter over dp"] == 7 * LAYERS + 1
    assert small_error(found) < TOLERANCE


def test_zero_3() -> None:
    """Within half of ZeRO-2's memory, gathered weights are freed after forward and gathered again in backward (Zhao et al. 2023).

    The MLPs' first, in all four layers, then attention's, in as many as need be: copies of a block may differ. What is cheap to make,
    norms and activation functions, is made again before.
    """
    layers, limit = 4, 14.8e9
    sizes = {"width": 8192, "heads": 64, "groups": 64, "inner": 22016, "vocabulary": 32000}
    asked = decoder(layers, **sizes), tokens(16, 4096), {"dp": 8}, "dgx-h100"
    free, found = search(*asked), search(*asked, memory=limit)
    assert found.plan.memory.total <= limit < 0.6 * free.plan.memory.total
    everything_by_batch(found)
    inside = {name for name, layout in matrices(found).items() if "blocks" in name and layout == "S(0)"}
    again = {entry.node: entry.copies for entry in found.plan.recomputed if entry.layout == "R"}
    assert again.keys() == inside and len(inside) == 7
    assert {again[f"p_blocks_0_{name}_weight"] for name in ("gate", "up", "down")} == {layers}
    assert found.plan.collectives["backward"]["all_gather"] == sum(again.values())
    assert "all_gather" not in free.plan.collectives["backward"] and not free.plan.recomputed
    small = decoder(layers, **SMALL)
    assert worst_at(found, small, tokens(8, 16)) < TOLERANCE


def test_hsdp() -> None:
    """State split over the devices of a node, replicated across nodes: gathered inside, 1/4 of each gradient all-reduced across.

    Wins for weights of some megabytes, where an all-reduce across nodes starts once and a gather and a reduce-scatter start twice.
    """
    sizes = {"width": 2048, "heads": 16, "groups": 16, "inner": 5632, "vocabulary": 8192}
    found = search(decoder(LAYERS, **sizes), tokens(128, 2048), {"nodes": 2, "gpus": 4}, "derecho")
    everything_by_batch(found)
    assert set(matrices(found).values()) == {"I, S(0)"}
    for entry in found.plan.conversions:
        if entry.node in matrices(found):
            assert entry.shows == ("I, S(0)", "R, S(0)", "R, R")
            assert entry.forward == ("", "all_gather over gpus")
            assert entry.backward == ("all_reduce over nodes", "reduce_scatter over gpus")
    assert small_error(found) < TOLERANCE


def test_fsdp_on_two_axes() -> None:
    """Two axes split the same dim of a weight in order: gathered across nodes first, while the pieces are small, then inside."""
    sizes = {"width": 8192, "heads": 64, "groups": 64, "inner": 22016, "vocabulary": 32000}
    found = search(decoder(LAYERS, **sizes), tokens(32, 2048), {"nodes": 2, "gpus": 4}, "derecho")
    everything_by_batch(found)
    inside = [entry for entry in found.plan.conversions if entry.node.startswith("p_blocks") and "norm" not in entry.node]
    assert len(inside) == 7
    for entry in inside:
        assert entry.shows == ("S(0; 2 of 2), S(0; 1 of 2)", "R, S(0)", "R, R")
        assert entry.forward == ("all_gather over nodes", "all_gather over gpus")
    assert small_error(found) < TOLERANCE


def test_fsdp_across_nodes_and_tensor_parallelism_inside() -> None:
    """Megatron with sequence parallelism on the devices of a node, batch and weights' state across four nodes (torchtitan's 2-D)."""
    sizes = {"width": 12288, "heads": 96, "groups": 96, "inner": 32768, "vocabulary": 32000}
    found = search(decoder(LAYERS, **sizes), tokens(32, 2048), {"nodes": 4, "gpus": 4}, "derecho")
    words = {module.rpartition(".")[2]: word for module, word in found.plan.strategies.items()}
    assert {words[name] for name in ("q", "k", "v", "gate", "up")} == {"batch+column"}
    assert words["o"] == words["down"] == "batch+row" and found.words("blocks.0") == {"batch+heads"}
    for entry in found.plan.conversions:
        axes = {word.partition(" over ")[2] for word in (*entry.forward, *entry.backward)} - {""}
        if entry.node in found.weights and "norm" not in entry.node:
            assert axes == {"nodes"} and entry.forward == ("all_gather over nodes",), entry.node
            assert "R" in entry.shows[-1] and "S" in entry.shows[-1]
        elif entry.copies == LAYERS and entry.node not in found.weights:
            assert axes == {"gpus"}, entry.node
    assert small_error(found, width=64, heads=16, groups=16) < TOLERANCE
