"""Mixtures of experts: found in the graph whatever their spelling, split by tokens, experts and features, equal to one device."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import transformers.integrations.moe  # registers a grouped product that has float64
from torch import Tensor, nn

import autotp
from autotp import check, equality, experts
from autotp.errors import AutotpError
from autotp.huggingface import build_from_config
from autotp.interpret import run
from autotp.layouts import SortedCut
from autotp.models import load_model
from autotp.planning import Request, adopt, make_plan, prepare, traced_sizes
from autotp.price.cluster import load_cluster
from autotp.price.conversion import ConversionPrices
from autotp.program import Program
from autotp.random_plans import random_plan
from autotp.shrink import shrink_config
from autotp.trace import trace
from tests.models import TOLERANCE, splitting_pays
from tests.ranks import run_ranks

EXPERTS, CHOSEN, WIDTH, INNER = 5, 2, 6, 7


class Mixture(nn.Module):
    """Five experts of two products each, of which every token visits two, and a residual path."""

    def __init__(self, spelling: str = "sort", experts: int = EXPERTS) -> None:
        super().__init__()
        self.spelling, self.experts = spelling, experts
        self.router = nn.Linear(WIDTH, experts)
        self.up = nn.Parameter(torch.randn(experts, WIDTH, INNER))
        self.bias = nn.Parameter(torch.randn(experts, INNER))
        self.down = nn.Parameter(torch.randn(experts, INNER, WIDTH))

    def route(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        weights, chosen = self.router(tokens).softmax(-1).topk(CHOSEN, -1)
        return weights.reshape(-1), chosen.reshape(-1)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, WIDTH)
        weights, keys = self.route(tokens)
        product, zeros = torch.ops.transformers.grouped_mm_fallback, torch.zeros_like(tokens)
        if self.spelling == "sort":
            keys_sorted, slots = torch.sort(keys, stable=True)  # rows of equal keys are told apart below
            counts = torch.histc(keys.double(), bins=self.experts, min=0, max=self.experts - 1)
        else:
            slots = torch.argsort(keys, stable=True)
            keys_sorted = keys[slots]
            counts = (keys.unsqueeze(1) == torch.arange(self.experts)).sum(0)
        owners = slots // CHOSEN
        wide = owners.unsqueeze(-1).expand(-1, WIDTH)
        rows = tokens.gather(0, wide) if self.spelling == "scatter" else tokens[owners]
        ends = torch.cumsum(counts, 0, dtype=torch.int32)
        rows = product(rows, self.up, ends) + self.bias[keys_sorted]
        rows = product(rows.tanh(), self.down, ends) * weights[slots].unsqueeze(-1)
        if self.spelling == "scatter":
            return x + zeros.scatter_add(0, wide, rows).reshape(x.shape)
        if self.spelling == "index_add":
            return x + zeros.index_add(0, owners, rows).reshape(x.shape)
        back = torch.argsort(slots) if self.spelling == "argsort" else torch.empty_like(slots)
        if self.spelling == "sort":
            back[slots] = torch.arange(slots.shape[0])
        return x + rows[back].reshape(-1, CHOSEN, WIDTH).sum(1).reshape(x.shape)


class Crowded(Mixture):
    """Every token goes to the same two experts; the others have no rows."""

    def route(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        weights = self.router(tokens).softmax(-1)[:, 1:3]
        return weights.reshape(-1), torch.tensor([1, 2]).repeat(tokens.shape[0])


def stack(kind: type[Mixture] = Mixture, layers: int = 2, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(*(kind(**options) for _ in range(layers))).double()


def inputs(batch: int = 3) -> tuple[Tensor]:
    return (torch.randn(batch, 5, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64),)


def functions(program: Program) -> list[str]:
    return [node.op.rpartition(".")[2] for node in program.nodes if node.op.startswith("autotp.experts.")]


@pytest.mark.parametrize("spelling", ["sort", "argsort", "index_add", "scatter"])
def test_the_spelling_does_not_matter(spelling: str) -> None:
    last = "collect" if spelling in ("index_add", "scatter") else "combine"
    model = stack(spelling=spelling)
    program = trace(model, inputs())
    assert [functions(program).count(name) for name in ("grouped_product", last)] == [4, 2]
    request = Request({"tp": 2}, pins={"?": "expert"})
    plan = make_plan(program, request, splitting_pays(), "mixture")
    space, decisions = adopt(program, request, plan)
    assert equality.compare(space, decisions, dict(model.named_parameters()), inputs(), {}).worst < TOLERANCE


def test_rows_counted_from_other_keys_are_left_alone() -> None:
    class Strange(Mixture):
        def forward(self, x: Tensor) -> Tensor:
            tokens = x.reshape(-1, WIDTH)
            slots = torch.sort(self.route(tokens)[1])[1]
            ends = torch.tensor([3, 6, 9, 12, tokens.shape[0] * CHOSEN], dtype=torch.int32)
            return torch.ops.transformers.grouped_mm_fallback(tokens[slots // CHOSEN], self.up, ends)

    assert "grouped_product" not in functions(trace(Strange().double(), inputs(), dynamic=False))


@cache
def traced(kind: type[Mixture]) -> tuple[nn.Module, Program]:
    model = stack(kind)
    return model, trace(model, inputs())


@pytest.mark.parametrize("mesh", [(2,), (3,), (7,), (2, 2)], ids=str)
@pytest.mark.parametrize("kind", [Mixture, Crowded])
def test_random_plans_equal_one_device(kind: type[Mixture], mesh: tuple[int, ...]) -> None:
    model, program = traced(kind)
    space, border = prepare(program, Request({f"axis{number}": size for number, size in enumerate(mesh)}))
    prices = ConversionPrices(load_cluster("dgx-h100"), mesh, True, traced_sizes(program))
    ways = set()
    for seed in range(6):
        decisions = random_plan(space, border, prices, seed)
        found = equality.compare(space, decisions, dict(model.named_parameters()), inputs(), {}, seed=seed)
        assert found.worst < TOLERANCE, (seed, found.where)
        layouts = [layout for path in decisions.paths.values() for move in path for layout in (move.source, move.target)]
        ways |= {split.cut.by for layout in layouts for split in layout.splits if isinstance(split.cut, SortedCut)}
    assert ways == {"slot", "key"}


def test_tokens_go_to_their_experts_and_back() -> None:
    """Where splitting pays, tokens are split, experts are split, and an all-to-all leads from one to the other and back."""
    model, program = traced(Mixture)
    request = Request({"tp": 2}, inputs={"input": {"tp": 0}}, outputs={"output": {"tp": 0}}, pins={"?": "expert"})
    plan = make_plan(program, request, splitting_pays(), "mixture")
    assert plan.strategies == {"0": "expert", "0.router": "batch", "1": "expert", "1.router": "batch"}
    assert min(plan.collectives[way]["all_to_all"] for way in ("forward", "backward")) >= 4
    space, decisions = adopt(program, request, plan)
    assert equality.compare(space, decisions, dict(model.named_parameters()), inputs(4), {}).worst < TOLERANCE


def test_expert_parallelism_is_found_for_mixtral() -> None:
    loaded = load_model(str(Path(__file__).parents[1] / "examples" / "configs" / "mixtral-8x7b"))
    plan = autotp.plan(loaded.model, loaded.args, loaded.kwargs, mesh=8, cluster="dgx-h100")
    words = {word for name, word in plan.strategies.items() if name.endswith("mlp.experts")}
    assert words == {"expert"}
    assert plan.collectives["forward"]["all_to_all"] == plan.collectives["backward"]["all_to_all"] >= 64


ARCHITECTURES = ("mixtral", "qwen2_moe", "deepseek_v3", "gpt_oss")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures_equal_one_device(name: str) -> None:
    """As users run them: in float32, whose grouped product is the default."""
    config = shrink_config(transformers.CONFIG_MAPPING[name]())
    loaded = build_from_config(config, name, batch=2, seq=6, dtype=torch.float32, mode="train", fake=False)
    program = trace(loaded.model, loaded.args, loaded.kwargs)
    assert {"sort_by_key", "dispatch", "grouped_product", "combine"} <= set(functions(program))
    state = {**dict(loaded.model.named_parameters()), **dict(loaded.model.named_buffers())}
    for ranks in (2, 3):
        request = Request({"tp": ranks})
        plan = make_plan(program, request, splitting_pays(), name)
        space, decisions = adopt(program, request, plan)
        found = equality.compare(space, decisions, state, loaded.args, loaded.kwargs)
        assert found.worst < 1e-5, (ranks, found.where)
        assert any(word != "replicate" for key, word in plan.strategies.items() if key.endswith("experts"))


def on_ranks() -> None:
    for kind in (Mixture, Crowded):
        one, many = stack(kind), stack(kind)
        x = inputs()[0]
        parallel = autotp.parallelize(many, (x,), cluster="dgx-h100", pins={"?": "expert"})
        outputs = one(x), parallel(x)
        torch.testing.assert_close(outputs[1], outputs[0], atol=TOLERANCE, rtol=TOLERANCE)
        optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-2) for model in (one, parallel)]
        for output, optimizer in zip(outputs, optimizers, strict=True):
            output.square().mean().backward()
            optimizer.step()
        after = parallel.full_state_dict()
        for key, wanted in one.state_dict().items():
            torch.testing.assert_close(after[key], wanted, atol=TOLERANCE, rtol=TOLERANCE)


@pytest.mark.parametrize("ranks", [2, 4])
def test_experts_on_real_ranks(ranks: int) -> None:
    run_ranks(on_ranks, ranks)


# ---- planted errors


def swapped(order: Tensor) -> Tensor:
    return order.flip(0)


@pytest.mark.parametrize("function", ["dispatch", "combine"])
def test_a_wrong_piece_is_caught(function: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that forget which rank they are on, or slots that are not sorted back, do not pass the comparison."""
    original = getattr(experts, function)

    def forgetful(values: Tensor, order: Tensor, *rest: Any, **named: Any) -> Tensor:
        place = {"dispatch": 2, "combine": 1}[function]
        if len(rest) > place and isinstance(rest[place], Tensor) and rest[place].numel():
            rest = (*rest[:place], rest[place].flip(0), *rest[place + 1 :])
        return original(values, order, *rest, **named)

    model, program = traced(Mixture)
    request = Request({"tp": 2}, pins={"?": "expert"})
    plan = make_plan(program, request, splitting_pays(), "mixture")
    space, decisions = adopt(program, request, plan)
    nodes = tuple(replace(n, target=forgetful) if n.target is original else n for n in space.program.nodes)
    assert nodes != space.program.nodes
    wrong = replace(space, program=replace(space.program, nodes=nodes))
    assert equality.compare(wrong, decisions, dict(model.named_parameters()), inputs(), {}).worst > TOLERANCE


