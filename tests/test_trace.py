"""Tracing: the program equals the eager model, forward and backward, also at other sizes; failures are one sentence."""

from __future__ import annotations

import copy
import dataclasses
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree as pytree

from autotp.cleanup import named_state
from autotp.errors import AutotpError
from autotp.program import Program, Ref
from autotp.trace import run, trace

VOCAB = 61


def fresh(tree: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda leaf: leaf.detach().clone().requires_grad_(leaf.requires_grad), tree)


def check_types(program: Program, state: dict[str, Tensor], args: Any, kwargs: Any, at_hint: bool) -> None:
    """Every operator gives the rank, dtype and differentiability that its type says; at the traced sizes, its shape."""
    refs = [Ref(node.index, i) for node in program.nodes if node.kind == "op" for i in range(len(node.outputs))]
    spec = pytree.tree_structure([0] * len(refs))
    everything = dataclasses.replace(program, outputs=tuple(refs), out_spec=spec, updates=())
    for ref, value in zip(refs, run(everything, state, args, kwargs)[0], strict=True):
        node, type_ = program.nodes[ref.node], program.type_of(ref)
        assert (value.dtype, value.ndim) == (type_.dtype, len(type_.shape)), node
        assert value.requires_grad == type_.requires_grad, node
        assert not at_hint or tuple(value.shape) == type_.hint, node


def check_equal(
    model: nn.Module, args: tuple[Any, ...] = (), kwargs: Any = None, others: Any = (), tolerance: float = 1e-10
) -> Program:
    """Trace with the first inputs; compare outputs, all gradients and buffer updates with eager, for all inputs."""
    kwargs = kwargs or {}
    program = trace(model, args, kwargs)
    for number, (a, k) in enumerate([(args, kwargs), *others]):
        eager, traced = copy.deepcopy(model), copy.deepcopy(model)
        if getattr(getattr(model, "config", None), "use_cache", False):
            eager.config.use_cache = False
        state = named_state(traced)[1]
        check_types(program, state, *fresh((a, k)), at_hint=number == 0)
        a1, k1 = fresh((a, k))
        a2, k2 = fresh((a, k))
        torch.manual_seed(0)
        expected = eager(*a1, **k1)
        torch.manual_seed(0)
        found, updates = run(program, state, a2, k2)
        assert type(found) is type(expected)
        pairs = list(zip(pytree.tree_leaves(expected), pytree.tree_leaves(found), strict=True))
        totals: list[Any] = [0.0, 0.0]
        for want, got in pairs:
            if not isinstance(want, Tensor):
                assert want == got
                continue
            assert want.requires_grad == got.requires_grad
            torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)
            if want.requires_grad:
                totals = [totals[0] + (want**2).sum(), totals[1] + (got**2).sum()]
        for total in totals:
            total.backward()
        theirs = [*eager.parameters(), *pytree.tree_leaves((a1, k1))]
        ours = [*traced.parameters(), *pytree.tree_leaves((a2, k2))]
        for want, got in zip(theirs, ours, strict=True):
            if isinstance(want, Tensor):
                assert (want.grad is None) == (got.grad is None)
                if want.grad is not None:
                    torch.testing.assert_close(got.grad, want.grad, atol=tolerance, rtol=tolerance)
        for name, buffer in eager.named_buffers():
            torch.testing.assert_close(updates.get(name, state.get(name, buffer)), buffer)
    return program


def ops(program: Program) -> list[str]:
    return [node.op.removeprefix("aten.") for node in program.nodes if node.kind == "op"]


