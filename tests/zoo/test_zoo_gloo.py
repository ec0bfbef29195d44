"""Five models of the zoo on real Gloo ranks, through the call that users make."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

import autotp
from autotp.runtime.state import gather_full
from tests.models import InFloat64, splitting_pays
from tests.ranks import run_ranks
from tests.zoo.catalogue import case_of

pytest.importorskip("transformers")

TOLERANCE = 1e-9


def leaves(output: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, torch.Tensor)]


def same_as_one_device(names: tuple[str, ...]) -> None:
    """Outputs, buffers and every gradient of a step of each model, in float64 throughout."""
    with InFloat64():
        for name in names:
            case = case_of(name)
            alone, loaded = (case.build(torch.float64) for _ in range(2))
            many = autotp.parallelize(loaded.model, loaded.args, loaded.kwargs, cluster=splitting_pays())
            outputs = [leaves(model(*loaded.args, **loaded.kwargs)) for model in (alone.model, many)]
            for place, (wanted, found) in enumerate(zip(*outputs, strict=True)):
                close(found, wanted, f"{name} output {place}")
            for tensors in outputs:
                torch.stack([tensor.square().mean() for tensor in tensors if tensor.requires_grad]).sum().backward()
            specs = {spec.name: spec for spec in many._sharded.state}
            for (key, wanted), mine in zip(alone.model.named_parameters(), many.parameters(), strict=True):
                if wanted.grad is None:
                    continue
                assert mine.grad is not None, f"{name} gives no gradient of {key}"
                close(gather_full(mine.grad.to_local(), specs[key], many._device_mesh), wanted.grad, f"{name} gradient of {key}")
            after = many.full_state_dict()
            for key, wanted in alone.model.state_dict().items():
                close(after[key], wanted, f"{name} {key} after the step")


def close(found: torch.Tensor, wanted: torch.Tensor, what: str) -> None:
    scale = max(1.0, float(wanted.detach().abs().max())) if wanted.numel() else 1.0
    torch.testing.assert_close(found, wanted, atol=TOLERANCE * scale, rtol=0, msg=lambda text: f"{what}: {text}")


@pytest.mark.parametrize("ranks", [2, 3])
def test_five_models_on_gloo(ranks: int) -> None:
    names = ("LlamaForCausalLM", "T5ForConditionalGeneration", "ViTForImageClassification", "MixtralForCausalLM", "resnet")
    run_ranks(same_as_one_device, ranks, names)
