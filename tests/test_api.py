"""`plan` and `parallelize` as users call them, on real Gloo ranks."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import autotp
from autotp.errors import AutotpError
from autotp.planning import Request, make_plan
from autotp.trace import trace
from tests.models import NAMES, TOLERANCE, Example, InFloat64, example, splitting_pays
from tests.ranks import run_ranks


def assert_close(found: Any, wanted: Any, what: str) -> None:
    torch.testing.assert_close(found, wanted, atol=TOLERANCE, rtol=TOLERANCE, msg=lambda text: f"{what}: {text}")


def loss_of(output: Any) -> torch.Tensor:
    return output["loss"] if isinstance(output, Mapping) else output.square().mean()


def train_and_compare(name: str, mesh: Any, sizes: Mapping[str, int] | None = None, **options: Any) -> None:
    """Three AdamW steps with clipping on both models: outputs, every gradient and every parameter stay equal."""
    one = example(name, **(sizes or {}))
    many = autotp.parallelize(one.model, one.args, one.kwargs, mesh=mesh, cluster=splitting_pays(), **options)
    assert set(many.state_dict()) == set(one.model.state_dict())
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-2) for model in (one.model, many)]
    for step in range(3):
        outputs = [model(*one.args, **one.kwargs) for model in (one.model, many)]
        assert type(outputs[0]) is type(outputs[1])
        tensors = [list(output.values()) if isinstance(output, Mapping) else [output] for output in outputs]
        for found, wanted in zip(tensors[1], tensors[0], strict=True):
            assert_close(found, wanted, f"{name} output, step {step}")
        for output in outputs:
            loss_of(output).backward()
        for (key, wanted), found in zip(one.model.named_parameters(), many.parameters(), strict=True):
            assert_close(full_gradient(many, key, found), wanted.grad, f"{name} gradient of {key}, step {step}")
        norms = [torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5) for model in (one.model, many)]
        assert_close(norms[1].full_tensor() if hasattr(norms[1], "full_tensor") else norms[1], norms[0], "norm")
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    after = many.full_state_dict()
    for key, wanted in one.model.state_dict().items():
        assert_close(after[key], wanted, f"{name} {key} after three steps")


def full_gradient(module: autotp.ParallelModule, name: str, parameter: Any) -> torch.Tensor:
    from autotp.runtime.state import gather_full

    spec = next(spec for spec in module._sharded.state if spec.name == name)
    return gather_full(parameter.grad.to_local(), spec, module._device_mesh)


def all_models(names: tuple[str, ...], mesh: Any) -> None:
    with InFloat64():
        for name in names:
            train_and_compare(name, mesh)


@pytest.mark.parametrize("ranks", [2, 4])
def test_every_model_trains_like_one_device(ranks: int) -> None:
    run_ranks(all_models, ranks, NAMES, None)


def uneven() -> None:
    """14 query heads on 2 key heads, and GPT-2's vocabulary, which no number of ranks divides; the lookup split by rows too."""
    with InFloat64():
        for name, embedding in (("qwen2", "*.embed_tokens"), ("gpt2", "*.wte")):
            train_and_compare(name, None, {"vocab_size": 50257}, pins={embedding: "vocab"})


@pytest.mark.parametrize("ranks", [3, 4])
def test_uneven_sizes(ranks: int) -> None:
    run_ranks(uneven, ranks)


def test_two_dimensional_mesh_trains_like_one_device() -> None:
    run_ranks(all_models, 4, ("gpt2", "llama"), {"dp": 2, "tp": 2})


def other_sizes() -> None:
    one = example("llama")
    many = autotp.parallelize(one.model, one.args, one.kwargs, cluster=splitting_pays())
    for batch, seq in [(2, 7), (5, 33), (4, 10)]:
        there = example("llama", batch=batch, seq=seq)
        assert_close(many(**there.kwargs).logits, one.model(**there.kwargs).logits, f"batch {batch} seq {seq}")


def declared_border() -> None:
    """The batch passed split over dp, the logits left split over the vocabulary."""
    one = example("llama", batch=4)
    split = {"dp": 0}
    many = autotp.parallelize(
        one.model,
        one.args,
        one.kwargs,
        mesh={"dp": 2, "tp": 1},
        cluster=splitting_pays(),
        inputs={"input_ids": split, "labels": split},
        outputs={"logits": split},
    )
    half = slice(2 * dist.get_rank(), 2 * dist.get_rank() + 2)
    found = many(input_ids=one.kwargs["input_ids"][half], labels=one.kwargs["labels"][half])
    wanted = one.model(**one.kwargs)
    assert_close(found.loss, wanted.loss, "loss")
    assert found.logits.shape == wanted.logits.shape
    assert_close(found.logits.to_local(), wanted.logits[half], "local logits")
    found.loss.backward()
    wanted.loss.backward()
    for (key, parameter), mine in zip(one.model.named_parameters(), many.parameters(), strict=True):
        assert_close(full_gradient(many, key, mine), parameter.grad, key)


