"""Checkpoints that transformers renames and puts together while it loads: every rank's pieces are those of the loaded model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import autotp
from autotp.errors import AutotpError
from autotp.huggingface_weights import converted
from autotp.layouts import Layout, Segment, Split, plain_cut
from autotp.runtime.state import local_part
from autotp.runtime.weights import open_safetensors

SIZES = {
    "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 64, "max_position_embeddings": 32,
}  # fmt: skip
DEEPSEEK = {
    "n_routed_experts": 8, "moe_intermediate_size": 12, "n_group": 2, "topk_group": 1, "q_lora_rank": 16, "kv_lora_rank": 16,
    "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8, "first_k_dense_replace": 1,
}  # fmt: skip
CPU = torch.device("cpu")


def model_of(kind: str, **changed: Any) -> Any:
    import transformers

    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(getattr(transformers, f"{kind}Config")(**SIZES, **changed))


def layouts(shape: tuple[int, ...]) -> list[Layout]:
    """Whole, every dim split plainly, and the middle of three dims in two segments, as gate and up are."""
    found = [Layout(("I",)), *(Layout(("S",), (Split(dim, (0,), plain_cut(size)),)) for dim, size in enumerate(shape))]
    if len(shape) == 3:
        found.append(Layout(("S",), (Split(1, (0,), (Segment(2, shape[1] // 2, 1),)),)))
    return found


@pytest.mark.parametrize(
    ("kind", "changed"),
    [
        ("Mixtral", {"num_local_experts": 5}),
        ("Qwen3Moe", {"num_experts": 6, "moe_intermediate_size": 12}),
        ("DeepseekV3", DEEPSEEK),
        ("Llama", {}),
    ],
)
def test_pieces_of_published_names(kind: str, changed: dict[str, Any], tmp_path: Path) -> None:
    model = model_of(kind, **changed)
    model.save_pretrained(tmp_path)
    there = open_safetensors(tmp_path)
    found = converted(there, model)
    assert set(found.tensors) == set(model.state_dict())
    assert (kind == "Llama") == (set(found.tensors) == set(there.tensors))  # the others' names differ
    for name, value in model.state_dict().items():
        for layout in layouts(tuple(value.shape)):
            for rank in range(3):
                part = found.tensors[name].local_part(layout, (3,), (rank,), value.dtype, CPU)
                assert torch.equal(part, local_part(value, layout, (3,), (rank,))), f"{name} {layout} on rank {rank}"


def test_exported_names_are_read_too(tmp_path: Path) -> None:
    """`autotp.export` writes the model's own names, which transformers takes as they are."""
    import transformers

    model = model_of("Mixtral", num_local_experts=3)
    autotp.export(tmp_path, model)
    model.config.save_pretrained(tmp_path)
    again, seen = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(seen.values()), seen
    assert all(torch.equal(again.state_dict()[name], value) for name, value in model.state_dict().items())
    assert set(converted(open_safetensors(tmp_path), model).tensors) == set(model.state_dict())


def test_experts_that_differ_are_named(tmp_path: Path) -> None:
    model = model_of("Mixtral", num_local_experts=3)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = next(key for key in tensors if key.endswith("experts.1.w2.weight"))
    save_file({**tensors, name: tensors[name][:-1].contiguous()}, tmp_path / "model.safetensors")
    with pytest.raises(AutotpError, match=r"experts.0.w2.weight' to .*experts.2.w2.weight' are put together in the model, but"):
        converted(open_safetensors(tmp_path), model)