SMALL = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "max_position_embeddings": 64,
}  # fmt: skip
GROUPED = {**SMALL, "num_key_value_heads": 2}
GPT2 = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
PLAIN_BERT = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
OPT = {
    "vocab_size": VOCAB, "hidden_size": 32, "ffn_dim": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "word_embed_proj_dim": 32, "dropout": 0.0, "attention_dropout": 0.0,
}  # fmt: skip
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT2LMHeadModel": ("GPT2Config", {**GPT2, **NO_DROPOUT}),
    "LlamaForCausalLM": ("LlamaConfig", GROUPED),
    "MistralForCausalLM": ("MistralConfig", {**GROUPED, "sliding_window": 8, "head_dim": 8}),
    "Qwen2ForCausalLM": ("Qwen2Config", GROUPED),
    "Qwen3ForCausalLM": ("Qwen3Config", {**GROUPED, "head_dim": 8}),
    "Gemma2ForCausalLM": (
        "Gemma2Config",
        {**GROUPED, "head_dim": 8, "sliding_window": 8, "query_pre_attn_scalar": 8},
    ),
    "OPTForCausalLM": ("OPTConfig", OPT),
    "BertForMaskedLM": ("BertConfig", {**SMALL, **PLAIN_BERT}),
    "BertModel": ("BertConfig", {**SMALL, **PLAIN_BERT}),
    "MixtralForCausalLM": ("MixtralConfig", {**GROUPED, "num_local_experts": 4, "num_experts_per_tok": 2}),
}


def build(name: str, transformers: Any) -> nn.Module:
    config, options = MODELS[name]
    torch.manual_seed(0)
    return getattr(transformers, name)(getattr(transformers, config)(**options))