def dropout() -> None:
    """Masks agree where tensors are replicated: every rank sees one and the same output, and it is random."""
    one = example("gpt2", resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.3)
    torch.manual_seed(dist.get_rank())  # ranks that were seeded differently agree all the same
    many = autotp.parallelize(one.model, one.args, one.kwargs, cluster=splitting_pays())
    losses = [many(**one.kwargs).loss for _ in range(3)]
    losses[0].backward()
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, [loss.item() for loss in losses])
    assert gathered[0] == gathered[1]
    assert len(set(gathered[0])) == 3
    with torch.no_grad():
        assert_close(many.eval()(**one.kwargs).loss, one.model.eval()(**one.kwargs).loss, "eval")


def saved_plan(folder: str) -> None:
    """A plan made anywhere runs here, whether its rows, columns or heads are split, at the example's sizes and at others."""
    for name, pins in [("qwen2", {}), ("gpt2", {"*.c_fc": "batch"}), ("llama", {"*.up_proj": "sequence"})]:
        one, other = example(name), example(name, batch=4, seq=7)
        path = Path(folder) / f"{name}.yaml"
        if dist.get_rank() == 0:
            made = autotp.plan(one.model, one.args, one.kwargs, mesh=2, cluster=splitting_pays(), pins=pins)
            made.save(path)
            assert autotp.Plan.load(path) == made
        dist.barrier()
        many = autotp.parallelize(one.model, one.args, one.kwargs, plan=path)
        for kwargs in (one.kwargs, other.kwargs):
            assert_close(many(**kwargs).loss, one.model(**kwargs).loss, name)
    program = trace(one.model, one.args, one.kwargs, dynamic=False)  # as the command line plans
    fixed = make_plan(program, Request({"tp": 2}), splitting_pays(), "llama")
    many = autotp.parallelize(one.model, one.args, one.kwargs, plan=fixed)
    assert_close(many(**one.kwargs).loss, one.model(**one.kwargs).loss, "fixed sizes")
    with pytest.raises(AutotpError, match="input_ids"):
        many(**other.kwargs)


