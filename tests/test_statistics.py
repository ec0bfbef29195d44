"""Convolutional models with statistics over the batch: traced, planned at random and simulated, against one device."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import autotp
from autotp.equality import compare
from autotp.interpret import run
from autotp.mesh import output_names
from autotp.planning import Request, adopt, make_plan, prepare, traced_sizes
from autotp.price.cluster import load_cluster
from autotp.price.conversion import ConversionPrices
from autotp.program import Program
from autotp.random_plans import random_plan
from autotp.rules import call_of, rule_of
from autotp.trace import trace
from tests.models import InFloat64, splitting_pays
from tests.ranks import run_ranks

MESHES = ((2,), (3,), (2, 2))
TOLERANCE = 1e-10
"""For float64 throughout."""


class ConvNet(nn.Module):
    """Two convolutions, one of them grouped, each with a batch norm."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6, **options)
        self.second, self.other = nn.Conv2d(6, 6, 3, 2, 1, groups=3), nn.BatchNorm2d(6, **options)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.max_pool2d(self.norm(self.first(x)).relu(), 2)
        return self.head(self.other(self.second(x)).mean((2, 3)))


class WritesThroughView(nn.Module):
    """What makes PyTorch functionalise the whole graph."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        x = x * 2
        x[0].add_(1)
        result: Tensor = self.inner(x)
        return result


class Shared(nn.Module):
    """A norm that is called twice, and running statistics of instances."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(4, 4, 3, padding=1), nn.BatchNorm1d(4)
        self.instance = nn.InstanceNorm1d(4, affine=True, track_running_stats=True)

    def forward(self, x: Tensor) -> Tensor:
        before = self.norm.running_mean.clone()
        x = self.instance(self.conv(self.norm(self.conv(self.norm(x)))))
        result: Tensor = x + before.unsqueeze(-1)
        return result


class UNet(nn.Module):
    """Down and up again, with skips, by every kind of norm."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.GroupNorm(3, 6), nn.SiLU())
        self.deep = nn.Sequential(nn.Conv2d(6, 10, 3, 2, 1), nn.InstanceNorm2d(10, affine=True), nn.ReLU())
        self.up = nn.ConvTranspose2d(10, 6, 2, 2)
        self.join = nn.Sequential(nn.Conv2d(12, 6, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(6), nn.Hardswish())
        self.out = nn.Conv2d(9, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = self.down(x)
        found = self.join(torch.cat([self.up(self.deep(skip)), skip], 1))
        coarse = functional.interpolate(functional.avg_pool2d(x, 2), scale_factor=2, mode="bilinear")
        result: Tensor = self.out(torch.cat([found, coarse], 1))
        return result


class Waves(nn.Module):
    """Strided convolutions of a waveform, then one with a weight norm and groups."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv1d(1, 6, 6, 3, bias=False), nn.GroupNorm(6, 6)
        self.patches = nn.Conv1d(6, 8, 2, 2)
        self.positions = nn.utils.parametrizations.weight_norm(nn.Conv1d(8, 8, 4, padding=2, groups=2), dim=2)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.gelu(self.patches(functional.gelu(self.norm(self.first(x)))))
        return x + self.positions(x)[..., :-1]


IMAGE, ROWS, WAVE = (5, 3, 8, 8), (5, 4, 7), (3, 1, 39)
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "batch norm": (ConvNet, IMAGE),
    "batch norm in evaluation": (lambda: ConvNet().eval(), IMAGE),
    "without affine": (lambda: ConvNet(affine=False, momentum=0.3, eps=0.01), IMAGE),
    "without running statistics": (lambda: ConvNet(track_running_stats=False), IMAGE),
    "functionalised": (lambda: WritesThroughView(ConvNet()), IMAGE),
    "functionalised, in evaluation": (lambda: WritesThroughView(ConvNet()).eval(), IMAGE),
    "functionalised, without running statistics": (lambda: WritesThroughView(ConvNet(track_running_stats=False)), IMAGE),
    "shared": (Shared, ROWS),
    "shared, in evaluation": (lambda: Shared().eval(), ROWS),
    "shared, functionalised": (lambda: WritesThroughView(Shared()), ROWS),
    "U-Net": (UNet, IMAGE),
    "waves": (Waves, WAVE),
}


