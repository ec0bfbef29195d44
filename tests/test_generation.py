"""Generated tokens on real Gloo ranks equal those of transformers on one device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import autotp
from autotp.errors import AutotpError
from autotp.generation import plan_generation
from autotp.sampling import Sampling, next_tokens
from tests.benchmarks.memory_accuracy import measure_step
from tests.models import example, splitting_pays
from tests.ranks import run_ranks

FAMILIES = ("gpt2", "llama", "qwen2")
BATCH, PROMPT, NEW = 3, 6, 64
DRAWN: dict[str, Any] = {"do_sample": True, "temperature": 1.3, "top_k": 40, "top_p": 0.9}


def decoder(name: str) -> nn.Module:
    """Weights so large that logits differ: a fresh model repeats one token."""
    model = example(name, **{"n_positions" if name == "gpt2" else "max_position_embeddings": PROMPT + NEW}).model.eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8.0 if parameter.ndim > 1 else 1.0)
    return model


def prompts(tokens: int = PROMPT) -> torch.Tensor:
    return torch.randint(1, 131, (BATCH, tokens), generator=torch.Generator().manual_seed(5))


def wanted(model: nn.Module, ids: torch.Tensor, seed: int | None = None, new: int = NEW, **options: Any) -> torch.Tensor:
    """What transformers generates on one device."""
    from transformers import GenerationConfig

    model.generation_config = GenerationConfig(pad_token_id=0)  # without the family's token that ends a text
    if seed is not None:
        torch.manual_seed(seed)
    generate: Any = model.generate
    result: torch.Tensor = generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, use_cache=True, **options)
    return result


def generates_like_one_device(names: tuple[str, ...], mesh: Any) -> None:
    for name in names:
        model = decoder(name)
        text = autotp.parallelize_generation(model, batch=BATCH, context=PROMPT + NEW, mesh=mesh, cluster=splitting_pays())
        greedy = text.generate(prompts(), max_new_tokens=NEW)
        drawn = text.generate(prompts(), max_new_tokens=NEW, seed=11, **DRAWN)  # over the old cache, which nothing may read
        other = text.generate(prompts(), max_new_tokens=9, seed=12, **DRAWN)
        if dist.get_rank() == 0:
            assert greedy.shape == (BATCH, PROMPT + NEW)
            assert len(greedy[:, PROMPT:].unique()) > 5, "the model says the same again and again"
            assert torch.equal(greedy, wanted(model, prompts(), do_sample=False)), f"{name}, greedy"
            assert torch.equal(drawn, wanted(model, prompts(), seed=11, **DRAWN)), f"{name}, sampled"
            assert not torch.equal(drawn[:, : PROMPT + 9], other)
        for tokens in (greedy, drawn, text.generate(prompts(), max_new_tokens=3, **DRAWN)):
            assert_equal_on_all_ranks(tokens)
        assert_one_memory(text)
        assert_predicted_memory(text)


def assert_equal_on_all_ranks(tokens: torch.Tensor) -> None:
    found = [torch.empty_like(tokens) for _ in range(dist.get_world_size())]
    dist.all_gather(found, tokens)
    assert all(torch.equal(other, tokens) for other in found)


def assert_one_memory(text: autotp.Generator) -> None:
    """Both steps hold the same tensors, and the cache is split."""
    slots = [{slot.spec.name: slot for slot in module._held if slot.spec.kind != "constant"} for module in (text.prefill, text.decode)]
    assert slots[0].keys() == slots[1].keys()
    for name, slot in slots[0].items():
        assert slot.leaf.data_ptr() == slots[1][name].leaf.data_ptr()
    caches = [slot for name, slot in slots[0].items() if "key_value_cache" in name]
    assert caches and all(slot.spec.layout.splits and slot.leaf.numel() < slot.spec.type.numel for slot in caches)
    assert not any("key_value_cache" in key for key in text.prefill.state_dict())


def test_tokens_equal_one_device() -> None:
    run_ranks(generates_like_one_device, 2, FAMILIES, None)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [None, {"a": 2, "b": 2}])
def test_tokens_equal_one_device_on_four_ranks(mesh: Any) -> None:
    run_ranks(generates_like_one_device, 4, FAMILIES, mesh)


def ends_and_refuses() -> None:
    model = decoder("llama")
    text = autotp.parallelize_generation(model, batch=BATCH, context=20, cluster=splitting_pays())
    one = prompts(1)  # decode alone: prefill takes two tokens or more
    assert torch.equal(text.generate(one, max_new_tokens=10), wanted(model, one, new=10, do_sample=False))
    expected = wanted(model, prompts(), new=14, do_sample=False)
    end = int(expected[0, PROMPT + 2])
    ended = text.generate(prompts(), max_new_tokens=14, eos_token_id=end, pad_token_id=0)
    assert torch.equal(ended, wanted(model, prompts(), new=14, do_sample=False, eos_token_id=end))
    assert torch.equal(text.generate(prompts(), max_new_tokens=0), prompts())
    with pytest.raises(AutotpError, match=r"a prompt of 6 tokens and 15 new ones do not fit into a key/value cache of 20"):
        text.generate(prompts(), max_new_tokens=15)
    with pytest.raises(AutotpError, match=r"the prompts have shape \(2, 6\); this generator takes \(3, tokens >= 1\)"):
        text.generate(prompts()[:2], max_new_tokens=1)
    before = text.generate(prompts(), max_new_tokens=5)
    changed = {name: value * 0.5 for name, value in text.prefill.full_state_dict().items()}
    model.load_state_dict(changed)
    text.prefill.load_state_dict(changed)  # decode sees it too
    after = text.generate(prompts(), max_new_tokens=5)
    assert torch.equal(after, wanted(model, prompts(), new=5, do_sample=False)) and not torch.equal(after, before)
    with pytest.raises(AutotpError, match="LlamaForCausalLM is in train mode"):
        autotp.parallelize_generation(model.train(), batch=BATCH, context=20)


def assert_predicted_memory(text: autotp.Generator) -> None:
    """The peak of a decode step is that of the plan, in which the cache is there once and nothing copies it."""
    found = measure_step(text.decode, (), {"input_ids": prompts(1), "position": torch.tensor([9])}, None)
    predicted = text.plans.decode.memory
    if dist.get_rank() == 0:
        assert predicted.total == pytest.approx(found.total, rel=0.01)
        assert predicted.transient < predicted.cache


def test_ends_and_refusals() -> None:
    run_ranks(ends_and_refuses, 2)


def test_plans_share_what_rests() -> None:
    """Prefill alone would split by the sequence and gather weights; beside decode it takes what rests as it does there."""
    plans = plan_generation(decoder("llama"), batch=1, context=64, mesh=2, cluster=splitting_pays())
    rests = [
        {entry.path: entry.shows for entry in plan.nodes if entry.op == "parameter" or "key_value_cache" in entry.path}
        for plan in (plans.prefill, plans.decode)
    ]
    assert rests[0] == rests[1]
    assert any("S" in layout for shows in rests[0].values() for layout in shows)
    assert plans.prefill.memory.cache == plans.decode.memory.cache > 0


def test_sampling() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0], [0.0, 0.0, 5.0, 0.0]])
    assert next_tokens(logits, Sampling()).tolist() == [0, 2]

    def drawn(**options: Any) -> set[int]:
        generator = torch.Generator().manual_seed(0)
        sampling = Sampling(do_sample=True, **options)
        return {int(next_tokens(logits[:1], sampling, generator)) for _ in range(300)}

    assert drawn() == {0, 1, 2, 3}
    assert drawn(top_k=2) == {0, 1}
    assert drawn(top_p=0.6) == {0}  # of probability 0.64
    assert drawn(top_p=0.65) == {0, 1}
    assert drawn(temperature=0.01) == {0}
    for options, words in (({"temperature": 0.0}, "temperature is 0.0"), ({"top_k": -1}, "top_k is -1"), ({"top_p": 1.5}, "top_p is 1.5")):
        with pytest.raises(AutotpError, match=words):
            Sampling(**options)