def batch_norm() -> None:
    """Buffers change in the forward and are needed in the backward."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10), nn.BatchNorm1d(10), nn.ReLU(), nn.Linear(10, 3)).double()
    x = torch.randn(8, 6, dtype=torch.float64)
    many = autotp.parallelize(model, (x,), cluster=splitting_pays())
    for _ in range(2):
        found, wanted = many(x), model(x)
        assert_close(found, wanted, "output")
        found.square().mean().backward()
        wanted.square().mean().backward()
    for (key, parameter), mine in zip(model.named_parameters(), many.parameters(), strict=True):
        assert_close(full_gradient(many, key, mine), parameter.grad, key)
    after = many.full_state_dict()
    for key, value in model.state_dict().items():
        assert_close(after[key], value, key)


def out_of_bounds() -> None:
    """Ids and labels that one device refuses are refused, whatever the split."""
    one = example("llama")
    many = autotp.parallelize(one.model, one.args, one.kwargs, cluster=splitting_pays(), pins={"*.embed_tokens": "vocab"})
    for key in ("input_ids", "labels"):
        with pytest.raises(RuntimeError, match="out of bounds"):
            many(**{**one.kwargs, key: one.kwargs[key] + 131})


def refusals(folder: str) -> None:
    """Every rank gets the same sentence, and none hangs."""
    one = example("mlp")
    other = example("gpt2")
    rank = dist.get_rank()
    with pytest.raises(AutotpError, match="has 3 places, but 2 ranks are running"):
        autotp.parallelize(one.model, one.args, mesh=3)
    with pytest.raises(AutotpError, match="no module with weights"):
        autotp.parallelize(one.model, one.args, pins={"*.q_proj": "column"})
    with pytest.raises(AutotpError, match=r"memory limit of 10 bytes per device cannot be kept: the least that would do"):
        autotp.parallelize(one.model, one.args, memory=10)
    path = Path(folder) / "other.yaml"
    if rank == 0:
        autotp.plan(other.model, other.args, other.kwargs, mesh=2).save(path)
    dist.barrier()
    with pytest.raises(AutotpError, match="another model"):
        autotp.parallelize(one.model, one.args, plan=path)
    with pytest.raises(AutotpError, match="cannot read the plan"):
        autotp.parallelize(one.model, one.args, plan=path if rank else Path(folder) / "missing.yaml")
    with pytest.raises(AutotpError, match="leave one out"):
        autotp.parallelize(one.model, one.args, plan=path, pins={"0": "row"})
    with pytest.raises(AutotpError, match=r"positive number.*on rank 1"):
        autotp.parallelize(one.model, one.args, memory=-1 if rank else None)
    torch.manual_seed(rank)
    differs = nn.Sequential(nn.Linear(20, 31), nn.Linear(31, 20)).double()
    with pytest.raises(AutotpError, match="weights"):
        autotp.parallelize(differs, one.args)
    with pytest.raises(AutotpError, match=r"the example input is not the same on every rank: rank 1 has argument 0 \(3, 7\)"):
        autotp.parallelize(one.model, one.args if rank == 0 else (torch.zeros(3, 7, dtype=torch.float64),))
    several = torch.nn.Sequential(*one.model, torch.nn.Linear(20, 3)).double() if rank else one.model
    with pytest.raises(AutotpError):
        autotp.parallelize(several, one.args)


def all_of(*checks: Any) -> None:
    with InFloat64():
        for check, args in checks:
            check(*args)


def test_sizes_borders_saved_plans_and_refusals(tmp_path: Path) -> None:
    """One start of the ranks for several checks: starting costs more than checking."""
    folder = str(tmp_path)
    checks = [(check, ()) for check in (other_sizes, declared_border, dropout, batch_norm, out_of_bounds)]
    run_ranks(all_of, 2, *checks, (saved_plan, (folder,)), (refusals, (folder,)))


def test_the_model_is_a_module() -> None:
    with pytest.raises(AutotpError, match="no torch"):
        autotp.plan(torch.sin, (torch.ones(2),), mesh=2)


def test_parallelize_needs_ranks() -> None:
    one = example("mlp")
    with pytest.raises(AutotpError, match="torchrun"):
        autotp.parallelize(one.model, one.args)


def test_pins_are_kept_and_shown() -> None:
    one = example("llama")
    pins = {"*.q_proj": "column", "*.o_proj": "row", "lm_head": "replicate"}
    plan = autotp.plan(one.model, one.args, one.kwargs, mesh=2, pins=pins)
    assert plan.strategies["model.layers.1.self_attn.q_proj"] == "column"
    assert plan.strategies["model.layers.0.self_attn.o_proj"] == "row"
    assert plan.strategies["lm_head"] == "replicate"
    with pytest.raises(AutotpError, match="none of column, row"):
        autotp.plan(one.model, one.args, one.kwargs, mesh=2, pins={"lm_head": "diagonal"})
    with pytest.raises(AutotpError, match="impossible"):
        autotp.plan(one.model, one.args, one.kwargs, mesh=2, pins={"lm_head": "heads"})


def test_memory_limit_is_kept_and_costs_time() -> None:
    one = example("llama")
    free = autotp.plan(one.model, one.args, one.kwargs, mesh=4)
    limited = autotp.plan(one.model, one.args, one.kwargs, mesh=4, memory=free.memory.total * 0.6)
    assert limited.memory.total <= free.memory.total * 0.6
    assert limited.time.step_s >= free.time.step_s


def test_inference_has_no_backward() -> None:
    one = example("llama")
    plan = autotp.plan(one.model, one.args, one.kwargs, mesh=2, mode="inference", cluster=splitting_pays())
    assert plan.collectives["backward"] == {}
    assert plan.memory.gradients == plan.memory.optimizer == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mesh": 0}, "whole sizes of at least 1"),
        ({"mesh": 2.0}, "not understood"),
        ({"mesh": None}, "give either mesh"),
        ({"mesh": 2, "memory": "80GB"}, "positive number"),
        ({"mesh": 2, "memory": float("nan")}, "positive number"),
        ({"mesh": 2, "pins": ["a=column"]}, "write a dict"),
        ({"mesh": 2, "pins": {3: "row"}}, "write a dict"),
        ({"mesh": 2, "inputs": ["input_ids"]}, "write a dict"),
        ({"mesh": "2y4"}, "not understood"),
        ({"mesh": 2, "mode": "dream"}, "neither 'train' nor 'inference'"),
        ({"mesh": 2, "cluster": "dgx-h1000"}, "dgx-h100"),
        ({"mesh": 2, "inputs": {"inputs_id": {"tp": 0}}}, "did you mean 'input_ids'"),
        ({"mesh": 2, "inputs": {"input_ids": {"dp": 0}}}, "the mesh has tp"),
        ({"mesh": 2, "inputs": {"input_ids": {"tp": 5}}}, "has 2 dims"),
        ({"mesh": 2, "inputs": {"input_ids": {"tp": "partial"}}}, "can be whole or split"),
        ({"mesh": 2, "outputs": {"logit": {"tp": 2}}}, "did you mean 'logits'"),
    ],
)
def test_bad_requests_get_a_sentence(change: dict[str, Any], message: str) -> None:
    one = example("llama")
    with pytest.raises(AutotpError, match=message):
        autotp.plan(one.model, one.args, one.kwargs, **change)


def test_examples_are_seeded() -> None:
    one, two = example("mlp"), example("mlp")
    assert isinstance(one, Example)
    assert torch.equal(one.args[0], two.args[0])


class Frozen(nn.Module):
    """Computes with a number that Python counts: a trace repeats the first."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.calls = nn.Linear(4, 4), 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        return self.layer(x) * self.calls


def checked() -> None:
    torch.manual_seed(0)
    model, args = Frozen(), (torch.randn(4, 4),)
    for check in (None, True):
        with pytest.raises(AutotpError, match="the trace of Frozen computes something else than the model"):
            autotp.parallelize(model, args, check=check)
    assert model.calls == 0
    many = autotp.parallelize(model, args, check=False)
    assert_close(many(*args), model.layer(*args), "the first call")


def test_a_trace_that_differs_from_the_model_is_refused_on_every_rank() -> None:
    run_ranks(checked, 2)
