"""Shrunken models: tiny, runnable in float64, and of the same structure as the originals."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from autotp.errors import AutotpError
from autotp.huggingface import read_config
from autotp.shrink import SCAN_HEAD_SIZES, SCAN_HEADS, load_shrunken, shrink_config

transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "examples" / "configs"
NAMES = sorted(path.parent.name for path in CONFIGS.glob("*/config.json"))


def shipped(name: str) -> Any:
    """The configuration object of a shipped example."""
    return read_config(str(CONFIGS / name))[1]


@pytest.mark.parametrize("name", NAMES)
def test_forward_and_backward_in_float64(name: str) -> None:
    loaded = load_shrunken(str(CONFIGS / name))
    model, config = loaded.model, loaded.model.config
    assert (loaded.batch, loaded.seq) == (2, 16) and loaded.kwargs["input_ids"].shape == (2, 16)
    assert sum(parameter.numel() for parameter in model.parameters()) < 4_000_000
    assert config.num_hidden_layers == 2 and config.vocab_size <= 144
    model(**loaded.kwargs).loss.backward()
    for parameter in model.parameters():
        assert parameter.dtype is torch.float64
        assert parameter.grad is not None and torch.isfinite(parameter.grad).all()
    assert torch.equal(model(**loaded.kwargs).logits, model(**loaded.kwargs).logits)  # train mode, yet no dropout


@pytest.mark.parametrize("name", NAMES)
def test_ratios_are_kept(name: str) -> None:
    config = shipped(name)
    before = config.to_dict()
    small = shrink_config(config)
    assert config.to_dict() == before
    heads, small_heads = config.num_attention_heads, small.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    small_kv_heads = getattr(small, "num_key_value_heads", None) or small_heads
    assert small_heads * kv_heads == heads * small_kv_heads
    assert math.gcd(small_heads, 4) == math.gcd(heads, 4) and math.gcd(small_kv_heads, 4) == math.gcd(kv_heads, 4)
    assert small.vocab_size % 16 == config.vocab_size % 16
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    small_head = getattr(small, "head_dim", None) or small.hidden_size // small_heads
    assert small_head * small_heads * config.hidden_size == head * heads * small.hidden_size
    assert getattr(small, "num_local_experts", 0) % 8 == getattr(config, "num_local_experts", 0) % 8


def test_uneven_heads_stay() -> None:
    small = shrink_config(shipped("qwen2-0.5b"))
    assert (small.num_attention_heads, small.num_key_value_heads, small.hidden_size) == (14, 2, 112)
    assert shrink_config(shipped("gpt2-xl")).n_head == 25


def test_every_kind_of_layer_stays() -> None:
    gemma = transformers.Gemma3TextConfig(num_hidden_layers=12, sliding_window=512)
    assert gemma.layer_types.count("full_attention") == 2
    small = shrink_config(gemma)
    assert small.layer_types == ["sliding_attention", "full_attention"] and small.sliding_window == 8
    deepseek = shrink_config(transformers.DeepseekV3Config(num_hidden_layers=61, first_k_dense_replace=3))
    assert deepseek.num_hidden_layers == 2
    moe = transformers.Qwen3MoeConfig(num_hidden_layers=8, mlp_only_layers=[0, 5])
    assert shrink_config(moe).mlp_only_layers == [0] and shrink_config(moe).num_hidden_layers == 2
    sparse = shrink_config(transformers.Qwen3MoeConfig(num_hidden_layers=9, decoder_sparse_step=3))
    assert (sparse.num_hidden_layers, sparse.decoder_sparse_step) == (3, 3)
    jamba = shrink_config(transformers.JambaConfig())
    assert {"mamba", "attention"} <= set(jamba.layers_block_type)


def test_experts() -> None:
    config = transformers.DeepseekV3Config()
    small = shrink_config(config)
    assert (small.n_routed_experts, small.num_experts_per_tok, small.n_group, small.topk_group) == (8, 2, 4, 2)
    assert shrink_config(transformers.Qwen2MoeConfig(num_experts=60)).num_experts == 12


def test_nested_parts_fit_together() -> None:
    config = transformers.Qwen2VLConfig(vision_config={"hidden_size": 8192})
    small = shrink_config(config)
    text, vision = small.text_config, small.vision_config
    assert text.num_hidden_layers == 2 and vision.depth == 2 and text.hidden_size < 600
    assert vision.hidden_size == text.hidden_size and vision.embed_dim < config.vision_config.embed_dim
    clip = shrink_config(transformers.CLIPConfig())
    assert clip.vision_config.image_size == 4 * clip.vision_config.patch_size
    assert clip.text_config.eos_token_id < clip.text_config.vocab_size


def test_layers_whose_features_are_taken_stay() -> None:
    dino = shrink_config(transformers.Dinov2Config(out_features=["stage3", "stage9", "stage12"]))
    assert dino.num_hidden_layers == 4 and dino.out_features == ["stage2", "stage3", "stage4"]
    dense = shrink_config(transformers.DPTConfig())
    assert dense.num_hidden_layers == 5 and dense.backbone_out_indices == [1, 2, 3, 4]


def test_blocks_that_layers_share_stay_shared() -> None:
    zamba = shrink_config(transformers.Zamba2Config())
    assert zamba.layers_block_type.count("hybrid") == 2


@pytest.mark.parametrize("name", ["Zamba2", "FalconH1", "Bamba"])
def test_heads_of_a_scan_fit_its_width(name: str) -> None:
    config = shrink_config(getattr(transformers, f"{name}Config")())
    heads = next(getattr(config, field) for field in SCAN_HEADS if hasattr(config, field))
    size = next(getattr(config, field) for field in SCAN_HEAD_SIZES if hasattr(config, field))
    assert heads * size == (getattr(config, "mamba_d_ssm", None) or config.mamba_expand * config.hidden_size)
    assert config.hidden_size < 600


def test_images_and_videos_are_small() -> None:
    small = shrink_config(transformers.InternVLConfig()).vision_config
    assert list(small.image_size) == [4 * patch for patch in small.patch_size]
    assert shrink_config(transformers.MobileViTV2Config()).image_size == 64
    assert shrink_config(transformers.VivitConfig()).num_frames <= 8
    assert shrink_config(transformers.RTDetrConfig()).num_queries == 12


def test_bottlenecks_follow_the_hidden_size() -> None:
    small = shrink_config(transformers.MobileBertConfig())
    assert small.true_hidden_size == small.intra_bottleneck_size < small.hidden_size
    detector = shrink_config(transformers.RTDetrConfig())
    assert set(detector.decoder_in_channels) == {detector.d_model} and detector.encoder_hidden_dim == detector.d_model


def test_special_tokens_fit_and_stay_distinct() -> None:
    small = shrink_config(shipped("llama-3.1-8b"))
    assert small.bos_token_id != small.eos_token_id and max(small.bos_token_id, small.eos_token_id) < small.vocab_size
    small = shrink_config(shipped("gpt2"))
    assert small.bos_token_id == small.eos_token_id == small.vocab_size - 1


def test_dropout_is_an_option() -> None:
    config = shipped("gpt2")
    assert shrink_config(config).resid_pdrop == 0.0 and shrink_config(config, zero_dropout=False).resid_pdrop == 0.1


def test_rotary_lists_follow_the_head() -> None:
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48, "rope_theta": 1e4}
    config = transformers.Phi3Config(
        rope_parameters=rope, original_max_position_embeddings=4096, max_position_embeddings=131072
    )
    small = shrink_config(config)
    assert len(small.rope_parameters["short_factor"]) == small.hidden_size // small.num_attention_heads // 2


def test_options_are_followed() -> None:
    loaded = load_shrunken(str(CONFIGS / "llama-3.1-8b"), seq=100, batch=3, dtype="float32")
    assert loaded.kwargs["input_ids"].shape == (3, 100)
    assert next(loaded.model.parameters()).dtype is torch.float32
    assert "was shrunk to" in loaded.notes[0]


def test_callable_forms(tmp_path: Path) -> None:
    loaded = load_shrunken(f"{ROOT / 'examples' / 'mlp.py'}:mlp")
    assert loaded.args[0].shape == (2, 1024) and loaded.args[0].dtype is torch.float64
    assert loaded.model(*loaded.args).dtype is torch.float64
    path = tmp_path / "large.py"
    path.write_text("import torch\ndef net(): return torch.nn.Linear(10**6, 10**6), (torch.ones(2, 10**6),)\n")
    with pytest.raises(AutotpError, match="more than 20 million parameters; give a callable that returns a small"):
        load_shrunken(f"{path}:net")


def test_sentences(tmp_path: Path) -> None:
    with pytest.raises(AutotpError, match="batch is 0, but must be at least 1"):
        load_shrunken(str(CONFIGS / "gpt2"), batch=0)
    with pytest.raises(AutotpError, match="unknown dtype `int8`"):
        load_shrunken(str(CONFIGS / "gpt2"), dtype="int8")
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": "convnext", "hidden_sizes": [512, 1024, 2048, 4096]}))
    with pytest.raises(AutotpError, match="million parameters when shrunk; give file.py:callable"):
        load_shrunken(str(path))
