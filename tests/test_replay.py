"""An initialiser replayed tensor by tensor draws what it draws when it runs as it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autotp import replay
from autotp.initial import built
from autotp.replay import record
from tests.models import CONFIGS


class Various(nn.Module):
    """Initialised several times over, in part, by views, from other tensors; tied, transposed, and sliced parameters; buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.table, self.recurrent = nn.Linear(7, 9), nn.Embedding(11, 5, padding_idx=2), nn.LSTM(5, 6, 2)
        self.norm, self.filter = nn.BatchNorm2d(4), nn.Conv2d(3, 4, 3)
        nn.init.orthogonal_(self.first.weight)
        nn.init.normal_(self.filter.weight)
        self.register_buffer("given", torch.tensor([1.0, 2.0, 3.0]))
        self.register_buffer("waves", torch.arange(4.0).sin(), persistent=False)
        with torch.no_grad():
            self.first.bias[2:4] = self.filter.weight.mean()
            self.recurrent.bias_ih_l0[:3] *= 2
            self.given[1:] += torch.rand(2)
        self.turned = nn.Parameter(torch.randn(3, 5).t())
        self.sliced = nn.Parameter(torch.rand(6)[1:4])
        self.turned.data = self.turned.data * 2
        self.tied = nn.Linear(5, 11)
        self.tied.weight = self.table.weight


def decoder(name: str) -> Callable[[], nn.Module]:
    import transformers

    kind = transformers.AutoModelForMaskedLM if name == "bert" else transformers.AutoModelForCausalLM
    return lambda: kind.from_config(CONFIGS[name]())


BUILDS: dict[str, Callable[[], nn.Module]] = {
    "various": Various,
    "copied layers": lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 3),
    **{name: lambda name=name: decoder(name)() for name in ("gpt2", "qwen3", "gemma2", "bert")},
}


@pytest.mark.parametrize("name", BUILDS)
def test_the_same_values(name: str) -> None:
    wanted = built(BUILDS[name], seed=3, deferred=False)
    recording = record(BUILDS[name])
    assert recording is not None
    state = torch.get_rng_state()
    found = recording.replay(3, lambda _, whole: whole.clone())
    assert torch.equal(torch.get_rng_state(), state)
    tensors = {**dict(wanted.named_parameters()), **dict(wanted.named_buffers())}
    assert found.keys() == tensors.keys()
    for key, value in tensors.items():
        assert torch.equal(found[key], value), key
        assert found[key].dtype == value.dtype
    other = recording.replay(4, lambda _, whole: whole.clone())
    assert any(not torch.equal(other[key], found[key]) for key in found)


class Asks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)
        if self.layer.weight.sum() > 0:
            nn.init.zeros_(self.layer.bias)


class Keeps(nn.Module):
    """A tensor that is neither a parameter nor a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.scales = nn.Linear(3, 3), [torch.rand(3)]


def test_what_cannot_be_replayed() -> None:
    assert record(Asks) is None
    assert record(Keeps) is None
    assert record(lambda: 3) is None


def test_one_tensor_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is initialised twice; what lives at once is one of them."""

    def build() -> nn.Module:
        model = nn.Sequential(*(nn.Linear(16, 16, bias=False) for _ in range(10)))
        for layer in model:
            nn.init.normal_(layer.weight)  # type: ignore[arg-type]
        return model

    recording = record(build)
    assert recording is not None
    held: list[int] = []
    view = replay._Memory.view

    def counted(memory: Any, place: Any) -> Tensor:
        found: Tensor = view(memory, place)
        held.append(sum(storage.nbytes() for storage in memory.held.values()))
        return found

    monkeypatch.setattr("autotp.replay._Memory.view", counted)
    recording.replay(0, lambda _, whole: whole[:1].clone())
    assert max(held) == 16 * 16 * 4