@cache
def traced(name: str) -> tuple[nn.Module, Tensor, Program]:
    torch.manual_seed(0)
    build, shape = CASES[name]
    model, x = build().double(), torch.randn(shape, dtype=torch.float64)
    return model, x, trace(model, (x,))


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@pytest.mark.parametrize("name", CASES)
def test_trace_equals_eager(name: str) -> None:
    """Outputs, gradients and buffers, at the traced sizes and with another batch; and no operator is without a rule."""
    model, x, program = traced(name)
    assert not [node.op for node in program.nodes if node.kind == "op" and rule_of(call_of(node, program.type_of)) is None]
    for batch in (x, torch.randn(7, *x.shape[1:], dtype=torch.float64)):
        eager = copy.deepcopy(model)
        state = {key: tensor.detach().clone().requires_grad_(tensor.requires_grad) for key, tensor in state_of(model).items()}
        wanted, (found, updates) = eager(batch), run(program, state, (batch,))
        torch.testing.assert_close(found, wanted, rtol=0, atol=TOLERANCE)
        seed = torch.randn_like(wanted)
        torch.autograd.backward([wanted, found], [seed, seed])
        for key, parameter in eager.named_parameters():
            torch.testing.assert_close(state[key].grad, parameter.grad, rtol=TOLERANCE, atol=TOLERANCE, msg=key)
        for key, buffer in eager.named_buffers():
            torch.testing.assert_close(updates.get(key, state[key]), buffer, rtol=0, atol=TOLERANCE, msg=key)
            assert torch.equal(buffer, state[key]) == (key not in updates), key


def test_plain_norms_need_no_functionalisation() -> None:
    """PyTorch's own takes as long as the export."""
    _, _, program = traced("shared")
    assert {name for name, _ in program.updates} >= {"norm.running_mean", "instance.running_var", "norm.num_batches_tracked"}
    assert not any("native" in node.op for node in program.nodes)


def fuzz(name: str, model: nn.Module, x: Tensor, program: Program, mesh: tuple[int, ...], seeds: range) -> None:
    space, border = prepare(program, Request({f"axis{number}": size for number, size in enumerate(mesh)}))
    prices = ConversionPrices(load_cluster("dgx-h100"), mesh, True, traced_sizes(program))
    for seed in seeds:
        found = compare(space, random_plan(space, border, prices, seed), state_of(model), (x,), {}, seed=seed)
        assert found.worst < TOLERANCE, f"{name} on {mesh}, seed {seed}: {found.worst} at {found.where}"


