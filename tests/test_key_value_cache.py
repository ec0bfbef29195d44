"""Prefill and decode with a key/value cache: traced, planned and simulated beside transformers' own cache."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autotp.check import check
from autotp.equality import compare, emitted
from autotp.errors import AutotpError
from autotp.interpret import run
from autotp.key_value_cache import cache_shapes, step_inputs, with_cache
from autotp.loading import PHASES, Phase, check_phase
from autotp.planning import Request, adopt, for_mode, make_plan, prepare, traced_sizes
from autotp.plans import Plan
from autotp.price.cluster import load_cluster
from autotp.price.conversion import ConversionPrices
from autotp.program import Program
from autotp.random_plans import random_plan
from autotp.trace import trace
from tests.models import TOLERANCE, InFloat64, example, splitting_pays

FAMILIES = ("gpt2", "llama", "qwen2", "gemma2")
BATCH, CONTEXT, PROMPT = 3, 12, 7


@cache
def model_of(name: str, **changed: Any) -> nn.Module:
    with InFloat64():
        return example(name, **changed).model.eval()


@cache
def traced(name: str, phase: Phase) -> Program:
    with InFloat64():
        model = with_cache(model_of(name), phase, batch=BATCH, context=CONTEXT)
        return trace(model, (), step_inputs(phase, BATCH, PROMPT))


def state_of(model: nn.Module, program: Program, held: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Parameters and buffers; the cache filled with rubbish, which nothing may read, or with `held`."""
    torch.manual_seed(1)
    types = {node.target: node.outputs[0] for node in program.nodes if node.kind == "buffer"}
    rubbish = {name: torch.randn(types[name].hint, dtype=types[name].dtype) for name, _ in program.updates}
    return {**dict(model.named_parameters()), **dict(model.named_buffers()), **rubbish, **(held or {})}


def planned(program: Program, axes: dict[str, int]) -> Plan:
    return make_plan(program, Request(axes, "inference"), splitting_pays(), "decoder")


@pytest.mark.parametrize("name", FAMILIES)
def test_steps_are_those_of_transformers(name: str) -> None:
    """Logits after a prompt, and after each of five tokens, equal a forward over the whole text without any cache."""
    model, torch_ids = model_of(name), torch.randint(1, 131, (BATCH, CONTEXT), generator=torch.Generator().manual_seed(2))
    programs = {phase: traced(name, phase) for phase in PHASES}
    with InFloat64(), torch.no_grad():
        wanted = model(input_ids=torch_ids).logits
        state = state_of(model, programs["prefill"])
        for last in range(PROMPT - 1, CONTEXT):
            if last == PROMPT - 1:
                logits, held = run(programs["prefill"], state, (), {"input_ids": torch_ids[:, :PROMPT]})
            else:
                inputs = {"input_ids": torch_ids[:, last : last + 1], "position": torch.tensor([last])}
                logits, held = run(programs["decode"], state, (), inputs)
            torch.testing.assert_close(logits, wanted[:, last], rtol=TOLERANCE, atol=TOLERANCE)
            assert set(held) == {name for name in state if name.startswith("key_value_cache.")}
            state.update(held)


@pytest.mark.parametrize("mesh", [(4,), (2, 2)])
@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_random_plans_equal_one_device(name: str, phase: Phase, mesh: tuple[int, ...]) -> None:
    """Logits and the new cache, whatever splits the cache at rest."""
    program = traced(name, phase)
    request = Request({f"axis{i}": size for i, size in enumerate(mesh)}, "inference")
    plain = for_mode(program, "inference")
    space, border = prepare(plain, request)
    prices = ConversionPrices(splitting_pays(), mesh, False, traced_sizes(plain))
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(1, 131, (BATCH, PROMPT if phase == "prefill" else 1), generator=generator)
    inputs = {"input_ids": ids} | ({"position": torch.tensor([PROMPT])} if phase == "decode" else {})
    rests = set()
    with InFloat64():
        for seed in range(3):
            decisions = random_plan(space, border, prices, seed)
            found = compare(space, decisions, state_of(model_of(name), program), (), inputs, gradient=False)
            assert found.worst < TOLERANCE, found.where
            rests |= {str(spec.layout) for spec in emitted(space, decisions, gradient=False)[0].state if "keys" in spec.name}
    assert any("S" in layout for layout in rests)


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_the_planner_splits_the_cache_and_writes_it_in_place(name: str) -> None:
    program = traced(name, "decode")
    plan = planned(program, {"tp": 2})
    space, decisions = adopt(program, Request({"tp": 2}, "inference"), plan)
    ranks = emitted(space, decisions, gradient=False)
    assert all(rank.in_place == set(rank.updates) and rank.updates for rank in ranks)
    held = {spec.name: spec.layout for spec in ranks[0].state if spec.name in ranks[0].updates}
    assert all(layout.kinds == ("S",) for layout in held.values())
    unsplit = sum(program.type_of(ref).bytes for _, ref in program.updates)
    assert plan.memory.cache in (unsplit / 2, unsplit * 2 / BATCH)  # by heads, or 2 of 3 sequences on the first rank
    inputs = {"input_ids": torch.ones(BATCH, 1, dtype=torch.long), "position": torch.tensor([PROMPT])}
    with InFloat64():
        assert compare(space, decisions, state_of(model_of(name), program), (), inputs, gradient=False).worst < TOLERANCE


