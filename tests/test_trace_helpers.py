"""Tracing helpers: models that would trace wrongly, or not at all, trace as they run; what cannot is refused in one sentence."""

from __future__ import annotations

import random
import sys
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.compiler import is_exporting

from autotp.autograd_functions import FunctionCall
from autotp.equality import compare
from autotp.errors import AutotpError
from autotp.planning import Request, adopt, make_plan
from autotp.price.cluster import load_cluster
from autotp.program import Program
from autotp.rewrite import rewrite
from autotp.runtime.random import RandomCall
from autotp.trace import run, trace
from autotp.trace_helpers import prepared
from autotp.verify import cluster_where_splitting_pays


def gradients(model: nn.Module, args: tuple[Any, ...], *, program: Program | None = None) -> list[Tensor]:
    """Output and gradients of all parameters and inputs, of the model or of its program."""
    torch.manual_seed(0)
    inputs = [arg.detach().clone().requires_grad_(arg.requires_grad) if isinstance(arg, Tensor) else arg for arg in args]
    state = {name: parameter.detach().clone().requires_grad_() for name, parameter in model.named_parameters()}
    if program is None:
        output = torch.func.functional_call(model, state, tuple(inputs))
    else:
        output = run(program, {**dict(model.named_buffers()), **state}, tuple(inputs))[0]
    tensors = [*state.values(), *(item for item in inputs if isinstance(item, Tensor) and item.requires_grad)]
    outputs = [leaf for leaf in (output if isinstance(output, (tuple, list)) else [output]) if leaf.requires_grad]
    found = torch.autograd.grad([leaf.square().sum() for leaf in outputs], tensors, allow_unused=True)
    return [*outputs, *(torch.zeros(()) if one is None else one for one in found)]


