"""The planner finds Megatron's pattern by itself, and the emitted module communicates no more than that.

n layers: 2n activation all-reduces forward, 2n backward, and at most one bucket of small gradients per layer; beside them one
backward all-reduce for the head's input and one gather of the logits, which the user wants whole.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.distributed.tensor.debug import CommDebugMode

import autotp
from autotp.planning import Request, make_plan
from autotp.price.accelerator import Gemm
from autotp.price.cluster import Cluster, Link, load_cluster
from autotp.trace import trace
from tests.models import Example, InFloat64, example
from tests.ranks import run_ranks

LAYERS = 4


def plain_prices() -> Cluster:
    """Only matrix products cost time on the device, and every collective has a high start-up cost.

    Norms gain nothing by being split, so that one all-reduce beats a reduce-scatter and an all-gather (which together move as
    much, but start twice): plain tensor parallelism, without sequence parallelism, is the optimum.
    """
    cluster = load_cluster("dgx-h100")
    ideal = Gemm(1, ((1, 1),), 1.0, 1.0, 0.0, 0.0, 0.0, 1, 1.0)
    device = replace(
        cluster.accelerator,
        peak_flops=dict.fromkeys(cluster.accelerator.peak_flops, 1e9),
        bandwidth=1e15,
        launch_seconds=0.0,
        host_launch_seconds=0.0,
        gemm=ideal,
        attention_efficiency=1.0,
    )
    return replace(cluster, accelerator=device, links=(Link("wire", None, 2e9, 1.0, 2e-5, 2e-5),))


def decoder(name: str) -> Example:
    if name == "gpt2":
        return example(name, batch=1, seq=16, n_layer=LAYERS, n_embd=64, n_head=8, vocab_size=128)
    sizes: dict[str, Any] = {"num_hidden_layers": LAYERS, "hidden_size": 64, "num_attention_heads": 8, "vocab_size": 128}
    if name == "opt":
        return example(name, batch=1, seq=16, **sizes, ffn_dim=256, word_embed_proj_dim=64)
    return example(name, batch=1, seq=16, **sizes, intermediate_size=256, num_key_value_heads=4, head_dim=8)


COLUMN = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "c_attn", "c_fc", "fc1")
ROW = ("o_proj", "down_proj", "out_proj", "c_proj", "fc2")
DECODERS = ("gpt2", "llama", "mistral", "qwen2", "qwen3", "gemma2", "opt")


@pytest.mark.parametrize("name", DECODERS)
@pytest.mark.parametrize("ranks", [2, 4])
def test_the_pattern_is_found(name: str, ranks: int) -> None:
    one = decoder(name)
    plan = make_plan(trace(one.model, one.args, one.kwargs, dynamic=False), Request({"tp": ranks}), plain_prices(), name)
    layers = {path: word for path, word in plan.strategies.items() if ".layers." in path or ".h." in path}
    for path, word in layers.items():
        module = path.rsplit(".", 1)[-1]
        assert word == ("column" if module in COLUMN else "row" if module in ROW else word), path
        if module in ("self_attn", "attn"):
            assert word == "heads", path
    within_megatron(plan.collectives["forward"], plan.collectives["backward"], name)


def within_megatron(forward: dict[str, int], backward: dict[str, int], name: str) -> None:
    """2n and 2n, one bucket per layer where a norm runs on split heads, and what embedding and head need."""
    buckets = LAYERS if name == "qwen3" else 0
    ends = 1
    assert forward.get("all_reduce", 0) <= 2 * LAYERS + ends
    assert backward.get("all_reduce", 0) <= 2 * LAYERS + ends + buckets
    assert forward.get("all_reduce", 0) + backward.get("all_reduce", 0) <= 4 * LAYERS + ends + buckets
    for counts in (forward, backward):
        assert counts.get("all_gather", 0) <= ends
        assert not set(counts) - {"all_reduce", "all_gather"}


def count_on_ranks(names: tuple[str, ...]) -> None:
    for name in names:
        with InFloat64():
            one = decoder(name)
            module = autotp.parallelize(one.model, one.args, one.kwargs, cluster=plain_prices())
        found = {}
        with CommDebugMode() as mode:
            loss = module(**one.kwargs).loss
        found["forward"] = kinds(mode)
        with CommDebugMode() as mode:
            loss.backward()
        found["backward"] = kinds(mode)
        within_megatron(found["forward"], found["backward"], name)
        plan = autotp.plan(one.model, one.args, one.kwargs, mesh=2, cluster=plain_prices())
        assert found == {way: dict(counts) for way, counts in plan.collectives.items()}, name
        assert torch.isfinite(loss)


def kinds(mode: CommDebugMode) -> dict[str, int]:
    words = {
        "all_reduce": "all_reduce",
        "all_gather": "all_gather_into_tensor",
        "reduce_scatter": "reduce_scatter_tensor",
        "all_to_all": "all_to_all_single",
    }
    counts = {str(op): count for op, count in mode.get_comm_counts().items()}
    return {kind: sum(n for op, n in counts.items() if word in op) for kind, word in words.items() if any(word in op for op in counts)}


def test_the_emitted_module_communicates_no_more() -> None:
    run_ranks(count_on_ranks, 2, DECODERS)
