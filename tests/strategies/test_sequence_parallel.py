"""Long sequences split through the whole model: all-to-alls around attention, or gathered keys and values, as heads allow."""

from __future__ import annotations

from tests.models import TOLERANCE
from tests.strategies.search import Found, decoder, search, tokens, worst_at

LAYERS = 2
LENGTH = 65536


def attention(found: Found) -> tuple[tuple[str, ...], ...]:
    """The layouts in which attention takes queries, keys and values, and makes its output."""
    (entry,) = [entry for entry in found.plan.nodes if entry.op.startswith("aten.scaled_dot_product_attention")]
    return (*(tuple(code.split("|")) for code in entry.operands), tuple(entry.outputs[0].split("|")))


def all_but_attention_by_sequence(found: Found, *free: str) -> None:
    words = {module: word for module, word in found.plan.strategies.items() if module.startswith("blocks.0.")}
    assert {word for module, word in words.items() if module.rpartition(".")[2] not in free} == {"sequence"}


def test_ulysses() -> None:
    """DeepSpeed-Ulysses (Jacobs et al. 2023): an all-to-all of queries, keys, values and output, from sequence to heads and back."""
    sizes = {"width": 2048, "heads": 16, "groups": 16, "inner": 5632, "vocabulary": 32000}
    found = search(decoder(LAYERS, **sizes), tokens(1, LENGTH), {"sp": 8}, "dgx-h100")
    all_but_attention_by_sequence(found)
    assert found.words("blocks.0") == {"heads"}
    assert attention(found) == (("S1",),) * 4
    inside = [entry for entry in found.plan.conversions if entry.copies == LAYERS and entry.node not in found.weights]
    assert len(inside) == 4
    assert {(*entry.forward, *entry.backward) for entry in inside} == {("all_to_all over sp", "all_to_all over sp")}
    small = decoder(LAYERS, width=64, heads=16, groups=16, inner=64, vocabulary=64)
    assert worst_at(found, small, tokens(1, 16)) < TOLERANCE


def test_context_parallelism() -> None:
    """Queries stay split by position, keys and values are whole, made from a gathered sequence (as in Llama 3's, Dubey et al. 2024).

    Wins where there are fewer heads than devices. The search gathers what comes before the projections of keys and values, if that
    is less than both: the backward pass then reduce-scatters once.
    """
    found = search(decoder(LAYERS, width=256, heads=2, groups=2, inner=704, vocabulary=32000), tokens(1, LENGTH), {"cp": 8}, "dgx-h100")
    all_but_attention_by_sequence(found, "k", "v")
    assert found.words("blocks.0") == {"sequence"}
    assert attention(found) == (("S2",), ("R",), ("R",), ("S2",))
    inside = [entry for entry in found.plan.conversions if entry.copies == LAYERS and entry.node not in found.weights]
    assert [(entry.shows, entry.forward, entry.backward) for entry in inside] == [
        (("S(1)", "R"), ("all_gather over cp",), ("reduce_scatter over cp",))
    ]
    assert worst_at(found, decoder(LAYERS, width=32, heads=2, groups=2, inner=64, vocabulary=64), tokens(1, 32)) < TOLERANCE


def test_context_parallelism_with_shared_keys() -> None:
    """One head of keys for all: less to gather than the width that it is made from, so keys and values themselves are gathered."""
    sizes = {"width": 2048, "heads": 4, "groups": 1, "inner": 5632, "vocabulary": 32000}
    found = search(decoder(LAYERS, **sizes), tokens(1, LENGTH), {"cp": 8}, "dgx-h100")
    all_but_attention_by_sequence(found)
    assert found.words("blocks.0") == {"sequence"}
    assert attention(found) == (("S2",), ("R",), ("R",), ("S2",))
    inside = [entry for entry in found.plan.conversions if entry.copies == LAYERS and entry.node not in found.weights]
    assert len(inside) == 2
    assert {(*entry.forward, *entry.backward) for entry in inside} == {("all_gather over cp", "reduce_scatter over cp")}
    assert worst_at(found, decoder(LAYERS, width=32, heads=4, groups=1, inner=64, vocabulary=64), tokens(1, 32)) < TOLERANCE