def check_equal(model: nn.Module, args: tuple[Any, ...], *others: tuple[Any, ...]) -> Program:
    """Trace with the first inputs and compare with the model, outputs and all gradients, on all."""
    program = trace(model, args)
    for given in (args, *others):
        for found, expected in zip(gradients(model, given, program=program), gradients(model, given), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    return program


def functions(program: Program) -> list[FunctionCall]:
    return [node.target for node in program.nodes if isinstance(node.target, FunctionCall)]


# ---- custom autograd Functions --------------------------------------------------------------------------------------


class Scaled(torch.autograd.Function):
    """x · factor forward, 7 · gradient backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        return x * factor

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] * 7, None


class TwoOutputs(torch.autograd.Function):
    """New style, several outputs of which one carries no gradient, sizes and a list among the arguments."""

    @staticmethod
    def forward(x: Tensor, rows: int, scales: list[float], mode: str = "sum") -> tuple[Tensor, Tensor, int]:
        assert mode == "sum"
        return x.reshape(rows, -1) * scales[0], x.argmax(-1), rows

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.shape = inputs[0].shape

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0].reshape(ctx.shape) * 3, None, None, None


class Identity(torch.autograd.Function):
    """Gradient reversal: gives its input itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return -grads[0]


class Activated(torch.autograd.Function):
    """Takes a plain callable, and uses another Function inside."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, function: Any) -> Tensor:
        return Scaled.apply(function(x), 2.0)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] * 5, None


class Noisy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * torch.rand_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return grads[0] * 2


class UsesFunctions(nn.Module):
    def __init__(self, what: str) -> None:
        super().__init__()
        self.first, self.second, self.what = nn.Linear(4, 6), nn.Linear(6, 4), what

    def forward(self, x: Tensor) -> Any:
        y = self.first(x)
        match self.what:
            case "two":
                y, index, rows = TwoOutputs.apply(y, x.shape[0], [0.5, 2.0])
                return self.second(y) * rows, index
            case "identity":
                y = Identity.apply(y)
            case "held":
                y = Activated.apply(y, torch.tanh) + Activated.apply(y, torch.relu)
            case "written":  # an in-place operator beside it, so that PyTorch functionalises the graph
                y = Scaled.apply(y, 2.0)
                y[:, :2] = 0.5
            case "no_grad":
                with torch.no_grad():
                    factor = Scaled.apply(y, 2.0)
                y = Scaled.apply(y, 3.0) * factor
            case "noisy":
                y = Noisy.apply(y)
            case _:
                y = Scaled.apply(y, 3.0)
        return self.second(y)


@pytest.mark.parametrize("what", ["plain", "two", "identity", "held", "written", "no_grad", "noisy"])
def test_functions_keep_their_backward(what: str) -> None:
    model = UsesFunctions(what).double()
    inputs = [(torch.randn(rows, 4, dtype=torch.float64, requires_grad=True),) for rows in (3, 5)]
    program = check_equal(model, *inputs)
    found = functions(program)
    assert len(found) == {"held": 2, "no_grad": 2}.get(what, 1)
    assert [target.random for target in found] == [what == "noisy"] * len(found)
    assert program.notes == ()
    node = next(node for node in program.nodes if isinstance(node.target, FunctionCall))
    assert node.op.startswith("tests.test_trace_helpers.") or node.op.startswith("test_trace_helpers.")
    assert "test_trace_helpers.py:" in node.source
    assert torch.autograd.Function.__dict__["apply"].__func__.__module__ == "torch.autograd.function"


def test_equal_calls_share_a_target_and_different_ones_do_not() -> None:
    class Both(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            x = Activated.apply(Activated.apply(x, torch.tanh), torch.tanh)
            return Activated.apply(x, torch.relu)

    program = check_equal(Both(), (torch.randn(3, 4, requires_grad=True),))
    one, other, third = [node for node in program.nodes if isinstance(node.target, FunctionCall)]
    assert one.target is other.target is not third.target
    assert one.args[1] == other.args[1] != third.args[1]


def test_a_function_that_reads_other_tensors_is_traced_through_and_said() -> None:
    class Checkpointed(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, layer: nn.Module, x: Tensor) -> Tensor:
            return layer(x)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return None, grads[0]

    class Model(UsesFunctions):
        def forward(self, x: Tensor) -> Any:
            return Checkpointed.apply(self.first, x).sum() + self.second(self.first(x))

    program = trace(Model(""), (torch.randn(3, 4),))
    assert not functions(program)
    assert len(program.notes) == 1
    assert "`Checkpointed`" in program.notes[0] and "reads tensors that are not among its arguments" in program.notes[0]


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (lambda x: x.mul_(2), "`Bad` .* writes to its input"),
        (lambda x: x * float(x.numpy().sum()), "`Bad` .* cannot run on tensors without values .*custom_op"),
    ],
)
def test_functions_that_cannot_be_kept_are_refused(body: Any, says: str) -> None:
    class Bad(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return body(x)

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return grads[0]

    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return Bad.apply(x * 2)

    with pytest.raises(AutotpError, match=says) as caught:
        trace(Model(), (torch.randn(3, 4),))
    assert "test_trace_helpers.py:" in str(caught.value)
    assert "\n" not in str(caught.value)


# ---- "am I being exported?" -----------------------------------------------------------------------------------------


class Asking(nn.Module):
    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what

    def forward(self, x: Tensor) -> Tensor:
        match self.what:
            case "attribute":
                asked = torch.compiler.is_exporting()
            case "imported":
                asked = is_exporting()
            case "compiling":
                asked = torch.compiler.is_compiling() or torch._utils.is_compiling()
            case "dynamo":
                asked = torch._dynamo.is_compiling() or torch.compiler.is_dynamo_compiling()
            case "needed":
                asked = is_exporting()
                if not asked and x.sum() > 0:
                    return x
        return x * 2 if asked else x * 3


@pytest.mark.parametrize("what", ["attribute", "imported", "compiling", "dynamo"])
def test_code_that_asks_whether_it_is_exported_is_traced_as_it_runs(what: str) -> None:
    before = torch.compiler.is_exporting, torch.compiler.is_compiling, sys.modules[__name__].is_exporting  # type: ignore[attr-defined]
    program = check_equal(Asking(what), (torch.randn(3, 4, requires_grad=True),))
    assert program.notes == ()
    assert before == (torch.compiler.is_exporting, torch.compiler.is_compiling, is_exporting)


def test_code_that_must_know_is_told_and_the_note_says_who() -> None:
    program = trace(Asking("needed"), (torch.randn(3, 4),))
    (note,) = program.notes
    assert "test_trace_helpers.py:" in note and "whether it is being exported" in note


# ---- random numbers and state in Python -----------------------------------------------------------------------------


class Drawing(nn.Module):
    """Uses Python's or numpy's generators; `rate` 0 means that the numbers do not matter."""

    def __init__(self, what: str, rate: float = 0.5) -> None:
        super().__init__()
        self.what, self.rate = what, rate

    def forward(self, x: Tensor) -> Tensor:
        match self.what:
            case "mask":
                mask = torch.from_numpy(np.random.rand(64) < self.rate).to(x.device)
                return x.where(~mask, 0.0)
            case "depth":
                for _ in range(20):
                    if random.random() >= self.rate:
                        x = x * 2
            case "generator":
                return x * float(np.random.default_rng().random() * self.rate)
            case "torch":
                return x * torch.rand(64)
        return x


@pytest.mark.parametrize(("what", "place"), [("mask", "numpy.random.rand"), ("depth", "random.random"), ("generator", "default_rng")])
def test_random_numbers_of_python_are_refused_where_they_matter(what: str, place: str) -> None:
    states = random.getstate(), np.random.get_state()[1].tobytes()  # type: ignore[union-attr]
    with pytest.raises(AutotpError, match=rf"{place} at .*test_trace_helpers.py:\d+ draws a random number in Python"):
        trace(Drawing(what), (torch.randn(2, 64),))
    assert not trace(Drawing(what, rate=0.0), (torch.randn(2, 64),)).notes
    assert not trace(Drawing("torch"), (torch.randn(2, 64),)).notes
    assert states == (random.getstate(), np.random.get_state()[1].tobytes())  # type: ignore[union-attr]
    assert random.random.__module__ is None or "trace" not in str(random.random)


def test_attributes_that_the_forward_changes_are_set_back_and_said() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.calls, self.longest, self.name = 0, 0, "net"

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            self.longest = max(self.longest, x.shape[0])
            return x * self.calls

    model = nn.Sequential(Counting())
    program = trace(model, (torch.randn(3, 4),))
    assert (model[0].calls, model[0].longest) == (0, 0)
    assert any("`0.calls`" in note and "always computes as in the first call" in note for note in program.notes)


# ---- settings of models ---------------------------------------------------------------------------------------------


class Settings:
    def __init__(self, **fields: Any) -> None:
        vars(self).update(fields)


class Configured(nn.Module):
    """A model that reads its settings from a nested configuration, as transformers' do."""

    def __init__(self, **fields: Any) -> None:
        super().__init__()
        self.config = Settings(text_config=Settings(**fields))
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.layerdrop = fields.get("encoder_layerdrop", 0.0)

    def forward(self, x: Tensor) -> Tensor:
        fields = self.config.text_config
        if self.training and getattr(fields, "apply_spec_augment", False):
            x = x * torch.from_numpy(np.random.rand(4)).to(x.dtype)
        for layer in self.layers:
            if self.training and self.layerdrop > 0 and torch.rand([]) < self.layerdrop:
                continue
            x = layer(x)
        return x


def test_layer_drop_is_off_in_training_and_said() -> None:
    model, args = Configured(encoder_layerdrop=0.5, layer_dropout=0.1), (torch.randn(2, 4),)
    (note,) = trace(model, args).notes
    assert "LayerDrop (`encoder_layerdrop`, `layerdrop`) is off" in note
    assert (model.layerdrop, model.config.text_config.encoder_layerdrop) == (0.5, 0.5)
    assert model.config.text_config.layer_dropout == 0.1
    assert trace(model.eval(), args).notes == ()


def test_spec_augment_is_off_in_training_and_said() -> None:
    model, args = Configured(apply_spec_augment=True, mask_time_prob=0.1), (torch.randn(2, 4),)
    (note,) = trace(model, args).notes
    assert "SpecAugment" in note
    assert model.config.text_config.apply_spec_augment is True
    assert trace(model.eval(), args).notes == ()


def test_helpers_restore_on_errors() -> None:
    model = Configured(encoder_layerdrop=0.5, use_cache=True)
    inside = []

    def fail() -> None:
        with prepared(model, []):
            inside.append((model.layerdrop, model.config.text_config.use_cache))
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        fail()
    assert inside == [(0.0, False)]
    assert (model.layerdrop, model.config.text_config.use_cache) == (0.5, True)


SMALL = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "use_cache": False,
}  # fmt: skip


