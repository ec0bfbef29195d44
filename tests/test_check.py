"""The plan checker: right plans pass, and every kind of planted error is found and named."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from autotp.check import check
from autotp.describe import describe
from autotp.errors import AutotpError
from autotp.formulate import formulate
from autotp.layouts import Segment, all_layouts
from autotp.planning import Request, for_mode, make_plan, prepare, traced_sizes
from autotp.plans import ConversionPlan, NodePlan, Plan, code_of
from autotp.price.cluster import load_cluster
from autotp.price.conversion import ConversionPrices
from autotp.program import Program, Ref
from autotp.solve import Solution
from autotp.strategies import Space
from autotp.trace import trace

MESHES = [{"tp": 2}, {"tp": 4}, {"tp": 3}, {"dp": 2, "tp": 2}]
PINS = {"attention.qkv": "column", "attention.out": "row", "mlp.0": "column", "mlp.2": "row"}


class Attention(nn.Module):
    """Four heads of 4 from one fused projection."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (4, 4)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        y = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.out(y.transpose(1, 2).flatten(2))
        return out


class Block(nn.Module):
    """Attention and MLP; the scale is a buffer and the token table is read by lookup."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(12, 16)
        self.register_buffer("scale", torch.ones(16))
        self.attention = Attention()
        self.norm = nn.LayerNorm(16)
        self.mlp = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.table(ids) * self.scale
        x = x + self.attention(x)
        out: Tensor = x + self.mlp(self.norm(x))
        return out


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16))


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_layer": 2, "n_embd": 48, "n_head": 6, "vocab_size": 101, "n_positions": 32}
    model: nn.Module = GPT2LMHeadModel(GPT2Config(**sizes, use_cache=False, bos_token_id=1, eos_token_id=1))
    return model.train()


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 6, "num_key_value_heads": 3}
    model: nn.Module = LlamaForCausalLM(LlamaConfig(num_hidden_layers=2, vocab_size=101, use_cache=False, **sizes))
    return model.train()


MODELS: dict[str, Callable[[], nn.Module]] = {"mlp": mlp, "block": Block, "gpt2": gpt2, "llama": llama}


@cache
def traced(name: str, dynamic: bool = False) -> Program:
    ids = torch.zeros(4, 8, dtype=torch.int64)
    if name == "mlp":
        return trace(mlp(), (torch.zeros(8, 16),), dynamic=dynamic)
    if name == "block":
        return trace(Block(), (ids,), dynamic=dynamic)
    return trace(MODELS[name](), (), {"input_ids": ids, "labels": ids}, dynamic=dynamic)


def random_plan(program: Program, request: Request, seed: int) -> tuple[Space, Plan]:
    """A plan with a random strategy at every node."""
    space, border = prepare(program, request)
    prices = ConversionPrices(load_cluster("dgx-h100"), request.mesh, request.mode == "train", traced_sizes(program))
    formulation = formulate(space, prices, border)
    draw = random.Random(seed)
    chosen = tuple(
        draw.choice(range(len(choice.seconds)))
        for choice in formulation.problem.choices
    )
    solution = Solution(chosen, 0.0, 0.0, "feasible", 1.0, "random", 0.0)
    plan = describe(space, prices, border, formulation, solution, model="m", mode=request.mode, axes=request.axes)
    return space, plan


# ---- right plans ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axes", MESHES, ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_right_plans_pass(name: str, axes: Mapping[str, int]) -> None:
    if len(axes) > 1 and name in ("gpt2", "llama"):  # a random plan costs no search over two axes
        space, plan = random_plan(traced(name), Request(axes), 0)
    else:
        plan = make_plan(traced(name), Request(axes), load_cluster("dgx-h100"), name)
        space, _ = prepare(traced(name), Request(axes))
    check(traced(name), space, plan)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_random_strategies_pass(name: str, dynamic: bool) -> None:
    for seed, axes in enumerate(MESHES[:3]):
        space, plan = random_plan(traced(name, dynamic), Request(axes), seed)
        check(traced(name, dynamic), space, plan)


def test_inference_knows_no_r() -> None:
    request = Request({"tp": 2}, mode="inference", pins=PINS)
    program = for_mode(traced("block"), "inference")
    plan = make_plan(program, request, load_cluster("dgx-h100"), "block")
    space, _ = prepare(program, request)
    check(program, space, plan)
    assert not any("R" in code for entry in plan.nodes for code in (*entry.operands, *entry.outputs))
    assert not any(word for entry in plan.conversions for word in entry.backward)


def test_declared_border() -> None:
    request = Request({"tp": 2}, inputs={"ids": {"tp": 0}}, outputs={"output": {"tp": 0}})
    plan = make_plan(traced("block"), request, load_cluster("dgx-h100"), "block")
    space, _ = prepare(traced("block"), request)
    check(traced("block"), space, plan)
    with pytest.raises(AutotpError, match=r"`ids` is \(S\(0\)\) on mesh axis `tp`, expected \(I\)"):
        check(traced("block"), space, replace(plan, inputs={}))
    with pytest.raises(AutotpError, match=r"output 0 of the model expects \(I\)|no consumer wants"):
        check(traced("block"), space, replace(plan, outputs={}))


@pytest.mark.parametrize("name", ["mlp", "block"])
def test_the_legal_layouts_of_an_operator_are_those_of_its_strategies(name: str) -> None:
    """Every combination of layouts of every small operator: the check accepts just those that the search derives."""
    program, request = traced(name), Request({"tp": 2})
    space, plan = random_plan(program, request, 0)
    kinds = {True: "IRPS", False: "IPSM"}
    for index in space.folding.members:
        node = program.nodes[index]
        refs = [space.tensors[index, False, place][0] for place in range(len(node.inputs))]
        refs += [Ref(index, place) for place in range(len(node.outputs))]
        codes = []
        for ref in refs:
            cuts, tensor = space.dim_cuts(ref), program.type_of(ref)
            codes.append([code_of(layout, cuts) for layout in all_layouts(cuts, 1, kinds[tensor.requires_grad])])
        combinations = list(product(*codes))
        if node.kind != "op" or len(combinations) > 700:
            continue
        strategies = {
            tuple(code_of(layout, space.dim_cuts(ref)) for ref, layout in zip(refs, layouts, strict=True))
            for strategy in space.strategies[index]
            for layouts in [(*strategy.operands, *strategy.outputs)]
        }
        legal = set()
        for codes_ in combinations:
            split = len(node.inputs)
            changed = set_node(plan, node.name, operands=codes_[:split], outputs=codes_[split:])
            try:
                check(program, space, replace(changed, conversions=()))
                legal.add(codes_)
            except AutotpError as error:
                legal |= {codes_} if "unconverted" in str(error) else set()
        assert legal == strategies, node.name


# ---- planted errors -------------------------------------------------------------------------------------------------


@cache
def right(axes: tuple[tuple[str, int], ...] = (("tp", 2),)) -> tuple[Program, Space, Plan]:
    """A tensor-parallel plan of the block, its space and program."""
    request = Request(dict(axes), pins=PINS)
    plan = make_plan(traced("block"), request, load_cluster("dgx-h100"), "block")
    return traced("block"), prepare(traced("block"), request)[0], plan


def set_node(plan: Plan, name: str, **changes: Any) -> Plan:
    nodes = tuple(replace(entry, **changes) if entry.node == name else entry for entry in plan.nodes)
    assert any(entry.node == name for entry in plan.nodes), name
    return replace(plan, nodes=nodes)


def node_of(plan: Plan, name: str) -> NodePlan:
    return next(entry for entry in plan.nodes if entry.node == name)


def conversion_of(plan: Plan, name: str) -> ConversionPlan:
    return next(entry for entry in plan.conversions if entry.node == name)


def set_conversion(plan: Plan, name: str, *entries: ConversionPlan) -> Plan:
    """The plan with the conversions of a tensor replaced."""
    return replace(plan, conversions=(*(entry for entry in plan.conversions if entry.node != name), *entries))


def change_conversion(name: str, **changes: Any) -> Callable[[Plan], Plan]:
    return lambda plan: set_conversion(plan, name, replace(conversion_of(plan, name), **changes))


def conversion(
    node: str, layouts: tuple[str, ...], forward: tuple[str, ...], backward: tuple[str, ...]
) -> ConversionPlan:
    return ConversionPlan(node, 0, 1, layouts, layouts, forward, backward, 0, 0.0)


def blind_thirds(plan: Plan) -> Plan:
    """The fused projection cut in two plain halves, as if it were not three matrices."""
    for name in ("p_attention_qkv_weight", "p_attention_qkv_bias"):
        plan = set_node(plan, name, outputs=("S0",))
    plan = set_node(plan, "linear", operands=("R", "S0", "S0"), outputs=("S2",))
    return set_node(plan, "chunk", operands=("S2",))


def test_the_right_plan_is_the_expected_one() -> None:
    """The planted errors below change this plan."""
    program, space, plan = right()
    check(program, space, plan)
    assert node_of(plan, "linear").operands == ("R", "S0:1", "S0:1")
    assert node_of(plan, "chunk").outputs == ("S2", "S2", "S2")
    assert conversion_of(plan, "linear_1").layouts == ("P", "I")
    assert conversion_of(plan, "p_mlp_2_bias").layouts == ("I", "P")


PLANTED: dict[str, tuple[Callable[[Plan], Plan], str]] = {
    # conversions
    "dropped conversion": (
        lambda plan: set_conversion(plan, "linear_1"),
        r"tensor `linear_1` is made as \(P\), but operand 1 of node `add` .* expects \(I\) on mesh axis `tp`",
    ),
    "dropped at the last consumer": (
        lambda plan: set_conversion(plan, "layer_norm"),
        r"`layer_norm` is made as \(I\), but operand 0 of node `linear_2` .* expects \(R\) on mesh axis `tp`",
    ),
    "doubled conversion": (
        lambda plan: set_conversion(plan, "linear_1", *[conversion_of(plan, "linear_1")] * 2),
        r"converts tensor `linear_1` from \(P\) to \(I\) on mesh axis `tp` twice, expected once",
    ),
    "conversion to another dim": (
        change_conversion(
            "linear_1", layouts=("P", "S1"), forward=("reduce_scatter over tp",), backward=("all_gather over tp",)
        ),
        r"`linear_1` is made as \(P\), but operand 1 of node `add` .* expects \(I\)",
    ),
    "conversion to another kind": (
        change_conversion(
            "layer_norm", layouts=("I", "S1"), forward=("slice over tp",), backward=("all_gather over tp",)
        ),
        r"`layer_norm` is made as \(I\), but .* expects \(R\)",
    ),
    "reversed path": (
        change_conversion("linear_1", layouts=("I", "P"), forward=("mask over tp",), backward=("",)),
        r"converts tensor `linear_1` from \(I\) to \(P\), but it is made as \(P\), which differs on mesh axis `tp`",
    ),
    "stray conversion": (
        lambda plan: set_conversion(
            plan, "relu", conversion("relu", ("S2", "I"), ("all_gather over tp",), ("slice over tp",))
        ),
        r"converts tensor `relu` from \(S\(2\)\) to \(I\) on mesh axis `tp`, but no consumer wants that",
    ),
    "conversion that does nothing": (
        lambda plan: set_conversion(plan, "add", conversion("add", ("I", "I"), ("",), ("",))),
        r"tensor `add` goes from \(I\) to \(I\), but a move changes exactly one mesh axis",
    ),
    "conversion of an unknown tensor": (
        lambda plan: set_conversion(plan, "add", conversion("sum", ("I", "R"), ("",), ("all_reduce over tp",))),
        r"converts output 0 of node `sum`, which the model lacks",
    ),
    "wrong number of copies": (
        change_conversion("linear_1", copies=2),
        r"`linear_1` from \(P\) to \(I\) on mesh axis `tp` for 2 copies, expected 1",
    ),
    "wrong forward primitive": (
        change_conversion("linear_1", forward=("reduce_scatter over tp",)),
        r"`linear_1` from .* on mesh axis `tp` runs 'reduce_scatter over tp' forward, expected 'all_reduce over tp'",
    ),
    "missing backward primitive": (
        change_conversion("layer_norm", backward=("",)),
        r"`layer_norm` from \(I\) to \(R\) on mesh axis `tp` runs 'nothing' backward, expected 'all_reduce over tp'",
    ),
    "primitive over another axis": (
        change_conversion("linear_1", forward=("all_reduce over dp",)),
        r"on mesh axis `tp` runs 'all_reduce over dp' forward, expected 'all_reduce over tp'",
    ),
    "step without primitive": (change_conversion("linear_1", forward=()), r"`linear_1` has 2 layouts and 0 steps"),
    # operators
    "partial where replicated is needed": (
        lambda plan: set_node(plan, "linear_2", operands=("P", "S0", "S0")),
        r"`linear_2` .* on mesh axis `tp`: operand 0 \(`layer_norm`\) is P, expected R if factor `o` is split",
    ),
    "invariant where replicated is needed": (
        lambda plan: set_node(plan, "linear_2", operands=("I", "S0", "S0")),
        r"`linear_2` .*: operand 0 \(`layer_norm`\) is I, expected R if factor `o` is split there",
    ),
    "bias added on every rank": (
        lambda plan: set_node(plan, "linear_3", operands=("S2", "S1", "R")),
        r"`linear_3` .*: operand 2 \(`p_mlp_2_bias`\) is R, expected P if factor `i` is split there",
    ),
    "weight split on the wrong dim": (
        lambda plan: set_node(plan, "linear_3", operands=("S2", "S0", "P")),
        r"`linear_3` .*: operand 1 \(`p_mlp_2_weight`\) is S\(0\), expected S\(1\) if factor `i`",
    ),
    "partial output called whole": (
        lambda plan: set_node(plan, "linear_1", outputs=("I",)),
        r"`linear_1` .*: output 0 is I, expected P",
    ),
    "product of two partials": (
        lambda plan: set_node(plan, "mul", operands=("P", "P"), outputs=("P",)),
        r"`mul` .*: operand \d .* is P, expected [IR] if the operator runs on summands of operand \d",
    ),
    "partial through a nonlinear operator": (
        lambda plan: set_node(plan, "relu", operands=("P",), outputs=("P",)),
        r"`relu` .*: operand 0 \(`linear_2`\) is P, expected I if all tensors are I",
    ),
    "split of a whole factor": (
        lambda plan: set_node(plan, "layer_norm", operands=("S2", "I", "I"), outputs=("S2",)),
        r"`layer_norm` .*: operand 0 \(`add`\) is S\(2\), a dim that this operator never splits, expected I",
    ),
    "attention split by keys": (
        lambda plan: set_node(plan, "scaled_dot_product_attention", operands=("R", "S2", "R"), outputs=("R",)),
        r"`scaled_dot_product_attention` .*: operand 1 .* is S\(2\), a dim that this operator never splits",
    ),
    "partial integers into a lookup": (
        lambda plan: set_node(plan, "embedding", operands=("I", "P"), outputs=("P",)),
        r"`embedding` .* on mesh axis `tp`",
    ),
    # pieces
    "blind thirds": (
        blind_thirds,
        r"`chunk` .* with factor `c` split on mesh axis `tp`, output 0 holds elements 0–7 of dim 2, expected 0–15",
    ),
    "another cut at one output": (
        lambda plan: set_node(plan, "chunk", outputs=("S2", "S2:1", "S2")),
        r"`chunk` .*: .* output 1 holds elements 0–1, 4–5, 8–9, 12–13 of dim 2, expected 0–7 on the rank at \(0,\)",
    ),
    "weight and bias cut differently": (
        lambda plan: set_node(plan, "linear", operands=("R", "S0:1", "S0")),
        r"`linear` .* operand 2 \(`p_attention_qkv_bias`\) holds elements 0–23 of dim 0, expected 0–7, 16–23, 32–39",
    ),
    # tensors
    "replicated without gradient": (
        lambda plan: set_node(plan, "embedding", operands=("R", "R"), outputs=("R",)),
        r"operand 1 \(`ids`\) of node `embedding` .* is R on mesh axis `tp`, expected I, because it has no gradient",
    ),
    "maximum with a gradient": (
        lambda plan: set_node(plan, "relu", outputs=("M",)),
        r"output 0 of node `relu` .* is M on mesh axis `tp`, expected I, R, S or P",
    ),
    "no layout": (
        lambda plan: set_node(plan, "relu", outputs=("S7",)),
        r"`relu` .* has the layout 'S7', expected 3 dims on 1 mesh axes",
    ),
    "dim counted from the end": (
        lambda plan: set_node(plan, "p_mlp_2_bias", outputs=("S-1",)),
        r"parameter `mlp.2.bias` has the layout 'S-1', expected 1 dims",
    ),
    "layout for two axes": (lambda plan: set_node(plan, "relu", outputs=("I|I",)), r"`relu` .* has the layout 'I|I'"),
    # state and border
    "parameter resting as P": (
        lambda plan: set_node(plan, "p_mlp_2_bias", outputs=("P",)),
        r"parameter `mlp.2.bias` rests as P on mesh axis `tp`, expected I or S",
    ),
    "parameter resting as R": (
        lambda plan: set_node(plan, "p_mlp_2_bias", outputs=("R",)),
        r"parameter `mlp.2.bias` rests as R on mesh axis `tp`, expected I or S",
    ),
    "buffer resting split": (
        lambda plan: set_node(plan, "b_scale", outputs=("S0",)),
        r"tensor `b_scale` is made as \(S\(0\)\), but operand 1 of node `mul` .* expects \(I\) on mesh axis `tp`, unconverted",
    ),
    "input split but not declared": (
        lambda plan: set_node(plan, "ids", outputs=("S0",)),
        r"input `ids` is \(S\(0\)\) on mesh axis `tp`, expected \(I\) as nothing else is declared",
    ),
    "R at the border": (
        lambda plan: replace(plan, outputs={"output": "R"}),
        r"output `output` is declared R on mesh axis `tp`, expected I, S or P at the border",
    ),
    "undeclared output": (
        lambda plan: set_node(plan, "add_1", operands=("R", "R"), outputs=("R",)),
        r"`(add|linear_3|add_1)` is made as .* but (operand \d of node `add_1`|output 0 of the model).* expects",
    ),
    "unknown output": (lambda plan: replace(plan, outputs={"logits": "I"}), r"output `logits`, expected one of output"),
    # the plan as a whole
    "missing node": (
        lambda plan: replace(plan, nodes=tuple(entry for entry in plan.nodes if entry.node != "relu")),
        r"says nothing about node `relu` \(aten.relu.default in mlp.1\)",
    ),
    "node twice": (
        lambda plan: replace(plan, nodes=(*plan.nodes, plan.nodes[0])),
        r"two entries for node `p_table_weight`",
    ),
    "node of another model": (
        lambda plan: replace(plan, nodes=(*plan.nodes, replace(plan.nodes[0], node="p_other"))),
        r"decides about node `p_other`",
    ),
    "another operator": (
        lambda plan: set_node(plan, "relu", op="aten.gelu.default"),
        r"1 copies of aten.gelu.default .* as node `relu` .*, expected 1 copies of aten.relu.default",
    ),
    "another mesh": (lambda plan: replace(plan, mesh={"tp": 4}), r"the plan is for the mesh \{'tp': 4\}"),
}


@pytest.mark.parametrize("error", PLANTED)
def test_planted_errors_are_named(error: str) -> None:
    program, space, plan = right()
    plant, sentence = PLANTED[error]
    with pytest.raises(AutotpError, match=sentence):
        check(program, space, plant(plan))


RESTING = {
    "inner axis gathered": (("S0/1|S0/0", "I|S0"), ("all_gather over dp",), ("slice over dp",), None),
    "outer axis gathered": (
        ("S0/0|S0/1", "I|S0"),
        ("all_gather over dp",),
        ("slice over dp",),
        r"`p_mlp_0_weight` goes from .* on mesh axis `dp`, but only the innermost axis of a split may be changed",
    ),
    "two axes at once": (
        ("S1|I", "I|S0"),
        ("all_to_all over dp",),
        ("all_to_all over dp",),
        r"`p_mlp_0_weight` goes from .* on mesh axes `dp`, `tp`, but a move changes exactly one mesh axis",
    ),
    "order of axes not said": (
        ("S0|S0", "I|S0"),
        ("all_gather over dp",),
        ("slice over dp",),
        r"has the layout 'S0\|S0'",
    ),
}


@pytest.mark.parametrize("case", RESTING)
def test_axes_that_share_a_dim(case: str) -> None:
    """A weight that rests split over both axes of a mesh is gathered over the inner one only."""
    program, space, plan = right((("dp", 2), ("tp", 2)))
    layouts, forward, backward, sentence = RESTING[case]
    plan = set_node(plan, "p_mlp_0_weight", outputs=layouts[:1])
    plan = set_conversion(plan, "p_mlp_0_weight", conversion("p_mlp_0_weight", layouts, forward, backward))
    if sentence is None:
        check(program, space, plan)
        return
    with pytest.raises(AutotpError, match=sentence):
        check(program, space, plan)


def test_special_factors_are_contiguous() -> None:
    """A vocabulary split in several stretches per rank would need more than one offset."""
    program, space, plan = right()
    weight = space.tensors[program.by_name["embedding"].index, False, 0][0]
    assert len(space.cuts.of(weight, 0)) == 1
    space.cuts.cuts[weight, 0][(Segment(2, 2, 3),)] = None
    try:
        wrong = set_node(plan, "embedding", operands=("S0:1", "I"), outputs=("P",))
        with pytest.raises(
            AutotpError, match=r"`embedding` .* factor `v` .* holds elements 0–2, 6–8, expected one contig"
        ):
            check(program, space, wrong)
    finally:
        del space.cuts.cuts[weight, 0][(Segment(2, 2, 3),)]


def test_granules_matter_at_sizes_that_do_not_divide() -> None:
    """At the traced sizes both cuts give equal pieces; at a sequence that the mesh does not divide they do not."""
    model = nn.Sequential(nn.Flatten(1, 2), nn.ReLU())
    program = trace(model, (torch.zeros(4, 8, 6),), dynamic=True)
    space, plan = random_plan(program, Request({"tp": 2}), 0)
    view = next(node for node in program.nodes if node.op in ("aten.flatten.using_ints", "aten.reshape.default"))
    by_length = next(
        s for s in space.strategies[view.index] if "S" in s.operands[0].kinds and s.operands[0].splits[0].dim == 1
    )
    plain = next(n for n, cut in enumerate(space.cuts.of(Ref(view.index), 1)) if cut[0].granule == 1)
    wrong = set_node(
        plan,
        view.name,
        operands=(code_of(by_length.operands[0], space.dim_cuts(view.inputs[0])),),
        outputs=(f"S1:{plain}" if plain else "S1",),
    )
    with pytest.raises(AutotpError, match=rf"`{view.name}` .* output 0 holds elements"):
        check(program, space, wrong)


def test_copies_of_a_block_that_differ_in_consumers() -> None:
    """Two equal layers: the conversion of the last one's output may be the only one, or missing."""
    program, request = traced("llama"), Request({"tp": 2})
    space, plan = random_plan(program, request, 1)
    shared = [entry for entry in plan.conversions if entry.copies == 2]
    assert shared
    for entry in shared[:3]:
        others = tuple(other for other in plan.conversions if other is not entry)
        for wrong in (others, (*others, replace(entry, copies=1)), (*others, entry, entry)):
            with pytest.raises(AutotpError, match=f"`{entry.node}`|unconverted"):
                check(program, space, replace(plan, conversions=wrong))


def test_any_changed_layout_of_a_random_plan_is_found() -> None:
    """Changing one layout of one entry makes a plan wrong, whatever it is."""
    program = traced("llama")
    space, plan = random_plan(program, Request({"tp": 2}), 2)
    draw = random.Random(0)
    entries = [entry for entry in plan.nodes if entry.operands]
    for entry in draw.sample(entries, 25):
        index = program.by_name[entry.node].index
        place = draw.randrange(len(entry.operands))
        cuts = space.dim_cuts(space.tensors[index, False, place][0])
        codes = [code_of(layout, cuts) for layout in all_layouts(cuts, 1, "IRPS")]
        other = draw.choice([code for code in codes if code != entry.operands[place]])
        operands = (*entry.operands[:place], other, *entry.operands[place + 1 :])
        with pytest.raises(AutotpError, match=f"`{entry.node}`"):
            check(program, space, set_node(plan, entry.node, operands=operands))