def test_rows_of_another_order_do_not_pass_the_check() -> None:
    program = traced(Mixture)[1]
    request = Request({"tp": 2}, pins={"?": "expert"})
    plan = make_plan(program, request, splitting_pays(), "mixture")
    space, _ = prepare(program, request)
    assert check.check(program, space, plan) is None
    product = next(entry for entry in plan.nodes if entry.op.endswith("grouped_product") and "S0" in entry.operands[0])
    for other in range(6):
        code = f"S0:{other}" if other else "S0"
        if code == product.operands[0]:
            continue
        changed = replace(product, operands=(code, *product.operands[1:]))
        with pytest.raises(AutotpError):
            check.check(program, space, replace(plan, nodes=tuple(changed if n is product else n for n in plan.nodes)))


class Tricky(Mixture):
    """Lookups that look like those of a mixture and are not: what they compute must stay what it is."""

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.reshape(-1, WIDTH)
        weights, keys = self.route(tokens)
        keys_sorted, slots = torch.sort(keys, stable=True)  # rows of equal keys are told apart below
        counts = torch.histc(keys.double(), bins=self.experts, min=0, max=self.experts - 1)
        ends, owners = torch.cumsum(counts, 0, dtype=torch.int32), slots // CHOSEN
        rows = torch.ops.transformers.grouped_mm_fallback(tokens[owners], self.up, ends)
        match self.spelling:
            case "some columns":  # gather and scatter_add on a part of the features
                narrow = owners.unsqueeze(-1).expand(-1, 3)
                part = tokens.gather(0, narrow)
                rows = rows[:, :3] * part
                return tokens.new_zeros(tokens.shape[0], 5).scatter_add(0, narrow, rows)
            case "column of an index":
                return rows + weights[slots.unsqueeze(-1)]
            case "base of ones":
                return torch.ones_like(tokens).index_add(0, owners, rows[:, :WIDTH])
            case "narrow integers":
                return rows + self.bias[keys_sorted.to(torch.uint8).long()] + slots.to(torch.int8).unsqueeze(-1)
        return rows * 2


@pytest.mark.parametrize("spelling", ["some columns", "column of an index", "base of ones", "narrow integers"])
def test_what_only_looks_like_a_mixture(spelling: str) -> None:
    model = stack(Tricky, 1, spelling=spelling)
    program = trace(model, inputs())
    assert "grouped_product" in functions(program)
    request = Request({"tp": 2})
    space, decisions = adopt(program, request, make_plan(program, request, splitting_pays(), "tricky"))
    found = equality.compare(space, decisions, dict(model.named_parameters()), inputs(), {})
    assert found.worst < TOLERANCE
    output, _ = run(program, dict(model.named_parameters()), inputs(), {})
    torch.testing.assert_close(output, model(*inputs()), atol=TOLERANCE, rtol=TOLERANCE)