@pytest.fixture
def transformers() -> Any:
    return pytest.importorskip("transformers")


@pytest.mark.parametrize("asked", ["flash_attention_2", "flex_attention"])
def test_attention_kernels_are_exchanged_and_said(transformers: Any, asked: str) -> None:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL))
    model.config._attn_implementation_internal = asked
    program = trace(model, (), {"input_ids": torch.zeros(2, 12, dtype=torch.int64)})
    assert any(f'attn_implementation="sdpa" in place of "{asked}"' in note for note in program.notes)
    assert model.config._attn_implementation == asked
    assert sum("scaled_dot_product" in node.op for node in program.nodes) == 2


def test_experts_are_computed_by_grouped_products(transformers: Any) -> None:
    config = transformers.MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2)
    model = transformers.MixtralForCausalLM(config)
    inputs = {"input_ids": torch.zeros(2, 12, dtype=torch.int64)}
    model.set_experts_implementation("eager")
    notes = trace(model, (), inputs).notes
    assert any('experts_implementation="grouped_mm" in place of "eager"' in note for note in notes)
    assert model.config._experts_implementation == "eager"
    model.set_experts_implementation("grouped_mm")
    assert not any("experts_implementation" in note for note in trace(model, (), inputs).notes)
    notes = trace(model.double(), (), inputs).notes
    assert any('experts_implementation="batched_mm" in place of "grouped_mm"' in note for note in notes)


