"""Clean-up: which operators vanish, become others, or are made pure; every case is compared with eager."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autotp.cleanup import named_state
from autotp.program import Program
from autotp.trace import run, trace
from tests.test_trace import check_equal, ops


class Head(nn.Module):
    """A linear layer, then a function of its output."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.function = nn.Linear(8, 6), function

    def forward(self, x: Tensor, *others: Tensor) -> Any:
        return self.function(self.linear(x), *others)


def traced(function: Callable[..., Any], *others: Tensor, rows: int = 4, dtype: torch.dtype = torch.float64) -> Program:
    x = torch.randn(rows, 8, dtype=dtype)
    return check_equal(Head(function).to(dtype), (x, *others), tolerance=1e-10 if dtype == torch.float64 else 2e-2)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda y: y.contiguous().clone().to(torch.float64).to("cpu").view(4, 6), []),
        (lambda y: y[:, :].expand(-1, -1).reshape(4, 6).squeeze(0).type_as(y), []),
        (lambda y: F.dropout(F.dropout(y, 0.5, False), 0.0, True), []),
        (lambda y: y.t().contiguous().view(-1), ["t.default", "reshape.default"]),
        (lambda y: y.flatten().view_as(y), ["flatten.using_ints", "reshape.default"]),
        (lambda y: y[:1].expand_as(y), ["slice.Tensor", "expand.default"]),
        (lambda y: y.to("cpu", torch.float32), ["to.dtype"]),
        (lambda y: y.detach() + torch.ones_like(y).detach() + y, ["detach.default", "full.default"] + 2 * ["add"]),
        (lambda y: y.chunk(2, 1)[1], ["chunk.default"]),
        (lambda y: torch.cat(y.unbind(1)), ["unbind.int", "cat.default"]),
        (lambda y: y.view(y.shape[0] // 2, -1), ["reshape.default"]),
        (
            lambda y: y + torch.arange(y.shape[0], device=y.device)[:, None],
            ["arange.default", "unsqueeze.default", "add"],
        ),
    ],
)
def test_no_ops_vanish(function: Callable[..., Any], expected: list[str]) -> None:
    found = ops(traced(function))
    assert [name.removesuffix(".Tensor") if name == "add.Tensor" else name for name in found[1:]] == expected
    assert found[0] == "linear.default"


def test_sizes_become_expressions_and_defaults_go() -> None:
    x = torch.randn(4, 8)
    program = trace(Head(lambda y: torch.zeros(y.shape[0] * 2, 3, pin_memory=False) + y.sum()), (x,))
    (size,) = program.symbols
    zeros = next(node for node in program.nodes if node.op == "aten.zeros.default")
    assert zeros.args == ([2 * size, 3],)
    assert zeros.kwargs == {"device": torch.device("cpu")}
    assert (zeros.outputs[0].shape, zeros.outputs[0].hint) == ((2 * size, 3), (8, 3))
    assert program.ranges[size] == (2, None)


def test_equal_types_are_one_object() -> None:
    program = trace(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), (torch.randn(4, 8),))
    assert program.nodes[-1].outputs[0] is program.nodes[-2].outputs[0]


# Writes in place


def overwrite_rows(y: Tensor) -> Tensor:
    z = y * 1
    z[:, 0] = 1.0
    z[1:3] += y[:2]
    return z


@pytest.mark.parametrize(
    ("function", "absent", "present"),
    [
        (lambda y: y.mul(2).add_(1).relu_().mT, "mT_", ["add.Tensor", "relu.default"]),
        (lambda y: F.dropout(y * 1, 0.5, True, inplace=True), "bernoulli", ["dropout.default"]),
        (
            lambda y: y.masked_fill(y > 0, 0.0).masked_fill_(y < -1, 2.0).t(),
            "fill_",
            ["masked_fill.Scalar", "t.default"],
        ),
        (lambda y: torch.zeros(4, 6, dtype=y.dtype).index_add_(0, torch.tensor([3, 1, 1, 0]), y), "_.", []),
        (lambda y: torch.empty(4, 6).copy_(y) * 2, "copy", ["to.dtype", "mul.Tensor"]),
        (lambda y: torch.empty(3, 6, dtype=y.dtype).copy_(y[0]) + 1, "copy", ["expand.default"]),
        (lambda y: (y.float()).add_(y.sum()) * 1, "add_", ["add.Tensor", "to.dtype"]),
        (overwrite_rows, "copy", ["select_scatter.default", "slice_scatter.default"]),
    ],
)
def test_writes_become_pure(function: Callable[..., Any], absent: str, present: list[str]) -> None:
    found = ops(traced(function))
    assert set(present) <= set(found)
    assert not any(absent in name for name in found)


def test_values_before_and_after_a_write_are_told_apart() -> None:
    def function(y: Tensor) -> tuple[Tensor, ...]:
        z = y + 0
        before, kept = z * 2, z.clone()
        z.add_(1)
        return before, kept, z, z.view(-1)

    traced(function)


