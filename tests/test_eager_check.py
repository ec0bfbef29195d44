"""Silent differences between a model and its trace are found, each kind of them; equal models pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autotp.eager_check import check_eager, confirm
from autotp.errors import AutotpError
from autotp.trace import trace

CALLS: list[int] = []
SCALE = torch.ones(4)


class TimesSeven(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, layer: nn.Module, x: Tensor) -> Tensor:
        return layer(x)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return None, grads[0] * 7


class Model(nn.Module):
    """One way after another in which a trace freezes what changes."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.layer, self.norm, self.what, self.calls = nn.Linear(4, 4), nn.BatchNorm1d(4), what, 0
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Any:
        y = self.norm(self.layer(x)).relu()
        match self.what:
            case "counter":
                self.calls += 1
                return y * self.calls
            case "global list":
                CALLS.append(1)
                return y * len(CALLS)
            case "global tensor":
                global SCALE
                SCALE = SCALE * 2 if not isinstance(x, torch._subclasses.FakeTensor) else SCALE
                return y * SCALE
            case "export branch":
                return y * (2 if isinstance(x, torch._subclasses.FakeTensor) else 3)
            case "value branch":
                return y * 2 if isinstance(x, torch._subclasses.FakeTensor) or x[0, 0] > 0 else y * 3
            case "lost backward":
                return TimesSeven.apply(self.layer, y)
            case "eval branch":
                return y if self.training else y * (2 if isinstance(x, torch._subclasses.FakeTensor) else 3)
            case "python output":
                return y, float(self.training)
            case "buffer":
                self.seen.add_(1)
                return y * self.seen
            case "dropout":
                return nn.functional.dropout(y, 0.5, self.training)
        return {"y": y}


def inputs(rows: int = 6) -> tuple[Tensor]:
    torch.manual_seed(1)
    x = torch.randn(rows, 4, dtype=torch.float64)
    x[0, 0] = 1.0
    return (x.requires_grad_(),)


FROZEN = {
    "counter": "called again", "global list": "", "global tensor": "output 0", "export branch": "",
    "value branch": "other values", "lost backward": "gradient of", "eval branch": "",
}  # fmt: skip


@pytest.mark.parametrize("what", list(FROZEN))
def test_frozen_values_are_found(what: str) -> None:
    torch.manual_seed(0)
    model = Model(what).double().train(what != "eval branch")
    program = trace(model, inputs())
    found = check_eager(model, program, inputs())
    assert found.error is not None and found.error > 1e-3
    assert FROZEN[what] in found.where
    with pytest.raises(AutotpError, match="the trace of Model computes something else than the model: .* check=False") as caught:
        confirm(model, program, inputs(), {})
    assert "\n" not in str(caught.value)
    confirm(model, program, inputs(), {}, check=False)


class Average(nn.Module):
    """A buffer that the forward replaces, and a module under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = self.first
        self.register_buffer("mean", torch.zeros(4))

    def forward(self, x: Tensor) -> Tensor:
        y = self.second(self.first(x))
        old = self.mean
        self.mean = 0.9 * self.mean + 0.1 * y.detach().mean(0)
        return y - self.mean + old


def test_assigned_buffers_and_shared_modules() -> None:
    torch.manual_seed(0)
    model = Average().double()
    held = dict(model.named_parameters())
    program = trace(model, inputs())
    assert [name for name, _ in program.updates] == ["mean"]
    found = check_eager(model, program, inputs())
    assert found.error is not None and found.error < 1e-12
    assert dict(model.named_parameters()).keys() == held.keys()
    assert all(parameter is held[name] for name, parameter in model.named_parameters())
    assert model.second.weight is model.first.weight and not model.mean.any()


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("what", ["plain", "python output", "buffer", "dropout"])
def test_equal_models_pass_and_stay_as_they_were(what: str, train: bool) -> None:
    torch.manual_seed(0)
    model = Model(what).double().train(train)
    program = trace(model, inputs())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    others = [inputs(), inputs(9), inputs(20)]
    state = torch.get_rng_state()
    for found in (check_eager(model, program, given) for given in others[:2]):
        assert found.error is not None and found.error < 1e-12
    confirm(model, program, others[2], {})
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_nan_and_infinity_are_equal_to_themselves() -> None:
    class Edges(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return (x - x).log() * 0, x / 0

    program = trace(Edges(), (torch.ones(3, 4),))
    assert check_eager(Edges(), program, (torch.ones(3, 4),)).error == 0.0


def test_small_gradients_count() -> None:
    class Small(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, layer: nn.Module, x: Tensor) -> Tensor:
            return layer(x) * 1e-6

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return None, grads[0] * 1.02e-6

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.act = nn.Linear(4, 4), nn.Identity()
            self.act.register_buffer("one", torch.ones(()))
            self.act.forward = lambda x: x * self.act.one  # type: ignore[method-assign]

        def forward(self, x: Tensor) -> Tensor:
            return Small.apply(self.act, self.first(x))

    model = Net()
    found = check_eager(model, trace(model, (torch.randn(3, 4),)), (torch.randn(3, 4),))
    assert found.error is not None and found.error > 0.01


def test_what_is_too_large_or_not_real_is_not_compared() -> None:
    with torch.device("meta"):
        model = Model("export branch")
    program = trace(model, (torch.randn(6, 4),))
    confirm(model, program, (torch.randn(6, 4),), {})
    confirm(model, program, (torch.randn(6, 4),), {}, check=True)