def test_a_module_may_convert_itself_to_what_it_is() -> None:
    class Casting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            self.head = self.head.to(x.dtype)
            return self.head(x)

    model = Casting()
    program = check_equal(model, (torch.randn(3, 4),))
    assert [node.op for node in program.nodes if node.kind == "op"] == ["aten.linear.default"]
    assert model.head.weight.dtype is torch.float32


# ---- the graph of a rank --------------------------------------------------------------------------------------------


class Factories(nn.Module):
    """Makes tensors on the device of its input, on a literal one, on none, and from Python numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.table = nn.Linear(4, 4), torch.tensor([1.0, 2.0, 3.0, 4.0])

    def forward(self, x: Tensor) -> Tensor:
        rows = torch.arange(x.shape[0], device=x.device) + torch.zeros(x.shape[0], device="cpu")
        mask = torch.full((4,), 2.0).to("cpu") + torch.ones_like(x[0], device="cpu") + torch.eye(4)[0] + x.new_zeros(4)
        with torch.no_grad():
            y = self.layer(x)
        return Scaled.apply(self.layer(x), 2.0) * rows[:, None] + mask.to(y) * y + self.table


def test_the_graph_runs_on_another_device_than_the_trace() -> None:
    model, x = Factories(), torch.randn(6, 4)
    program, request = trace(model, (x,)), Request({"tp": 2})
    plan = make_plan(program, request, load_cluster("dgx-h100"), "factories")
    space, decisions = adopt(program, request, plan)
    sharded = rewrite(space, decisions, (0,), gradient=True, device="meta")
    devices = {arg for module in sharded.graph.modules() if isinstance(module, torch.fx.GraphModule)
               for node in module.graph.nodes for arg in (*node.args, *node.kwargs.values()) if isinstance(arg, torch.device)}  # fmt: skip
    assert devices == {torch.device("meta")}
    given = {"layer.weight": model.layer.weight, "layer.bias": model.layer.bias, **program.constants}
    given |= {name: tensor.to("meta") for name, tensor in given.items()}
    with torch.no_grad():
        (result,) = sharded.graph(*(given[spec.name] for spec in sharded.state), x.to("meta"))
    assert (result.device.type, tuple(result.shape)) == ("meta", (6, 4))


@pytest.mark.parametrize("what", ["plain", "two", "held", "noisy"])
def test_functions_run_whole_on_every_rank(what: str) -> None:
    torch.manual_seed(0)
    model, args = UsesFunctions(what).double(), (torch.randn(6, 4, dtype=torch.float64),)
    program, request = trace(model, args), Request({"dp": 2, "tp": 2})
    plan = make_plan(program, request, cluster_where_splitting_pays(load_cluster("dgx-h100")), "functions")
    space, decisions = adopt(program, request, plan)
    ranks = [rewrite(space, decisions, (0, 1), gradient=True)]
    calls = [module for rank in ranks for module in rank.graph.modules() if isinstance(module, RandomCall)]
    assert len(calls) == (what == "noisy")
    if what != "noisy":  # ranks draw other numbers than a single device
        assert compare(space, decisions, dict(model.named_parameters()), args, {}).worst < 1e-12
    random = [node for node in program.nodes if isinstance(node.target, FunctionCall)]
    assert all(set(decisions.chosen[space.folding.representative[node.index]].key) == {"I"} for node in random)


def test_a_plan_is_not_executed_in_another_dtype() -> None:
    model, request = Factories(), Request({"tp": 2})
    plan = make_plan(trace(model, (torch.randn(6, 4),)), request, load_cluster("dgx-h100"), "factories")
    half = trace(model.bfloat16(), (torch.randn(6, 4, dtype=torch.bfloat16),))
    with pytest.raises(AutotpError, match="another model .* or another form of its inputs"):
        adopt(half, request, plan)
    state = dict(model.float().named_parameters())
    with pytest.raises(AutotpError, match=r"must be a tensor of torch.bfloat16"):
        run(half, state, (torch.randn(6, 4),))


def test_a_loop_over_experts_says_what_to_do() -> None:
    class LoopedExperts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            chosen, out = x.argmax(-1) % 2, torch.zeros_like(x)
            for number in chosen.unique().tolist():
                out = out + self.experts[number](x) * (chosen == number).unsqueeze(-1)
            return out

    with pytest.raises(AutotpError, match="compute every expert and weigh the results"):
        trace(LoopedExperts(), (torch.randn(3, 4),))