@pytest.mark.parametrize("mesh", MESHES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_random_plans_equal_one_device(name: str, mesh: tuple[int, ...]) -> None:
    fuzz(name, *traced(name), mesh, range(3))


@pytest.mark.parametrize("name", ["batch norm", "shared", "U-Net", "waves"])
def test_plans_are_checked_and_split(name: str) -> None:
    """The plan for devices on which splitting pays passes the check, splits the large operators, and is equal to one device."""
    model, x, program = traced(name)
    request = Request({"axis": 3})
    plan = make_plan(program, request, splitting_pays(), name)
    space, decisions = adopt(program, request, plan)
    convolutions = [node for node in program.nodes if node.kind == "op" and "conv" in node.op]
    assert convolutions
    assert all("S" in decisions.chosen[space.folding.representative[node.index]].operands[0].kinds for node in convolutions[1:])
    assert compare(space, decisions, state_of(model), (x,), {}).worst < TOLERANCE


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [*MESHES, (4,), (2, 3)], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_many_random_plans_equal_one_device(name: str, mesh: tuple[int, ...]) -> None:
    fuzz(name, *traced(name), mesh, range(100, 125))


@pytest.mark.parametrize("dim", [0, 1])
def test_planned_by_batch_and_by_channels(dim: int) -> None:
    """A large batch or channels that are passed split, and wanted so, stay split through the statistics."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.BatchNorm2d(64), nn.ReLU()).double(), torch.randn(4, 64, 32, 32, dtype=torch.float64)
    program = trace(model, (torch.empty(256, 64, 32, 32, dtype=torch.float64),))
    border = [{name: {"axis": dim} for name in names} for names in (program.in_names, output_names(program))]
    request = Request({"axis": 2}, inputs=border[0], outputs=border[1])
    space, decisions = adopt(program, request, make_plan(program, request, load_cluster("dgx-h100"), "norm"))
    split = [decisions.chosen[node.index].operands[0].splits for node in program.nodes if "statistics" in node.op]
    assert [[found.dim for found in splits] for splits in split] == [[dim], [dim]]
    assert compare(space, decisions, state_of(model), (x,), {}).worst < TOLERANCE


def train_on_ranks(names: tuple[str, ...]) -> None:
    """Two steps beside one device: outputs, running statistics and parameters stay equal."""
    for name in names:
        model, x, _ = traced(name)
        many = autotp.parallelize(model, (x,), cluster=splitting_pays())
        optimizers = [torch.optim.SGD(either.parameters(), lr=0.1) for either in (model, many)]
        for _ in range(2):
            found, wanted = many(x), model(x)
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9, msg=name)
            for output, optimizer in zip((wanted, found), optimizers, strict=True):
                output.square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
        after = many.full_state_dict()
        for key, value in model.state_dict().items():
            torch.testing.assert_close(after[key], value, rtol=0, atol=1e-9, msg=f"{name}: {key}")


def test_trains_on_ranks_like_one_device() -> None:
    run_ranks(train_on_ranks, 2, ("batch norm", "shared", "U-Net", "waves"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("parameters", ["same", "float32"])
def test_low_precision_is_as_precise_as_torch(dtype: torch.dtype, parameters: str) -> None:
    torch.manual_seed(0)
    model = nn.BatchNorm2d(6).to(dtype if parameters == "same" else torch.float32)
    x = (torch.randn(4, 6, 5, 5) * 3 + 10).to(dtype).requires_grad_()
    program = trace(model, (x,))
    state = {key: tensor.detach().clone().requires_grad_(tensor.requires_grad) for key, tensor in state_of(model).items()}
    found, updates = run(program, state, (x,))
    wanted, exact = model(x), copy.deepcopy(model).double()(x.double())
    assert found.dtype == wanted.dtype
    unit = float(torch.finfo(dtype).eps)
    assert float((found - exact).abs().max()) < 8 * unit
    mine, theirs = (torch.autograd.grad(output, x, x.detach())[0] for output in (found, wanted))
    torch.testing.assert_close(mine, theirs, rtol=8 * unit, atol=64 * unit)
    for key in ("running_mean", "running_var"):
        torch.testing.assert_close(updates[key], getattr(model, key), rtol=4 * unit, atol=unit)
        assert updates[key].dtype == getattr(model, key).dtype


def transformers_model(name: str) -> tuple[nn.Module, Tensor]:
    """A tiny model of `transformers`, and its input."""
    transformers = pytest.importorskip("transformers")
    images: dict[str, Any] = {"hidden_sizes": [6, 10], "depths": [1, 2], "num_labels": 5}
    if name == "ResNet":
        config = transformers.ResNetConfig(embedding_size=6, layer_type="basic", **images)
    elif name == "ConvNext":
        config = transformers.ConvNextConfig(num_stages=2, drop_path_rate=0.0, **images)
    elif name == "MobileNetV2":
        config = transformers.MobileNetV2Config(depth_multiplier=0.25, min_depth=4, num_labels=5, classifier_dropout_prob=0.0)
    else:
        dropouts = ("hidden_dropout", "attention_dropout", "activation_dropout", "feat_proj_dropout", "layerdrop", "final_dropout")
        config = transformers.Wav2Vec2Config(
            hidden_size=12, num_hidden_layers=1, num_attention_heads=3, intermediate_size=20, conv_dim=[8, 8], conv_stride=[5, 2],
            conv_kernel=[10, 3], num_conv_pos_embeddings=6, num_conv_pos_embedding_groups=2, apply_spec_augment=False,
            **dict.fromkeys(dropouts, 0.0),
        )  # fmt: skip
        return transformers.Wav2Vec2Model(config), torch.randn(3, 300)
    return getattr(transformers, f"{name}ForImageClassification")(config), torch.randn(3, 3, 32, 32)


SLOW = pytest.param("MobileNetV2", marks=pytest.mark.slow)


@pytest.mark.parametrize("name", ["ResNet", "ConvNext", "Wav2Vec2", SLOW])
def test_architectures(name: str) -> None:
    """The operators of real models all have rules, and random plans of them are equal to one device."""
    torch.manual_seed(0)
    with InFloat64():
        model, x = transformers_model(name)
        model, x = model.double().train(), x.double()
        program = trace(model, (x,))
        assert not [node.op for node in program.nodes if node.kind == "op" and rule_of(call_of(node, program.type_of)) is None]
        for mesh in ((2,), (3,)):
            fuzz(name, model, x, program, mesh, range(2))