class Average(nn.Module):
    """A running mean, kept without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 6)
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        with torch.no_grad():
            self.mean.mul_(0.9).add_(y.mean(0), alpha=0.1)
        return y - self.mean


def test_buffers_written_without_gradient() -> None:
    program = check_equal(Average().double(), (torch.randn(4, 8).double(),))
    assert [name for name, _ in program.updates] == ["mean"]
    assert not any(name.endswith("_.Tensor") for name in ops(program))


def test_a_region_without_gradient_survives_functionalisation() -> None:
    def function(y: Tensor) -> Tensor:
        with torch.no_grad():
            factor = y.sigmoid() * 2
            with torch.enable_grad():
                other = y * 3
        z = y * factor + other
        z[0] = 0.0
        return z

    assert "select_scatter.default" in ops(traced(function))


def test_what_passes_through_a_region_unchanged_keeps_its_gradient() -> None:
    def function(y: Tensor) -> Tensor:
        with torch.no_grad():
            scale = y.to(torch.float64).sigmoid()  # nothing to convert: the same tensor, of which the trace makes another
        return y * y * scale

    assert "detach.default" in ops(traced(function))


@pytest.mark.parametrize("functionalised", [False, True])
def test_a_write_to_what_was_detached_keeps_the_gradient_of_what_is_written(functionalised: bool) -> None:
    def function(y: Tensor) -> Tensor:
        fixed = torch.ones(6, 6, dtype=y.dtype).index_select(0, torch.arange(4)).detach()
        fixed += y
        if functionalised:
            fixed[0] = 0.0
        return fixed * 2

    traced(function)


def test_written_inputs_are_noted() -> None:
    def function(y: Tensor, z: Tensor) -> Tensor:
        return y + z.mul_(2)

    program = traced(function, torch.randn(4, 6).double())
    assert "writes to its input" in program.notes[0]


# Mean losses

ROWS = torch.tensor([0, 1, -100, 5])


@pytest.mark.parametrize(
    ("loss", "target"),
    [
        (F.cross_entropy, ROWS),
        (lambda y, t: F.cross_entropy(y, t, label_smoothing=0.1), ROWS),
        (lambda y, t: F.cross_entropy(y, t, ignore_index=5), ROWS.clamp(min=0)),
        (lambda y, t: F.cross_entropy(y.view(2, 2, 6).transpose(1, 2), t.view(2, 2)), ROWS),
        (lambda y, t: F.cross_entropy(y[0], t[0]), ROWS),
        (lambda y, t: F.nll_loss(y.log_softmax(-1), t), ROWS),
        (F.cross_entropy, torch.randn(4, 6).double().softmax(-1)),
        (lambda y, t: F.cross_entropy(y[0], t[0]), torch.randn(4, 6).double().softmax(-1)),
        (lambda y, t: F.cross_entropy(y, t, label_smoothing=0.2), torch.randn(4, 6).double().softmax(-1)),
    ],
)
def test_mean_losses_are_sums_over_counts(loss: Callable[..., Tensor], target: Tensor) -> None:
    program = traced(loss, target)
    assert ops(program)[-1] == "div.Tensor"
    assert not [node for node in program.nodes if "loss" in node.op and node.op.startswith("aten.")]


def test_unreduced_losses_are_not_divided() -> None:
    assert "div.Tensor" not in ops(traced(lambda y, t: F.cross_entropy(y, t, reduction="none"), ROWS))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_mean_loss_in_16_bits_does_not_overflow(dtype: torch.dtype) -> None:
    rows = 40000
    model, x = Head(F.cross_entropy).to(dtype), torch.randn(rows, 8, dtype=dtype)
    program, target = trace(model, (x, torch.zeros(rows, dtype=torch.int64))), torch.randint(0, 6, (rows,))
    found = run(program, named_state(model)[1], (x, target))[0].detach()
    torch.testing.assert_close(found.float(), model.float()(x.float(), target).detach(), atol=2e-2, rtol=0)
    assert program.nodes[-1].outputs[0].dtype == dtype


def test_a_loss_without_rows_is_nan() -> None:
    model, x = Head(F.cross_entropy), torch.randn(4, 8)
    program = trace(model, (x, ROWS))
    assert run(program, named_state(model)[1], (x, torch.full((4,), -100)))[0].isnan()


def test_logits_and_labels_share_their_sizes() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 6)

        def forward(self, x: Tensor, labels: Tensor) -> Tensor:
            return F.cross_entropy(self.linear(x[..., None].expand(-1, -1, 8)).view(-1, 6), labels.view(-1))

    x, labels = torch.randn(2, 5).double(), torch.randint(0, 6, (2, 5))
    other = (torch.randn(3, 4).double(), torch.randint(0, 6, (3, 4)))
    program = check_equal(Model().double(), (x, labels), others=[(other, {})])
    assert program.by_name["x"].outputs[0].shape == program.by_name["labels"].outputs[0].shape
    assert len(program.symbols) == 2