def test_check_of_buffers_at_rest() -> None:
    """A buffer that is updated rests as I or S, and its new value comes in that layout, by a conversion if need be."""
    program = for_mode(traced("llama", "decode"), "inference")
    request = Request({"tp": 2}, "inference")
    plan, space = planned(program, {"tp": 2}), prepare(program, request)[0]
    place, entry = next((place, entry) for place, entry in enumerate(plan.nodes) if entry.op == "buffer" and "keys" in entry.path)
    for code, words in (("P", "rests as P on mesh axis `tp`, expected I or S"), ("I", "keys_0` is made as")):
        nodes = (*plan.nodes[:place], replace(entry, outputs=(code,)), *plan.nodes[place + 1 :])
        with pytest.raises(AutotpError, match=words):
            check(program, space, replace(plan, nodes=nodes))
    place, entry = next((place, entry) for place, entry in enumerate(plan.nodes) if entry.path.endswith("rotary_emb.inv_freq"))
    nodes = (*plan.nodes[:place], replace(entry, outputs=("P",)), *plan.nodes[place + 1 :])
    with pytest.raises(AutotpError, match="rests as P on mesh axis `tp`, expected I or S"):
        check(program, space, replace(plan, nodes=nodes))


SIZES = {"hidden_size": 256, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 8, "num_hidden_layers": 3}
GPT2 = {"n_embd": 128, "n_head": 8, "n_layer": 3}


@pytest.mark.parametrize("ranks, pieces", [(2, 2), (8, 8), (16, 8)])
@pytest.mark.parametrize("name, sizes", [("llama", SIZES), ("qwen3", SIZES), ("mistral", SIZES), ("gpt2", GPT2)])
def test_bytes_of_the_cache(name: str, sizes: dict[str, int], ranks: int, pieces: int) -> None:
    """2 × layers × heads × elements × context × batch × bytes each, over the ranks; of 8 heads on 16 ranks eight ranks have none."""
    import transformers

    from tests.models import CONFIGS

    heads, width = (8, 8) if name != "gpt2" else (8, 16)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name](**sizes), dtype=torch.bfloat16).eval()
    program = trace(with_cache(model, "decode", batch=1, context=64), (), step_inputs("decode", 1, 1), dynamic=False)
    formula = 2 * 3 * heads * width * 64 * 1 * 2
    assert sum(shape.bytes(64) for shape in cache_shapes(model).values()) == formula
    assert sum(program.type_of(ref).bytes for _, ref in program.updates) == formula
    assert planned(program, {"tp": ranks}).memory.cache == formula / pieces


def test_what_the_cache_costs() -> None:
    """A longer context costs what attention reads more; writing one token costs the same."""
    import transformers

    from tests.models import CONFIGS

    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(CONFIGS["llama"](**SIZES), dtype=torch.bfloat16).eval()
    shapes = cache_shapes(model)
    seconds: dict[int, dict[str, float]] = {}
    for context in (2048, 8192):
        decoder = with_cache(model, "decode", batch=4, context=context, shapes=shapes)
        program = trace(decoder, (), step_inputs("decode", 4, 1), dynamic=False)
        plan = make_plan(program, Request({"tp": 1}, "inference", compiled=True), load_cluster("dgx-h100"), "decoder")
        seconds[context] = {op: sum(n.seconds for n in plan.nodes if n.op.startswith(op)) for op in ("aten.index_copy", "aten.scaled")}
    assert seconds[2048]["aten.index_copy"] == seconds[8192]["aten.index_copy"]
    assert seconds[2048]["aten.scaled"] < seconds[8192]["aten.scaled"]


def test_the_model_is_left_as_it_was() -> None:
    model = model_of("llama")
    before = list(model.state_dict())
    cached = with_cache(model, "decode", batch=2, context=5)
    assert list(model.state_dict()) == list(cached.state_dict()) == before
    assert not hasattr(model, "key_value_cache") and "forward" not in vars(model)
    assert all(mine is theirs for mine, theirs in zip(model.parameters(), cached.parameters(), strict=True))


def test_refusals() -> None:
    with pytest.raises(AutotpError, match=r"Linear is no decoder with a key/value cache: prefill and decode need a transformers model"):
        with_cache(nn.Linear(2, 2), "decode", batch=1, context=4)
    with pytest.raises(AutotpError, match="is no decoder"):
        cache_shapes(example("bert").model)
    with pytest.raises(AutotpError, match="a key/value cache of 0 tokens for 2 sequences is empty"):
        with_cache(model_of("llama"), "decode", batch=2, context=0)
    for words, options in {
        "unknown phase 'both'; choose prefill or decode": {"phase": "both"},
        "has no training": {"phase": "decode", "mode": "train"},
        "leave --seq out": {"phase": "decode", "seq": 5},
        "a prompt of 9 tokens does not fit": {"phase": "prefill", "seq": 9, "context": 8},
        "give --phase prefill or --phase decode with it": {"phase": None, "context": 8},
    }.items():
        with pytest.raises(AutotpError, match=words):
            check_phase(**{"mode": None, "seq": None, "context": None, **options})