@pytest.mark.parametrize("train", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", list(MODELS))
def test_transformers_models_equal_eager_at_other_sizes(name: str, train: bool) -> None:
    transformers = pytest.importorskip("transformers")
    model = build(name, transformers).train(train)
    single = name.startswith("Mixtral")  # its grouped matrix product has no float64
    model = model if single else model.double()
    inputs = []
    for shape in [(2, 12), (3, 9)]:
        ids = torch.randint(3, VOCAB, shape)
        labels = ids.clone()
        labels[0, :2] = -100
        inputs.append({"input_ids": ids} | ({} if name == "BertModel" else {"labels": labels}))
    # transformers computes the loss of a causal model in float32, whatever the model's dtype
    in_float32 = single or name.endswith("ForCausalLM") or name == "GPT2LMHeadModel"
    program = check_equal(model, (), inputs[0], [((), inputs[1])], tolerance=1e-5 if in_float32 else 1e-10)
    assert len(program.symbols) == 2
    assert getattr(model.config, "use_cache", True) is True


def test_llama_is_clean_and_causal() -> None:
    transformers = pytest.importorskip("transformers")
    from transformers import masking_utils

    before = masking_utils.is_torchdynamo_exporting, masking_utils.find_packed_sequence_indices
    ids = torch.randint(0, VOCAB, (2, 12))
    program = trace(build("LlamaForCausalLM", transformers), (), {"input_ids": ids, "labels": ids})
    assert (masking_utils.is_torchdynamo_exporting, masking_utils.find_packed_sequence_indices) == before
    attention = [node for node in program.nodes if node.op == "aten.scaled_dot_product_attention.default"]
    assert [node.args[3:] for node in attention] == [(None, 0.0, True)] * 2
    assert attention[1].path == "model.layers.1.self_attn"
    assert "modeling_llama.py:" in attention[1].source
    assert not {"view.default", "alias.default", "contiguous.default", "detach.default"} & set(ops(program))
    assert program.in_names == ("input_ids", "labels")
    assert len(program.notes) == 2
    assert program.outputs[0] == Ref(len(program.nodes) - 1)


def test_helpers_survive_a_transformers_without_the_patched_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers.masking_utils", type(sys)("transformers.masking_utils"))
    assert trace(nn.Linear(4, 4), (torch.randn(2, 4),)).notes == ()


@pytest.mark.parametrize("name", ["GPT2LMHeadModel", "Gemma2ForCausalLM"])
def test_fake_and_meta_models_trace_like_real_ones(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    ids = torch.randint(0, VOCAB, (2, 12))
    real = build(name, transformers)
    with FakeTensorMode(allow_non_fake_inputs=True):
        fake, fake_ids = build(name, transformers), torch.zeros(2, 12, dtype=torch.int64)
    with torch.device("meta"):
        meta = build(name, transformers)
    expected = trace(real, (), {"input_ids": ids, "labels": ids})
    for model, example in [(fake, ids), (fake, fake_ids), (meta, ids), (meta, ids.to("meta")), (real, fake_ids)]:
        program = trace(model, (), {"input_ids": example, "labels": example})
        assert program.nodes == expected.nodes
        assert program.aliases == expected.aliases
    assert all(parameter.is_meta for parameter in meta.parameters())


def test_dummy_inputs_serve_when_there_are_none() -> None:
    transformers = pytest.importorskip("transformers")
    program = trace(build("BertModel", transformers))
    assert "dummy_inputs" in program.notes[0]


class ConvNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.Linear(8, 5)

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        hidden = self.norm(self.conv(images)).relu().mean((2, 3))
        return {"logits": self.head(hidden), "hidden": hidden}


@pytest.mark.parametrize("train", [True, False])
def test_batch_norm_updates_its_buffers(train: bool) -> None:
    images, others = torch.randn(2, 3, 8, 8).double(), torch.randn(4, 3, 8, 8).double()
    program = check_equal(ConvNet().double().train(train), (images,), others=[((others,), {})])
    names = {name for name, _ in program.updates}
    assert names == ({"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"} if train else set())
    assert not any(program.type_of(ref).requires_grad for _, ref in program.updates)
    assert any("of images" in note for note in program.notes)
    with pytest.raises(AutotpError, match="must have"):
        run(program, named_state(ConvNet().double())[1], (torch.randn(2, 3, 6, 10).double(),), {})
    assert program.persistent == {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked"}


class Mixed(nn.Module):
    """Nested inputs and outputs, constants, an unused and a tied parameter, a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.unused, self.first, self.second = nn.Linear(2, 2), nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.first.bias.requires_grad_(False)
        self.scale = torch.arange(8.0).double()
        self.register_buffer("shift", torch.ones(8), persistent=False)

    def forward(self, x: Tensor, *more: Tensor, factor: float = 2.0, extra: Any = None) -> dict[str, Any]:
        y = self.second(self.first(x).relu()) * factor + self.scale + self.shift + torch.tensor(2.0)
        return {"y": y, "parts": [y + extra["a"], more[0]], "n": 3, "none": None}


def test_structure_constants_ties_and_frozen_parameters() -> None:
    def inputs(rows: int) -> tuple[Any, Any]:
        x = torch.randn(rows, 8).double().requires_grad_()
        return (x, torch.randn(2).double()), {"extra": {"a": torch.randn(8).double()}, "factor": 0.5}

    (args, kwargs), other = inputs(3), inputs(5)
    program = check_equal(Mixed().double(), args, kwargs, [other])
    assert set(program.in_names) == {"x", "args.1", "extra.a", "factor"}
    assert program.in_constants == {program.in_names.index("factor"): 0.5}
    assert program.aliases == {"second.weight": "first.weight"}
    parameters = [node.target for node in program.nodes if node.kind == "parameter"]
    assert parameters == ["first.weight", "first.bias", "second.bias", "unused.weight", "unused.bias"]
    assert program.persistent == frozenset()
    kinds = [node.kind for node in program.nodes]
    assert kinds == sorted(kinds, key=["parameter", "buffer", "constant", "input", "op"].index)
    assert not program.by_name["p_first_bias"].outputs[0].requires_grad
    assert program.by_name["x"].outputs[0].requires_grad
    state = named_state(Mixed().double())[1]
    with pytest.raises(AutotpError, match=r"`factor` was 0.5 in the trace"):
        run(program, state, args, kwargs | {"factor": 1.0})
    with pytest.raises(AutotpError, match="traced with 2 positional arguments"):
        run(program, state, args[:1], kwargs)
    with pytest.raises(AutotpError, match="`x` must be a tensor of torch.float64"):
        run(program, state, (args[0].float(), args[1]), kwargs)
    with pytest.raises(AutotpError, match="has shape"):
        run(program, state, (torch.randn(3, 9).double(), args[1]), kwargs)
    with pytest.raises(AutotpError, match="`first.weight` has no value"):
        run(program, {}, args, kwargs)


def test_repeated_inputs_stay_two_inputs_and_keep_no_marks() -> None:
    class Add(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a - b

    x = torch.randn(3, 4)
    program = trace(Add(), (x, x))
    assert run(program, {}, (x, 2 * x))[0].equal(-x)
    assert not [name for name in vars(x) if "dynamic" in name]


def test_static_and_dynamic_sizes() -> None:
    model, x = nn.Linear(4, 4), torch.randn(3, 4)
    assert trace(model, (x,)).by_name["input"].outputs[0].hint == (3, 4)
    assert len(trace(model, (x,)).symbols) == 1
    program = trace(model, (x,), dynamic=False)
    assert (program.symbols, program.by_name["input"].outputs[0].shape) == ({}, (3, 4))
    with pytest.raises(AutotpError, match="trace again for other sizes"):
        run(program, named_state(model)[1], (torch.randn(5, 4),))


def test_falls_back_to_static_sizes_with_a_note() -> None:
    class Table(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if isinstance(x.shape[0], torch.SymInt):
                raise ValueError("sizes must be numbers")
            return x * 2

    program = trace(Table(), (torch.randn(3, 4),))
    assert not program.symbols
    assert "Sizes are fixed" in program.notes[0]
    assert "sizes must be numbers" in program.notes[0]


class Inner(nn.Module):
    def __init__(self, what: str) -> None:
        super().__init__()
        self.linear, self.what = nn.Linear(4, 4), what

    def forward(self, x: Tensor) -> Any:
        y = self.linear(x)
        match self.what:
            case "branch":
                return y if y.sum() > 0 else -y
            case "index":
                return y[y > 0]
            case "item":
                return y * y.sum().item()
            case "autocast":
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    return self.linear(y)
            case "cond":
                return torch.cond(y.sum() > 0, lambda z: z + 1, lambda z: z - 1, (y,))
            case "parameter":
                with torch.no_grad():
                    self.linear.weight.mul_(0.5)
        return y


@pytest.mark.parametrize(
    ("what", "says"),
    [
        ("branch", "needs the value of a tensor"),
        ("index", "depends on the values of a tensor"),
        ("item", "the value"),
        ("autocast", "autocast is switched on in module `0"),
        ("cond", "`cond` in module `0`"),
        ("parameter", "overwrites `0.linear.weight`"),
    ],
)
def test_untraceable_models_say_what_and_where(what: str, says: str, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(AutotpError) as caught:
        trace(nn.Sequential(Inner(what)), (torch.randn(3, 4),))
    message = str(caught.value)
    assert says in message
    assert "\n" not in message
    assert what == "parameter" or "test_trace.py:" in message
    assert caught.value.__cause__ is None
    assert capfd.readouterr().err == ""


def test_wrong_examples_say_how_to_give_them() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    for args, kwargs in [((), None), ((), {"y": torch.randn(2, 4)})]:
        with pytest.raises(AutotpError, match=r"Sequential.forward\(input\) cannot be called .* pass args="):
            trace(model, args, kwargs)
    with pytest.raises(AutotpError, match="args must be a tuple"):
        trace(model, torch.randn(2, 4))  # type: ignore[arg-type]
    with pytest.raises(AutotpError, match=r"module `0` raised RuntimeError \(.*2, 5.*check that the example"):
        trace(model, (torch.randn(2, 5),))


def test_the_callers_modes_do_not_matter() -> None:
    class Stopped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                factor = self.linear(x)
            return self.linear(x) * factor

    x = torch.randn(3, 4)
    expected = trace(Stopped(), (x,))
    assert ops(expected).count("detach.default") == 2
    with torch.no_grad():
        assert trace(Stopped(), (x,)).nodes == expected.nodes
